"""Pictures of a report, each a matplotlib figure: mask and block mask, windows, curves, a roofline, a timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc.errors import InputError
from attncc.simulator.measured import Measured
from attncc.simulator.pictures.curves import curves_figure
from attncc.simulator.pictures.mask import mask_figure
from attncc.simulator.pictures.roofline import roofline_figure
from attncc.simulator.pictures.scene import Scene
from attncc.simulator.pictures.style import check_suffix, save
from attncc.simulator.pictures.timeline import timeline_figure
from attncc.simulator.pictures.window import window_figure
from attncc.simulator.report import Kind, SpeedupReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot"]


def plot(
    report: SpeedupReport,
    path: str | Path | None = None,
    kind: Kind = "mask",
    *,
    tables: Mapping[str, Any] | None = None,
    head: int = 0,
    query: int | None = None,
    measured: Sequence[Measured] = (),
) -> Figure:
    """A picture of a report; arguments and errors as of `SpeedupReport.plot`."""
    if path is not None:
        check_suffix(Path(path))
    if kind in ("mask", "window"):
        scene = Scene.of(report, tables, head, query)
        figure = mask_figure(scene) if kind == "mask" else window_figure(scene)
    elif kind == "curves":
        figure = curves_figure(report, tables, measured)
    elif kind == "roofline":
        figure = roofline_figure(report)
    elif kind == "timeline":
        figure = timeline_figure(report, tables)
    else:
        raise InputError("kind", f"{kind!r} is no picture; known are mask, window, curves, roofline, timeline")
    if path is not None:
        save(figure, Path(path))
    return figure
