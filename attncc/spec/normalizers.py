"""Normalizers: how scores become weights. Each names its record in `attncc.ir.rows`, where the row state and its merge stand."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, load, maximum, minimum, var, variables
from attncc.ir.intervals import interval
from attncc.ir.rows import BIAS_SCORE, ROOT, SCORE, SLOPE_SUM, WEIGHT_SUM, Normalizer, Root, RowClass, Statistic
from attncc.ir.text import parse
from attncc.spec.model import Grid, Part

SINKS: dict[str, tuple[str, ...]] = {"per_head": ("H",), "per_query": ("H", "NQ"), "per_batch_query": ("B", "H", "NQ")}
"""Shape of the run-time input `sink` by what a sink depends on."""
RowScale = tuple[float, float] | Literal["per_query", "per_head_query"] | None
LEAST_LOG = -80.0
TINY = 1e-30


class Softmax(Part):
    """exp(s) / sum exp(s) over the keys a query sees; a query that sees none gives 0 and LSE -inf.

    `sink` z adds exp(z) to the denominator and nothing to the output: a number (0.0: off by one, "softmax1"), or the run-time input
    `sink`, float32 with a gradient, `[H]` "per_head" (as in gpt-oss), `[H, Nq]` "per_query", `[B, H, Nq]` "per_batch_query".
    "key_value" is one more key and value for every row, learned: `k_bias` `[key_heads, head_dim]`, `v_bias` `[value_heads, value_dim]`,
    with z = scale * q.k_bias. A sink knows neither score maps nor mask; the LSE holds it, so that of a query without keys is z.
    Xiao et al., arXiv 2309.17453; Gu et al., arXiv 2410.10781.
    """

    kind: Literal["softmax"] = "softmax"
    sink: Annotated[float, Field(allow_inf_nan=False)] | Literal["per_head", "per_query", "per_batch_query", "key_value"] | None = None

    def record(self, grid: Grid) -> Normalizer:
        return Normalizer(RowClass.SOFTMAX, apply(Op.EXP, SCORE), sink=self._sink(grid))

    def _sink(self, grid: Grid) -> Expr | None:
        if self.sink is None or isinstance(self.sink, float):
            return None if self.sink is None else const(self.sink)
        if self.sink == "key_value":
            return BIAS_SCORE
        index = {"B": var("b"), "H": var("h"), "NQ": grid.flat("q")}
        shape = SINKS[self.sink]
        return load(Table("sink", Kind.FLOAT, shape), *(index[dim] for dim in shape))


class Sigmoid(Part):
    """sigmoid(s + bias) for each pair, no normalisation along the row (Ramapuram et al., arXiv 2409.04431).

    `bias` is a number, "minus_log_keys" for -log(n) with n the key tokens of the grid, masked or not (as the paper advises), or the
    run-time input `sigmoid_bias`, float32 with a gradient, `[H]` "per_head" or `[B, H]` "per_batch_head".
    """

    kind: Literal["sigmoid"] = "sigmoid"
    bias: float | Literal["minus_log_keys", "per_head", "per_batch_head"] = 0.0

    def record(self, grid: Grid) -> Normalizer:
        if isinstance(self.bias, float):
            return Normalizer(RowClass.POINTWISE, apply(Op.SIGMOID, SCORE + self.bias if self.bias else SCORE))
        if self.bias == "minus_log_keys":
            keys = apply(Op.FLOAT, grid.tokens("k"))
            return Normalizer(RowClass.POINTWISE, apply(Op.SIGMOID, SCORE - apply(Op.LOG, keys)))
        names = ("H",) if self.bias == "per_head" else ("B", "H")
        bias = load(Table("sigmoid_bias", Kind.FLOAT, names), *(var(name.lower()) for name in names))
        return Normalizer(RowClass.POINTWISE, apply(Op.SIGMOID, SCORE), shift=SCORE + bias)


class ReLU(Part):
    """max(s, 0)^power for each pair, over a divisor.

    `divisor`: None; "keys", the key tokens of the grid (Wortsman et al., arXiv 2309.08586); "allowed", the keys that the query sees;
    "position", 1 + the query's place among the keys, q + Nk - Nq (at least 1). `power` 2 is that of Hua et al., arXiv 2202.10447.
    """

    kind: Literal["relu"] = "relu"
    power: float = Field(default=1.0, ge=1, le=16)
    divisor: Literal["keys", "allowed", "position"] | None = None

    def record(self, grid: Grid) -> Normalizer:
        if self.divisor == "allowed":
            return Normalizer(RowClass.MEAN, self._weight())
        return Normalizer(RowClass.POINTWISE, self._weight(), divisor=self._divisor(grid))

    def _weight(self) -> Expr:
        return _power(apply(Op.RELU, SCORE), self.power)

    def _divisor(self, grid: Grid) -> Expr | None:
        if self.divisor is None:
            return None
        return apply(Op.FLOAT, grid.tokens("k") if self.divisor == "keys" else _place(grid))


class PositiveRatio(Part):
    """w(s) / (epsilon + sum w(s)) over the keys a query sees, for a weight w >= 0 other than exp; LSE is the log of the denominator.

    `weight`: "softplus" (LSSA, arXiv 2501.13428), "sigmoid" or "elu_plus_one" (Gu et al., arXiv 2410.10781), or a formula in `s`,
    such as "exp(min(s, 4)) + 0.1", of `+ - * /`, comparisons, `min max abs select exp log sqrt tanh sigmoid softplus erf relu pow`; it
    must be provably at least 0. `row_scale` multiplies scores by c before that: (a, b) for c = a log(t) + b with t = q + Nk - Nq + 1 (at
    least 1), or the run-time input `row_scale`, float32 with a gradient, `[Nq]` "per_query" or `[H, Nq]` "per_head_query".

    No maximum is taken off, so a row whose weights all vanish in float32 (or in float16, which they are rounded to) is 0.
    """

    kind: Literal["positive_ratio"] = "positive_ratio"
    weight: str = "softplus"
    row_scale: RowScale = None
    epsilon: float = Field(default=0.0, ge=0)

    @field_validator("weight")
    @classmethod
    def _positive(cls, text: str) -> str:
        positive_weight(text)
        return text

    def record(self, grid: Grid) -> Normalizer:
        sink = const(math.log(self.epsilon)) if self.epsilon else None
        return Normalizer(RowClass.RATIO, positive_weight(self.weight), shift=_scaled(self.row_scale, grid), sink=sink)


class Entmax(Part):
    """max((alpha - 1) s - t, 0)^(1 / (alpha - 1)) over the keys a query sees, with t such that the row adds up to 1: many weights are 0.

    `alpha` 2 is sparsemax (Martins & Astudillo, arXiv 1602.02068), 1.5 between that and softmax, to which it comes close near 1 (Peters
    et al., arXiv 1905.05702; a GPU kernel of it: AdaSplash, arXiv 2502.12082). A query without keys gives 0; there is no LSE.

    A kernel before finds t, `[B, H, Nq]`, by `sweeps` over the keys: steps of Newton on the 1 / (alpha - 1) norm of the row, which is
    convex in t, from the left, so that none goes too far. At most 12 reached float32 rounding for 100,000 keys of any spread that was
    tried. Rows are divided by their sum, so that they add up to 1 whatever is left.
    """

    kind: Literal["entmax"] = "entmax"
    alpha: float = Field(default=1.5, ge=1.01, le=2)
    sweeps: int = Field(default=16, ge=1, le=64)

    def record(self, grid: Grid) -> Normalizer:
        slope, power = self.alpha - 1.0, 1.0 / (self.alpha - 1.0)
        root = Root(_power(apply(Op.RELU, SCORE - ROOT), power), SCORE - 1.0, _newton(power), self.sweeps)
        found = Statistic("threshold", root, None if slope == 1.0 else SCORE * slope)
        shift = SCORE - _statistic(found.name, grid)
        return Normalizer(RowClass.RATIO, _power(apply(Op.RELU, SCORE), power), shift=shift, statistic=found)


class LSSAR(Part):
    """x^power / sum x^power over the keys a query sees, x = max(n a - offset, 0), a = softplus(c s) / sum softplus(c s).

    n is the row's length: 1 + the query's place among the keys, q + Nk - Nq, at least 1 ("position", the keys that a causal query sees), or
    the key tokens of the grid ("keys"). n a is 1 on average, so that an `offset` of 1 keeps what weighs more. c is `row_scale`, as of
    `positive_ratio`. An x below 1/4096 of the offset is 0: rounding, which a power would make weights of. A row whose x are all 0 gives
    0, as a row without keys does; LSE is the log of sum x^power. A kernel before makes the log of sum softplus(c s), `[B, H, Nq]`.
    Length-scaled softplus attention (LSSA) with re-weighting, arXiv 2501.13428.
    """

    kind: Literal["lssar"] = "lssar"
    power: float = Field(ge=1, le=64)
    offset: float = Field(default=1.0, ge=0)
    count: Literal["position", "keys"] = "position"
    row_scale: RowScale = None

    def record(self, grid: Grid) -> Normalizer:
        total = Statistic("row_log", apply(Op.SOFTPLUS, SCORE), _scaled(self.row_scale, grid))
        count = apply(Op.FLOAT, _place(grid) if self.count == "position" else grid.tokens("k"))
        # Of a row whose softplus all vanish the log is -inf, and its exponential must leave 0 of them.
        share = apply(Op.SOFTPLUS, SCORE) * (apply(Op.EXP, -maximum(_statistic(total.name, grid), LEAST_LOG)) * count)
        x, least = share - self.offset, max(self.offset / 4096, TINY)
        logarithm = apply(Op.LOG, maximum(x, least)) * self.power
        shift = apply(Op.SELECT, const(least) < x, logarithm, const(-math.inf))
        return Normalizer(RowClass.SOFTMAX, apply(Op.EXP, SCORE), shift=shift, statistic=total)


NormalizerSpec = Annotated[Softmax | Sigmoid | ReLU | PositiveRatio | Entmax | LSSAR, Field(discriminator="kind")]


def _scaled(row_scale: RowScale, grid: Grid) -> Expr | None:
    """Scores times a number of their row; None where they stay."""
    if row_scale is None:
        return None
    if isinstance(row_scale, tuple):
        slope, start = row_scale
        return SCORE * (apply(Op.LOG, apply(Op.FLOAT, _place(grid))) * slope + start)
    if row_scale == "per_query":
        return SCORE * load(Table("row_scale", Kind.FLOAT, ("NQ",)), grid.flat("q"))
    return SCORE * load(Table("row_scale", Kind.FLOAT, ("H", "NQ")), var("h"), grid.flat("q"))


def _statistic(name: str, grid: Grid) -> Expr:
    """The number of a row that a kernel before has made."""
    return load(Table(name, Kind.FLOAT, ("B", "H", "NQ")), var("b"), var("h"), grid.flat("q"))


def _power(base: Expr, power: float) -> Expr:
    if power not in (1.0, 2.0, 3.0):
        return apply(Op.POW, base, power)
    product = base
    for _ in range(int(power) - 1):
        product = product * base
    return product


def _newton(power: float) -> Expr:
    """A step toward norm(x) = 1 from below, norm(x) = (sum x^power)^(1 / power) with x = max(s - t, 0); none where no key is left."""
    norm = WEIGHT_SUM if power == 1.0 else apply(Op.POW, WEIGHT_SUM, 1.0 / power)
    slope = SLOPE_SUM if power == 1.0 else SLOPE_SUM / (_power(norm, power - 1.0) * power)
    return apply(Op.SELECT, const(0.0) < SLOPE_SUM, maximum(ROOT, ROOT + (norm - 1.0) / slope), ROOT)


def _place(grid: Grid) -> Expr:
    """1 + the query's place among the keys, at least 1."""
    return maximum(grid.flat("q") + grid.offset + 1, 1)


WEIGHTS = {
    "softplus": apply(Op.SOFTPLUS, SCORE),
    "sigmoid": apply(Op.SIGMOID, SCORE),
    "elu_plus_one": apply(Op.RELU, SCORE) + apply(Op.EXP, minimum(SCORE, 0.0)),
}
"""Weights of a positive ratio by name."""


def positive_weight(text: str) -> Expr:
    """The weight that a name or a formula says.

    Raises:
        ValueError: no formula in s, one without a derivative, or one that may be negative for all that intervals prove.
    """
    if text in WEIGHTS:
        return WEIGHTS[text]
    weight = parse(text, {"s": SCORE})
    if weight.kind is not Kind.FLOAT or "s" not in variables(weight):
        raise ValueError(f"must be one of {', '.join(WEIGHTS)} or a formula in the score s")
    derivative(weight, SCORE)
    low = interval(weight, {"s": (const(-math.inf), const(math.inf))})[0]
    if low.op is not Op.CONST or low.value < 0:
        raise ValueError(f"{text!r} may be negative for all that its parts prove; put the whole into relu(..), abs(..) or exp(..)")
    return weight
