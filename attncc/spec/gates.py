"""Gates: what multiplies (or adds to) the output of attention, in the epilogue of the kernel."""

from __future__ import annotations

from typing import Literal

from attncc.ir.expr import Expr, Kind, Op, apply, var
from attncc.spec.model import Part

Activation = Literal["sigmoid", "silu"]
Granularity = Literal["elementwise", "headwise", "shared"]
SHAPES: dict[str, tuple[str, str, str, str]] = {
    "elementwise": ("B", "H", "NQ", "DV"),
    "headwise": ("B", "H", "NQ", "1"),
    "shared": ("B", "1", "NQ", "DV"),
}
"""Shape of the gate logits by granularity, heads first."""


class Output(Part):
    """out = o * act(g) or o + act(g), after normalisation (Qiu et al., Gated Attention for LLMs, arXiv 2505.06708, position G1).

    The logits g are the run-time input `gate`: `[B, H, N, Dv]` elementwise, `[B, H, N, 1]` headwise, `[B, 1, N, Dv]` shared by heads.
    """

    kind: Literal["output"] = "output"
    activation: Activation = "sigmoid"
    granularity: Granularity = "elementwise"
    mode: Literal["multiply", "add"] = "multiply"

    def expression(self) -> Expr:
        """The gated output, in the output row `o` and the logit `g`."""
        o, g = var("o", Kind.FLOAT), var("g", Kind.FLOAT)
        sigmoid = apply(Op.SIGMOID, g)
        act = sigmoid if self.activation == "sigmoid" else g * sigmoid
        return o * act if self.mode == "multiply" else o + act


Gate = Output
