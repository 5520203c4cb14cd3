"""The block mask of the flattened token order: blocks of consecutive tokens, whatever the grid. It is what FlexAttention wants.

A block of an N-D grid is no box, but a few of them: part of a row, whole rows, whole planes, .. . A pair of blocks is classified by its
pairs of boxes. Where the mask is a product of relations on each axis (neighborhoods, dilated and causal ones too) counts of allowed
pairs decide every box exactly, in constant time; elsewhere intervals do, and what they leave open is sampled, then evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any, Protocol

import numpy as np

from attncc.ir.expr import Expr, const, tables, var, variables
from attncc.ir.intervals import interval
from attncc.ir.values import evaluate, evaluate_all, range_tables
from attncc.passes.block_mask import BlockMask
from attncc.passes.box_tree import CHUNK, Bools, Boxes, Classified, Ints, descend, joined
from attncc.passes.order import conjuncts
from attncc.passes.tiles import BoundMask, Shape, Tiling

Run = tuple[Ints, Ints, Bools]  # first token, token behind the last, whether the grid ends inside
Corners = tuple[list[Ints], list[Ints]]  # first and last coordinate on each axis
LONGEST = 4096
"""Longest axis whose relation is held as a matrix of counts."""
LATTICE = 12
"""Samples on each side of a pair of blocks."""


def flat_block_mask(
    predicate: Expr, query: Shape, key: Shape, block: tuple[int, int], tables: Mapping[str, Any], batch: int, heads: int
) -> BlockMask:
    """Classifies blocks of consecutive tokens.

    Args:
        predicate: over the coordinates of query and key, lengths filled in.
        query, key: tokens by axis.
        block: tokens of a query block and of a key block.
        tables: run-time tables by name.
        batch, heads: how many the mask is evaluated for, where it depends on them.
    """
    batch, heads = (n if name in variables(predicate) else 1 for name, n in (("b", batch), ("h", heads)))
    flat = BoundMask(((const(0), const(0)),), predicate, (prod(query),), (prod(key),), (1,))
    tiling = Tiling(flat, block[:1], block[1:])
    relations = axis_relations(predicate, query, key)
    decider = Counts(relations) if relations is not None else Intervals(predicate, len(query), tables, batch, heads)
    found = Blocks(tiling, query, key, decider, batch * heads).classify()
    return BlockMask(tiling, batch, heads, found.exact, None, found)


# ---- deciding boxes ------------------------------------------------------------------------------------------------------------


class Decider(Protocol):
    """Says of boxes of queries and keys whether all, and whether any, of their pairs are allowed."""

    exact: bool  # whether "possibly any" means any

    def boxes(self, owner: Ints, query: Corners, key: Corners) -> tuple[Bools, Bools]:
        """(surely all, possibly any)."""
        ...

    def pairs(self, owner: Ints, query: list[Ints], key: list[Ints]) -> Bools:
        """Whether pairs of tokens, given by coordinates that broadcast, are allowed; `owner` is [n], coordinates are [n, .., ..]."""
        ...


def axis_relations(predicate: Expr, query: Shape, key: Shape) -> list[Bools] | None:
    """One matrix [queries, keys] an axis, whose product the mask is; None where it is no such product."""
    terms: list[list[Expr]] = [[] for _ in query]
    for term in conjuncts(predicate):
        axes = [a for a in range(len(query)) if variables(term) <= {f"q{a}", f"k{a}"}]
        if not axes or tables(term) or any(n > LONGEST for n in (*query, *key)):
            return None
        terms[axes[0]].append(term)
    return [_relation(axis, found, n, m) for axis, (found, n, m) in enumerate(zip(terms, query, key))]


def _relation(axis: int, terms: list[Expr], queries: int, keys: int) -> Bools:
    env = {f"q{axis}": np.arange(queries)[:, None], f"k{axis}": np.arange(keys)}
    allowed = np.ones((queries, keys), bool)
    for term in terms:
        allowed &= evaluate(term, env)
    return allowed


class Counts:
    """Decides by counts of allowed pairs on each axis, from sums over all leading rectangles: exact."""

    exact = True

    def __init__(self, relations: list[Bools]) -> None:
        self.relations = relations
        self.sums = [np.pad(r.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0))) for r in relations]

    def boxes(self, owner: Ints, query: Corners, key: Corners) -> tuple[Bools, Bools]:
        """(all, any), exactly."""
        surely, possibly = np.ones(len(owner), bool), np.ones(len(owner), bool)
        for sums, q0, q1, k0, k1 in zip(self.sums, *query, *key):
            count = sums[q1 + 1, k1 + 1] - sums[q0, k1 + 1] - sums[q1 + 1, k0] + sums[q0, k0]
            surely &= count == (q1 - q0 + 1) * (k1 - k0 + 1)
            possibly &= count > 0
        return surely, possibly

    def pairs(self, owner: Ints, query: list[Ints], key: list[Ints]) -> Bools:
        """Whether pairs are allowed."""
        allowed: Bools = np.logical_and.reduce([r[q, k] for r, q, k in zip(self.relations, query, key)])
        return allowed


class Intervals:
    """Decides by intervals of the predicate: sound, and open where they overlap."""

    exact = False

    def __init__(self, predicate: Expr, rank: int, tables: Mapping[str, Any], batch: int, heads: int) -> None:
        self.predicate, self.rank = predicate, rank
        owners = np.array(list(product(range(batch), range(heads))), dtype=np.int64)
        self.owners = {"b": owners[:, 0], "h": owners[:, 1]}
        box = {f"{s}{a}": (var(f"{s}{a}.lo"), var(f"{s}{a}.hi")) for s in "qk" for a in range(rank)}
        self.surely, self.possibly = interval(predicate, box)
        self.tables = range_tables([self.surely, self.possibly], tables) if tables else {}

    def boxes(self, owner: Ints, query: Corners, key: Corners) -> tuple[Bools, Bools]:
        """(surely all, possibly any)."""
        env: dict[str, Any] = {**self.tables, **{name: column[owner] for name, column in self.owners.items()}}
        for side, corners in (("q", query), ("k", key)):
            for end, axes in zip(("lo", "hi"), corners):
                env |= {f"{side}{a}.{end}": x for a, x in enumerate(axes)}
        surely, possibly = (np.broadcast_to(x, owner.shape) for x in evaluate_all([self.surely, self.possibly], env))
        return surely, possibly

    def pairs(self, owner: Ints, query: list[Ints], key: list[Ints]) -> Bools:
        """Whether pairs are allowed."""
        env: dict[str, Any] = {**self.tables, **{name: column[owner][:, None, None] for name, column in self.owners.items()}}
        env |= {f"{side}{a}": x for side, axes in (("q", query), ("k", key)) for a, x in enumerate(axes)}
        shape = np.broadcast_shapes((len(owner), 1, 1), *(x.shape for x in (*query, *key)))
        return np.broadcast_to(evaluate(self.predicate, env), shape)


# ---- blocks --------------------------------------------------------------------------------------------------------------------


class Blocks:
    """Blocks of one mask; `Boxes` here have two columns: query block and key block."""

    def __init__(self, tiling: Tiling, query: Shape, key: Shape, decider: Decider, owners: int) -> None:
        self.tiling, self.grids, self.decider, self.owners = tiling, (query, key), decider, owners
        self.sides = (*tiling.q_tile, *tiling.k_tile)

    def classify(self, budget: int = 1 << 30) -> Classified:
        """Every non-empty block; at most `budget` pairs are evaluated one by one, blocks left then count as partial."""
        low = np.zeros((self.owners, 2), np.int64)
        roots = Boxes(low, low + (np.array([*self.tiling.q_tiles, *self.tiling.k_tiles]) - 1), np.arange(self.owners))
        full, single = descend(roots, self._around)
        decided = [self._decided(chunk) for chunk in single.chunks(CHUNK // LATTICE**2)]
        every, partial, left = (joined([single[:0], *(parts[i] for parts in decided)]) for i in range(3))
        affordable = budget // prod(self.sides)
        any_true, all_true = self._evaluated(left[:affordable])
        mixed = left[:affordable][any_true & ~all_true]
        full, partial = joined([full, every, left[:affordable][all_true]]), joined([partial, mixed, left[affordable:]])
        return Classified(full, partial, len(left) <= affordable)

    def _runs(self, boxes: Boxes) -> tuple[Run, Run]:
        """Tokens of every box, of queries and of keys."""
        runs: list[Run] = []
        for i, (side, grid) in enumerate(zip(self.sides, self.grids)):
            total, stop = prod(grid), (boxes.high[:, i] + 1) * side
            runs.append((boxes.low[:, i] * side, np.minimum(stop, total), stop > total))
        return runs[0], runs[1]

    def _around(self, boxes: Boxes) -> tuple[Bools, Bools]:
        """(surely, possibly) by the box around the tokens of each side; a key block that the grid does not fill is never full."""
        query, key = self._runs(boxes)
        surely, possibly = self.decider.boxes(boxes.owner, *(_bounding(r[0], r[1], g) for r, g in zip((query, key), self.grids)))
        return surely & ~key[2], possibly

    def _decided(self, blocks: Boxes) -> tuple[Boxes, Boxes, Boxes]:
        """Full ones, partial ones, and those still undecided, of single blocks."""
        query, key = self._runs(blocks)
        every, none, some, missing = self._by_pieces(blocks, query, key)
        every &= ~key[2]
        partial = some & (missing | key[2])
        open_ = ~(every | none | partial)
        partial[open_] = self._sampled(blocks[open_])
        return blocks[every], blocks[partial], blocks[open_ & ~partial]

    def _by_pieces(self, blocks: Boxes, query: Run, key: Run) -> tuple[Bools, Bools, Bools, Bools]:
        """(all allowed, none allowed, surely some allowed, surely some not) by pairs of boxes."""
        n = len(blocks)
        every, none, some, missing = np.ones(n, bool), np.ones(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        pieces = [list(_pieces(r[0], r[1], grid)) for r, grid in zip((query, key), self.grids)]
        for (q_first, q_stop), (k_first, k_stop) in product(*pieces):
            at = np.flatnonzero((q_stop > q_first) & (k_stop > k_first))
            corners = (_bounding(f[at], s[at], g) for f, s, g in ((q_first, q_stop, self.grids[0]), (k_first, k_stop, self.grids[1])))
            surely, possibly = self.decider.boxes(blocks.owner[at], *corners)
            every[at] &= surely
            none[at] &= ~possibly
            some[at] |= possibly if self.decider.exact else surely
            missing[at] |= ~surely if self.decider.exact else ~possibly
        return every, none, some, missing

    def _sampled(self, blocks: Boxes) -> Bools:
        """Whether a lattice of pairs has an allowed one and another."""
        lattice = np.linspace(0.0, 1.0, LATTICE)
        ends = [(first, stop) for first, stop, _ in self._runs(blocks)]
        tokens = [(first[:, None] + (stop - 1 - first)[:, None] * lattice).astype(np.int64) for first, stop in ends]
        value = self._pairs(blocks, tokens)
        return np.asarray(value.any(axis=(1, 2)) & ~value.all(axis=(1, 2)))

    def _evaluated(self, blocks: Boxes) -> tuple[Bools, Bools]:
        """(any, all) over every pair of blocks; missing keys are not allowed, missing queries do not count."""
        results: list[tuple[Any, Any]] = [(np.zeros(0, bool), np.zeros(0, bool))]
        for chunk in blocks.chunks(CHUNK // prod(self.sides)):
            (q_first, q_stop, _), (k_first, k_stop, missing) = self._runs(chunk)
            tokens = [
                np.minimum(first[:, None] + np.arange(side), stop[:, None] - 1)
                for first, stop, side in ((q_first, q_stop, self.sides[0]), (k_first, k_stop, self.sides[1]))
            ]
            value = self._pairs(chunk, tokens)
            results.append((value.any(axis=(1, 2)), value.all(axis=(1, 2)) & ~missing))
        some, every = (np.concatenate(column) for column in zip(*results))
        return some, every

    def _pairs(self, blocks: Boxes, tokens: list[Ints]) -> Bools:
        query = [x[:, :, None] for x in _coordinates(tokens[0], self.grids[0])]
        key = [x[:, None, :] for x in _coordinates(tokens[1], self.grids[1])]
        return self.decider.pairs(blocks.owner, query, key)


# ---- runs of tokens ------------------------------------------------------------------------------------------------------------


def _coordinates(tokens: Ints, grid: Shape) -> list[Ints]:
    found = []
    for n in reversed(grid):
        found.append(tokens % n)
        tokens = tokens // n
    return found[::-1]


def _bounding(first: Ints, stop: Ints, grid: Shape) -> Corners:
    """The least box of the grid around runs of tokens: behind the first axis on which its ends differ, every token."""
    low, high = _coordinates(first, grid), _coordinates(stop - 1, grid)
    same = np.ones(len(first), bool)
    for a, n in enumerate(grid):
        ends = low[a].copy(), high[a].copy()
        low[a], high[a] = np.where(same, low[a], 0), np.where(same, high[a], n - 1)
        same = same & (ends[0] == ends[1])
    return low, high


def _pieces(first: Ints, stop: Ints, grid: Shape) -> Iterator[tuple[Ints, Ints]]:
    """Runs cut where rows, then planes, begin and end: every piece is a box of the grid. Pieces may be empty."""
    unit = 1
    for n in reversed(grid[1:]):
        unit *= n
        # Without such an end inside, the run is a box already and there is no middle to cut further.
        begin, end = np.minimum(-(-first // unit) * unit, stop), stop // unit * unit
        end = np.maximum(end, begin)
        yield first, begin
        yield end, stop
        first, stop = begin, end
    yield first, stop
