"""The gate on output rows, in torch, for engines that do not fuse it, and its gradients."""

from __future__ import annotations

from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, var
from attncc.ir.values import evaluate, evaluate_all
from attncc.runtime.operands import compute_dtype

_O, _G = var("o", Kind.FLOAT), var("g", Kind.FLOAT)


def gated(value: Expr, rows: Tensor, logits: Tensor) -> Tensor:
    """The gated output, in the type of `rows` `[B, H, N, Dv]`; `logits` broadcast to them."""
    dtype = compute_dtype(rows)
    result: Tensor = evaluate(value, {"o": rows.to(dtype), "g": logits.to(dtype)}, torch_arrays(dtype))
    return result.to(rows.dtype)


def gate_gradients(value: Expr, rows: Tensor, logits: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the logits, from that of the gated output."""
    dtype = compute_dtype(rows)
    env = {"o": rows.to(dtype), "g": logits.to(dtype)}
    by_rows, by_logits = evaluate_all([derivative(value, _O), derivative(value, _G)], env, torch_arrays(dtype))
    grad = grad.to(dtype)
    return (grad * by_rows).to(rows.dtype), (grad * by_logits).sum_to_size(logits.shape).to(logits.dtype)
