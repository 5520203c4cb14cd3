"""Visits a block mask given as lists: for every row tile, the key tiles to visit and which of them need the mask.

Row tiles with equally many queries, full and partial tiles are computed together. Their queries are gathered by token; their key tiles
are gathered whole, for keys lie in slot order (`Slots`), each tile contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attncc.passes.tiles import Shape, ceildiv
from attncc.runtime.blocked.block import Block, Part, Piece
from attncc.runtime.blocked.rules import Place, Rules, TileMask, Where
from attncc.runtime.blocked.strips import BLOCK_SCORES, MAX_KEYS, HeadTensors, head_chunks, split_tokens

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Slots:
    """The tokens of every tile of a grid, class-major: `tokens` [tiles, side], of which the first `counts` [tiles] are `valid`.

    The rest repeat the tile's last token, so that what they hold is seen by no row that does not visit the tile. `slot_of` [tokens] is
    None where slots are tokens.
    """

    tokens: Tensor
    counts: Ints
    valid: Tensor
    slot_of: Tensor | None

    @cached_property
    def full(self) -> bool:
        """Whether every tile has as many tokens as its side."""
        return bool((self.counts == self.tokens.shape[1]).all())

    @staticmethod
    def of(lengths: Shape, order: Shape, sides: Shape, device: torch.device) -> Slots:
        """Tiles with `sides` of a grid of some lengths, walked in `order` residue classes an axis."""
        flat, on_grid = _tiled(lengths, order, sides)
        counts, column = on_grid.sum(axis=1), np.arange(flat.shape[1])
        kept = np.minimum(column, np.maximum(counts - 1, 0)[:, None])
        tokens = np.take_along_axis(flat, np.take_along_axis(np.argsort(~on_grid, axis=1, kind="stable"), kept, 1), 1)
        tokens[counts == 0] = 0
        valid = column < counts[:, None]
        slot_of = np.empty(math.prod(lengths), np.int64)
        slot_of[tokens[valid]] = np.flatnonzero(valid)
        same = len(slot_of) == tokens.size and bool((slot_of == np.arange(tokens.size)).all())
        on_device = [torch.from_numpy(x).to(device) for x in (tokens, valid, slot_of)]
        return Slots(on_device[0], counts, on_device[1], None if same else on_device[2])

    def arrange(self, x: Tensor) -> Tensor:
        """[B, H, tokens, width] to [B, H, slots, width]."""
        return x if self.slot_of is None else x.index_select(2, self.tokens.flatten())

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return x if self.slot_of is None else x.index_select(2, self.slot_of)


def _tiled(lengths: Shape, order: Shape, sides: Shape) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Flat token of every slot, [tiles, side], and whether it lies on the grid."""
    rank = len(lengths)
    flat, valid = np.zeros((1,) * (3 * rank), np.int64), np.ones((1,) * (3 * rank), bool)
    for a, (n, classes, side) in enumerate(zip(lengths, order, sides)):
        sizes = (classes, ceildiv(ceildiv(n, classes), side), side)
        residue, tile, offset = (np.arange(size).reshape(_along(a + i * rank, 3 * rank)) for i, size in enumerate(sizes))
        at = (tile * side + offset) * classes + residue
        flat, valid = flat * n + at, valid & (at < n)
    width = math.prod(sides)
    return flat.reshape(-1, width), valid.reshape(-1, width)


def _along(axis: int, rank: int) -> list[int]:
    return [-1 if i == axis else 1 for i in range(rank)]


class Entries(NamedTuple):
    """Key tiles of every row tile in compressed form."""

    offsets: Ints
    tiles: Ints

    def row(self, i: int) -> Ints:
        """The key tiles of one row tile."""
        return self.tiles[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Visited key tiles of every row tile, the same for all heads that the plan is used for; only `partial` ones need the mask."""

    queries: Slots
    keys: Slots
    full: Entries
    partial: Entries
    _runs: dict[object, list[TileRun]] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return self.queries.tokens.shape[1], self.keys.tokens.shape[1]

    def runs(self, heads: range, counts: tuple[int, int, int], workers: int) -> list[TileRun]:
        """Row tiles grouped by their counts, as many together as one block may hold."""
        key = (heads, counts, workers)
        if key not in self._runs:
            self._runs[key] = [run for group, rows in self._groups.items() for run in self._grouped(group, rows, heads, counts, workers)]
        return self._runs[key]

    @cached_property
    def _groups(self) -> dict[tuple[int, int, int], list[int]]:
        """Row tiles by their numbers of queries, full and partial key tiles."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        counts = (self.queries.counts, np.diff(self.full.offsets), np.diff(self.partial.offsets))
        for row, group in enumerate(zip(*(c.tolist() for c in counts))):
            if group[0]:
                groups.setdefault(group, []).append(row)
        return groups

    def _grouped(
        self, group: tuple[int, int, int], rows: list[int], heads: range, counts: tuple[int, int, int], workers: int
    ) -> Iterator[TileRun]:
        queries, full, partial = group
        pairs = max(queries * min((full + partial) * self.size[1], MAX_KEYS), 1)
        chunks = head_chunks(heads, counts, BLOCK_SCORES // pairs)
        # Where key and value heads differ, the product with v cannot regroup the rows of several tiles.
        together = 1 if counts[1] != counts[2] else max(min(BLOCK_SCORES // (len(chunks[0]) * pairs), -(-len(rows) // workers)), 1)
        for i in range(0, len(rows), together):
            part = rows[i : i + together]
            tokens = self.queries.tokens[part[0] : part[0] + 1] if len(part) == 1 else self.queries.tokens[part]
            columns = np.stack([np.concatenate([self.full.row(r), self.partial.row(r)]) for r in part])
            on_device = torch.from_numpy(columns).to(tokens.device)
            yield from (TileRun(self, chunk, tokens[:, :queries], on_device, full, (heads.start, part[0])) for chunk in chunks)


@dataclass(frozen=True, eq=False)
class TileRun:
    """Row tiles of `tokens` [tiles, queries] for some heads, with key tiles `columns` [tiles, count], the first `full` unmasked."""

    plan: TilePlan
    heads: range
    tokens: Tensor
    columns: Tensor
    full: int
    name: tuple[int, int]

    @property
    def pairs(self) -> int:
        """Query-key pairs that it computes."""
        return len(self.heads) * self.tokens.numel() * self.columns.shape[1] * self.plan.size[1]

    def load(self, rules: Rules, operands: HeadTensors) -> LoadedRun:
        """Gather the rows."""
        return LoadedRun(rules, self, operands)


class LoadedRun:
    """The row tensors of a run, [key heads, tiles, group, queries, width]; keys are gathered piece by piece."""

    def __init__(self, rules: Rules, run: TileRun, operands: HeadTensors) -> None:
        self.rules, self.run, self.operands = rules, run, operands
        keys = operands.key_heads("k", run.heads)
        self.key_heads = keys.stop - keys.start
        self.index = run.tokens.flatten()
        self.rows = {name: self._gather(x) for name, x in operands.rows.items()}
        self._results: list[tuple[Tensor, Tensor]] = []
        self.rows |= {name: self._result(name, x) for name, x in operands.results.items()}
        self._sums: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def _heads(self, x: Tensor) -> Tensor:
        return x[self.run.heads.start : self.run.heads.stop]

    def _grouped(self, x: Tensor) -> Tensor:
        """[heads, tiles * queries, width] to [key heads, tiles, group, queries, width]."""
        group = len(self.run.heads) // self.key_heads
        return x.view(self.key_heads, group, *self.run.tokens.shape, x.shape[-1]).transpose(1, 2)

    def _gather(self, x: Tensor) -> Tensor:
        return self._grouped(self._heads(x).index_select(1, self.index).to(self.rules.dtype))

    def _result(self, name: str, x: Tensor) -> Tensor:
        tiles, queries = self.run.tokens.shape
        copy = self.rules.scratch(name, (self.key_heads, tiles, len(self.run.heads) // self.key_heads, queries, x.shape[-1]))
        self._results.append((self._heads(x), copy))
        return copy

    def store(self) -> None:
        """Bring row results to their places."""
        for target, copy in self._results:
            source = copy.transpose(1, 2).reshape(target.shape[0], len(self.index), copy.shape[-1])
            target.index_copy_(1, self.index, source.to(target.dtype))

    def add_sums(self) -> None:
        """Add the key-side sums; runs that share heads must not do so at once."""
        for target, index, own in self._sums.values():
            target.index_add_(1, index, own)

    def blocks(self) -> Iterator[Block]:
        """One block, its key tiles in pieces of at most MAX_KEYS columns."""
        count = self.run.columns.shape[1]
        step = max(MAX_KEYS // self.run.plan.size[1], 1)
        yield Block(self.rows, _Pieces(self, range(0, count, step), step))

    def piece(self, a: int, b: int) -> Piece:
        """Key tiles [a, b) of every row tile, gathered."""
        columns = self.run.columns[:, a:b]
        index = columns.flatten()
        k, v = (self._key_tiles(name, x, index) for name, x in self.operands.keys.items())
        dk, dv = None, None
        if self.operands.sums:
            dk, dv = (self._own_sum(name, x, index, a) for name, x in self.operands.sums.items())
        full = max(self.run.full - a, 0)
        parts = [] if full >= b - a else [self._part(columns[:, full:], full, (a, b))]
        place = Place(partial(self._where, columns, self.run.heads)) if self.rules.places else None
        return Piece(k, v, parts, place, dk, dv)

    def _key_tiles(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Key tiles of `x` as [key heads * row tiles, columns, width]."""
        tiles = self._tile_rows(name, x)
        shape = (tiles.shape[0], len(index), tiles.shape[2])
        gathered = torch.index_select(tiles, 1, index, out=self.rules.scratch(name, shape))
        return gathered.view(*self._gathered(tiles, len(index)), x.shape[-1])

    def _gathered(self, tiles: Tensor, count: int) -> tuple[int, int]:
        """Matrices and columns of `count` key tiles for all row tiles."""
        rows = len(self.run.tokens)
        return tiles.shape[0] * rows, count // rows * self.run.plan.size[1]

    def _own_sum(self, name: str, x: Tensor, index: Tensor, a: int) -> Tensor:
        tiles = self._tile_rows(name, x)
        if (name, a) not in self._sums:
            own = self.rules.scratch(f"{name}{a}", (tiles.shape[0], len(index), tiles.shape[2])).zero_()
            self._sums[name, a] = tiles, index, own
        return self._sums[name, a][2].view(*self._gathered(tiles, len(index)), x.shape[-1])

    def _tile_rows(self, name: str, x: Tensor) -> Tensor:
        """[heads, tiles, tile size * width]: gathered row-wise, a tile is one long row."""
        side = self.run.plan.size[1]
        return split_tokens(x[self.operands.key_heads(name, self.run.heads)], (x.shape[1] // side, side)).flatten(2)

    def _part(self, columns: Tensor, full: int, piece: tuple[int, int]) -> Part:
        """The mask of the partial key tiles `columns` [row tiles, count], which stand behind `full` others."""
        mask, size, heads = self.rules.mask, self.run.plan.size[1], self.run.heads
        assert mask is not None
        seen_by = heads if mask.by_head else heads[:1]
        key = (*self.run.name, len(self.run.tokens), *piece, seen_by if mask.by_head else None)
        allowed = mask.made(key, columns.device, lambda: self._allowed(mask, columns, seen_by))
        ceiling = self.rules.scratch("ceiling", tuple(allowed.shape)).copy_(allowed).sub_(0.5).mul_(math.inf)
        return Part(full * size, (full + columns.shape[1]) * size, ceiling)

    def _allowed(self, mask: TileMask, columns: Tensor, heads: range) -> Tensor:
        """Which of the columns each row may see, kept in bits: they take a quarter of the room of their ceiling.

        Bands ask about every key, so that even a mask of rows has all columns.
        """
        allowed, keys = mask.allowed(self._where(columns, heads)), self.run.plan.keys
        return allowed if keys.full else allowed & keys.valid[columns].flatten(1)[:, None, None, :]

    def _where(self, columns: Tensor, heads: range) -> Where:
        """Heads [key heads, 1, group, 1, 1], rows [tiles, 1, queries, 1] and keys [tiles, 1, 1, columns]."""
        plan, query_heads = self.run.plan, self.operands.heads[0]
        h = torch.arange(heads.start, heads.stop, device=columns.device)
        h = h.view(self.key_heads if len(heads) > 1 else 1, 1, -1, 1, 1)
        k = plan.keys.tokens[columns].flatten(1)[:, None, None, :]
        return Where(h // query_heads, h % query_heads, self.run.tokens[:, None, :, None], k)


@dataclass(frozen=True)
class _Pieces:
    """The pieces of a run's block, `step` key tiles each, gathered again whenever they are walked."""

    run: LoadedRun
    starts: range
    step: int

    def __iter__(self) -> Iterator[Piece]:
        return (self.run.piece(a, min(a + self.step, self.starts.stop)) for a in self.starts)
