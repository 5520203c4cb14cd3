"""FLOP bound and tile bound: counts of pairs and of tiles, from the block mask that the compiler itself uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod
from typing import Any

from attncc import pipeline
from attncc.errors import InputError
from attncc.passes.block_mask import BlockMask, block_mask
from attncc.passes.given import Lengths, known_grid, known_tables
from attncc.passes.tiles import Shape, bind, tiles_per_axis
from attncc.simulator.report import Count, SpeedupReport, TileCounts
from attncc.spec.attention import AttentionSpec
from attncc.targets import target as target_record

LARGEST_TILE = 1 << 22
"""Pairs of a tile, at most, where a mask is no product of bands: undecided tiles are evaluated pair by pair."""


def simulate(
    spec: AttentionSpec,
    target: str,
    q_tile: Shape | None = None,
    k_tile: Shape | None = None,
    *,
    lengths: Lengths = None,
    tables: Mapping[str, Any] | None = None,
    batch: int | None = None,
) -> SpeedupReport:
    """How much faster than dense attention a spec can be.

    Args:
        spec: what would be computed.
        target: a name from `attncc.targets`, or a target's file.
        q_tile: tokens of a query tile by axis, any positive numbers; default: those of the plan for the target.
        k_tile: the same of a key tile.
        lengths: tokens of each axis that the spec leaves open (of `tokens`, then of `key_tokens`).
        tables: integer tables that the mask reads at run time, by name: `segments` `[B, Nq]` and the like.
        batch: how many elements to average over where the mask differs between them; default: what the tables say, else 1.

    Returns:
        The report. FLOP bound = all pairs / allowed pairs; tile bound = tiles of the dense grid without dilation / visited tiles (Hassani
        et al., Generalized Neighborhood Attention, arXiv 2504.16922). Masks that differ between heads or batch elements are averaged.

    Raises:
        TargetError: an unknown target, or a file that is refused.
        UnsupportedError: no tile fits the target (where none is given).
        InputError: a tile of the wrong rank, missing lengths or tables; names the argument.
    """
    record = target_record(target)
    q_sides, k_sides = _sides("q_tile", q_tile, spec), _sides("k_tile", k_tile, spec)
    if q_sides is None or k_sides is None:
        kernel = pipeline.plan(spec, record.name).kernels[0]
        q_sides, k_sides = q_sides or kernel.q_tile, k_sides or kernel.k_tile
    mask = classify(spec, q_sides, k_sides, lengths, tables, batch)
    return _report(spec, record.name, mask)


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
    known, elements = known_tables(mask.residual, tables, sizes)
    return block_mask(mask, q_tile, k_tile, known, elements, spec.heads)


def _sides(name: str, tile: Any, spec: AttentionSpec) -> Shape | None:
    """A tile shape as a tuple, checked."""
    if tile is None:
        return None
    sides = (tile,) if isinstance(tile, int) else tuple(tile)
    if len(sides) != spec.grid.rank:
        raise InputError(name, f"has {len(sides)} sides, tokens have {spec.grid.rank} axes")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise InputError(name, f"sides must be positive integers, not {list(sides)}")
    return sides


def _report(spec: AttentionSpec, target: str, mask: BlockMask) -> SpeedupReport:
    tiling = mask.tiling
    query, key = tiling.mask.query, tiling.mask.key
    pairs, instances = prod(query) * prod(key), mask.batch * mask.heads
    tiles = _counts(mask)
    return SpeedupReport(
        spec=spec,
        target=target,
        tokens=query,
        key_tokens=key,
        q_tile=tiling.q_tile,
        k_tile=tiling.k_tile,
        flop_bound=_ratio(pairs * instances, mask.pairs),
        tile_bound=_ratio(tiles.total * instances, mask.visited),
        sparsity=1.0 - mask.pairs / (pairs * instances),
        block_sparse=mask.partial == 0,
        exact=mask.exact,
        tiles=tiles,
    )


def _counts(mask: BlockMask) -> TileCounts:
    tiling = mask.tiling
    undilated = (1,) * tiling.rank
    query = prod(tiles_per_axis(tiling.mask.query, undilated, tiling.q_tile))
    key = prod(tiles_per_axis(tiling.mask.key, undilated, tiling.k_tile))
    instances = mask.batch * mask.heads
    visited, full, partial = (_mean(n, instances) for n in (mask.visited, mask.full, mask.partial))
    return TileCounts(query=query, key=key, total=query * key, visited=visited, full=full, partial=partial)


def _mean(total: int, instances: int) -> Count:
    return total // instances if total % instances == 0 else total / instances


def _ratio(whole: int, part: int) -> float:
    return whole / part if part else math.inf
