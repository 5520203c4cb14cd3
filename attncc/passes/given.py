"""What an analysis is given beside the spec: lengths of open axes and run-time tables. Checked here, once, for everyone who analyses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attncc.errors import InputError
from attncc.ir.expr import Expr, Table, tables
from attncc.passes.tiles import Shape
from attncc.spec.attention import AttentionSpec
from attncc.spec.model import Grid

Ints = npt.NDArray[np.int64]
Lengths = Sequence[int] | int | None


def known_grid(spec: AttentionSpec, lengths: Lengths = None) -> tuple[Shape, Shape]:
    """Tokens of every axis of the query's and of the key's grid.

    `lengths` gives one for each open axis of `tokens`, then for each of `key_tokens`.

    Raises:
        InputError: too few or too many of them, or lengths that the mask does not fit.
    """
    given: list[Any] = [lengths] if isinstance(lengths, int) else list(lengths or ())
    open_axes = list(_open_axes(spec))
    if len(given) != len(open_axes):
        wanted = f"give one for each of {', '.join(open_axes)}" if open_axes else "every axis of the spec is known"
        raise InputError("lengths", f"{wanted}; {len(given)} given")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise InputError("lengths", f"must be positive integers, not {given}")
    remaining = iter(given)
    query = tuple(next(remaining) if n is None else n for n in spec.tokens)
    key = query if spec.key_tokens is None else tuple(next(remaining) if n is None else n for n in spec.key_tokens)
    problems = spec.mask.problems(Grid(query, key, spec.grid.shared))
    if problems:
        raise InputError("lengths", f"mask: {problems[0]}")
    return query, key


def _open_axes(spec: AttentionSpec) -> Iterator[str]:
    for name, axes in (("tokens", spec.tokens), ("key_tokens", spec.key_tokens or ())):
        yield from (f"{name}[{a}]" for a, n in enumerate(axes) if n is None)


def known_tables(mask: Expr, given: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> tuple[dict[str, Ints], int]:
    """The run-time tables that a mask reads, as int64 arrays, and the batch size.

    Args:
        mask: what reads the tables.
        given: tables by name, anything numpy can read (tensors on any device too); names the mask does not read are left out.
        sizes: "H", "NQ", "NK", and "B" where the batch size is known.

    Raises:
        InputError: a missing table, a wrong shape, values that are no 32-bit integers.
    """
    given, sizes, found = given or {}, dict(sizes), {}
    reads = [t for t in tables(mask) if t.values is None]
    missing = [t for t in reads if t.name not in given]
    if missing:
        names = ", ".join(map(_form, missing))
        raise InputError("tables", f"the mask reads {names}: pass every one by name (command line: --tables FILE.npz)")
    for table in reads:
        array = _integers(table, given[table.name])
        if "B" in table.shape:
            sizes.setdefault("B", array.shape[table.shape.index("B")])
        wanted = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in table.shape)
        if array.shape != wanted:
            raise InputError("tables", f"{table.name} has shape {list(array.shape)}, must be {_form(table)} = {list(wanted)}")
        found[table.name] = array
    return found, sizes.get("B", 1)


def _form(table: Table) -> str:
    return f"{table.name} [{', '.join(map(str, table.shape))}]"


def _integers(table: Table, given: Any) -> Ints:
    array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    if array.dtype.kind not in "iub":
        raise InputError("tables", f"{table.name} has dtype {array.dtype}, must be integers")
    if array.ndim != len(table.shape) or array.size == 0:
        raise InputError("tables", f"{table.name} has shape {list(array.shape)}, must be {_form(table)}")
    if int(array.min()) < -(2**31) or int(array.max()) >= 2**31:
        raise InputError("tables", f"{table.name} holds numbers that do not fit 32 bits")
    return array.astype(np.int64)
