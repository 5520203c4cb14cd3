"""Masks written as text, in a whitelist grammar: nothing is ever evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from attncc.ir.expr import Expr, Kind, Op, Table, clamp, const, load, nodes, var
from attncc.ir.text import INTEGER_CALLS, parse
from attncc.spec.masks.base import TABLE_NAME, Pattern
from attncc.spec.model import Grid, Part


class Captured(Part):
    """A run-time table of a fixed shape that a text may index by any integers; these are clamped into it."""

    name: str = Field(pattern=TABLE_NAME)
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    kind: Literal["int", "float"] = "int"

    def read(self, index: tuple[Expr, ...]) -> Expr:
        """`name[index]`."""
        if len(index) != len(self.shape) or any(i.kind is not Kind.INT for i in index):
            raise ValueError(f"table {self.name!r} must be indexed by {len(self.shape)} integers")
        inside = (clamp(i, 0, n - 1) for i, n in zip(index, self.shape))
        return load(Table(self.name, Kind(self.kind), self.shape), *inside)


class Predicate(Pattern):
    """A mask written as text over `b h q k`, the coordinates `q0 k0 q1 ..` and the lengths `nq nk nq0 nk0 ..`.

    Integers, `+ - * // %`, comparisons, `and or not`, `abs min max`; `name[b, k]` reads a run-time integer table whose shape its
    indices say: b is the batch, h the query head, q and k tokens. `//` and `%` round toward minus infinity, as in Python. A table
    declared in `tables` has the shape given there and may be indexed by any integers.
    """

    kind: Literal["predicate"] = "predicate"
    tables: tuple[Captured, ...] = ()
    text: str

    @field_validator("text")
    @classmethod
    def _parses(cls, text: str, info: ValidationInfo) -> str:
        for rank in (1, 2, 3):
            grid = Grid((None,) * rank, (None,) * rank)
            try:
                _parse_predicate(text, grid, info.data.get("tables", ()))
                return text
            except ValueError:
                if rank == 3:
                    raise
        return text

    def problems(self, grid: Grid) -> list[str]:
        try:
            _parse_predicate(self.text, grid, self.tables)
            return []
        except ValueError as error:
            return [str(error)]

    def predicate(self, grid: Grid) -> Expr:
        return _parse_predicate(self.text, grid, self.tables)

    @classmethod
    def from_mask_mod(cls, mod: Callable[..., Any], **lengths: int) -> tuple[Predicate, dict[str, Any]]:
        """The mask that FlexAttention's `mask_mod(b, h, q_idx, kv_idx)` computes, read by calling it once with tracers.

        Args:
            mod: the function, over flattened tokens.
            lengths: `b=`, `h=`, `q=`, `k=`, how many of an index there are; needed where bits of that index are used.

        Returns:
            The mask, and by name the tensors that it captured: integers, for every call of its kernel.

        Raises:
            UnsupportedError: what the language of specs has not; names the operation.
        """
        from attncc.integrations.flex_import import from_mask_mod

        return from_mask_mod(mod, lengths)


def _parse_predicate(text: str, grid: Grid, declared: tuple[Captured, ...] = ()) -> Expr:
    mask = read_text(text, grid, {}, lambda name: Kind.INT, INTEGER_CALLS, declared)
    if mask.kind is not Kind.BOOL:
        raise ValueError(f"a predicate must be true or false, this one is {mask.kind.value}")
    for n in nodes(mask):
        if n.kind is Kind.FLOAT:
            raise ValueError(f"{n!r} is no integer; // divides integers")
    return mask


def read_text(
    text: str,
    grid: Grid,
    more: Mapping[str, Expr],
    kind: Callable[[str], Kind],
    calls: frozenset[str] | None,
    declared: tuple[Captured, ...] = (),
) -> Expr:
    """The expression a text says over the vocabulary of masks, `more` names, `declared` tables, and others of the kinds `kind` tells.

    Raises:
        ValueError: what is not in the grammar.
    """
    names = {"b": var("b"), "h": var("h")}
    dims: dict[Expr, str] = {names["b"]: "B", names["h"]: "H"}
    for side in "qk":
        names[side], names[f"n{side}"] = grid.flat(side), grid.tokens(side)
        # Self-attention has one token axis: `doc[b, q] == doc[b, k]` reads one table.
        dims[names[side]] = "NQ" if grid.shared else f"N{side.upper()}"
        for axis in range(grid.rank):
            names[f"{side}{axis}"], names[f"n{side}{axis}"] = grid.coordinate(side, axis), grid.length(side, axis)

    known = {table.name: table for table in declared}

    def read(name: str, index: tuple[Expr, ...]) -> Expr:
        if name in known and name not in names and name not in more:
            return known[name].read(index)
        unknown = [i for i in index if i not in dims]
        if unknown or len(set(index)) < len(index) or name in names or name in more:
            raise ValueError(f"table {name!r} must be indexed by b, h, q and k alone, each at most once")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"table {name!r} must have a name of small letters, digits and underscores")
        return load(Table(name, kind(name), tuple(dims[i] for i in index)), *index)

    found = parse(text, {**names, **more}, read, calls)
    for n in nodes(found):
        _check_number(n)
    return found


def _check_number(n: Expr) -> None:
    """Holds one node to what kernels compute with: 32-bit integers, divided by something."""
    if n.op is Op.CONST and n.kind is Kind.INT and abs(int(n.value)) > 2**31 - 1:
        raise ValueError("a number is no 32-bit integer")
    if n.op in (Op.FLOORDIV, Op.MOD) and n.args[1] is const(0):
        raise ValueError("division by zero")
