"""Cuts a banded plan into strips, the tasks of the worker threads.

A strip is a run of tiles of axis 0 times one tile of every other axis, for some heads. Copied to contiguous scratch it
is a 1-D problem: the keys of each of its row tiles are one run of its key rows, so blocks are views and one copy serves
many tiles. A 1-D problem is not copied at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attncc.runtime.blocked.bands import AxisTile, BandPlan
from attncc.runtime.blocked.block import Block, Part, Piece
from attncc.runtime.blocked.rules import Place, Rules, Where

# Scores of one block: about one core's L2; smaller blocks cost more in operator calls than they save in misses.
BLOCK_SCORES = 1 << 19
MAX_KEYS = 2048
TASKS_PER_WORKER = 4
LEAST_TILES = 4


@dataclass(frozen=True)
class HeadTensors:
    """Tensors flattened to [B * heads, tokens, width]: `rows` are read and `results` written per query."""

    heads: tuple[int, int, int]
    rows: dict[str, Tensor]
    results: dict[str, Tensor]
    keys: dict[str, Tensor]
    sums: dict[str, Tensor]

    def key_heads(self, name: str, heads: range) -> slice:
        """The heads of key-side tensor `name` ("k", "v", "dk", "dv") which the query heads `heads` use."""
        group = self.heads[0] // self.heads[1 if name.endswith("k") else 2]
        return slice(heads.start // group, (heads.stop - 1) // group + 1)


def head_chunks(heads: range, counts: tuple[int, int, int], most: int) -> list[range]:
    """Equal shares of the query heads, at most `most` each, that cut no key or value head's group unevenly."""
    groups = (counts[0] // counts[1], counts[0] // counts[2])
    fair = [n for n in range(1, len(heads) + 1) if len(heads) % n == 0 and all(n % g == 0 or g % n == 0 for g in groups)]
    size = max((n for n in fair if n <= most), default=1)
    return [heads[i : i + size] for i in range(0, len(heads), size)]


@dataclass(frozen=True)
class Strip:
    """Some tiles of axis 0 (one residue class, consecutive), one tile of each other axis, some query heads."""

    plan: BandPlan
    heads: range
    tiles: Sequence[AxisTile]
    rest: tuple[AxisTile, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs that it computes."""
        return len(self.heads) * math.prod(len(t.q) * len(t.k) for t in self.rest) * sum(len(t.q) * len(t.k) for t in self.tiles)

    def rows(self) -> tuple[slice, ...]:
        """Index of the strip's queries into [B * Hq, *grid, width]."""
        axis0 = slice(self.tiles[0].q.start, self.tiles[-1].q.stop, self.plan.step)
        return (slice(self.heads.start, self.heads.stop), axis0, *(_slice(t.q) for t in self.rest))

    @property
    def tokens(self) -> Tensor | None:
        """Tokens of the strip's queries where they are routed rows."""
        routed = self.plan.tokens
        return None if routed is None else routed[self.tiles[0].q.start : self.tiles[-1].q.stop]

    def keys(self, heads: slice) -> tuple[slice, ...]:
        """Index of the strip's keys into [B * Hk, *key_grid, width]."""
        live = [t.k for t in self.tiles if t.k]
        axis0 = slice(min(k.start for k in live), max(k.stop for k in live), self.plan.step) if live else slice(0, 0)
        return (heads, axis0, *(_slice(t.k) for t in self.rest))

    def load(self, rules: Rules, operands: HeadTensors) -> LoadedStrip:
        """Copy or view the strip's tensors."""
        return LoadedStrip(rules, self, operands)


def plan_strips(plan: BandPlan, heads: range, counts: tuple[int, int, int], workers: int) -> list[Strip]:
    """Strips that cover the plan, enough of them to keep `workers` busy."""
    rests = list(itertools.product(*plan.axes[1:]))
    most = max(len(t.q) * len(t.k) for t in plan.axes[0]) * max(math.prod(len(t.q) * len(t.k) for t in rest) for rest in rests)
    chunks = head_chunks(heads, counts, BLOCK_SCORES // max(min(most, MAX_KEYS * 128), 1))
    wanted = -(-TASKS_PER_WORKER * workers // (len(rests) * len(chunks) * len(plan.residues))) if workers > 1 else 1
    runs = [
        (tiles[i : i + size], rest)
        for rest, tiles in itertools.product(rests, plan.residues)
        for size in [max(-(-len(tiles) // wanted), LEAST_TILES)]
        for i in range(0, len(tiles), size)
    ]
    # Neighbours in the order use different heads, so that their key sums seldom wait for each other.
    return [Strip(plan, chunk, tiles, rest) for tiles, rest in runs for chunk in chunks]


class LoadedStrip:
    """A strip's tensors, each [heads, tokens, width] with axis 0 outermost; `store` brings results back."""

    def __init__(self, rules: Rules, strip: Strip, operands: HeadTensors) -> None:
        self.rules, self.strip, self.operands = rules, strip, operands
        self.row_width = math.prod(len(t.q) for t in strip.rest)
        self.key_width = math.prod(len(t.k) for t in strip.rest)
        self._results: list[tuple[Tensor, Tensor]] = []
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._routed: list[tuple[Tensor, Tensor]] = []
        self.rows = {name: self._row_input(name, x) for name, x in operands.rows.items()}
        self.rows |= {name: self._row_result(name, x) for name, x in operands.results.items()}
        key_grid = strip.plan.key_grid
        places = {name: strip.keys(operands.key_heads(name, strip.heads)) for name in (*operands.keys, *operands.sums)}
        self.keys = {name: self._load(name, split_tokens(x, key_grid)[places[name]]) for name, x in operands.keys.items()}
        self.keys |= {name: self._sum(name, split_tokens(x, key_grid)[places[name]]) for name, x in operands.sums.items()}

    def _row_input(self, name: str, x: Tensor) -> Tensor:
        """The strip's rows of `x`; routed ones are gathered, by way of their own type where that is another."""
        tokens = self.strip.tokens
        if tokens is None:
            return self._load(name, split_tokens(x, self.strip.plan.grid)[self.strip.rows()])
        source = x[self.strip.heads.start : self.strip.heads.stop]
        if source.dtype != self.rules.dtype:
            return self._load(name, source.index_select(1, tokens))
        return torch.index_select(source, 1, tokens, out=self.rules.scratch(name, (len(source), len(tokens), x.shape[-1])))

    def _row_result(self, name: str, x: Tensor) -> Tensor:
        if self.strip.tokens is None:
            return self._result(name, split_tokens(x, self.strip.plan.grid)[self.strip.rows()])
        target = x[self.strip.heads.start : self.strip.heads.stop]
        self._routed.append((target, self.rules.scratch(name, (len(target), len(self.strip.tokens), x.shape[-1]))))
        return self._routed[-1][1]

    def _is_matrix(self, x: Tensor) -> bool:
        return x.dim() == 3 and x.dtype == self.rules.dtype

    def _load(self, name: str, source: Tensor) -> Tensor:
        """`source` as one matrix a head, in the compute dtype; copied to scratch unless it is that already."""
        if self._is_matrix(source):
            return source
        return self.rules.scratch(name, tuple(source.shape)).copy_(source).flatten(1, -2)

    def _result(self, name: str, target: Tensor) -> Tensor:
        if self._is_matrix(target):
            return target
        self._results.append((target, self.rules.scratch(name, tuple(target.shape))))
        return self._results[-1][1].flatten(1, -2)

    def _sum(self, name: str, target: Tensor) -> Tensor:
        self._sums.append((target, self.rules.scratch(name, tuple(target.shape)).zero_()))
        return self._sums[-1][1].flatten(1, -2)

    def store(self) -> None:
        """Bring row results to their places."""
        for target, copy in self._results:
            target.copy_(copy)
        for target, copy in self._routed:
            assert self.strip.tokens is not None
            target.index_copy_(1, self.strip.tokens, copy.to(target.dtype))

    def add_sums(self) -> None:
        """Add the key-side sums; strips that share keys must not do so at once."""
        for target, copy in self._sums:
            target.add_(copy)

    def blocks(self) -> Iterator[Block]:
        """The row tiles, each with its key run in pieces of at most BLOCK_SCORES scores."""
        step, tiles = self.strip.plan.step, self.strip.tiles
        first_key = min((t.k.start for t in tiles if t.k), default=0)
        for tile in tiles:
            start = (tile.q.start - tiles[0].q.start) // step * self.row_width
            rows = {name: x.narrow(1, start, len(tile.q) * self.row_width) for name, x in self.rows.items()}
            first, columns = (tile.k.start - first_key) // step * self.key_width, len(tile.k) * self.key_width
            parts = self.strip.plan.parts((tile, *self.strip.rest), self.rules)
            most = max(BLOCK_SCORES // (len(self.strip.heads) * len(tile.q) * self.row_width), 1)
            count = -(-columns // most)
            cuts = [columns * i // count for i in range(count + 1)] if count else []
            yield Block(rows, [self._piece(tile, parts, first, a, b) for a, b in itertools.pairwise(cuts)])

    def _piece(self, tile: AxisTile, parts: list[Part], first: int, a: int, b: int) -> Piece:
        """Columns [a, b) of the tile's key run, which begins at row `first` of the strip's keys."""
        run = {name: x.narrow(1, first + a, b - a) for name, x in self.keys.items()}
        place = self._place(tile, a, b) if self.rules.places else None
        return Piece(run["k"], run["v"], _clip(parts, a, b), place, run.get("dk"), run.get("dv"))

    def _place(self, tile: AxisTile, a: int, b: int) -> Place:
        shape = (self.strip.heads, self.strip.rest, tile.q.start % tile.q.step, tile.k.start - tile.q.start, len(tile.q), a, b)
        return Place(partial(self._where, tile, a, b), shape if self.strip.plan.tokens is None else None)

    def _where(self, tile: AxisTile, a: int, b: int) -> Where:
        device, query_heads = self.rules.like.device, self.operands.heads[0]
        h = torch.arange(self.strip.heads.start, self.strip.heads.stop, device=device)[:, None, None]
        tiles = (tile, *self.strip.rest)
        q = flat_tokens([t.q for t in tiles], self.strip.plan.grid, device)
        q = (q if self.strip.plan.tokens is None else self.strip.plan.tokens[q])[:, None]
        k = flat_tokens([t.k for t in tiles], self.strip.plan.key_grid, device)[a:b]
        return Where(h // query_heads, h % query_heads, q, k)


def _clip(parts: list[Part], a: int, b: int) -> list[Part]:
    """The parts within columns [a, b), relative to a."""
    return [
        Part(max(p.start, a) - a, min(p.stop, b) - a, p.ceiling[:, max(a - p.start, 0) : b - p.start])
        for p in parts
        if p.start < b and p.stop > a
    ]


def split_tokens(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[heads, tokens, width] -> [heads, *sizes, width], a view."""
    return x.view(x.shape[0], *sizes, x.shape[-1])


def _slice(r: range) -> slice:
    return slice(r.start, r.stop, r.step)


def flat_tokens(ranges: Sequence[range], grid: Sequence[int], device: torch.device) -> Tensor:
    """Flat indices of a box of a row-major grid."""
    flat = torch.zeros((), dtype=torch.int64, device=device)
    for r, length in zip(ranges, grid, strict=True):
        flat = (flat * length)[..., None] + torch.arange(r.start, r.stop, r.step, device=device)
    return flat.flatten()
