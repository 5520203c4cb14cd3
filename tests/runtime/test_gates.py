"""Gates and addends: what a packed projection means, saturation, rows without a key, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attncc
from attncc import AttentionSpec, gates, masks
from attncc.errors import InputError
from tests.runtime.cases import CASES, Case, gradients

SIZES: dict[str, Any] = {"tokens": (6,), "key_tokens": (4,), "heads": 4, "key_heads": 2, "head_dim": 3, "value_dim": 5, "dtype": "float32"}


def kernel(gate: gates.Output | None, **fields: Any) -> attncc.Kernel:
    """Six queries, four keys: the first two see none."""
    spec = AttentionSpec(**{**SIZES, "mask": masks.Causal(align="bottom_right"), "gate": gate, **fields})
    return attncc.compile(spec, "cpu")


FOLLOWED = [name for name, (json, _) in CASES.items() if {"gate", "addend", "routing"} & json.keys()]


@pytest.mark.parametrize("name", FOLLOWED)
def test_rows_are_overwritten_only_where_nobody_needs_them(name: str, poisoned: None) -> None:
    case = Case(name, torch.float64)
    before = [x.clone() for x in (case.q, case.k, case.v, *case.inputs.values())]
    alone = case.run()
    assert all(map(torch.equal, before, (case.q, case.k, case.v, *case.inputs.values())))
    leaves, want = case.leaves, case.oracle()
    trained = case.run()
    theirs, ours = gradients(want, leaves), gradients(trained, leaves)
    for output, value in trained.items():
        assert torch.equal(alone[output], value.detach())
    for leaf in leaves:
        torch.testing.assert_close(ours[leaf], theirs[leaf], rtol=1e-9, atol=1e-9)


def tensors() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 3), torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 5)


def test_a_packed_gate_is_the_tail_of_a_wide_projection() -> None:
    """[q of the group | gate of the group] for each key head, a token's row: no copy of the logits is made to gate with them."""
    _, k, v = tensors()
    wide = torch.randn(2, 6, 2, 2 * 3 + 2 * 5)
    q = wide[..., :6].unflatten(3, (2, 3)).flatten(2, 3).transpose(1, 2)
    logits = wide[..., 6:].transpose(1, 2)
    got = kernel(gates.Output(granularity="packed"))(q, k, v, gate=logits)
    plain = kernel(gates.Output())(q, k, v, gate=wide[..., 6:].unflatten(3, (2, 5)).flatten(2, 3).transpose(1, 2))
    torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("activation", ["sigmoid", "silu", "relu", "tanh", "identity"])
@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_saturated_gates_and_rows_without_a_key(activation: Any, mode: Any) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    logits = torch.tensor([-1e4, -100.0, 0.0, 50.0, 1e4, 1.0]).view(1, 1, 6, 1).repeat(2, 4, 1, 5).requires_grad_()
    out = kernel(gates.Output(activation=activation, mode=mode))(q, k, v, gate=logits)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, logits))
    if mode == "multiply":
        assert not out[:, :, :2].any() and logits.grad is not None and not logits.grad[:, :, :2].any()


def test_what_is_added_is_gated_too() -> None:
    q, k, v = tensors()
    added, logits = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(2, 4, 6, 5)
    out = kernel(gates.Output(), addend=True)(q, k, v, addend=added, gate=logits)
    torch.testing.assert_close(out, (kernel(None)(q, k, v) + added) * torch.sigmoid(logits))
    (grad,) = torch.autograd.grad(out.sum(), [added])
    torch.testing.assert_close(grad, torch.sigmoid(logits))


def test_token_scales_are_scaled_operands() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    scales: dict[str, Any] = {f"{name}_scale": torch.randn(x.shape[:3], requires_grad=True) for name, x in (("q", q), ("k", k), ("v", v))}
    got = kernel(None, token_scales=("q", "k", "v"))(q, k, v, **scales)
    want = kernel(None)(*(x * scales[f"{name}_scale"][..., None] for name, x in (("q", q), ("k", k), ("v", v))))
    torch.testing.assert_close(got, want)
    leaves = [q, k, v, *scales.values()]
    for ours, theirs in zip(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)):
        torch.testing.assert_close(ours, theirs)


def test_scales_of_zero() -> None:
    """A closed gate on every key: scores are 0, weights uniform; on every value: the output is 0. Nothing is NaN."""
    q, k, v = (x.requires_grad_() for x in tensors())
    closed = torch.zeros(2, 2, 4, requires_grad=True)
    out = kernel(None, token_scales=("k", "v"))(q, k, v, k_scale=closed, v_scale=closed)
    grads = torch.autograd.grad(out.sum(), [q, k, v, closed])
    assert not out.any() and all(x.isfinite().all() for x in grads) and bool(grads[3].any())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"gate": {"kind": "output", "activation": "gelu"}}, "gate.activation"),
    "granularity": ({"gate": {"kind": "output", "granularity": "per_value_head"}}, "gate.granularity"),
    "mode": ({"gate": {"kind": "output", "mode": "subtract"}}, "gate.mode"),
    "addend": ({"addend": "lepe"}, "addend"),
    "scales of what is none": ({"token_scales": ["o"]}, "token_scales"),
    "scales twice": ({"token_scales": ["q", "q"]}, "token_scales: names an operand twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_refused_by_name(name: str) -> None:
    fields, field = BAD[name]
    with pytest.raises(ValueError, match=field):
        AttentionSpec.model_validate({**SIZES, **fields})


@pytest.mark.parametrize(
    ("fields", "given", "text"),
    [
        (
            {"gate": gates.Output(granularity="packed")},
            {"gate": torch.zeros(2, 4, 6, 5)},
            r"^gate: has shape .*, must be \[B=2, 2, NQ=6, 10\]",
        ),
        ({"gate": gates.Output(granularity="per_key_head")}, {"gate": torch.zeros(2, 4, 6, 5)}, r"^gate: .* must be \[B=2, 2, NQ=6, 5\]"),
        ({"gate": None, "addend": True}, {}, r"^addend: is missing; it is \[B, 4, NQ, 5\] of float32"),
        ({"gate": None, "addend": True}, {"addend": torch.zeros(2, 4, 6, 1)}, r"^addend: has shape \[2, 4, 6, 1\], must be"),
        ({"gate": None, "token_scales": ("k",)}, {}, r"^k_scale: is missing; it is \[B, 2, NK\] of float32"),
        (
            {"gate": None, "token_scales": ("v",)},
            {"v_scale": torch.zeros(2, 4, 4)},
            r"^v_scale: has shape \[2, 4, 4\], must be \[B=2, 2, NK=4\]",
        ),
        ({"gate": None}, {"addend": torch.zeros(2, 4, 6, 5)}, r"^addend: is no input of this spec"),
    ],
)
def test_bad_logits(fields: dict[str, Any], given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        kernel(**fields)(*tensors(), **given)
