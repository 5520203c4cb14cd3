"""Expressions as torch functions: what `vmap` and `torch.compile` can trace, on tensors of any shape, 0-d ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attncc.ir.arrays import Arrays, torch_arrays
from attncc.ir.expr import Expr, Op, Table, nodes
from attncc.ir.ops import TABLE

Compute = Callable[..., Any]
Step = tuple[Compute, tuple[int, ...]]


def torch_function(root: Expr, names: tuple[str, ...], tables: dict[str, Any], dtype: Any = None) -> Compute:
    """A function of the named variables that computes `root` by torch ops.

    Every op is a step over the results of earlier ones, in plain tuples: a tracer unrolls them and sees torch ops only.

    Args:
        root: over the named variables and the tables.
        names: the variables, in the order of the function's arguments.
        tables: tensors by name.
        dtype: what integers become where they turn into floats.
    """
    order = nodes(root)
    place = {name: i for i, name in enumerate(names)}
    at = {node: len(names) + i for i, node in enumerate(order)}
    xp = torch_arrays(dtype)
    steps = tuple(_step(node, place, tuple(at[a] for a in node.args), tables, xp) for node in order)

    def compute(*arguments: Any) -> Any:
        values = list(arguments)
        for function, used in steps:
            values.append(function(*[values[i] for i in used]))
        return values[-1]

    return compute


def _step(node: Expr, place: dict[str, int], used: tuple[int, ...], tables: dict[str, Any], xp: Arrays) -> Step:
    if node.op is Op.VAR:
        return _same, (place[str(node.value)],)
    if node.op is Op.CONST:
        return _constant(node.value), ()
    if isinstance(node.value, Table):
        return _read(tables[node.value.name]), used
    return _operation(node.op, xp), used


def _same(x: Any) -> Any:
    return x


def _constant(value: Any) -> Compute:
    if not isinstance(value, float):
        return lambda: value
    text = repr(value)

    def constant() -> Any:
        """From text: a float in a closure turns into a symbol where a tracer meets a second one, and FlexAttention takes none."""
        return float(text)

    return constant


def _read(table: Any) -> Compute:
    """table[index], every index clamped into the table."""
    last = tuple(n - 1 for n in table.shape)

    def read(*index: Any) -> Any:
        return table[tuple([i.clamp(0, n) if isinstance(i, Tensor) else min(max(i, 0), n) for i, n in zip(index, last)])]

    return read


def _operation(op: Op, xp: Arrays) -> Compute:
    value = TABLE[op].value

    def operation(*arguments: Any) -> Any:
        return value(xp, *arguments)

    return operation
