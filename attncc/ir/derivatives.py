"""Derivative interpretation: d root / d leaf as an expression, so that nobody writes a gradient by hand."""

from __future__ import annotations

from attncc.ir.expr import Expr, Kind, Op, const, nodes
from attncc.ir.ops import TABLE


def derivative(root: Expr, leaf: Expr) -> Expr:
    """Derivative of `root` with respect to one of its float nodes (usually the variable `s`, or a table read).

    Every factor is in the stable form of its row: finite wherever the derivative itself is.

    Raises:
        ValueError: an op whose derivative is not known (a power with a varying exponent).
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
    if rule is None:
        raise ValueError(f"{node.op.value} has no derivative")
    total = zero
    for factor, d in zip(rule(node, *node.args), inner):
        if d is not zero:
            total = total + factor * d
    return total
