"""Rows: what a normalizer keeps for each query row while it walks the keys. A normalizer is data, in one of the row classes.

POINTWISE keeps nothing: weights are f(s) and partial outputs add up. SOFTMAX keeps the maximum m and the sum l of exp(s - m);
states (m1, l1), (m2, l2) of disjoint key ranges merge to m = max(m1, m2), l = l1 exp(m1 - m) + l2 exp(m2 - m), outputs likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from attncc.ir.expr import Expr, Kind, Op, apply, var


class RowClass(str, Enum):
    """How a row is reduced, which decides the loop that codegen prints and what backward saves."""

    POINTWISE = "pointwise"  # saves nothing; has no log-sum-exp
    SOFTMAX = "softmax"  # saves the log-sum-exp of the row


@dataclass(frozen=True)
class Normalizer:
    """`weight` is an expression in the score `s`: the weight itself (pointwise) or its numerator (softmax)."""

    row_class: RowClass
    weight: Expr


SCORE = var("s", Kind.FLOAT)


def softmax() -> Normalizer:
    """exp(s) over its sum along the row."""
    return Normalizer(RowClass.SOFTMAX, apply(Op.EXP, SCORE))


def pointwise(op: Op, bias: float = 0.0) -> Normalizer:
    """op(s + bias), each pair on its own."""
    return Normalizer(RowClass.POINTWISE, apply(op, SCORE + bias if bias else SCORE))
