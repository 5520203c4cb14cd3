"""JSON form of expressions: literals and variable names stand for themselves, `[op, argument, ...]` for the rest."""

from __future__ import annotations

from typing import Any

from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, intern, var


def to_json(node: Expr) -> Any:
    """A JSON value; `from_json` gives the same node back."""
    if node.op is Op.CONST:
        return node.value if abs(float(node.value)) != float("inf") else [node.op.value, str(node.value)]
    if node.op is Op.VAR:
        return str(node.value) if node.kind is Kind.INT else [node.op.value, str(node.value), node.kind.value]
    args = [to_json(a) for a in node.args]
    if isinstance(node.value, Table):
        return [node.op.value, table_to_json(node.value), *args]
    if isinstance(node.value, tuple):
        return [node.op.value, table_to_json(node.value[0]), node.value[1], *args]
    return [node.op.value, *args]


def from_json(data: Any) -> Expr:
    """The expression a JSON value says.

    Raises:
        ValueError: an unknown op or a malformed node.
    """
    if isinstance(data, (bool, int, float)):
        return const(data)
    if isinstance(data, str):
        return var(data)
    if not isinstance(data, (list, tuple)) or not data:
        raise ValueError(f"not an expression: {data!r}")
    return _node(Op(data[0]), list(data[1:]))


def _node(op: Op, rest: list[Any]) -> Expr:
    if op is Op.CONST:
        return const(float(rest[0]))
    if op is Op.VAR:
        return var(rest[0], Kind(rest[1]))
    if op is Op.LOAD:
        table = table_from_json(rest[0])
        return intern(op, table.kind, tuple(map(from_json, rest[1:])), table)
    if op in (Op.RANGE_MIN, Op.RANGE_MAX):
        table = table_from_json(rest[0])
        return intern(op, table.kind, tuple(map(from_json, rest[2:])), (table, int(rest[1])))
    return apply(op, *map(from_json, rest))


def table_to_json(table: Table) -> dict[str, Any]:
    """A table's declaration; constants keep their values."""
    data: dict[str, Any] = {"name": table.name, "kind": table.kind.value, "shape": list(table.shape)}
    return data if table.values is None else {**data, "values": list(table.values)}


def table_from_json(data: dict[str, Any]) -> Table:
    """The table a declaration says."""
    values = data.get("values")
    return Table(data["name"], Kind(data["kind"]), tuple(data["shape"]), None if values is None else tuple(values))
