"""Kernels as torch ops: opcheck, torch.compile, gradients of everything, no second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attncc.errors import AttnccError, UnsupportedError
from attncc.runtime import ops
from tests.runtime.cases import Case

TRACED = ["causal", "segments", "gate", "bias", "trained slopes", "sigmoid", "open grid"]


def operands(case: Case) -> tuple:
    kernel = case.kernel()
    grid = [n for axes in (case.grid.get("tokens") or case.spec.tokens, case.spec.key_tokens) if axes for n in axes]
    grid = [case.lengths[0] if n is None else n for n in grid]
    lengths = grid * 2 if case.spec.key_tokens is None else grid
    return case.q, case.k, case.v, [case.inputs[name] for name in kernel._signature.names], kernel._name, lengths


@pytest.mark.parametrize("name", TRACED)
def test_opcheck_forward(name: str) -> None:
    case = Case(name, torch.float64)
    assert case.leaves
    torch.library.opcheck(ops.forward, (*operands(case), False, True))


@pytest.mark.parametrize("heads_last", [False, True])
def test_opcheck_forward_without_gradients(heads_last: bool) -> None:
    torch.library.opcheck(ops.forward, (*operands(Case("gate", torch.float32)), heads_last, False))


@pytest.mark.parametrize("name", TRACED)
def test_opcheck_backward(name: str) -> None:
    args = operands(Case(name, torch.float64))
    out, lse, rows = ops.forward(*args, False, True)
    q, k, v, extras, kernel, lengths = args
    grad_lse = torch.randn_like(lse) if lse.dim() == 3 else None
    trained = [x.is_floating_point() for x in extras]
    given = (torch.randn_like(out), grad_lse, q, k, v, extras, trained, rows if rows.numel() else out, lse, kernel, lengths)
    torch.library.opcheck(ops.backward, given, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def loss(case: Case, kernel, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    out = kernel(q * 2, k, v, **inputs, **case.grid)
    return sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize("name", TRACED)
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    case = Case(name, torch.float64)
    leaves, kernel = list(case.leaves.values()), case.kernel()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    given = (case, kernel, case.q, case.k, case.v, case.inputs)
    ours, theirs = (torch.autograd.grad(f(*given), leaves) for f in (compiled, loss))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_inductor_and_changing_lengths() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True)
    whole = Case("segments", torch.float32)
    leaves, kernel = list(whole.leaves.values()), whole.kernel()
    for length in (40, 33, 65):
        q, k, v = (x[:, :, :length].contiguous() for x in (whole.q, whole.k, whole.v))
        given = (whole, kernel, q, k, v, {"segments": whole.inputs["segments"][:, :length].contiguous()})
        ours, theirs = (torch.autograd.grad(f(*given), leaves) for f in (compiled, loss))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for the first length, one for all others"


def test_bad_input_is_found_when_tracing() -> None:
    torch._dynamo.reset()
    case = Case("causal", torch.float64)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="is no input of this spec"):
        compiled(case, case.kernel(), case.q, case.k, case.v, {"gate": case.q})


def test_lse_alone_differentiates() -> None:
    case = Case("gate", torch.float64)
    leaves = case.leaves
    lse = case.run()["lse"]
    ours = torch.autograd.grad(lse.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(case.oracle()["lse"].sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_only_a_table_is_trained() -> None:
    case = Case("bias", torch.float64)
    table = case.inputs["relative_bias"].requires_grad_()
    case.run()["output"].sum().backward()
    assert table.grad is not None and table.grad.abs().sum() > 0 and case.q.grad is None


def test_a_frozen_table_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncc.runtime import blocked

    seen, run = [], blocked.run_backward

    def recorded(*args):
        seen.append(args[1].trained)
        return run(*args)

    monkeypatch.setattr(blocked, "run_backward", recorded)
    case = Case("bias", torch.float64)
    case.q.requires_grad_()
    case.run()["output"].sum().backward()
    case.inputs["relative_bias"].requires_grad_()
    case.run()["output"].sum().backward()
    assert seen == [frozenset(), {"relative_bias"}]


def test_gradcheck() -> None:
    case = Case("bias", torch.float64, batch=1)
    kernel, table = case.kernel(), case.inputs["relative_bias"].requires_grad_()
    q, k, v = (x[..., :4].contiguous().requires_grad_() for x in (case.q, case.k, case.v))
    q, k, v = (torch.nn.functional.pad(x, (0, 4)).detach().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(
        lambda q, table: kernel(q, k, v, relative_bias=table, gate=case.inputs["gate"]), (q, table), fast_mode=True
    )


def test_a_second_derivative_is_refused() -> None:
    case = Case("causal", torch.float64)
    q = case.leaves["q"]
    (first,) = torch.autograd.grad(case.run()["output"].sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="a second derivative"):
        first.sum().backward()


def test_an_unknown_kernel_is_refused() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(AttnccError, match=r"'nobody' is not known in this process; run attncc.compile"):
        torch.ops.attncc.forward(q, q, q, [], "nobody", [4, 4], False, False)
