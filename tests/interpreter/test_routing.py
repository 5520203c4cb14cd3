"""Kernels that gather the rows of routed heads, interpreted, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import attncc
from attncc import AttentionSpec
from attncc.errors import UnsupportedError
from tests.oracle import attention, random_inputs
from tests.runtime.cases import CAUSAL, GATE, SEGMENTS, WITH_LSE, neighborhood, spec
from tests.runtime.test_routing import HEADS, MIXTURE, RELU, RULES, weights

WINDOW = {"kind": "sliding_window", "left": 40, "right": 7, "align": "top_left"}


def compared(json: dict[str, Any], target: str = "sm_80", **inputs: Any) -> None:
    """Results of the generated kernel and of the oracle are equal."""
    json = {**json, "dtype": "float32"}
    q, k, v, drawn = random_inputs(json, 2, 0, torch.float32)
    inputs = {**drawn, **{name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}}
    out = attncc.compile(AttentionSpec.model_validate(json), target)(q, k, v, layout="bhsd", tokens=None, key_tokens=None, **inputs)
    want = attention(json, q, k, v, inputs)
    for name, got in zip(json.get("outputs", ["output"]), out if isinstance(out, tuple) else (out,)):
        torch.testing.assert_close(got.double(), want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", [MIXTURE, {**MIXTURE, "shared": 1}, {**RELU, "shared": 2}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_who_is_routed(rule: str, routing: dict[str, Any], poisoned: None) -> None:
    json = spec([None], heads=HEADS, key_heads=2, value_heads=1, mask=CAUSAL, routing=routing, outputs=WITH_LSE, gate=GATE)
    compared({**json, "tokens": [150]}, routing=weights(rule, 150))


@pytest.mark.parametrize("tokens", [1, 2, 129])
@pytest.mark.parametrize("rule", RULES)
def test_short_sequences(rule: str, tokens: int, poisoned: None) -> None:
    compared(spec([tokens], heads=HEADS, mask=WINDOW if tokens > 50 else CAUSAL, routing=MIXTURE), "sm_90", routing=weights(rule, tokens))


@pytest.mark.parametrize("granularity", ["elementwise", "headwise", "shared", "per_key_head", "packed", "packed_headwise"])
@pytest.mark.parametrize(("mode", "addend"), [("multiply", False), ("add", False), ("multiply", True)])
def test_rows_of_no_head_are_gated(mode: str, addend: bool, granularity: str, poisoned: None) -> None:
    """Under an additive gate they are the gate's activation, which no program writes."""
    gate, pointwise = {**GATE, "mode": mode, "granularity": granularity}, {"kind": "sigmoid", "bias": 0.5}
    json = spec([70], heads=HEADS, key_heads=2, mask=WINDOW, routing=RELU, normalizer=pointwise, gate=gate, addend=addend)
    compared(json, routing=weights("every other token", 70) - weights("one head only", 70))


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("mask", [CAUSAL, SEGMENTS], ids=["ranges", "lists"])
def test_heads_that_are_off_and_scaled(mask: Any, per_batch: bool, poisoned: None) -> None:
    on, scale = torch.tensor([[True, False, False, True], [False, True, False, True]]), torch.tensor([[1.0, 0.0, -2.0, 0.5]] * 2)
    for kind, table in (("head_mask", on), ("head_scale", scale)):
        json = spec([40], heads=HEADS, mask=mask, outputs=WITH_LSE, routing={"kind": kind, "per_batch": per_batch})
        compared(json, "sm_80", **{kind: table if per_batch else table[0]})


@pytest.mark.parametrize("mask", [SEGMENTS, neighborhood([5], [1], [2], [False])], ids=["listed", "dilated"])
def test_routed_tokens_under_other_masks_are_refused(mask: Any) -> None:
    json = spec([64], heads=HEADS, dtype="float16", mask=mask, routing=MIXTURE)
    with pytest.raises(UnsupportedError, match=r"routing of tokens under this mask on sm_80.*target cpu"):
        attncc.compile(AttentionSpec.model_validate(json), "sm_80")
