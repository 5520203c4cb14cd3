"""Masks made of masks: conjunction, union, complement, one for each group of heads, one within each document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, product
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Op, Table, all_of, apply, const, load, substitute, tables, var
from attncc.spec.masks.base import TABLE_NAME, Missing, Pattern, Reach, Size, any_of
from attncc.spec.masks.labels import BlockTable, Segments
from attncc.spec.masks.text import Predicate
from attncc.spec.masks.tokens import Causal, CausalAxes, Full, GlobalTokens, Prefix, PrefixPerSample, Sinks, SlidingWindow, StridedBlocks
from attncc.spec.masks.windows import Axial, Congruence, Disc, Halo, Neighborhood, Partition, Window
from attncc.spec.model import Grid

Lengths = Annotated[tuple[Size, ...], Field(min_length=1, max_length=3)]


class And(Pattern):
    """Keys that all of `masks` allow."""

    flat: ClassVar[bool] = True
    kind: Literal["and"] = "and"
    masks: tuple[Mask, ...] = Field(min_length=1)

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.masks

    def predicate(self, grid: Grid) -> Expr:
        return all_of([m.predicate(grid) for m in self.masks])

    def problems(self, grid: Grid) -> list[str]:
        return [p for m in self.masks for p in m.problems(grid)]


class Or(Pattern):
    """Keys that any of `masks` allows."""

    flat: ClassVar[bool] = True
    kind: Literal["or"] = "or"
    masks: tuple[Mask, ...] = Field(min_length=1)

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.masks

    def predicate(self, grid: Grid) -> Expr:
        return any_of([m.predicate(grid) for m in self.masks])

    def problems(self, grid: Grid) -> list[str]:
        return [p for m in self.masks for p in m.problems(grid)]


class Not(Pattern):
    """Keys that `mask` forbids."""

    flat: ClassVar[bool] = True
    kind: Literal["not"] = "not"
    mask: Mask

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.mask,)

    def predicate(self, grid: Grid) -> Expr:
        return ~self.mask.predicate(grid)

    def problems(self, grid: Grid) -> list[str]:
        return self.mask.problems(grid)


class PerHead(Pattern):
    """A mask for each group of query heads: the i-th of `masks` is that of the heads in `groups[i]`.

    Without `groups` the heads are split evenly, in order: with two masks, the first half of the heads has the first (CSWin, HiLo).
    """

    flat: ClassVar[bool] = True
    kind: Literal["per_head"] = "per_head"
    masks: tuple[Mask, ...] = Field(min_length=1)
    groups: tuple[tuple[Reach, ...], ...] | None = None

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.masks

    def problems(self, grid: Grid) -> list[str]:
        found = [p for m in self.masks for p in m.problems(grid)]
        if grid.heads is None:
            return found
        if self.groups is None:
            uneven = grid.heads % len(self.masks)
            return [*found, *([f"masks: {len(self.masks)} do not divide heads={grid.heads}; list heads in groups"] if uneven else [])]
        listed = sorted(h for group in self.groups for h in group)
        wrong = len(self.groups) != len(self.masks) or listed != list(range(grid.heads))
        return [*found, *([f"groups: list every head from 0 to {grid.heads - 1} once, one group for each mask"] if wrong else [])]

    def predicate(self, grid: Grid) -> Expr:
        return any_of([_among(group) & m.predicate(grid) for group, m in zip(self._groups(grid), self.masks)])

    def missing(self, grid: Grid) -> Missing | None:
        """Those of each head; all masks that keep any keep them by one policy."""
        found = [(group, m.missing(grid)) for group, m in zip(self._groups(grid), self.masks)]
        kept = [(group, one) for group, one in found if one is not None]
        count: Expr = const(0)
        for group, one in kept:
            count = count + apply(Op.SELECT, _among(group), one.count, 0)
        return Missing(kept[0][1].edge, count) if kept else None

    def _groups(self, grid: Grid) -> tuple[tuple[int, ...], ...]:
        if self.groups is not None:
            return self.groups
        share = (grid.heads or len(self.masks)) // len(self.masks)
        return tuple(tuple(range(i * share, (i + 1) * share)) for i in range(len(self.masks)))


def _among(heads: tuple[int, ...]) -> Expr:
    """Whether h is one of the heads, as few ranges as say so."""
    ordered = sorted(heads)
    runs = [[h for _, h in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    h = var("h")
    return any_of([h.equals(run[0]) if len(run) == 1 else (h <= run[-1]) & (h >= run[0]) for run in runs])


class Documents(Pattern):
    """`mask` within each document of a packed sequence; positions and lengths in it are the document's own.

    `starts` and `ends` name run-time integer tables `[B, Nq]`: for every query the first token of its document and the one after the last,
    as `attncc.document_tables(cu_seqlens, tokens)` makes them. Query q sees keys start <= k < end, at positions q - start and k - start.
    Keys with a grid of their own (key_tokens) have `key_starts` and `key_ends`, also `[B, Nq]`: where the keys of the query's document
    lie. Other packings are other tables, never another kernel. An empty range is a query without keys, as padding is. A neighborhood
    wider than its document sees all of it (of the query's residue class).
    """

    kind: Literal["documents"] = "documents"
    mask: Mask
    starts: str = Field(default="document_starts", pattern=TABLE_NAME)
    ends: str = Field(default="document_ends", pattern=TABLE_NAME)
    key_starts: str | None = Field(default=None, pattern=TABLE_NAME)
    key_ends: str | None = Field(default=None, pattern=TABLE_NAME)

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.mask,)

    def problems(self, grid: Grid) -> list[str]:
        if grid.rank != 1:
            return ["documents are packed on one axis of tokens"]
        if (self.key_starts is None) != grid.shared or (self.key_ends is None) != grid.shared:
            return ["key_starts and key_ends: both with key_tokens, neither without"]
        inner = Grid((None,), (None,), grid.shared, grid.heads)
        if found := self.mask.problems(inner):
            return found
        by_token = (t.name for t in tables(self.mask.predicate(inner)) if {"NQ", "NK"} & set(t.shape))
        return [f"mask: {name!r} is read by positions of the whole sequence; join it by & outside" for name in by_token]

    def predicate(self, grid: Grid) -> Expr:
        names = (self.starts, self.ends, self.key_starts or self.starts, self.key_ends or self.ends)
        start, end, first, last = (load(Table(name, Kind.INT, ("B", "NQ")), var("b"), grid.flat("q")) for name in names)
        own = {"q0": grid.flat("q") - start, "k0": grid.flat("k") - first, "nq0": end - start, "nk0": last - first}
        inner = self.mask.predicate(Grid((None,), (None,), grid.shared, grid.heads))
        return (first <= grid.flat("k")) & (grid.flat("k") < last) & substitute(inner, own)


class Concatenation(Pattern):
    """Queries and keys that are grids one after another, with a mask for each pair of grids: one softmax over all keys.

    `rules[i][j]` is the mask between the i-th grid of `queries` and the j-th of `keys` (default: the same grids), null where they do not
    see each other. It has coordinates and lengths of these two grids; where they differ in rank, of their flattened tokens. Text beside
    video (joint attention, arXiv 2403.03206), pooled keys beside local ones (TransNeXt, CLEAR), keys of reference pictures.
    """

    bounded: ClassVar[bool] = True
    kind: Literal["concatenation"] = "concatenation"
    queries: tuple[Lengths, ...] = Field(min_length=1)
    keys: tuple[Lengths, ...] | None = Field(default=None, min_length=1)
    rules: tuple[tuple[Mask | None, ...], ...] = Field(min_length=1)

    @property
    def parts(self) -> tuple[Any, ...]:
        return tuple(rule for row in self.rules for rule in row if rule is not None)

    def problems(self, grid: Grid) -> list[str]:
        keys = self.keys or self.queries
        if grid.rank != 1:
            return ["a concatenation is one axis of tokens"]
        if len(self.rules) != len(self.queries) or any(len(row) != len(keys) for row in self.rules):
            return [f"rules: give {len(self.queries)} rows of {len(keys)}, a mask or null for each pair of grids"]
        sides = (("queries", self.queries, grid.query[0], "tokens"), ("keys", keys, grid.key[0], "key_tokens"))
        sums = [(name, sum(map(prod, grids)), length, of) for name, grids, length, of in sides]
        if wrong := [f"{name}: hold {total} tokens in all, {of} are {length}" for name, total, length, of in sums if total != length]:
            return wrong
        found = [f"rules.{i}.{j}: {p}" for i, j, rule, inner in self._pairs(grid) for p in rule.problems(inner)]
        return found or [
            f"rules.{i}.{j}: {t.name!r} is read by positions of the whole sequence; join it by & outside"
            for i, j, rule, inner in self._pairs(grid)
            for t in tables(rule.predicate(inner))
            if {"NQ", "NK"} & set(t.shape)
        ]

    def predicate(self, grid: Grid) -> Expr:
        firsts = [list(accumulate(map(prod, grids), initial=0)) for grids in (self.queries, self.keys or self.queries)]
        terms = []
        for i, j, rule, inner in self._pairs(grid):
            own, inside = dict[str, Expr](), list[Expr]()
            for side, ends, at, lengths in (("q", firsts[0], i, inner.query), ("k", firsts[1], j, inner.key)):
                token, first, stop = grid.flat(side), ends[at], ends[at + 1]
                own |= _coordinates(side, token - first, [n or 1 for n in lengths])
                # The ends of the whole need no comparison.
                inside += [token >= first] if first else []
                inside += [token < stop] if stop < ends[-1] else []
            terms.append(all_of([*inside, substitute(rule.predicate(inner), own)]))
        return any_of(terms)

    def _pairs(self, grid: Grid) -> Iterator[tuple[int, int, Any, Grid]]:
        """(i, j, mask, grids) of every pair that has a mask."""
        for (i, query), (j, key) in product(enumerate(self.queries), enumerate(self.keys or self.queries)):
            rule = self.rules[i][j]
            if rule is not None:
                alike = len(query) == len(key)
                inner = Grid(query, key, query == key, grid.heads) if alike else Grid((prod(query),), (prod(key),), False, grid.heads)
                yield i, j, rule, inner


def _coordinates(side: str, token: Expr, lengths: Sequence[int]) -> dict[str, Expr]:
    """Coordinates of a token of a grid, by name."""
    found = {}
    for a, n in enumerate(lengths):
        index = token // prod(lengths[a + 1 :])
        found[f"{side}{a}"] = index % n if a else index
    return found


def table_names(mask: Mask) -> set[str]:
    """Names of tables that a call may give together, of masks that read several for each query."""
    own = {mask.starts, mask.ends, mask.key_starts, mask.key_ends} - {None} if isinstance(mask, Documents) else set()
    return {str(name) for name in own}.union(*(table_names(part) for part in mask.parts))


Mask = Annotated[
    Full
    | Causal
    | CausalAxes
    | SlidingWindow
    | Window
    | Neighborhood
    | Halo
    | Disc
    | Axial
    | Partition
    | Congruence
    | StridedBlocks
    | Segments
    | BlockTable
    | Prefix
    | PrefixPerSample
    | Sinks
    | GlobalTokens
    | Predicate
    | And
    | Or
    | Not
    | PerHead
    | Documents
    | Concatenation,
    Field(discriminator="kind"),
]
for _model in (And, Or, Not, PerHead, Documents, Concatenation):
    _model.model_rebuild()
