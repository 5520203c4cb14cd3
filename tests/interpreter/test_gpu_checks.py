"""What the GPU harness calls right and wrong, on interpreted kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attncc
from attncc import AttentionSpec, gates, masks, normalizers
from benchmarks.gpu import checks


def kernel_of(**fields: Any) -> Any:
    spec = {"tokens": (40,), "heads": 2, "head_dim": 16, "dtype": "float16", "mask": masks.Causal(), **fields}
    return attncc.compile(AttentionSpec.model_validate(spec), target="sm_90")


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize(
    "fields",
    [
        {"mask": masks.Segments() & masks.Causal(), "gate": gates.Output(), "key_heads": 1},
        {"tokens": (6, 7), "mask": masks.Neighborhood(window=3, stride=2), "outputs": ("output", "lse"), "dtype": "float32"},
        {"tokens": (None,), "normalizer": normalizers.Sigmoid(bias=-3.0)},
    ],
    ids=["segments", "neighborhood", "sigmoid"],
)
def test_right_kernels_pass(layout: str, fields: dict[str, Any]) -> None:
    kernel = kernel_of(**fields)
    tokens = tuple(n or 40 for n in kernel.spec.tokens)
    record = checks.check_layout(kernel, tokens, layout, "cpu", seed=0)
    assert record["ok"], record
    assert 0 < record["error"] <= record["limit"] and record["formulas_differ"] <= checks.AGREE
    assert ("lse_error" in record) == ("lse" in kernel.spec.outputs)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_layouts_are_what_they_say(layout: str) -> None:
    x = torch.arange(2 * 3 * 4 * 8.0).reshape(2, 3, 4, 8)
    laid = checks._laid_out(x, layout)
    assert torch.equal(laid.transpose(1, 2) if layout == "bshd" else laid, x)
    assert laid.stride(3) == 1
    assert (laid.stride(2) * 2 % 16 == 0) == (layout != "unaligned")


@pytest.mark.parametrize("wrong", ["a row", "not a number", "unwritten", "scale"])
def test_wrong_results_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.call

    def spoiled(*arguments: Any) -> Any:
        found = right(*arguments)
        out = found["output"].clone()
        if wrong == "a row":
            out[1, 1, 17] *= 1.1
        if wrong == "not a number":
            out[0, 0, 3, 5] = torch.nan
        if wrong == "unwritten":
            out[:, :, 32:] = out.new_empty(out[:, :, 32:].shape)
        return {**found, "output": out * 1.01 if wrong == "scale" else out}

    monkeypatch.setattr(checks, "call", spoiled)
    assert not checks.check_layout(kernel_of(), (40,), "bhsd", "cpu", seed=0)["ok"]


def test_sampled_rows_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_of(tokens=(6, 7), mask=masks.Neighborhood(window=3), gate=gates.Output(granularity="shared"), heads=4, value_heads=2)
    assert checks.sampled_rows(kernel, (6, 7), "cpu")["ok"]
    monkeypatch.setattr(checks, "rows_by_formula", lambda *a: torch.ones(checks.SAMPLED, 16, dtype=torch.float64))
    assert not checks.sampled_rows(kernel, (6, 7), "cpu")["ok"]
