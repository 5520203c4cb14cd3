"""Derivative interpretation: d root / d leaf as an expression, so that nobody writes a gradient by hand."""

from __future__ import annotations

from attncc.ir.expr import Expr, Kind, Op, const, nodes, select
from attncc.ir.ops import TABLE


def derivative(root: Expr, leaf: Expr) -> Expr:
    """Derivative of `root` with respect to one of its float nodes (usually the variable `s`, or a table read).

    Every factor is in the stable form of its row: finite wherever the derivative itself is. What `select`, `min` and `max` do not
    take has no share, not even where it is infinite.
    """
    zero = const(0.0)
    done: dict[Expr, Expr] = {}
    for node in nodes(root):
        done[node] = const(1.0) if node is leaf else _chain(node, done, zero)
    return done[root]


def _chain(node: Expr, done: dict[Expr, Expr], zero: Expr) -> Expr:
    inner = [done[a] for a in node.args]
    if node.kind is not Kind.FLOAT or node.op is Op.LOAD or all(d is zero for d in inner):
        return zero
    rule = TABLE[node.op].derivative
    assert rule is not None, f"{node.op.value} gives floats and has no derivative"
    total = zero
    for factor, d in zip(rule(node, *node.args), inner):
        if d is not zero:
            total = total + _share(factor, d)
    return total


def _share(factor: Expr | float, d: Expr) -> Expr:
    """factor * d, or where the factor picks by 1 and 0, d or nothing."""
    one, zero = const(1.0), const(0.0)
    if isinstance(factor, Expr) and factor.op is Op.SELECT and {*factor.args[1:]} == {one, zero}:
        return select(factor.args[0], *(d if x is one else zero for x in factor.args[1:]))
    return factor * d
