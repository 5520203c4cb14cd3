"""Row tiles and key runs of a banded mask: what the blocked engine visits, and with which additive mask.

A banded mask allows key `k` for query `q` iff, on every axis `a`, `lo[a][q_a] <= k_a <= hi[a][q_a]` and
`k_a % step_a == q_a % step_a`. Causal, windows, neighborhoods (stride and dilation included), prefixes, sorted
documents and their intersections have this form. Every axis is planned alone; the product is formed on the way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attncc.runtime.blocked.block import Part
from attncc.runtime.blocked.rules import Kept

Ints = npt.NDArray[np.int64]

# What one visited block costs beside its pairs (operator calls, gathers), in query-key pairs.
OVERHEAD_PAIRS = 16384
MIN_ROWS, MAX_ROWS = 64, 256
# Key runs of routed rows, which begin and end anywhere, are widened to multiples of this: products of odd widths take half as long again.
GRAIN = 64


@dataclass(frozen=True)
class AxisBand:
    """One axis of a banded mask.

    `bounds` [2, queries] (int64, on the CPU) holds every query coordinate's first and last allowed key; key runs of tiles begin and end
    at multiples of `grain`.
    """

    keys: int
    bounds: Tensor
    step: int = 1
    grain: int = 1

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
        return AxisBand(self.keys, torch.from_numpy(chosen), self.step, GRAIN)

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
    """First and last key of every query of a tile, [2, queries], relative to its first column; equal bands of a plan are one object."""

    bounds: npt.NDArray[np.int32]
    width: int

    @property
    def queries(self) -> int:
        """How many queries."""
        return len(self.bounds[0])


@dataclass(frozen=True, eq=False)
class AxisTile:
    """Query coordinates of one tile on one axis, the key coordinates they need, and which columns need a mask.

    `ends` lists the masked columns as (start, stop, band relative to start); empty if every query sees every key.
    """

    q: range
    k: range
    band: Band
    ends: tuple[tuple[int, int, Band], ...]


Seen = dict[tuple[bytes, int], Band]


def tile_axis(axis: AxisBand, size: int) -> list[AxisTile]:
    """Cut one axis into tiles of about `size` queries, within residue classes and not across jumps of the band."""
    seen: Seen = {}
    return [tile for residue in range(min(axis.step, axis.queries)) for tile in _tile_class(axis, residue, size, seen)]


def _tile_class(axis: AxisBand, residue: int, size: int, seen: Seen) -> list[AxisTile]:
    """The tiles of one residue class, planned in its own coordinates; a query without keys gets [keys, -1]."""
    step, keys = axis.step, len(range(residue, axis.keys, axis.step))
    lo, hi = axis.bounds.numpy()[:, residue::step] - residue
    lo, hi = np.maximum(-(-lo // step), 0), np.minimum(hi // step, keys - 1)
    empty = lo > hi
    bounds = np.stack([np.where(empty, keys, lo), np.where(empty, -1, hi)])
    jumps = np.flatnonzero((np.abs(np.diff(bounds)) > max(size // 2, 1)).any(axis=0)) + 1
    tiles = []
    for start, stop in _cuts(bounds, jumps.tolist(), size):
        local = bounds[:, start:stop]
        (low, most_low), (least_high, high) = ((int(x.min()), int(x.max())) for x in local)
        first = low // axis.grain * axis.grain
        width = max(min(-(-(high + 1) // axis.grain) * axis.grain, keys) - first, 0)
        q = range(residue + start * step, residue + stop * step, step)
        k = range(residue + first * step, residue + (first + width) * step, step)
        left, right = most_low - first, least_high + 1 - first
        cuts = [(0, left), (right, width)] if left < right else [(0, width)]
        ends = tuple((a, b, _band(local - first, a, b, seen)) for a, b in cuts if a < b)
        tiles.append(AxisTile(q, k, _band(local - first, 0, width, seen), ends))
    return tiles


def _band(bounds: Ints, start: int, stop: int, seen: Seen) -> Band:
    """The band relative to the key columns [start, stop), clipped to them so that equal patterns are found equal."""
    width = stop - start
    clipped = (bounds - start).clip(-1, width).astype(np.int32)
    return seen.setdefault((clipped.tobytes(), width), Band(clipped, width))


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
        return float((last - first).clip(min=0).sum()) * size + len(first) * OVERHEAD_PAIRS * 4

    lo, hi = axis.bounds.numpy()
    return min((256, 128), key=cost)


def _sizes(length: int) -> list[int]:
    return sorted({min(1 << i, length) for i in range(8)})


def _axis_cost(axis: AxisBand, size: int) -> tuple[int, int]:
    tiles = tile_axis(axis, size)
    return sum(len(t.q) * len(t.k) for t in tiles), len(tiles)


@dataclass
class BandPlan:
    """Tiles of every axis and the additive masks made so far; static masks keep their plan between calls.

    `tokens` [queries] are those of routed rows, on a grid of one axis: query i of the plan is token `tokens[i]`.
    """

    grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    axes: list[list[AxisTile]]
    tokens: Tensor | None = None
    masks: Kept = field(default_factory=Kept)
    bounds: dict[tuple[Band, torch.device], Tensor] = field(default_factory=dict)

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

    def parts(self, tiles: tuple[AxisTile, ...], like: Tensor) -> list[Part]:
        """The masked columns of the block of `tiles` (one an axis), on the device and in the dtype of `like`."""
        head, rest = tiles[0], tiles[1:]
        width = math.prod(len(t.k) for t in rest)
        if any(t.ends for t in rest):
            return [Part(0, len(head.k) * width, self._mask(tuple(t.band for t in tiles), like))] if head.k else []
        bands = tuple(t.band for t in rest)
        return [Part(a * width, b * width, self._mask((band, *bands), like)) for a, b, band in head.ends]

    def _mask(self, bands: tuple[Band, ...], like: Tensor) -> Tensor:
        if self.tokens is not None:  # no two tiles of routed rows have the same mask: what is used once is not made to be added
            return ~self._allowed(bands[0], like.device)
        return self.masks((*bands, like.dtype, like.device), like.device, lambda: self._additive(bands, like))

    def _additive(self, bands: Sequence[Band], like: Tensor) -> Tensor:
        """0 where every axis allows the pair, else -inf; [product of queries, product of keys], row-major on both sides."""
        rank, terms = len(bands), []
        for a, band in enumerate(bands):
            shape = [1] * (2 * rank)
            shape[a], shape[rank + a] = band.queries, band.width
            terms.append(self._allowed(band, like.device).view(shape))
        allowed = reduce(torch.logical_and, terms)
        zero, minus = (torch.full((), x, dtype=like.dtype, device=like.device) for x in (0.0, -math.inf))
        return torch.where(allowed, zero, minus).reshape(math.prod(band.queries for band in bands), -1)

    def _allowed(self, band: Band, device: torch.device) -> Tensor:
        """Which columns every query sees, [queries, width]; 32 bits are compared many at a time."""
        bound, column = self._bounds(band, device), torch.arange(band.width, device=device, dtype=torch.int32)
        if band.bounds[0].max() <= 0:
            return column <= bound[1]
        return (column >= bound[0]) & (column <= bound[1])

    def _bounds(self, band: Band, device: torch.device) -> Tensor:
        """First and last key of every query, [2, queries, 1], copied to a device once."""
        if (band, device) not in self.bounds:
            self.bounds[band, device] = torch.from_numpy(band.bounds).to(device)[:, :, None]
        return self.bounds[band, device]


def plan_bands(axes: Sequence[AxisBand], tile: Sequence[int] | None = None, heads: int = 4) -> BandPlan:
    """Plan a banded mask for `heads` heads; `tile` is the row tile's shape (default: the cheapest)."""
    shape = tuple(tile) if tile is not None else choose_tile(axes, heads)
    tiles = [tile_axis(axis, size) for axis, size in zip(axes, shape, strict=True)]
    return BandPlan(tuple(x.queries for x in axes), tuple(x.keys for x in axes), tiles)
