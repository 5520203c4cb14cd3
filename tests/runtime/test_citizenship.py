"""What torch's modes mean to a kernel: autocast, deterministic algorithms; and dropout, which there is none of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from attncc import AttentionSpec
from attncc.errors import InputError
from tests.runtime.cases import CASES, Case

NAMES = ["causal", "gate", "bias", "segments", "sigmoid", "alibi"]


def forward_and_gradients(case: Case, kernel: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output, and the gradients of q, k, v and every float input, which are of `dtype` where it is given."""
    given = {"q": case.q, "k": case.k, "v": case.v, **case.inputs}
    leaves: dict[str, Any] = {n: x.detach().to(dtype or x.dtype).requires_grad_() if x.is_floating_point() else x for n, x in given.items()}
    out = kernel(**leaves, **case.grid)
    first = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1, 2, first.numel()).view(first.shape).to(first.dtype)
    trained = [n for n, x in leaves.items() if x.requires_grad]
    found = torch.autograd.grad((first * weight).sum(), [leaves[n] for n in trained])
    return first.detach(), dict(zip(trained, found))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_touch_what_a_kernel_computes(name: str) -> None:
    """A float32 spec stays float32 inside bfloat16 autocast, forward and backward, to the last bit."""
    case = Case(name, torch.float32)
    kernel = case.kernel()
    want, grads = forward_and_gradients(case, kernel)
    with torch.autocast("cpu", torch.bfloat16):
        ours, found = forward_and_gradients(case, kernel)
    assert ours.dtype == torch.float32 and torch.equal(ours, want)
    assert all(torch.equal(found[n], grads[n]) for n in grads)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_the_call_to_the_spec(name: str) -> None:
    """float32 tensors meet a bfloat16 spec: cast inside autocast, with gradients in float32; refused outside."""
    case = Case(name, torch.bfloat16)
    kernel = case.kernel()
    want, grads = forward_and_gradients(case, kernel)
    with torch.autocast("cpu", torch.bfloat16):
        ours, found = forward_and_gradients(case, kernel, torch.float32)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, want)
    for n in grads:
        assert found[n].dtype == torch.float32
        torch.testing.assert_close(found[n], grads[n].float(), rtol=0, atol=0)
    with pytest.raises(InputError, match="q: has dtype float32, must be bfloat16"):
        forward_and_gradients(case, kernel, torch.float32)


def test_autocast_under_compile() -> None:
    torch._dynamo.reset()
    case = Case("causal", torch.bfloat16)
    kernel = case.kernel()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kernel(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    given = [x.float() for x in (case.q, case.k, case.v)]
    with torch.autocast("cpu", torch.bfloat16):
        ours, want = torch.compile(attend, fullgraph=True, backend="aot_eager")(*given), attend(*given)
    assert torch.equal(ours, want)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_same_bits_every_time(name: str) -> None:
    """Forward and every gradient, on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        case = Case(name, torch.float32)
        kernel = case.kernel()
        first, grads = forward_and_gradients(case, kernel)
        for _ in range(3):
            again, found = forward_and_gradients(case, kernel)
            assert torch.equal(again, first)
            assert all(torch.equal(found[n], grads[n]) for n in grads)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("word", ["dropout", "dropout_p"])
def test_dropout_is_refused_by_name(word: str) -> None:
    case = Case("causal", torch.float32)
    arguments: Any = {word: 0.1}
    with pytest.raises(InputError, match=f"^{word}: dropout of weights is not built; .* output instead"):
        case.kernel()(case.q, case.k, case.v, **arguments)
    with pytest.raises(ValidationError, match=f"{word}: dropout of weights is not built"):
        AttentionSpec.model_validate({**json.loads(case.spec.to_json()), word: 0.1})
