"""Tile plans of a call, for masks that are no bands.

Where the host may read the mask's tables, the block mask says which tiles to visit. It is made once for the same lengths and contents of
tables: the layers of a model share their documents. On other devices the host must not wait for tables: there every tile that the
bands leave is visited under its mask.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.passes.block_mask import BlockMask, block_mask
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import BoundMask, Shape, bind, ceildiv
from attncc.runtime.blocked.formulas import Places
from attncc.runtime.blocked.routed import routed
from attncc.runtime.blocked.rules import Kept, TileMask
from attncc.runtime.blocked.tiles import Entries, Ints, Slots, TilePlan
from attncc.runtime.blocked.workers import host_reads
from attncc.runtime.operands import Operands

Plans = list[tuple[range, TilePlan]]
Contents = tuple[tuple[str, Shape, str, bytes], ...]
"""Tables by name, shape, type and bytes."""
MOST_KEPT = 1 << 20
"""Bytes of tables whose block mask is kept; to compare many more takes long."""


def routed_plans(kernel: KernelPlan, mask: BoundMask, operands: Operands, kept: Tensor) -> tuple[Plans, TileMask]:
    """Tile plans of routed rows, `kept` [B, Hq, Nq]: one for each (batch element, head) that has any."""
    plans, partial_mask = tile_plans(kernel, mask, operands)
    rows, classes = kept.flatten(0, 1).numpy(), prod(mask.order)
    found = ((range(i, i + 1), routed(plan, rows[i], classes)) for heads, plan in plans for i in heads if rows[i].any())
    # Masks of tiles are kept from call to call; those of another call's rows are not this one's.
    return list(found), replace(partial_mask, made=Kept())


def tile_plans(kernel: KernelPlan, mask: BoundMask, operands: Operands) -> tuple[Plans, TileMask]:
    """Plans over the flattened (batch, head) range, one for each part of it with lists of its own, and the mask of partial tiles."""
    batch, heads, device = *operands.q.shape[:2], operands.q.device
    if not mask.reads or host_reads(device):
        contents = tuple(map(_content, (t.name for t in mask.reads), (operands.tables[t.name] for t in mask.reads)))
        small = sum(len(data) for *_, data in contents) <= MOST_KEPT
        make = _of_lengths if not contents else _of_contents if small else _planned
        return make(kernel, mask.query, mask.key, batch, heads, device, contents)
    places = Places.of(kernel.graph, operands)
    by_head = mask.varies_with("b") or mask.varies_with("h")
    plan = _candidates(kernel, mask.query, mask.key, device)
    return [(range(batch * heads), plan)], TileMask(partial(places.allowed, mask.predicate), by_head)


def _content(name: str, table: Tensor) -> tuple[str, Shape, str, bytes]:
    values = table.numpy()
    return name, values.shape, values.dtype.str, values.tobytes()


def _planned(
    kernel: KernelPlan, query: Shape, key: Shape, batch: int, heads: int, device: torch.device, contents: Contents
) -> tuple[Plans, TileMask]:
    """Plans of a mask that lengths and what tables hold decide."""
    mask = bind(kernel.graph, query, key)
    values = {name: np.frombuffer(bytearray(data), dtype).reshape(shape) for name, shape, dtype, data in contents}
    found = block_mask(mask, *_sides(kernel, mask), values or None, batch, heads)
    known = {name: torch.from_numpy(x).to(device) for name, x in values.items()}
    places = Places(query, key, mask.order, known, torch_arrays())
    return _ranged(found, batch, heads, device), TileMask(partial(places.allowed, mask.predicate), False)


_of_lengths = lru_cache(maxsize=64)(_planned)
_of_contents = lru_cache(maxsize=4)(_planned)  # each keeps the masks of its tiles too


@lru_cache(maxsize=64)
def _candidates(kernel: KernelPlan, query: Shape, key: Shape, device: torch.device) -> TilePlan:
    """Every tile that the bands leave, as a partial one."""
    mask = bind(kernel.graph, query, key)
    found = block_mask(mask.hull, *_sides(kernel, mask))
    plan = _tile_plan(found, 0, device)
    rows = [np.repeat(np.arange(found.tiling.rows), np.diff(side.offsets)) for side in (plan.full, plan.partial)]
    tiles = np.concatenate([plan.full.tiles, plan.partial.tiles])[np.argsort(np.concatenate(rows), kind="stable")]
    none = Entries(np.zeros_like(plan.full.offsets), tiles[:0])
    return TilePlan(plan.queries, plan.keys, none, Entries(plan.full.offsets + plan.partial.offsets, tiles))


def _sides(kernel: KernelPlan, mask: BoundMask) -> tuple[Shape, Shape]:
    """The plan's tiles, none larger than a residue class."""
    sides = ((kernel.q_tile, mask.query), (kernel.k_tile, mask.key))
    query, key = (tuple(min(t, ceildiv(n, d)) for t, n, d in zip(tile, lengths, mask.order)) for tile, lengths in sides)
    return query, key


def _ranged(found: BlockMask, batch: int, heads: int, device: torch.device) -> Plans:
    """A plan for all heads where the lists are the same for all, one for each batch element, or one for each head."""
    plans = [_tile_plan(found, owner, device) for owner in range(found.batch * found.heads)]
    if found.heads > 1:
        return [(range(i, i + 1), plans[i % len(plans)]) for i in range(batch * heads)]
    share = batch * heads // found.batch
    return [(range(b * share, (b + 1) * share), plan) for b, plan in enumerate(plans)]


def _tile_plan(found: BlockMask, owner: int, device: torch.device) -> TilePlan:
    """The lists of one (batch element, head)."""
    tiling, lists = found.tiling, found.lists
    queries, keys = (
        _slots(lengths, tiling.mask.order, sides, device)
        for lengths, sides in ((tiling.mask.query, tiling.q_tile), (tiling.mask.key, tiling.k_tile))
    )
    full, part = (
        _entries(found, owner, offsets, tiles)
        for offsets, tiles in ((lists.full_offsets, lists.full_tiles), (lists.partial_offsets, lists.partial_tiles))
    )
    return TilePlan(queries, keys, full, part)


@lru_cache(maxsize=64)
def _slots(lengths: Shape, order: Shape, sides: Shape, device: torch.device) -> Slots:
    return Slots.of(lengths, order, sides, device)


def _entries(found: BlockMask, owner: int, offsets: Ints, tiles: Ints) -> Entries:
    """Key tiles of the owner's rows, counted over all residue classes as slots are."""
    tiling = found.tiling
    mine = offsets[owner * tiling.rows : (owner + 1) * tiling.rows + 1]
    residue = np.repeat(np.arange(tiling.rows) // max(tiling.rows // tiling.classes, 1), np.diff(mine))
    return Entries(mine - mine[0], tiles[mine[0] : mine[-1]] + residue * prod(tiling.k_tiles))
