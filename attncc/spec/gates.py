"""Gates: what multiplies (or adds to) the output of attention, in the epilogue of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from attncc.ir.expr import Expr, Kind, Op, apply, var
from attncc.spec.model import Part

Activation = Literal["sigmoid", "silu", "relu", "tanh", "identity"]
Granularity = Literal["elementwise", "headwise", "shared", "per_key_head", "packed", "packed_headwise"]
LOGIT, OUTPUT = var("g", Kind.FLOAT), var("o", Kind.FLOAT)
ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "sigmoid": lambda g: apply(Op.SIGMOID, g),
    "silu": lambda g: g * apply(Op.SIGMOID, g),
    "relu": lambda g: apply(Op.RELU, g),
    "tanh": lambda g: apply(Op.TANH, g),
    "identity": lambda g: g,
}


class Output(Part):
    """out = o * act(g) or o + act(g), after normalisation (Qiu et al., Gated Attention for LLMs, arXiv 2505.06708, position G1).

    The logits g are the run-time input `gate`: `[B, H, N, Dv]` elementwise, `[B, H, N, 1]` headwise, `[B, 1, N, Dv]` shared by heads,
    `[B, Hk, N, Dv]` per_key_head. "packed" is elementwise as a projection that is wide for each key head lays it out: `[B, Hk, N,
    H / Hk * Dv]`, the query heads of a key head side by side; "packed_headwise" `[B, Hk, N, H / Hk]` likewise. `activation`: sigmoid,
    silu (g * sigmoid(g)), relu, tanh or identity.
    """

    kind: Literal["output"] = "output"
    activation: Activation = "sigmoid"
    granularity: Granularity = "elementwise"
    mode: Literal["multiply", "add"] = "multiply"

    def expression(self) -> Expr:
        """The gated output, in the output row `o` and the logit `g`."""
        act = ACTIVATIONS[self.activation](LOGIT)
        return OUTPUT * act if self.mode == "multiply" else OUTPUT + act

    @property
    def packed(self) -> bool:
        """Whether the logits of several query heads lie side by side."""
        return self.granularity.startswith("packed")

    def columns(self, heads: int, key_heads: int, value_dim: int) -> tuple[int, int]:
        """Heads of the logits, and columns of a row of theirs."""
        group = heads // key_heads
        return {
            "elementwise": (heads, value_dim),
            "headwise": (heads, 1),
            "shared": (1, value_dim),
            "per_key_head": (key_heads, value_dim),
            "packed": (key_heads, group * value_dim),
            "packed_headwise": (key_heads, group),
        }[self.granularity]


Gate = Output
