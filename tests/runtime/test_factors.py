"""What weights are multiplied by after the normalizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc import AttentionSpec, masks, normalizers, scores

SIZES: dict[str, Any] = {"tokens": (40,), "heads": 3, "head_dim": 8, "dtype": "float64"}


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensor(10 * seed, 3, 2, 3, 40, 8).detach().unbind()
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def kernel(**fields: Any) -> Any:
    return attncc.compile(AttentionSpec(**SIZES, **fields), "cpu")


def test_a_toeplitz_factor_is_that_of_urpe() -> None:
    """(A * T) v with T[i, j] = t[j - i], as its authors' code has it; rows do not add up to 1, and lse is that of A."""
    q, k, v = tensors()
    table = tensor(1, 3, 79)
    out, lse = kernel(mask=masks.Causal(), factor=scores.RelativeBias(extent=(40,), table="urpe"), outputs=("output", "lse"))(
        q, k, v, urpe=table
    )
    near = torch.arange(40)
    scored = (q @ k.mT / 8**0.5).masked_fill(near[None] > near[:, None], -torch.inf)
    want = scored.softmax(-1) * table[:, near[None] - near[:, None] + 39] @ v
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, scored.logsumexp(-1), rtol=0, atol=1e-12)
    grad = tensor(2, *out.shape).detach()
    for mine, theirs in zip(*(torch.autograd.grad(x, (q, k, v, table), grad) for x in (out, want)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_a_score_map_and_a_factor_wait_apart() -> None:
    """Both read a table by offset, so that both of their gradients are added up before they are scattered."""
    q, k, v = tensors(1)
    tables = {name: tensor(seed, 3, 79) for seed, name in enumerate(("added", "times"), 1)}
    fields: dict[str, Any] = {name: scores.RelativeBias(extent=(40,), table=name) for name in tables}
    out = kernel(scores=(fields["added"],), factor=fields["times"])(q, k, v, **tables)
    near = torch.arange(40)
    added, times = (table[:, near[None] - near[:, None] + 39] for table in tables.values())
    want = (q @ k.mT / 8**0.5 + added).softmax(-1) * times @ v
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), tuple(tables.values())) for x in (out, want)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_a_sink_is_not_multiplied() -> None:
    """A factor of 0 leaves the value of the sink's key alone, with the weight that it has beside the others."""
    q, k, v = tensors(2)
    given = {"k_bias": tensor(1, 3, 8), "v_bias": tensor(2, 3, 8), "share": torch.zeros(3, dtype=torch.float64)}
    fields: dict[str, Any] = {"normalizer": normalizers.Softmax(sink="key_value"), "outputs": ("output", "lse")}
    out, lse = kernel(factor=scores.Bias(index=("h",), table="share"), **fields)(q, k, v, **given)
    sink = torch.exp((q * given["k_bias"][:, None]).sum(-1) / 8**0.5 - lse)
    torch.testing.assert_close(out, sink[..., None] * given["v_bias"][:, None], rtol=0, atol=1e-12)


def test_a_factor_of_no_table_needs_none() -> None:
    q, k, v = tensors(3)
    half = kernel(factor=scores.Expression(text="0.5"))(q, k, v)
    torch.testing.assert_close(half, 0.5 * kernel()(q, k, v), rtol=0, atol=1e-12)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a score": ({"factor": {"kind": "expression", "text": "s * 2.0"}}, r"factor\.text: reads the score s"),
    "no float": ({"factor": {"kind": "expression", "text": "q - k"}}, r"factor\.text: must be a float, this one is int"),
    "no such kind": ({"factor": {"kind": "softcap", "cap": 2.0}}, r"\nfactor\n +Input tag 'softcap'"),
    "another rank": ({"factor": {"kind": "relative_bias", "extent": [3, 3]}}, r"factor\.extent: has 2 axes, tokens have 1"),
    "a score's table": (
        {"scores": [{"kind": "bias", "table": "mine"}], "factor": {"kind": "bias", "table": "mine"}},
        "factor: a score reads the table 'mine' already",
    ),
    "a name of the language": ({"factor": {"kind": "bias", "table": "gate"}}, "factor: no run-time input may be called 'gate'"),
    "keys beyond the grid": (
        {"mask": {"kind": "window", "left": 3, "right": 3, "edge": "zero_pad"}, "factor": {"kind": "bias", "table": "mine"}},
        "factor: what it says of keys of mask edge 'zero_pad' is not defined",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_factors_are_refused_by_name(name: str) -> None:
    fields, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        AttentionSpec.model_validate({**SIZES, **fields})
