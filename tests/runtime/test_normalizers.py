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
from attncc.runtime import ops
from attncc.runtime.program import make_programs

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


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0, 3e4])
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_entmax_rows_add_up_to_one(alpha: float, scale: float) -> None:
    """Uniform rows, rows of one weight, rows without a key; gradients are finite, and those of the sum of weights vanish."""
    q, k, v = tensors()
    made = kernel(normalizers.Entmax(alpha=alpha), scores=(scores.Scale(value=scale),))
    ones = torch.ones_like(v).requires_grad_()
    out = made(q, k, ones)
    torch.testing.assert_close(out[:, :, 2:], torch.ones(2, 2, 5, 4))
    assert not out[:, :, :2].any()
    dq, dk, dv = torch.autograd.grad(out.sum(), [q, k, ones])
    assert not dv.isnan().any() and max(float(dq.abs().max()), float(dk.abs().max())) <= 1e-4 * max(scale, 1.0)
    out = made(q, k, v)
    grads = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(x.isfinite().all() for x in grads) and not grads[0][:, :, :2].any()
    if scale == 0.0:
        torch.testing.assert_close(out[:, :, -1], v.mean(2))
    if scale == 3e4:
        best = ((q @ k.mT)[:, :, -1] * scale).argmax(-1)
        torch.testing.assert_close(out[:, :, -1], v.gather(2, best[..., None, None].expand(2, 2, 1, 4))[:, :, 0])


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_ties_share_their_weight(alpha: float) -> None:
    q, k, v = tensors()
    twins = torch.cat([k, k], 2).detach().requires_grad_()
    spec = {"tokens": 7, "key_tokens": 10, "heads": 2, "head_dim": 4, "dtype": "float64", "normalizer": normalizers.Entmax(alpha=alpha)}
    out = attncc.compile(AttentionSpec.model_validate(spec), "cpu")(q.double(), twins.double(), torch.cat([v, v], 2).double())
    (found,) = torch.autograd.grad(out.square().sum(), [twins])
    torch.testing.assert_close(found[:, :, :5], found[:, :, 5:])


def test_entmax_finds_its_threshold_for_many_keys() -> None:
    """Spreads at which Newton's steps are many: 16 sweeps are enough, and fewer are seen."""
    n = 20_000
    line = torch.linspace(0, 1, n), torch.logspace(-7, 0, n), torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.3
    keys = torch.stack(line)[None, :, :, None].expand(1, 3, n, 16).contiguous()
    spec = {"tokens": 1, "key_tokens": n, "heads": 3, "head_dim": 16, "dtype": "float32", "scores": (scores.Scale(value=1 / 16),)}
    for alpha in (1.5, 2.0):
        made = {sweeps: _threshold_error(spec, alpha, sweeps, keys) for sweeps in (2, 16)}
        assert made[16] < 2e-6 < 1e-2 < made[2]


def _threshold_error(spec: dict[str, Any], alpha: float, sweeps: int, keys: Tensor) -> float:
    """How far weights as the threshold gives them are from adding up to 1."""
    made = attncc.compile(AttentionSpec.model_validate({**spec, "normalizer": normalizers.Entmax(alpha=alpha, sweeps=sweeps)}), "cpu")
    program = make_programs(made.spec, made.plan, False)[0]
    q = torch.ones(1, 3, 1, 16)
    _, threshold, _ = ops.forward(q, keys, keys[..., :0], [], program.name, [1, keys.shape[2]], False, False)
    weights = ((alpha - 1) * keys[0, :, :, 0].double() - threshold[0].double()).clamp(min=0) ** (1 / (alpha - 1))
    return float((weights.sum(-1) - 1).abs().max())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, -300.0])
@pytest.mark.parametrize("power", [1.0, 15.0])
def test_reweighting_is_finite(power: float, scale: float, offset: float) -> None:
    """Of a uniform row nothing exceeds the average: it is 0 with an offset of 1, and the mean without one."""
    q, k, v = tensors()
    spec = normalizers.LSSAR(power=power, offset=offset, count="keys")
    made = kernel(spec, scores=(scores.Scale(value=scale),), outputs=("output", "lse"))
    out, lse = made(q, k, v)
    assert out.isfinite().all() and not out[:, :, :2].any() and bool((lse[:, :, :2] == -math.inf).all())
    (out.square().sum() + lse[lse > -math.inf].clamp(min=-50).sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    if scale == 0.0:
        want = v.mean(2) if offset == 0.0 else torch.zeros(2, 2, 4)
        torch.testing.assert_close(out[:, :, -1], want)
    if scale == 0.0 and offset == 1.0:
        assert bool((lse[:, :, -1] == -math.inf).all())


def test_rounding_is_not_weighed() -> None:
    """Keys that are all alike weigh the average, of which a float32 is a few last places off in some rows."""
    q, v = torch.randn(1, 1, 200, 4), torch.randn(1, 1, 37, 4)
    spec = {"tokens": 200, "key_tokens": 37, "heads": 1, "head_dim": 4, "dtype": "float32"}
    made = attncc.compile(AttentionSpec.model_validate({**spec, "normalizer": normalizers.LSSAR(power=2.0, count="keys")}), "cpu")
    assert not made(q, torch.ones(1, 1, 37, 4), v).any()


def test_reweighting_of_many_keys_overflows_nothing() -> None:
    """A key that has the whole row: (5000 - 1) ** 15 is no float32."""
    q, k = torch.full((1, 1, 1, 4), 20.0), torch.full((1, 1, 5000, 4), -20.0)
    k[:, :, 77], v = 20.0, torch.randn(1, 1, 5000, 4)
    spec = {"tokens": 1, "key_tokens": 5000, "heads": 1, "head_dim": 4, "dtype": "float32"}
    made = attncc.compile(AttentionSpec.model_validate({**spec, "normalizer": normalizers.LSSAR(power=15.0, count="keys")}), "cpu")
    torch.testing.assert_close(made(q, k, v)[0, 0, 0], v[0, 0, 77])


@pytest.mark.parametrize("normalizer", [normalizers.Entmax(), normalizers.LSSAR(power=2.0)], ids=lambda n: n.kind)
def test_a_kernel_before_traces_and_passes_opcheck(normalizer: Any) -> None:
    q, k, v = tensors()
    made = kernel(normalizer)
    compiled = torch.compile(lambda q, k, v: made(q, k, v).square().sum(), fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(q, k, v), [q, k, v]) for f in (compiled, lambda q, k, v: made(q, k, v).square().sum()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    program = make_programs(made.spec, made.plan, False)[0]
    torch.library.opcheck(ops.forward, (q, k, k[..., :0], [], program.name, [7, 5], False, True))


@pytest.mark.parametrize("name", ["threshold", "row_log"])
def test_a_statistic_is_no_input(name: str) -> None:
    spec = {"threshold": normalizers.Entmax(), "row_log": normalizers.LSSAR(power=2.0)}[name]
    made, given = kernel(spec), dict[str, Any]({name: torch.zeros(2, 2, 7)})
    with pytest.raises(attncc.errors.InputError, match=name):
        made(*tensors(), **given)
    with pytest.raises(ValueError, match=f"scores.0: no run-time input may be called '{name}'"):
        kernel(spec, scores=(scores.Expression(text=f"s + {name}[b, h, q]"),))


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
    "alpha of softmax": ({"kind": "entmax", "alpha": 1.0}, "alpha"),
    "alpha above two": ({"kind": "entmax", "alpha": 2.1}, "alpha"),
    "no sweeps": ({"kind": "entmax", "sweeps": 0}, "sweeps"),
    "no power": ({"kind": "lssar"}, "power"),
    "a root": ({"kind": "lssar", "power": 0.5}, "power"),
    "offset": ({"kind": "lssar", "power": 2, "offset": -1.0}, "offset"),
    "count": ({"kind": "lssar", "power": 2, "count": "allowed"}, "count"),
    "row_scale of re-weighting": ({"kind": "lssar", "power": 2, "row_scale": "per_key"}, "row_scale"),
    "unknown key": ({"kind": "relu", "sink": 0.0}, "sink"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_refused_by_name(name: str) -> None:
    normalizer, field = BAD[name]
    with pytest.raises(ValueError, match=rf"normalizer\.(softmax|sigmoid|relu|positive_ratio|entmax|lssar)\.{field}"):
        AttentionSpec.model_validate({"tokens": 8, "heads": 1, "head_dim": 4, "normalizer": normalizer})


@pytest.mark.parametrize(
    ("kind", "nearest"),
    [
        ("sparsemax", "entmax with alpha 2"),
        ("differential", "one spec for each branch"),
        ("urpe", "the spec's factor"),
        ("linear", "elu_plus_one"),
    ],
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


def test_entmax_has_no_lse() -> None:
    with pytest.raises(ValueError, match="outputs: a entmax row has no log-sum-exp"):
        kernel(normalizers.Entmax(), outputs=("output", "lse"))


def test_sinks_do_not_export_to_flex_attention() -> None:
    with pytest.raises(UnsupportedError, match=r"normalizer\.sink in FlexAttention.*sigmoid\(lse - sink\)"):
        kernel(normalizers.Softmax(sink=0.0)).spec.to_score_mod()
