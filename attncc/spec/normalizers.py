"""Normalizers: how scores become weights. Each names its record in `attncc.ir.rows`, where the row state and its merge stand."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from attncc.ir.expr import Op
from attncc.ir.rows import Normalizer, pointwise, softmax
from attncc.spec.model import Part


class Softmax(Part):
    """exp(s) / sum exp(s) over the keys a query sees; a query that sees none gives 0 and LSE -inf."""

    kind: Literal["softmax"] = "softmax"

    def record(self) -> Normalizer:
        return softmax()


class Sigmoid(Part):
    """sigmoid(s + bias) for each pair, no normalisation along the row (Ramapuram et al., arXiv 2409.04431; bias = -log n advised)."""

    kind: Literal["sigmoid"] = "sigmoid"
    bias: float = 0.0

    def record(self) -> Normalizer:
        return pointwise(Op.SIGMOID, self.bias)


class ReLU(Part):
    """max(s, 0) for each pair, no normalisation along the row; divide by the length with `Scale` where a model does."""

    kind: Literal["relu"] = "relu"

    def record(self) -> Normalizer:
        return pointwise(Op.RELU)


NormalizerSpec = Annotated[Softmax | Sigmoid | ReLU, Field(discriminator="kind")]
