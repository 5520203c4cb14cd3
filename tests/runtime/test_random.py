"""Random specs, of the whole vocabulary, compiled for the CPU and run forward and backward, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attncc
from attncc import AttentionSpec, pipeline
from tests.oracle import attention, errors, within_float32
from tests.runtime.cases import gradients
from tests.strategies import Case, Sizes, cases, matmul_tiles

SIZES = Sizes(tokens=96, longest=96)
PIECES = {"MAX_KEYS": 20, "BLOCK_SCORES": 2000}
quiet = settings(suppress_health_check=list(HealthCheck))


@st.composite
def runs(draw: st.DrawFn, dtype: str) -> tuple[Case, attncc.Kernel]:
    """A case and its kernel, with tiles of its own in most of them."""
    case = draw(cases(SIZES, (dtype,)))
    spec = AttentionSpec.model_validate(case.spec)
    plan = None
    if draw(st.sampled_from([True, True, False])):
        rank = len(case.grids[0])
        plan = pipeline.plan(spec, "cpu", draw(matmul_tiles(rank)), draw(matmul_tiles(rank)))
    return case, attncc.compile(spec, "cpu", plan=plan)


class Compared:
    """Results and gradients of a kernel, and the oracle's."""

    def __init__(self, case: Case, kernel: attncc.Kernel, dtype: torch.dtype) -> None:
        self.case, self.kernel = case, kernel
        q, k, v, inputs = case.inputs(dtype)
        # A table is no input where its read was simplified away, as in t[q] <= t[q].
        self.inputs: Any = {name: x for name, x in inputs.items() if name in kernel._signature.names}
        self.all_inputs = inputs
        named = {"q": q, "k": k, "v": v, **self.inputs}
        self.leaves = {name: x.requires_grad_() for name, x in named.items() if x.is_floating_point()}
        self.tensors = (q, k, v)

    def got(self) -> dict[str, Tensor]:
        spec = self.kernel.spec
        tokens: dict[str, Any] = {}
        if spec.grid.rank > 1:
            query, key = self.case.grids
            tokens = ({"tokens": query} if None in spec.tokens else {}) | ({"key_tokens": key} if None in (spec.key_tokens or ()) else {})
        q, k, v = self.tensors
        out = self.kernel(q, k, v, **self.inputs, **tokens)
        return dict(zip(spec.outputs, out if isinstance(out, tuple) else (out,)))

    def wanted(self) -> dict[str, Tensor]:
        found = attention(self.case.concrete, *self.tensors, self.all_inputs)
        return {name: found[name] for name in self.kernel.spec.outputs}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that these grids take several: of rows, of strips, of pieces of keys."""
    for module, names in (("bands", {"MIN_ROWS": 8, "MAX_ROWS": 24, "OVERHEAD_PAIRS": 64}), ("strips", PIECES), ("tiles", PIECES)):
        for name, value in names.items():
            monkeypatch.setattr(f"attncc.runtime.blocked.{module}.{name}", value)


@settings(quiet, max_examples=300)
@given(runs("float64"))
def test_float64_forward_and_backward(poisoned: None, small_blocks: None, run: tuple[Case, attncc.Kernel]) -> None:
    compared = Compared(*run, torch.float64)
    got, want = compared.got(), compared.wanted()
    # An LSSAR weight may be a small difference: what is rounded in its parts counts up to 4096 times.
    tight = 1e-10 if run[0].spec["normalizer"]["kind"] == "lssar" else 1e-12
    for name, value in want.items():
        size = value.detach().nan_to_num(neginf=0.0).abs().max()  # sums of cubes cancel: what is lost is a share of the largest
        torch.testing.assert_close(got[name], value, rtol=tight, atol=tight * max(1.0, float(size)))
    ours, theirs = gradients(got, compared.leaves), gradients(want, compared.leaves)
    for name, value in theirs.items():
        assert float((ours[name] - value).norm()) <= 1e-9 * max(float(value.norm()), 1.0), name


@settings(quiet, max_examples=200)
@given(runs("float32"))
def test_float32_forward(poisoned: None, run: tuple[Case, attncc.Kernel]) -> None:
    compared = Compared(*run, torch.float32)
    got, want = compared.got(), compared.wanted()
    assert within_float32(errors(got, want), run[0].concrete, *compared.tensors, compared.all_inputs)
