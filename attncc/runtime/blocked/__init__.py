"""The blocked backend: torch on any device, visiting only the tiles that are not empty; the backward pass recomputes scores.

Two engines share the interface `run_forward` and `run_backward`. `attention` computes softmax rows of band masks (windows, causal,
neighborhoods of any stride and dilation) and of documents packed in order, in strips that stay in cache. `simple` walks one row of tiles
at a time and takes everything else: score maps, pointwise normalizers, free predicates. `banded` says which of them a call gets.
"""

from __future__ import annotations

from torch import Tensor

from attncc.passes.plan import KernelPlan
from attncc.runtime.blocked import simple
from attncc.runtime.blocked.attention import backward, forward
from attncc.runtime.blocked.banded import banded
from attncc.runtime.operands import Operands

Gradients = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def run_forward(kernel: KernelPlan, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Output rows before any gate, `[B, Hq, Nq, Dv]` in the type of q, and their log-sum-exp `[B, Hq, Nq]` (None: pointwise)."""
    problem = banded(kernel, operands)
    if problem is None:
        return simple.run_forward(kernel, operands)
    return forward(problem, operands.q, operands.k, operands.v)


def run_backward(
    kernel: KernelPlan, operands: Operands, rows: Tensor, lse: Tensor | None, grad: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """Gradients of q, k, v and of the trained tables, from the forward pass's results and the gradients of these."""
    problem = banded(kernel, operands)
    if problem is None:
        return simple.run_backward(kernel, operands, rows, lse, grad, grad_lse)
    return backward(problem, operands.q, operands.k, operands.v, rows, lse, grad, grad_lse)
