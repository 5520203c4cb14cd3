"""What one query sees over the grid, plane by plane on three axes, with the tiles that its tile visits."""

from __future__ import annotations

from math import ceil, prod, sqrt
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from attncc.errors import InputError
from attncc.passes.tiles import Shape
from attncc.simulator.pictures.scene import Scene, rows_of
from attncc.simulator.pictures.style import EMPTY, FULL, INK, PAPER, PARTIAL, QUERY, WASTED, bare, colors, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def window_figure(scene: Scene) -> Figure:
    """The window of one query over the grid.

    Raises:
        InputError: a grid of one axis, whose mask is drawn whole.
    """
    from matplotlib.patches import Patch

    if scene.rank == 1:
        raise InputError("kind", "a window is drawn over two or three axes; on one, the mask shows every query")
    figure = new_figure(8.0, 6.6)
    draw_window(figure, scene, (0.07, 0.1, 0.9, 0.82))
    named = (
        (EMPTY, "not visited"),
        (WASTED, "visited, hidden"),
        (PARTIAL, "seen, partial tile"),
        (FULL, "seen, full tile"),
        (QUERY, "query"),
    )
    patches = [Patch(facecolor=color, edgecolor=INK, linewidth=0.4, label=text) for color, text in named]
    figure.legend(handles=patches, loc="lower center", ncols=5, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def draw_window(figure: Figure, scene: Scene, place: tuple[float, float, float, float]) -> None:
    """The keys of one query over the grid, plane by plane on three axes."""
    left, bottom, width, height = place
    title = f"what query ({', '.join(map(str, scene.at))}) sees of the grid"
    kinds = _key_kinds(scene)
    planes = list(range(len(kinds))) if scene.rank == 3 else [0]
    kinds = kinds if scene.rank == 3 else kinds[None]
    planes = _chosen(planes, scene, kinds)
    columns, rows = _arrangement(len(planes), kinds.shape[1:], _inches(figure, width, height))
    if len(planes) == 1:
        axes = figure.add_axes(place)
        _draw_plane(axes, scene, kinds[planes[0]], planes[0], False)
        axes.set_title(title, fontsize=11, color=INK, loc="left", pad=8)
        return
    figure.text(left, bottom + height + 0.012, title, fontsize=11, color=INK)
    for i, plane in enumerate(planes):
        row, column = divmod(i, columns)
        cell = width / columns, height / rows
        box = (left + column * cell[0], bottom + height - (row + 1) * cell[1], cell[0] - 0.008, cell[1] - 0.022)
        _draw_plane(figure.add_axes(box), scene, kinds[plane], plane, True)


def _inches(figure: Figure, width: float, height: float) -> float:
    """Width / height of a box of a figure."""
    across, down = figure.get_size_inches()
    return float(width * across / (height * down))


def _chosen(planes: list[int], scene: Scene, kinds: npt.NDArray[np.int8], most: int = 30) -> list[int]:
    """Planes to draw: all of them, or those nearest the query that have something to show."""
    if len(planes) <= most:
        return planes
    near = sorted(planes, key=lambda p: (not kinds[p].any(), abs(p - scene.at[0])))
    return sorted(near[:most])


def _arrangement(count: int, shape: tuple[int, ...], room: float) -> tuple[int, int]:
    """Columns and rows of small panels of a shape that fill a box of proportion `room` (width / height) best."""
    proportion = shape[1] / shape[0]
    columns = max(1, min(count, round(sqrt(count * room / proportion))))
    return columns, ceil(count / columns)


def _draw_plane(axes: Axes, scene: Scene, kinds: npt.NDArray[np.int8], plane: int, small: bool) -> None:
    kinds_of = colors(EMPTY, WASTED, PARTIAL, FULL)
    height, width = kinds.shape
    axes.imshow(kinds, cmap=kinds_of, vmin=0, vmax=3, extent=(0, width, height, 0), interpolation="nearest", aspect="equal")
    r = scene.report
    if prod(scene.mask.tiling.mask.order) == 1 and not small:
        tile_lines(axes, r.k_tile[-2:], (height, width))
    if scene.rank == 2 or plane == scene.at[0]:
        _mark_query(axes, scene)
    elif scene.rank == 3 and plane // r.q_tile[0] == scene.at[0] // r.q_tile[0]:
        _outline(axes, scene)
    if small:
        axes.set_title(f"plane {plane}", fontsize=6.5, color=INK, pad=1.5)
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axes.set_xlabel(f"axis {scene.rank - 1}", color=INK, fontsize=9.5)
        axes.set_ylabel(f"axis {scene.rank - 2}", color=INK, fontsize=9.5)
    bare(axes)


def tile_lines(axes: Axes, tile: Shape, shape: tuple[int, int]) -> None:
    """White lines between tiles, where there are not too many."""
    rows, columns = (range(side, n, side) for side, n in zip(tile, shape))
    if len(rows) + len(columns) <= 130:
        axes.hlines(list(rows), 0, shape[1], colors=PAPER, linewidth=0.5)
        axes.vlines(list(columns), 0, shape[0], colors=PAPER, linewidth=0.5)


def _mark_query(axes: Axes, scene: Scene) -> None:
    from matplotlib.patches import Circle, Rectangle

    row, column = scene.at[-2:]
    _outline(axes, scene)
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=QUERY, edgecolor="none", zorder=4))
    shape = scene.report.tokens[-2:]
    if max(shape) > 48:  # one token is a speck: put a ring around it
        axes.add_patch(Circle((column + 0.5, row + 0.5), max(shape) / 55, fill=False, edgecolor=QUERY, linewidth=1.4, zorder=4))


def _outline(axes: Axes, scene: Scene) -> None:
    """The query's tile, where it is one box of the grid."""
    from matplotlib.patches import Rectangle

    if prod(scene.mask.tiling.mask.order) == 1:
        (row, column), (height, width) = scene.at[-2:], scene.report.q_tile[-2:]
        corner = column // width * width, row // height * height
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=QUERY, linewidth=1.1, zorder=3))


def _key_kinds(scene: Scene) -> npt.NDArray[np.int8]:
    """For every key: 0 its tile is not visited, 1 masked in a visited tile, 2 seen in a partial tile, 3 seen in a full tile."""
    r, tiling = scene.report, scene.mask.tiling
    order = tiling.mask.order
    residue = tuple(x % d for x, d in zip(scene.at, order))
    row = _row_of(scene, residue)
    keys = np.indices(r.key_tokens)
    same = np.logical_and.reduce([keys[a] % d == residue[a] for a, d in enumerate(order)])
    tile = np.zeros(r.key_tokens, np.int64)
    for a, d in enumerate(order):
        tile = tile * tiling.k_tiles[a] + keys[a] // d // tiling.k_tile[a]
    visited = np.where(same, row[tile], 0)
    seen = scene.allowed(np.array(scene.query), np.arange(prod(r.key_tokens))).reshape(r.key_tokens)
    return np.where(visited == 0, 0, np.where(seen, visited + 1, 1)).astype(np.int8)


def _row_of(scene: Scene, residue: Shape) -> npt.NDArray[np.int8]:
    """Kinds of all key tiles (0, 1 partial, 2 full) for the query's tile."""
    tiling = scene.mask.tiling
    group, flat = 0, 0
    for a, d in enumerate(tiling.mask.order):
        group = group * d + residue[a]
        flat = flat * tiling.q_tiles[a] + scene.at[a] // d // tiling.q_tile[a]
    first = group * prod(tiling.q_tiles) + flat
    row: npt.NDArray[np.int8] = rows_of(scene, first, first + 1)[0]
    return row
