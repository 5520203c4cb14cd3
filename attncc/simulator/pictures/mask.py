"""A mask beside the tiles that a kernel visits: all pairs of a line of tokens, or what one query sees of a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attncc.simulator.pictures.scene import Scene, classes_apart, coarse, rows_of, words
from attncc.simulator.pictures.style import (
    EMPTY,
    FULL,
    INK,
    MOST_CELLS,
    PARTIAL,
    QUERY,
    WASTED,
    bare,
    colors,
    new_figure,
)
from attncc.simulator.pictures.window import draw_window, tile_lines
from attncc.simulator.report import SpeedupReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def mask_figure(scene: Scene) -> Figure:
    """The mask beside its block mask."""
    figure = new_figure()
    _compose(figure, scene)
    return figure


def _compose(figure: Figure, scene: Scene) -> None:
    r = scene.report
    figure.text(0.045, 0.955, _headline(scene), fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(0.045, 0.905, _subline(r), fontsize=10.5, color=INK, va="top", alpha=0.8)
    if scene.rank == 1:
        _draw_pairs(figure.add_axes((0.075, 0.13, 0.40, 0.69)), scene)
    else:
        draw_window(figure, scene, (0.045, 0.13, 0.455, 0.69))
    _draw_tiles(figure.add_axes((0.575, 0.13, 0.40, 0.69)), scene)
    _legend(figure, scene.rank)


def _headline(scene: Scene) -> str:
    grid = " × ".join(f"{n:,}" for n in scene.report.tokens)
    head = f", head {scene.head}" if scene.mask.heads > 1 else ""
    return f"{words(scene.report.spec.mask)} mask, {grid} tokens{head}"


def _subline(r: SpeedupReport) -> str:
    tiles = r.tiles
    q_tile, k_tile = (" × ".join(map(str, t)) for t in (r.q_tile, r.k_tile))
    kinds = "block-sparse" if r.block_sparse else f"{tiles.full:,.0f} full, {tiles.partial:,.0f} partial"
    counts = f"{tiles.visited:,.0f} of {tiles.total:,} tiles visited ({kinds})"
    return f"tiles {q_tile} by {k_tile}   ·   FLOP bound {r.flop_bound:.2f}×   ·   tile bound {r.tile_bound:.2f}×   ·   {counts}"


def _legend(figure: Figure, rank: int) -> None:
    from matplotlib.patches import Patch

    entries = [(EMPTY, "empty: never visited"), (PARTIAL, "partial: needs its mask"), (FULL, "full: needs none")]
    if rank > 1:
        entries.insert(1, (WASTED, "visited, hidden from this query"))
    patches: list[Any] = [Patch(facecolor=color, edgecolor=INK, linewidth=0.4, label=text) for color, text in entries]
    if rank > 1:
        patches.append(Patch(facecolor=QUERY, label="the query, its tile outlined"))
    figure.legend(
        handles=patches, loc="lower center", ncols=len(patches), frameon=False, fontsize=10, labelcolor=INK, bbox_to_anchor=(0.5, 0.01)
    )


# ---- all pairs of one axis -----------------------------------------------------------------------------------------------------


def _draw_pairs(axes: Axes, scene: Scene) -> None:
    """The mask itself: dark where a query sees a key; shades where pairs share a cell."""
    from matplotlib.colors import LinearSegmentedColormap

    (queries,), (keys,) = scene.report.tokens, scene.report.key_tokens
    shades = LinearSegmentedColormap.from_list("share", [EMPTY, FULL])
    axes.imshow(_shares(scene), cmap=shades, vmin=0, vmax=1, extent=(0, keys, queries, 0), interpolation="nearest", aspect="auto")
    axes.set_title("mask: which keys each query sees", fontsize=11, color=INK, loc="left", pad=8)
    axes.set_xlabel("key", color=INK, fontsize=9.5)
    axes.set_ylabel("query", color=INK, fontsize=9.5)
    bare(axes)


def _shares(scene: Scene, points: int = 4) -> npt.NDArray[np.float64]:
    """Share of allowed pairs in every cell, from a few points of it."""
    (queries,), (keys,) = scene.report.tokens, scene.report.key_tokens
    samples = [_samples(n, points) for n in (queries, keys)]
    seen = scene.allowed(samples[0].reshape(-1, 1), samples[1].reshape(1, -1))
    return np.asarray(seen.reshape(len(samples[0]), samples[0].shape[1], len(samples[1]), -1).mean(axis=(1, 3)))


def _samples(n: int, points: int) -> npt.NDArray[np.int64]:
    """Tokens `[cells, points]` to look at: each token once where there is room."""
    cells = min(n, MOST_CELLS)
    per_cell = 1 if cells == n else points
    return ((np.arange(cells * per_cell) + 0.5) * n / (cells * per_cell)).astype(np.int64).reshape(cells, per_cell)


# ---- all tiles -----------------------------------------------------------------------------------------------------------------


def _draw_tiles(axes: Axes, scene: Scene) -> None:
    """The block mask. Residue classes of a dilated mask stand one after the other: tiles never cross them."""
    mask, cell = coarse(scene)
    kinds = classes_apart(mask.to_dense()[0, scene.head if mask.heads > 1 else 0], mask)
    rows, columns = kinds.shape
    axes.imshow(
        kinds, cmap=colors(EMPTY, PARTIAL, FULL), vmin=0, vmax=2, extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto"
    )
    shared = f", {' by '.join(map(str, cell))} in a cell" if max(cell) > 1 else ""
    classes = f", {mask.tiling.classes} residue classes" if mask.tiling.classes > 1 else ""
    axes.set_title(
        f"block mask: {rows * cell[0]:,} × {columns * cell[1]:,} tiles{shared}{classes}", fontsize=11, color=INK, loc="left", pad=8
    )
    axes.set_xlabel("key tile", color=INK, fontsize=9.5)
    axes.set_ylabel("query tile", color=INK, fontsize=9.5)
    tile_lines(axes, (1, 1), (rows, columns))
    bare(axes, cell)
    if scene.rank == 1 and min(rows, columns) > 160 and not kinds[: rows * 9 // 20, columns * 11 // 20 :].any():
        _draw_detail(axes.inset_axes((0.56, 0.57, 0.41, 0.37)), scene)


def _draw_detail(axes: Axes, scene: Scene) -> None:
    """Tiles near the query, large enough to be told apart, in a corner that is empty."""
    tiling = scene.mask.tiling
    row = scene.query // tiling.q_tile[0]
    visited = np.flatnonzero(rows_of(scene, row, row + 1)[0])
    size = int(np.clip(2 * len(visited), 16, 80))
    middle = int(np.median(visited)) if len(visited) else 0
    top, left = (max(0, at - size // 2) for at in (row, middle))
    kinds = rows_of(scene, top, min(top + size, tiling.rows))[:, left : left + size]
    extent = (left, left + kinds.shape[1], top + kinds.shape[0], top)
    axes.imshow(kinds, cmap=colors(EMPTY, PARTIAL, FULL), vmin=0, vmax=2, extent=extent, interpolation="nearest", aspect="auto")
    axes.set_title(f"around query {scene.query:,}", fontsize=8.5, color=INK, loc="left", pad=4)
    bare(axes)
    axes.tick_params(labelsize=6.5)
