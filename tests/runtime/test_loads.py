"""Norms and rotations of q and k: against transformers' own rotary embedding, at far positions, in a cache, and refused where wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import attncc
from attncc import AttentionSpec, loads, masks
from attncc.errors import UnsupportedError
from tests.oracle import attention

SPEC: dict[str, Any] = {"tokens": (50,), "heads": 4, "key_heads": 2, "head_dim": 32, "dtype": "float32", "mask": masks.Causal()}


def tensors(seed: int, nq: int = 50, nk: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, nq, 32), (2, 2, nk, 32), (2, 2, nk, 32))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def test_rotary_is_that_of_transformers() -> None:
    """Llama's: half pairs, base 10000, then SDPA."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(hidden_size=128, num_attention_heads=4, head_dim=32, rope_theta=10_000.0)
    q, k, v = tensors(1)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(50)[None].expand(2, -1))
    turned = llama.apply_rotary_pos_emb(q, k, cos, sin)
    want = torch.nn.functional.scaled_dot_product_attention(turned[0], turned[1], v, is_causal=True, enable_gqa=True)
    got = attncc.compile(AttentionSpec(**SPEC, loads=(loads.Rotary(),)), "cpu")(q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_scores_depend_on_distance_alone_however_far(pairs: Any) -> None:
    """A million tokens on, the same distances give the same output: angles lose nothing to large positions."""
    spec = AttentionSpec(**SPEC, loads=(loads.Rotary(pairs=pairs, positions="places"),))
    kernel, (q, k, v) = attncc.compile(spec, "cpu"), tensors(2)
    near = torch.arange(50, dtype=torch.int32).expand(2, -1).contiguous()
    far = (near + 1_000_003).contiguous()
    torch.testing.assert_close(kernel(q, k, v, places=far), kernel(q, k, v, places=near), rtol=2e-5, atol=2e-5)


def test_a_cache_counts_its_own_places() -> None:
    """StreamingLLM: sinks and the last keys stay, un-rotated; a decoded query attends with positions of the cache."""
    sinks, window, steps = 2, 6, 20
    q, k, v = tensors(3, nq=steps, nk=steps)
    rotary = loads.Rotary(positions="place", key_positions="slots")
    spec = AttentionSpec(**{**SPEC, "tokens": (1,), "key_tokens": (None,), "mask": masks.Full()}, loads=(rotary,))
    kernel = attncc.compile(spec, "cpu")
    dense = {"tokens": [1], "heads": 4, "head_dim": 32, "mask": {"kind": "full"}, "loads": [{"kind": "rotary"}]}
    for step in range(steps):
        kept = [j for j in range(step + 1) if j < sinks or j > step - window]
        slots = torch.arange(len(kept), dtype=torch.int32).expand(2, -1).contiguous()
        place = torch.full((2, 1), len(kept) - 1, dtype=torch.int32)
        got = kernel(q[:, :, step : step + 1], k[:, :, kept], v[:, :, kept], place=place, slots=slots)
        whole = {**dense, "tokens": [len(kept)]}  # the last row of the cache as a sequence of its own
        queries = q[:, :, step : step + 1].expand(-1, -1, len(kept), -1)
        want = attention(whole, queries, k[:, :, kept], v[:, :, kept], {})["output"][:, :, -1:]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_bottom_right_decodes_as_the_whole_sequence_does() -> None:
    """Queries of the last rows against all keys are the last rows of the whole."""
    fields = {**SPEC, "mask": masks.Causal(align="bottom_right")}
    whole = attncc.compile(AttentionSpec(**fields, loads=(loads.QKNorm(), loads.Rotary())), "cpu")
    last = {**fields, "tokens": (3,), "key_tokens": (50,)}
    few = attncc.compile(AttentionSpec(**last, loads=(loads.QKNorm(), loads.Rotary(align="bottom_right"))), "cpu")
    q, k, v = tensors(4)
    torch.testing.assert_close(few(q[:, :, -3:].contiguous(), k, v), whole(q, k, v)[:, :, -3:], rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_have_finite_norms() -> None:
    """Forward and gradients, for both norms."""
    for norm in ("rms", "l2"):
        kernel = attncc.compile(AttentionSpec(**SPEC, loads=(loads.QKNorm(norm=norm),)), "cpu")
        q, k, v = tensors(5)
        q[:, :, 3] = 0.0
        leaves = [x.requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(kernel(*leaves).square().sum(), leaves)
        assert all(torch.isfinite(g).all() for g in grads)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"loads": [{"kind": "rotary", "width": 40}]}, r"loads\.0\.width: 40 columns of 32"),
    ({"loads": [{"kind": "rotary", "width": 7}]}, r"loads\.0\.rotary\.width"),
    ({"loads": [{"kind": "rotary", "base": 0.0}]}, r"loads\.0\.rotary\.base"),
    ({"loads": [{"kind": "rotary", "factor": -1.0}]}, r"loads\.0\.rotary\.factor"),
    ({"loads": [{"kind": "rotary", "pairs": "all"}]}, r"loads\.0\.rotary\.pairs"),
    ({"loads": [{"kind": "rotary", "align": "left"}]}, r"loads\.0\.rotary\.align"),
    ({"loads": [{"kind": "rotary", "key_positions": "slots"}]}, r"loads\.0\.key_positions: stands beside positions only"),
    ({"loads": [{"kind": "rotary", "positions": "k"}]}, r"loads\.0: no run-time input may be called 'k'"),
    ({"loads": [{"kind": "rotary", "positions": "At"}]}, r"loads\.0\.rotary\.positions"),
    ({"loads": [{"kind": "rotary", "positions": "p"}], "key_tokens": [40]}, r"loads\.0\.key_positions: is needed"),
    ({"loads": [{"kind": "rotary", "positions": "p"}], "tokens": [5, 10]}, r"loads\.0\.positions: tables give one position a token"),
    ({"loads": [{"kind": "rotary"}], "tokens": [5, 5, 2]}, r"loads\.0\.width: 32 columns are not 3 shares of whole pairs"),
    ({"loads": [{"kind": "rotary"}, {"kind": "rotary"}]}, r"loads\.1: one rotary is enough"),
    ({"loads": [{"kind": "qk_norm", "eps": 0.0}]}, r"loads\.0\.qk_norm\.eps"),
    ({"loads": [{"kind": "qk_norm", "norm": "max"}]}, r"loads\.0\.qk_norm\.norm"),
    ({"loads": [{"kind": "qk_norm", "weights": "some"}]}, r"loads\.0\.qk_norm\.weights"),
    ({"loads": [{"kind": "whitening"}]}, r"loads\.0"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_bad_loads_name_the_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AttentionSpec.model_validate({"tokens": [50], "heads": 4, "head_dim": 32, **fields})


def test_flex_attention_has_no_loads() -> None:
    with pytest.raises(UnsupportedError, match=r"loads in FlexAttention.*q and k normed and rotated beforehand"):
        AttentionSpec(**SPEC, loads=(loads.Rotary(),)).to_score_mod()
