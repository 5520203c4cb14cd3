"""The blocked backend: torch on any device, visiting only the tiles that are not empty; the backward pass recomputes scores.

`problem` turns a call into what the engine takes: `banded` where the mask is a product of bands (or documents packed in order), else
`listed`, by its block mask; `formulas` makes score maps and weights of the plan's graph. `attention` runs it forward and backward in
independent tasks on `workers`: `strips` of `bands`, or runs of `tiles`. Either yields blocks, which `block` (or `roots`) computes by the
call's `rules`. `sinks` joins finished rows with what is no key of the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.ir.graph import statistic
from attncc.passes.plan import KernelPlan
from attncc.runtime.blocked.attention import backward, forward
from attncc.runtime.blocked.problem import problem
from attncc.runtime.blocked.routed import rows_to_erase
from attncc.runtime.blocked.sinks import Sink, divided
from attncc.runtime.loads import adjoint, prepared
from attncc.runtime.operands import Operands

Gradients = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def run_forward(kernel: KernelPlan, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Output rows before any gate, `[B, Hq, Nq, Dv]` in the type of q, and the log `[B, Hq, Nq]` of what they divide by, if anything.

    Of a kernel for a statistic, rows have no columns and the statistic is in place of the log.
    """
    operands = prepared(kernel.graph, operands)
    rows, lse = forward(problem(kernel, operands), operands.q, operands.k, operands.v)
    sink = Sink.of(kernel.graph, operands)
    kept = rows_to_erase(kernel.graph, operands, sink is not None)
    if sink is not None and lse is not None:
        rows, lse = sink.join(rows, lse)
    rows = divided(kernel.graph, operands, rows)
    if kept is None:
        return rows, lse
    # A statistic of a row that is erased is still read where all rows are computed: 0 keeps these finite.
    nothing = -torch.inf if statistic(kernel.graph) is None else 0.0
    return rows.masked_fill_(~kept[..., None], 0.0), None if lse is None else lse.masked_fill_(~kept, nothing)


def run_backward(
    kernel: KernelPlan, operands: Operands, rows: Tensor, lse: Tensor | None, grad: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """Gradients of q, k, v and of the trained tables, from the forward pass's results and the gradients of these."""
    given, operands = operands, prepared(kernel.graph, operands)
    sink = Sink.of(kernel.graph, operands)
    kept = rows_to_erase(kernel.graph, operands, sink is not None)
    if kept is not None:
        grad = grad.masked_fill(~kept[..., None], 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(~kept, 0.0)
    by_row = divided(kernel.graph, operands, grad)
    dq, dk, dv, found = backward(problem(kernel, operands), operands.q, operands.k, operands.v, rows, lse, by_row, grad_lse)
    if sink is not None and lse is not None:
        own, trained = sink.gradients(rows, lse, grad, grad_lse)
        dq, found = dq if own is None else (dq + own).to(dq.dtype), _added(found, trained)
    dq, dk, dv, loaded = adjoint(kernel.graph, given, (dq, dk, dv))
    return dq, dk, dv, {**found, **loaded}


def _added(found: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name; a table that keys and a sink both read gets the sum of both."""
    return found | {name: x + found[name] if name in found else x for name, x in more.items()}
