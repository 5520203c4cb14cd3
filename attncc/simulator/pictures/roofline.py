"""The roofline of a device, and where a kernel and dense attention stand under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attncc.errors import UnsupportedError
from attncc.pipeline import plan
from attncc.simulator import constants
from attncc.simulator.machine import Sm
from attncc.simulator.pictures.style import EMPTY, FULL, INK, PARTIAL, QUERY, new_figure, plain
from attncc.simulator.predict import Prediction, dtype_of
from attncc.simulator.report import SpeedupReport
from attncc.targets import Performance
from attncc.targets import target as target_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A kernel under the roof: matrix FLOP a second, and FLOP for each byte of memory and of L2."""

    flops: float
    per_memory_byte: float
    per_cache_byte: float

    @staticmethod
    def of(p: Prediction, device: Performance, tensor_rate: float) -> Point | None:
        """From the times that the units are busy; None where there are none (a measured baseline) or nothing is computed."""
        if not p.busy or not p.busy["tensor"]:
            return None
        work = p.busy["tensor"] * p.clock_hz * device.sms * tensor_rate
        memory = p.busy["memory"] * device.memory_bytes_per_second
        cache = p.busy["cache"] * p.clock_hz / device.clock_hz * device.l2_bytes_per_second
        return Point(work / p.milliseconds, work / memory, work / cache)


def roofline_figure(report: SpeedupReport) -> Figure:
    """Ceilings of matrix units, L2 and memory at the data sheet's clock; the kernel and its baseline as predicted.

    Raises:
        UnsupportedError: a report without times.
    """
    device = target_record(report.target).performance
    if report.prediction is None or report.baseline_prediction is None or device is None:
        raise UnsupportedError("a roofline", report.unpredicted or "there are no times", "a device such as h100")
    kernel = plan(report.spec, report.target, report.q_tile, report.k_tile).kernels[-1]
    rate = Sm(device, dtype_of(kernel), next(iter(constants.shipped().pipelines.values()))).tensor_rate
    figure = new_figure(8.0, 4.8)
    axes = figure.add_axes((0.1, 0.13, 0.87, 0.74))
    named = (("this kernel", report.prediction, FULL), ("dense attention", report.baseline_prediction, PARTIAL))
    points = [(name, Point.of(p, device, rate), color) for name, p, color in named]
    _draw_ceilings(axes, device, rate * device.sms * device.clock_hz, [p for _, p, _ in points if p])
    for name, point, color in points:
        if point is not None:
            _draw_point(axes, point, name, color)
    _finish(axes, f"roofline of {report.target}, {dtype_of(kernel)}; the kernels as predicted")
    return figure


def _draw_ceilings(axes: Axes, device: Performance, peak: float, points: list[Point]) -> None:
    slopes = ((device.memory_bytes_per_second, "memory", QUERY), (device.l2_bytes_per_second, "L2", INK))
    intensities = [x for p in points for x in (p.per_memory_byte, p.per_cache_byte)] + [peak / s for s, _, _ in slopes]
    x = np.geomspace(min(intensities) / 8, max(intensities) * 4, 200)
    for slope, name, color in slopes:
        roof = np.minimum(peak, x * slope)
        axes.plot(x, roof / 1e12, color=color, linewidth=1.4, label=f"{name}: {slope / 1e12:.3g} TB/s")
    axes.axhline(peak / 1e12, color=INK, linewidth=1.0, linestyle="--", label=f"matrix units: {peak / 1e12:,.0f} TFLOP/s")
    axes.fill_between(x, np.minimum(peak, x * slopes[0][0]) / 1e12, 1e-9, color=EMPTY, alpha=0.5, linewidth=0)
    lowest = min([p.flops for p in points] + [x[0] * slopes[0][0]])
    axes.set_ylim(lowest / 2e12, peak * 2.5e-12)
    axes.set_xlim(x[0], x[-1])


def _draw_point(axes: Axes, point: Point, name: str, color: str) -> None:
    y = point.flops / 1e12
    axes.plot([point.per_cache_byte, point.per_memory_byte], [y, y], color=color, linewidth=0.8, linestyle=":")
    axes.plot(point.per_memory_byte, y, "o", color=color, markersize=8, label=f"{name}: {y:,.0f} TFLOP/s, by memory traffic")
    axes.plot(point.per_cache_byte, y, "o", markerfacecolor="none", markeredgecolor=color, markersize=8, label=f"{name}, by L2 traffic")


def _finish(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP of matrix products for each byte of traffic", color=INK, fontsize=9.5)
    axes.set_ylabel("TFLOP/s", color=INK, fontsize=9.5)
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=8)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    plain(axes)
