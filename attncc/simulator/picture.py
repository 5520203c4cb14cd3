"""Pictures of a mask: what one query sees over the grid, or all pairs of a line of tokens, beside the tiles that a kernel visits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attncc.errors import InputError, UnsupportedError
from attncc.ir.values import evaluate
from attncc.passes.block_mask import BlockMask
from attncc.passes.given import Lengths, known_grid, known_tables
from attncc.passes.tiles import Shape, unflatten
from attncc.simulator.bounds import classify
from attncc.simulator.levels import simulate
from attncc.simulator.report import SpeedupReport
from attncc.spec.attention import AttentionSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER = "#22303c", "#ffffff"
EMPTY, WASTED, PARTIAL, FULL, QUERY = "#edf0f3", "#f9d9a6", "#eb9a2b", "#2e6da4", "#c2185b"
MOST_CELLS = 512
"""Cells on a side of a picture; more tiles, or tokens, than that share cells."""
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Scene:
    """What is drawn: a spec over known lengths, its tiles, and one head and query of it."""

    spec: AttentionSpec
    report: SpeedupReport
    tables: Mapping[str, Any]
    lengths: Lengths
    head: int
    query: int

    @property
    def rank(self) -> int:
        """Axes of the grid."""
        return len(self.report.tokens)

    @property
    def at(self) -> Shape:
        """Coordinates of the query."""
        return unflatten(self.query, self.report.tokens)

    @cached_property
    def mask(self) -> BlockMask:
        """The block mask of the report's tiles."""
        r = self.report
        return classify(self.spec, r.q_tile, r.k_tile, self.lengths, self.tables)

    def allowed(self, queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether queries see keys, flattened indices that broadcast."""
        r, env = self.report, {"b": 0, "h": self.head, **self.tables}
        for side, index, lengths in (("q", queries, r.tokens), ("k", keys, r.key_tokens)):
            for a in reversed(range(self.rank)):
                env |= {f"{side}{a}": index % lengths[a], f"n{side}{a}": lengths[a]}
                index = index // lengths[a]
        value = evaluate(self.spec.predicate, env)
        return np.broadcast_to(value, np.broadcast_shapes(queries.shape, keys.shape))


def draw(
    spec: AttentionSpec,
    path: Path,
    q_tile: Shape,
    k_tile: Shape,
    *,
    lengths: Lengths = None,
    tables: Mapping[str, Any] | None = None,
    head: int = 0,
    query: int | None = None,
) -> None:
    """Draws a mask and its block mask into a file.

    On one axis: all pairs, and all tiles. On more: the keys that one query sees, with the tiles that its tile visits, and all tiles.

    Args:
        spec: whose mask is drawn.
        path: a .png, .svg or .pdf file, overwritten.
        q_tile: tokens of a query tile by axis.
        k_tile: the same of a key tile.
        lengths: tokens of each axis that the spec leaves open.
        tables: integer tables that the mask reads, by name; their first batch element is drawn.
        head: which head, where they differ.
        query: the flattened index of the query; default: the middle of the grid.

    Raises:
        UnsupportedError: matplotlib is not installed.
        InputError: a head or query that does not exist, a file name without a known suffix, a file that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("a picture", "matplotlib is not installed", "the same command after: pip install 'attncc[plot]'") from None
    if path.suffix.lower() not in SUFFIXES:
        raise InputError("picture", f"{path} must end in {', '.join(SUFFIXES)}")
    scene = _scene(spec, q_tile, k_tile, lengths, tables, head, query)
    figure = Figure(figsize=(12.4, 7.2), dpi=160, facecolor=PAPER)
    _compose(figure, scene)
    try:
        figure.savefig(path, facecolor=PAPER)
    except OSError as error:
        raise InputError("picture", f"cannot write {path}: {error.strerror or error}") from None


def _scene(
    spec: AttentionSpec, q_tile: Shape, k_tile: Shape, lengths: Lengths, tables: Mapping[str, Any] | None, head: int, query: int | None
) -> Scene:
    if not 0 <= head < spec.heads:
        raise InputError("head", f"{head} is none of the {spec.heads} heads")
    grid, key = known_grid(spec, lengths)
    if query is None:
        middle = [n // 2 for n in grid]
        query = int(np.ravel_multi_index(middle, grid))
    if not 0 <= query < prod(grid):
        raise InputError("query", f"{query} is none of the {prod(grid)} tokens")
    sizes = {"H": spec.heads, "NQ": prod(grid), "NK": prod(key)}
    known, _ = known_tables(spec.predicate, tables, sizes)
    report = simulate(spec, "cpu", q_tile, k_tile, lengths=lengths, tables=known)
    return Scene(spec, report, known, lengths, head, query)


# ---- composition ---------------------------------------------------------------------------------------------------------------


def _compose(figure: Figure, scene: Scene) -> None:
    r = scene.report
    figure.text(0.045, 0.955, _headline(scene), fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(0.045, 0.905, _subline(r), fontsize=10.5, color=INK, va="top", alpha=0.8)
    if scene.rank == 1:
        _draw_pairs(figure.add_axes((0.075, 0.13, 0.40, 0.69)), scene)
    else:
        _draw_window(figure, scene, (0.045, 0.13, 0.455, 0.69))
    _draw_tiles(figure.add_axes((0.575, 0.13, 0.40, 0.69)), scene)
    _legend(figure, scene.rank)


def _headline(scene: Scene) -> str:
    grid = " × ".join(f"{n:,}" for n in scene.report.tokens)
    head = f", head {scene.head}" if scene.mask.heads > 1 else ""
    return f"{_words(scene.spec.mask)} mask, {grid} tokens{head}"


def _words(mask: Any, longest: int = 60) -> str:
    """What a mask is called: `sliding window or sinks`."""
    parts = [_words(part) for part in getattr(mask, "masks", ())]
    name = f" {mask.kind} ".join(parts) if parts else mask.kind.replace("_", " ")
    if mask.kind == "not":
        name = f"not ({_words(mask.mask)})"
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


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


def _bare(axes: Axes, units: tuple[int, int] = (1, 1)) -> None:
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


def _colors(*names: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(names))


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
    _bare(axes)


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


# ---- the window of one query ---------------------------------------------------------------------------------------------------


def _draw_window(figure: Figure, scene: Scene, place: tuple[float, float, float, float]) -> None:
    """The keys of one query over the grid, plane by plane on three axes."""
    left, bottom, width, height = place
    title = f"what query ({', '.join(map(str, scene.at))}) sees of the grid"
    kinds = _key_kinds(scene)
    planes = list(range(len(kinds))) if scene.rank == 3 else [0]
    kinds = kinds if scene.rank == 3 else kinds[None]
    planes = _chosen(planes, scene, kinds)
    columns, rows = _arrangement(len(planes), kinds.shape[1:], width * 12.4 / (height * 7.2))
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
    colors = _colors(EMPTY, WASTED, PARTIAL, FULL)
    height, width = kinds.shape
    axes.imshow(kinds, cmap=colors, vmin=0, vmax=3, extent=(0, width, height, 0), interpolation="nearest", aspect="equal")
    r = scene.report
    if prod(scene.mask.tiling.mask.order) == 1 and not small:
        _tile_lines(axes, r.k_tile[-2:], (height, width))
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
    _bare(axes)


def _tile_lines(axes: Axes, tile: Shape, shape: tuple[int, int]) -> None:
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
    row: npt.NDArray[np.int8] = _rows(scene, first, first + 1)[0]
    return row


def _rows(scene: Scene, first: int, stop: int) -> npt.NDArray[np.int8]:
    """Kinds of all key tiles for some rows of query tiles."""
    mask = scene.mask
    before = (scene.head if mask.heads > 1 else 0) * mask.tiling.rows
    kinds = np.zeros((stop - first, prod(mask.tiling.k_tiles)), np.int8)
    lists = mask.lists
    for kind, offsets, tiles in ((1, lists.partial_offsets, lists.partial_tiles), (2, lists.full_offsets, lists.full_tiles)):
        for row in range(first, stop):
            kinds[row - first, tiles[offsets[before + row] : offsets[before + row + 1]]] = kind
    return kinds


# ---- all tiles -----------------------------------------------------------------------------------------------------------------


def _draw_tiles(axes: Axes, scene: Scene) -> None:
    """The block mask. Residue classes of a dilated mask stand one after the other: tiles never cross them."""
    mask, cell = _coarse(scene)
    kinds = _classes_apart(mask.to_dense()[0, scene.head if mask.heads > 1 else 0], mask)
    rows, columns = kinds.shape
    axes.imshow(
        kinds, cmap=_colors(EMPTY, PARTIAL, FULL), vmin=0, vmax=2, extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto"
    )
    shared = f", {' by '.join(map(str, cell))} in a cell" if max(cell) > 1 else ""
    classes = f", {mask.tiling.classes} residue classes" if mask.tiling.classes > 1 else ""
    axes.set_title(
        f"block mask: {rows * cell[0]:,} × {columns * cell[1]:,} tiles{shared}{classes}", fontsize=11, color=INK, loc="left", pad=8
    )
    axes.set_xlabel("key tile", color=INK, fontsize=9.5)
    axes.set_ylabel("query tile", color=INK, fontsize=9.5)
    _tile_lines(axes, (1, 1), (rows, columns))
    _bare(axes, cell)
    if scene.rank == 1 and min(rows, columns) > 160 and not kinds[: rows * 9 // 20, columns * 11 // 20 :].any():
        _draw_detail(axes.inset_axes((0.56, 0.57, 0.41, 0.37)), scene)


def _draw_detail(axes: Axes, scene: Scene) -> None:
    """Tiles near the query, large enough to be told apart, in a corner that is empty."""
    tiling = scene.mask.tiling
    row = scene.query // tiling.q_tile[0]
    visited = np.flatnonzero(_rows(scene, row, row + 1)[0])
    size = int(np.clip(2 * len(visited), 16, 80))
    middle = int(np.median(visited)) if len(visited) else 0
    top, left = (max(0, at - size // 2) for at in (row, middle))
    kinds = _rows(scene, top, min(top + size, tiling.rows))[:, left : left + size]
    extent = (left, left + kinds.shape[1], top + kinds.shape[0], top)
    axes.imshow(kinds, cmap=_colors(EMPTY, PARTIAL, FULL), vmin=0, vmax=2, extent=extent, interpolation="nearest", aspect="auto")
    axes.set_title(f"around query {scene.query:,}", fontsize=8.5, color=INK, loc="left", pad=4)
    _bare(axes)
    axes.tick_params(labelsize=6.5)


def _coarse(scene: Scene) -> tuple[BlockMask, tuple[int, int]]:
    """The block mask with as many tiles to a cell, queries and keys, as it takes to draw it: a cell is full where all its tiles are."""
    mask, tiles, cell = scene.mask, [scene.report.q_tile, scene.report.k_tile], [1, 1]
    while max(mask.tiling.rows, mask.tiling.classes * prod(mask.tiling.k_tiles)) > 2 * MOST_CELLS:
        for i, counts in enumerate((mask.tiling.q_tiles, mask.tiling.k_tiles)):
            axis = max(range(scene.rank), key=lambda a: counts[a])
            tiles[i] = tuple(side * (2 if a == axis else 1) for a, side in enumerate(tiles[i]))
            cell[i] *= 2
        mask = classify(scene.spec, tiles[0], tiles[1], scene.lengths, scene.tables)
    return mask, (cell[0], cell[1])


def _classes_apart(dense: npt.NDArray[np.int8], mask: BlockMask) -> npt.NDArray[np.int8]:
    """Rows of every class against its own key tiles, classes down the diagonal."""
    classes, columns = mask.tiling.classes, dense.shape[1]
    apart = np.zeros((len(dense), classes * columns), np.int8)
    rows = len(dense) // classes
    for c in range(classes):
        apart[c * rows : (c + 1) * rows, c * columns : (c + 1) * columns] = dense[c * rows : (c + 1) * rows]
    return apart
