"""Plans of two kernels, interpreted: the first keeps a number of each row, which the second reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attncc import AttentionSpec, pipeline
from attncc.codegen.module import emit
from tests.interpreter.generated import module_of
from tests.runtime.cases import CASES, CAUSAL, GATE, SEGMENTS, WITH_LSE, Case, gradients, spec

ENTMAX: dict[str, Any] = {"kind": "entmax", "sweeps": 6}
LSSAR: dict[str, Any] = {"kind": "lssar", "power": 2.0, "row_scale": [0.5, 1.0]}
LATE: dict[str, Any] = {"kind": "causal", "align": "bottom_right"}
MIXTURE: dict[str, Any] = {"kind": "mixture_of_heads", "shared": 1, "top_k": 1}
SMALL: dict[str, Any] = {
    "rows without a key": spec([40], key_tokens=[20], mask=LATE, normalizer=ENTMAX, heads=1),
    "sparsemax, gate": spec([20], mask=CAUSAL, normalizer={**ENTMAX, "alpha": 2.0}, gate=GATE, heads=4, key_heads=2, value_dim=5),
    "any alpha, lists": spec([5, 6], normalizer={**ENTMAX, "alpha": 1.3}, mask={"kind": "disc", "radius": 3}, heads=1),
    "routed rows": spec([40], mask=CAUSAL, normalizer=ENTMAX, heads=3, routing=MIXTURE),
    "routed rows of a box": spec([5, 6], mask={"kind": "disc", "radius": 3}, normalizer={**ENTMAX, "alpha": 2.0}, heads=3, routing=MIXTURE),
    "heads that are off": spec([20], normalizer=LSSAR, heads=4, routing={"kind": "head_mask"}, outputs=WITH_LSE),
    "re-weighted, rows without a key": spec([40], key_tokens=[20], mask=LATE, normalizer=LSSAR, outputs=WITH_LSE),
    "re-weighted labels": spec([24], mask=SEGMENTS, normalizer={**LSSAR, "count": "keys", "row_scale": "per_query", "offset": 0.25}),
    "rotated keys": spec([20], normalizer={**ENTMAX, "alpha": 2.0}, loads=[{"kind": "rotary"}], scores=[{"kind": "alibi"}], heads=1),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Case:
    monkeypatch.setitem(CASES, "small", (SMALL[request.param], []))
    return Case("small", torch.float32)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("small", SMALL, indirect=True)
def test_equals_the_oracle(small: Case, target: str, poisoned: None) -> None:
    got, want = small.run(target), small.oracle()
    for output, value in want.items():
        finite = value != -torch.inf
        assert torch.equal(got[output] != -torch.inf, finite)
        assert float((got[output].double() - value)[finite].norm() / value[finite].norm()) <= 1e-5


@pytest.mark.parametrize("small", ["rows without a key", "re-weighted, rows without a key"], indirect=True)
def test_gradients(small: Case, poisoned: None) -> None:
    leaves = small.leaves
    ours, theirs = gradients(small.run("sm_90"), leaves), gradients(small.oracle(), leaves)
    for leaf, value in theirs.items():
        torch.testing.assert_close(ours[leaf], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sparsemax, gate", "any alpha, lists", "re-weighted labels"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_file_of_two_kernels_checks_itself(name: str, target: str) -> None:
    made = AttentionSpec.model_validate({**SMALL[name], "dtype": "float32"})
    source = emit(pipeline.plan(made, target), made.to_json(indent=None))
    compile(source, "generated", "exec")
    assert source.count("\ndef allowed(") == source.count("\ndef forward(") == source.count("\ndef check(") == 1
    assert float(module_of(source).check()) <= 1e-5
