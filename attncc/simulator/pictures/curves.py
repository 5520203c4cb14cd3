"""Speedup against length: the three levels of a mask over smaller and larger grids, and measured points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, prod
from typing import TYPE_CHECKING, Any

from attncc.errors import AttnccError, UnsupportedError
from attncc.simulator.levels import simulate
from attncc.simulator.measured import Measured
from attncc.simulator.pictures.style import FULL, INK, PARTIAL, QUERY, new_figure, plain
from attncc.simulator.report import SpeedupReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
"""Sides of the grids, relative to the report's."""
MOST_TILES = 1 << 24
"""Tiles of a dense grid, at most: what a mask that is no product of bands can be classified over while one waits."""
LEVELS = (
    ("FLOP bound", INK, "--", "flop_bound"),
    ("tile bound", PARTIAL, "-.", "tile_bound"),
    ("prediction", FULL, "-", "predicted_speedup"),
)


def curves_figure(report: SpeedupReport, tables: Mapping[str, Any] | None = None, measured: Sequence[Measured] = ()) -> Figure:
    """Three levels over grids of other lengths, and measured points.

    Raises:
        UnsupportedError: a mask that reads tables, which have one length.
    """
    if tables:
        raise UnsupportedError("speedup against length", "the mask reads tables, and these have one length", "a mask without tables")
    figure = new_figure(8.0, 4.8)
    axes = figure.add_axes((0.09, 0.13, 0.88, 0.74))
    _draw_levels(axes, swept(report))
    _draw_measured(axes, report, measured)
    axes.axhline(1.0, color=INK, linewidth=0.6, alpha=0.5)
    axes.axvline(prod(report.tokens), color=INK, linewidth=0.6, alpha=0.35, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("query tokens; dotted: the report's grid", color=INK, fontsize=9.5)
    axes.set_ylabel(f"speedup over {report.baseline}", color=INK, fontsize=9.5)
    axes.set_title(f"speedup against length on {report.target}", fontsize=11, color=INK, loc="left", pad=8)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    plain(axes)
    return figure


def swept(report: SpeedupReport) -> list[SpeedupReport]:
    """Reports over grids of other lengths; those that the mask does not fit are left out."""
    reports = (report if step == 1.0 else _scaled(report, step) for step in STEPS)
    return [r for r in reports if r is not None]


def _scaled(report: SpeedupReport, step: float) -> SpeedupReport | None:
    spec, same = report.spec, report.spec.key_tokens is None
    query, key = (tuple(max(1, round(n * step)) for n in side) for side in (report.tokens, report.key_tokens))
    if prod(query) * prod(key) > MOST_TILES * prod(report.q_tile) * prod(report.k_tile):
        return None
    data = {**spec.model_dump(mode="json"), "tokens": query, "key_tokens": None if same else key}
    try:
        return simulate(type(spec).model_validate(data), report.target, report.q_tile, report.k_tile)
    except (AttnccError, ValueError):  # a window longer than the grid, and the like
        return None


def _draw_levels(axes: Axes, reports: Sequence[SpeedupReport]) -> None:
    for label, color, style, name in LEVELS:
        points = [(prod(r.tokens), getattr(r, name)) for r in reports if getattr(r, name) not in (None, inf)]
        if points:
            axes.plot(*zip(*points), color=color, linestyle=style, marker="o", markersize=3, linewidth=1.6, label=label)


def _draw_measured(axes: Axes, report: SpeedupReport, measured: Sequence[Measured]) -> None:
    for device in dict.fromkeys(m.device for m in measured):
        points = [(prod(m.tokens or report.tokens), m.speedup) for m in measured if m.device == device]
        axes.plot(*zip(*points), color=QUERY, marker="D", markersize=6, linestyle="none", label=f"measured on {device}".replace("$", r"\$"))
