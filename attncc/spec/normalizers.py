"""Normalizers: how scores become weights. Each names its record in `attncc.ir.rows`, where the row state and its merge stand."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, load, maximum, var
from attncc.ir.rows import BIAS_SCORE, SCORE, Normalizer, RowClass
from attncc.spec.model import Grid, Part

SINKS: dict[str, tuple[str, ...]] = {"per_head": ("H",), "per_query": ("H", "NQ"), "per_batch_query": ("B", "H", "NQ")}
"""Shape of the run-time input `sink` by what a sink depends on."""


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
        positive = apply(Op.RELU, SCORE)
        if self.power in (1.0, 2.0, 3.0):
            weight = positive
            for _ in range(int(self.power) - 1):
                weight = weight * positive
            return weight
        return apply(Op.POW, positive, self.power)

    def _divisor(self, grid: Grid) -> Expr | None:
        if self.divisor is None:
            return None
        keys = grid.tokens("k") if self.divisor == "keys" else maximum(grid.flat("q") + grid.offset + 1, 1)
        return apply(Op.FLOAT, keys)


NormalizerSpec = Annotated[Softmax | Sigmoid | ReLU, Field(discriminator="kind")]
