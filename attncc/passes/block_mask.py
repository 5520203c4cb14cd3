"""The block mask: every (query tile, key tile) classified as empty, full or partial, without an N x N or T x T array.

A product of bands is classified axis by axis (`axis_tiles`) and combined as a product; any other mask by splitting boxes
(`box_tree`). Never is a partial tile called full or empty; `exact` says that none was called partial for want of budget either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from attncc.passes.axis_tiles import AxisTiles, axis_tiles
from attncc.passes.box_tree import Boxes, Classified, TileClassifier
from attncc.passes.tiles import BoundMask, Shape, Tiling, class_lengths

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TileLists:
    """Key tiles of every row in compressed form: row i holds `tiles[offsets[i]:offsets[i + 1]]`, ascending flat tile indices.

    Rows run over (batch, head, residue class, query tile) where the mask depends on these.
    """

    full_offsets: Ints
    full_tiles: Ints
    partial_offsets: Ints
    partial_tiles: Ints


@dataclass(frozen=True)
class BlockMask:
    """Classified tiles of a mask. `batch` and `heads` are 1 where the mask is the same for all.

    Exactly one of `axes` (ranges on every axis, the mask is their product) and `boxes` is given.
    """

    tiling: Tiling
    batch: int
    heads: int
    exact: bool
    axes: tuple[AxisTiles, ...] | None = None
    boxes: Classified | None = None
    classifier: TileClassifier | None = None

    @cached_property
    def visited(self) -> int:
        """Tiles that are not empty, over all rows (summed over batch and heads where the mask depends on them)."""
        if self.axes is not None:
            return prod(a.sums[0] for a in self.axes)
        assert self.boxes is not None
        return self.full + len(self.boxes.partial)

    @cached_property
    def full(self) -> int:
        """Tiles that need no mask."""
        if self.axes is not None:
            return prod(a.sums[1] for a in self.axes)
        assert self.boxes is not None
        return int(self.boxes.full.sizes().sum())

    @property
    def partial(self) -> int:
        """Tiles that need their mask."""
        return self.visited - self.full

    @cached_property
    def pairs(self) -> int:
        """Allowed (query, key) pairs, exactly (summed as `visited` is)."""
        if self.axes is not None:
            return prod(a.sums[2] for a in self.axes)
        assert self.boxes is not None and self.classifier is not None
        return self._full_pairs(self.boxes.full) + int(self.classifier.evaluate(self.boxes.partial)[2].sum())

    def _full_pairs(self, full: Boxes) -> int:
        assert self.classifier is not None
        low, high = self.classifier._corners(full)
        return int((high - low + 1).prod(axis=1).sum())

    @cached_property
    def lists(self) -> TileLists:
        """Key tiles row by row."""
        flat = _axes_tiles(self) if self.axes is not None else _box_tiles(self)
        rows = self.batch * self.heads * self.tiling.rows
        return TileLists(*_compressed(*flat[0], rows), *_compressed(*flat[1], rows))

    def to_dense(self) -> npt.NDArray[np.int8]:
        """`[batch, heads, rows, key tiles]`: 0 empty, 1 partial, 2 full. For pictures and tests."""
        shape = (self.batch * self.heads * self.tiling.rows, prod(self.tiling.k_tiles))
        dense = np.zeros(shape, np.int8)
        for offsets, tiles, value in (
            (self.lists.partial_offsets, self.lists.partial_tiles, 1),
            (self.lists.full_offsets, self.lists.full_tiles, 2),
        ):
            dense[np.repeat(np.arange(shape[0]), np.diff(offsets)), tiles] = value
        return dense.reshape(self.batch, self.heads, self.tiling.rows, shape[1])


def block_mask(
    mask: BoundMask,
    q_tile: Shape,
    k_tile: Shape,
    tables: Mapping[str, Any] | None = None,
    batch: int = 1,
    heads: int = 1,
) -> BlockMask:
    """Classifies the tiles of a mask.

    Args:
        mask: over known lengths.
        q_tile, k_tile: any positive tile shapes, one entry an axis.
        tables: run-time tables the mask reads (numpy), by name.
        batch, heads: how many the mask is evaluated for, where it depends on them.
    """
    tiling = Tiling(mask, q_tile, k_tile)
    if mask.separable:
        axes = tuple(_axis(tiling, a) for a in range(tiling.rank))
        if not any(a.gaps for a in axes):
            return BlockMask(tiling, 1, 1, True, axes)
    batch, heads = (n if mask.varies_with(name) else 1 for name, n in (("b", batch), ("h", heads)))
    classifier = TileClassifier(tiling, batch, heads, tables or {})
    boxes = _line_boxes(classifier, tables or {}) or classifier.classify()
    return BlockMask(tiling, batch, heads, boxes.exact, None, boxes, classifier)


def _line_boxes(classifier: TileClassifier, tables: Mapping[str, Any]) -> Classified | None:
    """Boxes of a mask on one axis that is a band of its own for each owner, row by row; None where it is no such mask."""
    tiling = classifier.tiling
    if tiling.rank > 1 or tiling.mask.order != (1,) or not tiling.mask.banded:
        return None
    found = [_axis(tiling, 0, {"b": b, "h": h, **tables}) for b, h, _ in classifier.owners]
    if any(axis.gaps for axis in found):
        return None
    columns = [np.concatenate([getattr(axis, name)[0] for axis in found]) for name in ("first", "full_first", "full_stop", "stop")]
    first, full_first, full_stop, stop = columns
    owner, row = np.divmod(np.arange(len(first)), tiling.rows)
    full = Boxes(np.stack([row, full_first], 1), np.stack([row, full_stop - 1], 1), owner)[full_stop > full_first]
    at, offset = _repeat((full_first - first) + (stop - full_stop))
    tile = first[at] + offset
    tile += np.where(tile >= full_first[at], (full_stop - full_first)[at], 0)
    ones = np.stack([row[at], tile], 1)
    return Classified(full, Boxes(ones, ones, owner[at]), True)


def _axis(tiling: Tiling, axis: int, known: Mapping[str, Any] | None = None) -> AxisTiles:
    mask = tiling.mask
    classes = [(r, class_lengths(mask.query, mask.order, (r,) * tiling.rank)[axis]) for r in range(mask.order[axis])]
    tiles = tiling.q_tiles[axis]
    return axis_tiles(mask.bands[axis], axis, classes, tiles, tiling.q_tile[axis], tiling.k_tile[axis], known)


Entries = tuple[Ints, Ints]


def _compressed(rows: Ints, tiles: Ints, count: int) -> Entries:
    order = np.lexsort((tiles, rows))
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=count), out=offsets[1:])
    return offsets, tiles[order]


def _axes_tiles(mask: BlockMask) -> tuple[Entries, Entries]:
    """(rows, tiles) of full and partial tiles of a product of ranges."""
    assert mask.axes is not None
    tiling = mask.tiling
    index = np.indices((*tiling.mask.order, *tiling.q_tiles)).reshape(2 * tiling.rank, -1)
    first, counts, full_first, full_stop = [], [], [], []
    for a, axis in enumerate(mask.axes):
        at = (index[a], index[tiling.rank + a])
        first.append(axis.first[at])
        counts.append(axis.visited[at])
        full_first.append(axis.full_first[at])
        full_stop.append(axis.full_stop[at])
    rows, offset = _repeat(np.prod(counts, axis=0))
    tile, full = np.zeros_like(rows), np.ones(len(rows), bool)
    stride = 1
    for a in reversed(range(tiling.rank)):
        at_axis = first[a][rows] + offset % counts[a][rows]
        offset = offset // counts[a][rows]
        full &= (at_axis >= full_first[a][rows]) & (at_axis < full_stop[a][rows])
        tile += at_axis * stride
        stride *= tiling.k_tiles[a]
    return (rows[full], tile[full]), (rows[~full], tile[~full])


def _repeat(counts: Ints) -> Entries:
    """For counts [2, 3]: rows [0, 0, 1, 1, 1] and positions within each [0, 1, 0, 1, 2]."""
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(len(rows)) - starts[rows]


def _box_tiles(mask: BlockMask) -> tuple[Entries, Entries]:
    assert mask.boxes is not None
    return _expanded(mask.boxes.full, mask.tiling), _expanded(mask.boxes.partial, mask.tiling)


def _expanded(boxes: Boxes, tiling: Tiling) -> Entries:
    """(rows, tiles) of every tile in boxes."""
    box, offset = _repeat(boxes.sizes())
    sides = (boxes.high - boxes.low + 1)[box]
    index = np.zeros((len(box), 2 * tiling.rank), np.int64)
    for a in reversed(range(2 * tiling.rank)):
        index[:, a] = boxes.low[box, a] + offset % sides[:, a]
        offset = offset // sides[:, a]
    rank = tiling.rank
    row = _flat(index[:, :rank], tiling.q_tiles)
    return boxes.owner[box] * prod(tiling.q_tiles) + row, _flat(index[:, rank:], tiling.k_tiles)


def _flat(index: Ints, shape: Shape) -> Ints:
    flat = np.zeros(len(index), np.int64)
    for a, size in enumerate(shape):
        flat = flat * size + index[:, a]
    return flat
