"""Which SM runs which blocks when: the waves of a launch, and the idle tail of its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from attncc.errors import UnsupportedError
from attncc.pipeline import plan
from attncc.simulator.bounds import classify
from attncc.simulator.machine import Slot, idle_share, timeline
from attncc.simulator.pictures.style import EMPTY, FULL, INK, WASTED, new_figure, plain
from attncc.simulator.predict import Conditions, Launch, Rows
from attncc.simulator.report import SpeedupReport
from attncc.targets import target as target_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = "#8fb8dc"
MOST_SLOTS = 24
"""Slots that are drawn; of more, some from the first to finish to the last."""
MOST_BARS = 200
"""Blocks of a slot that are drawn apart; of more, neighbours share a bar."""
MOST_BLOCKS = 1 << 20
"""Blocks of a launch that are scheduled one by one."""


def timeline_figure(report: SpeedupReport, tables: Mapping[str, Any] | None = None) -> Figure:
    """The whole launch, and the end of it enlarged; forward, keys not split, blocks as the report's prediction has them.

    Raises:
        UnsupportedError: a report without times, or a launch of too many blocks.
    """
    slots, clock = scheduled(report, tables)
    shown, end = _chosen(slots), max(slot.edges[-1] for slot in slots)
    figure = new_figure(8.0, 5.2)
    axes = figure.add_axes((0.08, 0.13, 0.43, 0.72)), figure.add_axes((0.56, 0.13, 0.41, 0.72))
    longest = max((b - a for slot in shown for a, b in pairwise(slot.edges)), default=end)
    _draw(axes[0], shown, (0.0, end), clock)
    _draw(axes[1], shown, (max(0.0, end - 3.5 * longest), end), clock)
    some = f"{len(shown)} of {len(slots)} slots" if len(shown) < len(slots) else f"all {len(slots)} slots"
    axes[0].set_ylabel(f"{some}, first to finish on top", color=INK, fontsize=9.5)
    blocks = sum(len(slot.edges) - 1 for slot in slots)
    axes[0].set_title(f"{blocks:,} blocks on {len(slots)} slots", fontsize=11, color=INK, loc="left", pad=8)
    axes[1].set_title(f"the end: {idle_share(slots):.1%} of the whole is idle", fontsize=11, color=INK, loc="left", pad=8)
    return figure


def scheduled(report: SpeedupReport, tables: Mapping[str, Any] | None = None) -> tuple[list[Slot], float]:
    """Slots with their blocks, in cycles, and the mean clock."""
    record, prediction = target_record(report.target), report.prediction
    if prediction is None or record.performance is None:
        raise UnsupportedError("a timeline", report.unpredicted or "there are no times", "a device such as h100")
    kernels = plan(report.spec, report.target, report.q_tile, report.k_tile).kernels
    kernel = kernels[-1]
    mask = classify(report.spec, report.q_tile, report.k_tile, report.lengths, tables)
    batch = max(mask.batch, prediction.blocks // (len(kernels) * report.spec.heads * mask.tiling.rows))
    if prediction.blocks > MOST_BLOCKS:
        raise UnsupportedError("a timeline", f"{prediction.blocks:,} blocks are too many", f"at most {MOST_BLOCKS:,} of them")
    conditions = Conditions(record, batch, pipeline="torch" if record.backend == "cpu" else "triton")
    rows = Rows.of(mask, report.spec.heads, batch, kernel.row_order == "descending")
    launch = Launch(kernel, conditions)
    return timeline(np.tile(launch.blocks(rows), rows.copies).tolist(), launch.slots), prediction.clock_hz


def _chosen(slots: Sequence[Slot]) -> list[Slot]:
    by_end = sorted(slots, key=lambda slot: slot.edges[-1])
    picked = np.unique(np.linspace(0, len(slots) - 1, MOST_SLOTS).round().astype(int))
    return [by_end[i] for i in picked]


def _draw(axes: Axes, slots: Sequence[Slot], window: tuple[float, float], clock: float) -> None:
    """Bars from `window[0]` to `window[1]` cycles; neighbouring blocks differ in shade, what is idle is hatched."""
    scale = 1e3 / clock
    low, high = window
    for row, slot in enumerate(slots):
        edges = [e for e in slot.edges if e >= low]
        edges = ([low] if slot.edges[-1] > low else []) + edges if edges and edges[0] > low else edges
        step = -(-len(edges) // MOST_BARS) if edges else 1
        edges = edges[::step] + ([edges[-1]] if step > 1 else [])
        bars = [(a * scale, (b - a) * scale) for a, b in pairwise(edges)]
        axes.broken_barh(bars, (row + 0.1, 0.8), facecolors=[FULL, LIGHT] if len(bars) > 1 else FULL, linewidth=0)
        idle = max(low, slot.edges[-1])
        axes.broken_barh([(idle * scale, (high - idle) * scale)], (row + 0.1, 0.8), facecolors=WASTED, linewidth=0)
    axes.set_xlim(low * scale, high * scale)
    axes.set_ylim(len(slots), 0)
    axes.set_yticks([])
    axes.set_facecolor(EMPTY)
    axes.set_xlabel("ms; blue: blocks in turn, yellow: idle", color=INK, fontsize=9.5)
    plain(axes)
