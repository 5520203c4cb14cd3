"""Masks: which keys a query may see. Each is data with one formula; combine them with `&`, `|` and `~`.

The formula speaks of the query's and the key's coordinates (`attncc.spec.model.Grid`); everything else, from block sparsity to the
code in the kernel, follows from it. `Causal`, `SlidingWindow`, `Prefix` and `Sinks` act on the flattened token index.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from attncc.ir.expr import Expr, Kind, Op, Table, all_of, const, load, maximum, minimum, nodes, var
from attncc.ir.text import INTEGER_CALLS, parse
from attncc.spec.model import Grid, Part

Align = Literal["top_left", "bottom_right"]
PerAxis = int | tuple[int, ...]


class _Combinable(Part):
    def __and__(self, other: Mask) -> And:
        return And(masks=(*_terms(self, And), *_terms(other, And)))

    def __or__(self, other: Mask) -> Or:
        return Or(masks=(*_terms(self, Or), *_terms(other, Or)))

    def __invert__(self) -> Not:
        return Not(mask=self)  # type: ignore[arg-type]

    def problems(self, grid: Grid) -> list[str]:
        """What contradicts the grid, one sentence each."""
        return []

    def predicate(self, grid: Grid) -> Expr:
        """True where the query sees the key."""
        raise NotImplementedError


def _terms(mask: Any, kind: type[Any]) -> tuple[Any, ...]:
    return tuple(mask.masks) if isinstance(mask, kind) else (mask,)


class Full(_Combinable):
    """Every query sees every key."""

    kind: Literal["full"] = "full"

    def predicate(self, grid: Grid) -> Expr:
        return const(True)


class Causal(_Combinable):
    """Keys up to the query: k <= q (`top_left`, as PyTorch's SDPA), or k <= q + Nk - Nq (`bottom_right`, as FlashAttention)."""

    kind: Literal["causal"] = "causal"
    align: Align = "top_left"

    def predicate(self, grid: Grid) -> Expr:
        return grid.flat("k") <= _diagonal(grid, self.align)


class SlidingWindow(_Combinable):
    """Keys from `left` before the query to `right` after it, both ends inclusive; None leaves a side open."""

    kind: Literal["sliding_window"] = "sliding_window"
    left: Annotated[int, Field(ge=0)] | None = None
    right: Annotated[int, Field(ge=0)] | None = None
    align: Align = "top_left"

    def predicate(self, grid: Grid) -> Expr:
        key, diagonal = grid.flat("k"), _diagonal(grid, self.align)
        sides = [] if self.left is None else [diagonal - self.left <= key]
        return all_of(sides if self.right is None else [*sides, key <= diagonal + self.right])

    def problems(self, grid: Grid) -> list[str]:
        known = [n for n in grid.key if n is not None]
        total = _product(known) if len(known) == grid.rank else None
        sides = (("left", self.left), ("right", self.right))
        return [f"{name}={size} reaches past {total} tokens" for name, size in sides if total and size is not None and size > total]


class Neighborhood(_Combinable):
    """Generalized neighborhood attention: on each axis the `window` keys nearest the query, shifted inward at the edges.

    Queries in a group of `stride` share the window of the group's leader; `dilation` attends within a residue class; a `causal` axis
    sees the window's part up to the query. Every parameter is one number for all axes or one for each.

    Source: Hassani et al., Generalized Neighborhood Attention, arXiv 2504.16922; edge cases as NATTEN computes them.
    """

    kind: Literal["neighborhood"] = "neighborhood"
    window: PerAxis
    stride: PerAxis = 1
    dilation: PerAxis = 1
    causal: bool | tuple[bool, ...] = False

    def axes(self, rank: int) -> list[tuple[int, int, int, bool]]:
        """(window, stride, dilation, causal) of every axis."""
        fields = (self.window, self.stride, self.dilation, self.causal)
        columns = [f if isinstance(f, tuple) else (f,) * rank for f in fields]
        return list(zip(*columns))

    def problems(self, grid: Grid) -> list[str]:
        for name in ("window", "stride", "dilation", "causal"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != grid.rank:
                return [f"{name} has {len(value)} axes, tokens have {grid.rank}"]
        found = [] if grid.shared else ["needs key_tokens to be left out: queries and keys share one grid"]
        for axis, (window, stride, dilation, _) in enumerate(self.axes(grid.rank)):
            length = grid.key[axis]
            if min(window, stride, dilation) < 1:
                found.append(f"window, stride and dilation of axis {axis} must be at least 1")
            elif stride > window:
                found.append(f"stride {stride} exceeds window {window} on axis {axis}")
            elif length is not None and window * dilation > length:
                found.append(f"window {window} x dilation {dilation} exceeds the {length} tokens of axis {axis}")
        return found

    def predicate(self, grid: Grid) -> Expr:
        return all_of([neighborhood_axis(grid, axis, *rule) for axis, rule in enumerate(self.axes(grid.rank))])


def neighborhood_axis(grid: Grid, axis: int, window: int | Expr, stride: int | Expr, dilation: int, causal: bool) -> Expr:
    """One axis of a neighborhood, on positions i and j within a residue class.

    Classes differ in length when the dilation does not divide the axis.
    """
    query, key = grid.coordinate("q", axis), grid.coordinate("k", axis)
    i, j, residue = query // dilation, key // dilation, query % dilation
    length = (grid.length("k", axis) - residue + (dilation - 1)) // dilation
    same = (key % dilation).equals(residue)
    group = i // stride * stride
    if causal:
        leader = minimum(group + (stride - 1), length - 1)
        return same & (maximum(leader - (window - 1), 0) <= j) & (j <= i)
    leader = minimum(group + stride // 2, length - 1)
    start = minimum(maximum(leader - window // 2, 0), length - window)
    return same & (start <= j) & (j < start + window)


class Segments(_Combinable):
    """Tokens with equal labels see each other: packed documents, padding, regions.

    `ids` names a run-time integer table `[B, Nq]`; `key_ids` one `[B, Nk]` for the keys (default: the same table).
    """

    kind: Literal["segments"] = "segments"
    ids: str = Field(default="segments", pattern=r"^[a-z][a-z0-9_]*$")
    key_ids: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]*$")

    def problems(self, grid: Grid) -> list[str]:
        return [] if self.key_ids or grid.shared else ["key_ids is needed where keys have a grid of their own (key_tokens)"]

    def predicate(self, grid: Grid) -> Expr:
        queries = Table(self.ids, Kind.INT, ("B", "NQ"))
        keys = Table(self.key_ids, Kind.INT, ("B", "NK")) if self.key_ids else queries
        return load(queries, var("b"), grid.flat("q")).equals(load(keys, var("b"), grid.flat("k")))


class Prefix(_Combinable):
    """Every query sees the first `length` keys; `Causal() | Prefix(length=n)` is the prefix language model's mask."""

    kind: Literal["prefix"] = "prefix"
    length: int = Field(ge=0)

    def predicate(self, grid: Grid) -> Expr:
        return grid.flat("k") < self.length

    def problems(self, grid: Grid) -> list[str]:
        return _too_long("length", self.length, grid)


class Sinks(_Combinable):
    """Every query sees the first `count` keys: attention sinks, to be joined to a window by `|` (StreamingLLM, arXiv 2309.17453)."""

    kind: Literal["sinks"] = "sinks"
    count: int = Field(ge=0)

    def predicate(self, grid: Grid) -> Expr:
        return grid.flat("k") < self.count

    def problems(self, grid: Grid) -> list[str]:
        return _too_long("count", self.count, grid)


class Predicate(_Combinable):
    """A mask written as text over `b h q k`, the coordinates `q0 k0 q1 ..` and the lengths `nq nk nq0 nk0 ..`.

    Integers, `+ - * // %`, comparisons, `and or not`, `abs min max`; `name[b, k]` reads a run-time integer table whose shape its
    indices say: b is the batch, h the query head, q and k tokens. `//` and `%` round toward minus infinity, as in Python.
    """

    kind: Literal["predicate"] = "predicate"
    text: str

    @field_validator("text")
    @classmethod
    def _parses(cls, text: str) -> str:
        for rank in (1, 2, 3):
            grid = Grid((None,) * rank, (None,) * rank)
            try:
                _parse_predicate(text, grid)
                return text
            except ValueError:
                if rank == 3:
                    raise
        return text

    def problems(self, grid: Grid) -> list[str]:
        try:
            _parse_predicate(self.text, grid)
            return []
        except ValueError as error:
            return [str(error)]

    def predicate(self, grid: Grid) -> Expr:
        return _parse_predicate(self.text, grid)


def _parse_predicate(text: str, grid: Grid) -> Expr:
    names = {"b": var("b"), "h": var("h")}
    dims: dict[Expr, str] = {names["b"]: "B", names["h"]: "H"}
    for side in "qk":
        names[side], names[f"n{side}"] = grid.flat(side), grid.tokens(side)
        # Self-attention has one token axis: `doc[b, q] == doc[b, k]` reads one table.
        dims[names[side]] = "NQ" if grid.shared else f"N{side.upper()}"
        for axis in range(grid.rank):
            names[f"{side}{axis}"], names[f"n{side}{axis}"] = grid.coordinate(side, axis), grid.length(side, axis)

    def read(name: str, index: tuple[Expr, ...]) -> Expr:
        unknown = [i for i in index if i not in dims]
        if unknown or len(set(index)) < len(index) or name in names:
            raise ValueError(f"table {name!r} must be indexed by b, h, q and k alone, each at most once")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"table {name!r} must have a name of small letters, digits and underscores")
        return load(Table(name, Kind.INT, tuple(dims[i] for i in index)), *index)

    mask = parse(text, names, read, INTEGER_CALLS)
    if mask.kind is not Kind.BOOL:
        raise ValueError(f"a predicate must be true or false, this one is {mask.kind.value}")
    for n in nodes(mask):
        _check_number(n)
    return mask


def _check_number(n: Expr) -> None:
    """Holds one node of a predicate to what kernels compute with: 32-bit integers, divided by something."""
    if n.kind is Kind.FLOAT:
        raise ValueError(f"{n!r} is no integer; // divides integers")
    if n.op is Op.CONST and abs(int(n.value)) > 2**31 - 1:
        raise ValueError("a number is no 32-bit integer")
    if n.op in (Op.FLOORDIV, Op.MOD) and n.args[1] is const(0):
        raise ValueError("division by zero")


class And(_Combinable):
    """Keys that all of `masks` allow."""

    kind: Literal["and"] = "and"
    masks: tuple[Mask, ...] = Field(min_length=1)

    def predicate(self, grid: Grid) -> Expr:
        return all_of([m.predicate(grid) for m in self.masks])

    def problems(self, grid: Grid) -> list[str]:
        return [p for m in self.masks for p in m.problems(grid)]


class Or(_Combinable):
    """Keys that any of `masks` allows."""

    kind: Literal["or"] = "or"
    masks: tuple[Mask, ...] = Field(min_length=1)

    def predicate(self, grid: Grid) -> Expr:
        return ~all_of([~m.predicate(grid) for m in self.masks])

    def problems(self, grid: Grid) -> list[str]:
        return [p for m in self.masks for p in m.problems(grid)]


class Not(_Combinable):
    """Keys that `mask` forbids."""

    kind: Literal["not"] = "not"
    mask: Mask

    def predicate(self, grid: Grid) -> Expr:
        return ~self.mask.predicate(grid)

    def problems(self, grid: Grid) -> list[str]:
        return self.mask.problems(grid)


Mask = Annotated[
    Full | Causal | SlidingWindow | Neighborhood | Segments | Prefix | Sinks | Predicate | And | Or | Not,
    Field(discriminator="kind"),
]
for _model in (And, Or, Not):
    _model.model_rebuild()


def _diagonal(grid: Grid, align: Align) -> Expr:
    query = grid.flat("q")
    return query + grid.offset if align == "bottom_right" else query


def _too_long(name: str, size: int, grid: Grid) -> list[str]:
    known = [n for n in grid.key if n is not None]
    total = _product(known)
    return [f"{name} {size} exceeds the {total} key tokens"] if len(known) == grid.rank and size > total else []


def _product(values: list[int]) -> int:
    total = 1
    for value in values:
        total *= value
    return total
