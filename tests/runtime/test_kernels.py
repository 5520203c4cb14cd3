"""Kernels on the CPU against the oracle, forward and backward."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch

import attncc
from attncc import AttentionSpec, gates, masks, scores
from attncc.runtime.reference import reference
from attncc.spec.lower import lower
from tests.oracle import concrete
from tests.runtime.cases import CASES, Case, gradients


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle_in_float64(name: str, poisoned: None) -> None:
    case = Case(name, torch.float64)
    leaves, got, want = case.leaves, case.run(), case.oracle()
    for output in case.spec.outputs:
        torch.testing.assert_close(got[output], want[output], rtol=0, atol=1e-12)
    ours, theirs = gradients(got, leaves), gradients(want, leaves)
    for leaf in leaves:
        torch.testing.assert_close(ours[leaf], theirs[leaf], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle_in_float32(name: str, poisoned: None) -> None:
    case = Case(name, torch.float32, seed=3)
    leaves, got, want = case.leaves, case.run(), case.oracle()
    for output in case.spec.outputs:
        finite = want[output] != -torch.inf
        assert torch.equal(got[output] != -torch.inf, finite)
        error = (got[output].double() - want[output])[finite].norm() / want[output][finite].norm().clamp(min=1e-30)
        assert error <= 1e-5
    ours, theirs = gradients(got, leaves), gradients(want, leaves)
    for leaf in leaves:
        torch.testing.assert_close(ours[leaf], theirs[leaf], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_equals_the_oracle(name: str) -> None:
    case = Case(name, torch.float64, seed=5)
    shape = concrete(case.json, case.lengths)
    tensors = {"q": case.q, "k": case.k, "v": case.v, **case.inputs}
    got, want = reference(lower(case.spec), tensors, tuple(shape["tokens"]), tuple(shape["key_tokens"])), case.oracle()
    for output in case.spec.outputs:
        torch.testing.assert_close(got[output], want[output], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "gate", "shared gate", "packed gate", "open grid"])
def test_layout_heads_last(name: str) -> None:
    case = Case(name, torch.float64)
    for output, value in case.run(layout="bshd").items():
        torch.testing.assert_close(value, case.oracle()[output], rtol=0, atol=1e-12)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (case.q, case.k, case.v))
    inputs: dict[str, Any] = {n: x.transpose(1, 2) for n, x in case.inputs.items() if n in ("gate", "addend")} | case.grid
    out = case.kernel()(q, k, v, layout="bshd", **inputs)
    assert (out[0] if isinstance(out, tuple) else out).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype: torch.dtype) -> None:
    case = Case("gate", dtype)
    leaves, got, want = case.leaves, case.run(), case.oracle()
    assert got["output"].dtype == dtype and got["lse"].dtype == torch.float32
    error = (got["output"].double() - want["output"]).norm() / want["output"].norm()
    assert error < (1e-3 if dtype == torch.float16 else 1e-2)
    assert all(g.dtype == dtype for g in gradients(got, leaves).values())


def test_expanded_heads_and_batch() -> None:
    case = Case("causal", torch.float64)
    case.k, case.q = case.k[:, :1].expand(case.k.shape), case.q[:1].expand(case.q.shape)
    torch.testing.assert_close(case.run()["output"], case.oracle()["output"], rtol=0, atol=1e-12)


def test_misaligned_rows() -> None:
    case = Case("causal", torch.float32)
    case.q, case.k = (torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (case.q, case.k))
    torch.testing.assert_close(case.run()["output"].double(), case.oracle()["output"], rtol=0, atol=1e-5)


def test_an_empty_batch_gives_an_empty_output() -> None:
    kernel = attncc.compile(AttentionSpec(tokens=(20,), heads=2, head_dim=8, dtype="float32", mask=masks.Causal()), "cpu")
    q = torch.randn(0, 2, 20, 8, requires_grad=True)
    out = kernel(q, q, q)
    out.sum().backward()
    assert out.shape == q.shape and q.grad is not None and q.grad.shape == q.shape


def test_without_gradients_nothing_is_kept() -> None:
    from attncc.runtime import ops

    case = Case("gate", torch.float32)
    kernel = case.kernel()
    extras = [case.inputs["gate"]]
    assert ops.forward(case.q, case.k, case.v, extras, kernel._name, [140, 140], False, False)[2].numel() == 0
    assert ops.forward(case.q, case.k, case.v, extras, kernel._name, [140, 140], False, True)[2].numel() > 0


def test_target_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernel = attncc.compile(AttentionSpec(tokens=(20,), heads=2, head_dim=8, dtype="float32"))
    assert kernel.plan.target == "cpu"


@pytest.mark.parametrize(
    ("name", "capability", "target"),
    [
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA H100 PCIe", (9, 0), "h100-pcie"),
        ("NVIDIA GH200 480GB", (9, 0), "h200"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "a100"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9), "sm_89"),
        ("NVIDIA RTX A6000", (8, 6), "sm_86"),
        ("Orin", (8, 7), "sm_86"),
        ("NVIDIA B300", (10, 3), "sm_100"),
    ],
)
def test_target_of_a_gpu(name: str, capability: tuple[int, int], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from attncc.runtime import devices

    devices.device_target.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    try:
        assert devices.auto_target() == target
    finally:
        devices.device_target.cache_clear()


def test_an_old_gpu_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from attncc.runtime import devices

    devices.device_target.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="Tesla V100"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    with pytest.raises(attncc.errors.UnsupportedError, match=r"V100 \(sm_70\).*target='cpu'"):
        attncc.compile(AttentionSpec(tokens=(20,), heads=2, head_dim=8))


def test_the_source_of_a_cpu_kernel_is_the_triton_file_for_sm_90() -> None:
    spec = AttentionSpec(tokens=(None,), heads=2, head_dim=64, mask=masks.Causal(), gate=gates.Output())
    source = attncc.compile(spec, "cpu").source
    assert source == attncc.compile(spec, "sm_90").source
    assert "generated by attncc for sm_90" in source and "def forward(" in source


def test_explain_shows_every_step_and_what_was_rejected() -> None:
    text = attncc.compile(AttentionSpec(tokens=(None,), heads=2, head_dim=64, mask=masks.Causal()), "sm_90").explain()
    for part in ("-- lower", "-- token order", "-- canonicalize", "-- fuse", "-- tile", "-- plan", "rejected"):
        assert part in text


def test_kernels_pickle() -> None:
    case = Case("gate", torch.float64)
    kernel = pickle.loads(pickle.dumps(case.kernel()))
    assert (kernel.spec, kernel.plan) == (case.spec, case.kernel().plan)
    got = kernel(case.q, case.k, case.v, **case.inputs)[0]
    torch.testing.assert_close(got, case.oracle()["output"], rtol=0, atol=1e-12)


def test_a_pinned_plan_is_followed() -> None:
    from attncc import Plan, pipeline

    case = Case("causal", torch.float64)
    pinned = Plan.from_json(pipeline.plan(case.spec, "cpu", (16,), (32,)).to_json())
    kernel = attncc.compile(case.spec, "cpu", plan=pinned)
    assert kernel.plan.kernels[0].q_tile == (16,)
    torch.testing.assert_close(kernel(case.q, case.k, case.v)[0], case.oracle()["output"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"block_mask": "ranges"},
        {"name": "another"},
        {"views": [{"operand": "k", "address": "box"}, {"operand": "v", "address": "rows"}]},
        {"body": lambda body: [line.replace("scale=0.", "scale=1.") for line in body]},
        {"body": lambda body: [line.replace('name="segments"', 'name="x\\n"') for line in body]},
    ],
)
def test_a_plan_that_says_something_else_is_refused(change: dict) -> None:
    from attncc import Plan

    spec = AttentionSpec(tokens=(64,), heads=2, head_dim=64, mask=masks.Segments())
    plan = attncc.compile(spec, "sm_80").plan
    data = plan.model_dump(mode="json")
    kernel = data["kernels"][0]
    kernel |= {name: value(kernel[name]) if callable(value) else value for name, value in change.items()}
    with pytest.raises((attncc.errors.PlanError, attncc.errors.GraphError, ValueError), match=r"plan|table|graph"):
        attncc.compile(spec, "sm_80", plan=Plan.model_validate(data))


def test_a_plan_of_another_spec_or_target_is_refused() -> None:
    spec = AttentionSpec(tokens=(64,), heads=2, head_dim=64)
    plan = attncc.compile(spec, "sm_80").plan
    with pytest.raises(attncc.errors.PlanError, match="another spec"):
        attncc.compile(AttentionSpec(tokens=(64,), heads=4, head_dim=64), "sm_80", plan=plan)
    with pytest.raises(attncc.errors.PlanError, match="target"):
        attncc.compile(spec, "sm_90", plan=plan)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"dtype": "float64"}, r"float64 on sm_90.*target='cpu'"),
        ({"head_dim": 512}, r"head_dim 512 on sm_90.*head_dim <= 256"),
        ({"value_dim": 300}, r"value_dim 300 on sm_90.*value_dim <= 256"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_with_the_nearest_spec(fields: dict, text: str) -> None:
    spec = AttentionSpec(**{"tokens": 64, "heads": 2, "head_dim": 64, **fields})
    with pytest.raises(attncc.errors.UnsupportedError, match=text):
        attncc.compile(spec, "sm_90")


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(attncc.errors.TargetError, match=r"'h900' is unknown.*h100"):
        attncc.compile(AttentionSpec(tokens=(64,), heads=2, head_dim=64), "h900")


def test_calls_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case = Case("gate", torch.float32)
        leaves = case.leaves
        gradients(case.run(), leaves)


@pytest.mark.parametrize(("tokens", "refused"), [((128,), False), ((30, 48, 80), True)])
def test_a_self_check_that_no_machine_could_run_says_so(tokens: tuple[int, ...], refused: bool) -> None:
    spec = attncc.AttentionSpec(tokens=tokens, heads=24, head_dim=64, mask=masks.Full())
    assert ("`attncc verify SPEC.json` compares sampled rows" in attncc.compile(spec, target="cpu").source) == refused


def test_what_a_mask_hides_may_be_infinite() -> None:
    """1 / (q - k) where k < q: infinite on the diagonal, which is masked, and no gradient is NaN for it."""
    score = scores.Expression(text="s + slope[h] / float(q - k)")
    mask = masks.Predicate(text="k < q")
    spec = AttentionSpec(tokens=(40,), heads=2, head_dim=8, dtype="float64", mask=mask, scores=(score,))
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in (*[(1, 2, 40, 8)] * 3, (2,))]
    q, k, v, slope = leaves
    steps = torch.arange(40.0, dtype=torch.float64)[:, None] - torch.arange(40)
    below = steps > 0
    s = q @ k.mT * 8**-0.5 + slope[:, None, None] * torch.where(below, 1.0 / steps.clamp(min=1), 0.0)
    want = torch.softmax(s.masked_fill(~below, -1e300), -1).masked_fill(~below, 0.0) @ v
    got = attncc.compile(spec, "cpu")(q, k, v, slope=slope)
    weight = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_a_score_of_minus_infinity_masks_its_pair(target: str) -> None:
    """Rows that see nothing else are 0, their lse -inf, their gradients 0."""
    score = scores.Expression(text="select(k < least[q], -inf, s)", integers=("least",))
    spec = AttentionSpec(tokens=(30,), heads=1, head_dim=8, dtype="float64", scores=(score,), outputs=("output", "lse"))
    least = torch.tensor([30, 0, 7] * 10, dtype=torch.int32)
    q, k, v = (torch.randn(1, 1, 30, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    if target == "cpu":
        out, lse = attncc.compile(spec, "cpu")(q, k, v, least=least)
    else:
        out, lse = reference(lower(spec), {"q": q, "k": k, "v": v, "least": least}, (30,), (30,)).values()
    (dq,) = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), q)
    for row in range(30):
        s = (k[0, 0, least[row] :] @ q[0, 0, row]) * 8**-0.5
        want = torch.softmax(s, 0) @ v[0, 0, least[row] :]
        torch.testing.assert_close(out[0, 0, row], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[0, 0, row], torch.logsumexp(s, 0), rtol=1e-12, atol=1e-12)
    assert dq.isfinite().all() and not dq[0, 0, ::3].any()
