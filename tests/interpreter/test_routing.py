"""Kernels that gather the rows of routed heads, interpreted, against the float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import attncc
from attncc import AttentionSpec
from attncc.errors import UnsupportedError
from attncc.pipeline import plan
from tests.oracle import attention, concrete, random_inputs
from tests.runtime.cases import CAUSAL, GATE, SEGMENTS, WITH_LSE, neighborhood, spec
from tests.runtime.test_routing import HEADS, MIXTURE, RELU, RULES, weights

WINDOW = {"kind": "sliding_window", "left": 40, "right": 7, "align": "top_left"}


def compared(json: dict[str, Any], target: str = "sm_80", lengths: tuple[int, ...] = (), **inputs: Any) -> None:
    """Results of the generated kernel and of the oracle are equal; `lengths` are those of open axes."""
    json = {**json, "dtype": "float32"}
    q, k, v, drawn = random_inputs(json, 2, 0, torch.float32, lengths)
    inputs = {**drawn, **{name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}}
    known = concrete(json, lengths)
    grid: dict[str, Any] = {"tokens": tuple(known["tokens"]) if lengths else None, "key_tokens": None}
    out = attncc.compile(AttentionSpec.model_validate(json), target)(q, k, v, layout="bhsd", **grid, **inputs)
    want = attention(known, q, k, v, inputs)
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
    for key_heads in (2, 1):
        compared({**json, "key_heads": key_heads}, routing=weights("every other token", 70) - weights("one head only", 70))


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("mask", [CAUSAL, SEGMENTS], ids=["ranges", "lists"])
def test_heads_that_are_off_and_scaled(mask: Any, per_batch: bool, poisoned: None) -> None:
    on, scale = torch.tensor([[True, False, False, True], [False, True, False, True]]), torch.tensor([[1.0, 0.0, -2.0, 0.5]] * 2)
    for kind, table in (("head_mask", on), ("head_scale", scale)):
        json = spec([40], heads=HEADS, mask=mask, outputs=WITH_LSE, routing={"kind": kind, "per_batch": per_batch})
        compared(json, "sm_80", (), **{kind: table if per_batch else table[0]})


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([70], {"kind": "and", "masks": [SEGMENTS, CAUSAL]}),
        ([70], {"kind": "or", "masks": [{"kind": "sliding_window", "left": 5, "right": 0}, {"kind": "sinks", "count": 3}]}),
        ([70], {"kind": "predicate", "text": "k <= 3 * q and q <= 3 * k"}),
        ([9, 10], neighborhood([3, 5], [2, 1], [1, 1], [False, True])),
        ([None, 5, 4], neighborhood([3, 3, 2], [1, 2, 1], [1, 1, 1], [False, False, False])),
    ],
    ids=["segments", "sinks", "jumps", "plane", "volume"],
)
def test_masks_whose_tiles_are_listed_elsewhere(tokens: list[Any], mask: Any, rule: str, target: str, poisoned: None) -> None:
    json = spec(tokens, heads=HEADS, key_heads=2, mask=mask, routing=MIXTURE, outputs=WITH_LSE)
    assert "lists" not in plan(AttentionSpec.model_validate({**json, "dtype": "float32"}), target).kernels[0].block_mask
    known = [4 if n is None else n for n in tokens]
    compared({**json, "tokens": known}, target, routing=weights(rule, math.prod(known)))
    if known != tokens:
        compared(json, target, lengths=(4,), routing=weights(rule, math.prod(known)))


def test_routed_tokens_under_dilated_masks_are_refused() -> None:
    json = spec([64], heads=HEADS, dtype="float16", mask=neighborhood([5], [1], [2], [False]), routing=MIXTURE)
    with pytest.raises(UnsupportedError, match=r"routing of tokens under a dilated mask on sm_80.*target cpu"):
        attncc.compile(AttentionSpec.model_validate(json), "sm_80")
