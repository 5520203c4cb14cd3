"""Block masks by brute force: every (query tile, key tile) looked up in the oracle's dense mask."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from attncc.passes.canonicalize import canonicalize
from attncc.passes.order import order_tokens
from attncc.passes.tiles import BoundMask, bind
from attncc.spec.attention import AttentionSpec
from attncc.spec.lower import lower

Grid = tuple[int, ...]


def bound_mask(spec: Any, query: Grid, key: Grid) -> BoundMask:
    """The canonical mask of a spec's JSON over known lengths."""
    return bind(canonicalize(order_tokens(lower(AttentionSpec.model_validate(spec)))), query, key)


def tokens_of(tile: Grid, at: Grid, residue: Grid, order: Grid, grid: Grid) -> np.ndarray:
    """Flat token of every cell of a tile of a residue class, -1 where the cell lies beyond the grid."""
    axes = [(i * side + np.arange(side)) * d + r for i, side, d, r in zip(at, tile, order, residue)]
    cells = np.meshgrid(*axes, indexing="ij")
    inside = np.logical_and.reduce([x < n for x, n in zip(cells, grid)])
    flat = np.ravel_multi_index([np.minimum(x, n - 1) for x, n in zip(cells, grid)], grid)
    return np.where(inside, flat, -1).ravel()


def tile_counts(grid: Grid, order: Grid, tile: Grid) -> Grid:
    """Tiles on every axis of the longest class."""
    return tuple(math.ceil(math.ceil(n / d) / t) for n, d, t in zip(grid, order, tile))


def boxes(counts: Grid) -> list[Grid]:
    """Every coordinate of a grid, row-major."""
    return list(itertools.product(*map(range, counts)))


def classes(allowed: np.ndarray, order: Grid, query: Grid, key: Grid, q_tile: Grid, k_tile: Grid) -> np.ndarray:
    """`[B, H, rows, key tiles]`: 0 no real pair is allowed, 2 all cells are keys of the grid that every real query may see, else 1."""
    rows, columns = boxes(tile_counts(query, order, q_tile)), boxes(tile_counts(key, order, k_tile))
    found = np.zeros((*allowed.shape[:2], math.prod(order) * len(rows), len(columns)), np.int8)
    for (c, residue), (i, row) in itertools.product(enumerate(boxes(order)), enumerate(rows)):
        queries = tokens_of(q_tile, row, residue, order, query)
        keys = np.stack([tokens_of(k_tile, column, residue, order, key) for column in columns])
        if (queries >= 0).any():
            pairs = allowed[:, :, queries[queries >= 0]]
            some, every = (np.asarray(x)[..., keys] & (keys >= 0) for x in (pairs.any(2), pairs.all(2)))
            found[:, :, c * len(rows) + i] = some.any(-1).astype(np.int8) + every.all(-1)
    return found
