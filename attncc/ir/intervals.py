"""Interval interpretation: bounds of an expression over a box of coordinates, as a pair of expressions in the same language.

Sound always: whatever the box, `lo <= value <= hi`; for a mask, `lo` true means true on the whole box and `hi` false means false on
the whole box. Bounds of run-time tables are exact range reductions, so data known only at run time get intervals too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, intern, nodes
from attncc.ir.ops import TABLE, Interval

_INFINITE = (Op.DIV, Op.EXP, Op.LOG, Op.SQRT, Op.POW)


def may_be_infinite(*roots: Expr) -> bool:
    """Whether finite variables and tables may give something infinite or NaN, overflow of sums and products apart."""
    return any(n.op in _INFINITE or (n.op is Op.CONST and n.kind is Kind.FLOAT and math.isinf(n.value)) for n in nodes(*roots))


def interval(root: Expr, box: Mapping[str, Interval]) -> Interval:
    """Bounds of `root` where each variable in `box` ranges between two expressions; other variables are single values."""
    return intervals(root, box)[root]


def intervals(root: Expr, box: Mapping[str, Interval], known: Mapping[Expr, Interval] | None = None) -> dict[Expr, Interval]:
    """Bounds of every node below `root`; `known` gives those of nodes that need no analysis, such as reads of tables."""
    done: dict[Expr, Interval] = dict(known or {})
    for node in nodes(root):
        if node not in done:
            done[node] = _bounds(node, [done[a] for a in node.args], box)
    return done


def _bounds(node: Expr, args: list[Interval], box: Mapping[str, Interval]) -> Interval:
    if node.op is Op.CONST:
        return node, node
    if node.op is Op.VAR:
        return box.get(str(node.value), (node, node))
    if all(a[0] is a[1] for a in args) and all(a[0] is arg for a, arg in zip(args, node.args)):
        return node, node
    if node.op is Op.LOAD:
        return _load_bounds(node, args)
    if node.op in (Op.RANGE_MIN, Op.RANGE_MAX):
        raise ValueError("a range reduction has no interval: take intervals of the original expression")
    low, high = TABLE[node.op].interval(node, *args)
    return low, high


def _load_bounds(node: Expr, args: list[Interval]) -> Interval:
    """Range reduction along the one index that varies; with more, what the element type says.

    A table that no run-time length sizes is small: there a second index may vary too, from one entry to the next.
    """
    varying = [i for i, a in enumerate(args) if a[0] is not a[1]]
    assert isinstance(node.value, Table)
    if len(varying) == 1:
        return _reduced(node, args, varying[0], [a[0] for a in args])
    if len(varying) != 2 or {"NQ", "NK"} & set(node.value.shape):
        return _unbounded(node.kind)
    other, axis = varying
    (first, first_high), (last, last_high) = (_reduced(node, args, axis, [a[end] for a in args]) for end in (0, 1))
    near, (least, most) = args[other][1] - args[other][0] <= 1, _unbounded(node.kind)
    low, high = apply(Op.MIN, first, last), apply(Op.MAX, first_high, last_high)
    return apply(Op.SELECT, near, low, least), apply(Op.SELECT, near, high, most)


def _reduced(node: Expr, args: list[Interval], axis: int, at: list[Expr]) -> Interval:
    """Bounds over the range of one index, the others being `at`."""
    operands = (*(x for i, x in enumerate(at) if i != axis), *args[axis])
    low, high = (intern(op, node.kind, operands, (node.value, axis)) for op in (Op.RANGE_MIN, Op.RANGE_MAX))
    return low, high


def _unbounded(kind: Kind) -> Interval:
    if kind is Kind.FLOAT:
        return const(-math.inf), const(math.inf)
    return const(-(2**31)), const(2**31 - 1)
