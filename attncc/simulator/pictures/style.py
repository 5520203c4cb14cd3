"""Colours, axes and files that all pictures share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER = "#22303c", "#ffffff"
EMPTY, WASTED, PARTIAL, FULL, QUERY = "#edf0f3", "#f9d9a6", "#eb9a2b", "#2e6da4", "#c2185b"
MOST_CELLS = 512
"""Cells on a side of a picture; more tiles, or tokens, than that share cells."""
SUFFIXES = (".png", ".svg", ".pdf")


def new_figure(width: float = 12.4, height: float = 7.2) -> Figure:
    """An empty figure, inches wide and high.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("a picture", "matplotlib is not installed", "the same command after: pip install 'attncc[plot]'") from None
    return Figure(figsize=(width, height), dpi=160, facecolor=PAPER)


def check_suffix(path: Path) -> None:
    """Refuses files whose name does not say what kind of picture they are.

    Raises:
        InputError: an unknown suffix; lists the known ones.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError("picture", f"{path} must end in {', '.join(SUFFIXES)}")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure into a .png, .svg or .pdf file, overwritten.

    Raises:
        InputError: a file name without a known suffix, a file that cannot be written.
    """
    check_suffix(path)
    try:
        figure.savefig(path, facecolor=PAPER)
    except OSError as error:
        raise InputError("picture", f"cannot write {path}: {error.strerror or error}") from None


def bare(axes: Axes, units: tuple[int, int] = (1, 1)) -> None:
    """Thin frame, whole numbers; `units` says how many things one step of the vertical and of the horizontal axis stands for."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis, unit in ((axes.yaxis, units[0]), (axes.xaxis, units[1])):
        if len(axis.get_ticklocs()):
            axis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda x, _, unit=unit: f"{int(x) * unit:,}"))
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_linewidth(0.6)


def plain(axes: Axes) -> None:
    """A frame of two thin lines, ticks as they are."""
    axes.tick_params(colors=INK, labelsize=8.5, length=3, which="both")
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_linewidth(0.6)
        spine.set_visible(name in ("left", "bottom"))


def colors(*names: str) -> Any:
    """A colour map of single colours."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(names))
