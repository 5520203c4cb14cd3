"""Masks made of masks: conjunction, union, complement, one for each group of heads, one within each document."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Table, all_of, load, substitute, tables, var
from attncc.spec.masks.base import TABLE_NAME, Pattern, Reach, any_of
from attncc.spec.masks.labels import BlockTable, Segments
from attncc.spec.masks.text import Predicate
from attncc.spec.masks.tokens import Causal, CausalAxes, Full, GlobalTokens, Prefix, PrefixPerSample, Sinks, SlidingWindow, StridedBlocks
from attncc.spec.masks.windows import Axial, Congruence, Disc, Halo, Neighborhood, Partition, Window
from attncc.spec.model import Grid


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
    | Documents,
    Field(discriminator="kind"),
]
for _model in (And, Or, Not, PerHead, Documents):
    _model.model_rebuild()
