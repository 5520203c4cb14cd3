"""FLOP bound and tile bound: counts of pairs and of tiles, from the block mask that the compiler itself uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from attncc import pipeline
from attncc.errors import InputError
from attncc.passes.block_mask import BlockMask, block_mask
from attncc.passes.given import Lengths, known_grid, known_tables
from attncc.passes.tiles import Shape, bind, tiles_per_axis
from attncc.simulator.report import Count, TileCounts
from attncc.spec.attention import AttentionSpec


@dataclass(frozen=True)
class Counts:
    """FLOP bound = all pairs / allowed pairs; tile bound = tiles of the dense grid without dilation / visited tiles."""

    flop_bound: float
    tile_bound: float
    sparsity: float
    tiles: TileCounts


LARGEST_TILE = 1 << 22
"""Pairs of a tile, at most, where a mask is no product of bands: undecided tiles are evaluated pair by pair."""


def classify(
    spec: AttentionSpec,
    q_tile: Shape,
    k_tile: Shape,
    lengths: Lengths = None,
    tables: Mapping[str, Any] | None = None,
    batch: int | None = None,
) -> BlockMask:
    """The block mask of a spec for given tiles; arguments as in `simulate`.

    Raises:
        InputError: missing lengths or tables, or tiles too large to be evaluated; names the argument.
    """
    query, key = known_grid(spec, lengths)
    mask = bind(pipeline.canonical(spec), query, key)
    if not mask.separable and prod(q_tile) * prod(k_tile) > LARGEST_TILE:
        raise InputError("q_tile", f"this mask is evaluated tile by tile: take tiles of at most {LARGEST_TILE} pairs")
    sizes = {"H": spec.heads, "NQ": prod(query), "NK": prod(key), **({} if batch is None else {"B": batch})}
    known, elements = known_tables(mask.predicate, tables, sizes)
    return block_mask(mask, q_tile, k_tile, known, elements, spec.heads)


def count(mask: BlockMask, share: float = 1.0) -> Counts:
    """Both bounds of a classified mask, of whose rows a `share` is computed."""
    tiling = mask.tiling
    pairs, instances = prod(tiling.mask.query) * prod(tiling.mask.key), mask.batch * mask.heads
    tiles = _tiles(mask, share)
    return Counts(
        flop_bound=_ratio(pairs * instances, mask.pairs, share),
        tile_bound=_ratio(tiles.total * instances, mask.visited, share),
        sparsity=1.0 - mask.pairs * share / (pairs * instances),
        tiles=tiles,
    )


def _tiles(mask: BlockMask, share: float) -> TileCounts:
    tiling = mask.tiling
    undilated = (1,) * tiling.rank
    query = prod(tiles_per_axis(tiling.mask.query, undilated, tiling.q_tile))
    key = prod(tiles_per_axis(tiling.mask.key, undilated, tiling.k_tile))
    instances = mask.batch * mask.heads
    visited, full, partial = (_mean(n, instances, share) for n in (mask.visited, mask.full, mask.partial))
    return TileCounts(query=query, key=key, total=query * key, visited=visited, full=full, partial=partial)


def _mean(total: int, instances: int, share: float) -> Count:
    if share != 1.0:
        return total * share / instances
    return total // instances if total % instances == 0 else total / instances


def _ratio(whole: int, part: int, share: float) -> float:
    return whole / part / share if part and share else math.inf
