"""Normalizers at their edges: rows without a key, sinks of any size, one token, gradients that must stay finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attncc
from attncc import AttentionSpec, masks, normalizers, scores
from attncc.errors import UnsupportedError

LATE = masks.Causal(align="bottom_right")
SINKS: list[Any] = [0.0, -200.0, 200.0, "per_head", "key_value"]


def kernel(normalizer: Any, mask: Any = LATE, **fields: Any) -> attncc.Kernel:
    """Seven queries, five keys: the first two see none."""
    sizes = {"tokens": 7, "key_tokens": 5, "heads": 2, "head_dim": 4, "dtype": "float32", "mask": mask}
    return attncc.compile(AttentionSpec.model_validate({**sizes, "normalizer": normalizer, **fields}), "cpu")


def tensors(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, generator=generator) * scale for n in (7, 5, 5))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def learned(normalizer: Any) -> dict[str, Any]:
    made = {
        "per_head": {"sink": torch.randn(2)},
        "key_value": {"k_bias": torch.randn(2, 4), "v_bias": torch.randn(2, 4)},
    }.get(normalizer.sink, {})
    return {name: x.requires_grad_() for name, x in made.items()}


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("sink", SINKS)
def test_a_row_with_a_sink_alone(sink: Any, scale: float) -> None:
    normalizer = normalizers.Softmax(sink=sink)
    (q, k, v), inputs = tensors(scale), learned(normalizer)
    out, lse = kernel(normalizer, outputs=("output", "lse"))(q, k, v, **inputs)
    logit = torch.tensor(sink) if isinstance(sink, float) else inputs["sink"][:, None] if "sink" in inputs else None
    value = torch.zeros(()) if "v_bias" not in inputs else inputs["v_bias"][:, None]
    if logit is None:
        logit = (q[:, :, :2] * inputs["k_bias"][:, None]).sum(-1) / 2
    torch.testing.assert_close(out[:, :, :2], value.expand(2, 2, 2, 4))
    torch.testing.assert_close(lse[:, :, :2], logit.expand(2, 2, 2))
    (out.square().sum() + lse.sum()).backward()
    assert all(bool(x.grad is not None and x.grad.isfinite().all()) for x in (q, k, v, *inputs.values()))
    if sink != "key_value":
        assert q.grad is not None and not q.grad[:, :, :2].any()


def test_a_sink_of_zero_is_off_by_one() -> None:
    q, k, v = tensors()
    weights = ((q @ k.mT) / 2).exp()
    want = weights / (1 + weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(kernel(normalizers.Softmax(sink=0.0), masks.Full())(q, k, v), want)


def test_a_sink_of_minus_infinity_is_none() -> None:
    """And where there are no keys either, the row is empty; nothing is NaN."""
    q, k, v = tensors()
    sink = torch.full((2,), -math.inf, requires_grad=True)
    out, lse = kernel(normalizers.Softmax(sink="per_head"), outputs=("output", "lse"))(q, k, v, sink=sink)
    plain, plain_lse = kernel(normalizers.Softmax(), outputs=("output", "lse"))(q, k, v)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse)
    (found,) = torch.autograd.grad(out.sum(), [sink])
    assert not found.any()


def test_a_key_and_a_value_are_one_more_key() -> None:
    q, k, v = tensors()
    inputs = learned(normalizers.Softmax(sink="key_value"))
    keys, values = (torch.cat([x, inputs[name][None, :, None].expand(2, 2, 1, 4)], 2) for name, x in (("k_bias", k), ("v_bias", v)))
    want = scaled_dot_product_attention(q, keys, values)
    out = kernel(normalizers.Softmax(sink="key_value"), masks.Full())(q, k, v, **inputs)
    torch.testing.assert_close(out, want)
    leaves = [q, k, v, *inputs.values()]
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("divisor", [None, "keys", "allowed", "position"])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_relu_of_scores_that_are_never_positive(power: float, divisor: Any) -> None:
    q, k, v = tensors()
    spec = normalizers.ReLU(power=power, divisor=divisor)
    out = kernel(spec, scores=(scores.Scale(value=0.0),))(q, k, v)
    out.sum().backward()
    assert not out.any() and all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_divisors_of_relu() -> None:
    ones = torch.ones(1, 2, 7, 4), torch.ones(1, 2, 5, 4)
    rows = {
        divisor: kernel(normalizers.ReLU(divisor=divisor), scores=(scores.Scale(value=0.25),))(ones[0], ones[1], ones[1])[
            0, 0, :, 0
        ].tolist()
        for divisor in (None, "keys", "allowed", "position")
    }
    assert rows[None] == [0, 0, 1, 2, 3, 4, 5]
    assert rows["keys"] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert rows["allowed"] == [0, 0, 1, 1, 1, 1, 1]
    assert rows["position"] == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
@pytest.mark.parametrize("scale", [1.0, -60.0])
@pytest.mark.parametrize("weight", [*normalizers.WEIGHTS, "exp(min(s, 3)) + 1"])
def test_a_ratio_is_finite(weight: str, scale: float, epsilon: float) -> None:
    """Rows without a key, scores far below zero and far above; the LSE of a row without a key is that of epsilon alone."""
    q, k, v = tensors()
    ratio = normalizers.PositiveRatio(weight=weight, epsilon=epsilon)
    out, lse = kernel(ratio, scores=(scores.Scale(value=scale),), outputs=("output", "lse"))(q, k, v)
    assert not out[:, :, :2].any() and out.isfinite().all()
    assert torch.equal(lse[:, :, :2].exp(), torch.full((2, 2, 2), epsilon).log().exp())
    (out.square().sum() + lse[:, :, 2:].clamp(min=-50).sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    assert q.grad is not None and not q.grad[:, :, :2].any()


def test_a_row_whose_weights_all_vanish_is_zero() -> None:
    """softplus(-200) is no float32."""
    q, k, v = tensors()
    ratio = normalizers.PositiveRatio(row_scale=(0.0, -1.0))
    made = kernel(ratio, masks.Full(), scores=(scores.Scale(value=0.0), scores.Alibi(slopes=(-100.0, -100.0))), outputs=("output", "lse"))
    out, lse = made(q, k, v)
    out.sum().backward()
    assert not out[:, :, 0, :].isnan().any() and bool((lse == -math.inf).any())
    assert not out[lse == -math.inf].any() and all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_ratios_by_hand() -> None:
    q, k, v = tensors()
    s = q @ k.mT / 2
    place = torch.arange(1, 8).clamp(min=3)[:, None] - 2.0
    weights = torch.nn.functional.softplus(s * (0.5 * place.log() + 2))
    want = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(kernel(normalizers.PositiveRatio(row_scale=(0.5, 2.0)), masks.Full())(q, k, v), want)
    weights = torch.nn.functional.elu(s) + 1
    want = weights / (weights.sum(-1, keepdim=True) + 0.5) @ v
    torch.testing.assert_close(kernel(normalizers.PositiveRatio(weight="elu_plus_one", epsilon=0.5), masks.Full())(q, k, v), want)


def test_one_token() -> None:
    q = torch.randn(1, 1, 1, 4, requires_grad=True)
    made = attncc.compile(
        AttentionSpec(tokens=(1,), heads=1, head_dim=4, dtype="float32", normalizer=normalizers.Sigmoid(bias="minus_log_keys"))
    )
    torch.testing.assert_close(made(q, q, q), torch.sigmoid((q * q).sum() / 2) * q)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "sink text": ({"kind": "softmax", "sink": "per_key"}, "sink"),
    "sink infinite": ({"kind": "softmax", "sink": math.inf}, "sink"),
    "bias text": ({"kind": "sigmoid", "bias": "log_keys"}, "bias"),
    "bias NaN": ({"kind": "sigmoid", "bias": math.nan}, "bias"),
    "power below one": ({"kind": "relu", "power": 0.5}, "power"),
    "power too large": ({"kind": "relu", "power": 17}, "power"),
    "divisor": ({"kind": "relu", "divisor": "length"}, "divisor"),
    "weight unknown": ({"kind": "positive_ratio", "weight": "soft"}, "weight"),
    "weight without a score": ({"kind": "positive_ratio", "weight": "exp(1.0)"}, "weight"),
    "weight that is a mask": ({"kind": "positive_ratio", "weight": "s > 1.0"}, "weight"),
    "weight of code": ({"kind": "positive_ratio", "weight": "__import__('os').getpid() + s"}, "weight"),
    "weight below zero": ({"kind": "positive_ratio", "weight": "s * s"}, "weight"),
    "weight without a derivative": ({"kind": "positive_ratio", "weight": "pow(2.0, s)"}, "weight"),
    "row_scale": ({"kind": "positive_ratio", "row_scale": "per_key"}, "row_scale"),
    "row_scale of three": ({"kind": "positive_ratio", "row_scale": [1, 2, 3]}, "row_scale"),
    "epsilon": ({"kind": "positive_ratio", "epsilon": -1e-9}, "epsilon"),
    "unknown key": ({"kind": "relu", "sink": 0.0}, "sink"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_refused_by_name(name: str) -> None:
    normalizer, field = BAD[name]
    with pytest.raises(ValueError, match=rf"normalizer\.(softmax|sigmoid|relu|positive_ratio)\.{field}"):
        AttentionSpec.model_validate({"tokens": 8, "heads": 1, "head_dim": 4, "normalizer": normalizer})


@pytest.mark.parametrize(
    ("kind", "nearest"), [("entmax", "positive_ratio"), ("differential", "one spec for each branch"), ("linear", "elu_plus_one")]
)
def test_rows_of_no_single_walk_are_refused_by_name(kind: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"normalizer: {kind} is not built: its rows keep .* Nearest supported: .*{nearest}"):
        AttentionSpec.model_validate({"tokens": 8, "heads": 1, "head_dim": 4, "normalizer": {"kind": kind, "alpha": 1.5}})


def test_a_table_of_the_mask_may_not_have_the_name_of_a_learned_input() -> None:
    for name, sink in (("sink", "per_head"), ("k_bias", "key_value")):
        with pytest.raises(ValueError, match=f"mask: '{name}' is read as two different tables"):
            kernel({"kind": "softmax", "sink": sink}, masks.Segments(ids=name, key_ids="other"))


@pytest.mark.parametrize(
    ("inputs", "text"), [({}, r"^sink: is missing"), ({"sink": torch.zeros(3)}, r"^sink: has shape \[3\], must be \[2\]")]
)
def test_bad_learned_inputs(inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(attncc.errors.InputError, match=text):
        kernel(normalizers.Softmax(sink="per_head"))(*tensors(), **inputs)


def test_sinks_do_not_export_to_flex_attention() -> None:
    with pytest.raises(UnsupportedError, match=r"normalizer\.sink in FlexAttention.*sigmoid\(lse - sink\)"):
        kernel(normalizers.Softmax(sink=0.0)).spec.to_score_mod()
