"""Visits a block mask given as lists: for every row tile, the key tiles to visit and which of them need the mask.

Row tiles with equally many full and partial tiles are computed together; their key tiles are gathered whole.  Tokens
are expected in tile order (``TileOrder``), so a tile is contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.runtime.blocked.block import Block, Part, Piece, Rules, Where
from attncc.runtime.blocked.strips import BLOCK_SCORES, MAX_KEYS, Operands, head_chunks, split_tokens

CACHED_MASKS = 8


@dataclass(frozen=True)
class TileOrder:
    """Tokens in tile order: slot -> flat token, -1 for padding; [tiles * tile size] for queries and for keys."""

    queries: Tensor
    keys: Tensor

    @staticmethod
    def arrange(x: Tensor, slots: Tensor) -> Tensor:
        """[B, H, tokens, width] -> [B, H, slots, width]; padding is 0, so that padded rows give no gradients."""
        return x.index_select(2, slots.clamp(min=0)).index_fill_(2, (slots < 0).nonzero().flatten(), 0)

    @staticmethod
    def restore(x: Tensor, slots: Tensor, tokens: int) -> Tensor:
        """The inverse of ``arrange``."""
        slot = torch.empty(tokens, dtype=torch.int64, device=x.device)
        used = (slots >= 0).nonzero().flatten()
        slot[slots[used]] = used
        return x.index_select(2, slot)


@dataclass(frozen=True)
class TilePlan:
    """Visited key tiles of every row tile, in CSR form; equal for all heads the plan is used for.

    ``size`` is (queries, keys) of a tile.  ``starts`` [T + 1] and ``tiles`` [entries] list key tiles, ``full``
    [entries] tells which need no mask (never one with padding).  ``allowed(where)`` is the mask, asked for partial
    tiles only, at the first head of the plan's range.  ``queries`` and ``keys`` are the flat tokens of the slots (-1
    for padding).
    """

    size: tuple[int, int]
    starts: Tensor
    tiles: Tensor
    full: Tensor
    queries: Tensor
    keys: Tensor
    allowed: Callable[[Where], Tensor]

    def runs(self, heads: range, counts: tuple[int, int, int], workers: int) -> list[TileRun]:
        """Row tiles grouped by (full, partial) counts, as many together as one block may hold."""
        starts, order = self.starts.tolist(), self._full_first()
        groups: dict[tuple[int, int], list[int]] = {}
        full_before = [0, *self.full.cumsum(0).tolist()]
        for row, (a, b) in enumerate(itertools.pairwise(starts)):
            full = full_before[b] - full_before[a]
            groups.setdefault((full, b - a - full), []).append(row)
        return [
            TileRun(self, chunk, part, torch.stack([order[starts[r] : starts[r + 1]] for r in part]), counted[0], heads)
            for counted, rows in groups.items()
            for chunk_size in [self._heads_per_block(heads, counts, sum(counted))]
            for part in _split(rows, self._rows_per_block(heads, counts, sum(counted), workers))
            for chunk in chunk_size
        ]

    def _full_first(self) -> Tensor:
        """Key tiles with each row's full ones first."""
        rows = torch.repeat_interleave(torch.arange(len(self.starts) - 1, device=self.tiles.device), self.starts.diff())
        return self.tiles[torch.argsort(rows * 2 + (~self.full).long(), stable=True)]

    def _pairs(self, count: int) -> int:
        return max(self.size[0] * min(count * self.size[1], MAX_KEYS), 1)

    def _heads_per_block(self, heads: range, counts: tuple[int, int, int], count: int) -> list[range]:
        return head_chunks(heads, counts, BLOCK_SCORES // self._pairs(count))

    def _rows_per_block(self, heads: range, counts: tuple[int, int, int], count: int, workers: int) -> int:
        """One where key and value heads differ: the product with v could not regroup the rows of several tiles."""
        if counts[1] != counts[2] or count == 0:
            return 1 if count else len(self.starts)
        chunk = len(self._heads_per_block(heads, counts, count)[0])
        share = -(-(len(self.starts) - 1) // (2 * workers))
        return max(min(BLOCK_SCORES // (chunk * self._pairs(count)), share), 1)


def _split(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass(frozen=True)
class TileRun:
    """Row tiles ``rows`` for some heads, with key tiles ``columns`` [rows, count], the first ``full`` unmasked."""

    plan: TilePlan
    heads: range
    rows: list[int]
    columns: Tensor
    full: int
    all_heads: range

    def load(self, rules: Rules, operands: Operands) -> LoadedRun:
        """Gather the rows."""
        return LoadedRun(rules, self, operands)


class LoadedRun:
    """The row tensors of a run, [key heads, tiles, group, rows, width]; keys are gathered piece by piece."""

    def __init__(self, rules: Rules, run: TileRun, operands: Operands) -> None:
        self.rules, self.run, self.operands = rules, run, operands
        keys = operands.key_heads("k", run.heads)
        self.key_heads = keys.stop - keys.start
        self.index = torch.tensor(run.rows, device=rules.like.device)
        self.rows = {name: self._gather(x) for name, x in operands.rows.items()}
        self._results: list[tuple[Tensor, Tensor]] = []
        self.rows |= {name: self._result(name, x) for name, x in operands.results.items()}
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []

    def _tiled(self, x: Tensor) -> Tensor:
        return split_tokens(x[self.run.heads.start : self.run.heads.stop], (-1, self.run.plan.size[0]))

    def _gather(self, x: Tensor) -> Tensor:
        tiles = self._tiled(x).index_select(1, self.index).to(self.rules.dtype)
        return tiles.view(self.key_heads, -1, *tiles.shape[1:]).transpose(1, 2)

    def _result(self, name: str, x: Tensor) -> Tensor:
        shape = (
            self.key_heads,
            len(self.run.rows),
            len(self.run.heads) // self.key_heads,
            self.run.plan.size[0],
            x.shape[-1],
        )
        copy = self.rules.scratch(name, shape)
        self._results.append((self._tiled(x), copy))
        return copy

    def store(self) -> None:
        """Bring row results to their places."""
        for target, copy in self._results:
            target.index_copy_(1, self.index, copy.transpose(1, 2).flatten(0, 1).to(target.dtype))

    def add_sums(self) -> None:
        """Add the key-side sums; runs that share heads must not do so at once."""
        for target, index, own in self._sums:
            target.index_add_(1, index, own)

    def blocks(self) -> Iterator[Block]:
        """One block, its key tiles in pieces of at most MAX_KEYS columns."""
        count = self.run.columns.shape[1]
        step = max(MAX_KEYS // self.run.plan.size[1], 1)
        yield Block(self.rows, [self._piece(a, min(a + step, count)) for a in range(0, count, step)])

    def _piece(self, a: int, b: int) -> Piece:
        columns = self.run.columns[:, a:b]
        index = columns.flatten()
        k, v = (self._key_tiles(name, x, index, a) for name, x in self.operands.keys.items())
        dk, dv = None, None
        if self.operands.sums:
            dk, dv = (self._own_sum(name, x, index, a) for name, x in self.operands.sums.items())
        full = max(self.run.full - a, 0)
        parts = [] if full >= b - a else [self._part(columns[:, full:], full * self.run.plan.size[1], (a, b))]
        where = None if self.rules.scores is None else self._where(columns)
        return Piece(k, v, parts, where, dk, dv)

    def _key_tiles(self, name: str, x: Tensor, index: Tensor, a: int) -> Tensor:
        """Key tiles of ``x`` as [key heads * row tiles, columns, width]."""
        tiles = self._tile_rows(name, x)
        shape = (tiles.shape[0], len(index), tiles.shape[2])
        gathered = torch.index_select(tiles, 1, index, out=self.rules.scratch(f"{name}{a}", shape))
        return gathered.view(tiles.shape[0] * len(self.run.rows), -1, x.shape[-1])

    def _own_sum(self, name: str, x: Tensor, index: Tensor, a: int) -> Tensor:
        tiles = self._tile_rows(name, x)
        own = self.rules.scratch(f"{name}{a}", (tiles.shape[0], len(index), tiles.shape[2])).zero_()
        self._sums.append((tiles, index, own))
        return own.view(tiles.shape[0] * len(self.run.rows), -1, x.shape[-1])

    def _tile_rows(self, name: str, x: Tensor) -> Tensor:
        """[heads, tiles, tile size * width]: gathered row-wise, a tile is one long row."""
        return split_tokens(x[self.operands.key_heads(name, self.run.heads)], (-1, self.run.plan.size[1])).flatten(2)

    def _part(self, columns: Tensor, start: int, piece: tuple[int, int]) -> Part:
        """The mask of the partial key tiles ``columns`` [row tiles, count]; a few are kept for the other heads."""
        masks, key = self.rules.masks, (id(self.run.plan), self.run.all_heads.start, self.run.rows[0], *piece)
        mask = masks.get(key)
        if mask is None:
            if len(masks) >= CACHED_MASKS:
                masks.clear()
            mask = masks[key] = self._mask(columns)
        return Part(start, start + mask.shape[-1], mask)

    def _mask(self, columns: Tensor) -> Tensor:
        q, k = self._positions(columns)
        first = torch.tensor(self.run.all_heads.start, device=q.device)
        query_heads = self.operands.heads[0]
        allowed = self.run.plan.allowed(Where(first // query_heads, first % query_heads, q.clamp(min=0), k.clamp(min=0))) & (k >= 0)
        zero = self.rules.like.new_zeros(())
        return torch.where(allowed, zero, zero - math.inf).expand(len(self.run.rows), 1, self.run.plan.size[0], k.shape[-1])

    def _where(self, columns: Tensor) -> Where:
        q, k = self._positions(columns)
        h = torch.arange(self.run.heads.start, self.run.heads.stop, device=q.device).view(self.key_heads, 1, -1, 1, 1)
        query_heads = self.operands.heads[0]
        return Where(h // query_heads, h % query_heads, q.clamp(min=0), k.clamp(min=0))

    def _positions(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the rows [tiles, 1, rows, 1] and of ``columns`` [tiles, 1, 1, keys]."""
        plan = self.run.plan
        q = plan.queries.view(-1, plan.size[0])[self.index][:, None, :, None]
        k = plan.keys.view(-1, plan.size[1])[columns].flatten(1)[:, None, None, :]
        return q, k
