"""Tiles of one axis of a band mask, as ranges: exact, from every row's band, in O(tokens of the axis) time and O(tiles) memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from attncc.ir.values import Env, evaluate_all
from attncc.passes.canonicalize import Band

Ints = npt.NDArray[np.int64]
CHUNK = 1 << 14
"""Rows evaluated at once: keeps the working set in cache whatever the length, and arrays so small that no new pages are asked for."""
FAR = np.int64(1) << 40
"""Beyond every key."""


@dataclass(frozen=True)
class AxisTiles:
    """Key tiles of each query tile on one axis, by residue class: arrays `[classes, query tiles]`, half-open ranges in tiles.

    `first <= j < stop` are visited; `full_first <= j < full_stop`, an empty range where there are none, need no mask. `pairs`
    counts the allowed (query, key) pairs of a class; `gaps` says that a visited range may hold an empty tile.
    """

    first: Ints
    full_first: Ints
    full_stop: Ints
    stop: Ints
    pairs: Ints
    gaps: bool

    @cached_property
    def visited(self) -> Ints:
        return self.stop - self.first

    @cached_property
    def full(self) -> Ints:
        return self.full_stop - self.full_first

    @cached_property
    def sums(self) -> tuple[int, int, int]:
        """Visited tiles, full tiles and pairs of the whole axis."""
        return int(self.visited.sum()), int(self.full.sum()), int(self.pairs.sum())


def axis_tiles(
    band: Band, axis: int, classes: list[tuple[int, int]], tiles: int, q_tile: int, k_tile: int, known: Env | None = None
) -> AxisTiles:
    """Ranges of an axis; `classes` gives (residue, query tokens) of each class, `tiles` the query tiles of the longest.

    `known` gives values of what else the band depends on.
    """
    columns = [_class_ranges(band, {f"r{axis}": r, **(known or {})}, f"q{axis}", n, tiles, q_tile, k_tile) for r, n in classes]
    first, full_first, full_stop, stop = (np.stack([c[0][i] for c in columns]) for i in range(4))
    pairs = np.array([c[1] for c in columns], dtype=np.int64)
    return AxisTiles(first, full_first, full_stop, stop, pairs, any(c[2] for c in columns))


def _class_ranges(band: Band, env: Env, row: str, length: int, tiles: int, q_tile: int, k_tile: int) -> tuple[list[Ints], int, bool]:
    ranges = [np.zeros(tiles, np.int64) for _ in range(4)]
    pairs, gaps = 0, False
    step = max(1, CHUNK // q_tile) * q_tile
    for begin in range(0, length, step):
        end = min(begin + step, length)
        low, high = _rows(band, {**env, row: np.arange(begin, end)}, end - begin)
        pairs += int(np.maximum(high - low, -1).sum()) + end - begin
        chunk, chunk_gaps = _ranges(low, high, q_tile, k_tile)
        gaps = gaps or chunk_gaps
        for out, values in zip(ranges, chunk):
            out[begin // q_tile : begin // q_tile + len(values)] = values
    return ranges, pairs, gaps


def _rows(band: Band, env: Env, rows: int) -> tuple[Ints, Ints]:
    low, high = (np.broadcast_to(x, (rows,)).astype(np.int64) for x in evaluate_all(band, env))
    return low, high


def _ranges(low: Ints, high: Ints, q_tile: int, k_tile: int) -> tuple[tuple[Ints, Ints, Ints, Ints], bool]:
    """Ranges of each query tile; rows without a key widen no range and leave no tile full."""
    empty = low > high
    if empty.any():
        low, high = np.where(empty, FAR, low), np.where(empty, -FAR, high)
    low_min, low_max, high_min, high_max = (
        reduce.reduceat(x, np.arange(0, len(x), q_tile))
        for x, reduce in ((low, np.minimum), (low, np.maximum), (high, np.minimum), (high, np.maximum))
    )
    some = high_max >= low_min
    first = np.where(some, low_min // k_tile, 0)
    stop = np.where(some, high_max // k_tile + 1, 0)
    full_first, full_stop = -(-low_max // k_tile), (high_min + 1) // k_tile
    any_full = full_stop > full_first
    full_first, full_stop = np.where(any_full, full_first, first), np.where(any_full, full_stop, first)
    return (first, full_first, full_stop, stop), _has_gaps(low, high, empty, q_tile)


def _has_gaps(low: Ints, high: Ints, empty: npt.NDArray[np.bool_], q_tile: int) -> bool:
    """Whether bands of successive rows of a tile fail to touch: only then can a visited range hold an empty tile."""
    lasts: Ints | slice = slice(q_tile - 1, None, q_tile)
    if empty.any():
        low, high, row = low[~empty], high[~empty], np.flatnonzero(~empty)
        lasts = np.flatnonzero(np.diff(row // q_tile))
    apart = low[1:] - 1 > high[:-1]
    apart |= high[1:] < low[:-1] - 1
    apart[lasts] = False  # its successor is a row of the next tile
    return bool(apart.any())
