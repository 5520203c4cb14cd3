"""Value interpretation: what an expression means on numpy or torch arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attncc.ir.arrays import Arrays, numpy_arrays
from attncc.ir.expr import Expr, Op, Table, nodes
from attncc.ir.ops import TABLE

Env = Mapping[str, Any]


def evaluate(root: Expr, env: Env, arrays: Arrays | None = None) -> Any:
    """Value of `root`: variables and tables are looked up in `env` by name and broadcast as the array library does.

    Raises:
        KeyError: a variable or table that `env` lacks.
    """
    return evaluate_all([root], env, arrays)[0]


def evaluate_all(roots: Sequence[Expr], env: Env, arrays: Arrays | None = None) -> list[Any]:
    """Values of several expressions; what they share is computed once."""
    xp = arrays or numpy_arrays()
    done: dict[Expr, Any] = {}
    for node in nodes(*roots):
        done[node] = _value(node, [done[a] for a in node.args], env, xp)
    return [done[root] for root in roots]


def _value(node: Expr, args: list[Any], env: Env, xp: Arrays) -> Any:
    if node.op is Op.CONST:
        return node.value
    if node.op is Op.VAR:
        return env[str(node.value)]
    if isinstance(node.value, Table):
        # A read is total, as the generated kernel's is.
        return xp.wide(xp.read(env[node.value.name], args))
    if isinstance(node.value, tuple):
        return _range(node, args, env, xp)
    return TABLE[node.op].value(xp, *args)


def _clamped(index: Any, size: int, xp: Arrays) -> Any:
    return xp.minimum(xp.maximum(index, 0), size - 1)


def _range(node: Expr, args: list[Any], env: Env, xp: Arrays) -> Any:
    """Least or greatest entry between two positions of one index, from a table of power-of-two ranges (see `range_tables`)."""
    table, axis = node.value
    levels = env[range_name(table.name, axis, node.op)]
    shape = levels.shape[1:]
    low, high = (_clamped(x, shape[axis], xp) for x in args[-2:])
    length = xp.maximum(high - low + 1, 1)
    level = env["floor_log2"][length]
    rest = [_clamped(x, size, xp) for x, size in zip(args[:-2], (*shape[:axis], *shape[axis + 1 :]))]
    bound = xp.minimum if node.op is Op.RANGE_MIN else xp.maximum
    start, stop = (levels[(level, *rest[:axis], i, *rest[axis:])] for i in (low, xp.maximum(high + 1 - (1 << level), 0)))
    return xp.wide(bound(start, stop))


def range_name(table: str, axis: int, op: Op) -> str:
    """Name under which `env` holds the ranges of a table along an axis."""
    return f"{table}@{axis}.{op.value}"


def range_tables(roots: Sequence[Expr], env: Mapping[str, Any], arrays: Arrays | None = None, longest: int | None = None) -> dict[str, Any]:
    """`env` completed with what the range reductions below `roots` read: O(n log n) entries each, exact for any range.

    With `longest`, for ranges of at most as many entries only: O(n log longest).

    Level j of the table holds the least (greatest) of 2**j entries from each position on, so two entries cover any range. Tables in
    `env` are of the array library; with torch all is done where they live, with no wait for the device.
    """
    xp = arrays or numpy_arrays()
    done = dict(env)
    for node in nodes(*roots):
        if isinstance(node.value, tuple):
            table, axis = node.value
            name = range_name(table.name, axis, node.op)
            if name not in done:
                most = min(longest or env[table.name].shape[axis], env[table.name].shape[axis])
                done[name] = _levels(env[table.name], axis, node.op, xp, most)
                size = max(len(done.get("floor_log2", ())), most + 2)
                done["floor_log2"] = xp.floor_log2(xp.maximum(xp.positions(size, env[table.name]), 1))
    return done


def _levels(data: Any, axis: int, op: Op, xp: Arrays, longest: int) -> Any:
    bound = xp.minimum if op is Op.RANGE_MIN else xp.maximum
    levels, step, before = [data], 1, (slice(None),) * axis
    while 2 * step <= longest:
        last = levels[-1]
        level = bound(last, last)  # a copy; what lies past the table's end is never read
        level[(*before, slice(None, -step))] = bound(last[(*before, slice(None, -step))], last[(*before, slice(step, None))])
        levels.append(level)
        step *= 2
    return xp.stack(levels)
