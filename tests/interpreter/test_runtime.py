"""Kernels for a GPU, called as a user calls them, interpreted: dispatch, inputs, tile lists, layouts, gradients."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import attncc
from attncc import AttentionSpec, knobs, masks
from attncc.runtime import cache, program
from tests.runtime.cases import Case, gradients

CASES = ["one token", "causal, rows without a key", "value heads", "segments", "two tables", "gate", "bias", "sigmoid", "nothing allowed"]
CASES += ["sparsemax", "re-weighted softplus over keys"]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    finite = want != -torch.inf
    assert torch.equal(got != -torch.inf, finite)
    return float((got.double() - want)[finite].norm() / want[finite].norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_equals_the_oracle(name: str, target: str, poisoned: None) -> None:
    case = Case(name, torch.float32)
    want = case.oracle()
    for output, value in case.run(target).items():
        assert error(value, want[output]) <= 1e-5


@pytest.mark.parametrize("name", ["segments", "shared gate"])
def test_heads_last_misaligned_and_expanded(name: str, poisoned: None) -> None:
    case = Case(name, torch.float32)
    case.k = case.k[:, :1].expand(case.k.shape)
    case.q = torch.nn.functional.pad(case.q, (1, 2))[..., 1:-2]
    want = case.oracle()["output"]
    for layout in ("bhsd", "bshd"):
        assert error(case.run("sm_90", layout)["output"], want) <= 1e-5


def test_gradients_run_in_torch_and_that_is_said_once() -> None:
    program._said.clear()
    for name in ("gate", "bias"):  # one kernel writes the log-sum-exp, the other does not
        case = Case(name, torch.float32)
        leaves, got, want = case.leaves, case.run("sm_90"), case.oracle()
        if name == "gate":
            with pytest.warns(UserWarning, match="backward pass of generated kernels runs in torch"):
                ours = gradients(got, leaves)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                ours = gradients(got, leaves)
        for leaf, theirs in gradients(want, leaves).items():
            torch.testing.assert_close(ours[leaf], theirs, rtol=1e-3, atol=1e-4)


def test_a_kernel_in_memory_runs(tmp_path: Path) -> None:
    cache._modules.clear()
    (tmp_path / "file").write_text("")
    case = Case("causal", torch.float32)
    with knobs.scope(cache_dir=tmp_path / "file"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = case.run("sm_80")["output"]
    cache._modules.clear()
    assert error(got, case.oracle()["output"]) <= 1e-5


def test_opcheck() -> None:
    from attncc.runtime import ops

    case = Case("gate", torch.float32)
    kernel, gate = case.kernel("sm_80"), case.inputs["gate"]
    torch.library.opcheck(ops.forward, (case.q, case.k, case.v, [gate], kernel._name, [140, 140], True, True))


def test_an_auto_kernel_of_a_gpu_machine_takes_cpu_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncc import api

    monkeypatch.setattr(api, "auto_target", lambda: "sm_90")
    kernel = attncc.compile(AttentionSpec(tokens=(None,), heads=2, head_dim=16, dtype="float32", mask=masks.Causal()))
    q = torch.randn(1, 2, 20, 16)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(kernel(q, q, q), want)
