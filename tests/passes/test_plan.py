"""Plans: JSON that reads back and can be pinned, the pipeline's steps, and what fuse, views and schedule decide."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from attncc import pipeline
from attncc.errors import PlanError, TargetError
from attncc.ir.graph import Graph, GraphOp, Stage
from attncc.ir.verify import verify
from attncc.passes.fuse import fuse
from attncc.passes.plan import KernelPlan, Plan
from attncc.pipeline import canonical, check, plan
from attncc.spec.attention import AttentionSpec
from tests.strategies import Case, cases

GNA = {"kind": "neighborhood", "window": [4, 4], "stride": [2, 1], "dilation": [1, 1], "causal": [False, False]}
DILATED = {**GNA, "dilation": [1, 2]}


def spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec.model_validate({"tokens": [512], "heads": 2, "head_dim": 64, "mask": {"kind": "causal"}, **fields})


def kernel(target: str = "sm_90", **fields: Any) -> KernelPlan:
    return plan(spec(**fields), target).kernels[0]


@settings(max_examples=60)
@given(cases(), st.sampled_from(["cpu", "sm_80", "sm_90", "gfx942"]))
def test_plans_read_back(case: Case, target: str) -> None:
    made = plan(AttentionSpec.model_validate(case.spec), target)
    again = Plan.from_json(made.to_json())
    assert again == made and again.digest == made.digest
    assert again.kernels[0].graph == made.kernels[0].graph
    assert plan(AttentionSpec.model_validate(case.spec), target) == made, "the same spec has the same plan"
    assert pipeline.check(again, AttentionSpec.model_validate(case.spec), target) is again


def test_the_digest_forgets_what_was_rejected() -> None:
    made = plan(spec(), "sm_90")
    bare = made.model_copy(update={"kernels": (made.kernels[0].model_copy(update={"rejected": ()}),)})
    fewer = made.model_copy(update={"kernels": (made.kernels[0].model_copy(update={"num_stages": 1, "q_tile": (16,)}),)})
    assert Plan.from_json(bare.to_json()).digest == made.digest != Plan.from_json(fewer.to_json()).digest


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"extra": 1},
        {"kernels": [{"name": "x"}]},
        {"target": None},
    ],
)
def test_what_is_no_plan_is_refused(change: dict[str, Any]) -> None:
    data = json.loads(plan(spec(), "sm_90").to_json())
    with pytest.raises(ValidationError):
        Plan.from_json(json.dumps({**data, **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x; import os"},
        {"q_tile": [48]},
        {"q_tile": [4, 4]},
        {"k_tile": [-16]},
        {"num_warps": 0},
        {"block_mask": "guess"},
        {"mask_policy": "no tile"},
        {"views": [{"operand": "k", "address": "nowhere"}]},
        {"body": []},
        {"body": ["graph query=[8] key=[8] residues=[] {", "}"]},
        {"body": ["graph query=[8] key=[8] residues=[] {", "%2 = mask(%q) predicate=`__import__('os')`", "return output=%2", "}"]},
    ],
)
def test_what_is_no_kernel_is_refused(change: dict[str, Any]) -> None:
    data = json.loads(plan(spec(), "sm_90").to_json())
    data["kernels"][0] |= change
    with pytest.raises(ValidationError):
        Plan.from_json(json.dumps(data))


def test_a_plan_belongs_to_its_spec_and_target() -> None:
    made, other = plan(spec(), "sm_90"), spec(head_dim=32)
    with pytest.raises(PlanError, match="another spec"):
        made.check(other.digest, "sm_90")
    with pytest.raises(PlanError, match="'sm_90', not 'sm_80'"):
        made.check(spec().digest, "sm_80")
    assert made.check(spec().digest, "sm_90") is made


@pytest.mark.parametrize(("old", "new"), [("scale=0.125", "scale=1.0"), ('dtype="float16"', 'dtype="float32"'), ("`q0`", "`511`")])
def test_a_plan_that_computes_something_else_is_refused(old: str, new: str) -> None:
    data = json.loads(plan(spec(), "sm_90").to_json())
    body = data["kernels"][0]["body"]
    assert any(old in line for line in body)
    data["kernels"][0]["body"] = [line.replace(old, new) for line in body]
    with pytest.raises(PlanError, match="do not compute what the spec says"):
        pipeline.check(Plan.from_json(json.dumps(data)), spec(), "sm_90")


# ---- the pipeline ------------------------------------------------------------------------------------------------------------------


def test_steps_have_names_and_stages() -> None:
    seen: list[tuple[str, Graph]] = []
    plan(spec(), "sm_90", watch=lambda name, graph: seen.append((name, graph)))
    assert [name for name, _ in seen] == ["lower", "token order", "canonicalize", "fuse", "tile", "choose views", "schedule"]
    verify(seen[0][1], Stage.LOWERED)
    verify(seen[-1][1], Stage.PLANNED)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(TargetError, match="'sm_99' is unknown; known are cpu, sm_80"):
        plan(spec(), "sm_99")


# ---- fuse, views, schedule ---------------------------------------------------------------------------------------------------------


@given(cases())
def test_fusion_keeps_every_result(case: Case) -> None:
    """One kernel, whose inputs are all that the body reads and whose results are the graph's outputs; one more for each statistic kept."""
    graph = canonical(AttentionSpec.model_validate(case.spec))
    fused = fuse(graph)
    *before, made = fused.find(GraphOp.KERNEL)
    kept = {n["name"] for n in graph.find(GraphOp.KEEP)}
    for kernel in (*before, made):
        assert {n["name"] for n in kernel.inputs} == {n["name"] for n in kernel["body"].find(GraphOp.INPUT)}
    read = {n for kernel in (*before, made) for n in kernel["body"].find(GraphOp.INPUT)}
    assert set(graph.find(GraphOp.INPUT)) == {n for n in read if n["name"] not in kept}
    assert [[name for name, _ in kernel["body"].outputs] for kernel in before] == [[name] for name in kept]
    assert {n["name"] for n in fused.find(GraphOp.KEEP)} == kept == {n["name"] for n in read if n["name"] in kept}
    assert [name for name, _ in fused.outputs] == [name for name, _ in made["body"].outputs] == case.spec.get("outputs", ["output"])
    assert {n["result"] for n in fused.find(GraphOp.PICK)} == {name for name, _ in fused.outputs} | kept


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "attention_1d_softmax_forward"),
        ({"tokens": [8, 8], "mask": GNA, "normalizer": {"kind": "sigmoid"}}, "attention_2d_sigmoid_forward"),
        ({"tokens": [4, 4, 4], "mask": {"kind": "full"}, "normalizer": {"kind": "relu"}}, "attention_3d_relu_forward"),
        ({"normalizer": {"kind": "entmax"}}, "attention_1d_threshold"),
        ({"normalizer": {"kind": "lssar", "power": 2}}, "attention_1d_row_log"),
    ],
)
def test_kernels_have_stable_names(fields: dict[str, Any], name: str) -> None:
    assert kernel(**fields).name == name


@pytest.mark.parametrize(
    ("target", "mask", "address"),
    [
        ("sm_90", GNA, "box"),
        ("sm_100", GNA, "box"),
        ("sm_80", GNA, "rows"),
        ("gfx942", GNA, "rows"),
        ("cpu", GNA, "rows"),
        ("sm_90", DILATED, "rows"),
    ],
)
def test_boxes_where_the_target_and_the_order_allow_them(target: str, mask: dict[str, Any], address: str) -> None:
    """Tokens of a residue class are no box of the tensor."""
    views = kernel(target, tokens=[16, 16], mask=mask).views
    assert [(v.operand, v.address) for v in views] == [("k", address), ("v", address)]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, "ranges"),
        ({"mask": {"kind": "sliding_window", "left": 9, "right": 0}, "tokens": [None]}, "ranges"),
        ({"mask": {"kind": "full"}}, "ranges"),
        ({"mask": {"kind": "neighborhood", "window": 9, "stride": 3, "dilation": 2}}, "ranges"),
        ({"mask": {"kind": "segments"}}, "lists"),
        ({"mask": {"kind": "or", "masks": [{"kind": "causal"}, {"kind": "sinks", "count": 4}]}}, "lists"),
        ({"mask": {"kind": "predicate", "text": "k <= 7 * q and 7 * q <= k"}}, "lists"),
        ({"mask": GNA, "tokens": [16, 16]}, "lists"),
        ({"mask": GNA, "tokens": [16, 16], "routing": {"kind": "relu"}}, "box"),
        ({"mask": {"kind": "segments"}, "routing": {"kind": "relu"}}, "box"),
        ({"mask": {"kind": "segments"}, "routing": {"kind": "head_mask"}}, "lists"),
        ({"mask": {"kind": "causal"}, "routing": {"kind": "relu"}}, "ranges"),
    ],
)
def test_ranges_where_a_row_says_its_tiles(fields: dict[str, Any], form: str) -> None:
    assert kernel(**fields).block_mask == form


@pytest.mark.parametrize(
    ("mask", "order"),
    [({"kind": "causal"}, "descending"), ({"kind": "full"}, "ascending"), ({"kind": "sliding_window", "left": 9, "right": 0}, "ascending")],
)
def test_long_rows_come_first(mask: dict[str, Any], order: str) -> None:
    assert kernel(mask=mask).row_order == order


@pytest.mark.parametrize(
    ("tokens", "key_heads", "prepared"), [([100], 8, False), ([100], 4, False), ([100], 2, True), ([300], 8, True), ([None], 8, True)]
)
def test_keys_are_made_ready_before_where_many_tiles_visit_them(tokens: Any, key_heads: int, prepared: bool) -> None:
    """One or two visits: at load, by row pointers. More, or nobody knows: in a pass before, which leaves boxes."""
    fields = {"tokens": tokens, "key_tokens": [None], "heads": 8, "key_heads": key_heads, "mask": {"kind": "full"}}
    k, v = kernel("sm_90", **fields, loads=[{"kind": "rotary"}]).views
    assert (k.prepared, k.address) == (prepared, "box" if prepared else "rows")
    assert (v.prepared, v.address) == (False, "box")


# ---- plans of two kernels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("normalizer", [{"kind": "entmax", "alpha": 1.3}, {"kind": "lssar", "power": 2.0}], ids=lambda n: n["kind"])
def test_kernels_of_a_plan_share_their_tiles(normalizer: Any, target: str) -> None:
    made = plan(spec(normalizer=normalizer), target)
    first, last = made.kernels
    assert (first.q_tile, first.k_tile, first.block_mask) == (last.q_tile, last.k_tile, last.block_mask)
    assert [view.operand for view in first.views] == ["k"] and [view.operand for view in last.views] == ["k", "v"]
    assert check(Plan.from_json(made.to_json()), spec(normalizer=normalizer), target) == made
    with pytest.raises(PlanError, match="do not compute what the spec says"):
        check(made.model_copy(update={"kernels": made.kernels[1:]}), spec(normalizer=normalizer), target)


def test_a_plan_whose_kernels_differ_in_tiles_is_none() -> None:
    data = json.loads(plan(spec(normalizer={"kind": "entmax"}), "sm_90").to_json())
    data["kernels"][0]["q_tile"] = [16]
    with pytest.raises(ValueError, match="all take the same tiles"):
        Plan.model_validate(data)
    with pytest.raises(ValueError, match="at least 1"):
        Plan.model_validate({**data, "kernels": []})
