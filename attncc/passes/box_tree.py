"""Classification of tiles for masks that are no product of bands: boxes of tiles are split until intervals decide them.

A box of (query tile, key tile) pairs is full where the predicate's interval says "surely true", empty where it says "not possibly
true", and is halved otherwise, all boxes of a level at once. Single tiles left over are partial as soon as two samples disagree; only
the rest is evaluated element by element, in chunks, within a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from attncc.ir.expr import Expr, var
from attncc.ir.intervals import interval
from attncc.ir.values import evaluate, evaluate_all, range_tables
from attncc.passes.tiles import Tiling, class_lengths

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
CHUNK = 1 << 21
"""Elements of a mask evaluated at once."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of tiles: `low` and `high` (inclusive) `[n, 2 * rank]`, query axes first; `owner` indexes (b, h, class)."""

    low: Ints
    high: Ints
    owner: Ints

    def __getitem__(self, chosen: Any) -> Boxes:
        return Boxes(self.low[chosen], self.high[chosen], self.owner[chosen])

    def __len__(self) -> int:
        return len(self.owner)

    def sizes(self) -> Ints:
        """Tiles in each box."""
        return np.asarray((self.high - self.low + 1).prod(axis=1), dtype=np.int64)

    def chunks(self, step: int) -> Iterator[Boxes]:
        """The boxes, `step` at a time (at least one)."""
        for begin in range(0, len(self), max(1, step)):
            yield self[begin : begin + max(1, step)]


@dataclass(frozen=True)
class Classified:
    """Full boxes, partial single tiles, and whether every tile was decided exactly."""

    full: Boxes
    partial: Boxes
    exact: bool


class TileClassifier:
    """One mask, one tiling, one set of run-time tables."""

    def __init__(self, tiling: Tiling, batch: int, heads: int, tables: Mapping[str, Any]) -> None:
        self.tiling, self.mask = tiling, tiling.mask
        self.owners = list(product(range(batch), range(heads), tiling.residues()))
        self.given = tables

    @cached_property
    def bounds(self) -> list[Expr]:
        """(surely, possibly) over a box of coordinates."""
        return [
            *interval(
                self.mask.predicate, {f"{s}{a}": (var(f"{s}{a}.lo"), var(f"{s}{a}.hi")) for s in "qk" for a in range(self.tiling.rank)}
            )
        ]

    @cached_property
    def tables(self) -> dict[str, Any]:
        """Tables and the ranges of them that the bounds read."""
        return range_tables(self.bounds, self.given) if self.given else {}

    @cached_property
    def columns(self) -> dict[str, Ints]:
        """What every owner is: batch element, head, residue and lengths of its class."""
        rank = self.tiling.rank
        names = ["b", "h", *(f"r{a}" for a in range(rank)), *(f"len{a}" for a in range(rank))]
        rows = [(b, h, *r, *class_lengths(self.mask.query, self.mask.order, r)) for b, h, r in self.owners]
        return {name: np.array(column, dtype=np.int64) for name, column in zip(names, zip(*rows))}

    def classify(self, budget: int = 1 << 30) -> Classified:
        """Every non-empty tile; at most `budget` mask elements are evaluated one by one, what is left then counts as partial."""
        full, single = descend(self._roots(), self._decide)
        partial, more_full, exact = self._resolve(single, budget)
        return Classified(joined([full, more_full]), partial, exact)

    def _roots(self) -> Boxes:
        """All tiles of every owner; a class shorter than the longest has fewer query tiles, or none."""
        n = len(self.owners)
        counts = [-(-self.columns[f"len{a}"] // side) for a, side in enumerate(self.tiling.q_tile)]
        counts += [np.full(n, count) for count in self.tiling.k_tiles]
        high = np.stack(counts, axis=1) - 1
        roots = Boxes(np.zeros_like(high), high, np.arange(n))
        return roots[(high >= 0).all(axis=1)]

    def _corners(self, boxes: Boxes) -> tuple[Ints, Ints]:
        """First and last coordinates of boxes; queries end with their class (rows beyond the grid never matter), keys do not."""
        tile = np.array((*self.tiling.q_tile, *self.tiling.k_tile))
        low, high = boxes.low * tile, (boxes.high + 1) * tile - 1
        for a in range(self.tiling.rank):
            high[:, a] = np.minimum(high[:, a], self.columns[f"len{a}"][boxes.owner] - 1)
        return low, high

    def _env(self, owner: Ints) -> dict[str, Any]:
        return {**self.tables, **{name: column[owner] for name, column in self.columns.items()}}

    def _decide(self, boxes: Boxes) -> tuple[Bools, Bools]:
        low, high = self._corners(boxes)
        env = self._env(boxes.owner)
        for i, name in enumerate(self._names()):
            env[f"{name}.lo"], env[f"{name}.hi"] = low[:, i], high[:, i]
        surely, possibly = (np.broadcast_to(x, (len(boxes),)) for x in evaluate_all(self.bounds, env))
        return surely, possibly

    def _names(self) -> list[str]:
        return [f"{side}{a}" for side in "qk" for a in range(self.tiling.rank)]

    def _resolve(self, tiles: Boxes, budget: int) -> tuple[Boxes, Boxes, bool]:
        """Partial tiles, full tiles, exactness, of single tiles that intervals left open."""
        some, every = self._sampled(tiles)
        open_ = ~(some & ~every)
        left = tiles[open_]
        affordable = budget // (prod(self.tiling.q_tile) * prod(self.tiling.k_tile))
        exact = left[:affordable]
        any_true, all_true, _ = self.evaluate(exact)
        partial = joined([tiles[~open_], exact[any_true & ~all_true], left[affordable:]])
        return partial, exact[all_true], len(left) <= affordable

    def _sampled(self, tiles: Boxes) -> tuple[Bools, Bools]:
        low, high = self._corners(tiles)
        some, every = np.zeros(len(tiles), bool), np.ones(len(tiles), bool)
        sides = [tuple(ends) for ends in product((0, 2), repeat=low.shape[1])] + [(1,) * low.shape[1]]
        env = self._env(tiles.owner)
        for ends in sides:
            for i, (name, end) in enumerate(zip(self._names(), ends)):
                env[name] = low[:, i] + (high[:, i] - low[:, i]) * end // 2
            value = np.broadcast_to(evaluate(self.mask.predicate, env), (len(tiles),))
            some, every = some | value, every & value
        return some, every

    def evaluate(self, tiles: Boxes) -> tuple[Bools, Bools, Ints]:
        """(any, all, count) of the predicate over every single tile, element by element; rows beyond the grid do not count."""
        results = [(np.zeros(0, bool), np.zeros(0, bool), np.zeros(0, np.int64))]
        results += [self._evaluated(chunk) for chunk in tiles.chunks(CHUNK // (prod(self.tiling.q_tile) * prod(self.tiling.k_tile)))]
        some, every, count = (np.concatenate(column) for column in zip(*results))
        return some, every, count

    def _evaluated(self, tiles: Boxes) -> tuple[Bools, Bools, Ints]:
        rank, n = self.tiling.rank, len(tiles)
        sizes = (*self.tiling.q_tile, *self.tiling.k_tile)
        env = {name: c.reshape(n, *[1] * len(sizes)) for name, c in self._env(tiles.owner).items() if name in self.columns}
        on_grid: Any = np.ones((n, *[1] * len(sizes)), bool)
        for i, (name, size) in enumerate(zip(self._names(), sizes)):
            offset = np.arange(size).reshape([-1 if j == i else 1 for j in range(len(sizes))])
            env[name] = (tiles.low[:, i] * size).reshape(n, *[1] * len(sizes)) + offset
            if i < rank:
                on_grid = on_grid & (env[name] < env[f"len{i}"])
        value = evaluate(self.mask.predicate, {**self.given, **env})
        shape = (n, *sizes)
        value, on_grid = (np.broadcast_to(x, shape).reshape(n, -1) for x in (value, on_grid))
        inside = value & on_grid
        return inside.any(axis=1), (value | ~on_grid).all(axis=1), inside.sum(axis=1)


def descend(boxes: Boxes, decide: Callable[[Boxes], tuple[Bools, Bools]]) -> tuple[Boxes, Boxes]:
    """Full boxes, and the single tiles left open; `decide` says (surely, possibly) of boxes, which are halved until it knows."""
    full, single = [boxes[:0]], [boxes[:0]]
    while len(boxes):
        surely, possibly = decide(boxes)
        full.append(boxes[surely])
        boxes = boxes[possibly & ~surely]
        ones = boxes.sizes() == 1
        single.append(boxes[ones])
        boxes = _halved(boxes[~ones])
    return joined(full), joined(single)


def _halved(boxes: Boxes) -> Boxes:
    """Every box cut in two along its longest side."""
    if not len(boxes):
        return boxes
    axis = (boxes.high - boxes.low).argmax(axis=1)
    row = np.arange(len(boxes))
    middle = (boxes.low[row, axis] + boxes.high[row, axis]) // 2
    left_high, right_low = boxes.high.copy(), boxes.low.copy()
    left_high[row, axis], right_low[row, axis] = middle, middle + 1
    return joined([Boxes(boxes.low, left_high, boxes.owner), Boxes(right_low, boxes.high, boxes.owner)])


def joined(parts: list[Boxes]) -> Boxes:
    return Boxes(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("low", "high", "owner")))
