"""Head routing: rows that no head computes, weights and their gradients, and inputs that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc import AttentionSpec
from attncc.cli.calling import prepared
from attncc.cli.verification import verified
from attncc.errors import InputError
from attncc.runtime.blocked.bands import BandPlan
from attncc.runtime.blocked.problem import problem
from attncc.runtime.blocked.tiles import TilePlan
from attncc.runtime.operands import Operands
from attncc.runtime.program import find_program
from tests.oracle import attention, random_inputs
from tests.runtime.cases import CAUSAL, GATE, WITH_LSE, gradients, neighborhood, spec

HEADS = 4
MIXTURE = {"kind": "mixture_of_heads", "shared": 0, "top_k": 2}
RELU = {"kind": "relu", "shared": 0}
ALIBI = {"kind": "alibi", "slopes": None, "trainable": True}


def weights(rule: str, tokens: int) -> Tensor:
    """Weights `[2, HEADS, tokens]` by a rule of who is routed."""
    made = torch.rand(2, HEADS, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 0.1
    match rule:
        case "no head at all":
            made.zero_()
        case "a token without a head":
            made[:, :, tokens // 2] = 0
        case "a head without a token":
            made[:, 2] = 0
        case "one head only":
            made[:, [0, 1, 3]] = 0
        case "one token a head":
            made[..., 1:] = 0
        case "the last token":
            made[..., :-1] = 0
        case "every other token":
            made[0, :, ::2], made[1, :, 1::2] = 0, 0
    return made


RULES = ["all heads", "no head at all", "a token without a head", "a head without a token", "one head only", "one token a head",
         "the last token", "every other token"]  # fmt: skip


def compared(json: dict[str, Any], inputs: dict[str, Any], tokens: int | None = None) -> None:
    """Results and gradients of the kernel for the CPU and of the oracle are equal."""
    q, k, v, drawn = random_inputs(json, 2, 0, torch.float64, () if tokens is None else (tokens,))
    inputs = {**drawn, **inputs}
    leaves = {name: x.requires_grad_() for name, x in {"q": q, "k": k, "v": v, **inputs}.items() if x.is_floating_point()}
    kernel = attncc.compile(AttentionSpec.model_validate(json), "cpu")
    out = kernel(q, k, v, **inputs)
    got = dict(zip(json.get("outputs", ["output"]), out if isinstance(out, tuple) else (out,)))
    want = {name: x for name, x in attention(json, q, k, v, inputs).items() if name in got}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12)
    ours, theirs = gradients(got, leaves), gradients(want, leaves)
    for name in leaves:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("routing", [MIXTURE, {**MIXTURE, "shared": 1}, RELU, {**RELU, "shared": 2}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_who_is_routed(rule: str, routing: dict[str, Any], poisoned: None) -> None:
    json = spec([150], heads=HEADS, key_heads=2, mask=CAUSAL, routing=routing, outputs=WITH_LSE, gate=GATE)
    compared(json, {"routing": weights(rule, 150)})


@pytest.mark.parametrize("tokens", [1, 2, 3, 127, 129])
@pytest.mark.parametrize("rule", RULES)
def test_short_sequences(rule: str, tokens: int, poisoned: None) -> None:
    compared(spec([None], heads=HEADS, mask=CAUSAL, routing=MIXTURE, outputs=WITH_LSE), {"routing": weights(rule, tokens)}, tokens)


@pytest.mark.parametrize("rule", RULES)
def test_documents_whose_tokens_choose_no_head(rule: str, poisoned: None) -> None:
    """Documents of one token, and whole documents that one head, or every head, leaves out."""
    made, ids = weights(rule, 90), torch.arange(90, dtype=torch.int32)[None].expand(2, 90) // 30
    made[0, :, 30:60], made[1, 1, :30] = 0, 0
    ids = torch.where(torch.arange(90) == 89, 7, ids).int()
    both = {"kind": "and", "masks": [CAUSAL, {"kind": "segments", "ids": "segments", "key_ids": None}]}
    compared(spec([90], heads=HEADS, mask=both, routing=MIXTURE, outputs=WITH_LSE), {"routing": made, "segments": ids})


@pytest.mark.parametrize("rule", RULES)
def test_tiles_stay_in_their_residue_class(rule: str) -> None:
    compared(spec([64], heads=HEADS, mask=neighborhood([5], [2], [3], [False]), routing=MIXTURE), {"routing": weights(rule, 64)})


def test_another_call_has_rows_of_its_own() -> None:
    for rule in RULES:
        compared(
            spec([8, 9], heads=HEADS, mask=neighborhood([3, 5], [1, 2], [1, 1], [True, False]), routing=MIXTURE),
            {"routing": weights(rule, 72)},
        )


def test_score_maps_see_where_rows_stood(poisoned: None) -> None:
    """Tiles of routed rows that lie alike, but for a token that one of them lacks."""
    made = weights("all heads", 1035)
    made[:, :, 60::97] = 0
    window = {"kind": "sliding_window", "left": 40, "right": 7, "align": "top_left"}
    compared(spec([1035], heads=HEADS, mask=window, routing=MIXTURE, scores=[ALIBI]), {"routing": made})


@pytest.mark.parametrize("shared", [0, 2])
def test_logits_of_minus_infinity_are_not_routed(shared: int) -> None:
    made = weights("all heads", 40)
    made[:, shared:, ::3] = -torch.inf
    compared(spec([40], heads=HEADS, mask=CAUSAL, routing={**RELU, "shared": shared}), {"routing": made})


def test_an_empty_batch() -> None:
    kernel = attncc.compile(AttentionSpec.model_validate(spec([20], heads=HEADS, routing=MIXTURE)), "cpu")
    q = torch.randn(0, HEADS, 20, 8, dtype=torch.float64, requires_grad=True)
    routing = torch.zeros(0, HEADS, 20, dtype=torch.float64, requires_grad=True)
    out = kernel(q, q, q, routing=routing)
    out.sum().backward()
    assert out.shape == q.shape and routing.grad is not None and routing.grad.shape == routing.shape


def test_unchosen_weights_have_no_gradient_and_shared_ones_always_do() -> None:
    json = spec([40], heads=HEADS, routing={**MIXTURE, "shared": 1})
    q, k, v, _ = random_inputs(json, 2, 0, torch.float64)
    made = weights("every other token", 40).requires_grad_()
    attncc.compile(AttentionSpec.model_validate(json), "cpu")(q, k, v, routing=made).sum().backward()
    assert made.grad is not None
    assert (made.grad[:, 1:][made.detach()[:, 1:] == 0] == 0).all()
    assert (made.grad[:, :1] != 0).all() and (made.grad[made.detach() != 0] != 0).all()


@pytest.mark.parametrize("kind", ["head_mask", "head_scale"])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("value", [0, 1])
def test_all_heads_on_and_all_heads_off(kind: str, per_batch: bool, value: int) -> None:
    shape = (2, HEADS) if per_batch else (HEADS,)
    table = torch.full(shape, bool(value)) if kind == "head_mask" else torch.full(shape, float(value), dtype=torch.float64)
    compared(spec([33], heads=HEADS, mask=CAUSAL, gate=GATE, routing={"kind": kind, "per_batch": per_batch}), {kind: table})


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing": (MIXTURE, {}, r"^routing: is missing; it is \[B, 4, NQ\] of float32"),
    "shape": (MIXTURE, {"routing": torch.ones(2, 20, HEADS)}, r"^routing: has shape \[2, 20, 4\], must be \[B=2, 4, NQ=20\]"),
    "dtype": (RELU, {"routing": torch.ones(2, HEADS, 20).half()}, r"^routing: has dtype float16, must be float32"),
    "scale": ({"kind": "head_scale"}, {"head_scale": torch.ones(2, HEADS)}, r"^head_scale: has 2 axes, must be \[4\]"),
    "scale by element": (
        {"kind": "head_scale", "per_batch": True},
        {"head_scale": torch.ones(1, HEADS)},
        r"^head_scale: has shape \[1, 4\], must be \[B=2, 4\]",
    ),
    "mask": ({"kind": "head_mask"}, {"head_mask": torch.ones(HEADS)}, r"^head_mask: has dtype float32, must be int32 or bool"),
    "unknown": ({"kind": "head_mask"}, {"routing": torch.ones(2, HEADS, 20)}, r"^routing: is no input of this spec"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    routing, inputs, problem = BAD[name]
    kernel = attncc.compile(AttentionSpec.model_validate(spec([20], heads=HEADS, dtype="float32", routing=routing)), "cpu")
    q = torch.randn(2, HEADS, 20, 8)
    with pytest.raises(InputError, match=problem):
        kernel(q, q, q, **inputs)


@pytest.mark.parametrize(
    ("routing", "problem"),
    [
        ({"kind": "mixture_of_heads", "shared": 2, "top_k": 3}, r"routing: shared \+ top_k = 5 heads for a token, of heads=4"),
        ({"kind": "mixture_of_heads", "top_k": 0}, r"routing.mixture_of_heads.top_k\n.*greater than or equal to 1"),
        ({"kind": "mixture_of_heads", "shared": -1, "top_k": 1}, r"routing.mixture_of_heads.shared\n.*greater than or equal to 0"),
        ({"kind": "relu", "shared": 4}, r"routing: shared = 4 leaves none of heads=4 to route"),
        ({"kind": "head_scale", "per_batch": "some"}, r"routing.head_scale.per_batch\n.*valid boolean"),
        ({"kind": "head_mask", "per_head": True}, r"routing.head_mask.per_head\n.*Extra inputs"),
        ({"kind": "switch"}, r"routing\n.*'mixture_of_heads', 'relu', 'head_scale', 'head_mask'"),
    ],
)
def test_routings_that_contradict_are_refused(routing: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        AttentionSpec.model_validate(spec([20], heads=HEADS, routing=routing))


def test_a_mask_may_not_read_another_table_of_the_same_name() -> None:
    with pytest.raises(ValueError, match=r"routing: 'routing' is read as two different tables"):
        AttentionSpec.model_validate(spec([20], heads=HEADS, mask={"kind": "predicate", "text": "routing[h] > 0"}, routing=RELU))


# ---- work ------------------------------------------------------------------------------------------------------------------------


def plans_of(mask: dict[str, Any], routing: dict[str, Any] | None, made: Tensor, **inputs: Tensor) -> list[Any]:
    """What the blocked engine visits: its plans, once for each (batch element, head)."""
    batch, heads, tokens = made.shape
    json = spec([tokens], heads=heads, key_heads=1, head_dim=1, dtype="float32", mask=mask, routing=routing)
    program = find_program(attncc.compile(AttentionSpec.model_validate(json), "cpu")._name)
    q, k = torch.zeros(batch, heads, tokens, 1), torch.zeros(batch, 1, tokens, 1)
    found = problem(program.kernel, Operands(q, k, k, {"routing": made, **inputs}, (tokens,), (tokens,)))
    return [plan for heads_of, plan in found.plans for _ in heads_of]


def visited(plan: BandPlan | TilePlan) -> int:
    """Pairs of a query and a key that are computed (bands), or of a row tile and a key tile."""
    return plan.pairs() if isinstance(plan, BandPlan) else len(plan.full.tiles) + len(plan.partial.tiles)


COUNTED = {
    "bands": (CAUSAL, 256 * 8192),
    "tiles": ({"kind": "predicate", "text": "k <= q and (q - k) % 8192 != 8191"}, 8192 // 128),
}


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
@pytest.mark.parametrize("name", COUNTED)
def test_only_routed_rows_are_visited(name: str, top_k: int) -> None:
    """At top-k of H heads, k / H of what all heads visit, 5 % more at most, and a row of tiles for what is left of each head."""
    mask, row = COUNTED[name]
    batch, heads, tokens = 2, 8, 8192
    scores = torch.rand(batch, heads, tokens, generator=torch.Generator().manual_seed(1)) + 0.1
    made = torch.where(scores.argsort(1).argsort(1) < top_k, scores, 0.0)
    some, every = (plans_of(mask, routing, made) for routing in ({**MIXTURE, "top_k": top_k}, None))
    assert {type(plan).__name__ for plan in (*some, *every)} == {"BandPlan" if name == "bands" else "TilePlan"}
    dense, least = sum(map(visited, every)), top_k / heads
    assert least * dense * 0.98 <= sum(map(visited, some)) <= 1.05 * least * dense + row * batch * heads


def test_heads_without_a_token_visit_nothing() -> None:
    assert len(plans_of(CAUSAL, MIXTURE, weights("one head only", 300).float())) == 2
    assert plans_of(CAUSAL, MIXTURE, weights("no head at all", 300).float()) == []


@pytest.mark.parametrize(("shared", "top_k"), [(0, 2), (1, 1)])
def test_verify_and_bench_draw_as_many_heads_as_the_spec_says(shared: int, top_k: int) -> None:
    json = spec([40], heads=HEADS, mask=CAUSAL, routing={**MIXTURE, "shared": shared, "top_k": top_k})
    drawn = prepared(AttentionSpec.model_validate(json), "cpu", None, 2, 0).tensors["routing"]
    assert ((drawn != 0).sum(1) == shared + top_k).all() and (drawn[:, :shared] != 0).all()
    assert all(found.ok for found in verified(AttentionSpec.model_validate(json), "cpu", None, 2, 0, lambda text: None))
