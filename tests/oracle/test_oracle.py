"""The oracle against worked examples, closed forms, scalar loops, PyTorch and attn-gym."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from attn_gym.masks import (
    causal_mask,
    generate_doc_mask_mod,
    generate_natten,
    generate_prefix_lm_mask,
    generate_sliding_window,
)
from attn_gym.mods import generate_alibi_bias, generate_tanh_softcap
from torch.nn.functional import scaled_dot_product_attention

from tests.oracle.attention import alibi_slopes, attention, dense_in_dtype
from tests.oracle.inputs import random_inputs
from tests.oracle.masks import concrete, dense_mask, neighborhood_axis
from tests.oracle.rows import bisected_threshold, entmax

CAUSAL = {"kind": "causal"}
SOFTMAX, SIGMOID, RELU = {"kind": "softmax"}, {"kind": "sigmoid", "bias": -1.0}, {"kind": "relu"}
ENTMAX = [{"kind": "entmax", "alpha": alpha} for alpha in (1.3, 1.5, 2.0)]
LSSAR = {"kind": "lssar", "power": 2.0, "offset": 0.5}


def spec_of(**fields: Any) -> dict[str, Any]:
    return {"tokens": [12], "heads": 4, "head_dim": 8} | fields


def mask_of(mask: dict[str, Any], inputs: dict[str, Any] | None = None, batch: int = 1, **fields: Any) -> np.ndarray:
    return dense_mask(spec_of(mask=mask, **fields), inputs or {}, batch)


def predicate(text: str, **fields: Any) -> np.ndarray:
    return mask_of({"kind": "predicate", "text": text}, **fields)


def double_inputs(spec: dict[str, Any], seed: int = 0) -> tuple[Any, ...]:
    """(q, k, v, inputs) in float64, every floating-point one a leaf that wants a gradient."""
    q, k, v, inputs = random_inputs(spec, batch=2, seed=seed, dtype=torch.float64)
    for tensor in (q, k, v, *inputs.values()):
        tensor.requires_grad_(tensor.is_floating_point())
    return q, k, v, inputs


# Neighborhoods: (length, window, stride, dilation, causal) and the keys of each query, worked out by hand from the definitions.
def runs(*parts: tuple[int, int]) -> list[list[int]]:
    return [list(range(first, last + 1)) for first, last in parts]


EVEN, ODD = [0, 2, 4], [1, 3, 5]
WORKED = {
    "na odd": ((5, 3, 1, 1, False), runs((0, 2), (0, 2), (1, 3), (2, 4), (2, 4))),
    "na even": ((6, 4, 1, 1, False), runs((0, 3), (0, 3), (0, 3), (1, 4), (2, 5), (2, 5))),
    "dina unequal classes": ((7, 3, 1, 2, False), [EVEN, ODD, EVEN, ODD, [2, 4, 6], ODD, [2, 4, 6]]),
    "gna": ((8, 4, 2, 1, False), [row for row in runs((0, 3), (1, 4), (3, 6), (4, 7)) for _ in range(2)]),
    "gna stride tail": ((7, 4, 3, 1, False), runs((0, 3), (0, 3), (0, 3), (2, 5), (2, 5), (2, 5), (3, 6))),
    "gna causal": ((6, 3, 2, 1, True), runs((0, 0), (0, 1), (1, 2), (1, 3), (3, 4), (3, 5))),
    "gna dilated": ((7, 2, 2, 2, False), [[0, 2], [1, 3], [0, 2], [1, 3], [4, 6], [3, 5], [4, 6]]),
    "blocked tail": ((5, 2, 2, 1, False), runs((0, 1), (0, 1), (2, 3), (2, 3), (3, 4))),
    "block causal": ((6, 3, 3, 1, True), runs((0, 0), (0, 1), (0, 2), (3, 3), (3, 4), (3, 5))),
    "grid attention": ((8, 4, 1, 2, False), [list(range(q % 2, 8, 2)) for q in range(8)]),
}


@pytest.mark.parametrize(("options", "keys"), WORKED.values(), ids=WORKED)
def test_neighborhood_worked_examples(options: tuple[Any, ...], keys: list[list[int]]) -> None:
    assert [np.flatnonzero(row).tolist() for row in neighborhood_axis(*options)] == keys


@pytest.mark.parametrize("seed", range(60))
def test_neighborhood_loop_equals_its_closed_form(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length, dilation = int(rng.integers(4, 30)), int(rng.integers(1, 4))
    window = int(rng.integers(1, length // dilation + 1))
    stride, causal = int(rng.integers(1, window + 1)), bool(seed % 2)
    i, j, group_length = f"(q // {dilation})", f"(k // {dilation})", f"((nq - q % {dilation} - 1) // {dilation} + 1)"
    lead = stride - 1 if causal else stride // 2
    leader = f"min({i} // {stride} * {stride} + {lead}, {group_length} - 1)"
    start = f"min(max({leader} - {window} // 2, 0), {group_length} - {window})"
    inside = f"{leader} - {window} < {j} <= {i}" if causal else f"{start} <= {j} < {start} + {window}"
    closed = predicate(f"q % {dilation} == k % {dilation} and {inside}", tokens=[length])[0, 0]
    np.testing.assert_array_equal(closed, neighborhood_axis(length, window, stride, dilation, causal))


def test_neighborhood_of_three_axes_is_the_conjunction_of_its_axes() -> None:
    grid = [3, 6, 7]
    options: Any = {"window": [2, 4, 3], "stride": [1, 2, 3], "dilation": [1, 1, 2], "causal": [True, False, False]}
    allowed = mask_of({"kind": "neighborhood", **options}, tokens=grid)[0, 0].reshape(grid * 2)
    by_axis = [neighborhood_axis(*each) for each in zip(grid, *options.values(), strict=True)]
    for q in np.ndindex(*grid):
        for k in np.ndindex(*grid):
            assert allowed[(*q, *k)] == all(axis[a, b] for axis, a, b in zip(by_axis, q, k, strict=True))


GRIDS = [([5], None), ([8], [9]), ([8, 8], None), ([8], [8, 1])]


@pytest.mark.parametrize(("tokens", "key_tokens"), GRIDS)
def test_neighborhood_that_does_not_fit_is_refused(tokens: list[int], key_tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"neighborhood|window"):
        mask_of({"kind": "neighborhood", "window": [3], "dilation": [2]}, tokens=tokens, key_tokens=key_tokens)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("nq", "nk"), [(4, 7), (7, 4), (5, 5)])
def test_causal_and_sliding_window_by_scalar_loop(align: str, nq: int, nk: int) -> None:
    offset = nk - nq if align == "bottom_right" else 0
    pairs = [[(q, k) for k in range(nk)] for q in range(nq)]
    grid: dict[str, Any] = {"tokens": [nq], "key_tokens": [nk]}
    expected = [[k <= q + offset for q, k in row] for row in pairs]
    assert mask_of(CAUSAL | {"align": align}, **grid)[0, 0].tolist() == expected
    for left, right in [(2, 1), (None, 0), (1, None)]:
        window = {"kind": "sliding_window", "left": left, "right": right, "align": align}
        low, high = -math.inf if left is None else -left, math.inf if right is None else right
        expected = [[low <= k - (q + offset) <= high for q, k in row] for row in pairs]
        assert mask_of(window, **grid)[0, 0].tolist() == expected


def test_segments_prefix_sinks_and_combinators() -> None:
    ids, key_ids = torch.tensor([[1, 1, 2, 3]]), torch.tensor([[2, 1, 9]])
    segments = {"kind": "segments", "ids": "segments", "key_ids": "others"}
    allowed = mask_of(segments, {"segments": ids, "others": key_ids}, tokens=[4], key_tokens=[3])
    np.testing.assert_array_equal(allowed, (ids[:, None, :, None] == key_ids[:, None, None, :]).numpy())
    prefix, sinks = {"kind": "prefix", "length": 3}, {"kind": "sinks", "count": 2}
    combined = {"kind": "or", "masks": [sinks, {"kind": "and", "masks": [prefix, {"kind": "not", "mask": CAUSAL}]}]}
    expected = [[k < 2 or (k < 3 and k > q) for k in range(5)] for q in range(5)]
    assert mask_of(combined, tokens=[5])[0, 0].tolist() == expected


def test_predicate_language() -> None:
    swin = predicate("(q0 - 2) // 4 == (k0 - 2) // 4 and (q1 - 5) % 3 == k1 % 3", tokens=[9, 4])[0, 0]
    for q, k in np.ndindex(36, 36):
        same = (q // 4 - 2) // 4 == (k // 4 - 2) // 4 and (q % 4 - 5) % 3 == k % 4 % 3  # Python's floor semantics
        assert swin[q, k] == same
    reach = torch.tensor([[1, 2, 0, 5], [0, 0, 3, 1]], dtype=torch.int8)
    text = {"kind": "predicate", "text": "not abs(q - k) > max(reach[b, h], 1, -h) or 2 <= k < min(4, nk - nq) != 0"}
    allowed = mask_of(text, {"reach": reach}, batch=2, tokens=[6], key_tokens=[8])
    assert allowed.shape == (2, 4, 6, 8)
    for b, h, q, k in np.ndindex(*allowed.shape):
        assert allowed[b, h, q, k] == (abs(q - k) <= max(int(reach[b, h]), 1) or 2 <= k < min(4, 2))


@pytest.mark.parametrize(
    "text", ["q.real", "exec('1')", "q / k", "q ** 2", "lambda: q", "True", "q if k else h", "t[q + 1]", "x", "q in k"]
)
def test_predicate_grammar_is_closed(text: str) -> None:
    with pytest.raises(ValueError, match=r"grammar|indexed"):
        mask_of({"kind": "predicate", "text": text}, {"t": torch.zeros(13)})


def test_concrete_fills_null_axes() -> None:
    assert concrete({"tokens": [None, 4], "key_tokens": [2, None]}, [3, 5])["key_tokens"] == [2, 5]
    with pytest.raises(ValueError, match="2 null axes"):
        concrete({"tokens": [None, None]}, [3])
    spec = spec_of(tokens=[None, 4], mask={"kind": "neighborhood", "window": [3, 3]})
    q, k, v, inputs = random_inputs(spec, 1, 0, torch.float64, [5])
    same = attention(concrete(spec, [5]), q, k, v, inputs)["output"]
    assert q.shape[2] == 20 and torch.equal(attention(spec, q, k, v, inputs)["output"], same)


@pytest.mark.parametrize("normalizer", [SOFTMAX, SIGMOID, RELU], ids=lambda n: n["kind"])
@pytest.mark.parametrize("seed", range(3))
def test_attention_by_scalar_loop(normalizer: dict[str, Any], seed: int) -> None:
    """Unequal head counts, a mask with empty rows, every score map, and LSE by torch.logsumexp."""
    scores = [
        {"kind": "scale", "value": -0.3},
        {"kind": "softcap", "cap": 2.0},
        {"kind": "alibi", "trainable": True},
        {"kind": "relative_bias", "extent": [2]},
    ]
    mask = {"kind": "segments", "ids": "segments", "key_ids": "others"}
    heads = {"heads": 4, "key_heads": 2, "value_heads": 1, "value_dim": 3}
    spec = spec_of(tokens=[5], key_tokens=[7], mask=mask, scores=scores, normalizer=normalizer, **heads)
    q, k, v, inputs = random_inputs(spec, 2, seed, torch.float64)
    result = attention(spec, q, k, v, inputs)
    for b, h, i in np.ndindex(2, 4, 5):
        keys = [j for j in range(7) if inputs["segments"][b, i] == inputs["others"][b, j]]
        s = torch.zeros(len(keys), dtype=torch.float64)
        for slot, j in enumerate(keys):
            capped = 2 * math.tanh(-0.3 * float(q[b, h, i] @ k[b, h // 2, j]) / 2)
            bias = inputs["relative_bias"][h, max(-1, min(1, j - i)) + 1]
            s[slot] = capped - inputs["alibi_slopes"][h] * abs(i + 2 - j) + bias
        weights = {"softmax": s.softmax(0), "sigmoid": 1 / (1 + torch.exp(1 - s)), "relu": s.clamp(min=0)}
        expected = weights[normalizer["kind"]] @ v[b, 0, keys]
        torch.testing.assert_close(result["output"][b, h, i], expected, rtol=1e-12, atol=1e-12)
        if normalizer is SOFTMAX:
            torch.testing.assert_close(result["lse"][b, h, i], torch.logsumexp(s, 0), rtol=1e-12, atol=1e-12)


def test_sdpa_agrees() -> None:
    spec = spec_of(tokens=[9], key_tokens=[13], key_heads=2, scores=[{"kind": "scale", "value": 0.7}])
    q, k, v, _ = random_inputs(spec, 3, 1, torch.float64)
    cases: list[tuple[Any, Any]] = [
        ({"kind": "full"}, {}),
        (CAUSAL, {"is_causal": True}),
        (CAUSAL | {"align": "bottom_right"}, {"attn_mask": torch.ones(9, 13, dtype=torch.bool).tril(4)}),
    ]
    for mask, options in cases:
        expected = scaled_dot_product_attention(q, k, v, scale=0.7, enable_gqa=True, **options)
        torch.testing.assert_close(attention(spec | {"mask": mask}, q, k, v, {})["output"], expected)


LOOK_BACK = {"kind": "sliding_window", "left": 3, "right": 0}
PREFIX_LM = {"kind": "or", "masks": [{"kind": "prefix", "length": 5}, CAUSAL]}
NEIGHBORHOOD = {"kind": "neighborhood", "window": [3, 5]}
DOCUMENTS = {"kind": "and", "masks": [CAUSAL, {"kind": "segments", "ids": "segments", "key_ids": None}]}
OFFSETS = torch.tensor([0, 2, 5, 16])
# tokens, mask, scores, and what attn-gym calls it. Its ALiBi is one-sided, so it is compared under a causal mask.
GYM: dict[str, tuple[Any, ...]] = {
    "causal": ([16], CAUSAL, [], causal_mask, None),
    "sliding window": ([16], LOOK_BACK, [], generate_sliding_window(3), None),
    "prefix": ([16], PREFIX_LM, [], generate_prefix_lm_mask(5), None),
    "document": ([16], DOCUMENTS, [], generate_doc_mask_mod(causal_mask, OFFSETS), None),
    "alibi": ([16], CAUSAL, [{"kind": "alibi"}], causal_mask, generate_alibi_bias(4)),
    "softcap": ([16], CAUSAL, [{"kind": "softcap", "cap": 2}], causal_mask, generate_tanh_softcap(2)),
    "natten": ([7, 7], NEIGHBORHOOD, [], generate_natten(7, 7, 3, 5), None),
}


@pytest.mark.parametrize(("tokens", "mask", "scores", "mask_mod", "score_mod"), GYM.values(), ids=GYM)
def test_attn_gym_agrees(tokens: Any, mask: Any, scores: Any, mask_mod: Any, score_mod: Any) -> None:
    spec = spec_of(tokens=tokens, mask=mask, scores=scores)
    q, k, v, inputs = random_inputs(spec, 1, 2, torch.float64)
    if "segments" in inputs:
        inputs["segments"] = torch.repeat_interleave(OFFSETS.diff())[None]
    at = torch.meshgrid(*(torch.arange(n) for n in (1, 4, q.shape[2], q.shape[2])), indexing="ij")
    allowed = mask_mod(*at)[:, :1]
    np.testing.assert_array_equal(dense_mask(spec, inputs, 1), allowed.numpy())
    s = q @ k.mT / math.sqrt(8)
    s = s if score_mod is None else score_mod(s, *at)
    expected = s.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attention(spec, q, k, v, inputs)["output"], expected)


def test_alibi_slopes_between_powers_of_two() -> None:
    assert alibi_slopes(2) == [2.0**-4, 2.0**-8]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


@pytest.mark.parametrize("normalizer", [SOFTMAX, SIGMOID, RELU, *ENTMAX, LSSAR], ids=str)
@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_empty_rows(normalizer: dict[str, Any], mode: str) -> None:
    """Queries 0 and 1 have no key: the gate sees exactly 0, no gradient passes, nothing is NaN."""
    gate = {"activation": "silu", "granularity": "shared", "mode": mode}
    mask = {"kind": "predicate", "text": "k + 2 <= q"}
    spec = spec_of(mask=mask, normalizer=normalizer, gate=gate, scores=[{"kind": "alibi", "trainable": True}])
    q, k, v, inputs = double_inputs(spec)
    result = attention(spec, q, k, v, inputs)
    output = result["output"]
    silu = torch.nn.functional.silu(inputs["gate"])
    expected = silu if mode == "add" else torch.zeros_like(silu)
    assert torch.equal(output[:, :, :2], expected[:, :, :2].expand(2, 4, 2, 8))
    loss = output.square().sum()
    if normalizer is SOFTMAX:
        assert (result["lse"][:, :, :2] == -torch.inf).all() and result["lse"][:, :, 2:].isfinite().all()
        loss = loss + result["lse"].exp().sum()
    leaves = [q, k, v, inputs["alibi_slopes"], inputs["gate"]]
    with torch.autograd.set_detect_anomaly(True):  # not even an intermediate gradient is NaN
        dq, dk, dv, *others = torch.autograd.grad(loss, leaves)
    assert not dq[:, :, :2].any() and not dk[:, :, 10:].any() and not dv[:, :, 10:].any()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in (dq, dk, dv, *others))


@pytest.mark.parametrize("normalizer", [SOFTMAX, SIGMOID, *ENTMAX, LSSAR], ids=str)
def test_gradients_by_finite_differences(normalizer: dict[str, Any]) -> None:
    gate = {"activation": "sigmoid", "granularity": "elementwise", "mode": "multiply"}
    scores = [{"kind": "softcap", "cap": 3.0}, {"kind": "relative_bias", "extent": [2, 2], "table": "bias"}]
    shape = {"tokens": [2, 3], "heads": 2, "key_heads": 1, "head_dim": 3}
    mask = {"kind": "predicate", "text": "k < q"}
    spec = spec_of(mask=mask, scores=scores, normalizer=normalizer, gate=gate, **shape)
    q, k, v, inputs = double_inputs(spec)

    def run(q: Any, k: Any, v: Any, bias: Any, gate: Any) -> tuple[Any, ...]:
        result = attention(spec, q, k, v, {"bias": bias, "gate": gate})
        return (result["output"], *(result[name][:, :, 1:] for name in result.keys() - {"output"}))

    assert torch.autograd.gradcheck(run, (q, k, v, inputs["bias"], inputs["gate"]))


@pytest.mark.parametrize("spread", [0.01, 0.5, 5.0, 500.0])
@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.9, 2.0])
def test_entmax_by_its_definition(alpha: float, spread: float) -> None:
    """Rows add up to 1, the formula holds with one threshold, and bisection agrees with sorting."""
    s = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 50)) * spread)
    p = entmax(alpha, s, torch.ones_like(s, dtype=torch.bool))
    torch.testing.assert_close(p.sum(-1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-10)
    z = (alpha - 1) * (s - s.amax(-1, keepdim=True))
    tau = bisected_threshold(z, alpha)
    torch.testing.assert_close(p, (z - tau).clamp(min=0) ** (1 / (alpha - 1)), rtol=1e-9, atol=1e-10)
    if spread >= 5:
        assert (p == 0).any()


def test_softmax_is_the_limit_of_entmax() -> None:
    s = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 9)))
    torch.testing.assert_close(entmax(1.0001, s, s < 9), s.softmax(-1), rtol=1e-3, atol=1e-4)


def test_lssar_by_scalar_loop() -> None:
    """Two sums, one after the other; and under no re-weighting it is the ratio alone."""
    spec = spec_of(tokens=[7], mask=CAUSAL, normalizer={"kind": "lssar", "power": 2.0, "offset": 0.5, "row_scale": [0.5, 1.0]})
    q, k, v, _ = random_inputs(spec, 1, 0, torch.float64)
    result = attention(spec, q, k, v, {})
    for h, i in np.ndindex(4, 7):
        c = 0.5 * math.log(i + 1) + 1
        first = [math.log1p(math.exp(c * float(q[0, h, i] @ k[0, h, j]) / math.sqrt(8))) for j in range(i + 1)]
        second = [max((i + 1) * a / sum(first) - 0.5, 0.0) ** 2 for a in first]
        expected = sum(w * v[0, h, j] for j, w in enumerate(second)) / sum(second)
        torch.testing.assert_close(result["output"][0, h, i], expected, rtol=1e-12, atol=1e-12)
        assert float(result["lse"][0, h, i]) == pytest.approx(math.log(sum(second)))
    plain = spec | {"normalizer": {"kind": "lssar", "power": 1.0, "offset": 0.0}}
    ratio = spec | {"normalizer": {"kind": "positive_ratio"}}
    torch.testing.assert_close(attention(plain, q, k, v, {})["output"], attention(ratio, q, k, v, {})["output"])


@pytest.mark.parametrize(("granularity", "shape"), [("elementwise", (4, 5)), ("headwise", (4, 1)), ("shared", (1, 5))])
def test_random_inputs_are_what_the_spec_names(granularity: str, shape: tuple[int, int]) -> None:
    gate = {"activation": "sigmoid", "granularity": granularity, "mode": "multiply"}
    near = {"kind": "predicate", "text": "k < far[h, q] * 4"}
    mask = {"kind": "and", "masks": [{"kind": "segments", "ids": "ids"}, near]}
    spec = spec_of(tokens=[3, 8], value_dim=5, gate=gate, mask=mask)
    q, _, v, inputs = random_inputs(spec, 2, 3, torch.bfloat16)
    assert v.shape == (2, 4, 24, 5) and q.dtype == torch.bfloat16
    assert {name: tuple(table.shape) for name, table in inputs.items()} == {
        "ids": (2, 24), "far": (4, 24), "gate": (2, shape[0], 24, shape[1])
    }  # fmt: skip
    tables = [random_inputs(spec, 2, seed, torch.float32)[3]["ids"] for seed in range(8)]
    ascending = [bool((table.diff() >= 0).all()) for table in tables]
    assert True in ascending and False in ascending


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2), (torch.float32, 1e-5)])
def test_dense_in_dtype_errs_as_its_dtype_does(dtype: torch.dtype, bound: float) -> None:
    spec = spec_of(mask=CAUSAL, scores=[{"kind": "alibi"}])
    q, k, v, inputs = random_inputs(spec, 2, 4, dtype)
    naive, exact = dense_in_dtype(spec, q, k, v, inputs)["output"], attention(spec, q, k, v, inputs)["output"]
    assert naive.dtype == dtype
    assert bound / 1000 < float((naive.double() - exact).abs().max()) < bound
