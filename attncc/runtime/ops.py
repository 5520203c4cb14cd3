"""The torch ops `attncc::forward` and `attncc::backward`: one pair for all kernels, which are named by text.

Being ops with fake implementations and a formula for autograd, kernels trace under `torch.compile` without a graph break. Extras are
the gate and the tables of a call, in the order of the kernel's signature; lengths are those of the query's axes, then of the key's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.errors import UnsupportedError
from attncc.ir.graph import ROW_INPUTS
from attncc.runtime import autocast
from attncc.runtime import program as programs
from attncc.runtime.operands import Operands
from attncc.runtime.program import Program, find_program

FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] extras, str kernel, SymInt[] lengths, bool heads_last, bool train) -> (Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor[] extras, bool[] trained, Tensor rows, Tensor lse, "
    "str kernel, SymInt[] lengths) -> (Tensor, Tensor, Tensor, Tensor[])"
)


def _operands(program: Program, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], lengths: Sequence[int]) -> Operands:
    query, key = tuple(lengths[: len(lengths) // 2]), tuple(lengths[len(lengths) // 2 :])
    program.check_lengths(query, key)
    return Operands(q, k, v, program.tables(extras, q.device), query, key)


@torch.library.custom_op("attncc::forward", mutates_args=(), schema=FORWARD)
def forward(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], kernel: str, lengths: Sequence[int], heads_last: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, N, Dv]`, log-sum-exp `[B, H, N]` and, for training, the rows before weights and gate; empty where there is none."""
    program = find_program(kernel)
    with autocast.off(q.device):
        return programs.forward(program, _operands(program, q, k, v, extras, lengths), program.logits(extras), heads_last, train)


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], kernel: str, lengths: Sequence[int], heads_last: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return programs.room(find_program(kernel), q, heads_last, train)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, extras, ctx.kernel, ctx.lengths, _, _ = inputs
    out, lse, rows = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rows)
    # Without row weights and a gate the output is the rows.
    after = bool(find_program(ctx.kernel).epilogue)
    ctx.save_for_backward(q, k, v, rows if after else out, lse, *extras)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, rows, lse, *extras = ctx.saved_tensors
    if grad is None:
        grad = q.new_zeros((*q.shape[:3], v.shape[3]))
    trained = list(ctx.needs_input_grad[3])
    dq, dk, dv, found = torch.ops.attncc.backward(grad, grad_lse, q, k, v, extras, trained, rows, lse, ctx.kernel, ctx.lengths)
    given = iter(found)
    by_extra = [next(given) if wanted else None for wanted in trained]
    return dq, dk, dv, by_extra, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("attncc::backward", mutates_args=(), schema=BACKWARD)
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Sequence[Tensor],
    trained: Sequence[bool],
    rows: Tensor,
    lse: Tensor,
    kernel: str,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v and of those extras that are `trained`, in order; `rows` and `lse` are what forward kept, or empty."""
    program = find_program(kernel)
    names = [name for name, wanted in zip(program.signature.names, trained) if wanted]
    operands = replace(_operands(program, q, k, v, extras, lengths), trained=frozenset(names) - set(ROW_INPUTS))
    with autocast.off(q.device):
        dq, dk, dv, found = programs.backward(program, operands, program.logits(extras), (rows, lse), grad, grad_lse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), [found[name].contiguous() for name in names]


@backward.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Sequence[Tensor],
    trained: Sequence[bool],
    rows: Tensor,
    lse: Tensor,
    kernel: str,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, [x.new_empty(x.shape) for x, wanted in zip(extras, trained) if wanted]


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise UnsupportedError("a second derivative of a kernel", "its backward pass has no derivative", "first derivatives, or the reference")


backward.register_autograd(_no_double_backward)
