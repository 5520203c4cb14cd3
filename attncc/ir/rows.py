"""Rows: what a normalizer keeps for each query row while it walks the keys. A normalizer is data, in one of the row classes.

POINTWISE keeps nothing: weights are f(s) and partial outputs add up. MEAN counts the keys of the row, RATIO adds up its weights:
states of disjoint key ranges add up as well, and the division comes last. SOFTMAX keeps the maximum m and the sum l of exp(s - m);
states (m1, l1), (m2, l2) of disjoint key ranges merge to m = max(m1, m2), l = l1 exp(m1 - m) + l2 exp(m2 - m), outputs likewise.
A sink z is one more such state, (z, 1), which counts once however the keys are cut.

Some weights need a number of the whole row first, final over all keys: a `Statistic`. It is made by a walk of its own (a log-sum, or
a `Root` found in several), kept `[B, H, Nq]`, and read by the row's expressions like any table.

What weights are multiplied by after that is no part of their row: a factor of the products with values alone (URPE).

Rows that combine several others, and rows of a state that tokens update in turn, have no state that one walk over the keys can merge, and
are not built; `ABSENT` says what stands in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from attncc.ir.expr import Expr, Kind, var, variables


class RowClass(str, Enum):
    """How a row is reduced, which decides the loop that codegen prints and what backward saves."""

    POINTWISE = "pointwise"  # saves nothing; has no log-sum-exp
    MEAN = "mean"  # divides by the number of keys that the row sees, which it saves
    RATIO = "ratio"  # divides by the sum of its weights, of which it saves the log
    SOFTMAX = "softmax"  # saves the log-sum-exp of the row


@dataclass(frozen=True)
class Absent:
    """A class of rows that is not built: what it would keep, and the nearest that is."""

    keeps: str
    nearest: str


SPARSEMAX = Absent("the threshold of entmax", "normalizer entmax with alpha 2, which is sparsemax")
URPE = Absent("the state of a softmax, whose weights a table multiplies", "normalizer softmax, with the table as the spec's factor")
ROW_COMBINATION = Absent(
    "several finished rows, which it then combines",
    "one spec for each branch, with routing head_scale as its coefficient and the branch before it as its addend (examples/branches.py)",
)
RECURRENT = Absent("a state [head_dim, value_dim] that tokens update in turn", "normalizer positive_ratio with elu_plus_one, or relu")
ABSENT = {
    "sparsemax": SPARSEMAX,
    "urpe": URPE,
    **dict.fromkeys(("differential", "mixture"), ROW_COMBINATION),
    **dict.fromkeys(("linear", "retention", "gated_linear"), RECURRENT),
}
"""Normalizers by kind that are refused by name."""


@dataclass(frozen=True)
class Root:
    """The number `t` of a row for which the weights `weight(s, t)` of its keys add up to 1; a row without keys has 0.

    `weight` is a function of s - t that falls with t. A solver starts at `start`, of the row's greatest score `s`, and takes `sweeps` steps
    `update`, each of `t`, the sum `w` of weights and the sum `d` of their derivatives by `s`. The sweeps do not show in the gradient:
    d t / d s_j is the derivative of key j's weight over their sum.
    """

    weight: Expr
    start: Expr
    update: Expr
    sweeps: int


@dataclass(frozen=True)
class Statistic:
    """A number of each row that its weights read as the table `name` `[B, H, NQ]`: a root, or the log of the sum of a weight `of(s)`.

    `shift` maps scores before that, and before all that follows.
    """

    name: str
    of: Root | Expr
    shift: Expr | None = None


@dataclass(frozen=True)
class Normalizer:
    """What a normalizer means, as expressions.

    `weight`, of the score `s`, is the weight itself (pointwise, mean) or its numerator (ratio, softmax). `shift` maps scores before
    that. `divisor`, of positions, divides pointwise rows. `sink` is the logit of a key beside those of the mask: its exponential joins
    the denominator of a ratio or softmax. Where it reads `z`, the score of a run-time key (`k_bias`, or `k_pad` of keys beyond the grid),
    that key has a value (`v_bias`, `v_pad`); else its value is 0. `statistic` is made before; `shift` then acts on
    scores that its shift has mapped.
    """

    row_class: RowClass
    weight: Expr
    shift: Expr | None = None
    divisor: Expr | None = None
    sink: Expr | None = None
    statistic: Statistic | None = None

    @property
    def has_lse(self) -> bool:
        """Whether rows have a denominator, whose log can be asked for; weights that add up to 1 by a root of their own have none."""
        rooted = self.statistic is not None and isinstance(self.statistic.of, Root)
        return self.row_class in (RowClass.RATIO, RowClass.SOFTMAX) and not rooted

    @property
    def sink_key(self) -> bool:
        """Whether the sink is a key with a value."""
        return self.sink is not None and "z" in variables(self.sink)


SCORE = var("s", Kind.FLOAT)
BIAS_SCORE = var("z", Kind.FLOAT)
"""Score of the key of a sink."""
ROOT, WEIGHT_SUM, SLOPE_SUM = (var(name, Kind.FLOAT) for name in "twd")
"""A root so far, and what a sweep adds up for the next: weights, and their derivatives by the score."""
