"""Row tiles and key runs of a banded mask: what the blocked engine visits, and what masks their scores.

A banded mask allows key `k` for query `q` iff, on every axis `a`, `lo[a][q_a] <= k_a <= hi[a][q_a]` and
`k_a % step_a == q_a % step_a`. Causal, windows, neighborhoods (stride and dilation included), prefixes, sorted
documents and their intersections have this form. Every axis is planned alone; the product is formed on the way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attncc.runtime.blocked.block import Part
from attncc.runtime.blocked.rules import Kept, Rules

Ints = npt.NDArray[np.int64]

# What one visited block costs beside its pairs (operator calls, gathers), in query-key pairs.
OVERHEAD_PAIRS = 16384
MIN_ROWS, MAX_ROWS = 64, 256
# The same of a block of routed rows, whose mask is made for it alone; and the rows that bringing a key into a product costs as much as.
ROUTED_OVERHEAD_PAIRS, KEY_ROWS = 1 << 17, 32
# Key runs of routed rows, which begin and end anywhere, are widened to multiples of this: products of odd widths take half as long again.
GRAIN = 64
# Below it, float32 tells the middles between two keys apart.
LARGEST_EXACT = 1 << 22
# Edges and columns are counted in it: half a step beyond an edge, no bounded score leaves a weight (exp2 of it is 0), half a step within
# it none is touched. A power of two rounds nothing.
STEEP = 4096.0


@dataclass(frozen=True)
class AxisBand:
    """One axis of a banded mask.

    `bounds` [2, queries] (int64, on the CPU) holds every query coordinate's first and last allowed key. Queries that are `scattered`
    begin and end anywhere.
    """

    keys: int
    bounds: Tensor
    step: int = 1
    scattered: bool = False

    @property
    def queries(self) -> int:
        """Length of the axis on the query side."""
        return self.bounds.shape[1]

    @staticmethod
    def of(keys: int, lo: Sequence[int], hi: Sequence[int], step: int = 1) -> AxisBand:
        """From plain numbers."""
        return AxisBand(keys, torch.tensor([list(lo), list(hi)], dtype=torch.int64, device="cpu"), step)

    def rows(self, tokens: Tensor) -> AxisBand:
        """The band of some queries [n] alone, in order."""
        chosen = self.bounds.numpy()[:, tokens.numpy()]  # of so few numbers, torch would make a parallel task
        return AxisBand(self.keys, torch.from_numpy(chosen), self.step, scattered=True)

    @staticmethod
    def of_segments(ids: Tensor, key_ids: Tensor) -> AxisBand:
        """Keys with the query's id, for `key_ids` that never decrease ([Nq], [Nk]; integers)."""
        first = torch.searchsorted(key_ids, ids)
        return AxisBand(len(key_ids), torch.stack([first, torch.searchsorted(key_ids, ids, right=True) - 1]).cpu())

    def __and__(self, other: AxisBand) -> AxisBand:
        """Both bands; the steps must agree."""
        lo, hi = torch.maximum(self.bounds[0], other.bounds[0]), torch.minimum(self.bounds[1], other.bounds[1])
        return AxisBand(self.keys, torch.stack([lo, hi]), self.step)


@dataclass(frozen=True, eq=False)
class Band:
    """Which of some `columns` every query of a tile sees: those after its `left` edge and before its `right`, both [queries, 1].

    Edges lie in the middle between two columns, times STEEP; None where no query has one. Equal bands of a plan are one object.
    """

    left: Tensor | None
    right: Tensor | None
    columns: range


@dataclass(frozen=True, eq=False)
class AxisTile:
    """Query coordinates of one tile on one axis, the key coordinates they need, and which columns need a mask.

    `ends` lists the masked columns as (start, stop, their band), counted from the first; empty if every query sees every key. `band` is
    that of all columns, for masks that axes make together; None where there is one axis.
    """

    q: range
    k: range
    band: Band | None
    ends: tuple[tuple[int, int, Band], ...]


Seen = dict[tuple[bytes, bool, bool, int], Band]
Bands = Callable[[int, int, range, bool, bool], Band]
"""The band of queries [start, stop) among some columns: with left edges, with right ones."""


def tile_axis(axis: AxisBand, size: int, alone: bool = False) -> list[AxisTile]:
    """Cut one axis, perhaps the only one, into tiles of about `size` queries, within residue classes and not across jumps of the band."""
    seen: Seen = {}
    return [tile for residue in range(min(axis.step, axis.queries)) for tile in _tile_class(axis, residue, size, seen, alone)]


def _tile_class(axis: AxisBand, residue: int, size: int, seen: Seen, alone: bool) -> list[AxisTile]:
    """The tiles of one residue class, planned in its own coordinates; a query without keys gets [keys, -1]."""
    step, keys = axis.step, len(range(residue, axis.keys, axis.step))
    lo, hi = axis.bounds.numpy()[:, residue::step] - residue
    lo, hi = np.maximum(-(-lo // step), 0), np.minimum(hi // step, keys - 1)
    empty = lo > hi
    bounds = np.stack([np.where(empty, keys, lo), np.where(empty, -1, hi)])
    jumps = np.flatnonzero((np.abs(np.diff(bounds)) > max(size // 2, 1)).any(axis=0)) + 1
    band, grain = (_views(bounds), GRAIN) if axis.scattered else (partial(_band, seen, bounds), 1)
    tiles = []
    cuts = _cuts(bounds, jumps.tolist(), size)
    for (start, stop), (low, most_low, least_high, high) in zip(cuts, _extremes(bounds, [start for start, _ in cuts])):
        first = low // grain * grain
        end = max(min(-(-(high + 1) // grain) * grain, keys), first)
        q = range(residue + start * step, residue + stop * step, step)
        k = range(residue + first * step, residue + end * step, step)
        left, right = most_low, least_high + 1
        masked = [(first, left, True, False), (right, end, False, True)] if left < right else [(first, end, True, True)]
        ends = tuple((a - first, b - first, band(start, stop, range(a, b), *edges)) for a, b, *edges in masked if a < b)
        tiles.append(AxisTile(q, k, None if alone else band(start, stop, range(first, end), True, True), ends))
    return tiles


def _extremes(bounds: Ints, starts: list[int]) -> list[list[int]]:
    """Least and greatest first key, least and greatest last key of the queries from each start to the next."""
    found: list[list[int]] = np.stack([end.reduceat(x, starts) for x in bounds for end in (np.minimum, np.maximum)], axis=1).tolist()
    return found


def _band(seen: Seen, bounds: Ints, start: int, stop: int, columns: range, left: bool, right: bool) -> Band:
    """A band relative to its columns and clipped to them, so that equal patterns are found equal."""
    width = len(columns)
    clipped = np.minimum(np.maximum(bounds[:, start:stop] - columns.start, -1), width)
    key = (clipped.tobytes(), left, right, width)
    if key not in seen:
        first, last = _edges(clipped)
        seen[key] = Band(first if left else None, last if right else None, range(width))
    return seen[key]


def _views(bounds: Ints) -> Bands:
    """Bands of queries no two tiles of which are alike: as they are."""
    first, last = _edges(bounds)

    def band(start: int, stop: int, columns: range, left: bool, right: bool) -> Band:
        return Band(first[start:stop] if left else None, last[start:stop] if right else None, columns)

    return band


def _edges(bounds: Ints) -> Sequence[Tensor]:
    """Left and right edges, [queries, 1], of first and last columns [2, queries]."""
    exact = np.float32 if bounds.max(initial=0) < LARGEST_EXACT else np.float64
    found: Tensor = torch.from_numpy(((bounds + np.array([[-0.5], [0.5]])) * STEEP).astype(exact))[:, :, None]
    return found.unbind()


def _cuts(bounds: Ints, jumps: list[int], size: int) -> list[tuple[int, int]]:
    """Split rows where the band jumps (documents), join pieces too small to pay for a block, then cut to `size`."""
    pieces: list[tuple[int, int, int, int]] = []
    lo, hi = bounds
    for a, b in itertools.pairwise([0, *jumps, len(lo)]):
        piece = (a, b, int(lo[a:b].min()), int(hi[a:b].max()))
        while pieces and _joined_is_cheaper(pieces[-1], piece, size):
            last = pieces.pop()
            piece = (last[0], b, min(last[2], piece[2]), max(last[3], piece[3]))
        pieces.append(piece)
    return [cut for a, b, _, _ in pieces for cut in _even_cuts(a, b, size)]


def _joined_is_cheaper(x: tuple[int, int, int, int], y: tuple[int, int, int, int], size: int) -> bool:
    """Whether one block over both pieces costs less than two; a piece is (start, stop, first key, last key)."""
    union = max(x[3], y[3]) - min(x[2], y[2]) + 1
    apart = sum((p[1] - p[0]) * max(p[3] - p[2] + 1, 0) for p in (x, y))
    return y[1] - x[0] <= size and (y[1] - x[0]) * union <= apart + OVERHEAD_PAIRS


def _even_cuts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut [start, stop) into tiles of `size`; a short remainder is spread so that no tile is tiny."""
    count = max(-(-(stop - start) // size), 1)
    even = size if (stop - start) % size == 0 else -(-(stop - start) // count)
    even = min(-(-even // 8) * 8, size) if size >= 8 else even
    return [(a, min(a + even, stop)) for a in range(start, stop, even)]


def choose_tile(axes: Sequence[AxisBand], heads: int) -> tuple[int, ...]:
    """The tile shape with the fewest computed pairs, a block counted as OVERHEAD_PAIRS and shared by the heads."""
    heads = min(heads, 4)
    if len(axes) == 1:
        return (128 if heads > 1 else 256,)
    costs = [{size: _axis_cost(axis, size) for size in _sizes(axis.queries)} for axis in axes]

    def cost(tile: tuple[int, ...]) -> float:
        pairs = math.prod(c[size][0] for c, size in zip(costs, tile, strict=True))
        blocks = math.prod(c[size][1] for c, size in zip(costs, tile, strict=True))
        return pairs + blocks * OVERHEAD_PAIRS * 4 / heads

    whole = math.prod(axis.queries for axis in axes)
    tiles = [t for t in itertools.product(*costs) if min(MIN_ROWS, whole) <= math.prod(t) <= MAX_ROWS]
    return min(tiles or [tuple(axis.queries for axis in axes)], key=cost)


def routed_tile(axis: AxisBand) -> int:
    """Rows of a tile of routed rows of one head: they stand apart, so that more of them see keys that their neighbours do not."""

    def cost(size: int) -> float:
        first = np.minimum.reduceat(lo, np.arange(0, len(lo), size))
        last = np.maximum.reduceat(hi, np.arange(0, len(hi), size))
        return float((last - first).clip(min=0).sum()) * (size + KEY_ROWS) + len(first) * ROUTED_OVERHEAD_PAIRS

    lo, hi = axis.bounds.numpy()
    return min((256, 128), key=cost)


def _sizes(length: int) -> list[int]:
    return sorted({min(1 << i, length) for i in range(8)})


def _axis_cost(axis: AxisBand, size: int) -> tuple[int, int]:
    tiles = tile_axis(axis, size)
    return sum(len(t.q) * len(t.k) for t in tiles), len(tiles)


@dataclass
class BandPlan:
    """Tiles of every axis and the ceilings of scores made so far; static masks keep their plan between calls.

    `tokens` [queries] are those of routed rows, on a grid of one axis: query i of the plan is token `tokens[i]`.
    """

    grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    axes: list[list[AxisTile]]
    tokens: Tensor | None = None
    masks: Kept = field(default_factory=Kept)
    edges: dict[tuple[Band, torch.device], list[Tensor | None]] = field(default_factory=dict)

    def pairs(self) -> int:
        """Query-key pairs the engine computes, masked ones included."""
        return math.prod(sum(len(t.q) * len(t.k) for t in axis) for axis in self.axes)

    @property
    def step(self) -> int:
        """The dilation of axis 0."""
        return self.axes[0][0].k.step

    @property
    def residues(self) -> list[list[AxisTile]]:
        """The tiles of axis 0, by residue class."""
        classes: dict[int, list[AxisTile]] = {}
        for tile in self.axes[0]:
            classes.setdefault(tile.q.start % self.step, []).append(tile)
        return list(classes.values())

    def parts(self, tiles: tuple[AxisTile, ...], rules: Rules) -> list[Part]:
        """The masked columns of the block of `tiles`, one an axis; of routed rows until this thread asks for the next block's."""
        head, rest = tiles[0], tiles[1:]
        width = math.prod(len(t.k) for t in rest)
        if any(t.ends for t in rest):
            return [Part(0, len(head.k) * width, self._ceiling(_bands(tiles), rules))] if head.k else []
        bands = _bands(rest)
        return [Part(a * width, b * width, self._ceiling((band, *bands), rules, a)) for a, b, band in head.ends]

    def _ceiling(self, bands: tuple[Band, ...], rules: Rules, start: int = 0) -> Tensor:
        """Above all scores where every axis allows the pair, else -inf, or below all; [product of queries, product of keys], row-major."""
        like = rules.like
        if self.tokens is not None:  # no two tiles of routed rows have the same one
            found = self._slope(bands[0], rules.scratch(f"ceiling from {start > 0}", _shape(bands[0])))
            return found if rules.steep else found.mul_(math.inf)
        return self.masks((*bands, like.dtype, like.device), like.device, lambda: self._of_axes(bands, like))

    def _of_axes(self, bands: Sequence[Band], like: Tensor) -> Tensor:
        """The ceiling that some axes make together."""
        rank, terms = len(bands), []
        for a, (band, (rows, width)) in enumerate(zip(bands, map(_shape, bands))):
            shape = [1] * (2 * rank)
            shape[a], shape[rank + a] = rows, width
            terms.append(self._slope(band, like.new_empty(rows, width)).mul_(math.inf).view(shape))
        return reduce(torch.minimum, terms).reshape(math.prod(_shape(band)[0] for band in bands), -1)

    def _slope(self, band: Band, out: Tensor) -> Tensor:
        """Fill `out` [queries, width] with STEEP times how far a column lies within the edges of one axis."""
        left, right = self._on_device(band, out.device)
        dtype = next((x.dtype for x in (left, right) if x is not None), out.dtype)
        column = torch.arange(band.columns.start * STEEP, band.columns.stop * STEEP, STEEP, dtype=dtype, device=out.device)
        if left is not None and right is not None:
            torch.minimum(column - left, right - column, out=out)
        elif left is not None:
            torch.sub(column, left, out=out)
        elif right is not None:
            torch.sub(right, column, out=out)
        return out

    def _on_device(self, band: Band, device: torch.device) -> list[Tensor | None]:
        """The edges of a band, copied to a device once."""
        if device.type == "cpu":
            return [band.left, band.right]
        if (band, device) not in self.edges:
            self.edges[band, device] = [None if x is None else x.to(device) for x in (band.left, band.right)]
        return self.edges[band, device]


def _bands(tiles: Sequence[AxisTile]) -> tuple[Band, ...]:
    return tuple(t.band for t in tiles if t.band is not None)


def _shape(band: Band) -> tuple[int, int]:
    """Queries and columns."""
    return next(len(x) for x in (band.left, band.right) if x is not None), len(band.columns)


def plan_bands(axes: Sequence[AxisBand], tile: Sequence[int] | None = None, heads: int = 4) -> BandPlan:
    """Plan a banded mask for `heads` heads; `tile` is the row tile's shape (default: the cheapest)."""
    shape = tuple(tile) if tile is not None else choose_tile(axes, heads)
    tiles = [tile_axis(axis, size, len(axes) == 1) for axis, size in zip(axes, shape, strict=True)]
    return BandPlan(tuple(x.queries for x in axes), tuple(x.keys for x in axes), tiles)
