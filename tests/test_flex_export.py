"""FlexAttention export: block masks equal to `create_block_mask`'s, results of `flex_attention` equal to the oracle's."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from attncc import AttentionSpec, gates, masks, normalizers, scores
from attncc.errors import InputError, UnsupportedError
from attncc.passes.flat_blocks import LATTICE, flat_block_mask
from attncc.passes.tiles import filled_in
from tests.oracle import attention, dense_mask, random_inputs
from tests.strategies import Sizes, cases

LABELS = torch.arange(300).view(1, 300) // 70
Causal, Segments, Predicate = masks.Causal, masks.Segments, masks.Predicate


def a_spec(mask: Any, tokens: Any = 300, **fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"tokens": tokens, "heads": 2, "head_dim": 16, "dtype": "float32", "mask": mask, **fields})


def near(window: tuple[int, ...], stride: Any = 1, dilation: Any = 1, causal: Any = False) -> masks.Neighborhood:
    """Every field an entry an axis: what the oracle reads."""
    fields = {"stride": stride, "dilation": dilation, "causal": causal}
    spelled: dict[str, Any] = {name: x if isinstance(x, tuple) else (x,) * len(window) for name, x in fields.items()}
    return masks.Neighborhood(window=window, **spelled)


MASKS = {
    "causal": a_spec(Causal()),
    "window": a_spec(masks.SlidingWindow(left=40, right=3)),
    "sinks": a_spec(masks.SlidingWindow(left=40, right=0) | masks.Sinks(count=5)),
    "prefix": a_spec(Causal() | masks.Prefix(length=70)),
    "documents": a_spec(Segments() & Causal()),
    "dilated": a_spec(near((20,), dilation=3)),
    "heads": a_spec(Predicate(text="abs(q - k) <= 20 * (h + 1)")),
    "cross": a_spec(Causal(align="bottom_right"), tokens=200, key_tokens=333),
    "grid": a_spec(near((7, 9), stride=(2, 3)), tokens=(17, 20)),
    "grid_dilated": a_spec(near((3, 5), dilation=(2, 3), causal=(True, False)), tokens=(17, 20)),
    "grid_causal": a_spec(Causal() & near((7, 9)), tokens=(17, 20)),
    "grid_flat": a_spec(Causal() & ~masks.Prefix(length=30), tokens=(17, 20)),
    "volume": a_spec(near((3, 5, 4), stride=(1, 2, 4)), tokens=(6, 7, 8)),
    "full": a_spec(masks.Full()),
}


def tables_of(spec: AttentionSpec) -> dict[str, Any]:
    return {"segments": LABELS} if "segments" in spec.to_json() else {}


@pytest.mark.parametrize("block", [128, (64, 32)])
@pytest.mark.parametrize("name", MASKS)
def test_block_mask_is_that_of_create_block_mask(name: str, block: Any) -> None:
    spec, size = MASKS[name], (block, block) if isinstance(block, int) else block
    tables = tables_of(spec)
    ours = spec.to_block_mask(tables=tables, block_size=block)
    heads = spec.heads if name == "heads" else None
    lengths = [prod(n for n in axes if n) for axes in (spec.tokens, spec.key_tokens or spec.tokens)]
    theirs = flex.create_block_mask(spec.to_mask_mod(tables), None, heads, lengths[0], lengths[1], device="cpu", BLOCK_SIZE=size)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.seq_lengths == theirs.seq_lengths
    assert tuple(ours.BLOCK_SIZE) == size
    for field in ("kv", "q", "full_kv", "full_q"):
        ours_dense, theirs_dense = (_blocks(mask, field) for mask in (ours, theirs))
        # Rows beyond the last query hold nothing, so we may call a block full where PyTorch, which pads them with False, does not.
        extra = ours_dense != theirs_dense
        assert not extra[..., : lengths[0] // size[0], :].any() if field.endswith("kv") else not extra[..., : lengths[0] // size[0]].any()


def _blocks(mask: Any, field: str) -> torch.Tensor:
    count, index = getattr(mask, f"{field}_num_blocks"), getattr(mask, f"{field}_indices")
    dense = torch.zeros((*count.shape, index.shape[-1]), dtype=torch.bool)
    for at in np.ndindex(*count.shape):
        dense[at][index[at][: count[at]].long()] = True
    return dense


@pytest.mark.parametrize("name", MASKS)
def test_mask_mod_is_the_oracle_mask(name: str) -> None:
    spec = MASKS[name]
    tables = tables_of(spec)
    want = torch.from_numpy(dense_mask(spec.model_dump(mode="json"), tables, 1))
    mask = flex.create_mask(spec.to_mask_mod(tables), 1, spec.heads, want.shape[2], want.shape[3], device="cpu")
    assert torch.equal(mask, want.expand_as(mask))


SCORED = {
    "softcap": a_spec(Causal(), scores=(scores.Scale(value=0.3), scores.Softcap(cap=2.0))),
    "alibi": a_spec(Causal(), scores=(scores.Alibi(),)),
    "slopes": a_spec(Causal(align="bottom_right"), tokens=200, key_tokens=333, scores=(scores.Alibi(trainable=True),)),
    "bias": a_spec(near((7, 9)), tokens=(17, 20), scores=(scores.RelativeBias(extent=(4, 9)), scores.Softcap(cap=3.0))),
    "dense": a_spec(Causal(), tokens=100, scores=(scores.DenseBias(per_head=False), scores.Softcap(cap=3.0))),
    "indexed": a_spec(near((7, 9)), tokens=(17, 20), scores=(scores.Temperature(index=("b", "h")), scores.Bias(index=("h", "k")))),
    "buckets": a_spec(Causal(align="bottom_right"), tokens=200, key_tokens=333, scores=(scores.T5Bias(),)),
    "expression": a_spec(Causal(), tokens=90, scores=(scores.Expression(text="s * sigmoid(weight[b, q]) - 0.1 * weight[b, k]"),)),
    "grouped": a_spec(MASKS["documents"].mask, heads=4, key_heads=2, scores=(scores.Alibi(),)),
    "plain": a_spec(MASKS["grid_causal"].mask, tokens=(17, 20)),
}


@pytest.mark.parametrize("name", SCORED)
def test_flex_attention_is_the_oracle(name: str) -> None:
    """Eager FlexAttention with our mask and score maps, gradients of tables included."""
    spec = SCORED[name]
    data = spec.model_dump(mode="json")
    q, k, v, inputs = random_inputs(data, 2, 3, torch.float32)
    leaves = {n: x.requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    out = flex.flex_attention(
        q, k, v,
        score_mod=spec.to_score_mod(leaves), block_mask=spec.to_block_mask(2, tables=leaves, block_size=64),
        scale=spec.scale, enable_gqa=spec.heads != k.shape[1],
    )  # fmt: skip
    exact = {n: x.detach().double().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    want = attention(data, q.double(), k.double(), v.double(), exact)["output"]
    assert _error(out, want) < 1e-5
    trainable = [n for n, x in leaves.items() if x.requires_grad]
    if trainable:
        weight = torch.randn_like(out)
        ours = torch.autograd.grad(out, [leaves[n] for n in trainable], weight)
        theirs = torch.autograd.grad(want, [exact[n] for n in trainable], weight.double())
        assert all(_error(a, b) < 1e-5 for a, b in zip(ours, theirs))


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


@given(case=cases(Sizes(batches=(1, 2))), block=st.tuples(st.integers(1, 24), st.integers(1, 24)))
@settings(max_examples=100)
def test_flat_blocks_are_brute_force(case: Any, block: tuple[int, int]) -> None:
    spec = AttentionSpec.model_validate(case.spec)
    inputs = case.inputs(torch.float32)[3]
    query, key = case.grids
    tables = {name: x.numpy().astype(np.int64) for name, x in inputs.items() if not x.is_floating_point()}
    mask = flat_block_mask(filled_in(spec.mask.predicate(spec.grid), query, key), query, key, block, tables, case.batch, spec.heads)
    dense, found = case.mask(inputs), mask.to_dense()
    allowed = np.broadcast_to(dense, (case.batch, spec.heads, *dense.shape[2:]))
    for b, h, i, j in np.ndindex(case.batch, spec.heads, *found.shape[2:]):
        pairs = allowed[b, h, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        fits = (j + 1) * block[1] <= prod(key)
        want = 2 if pairs.all() and fits else int(pairs.any())
        assert found[b % mask.batch, h % mask.heads, i, j] == want
    assert mask.exact


def test_blocks_that_samples_cannot_decide_are_evaluated() -> None:
    """One pair of a block, which no lattice of samples meets and no interval proves."""
    side = 5 * LATTICE
    lonely = Predicate(text=f"(q * 7 + k * 11) % 9973 == {7 * 3 + 11 * 4}")
    spec = a_spec(lonely, tokens=side)
    grid = spec.grid.query
    mask = flat_block_mask(lonely.predicate(spec.grid), (side,), (side,), (side, side), {}, 1, 1)
    allowed = dense_mask(spec.model_dump(mode="json"), {}, 1)
    assert grid == (side,)
    assert 0 < allowed.sum() < 20
    assert (mask.full, mask.partial) == (0, 1)


def test_past_the_budget_blocks_are_partial() -> None:
    """What may not be evaluated any more counts as partial, and the mask says that it is not exact."""
    from attncc.passes.flat_blocks import Blocks, Intervals
    from attncc.passes.tiles import BoundMask, Tiling

    never = Predicate(text="q * k % 7 == 3 and q * k % 7 == 4").predicate(a_spec(Causal(), tokens=(8, 8)).grid)
    grid = (8, 8)
    predicate = filled_in(never, grid, grid)
    tiling = Tiling(BoundMask((), predicate, (64,), (64,), (1,)), (16,), (16,))
    blocks = Blocks(tiling, grid, grid, Intervals(predicate, 2, {}, 1, 1), 1)
    found, none = blocks.classify(budget=5 * 256), blocks.classify()
    assert (len(found.partial), found.exact) == (11, False)
    assert (len(none.partial), len(none.full), none.exact) == (0, 0, True)


def test_a_huge_mask_takes_no_array_of_all_pairs() -> None:
    spec = a_spec(masks.SlidingWindow(left=4095, right=0), tokens=131072)
    mask = spec.to_block_mask()
    visited = (torch.arange(1024).clamp(max=32) + 1).int()
    counts = {side: getattr(mask, f"{side}_num_blocks") + getattr(mask, f"full_{side}_num_blocks") for side in ("kv", "q")}
    assert torch.equal(counts["kv"][0, 0], visited)
    assert torch.equal(counts["q"][0, 0], visited.flip(0))


def test_lengths_of_open_axes() -> None:
    spec = a_spec(Causal(), tokens=(None,))
    assert spec.to_block_mask(lengths=300).shape == (1, 1, 300, 300)
    with pytest.raises(InputError, match="lengths: give one for each of tokens"):
        spec.to_block_mask()


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="tables: the mask reads segments"):
        MASKS["documents"].to_mask_mod()
    with pytest.raises(InputError, match="tables: segments has shape"):
        MASKS["documents"].to_block_mask(tables={"segments": LABELS[:, :7]})
    with pytest.raises(InputError, match=r"tables: the scores read alibi_slopes \[2\]"):
        SCORED["slopes"].to_score_mod()
    with pytest.raises(InputError, match="tables: relative_bias is"):
        SCORED["bias"].to_score_mod({"relative_bias": torch.zeros(2, 3)})
    with pytest.raises(InputError, match=r"tables: bias is torch.float32 \[1, 2, 5\], must be float \['B', 1, 'NQ', 'NK'\]"):
        SCORED["dense"].to_score_mod({"bias": torch.zeros(1, 2, 5)})
    with pytest.raises(InputError, match="block_size: must be"):
        MASKS["causal"].to_block_mask(block_size=0)


@pytest.mark.parametrize("normalizer", [normalizers.Sigmoid(), normalizers.Entmax(), normalizers.LSSAR(power=2.0)], ids=lambda n: n.kind)
def test_only_softmax_has_a_score_mod(normalizer: Any) -> None:
    spec = a_spec(Causal(), normalizer=normalizer, gate=gates.Output())
    with pytest.raises(UnsupportedError, match=f"normalizer {normalizer.kind} in FlexAttention.*softmax"):
        spec.to_score_mod()
    assert spec.to_block_mask().shape == (1, 1, 300, 300)


def test_weights_of_a_factor_have_no_score_mod() -> None:
    spec = a_spec(Causal(), factor=scores.RelativeBias(extent=(9,)))
    with pytest.raises(UnsupportedError, match=r"factor in FlexAttention.*add up to 1"):
        spec.to_score_mod()
    assert spec.to_block_mask().shape == (1, 1, 300, 300)


def test_compiled_masks_are_told_apart() -> None:
    """Two masks through one compiled function: the code of their mods is the same, what they compute is not."""
    try:
        run = torch.compile(flex.flex_attention, fullgraph=True)
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
        for spec in (MASKS["documents"], MASKS["window"]):
            mask = spec.to_block_mask(tables=tables_of(spec))
            compiled = run(q, k, v, block_mask=mask, scale=spec.scale)
            exact = attention(spec.model_dump(mode="json"), q.double(), k.double(), v.double(), tables_of(spec))["output"]
            assert _error(compiled, exact) < 1e-5
    finally:
        torch._dynamo.reset()
