"""Head routing: which rows of a call are kept, and what these visit once they are compacted.

A token is routed to a few heads, so that a whole tile is almost never free of a head. Each head's kept rows are therefore put together,
positions ascending, and cut into tiles anew; a tile visits what any of its rows' own tiles visits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.graph import Graph, GraphOp
from attncc.ir.values import evaluate
from attncc.runtime.blocked.formulas import Env, Places
from attncc.runtime.blocked.rules import Where
from attncc.runtime.blocked.tiles import Entries, Ints, Slots, TilePlan
from attncc.runtime.blocked.workers import host_reads
from attncc.runtime.operands import Operands


def row_env(graph: Graph, operands: Operands) -> Env:
    """What expressions of output rows see: positions that broadcast to `[B, H, N, 1]`, lengths and tables."""
    q = operands.q
    b, h, n = (torch.arange(size, device=q.device).view(-1, *[1] * after) for size, after in zip(q.shape[:3], (3, 2, 1)))
    return Places.of(graph, operands).env(Where(b, h, n, n))  # no such expression reads a key


def read_rows(graph: Graph, operands: Operands) -> Tensor | None:
    """Which rows are kept, bool `[B, H, N]`, where that can be read: only these are computed. None where all are."""
    return _kept_rows(graph, operands) if host_reads(operands.q.device) else None


def rows_to_erase(graph: Graph, operands: Operands, joined: bool) -> Tensor | None:
    """Which rows are kept, where more than these are written: by an engine that the host would have to wait for, or `joined` by a sink."""
    return _kept_rows(graph, operands) if joined or not host_reads(operands.q.device) else None


def _kept_rows(graph: Graph, operands: Operands) -> Tensor | None:
    route = graph.find(GraphOp.ROUTE)
    if not route:
        return None
    kept: Tensor = evaluate(route[0]["rows"], row_env(graph, operands), torch_arrays(operands.compute))
    return kept.expand(*operands.q.shape[:3], 1)[..., 0]


def routed(plan: TilePlan, kept: npt.NDArray[np.bool_], classes: int) -> TilePlan:
    """The plan of those rows of `plan` that are `kept` [tokens], in its order of rows; tiles stay within one of its residue classes."""
    tokens, valid = plan.queries.tokens.numpy(), plan.queries.valid.numpy()
    tile = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)[valid]
    chosen = kept[tokens[valid]]
    tile, flat = tile[chosen], tokens[valid][chosen]
    owner = tile // (len(tokens) // classes)
    at = np.arange(len(flat)) - np.searchsorted(owner, owner)
    cut = np.flatnonzero(at % tokens.shape[1] == 0)
    mine = np.repeat(np.arange(len(cut)), np.diff(np.append(cut, len(flat))))
    whole, part = _joined(plan, np.unique(np.stack([mine, tile], axis=1), axis=0), len(cut))
    return TilePlan(_slots(plan.queries, flat, cut), plan.keys, whole, part)


def _slots(like: Slots, flat: Ints, cut: Ints) -> Slots:
    """Tiles of some tokens; what is left of a tile repeats its last."""
    counts, column = np.diff(np.append(cut, len(flat))), np.arange(like.tokens.shape[1])
    tokens = flat[cut[:, None] + np.minimum(column, counts[:, None] - 1)]
    device = like.tokens.device
    return Slots(torch.from_numpy(tokens).to(device), counts, torch.from_numpy(column < counts[:, None]).to(device), None)


def _joined(plan: TilePlan, pairs: Ints, count: int) -> tuple[Entries, Entries]:
    """Full and partial key tiles of `count` new tiles; `pairs` [n, 2] says which old ones each new one has rows of."""
    new, old = pairs.T
    full, part = (_entries_of(entries, new, old) for entries in (plan.full, plan.partial))
    seen, times = np.unique(full, axis=0, return_counts=True)
    every = times == np.bincount(new, minlength=count)[seen[:, 0]]
    rest = np.unique(np.concatenate([seen[~every], part]), axis=0)
    # What one old tile sees in full and another not at all is among the rest already; in part, in both: once is enough.
    return _packed(seen[every], count), _packed(rest, count)


def _entries_of(entries: Entries, new: Ints, old: Ints) -> Ints:
    """(new tile, key tile) of everything that old tiles visit."""
    begin, length = entries.offsets[old], np.diff(entries.offsets)[old]
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.stack([np.repeat(new, length), entries.tiles[np.repeat(begin, length) + within]], axis=1)


def _packed(found: Ints, count: int) -> Entries:
    """Compressed form of sorted (tile, key tile)."""
    return Entries(np.searchsorted(found[:, 0], np.arange(count + 1)), found[:, 1])
