"""FlexAttention import: what a mod computes is what its spec means, for attn-gym's own and for random ones, and the rest is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import attncc
from attncc import AttentionSpec, masks, scores
from attncc.errors import UnsupportedError

Mod = Callable[..., Any]


def dense_mask(mod: Mod, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """A mask_mod on every pair, one at a time."""
    places = torch.meshgrid(*map(torch.arange, (batch, heads, queries, keys)), indexing="ij")
    found: Tensor = torch.func.vmap(lambda *pair: torch.as_tensor(mod(*pair)))(*(x.flatten() for x in places))
    return found.view(batch, heads, queries, keys)


def dense_scores(mod: Mod, s: Tensor) -> Tensor:
    """A score_mod on every pair, one at a time."""
    places = torch.meshgrid(*map(torch.arange, s.shape), indexing="ij")
    found: Tensor = torch.func.vmap(mod)(s.flatten(), *(x.flatten() for x in places))
    return found.view(s.shape)


def kernel_of(mask: Any, queries: int, keys: int, heads: int = 1, maps: Any = ()) -> attncc.Kernel:
    """A kernel for the CPU, of a spec that has been written down and read again."""
    spec = AttentionSpec(
        tokens=(queries,),
        key_tokens=None if queries == keys else (keys,),
        heads=heads,
        head_dim=16,
        dtype="float32",
        mask=mask,
        scores=maps,
    )
    return attncc.compile(AttentionSpec.model_validate_json(spec.model_dump_json()), "cpu")


# ---- attn-gym ----------------------------------------------------------------------------------------------------------------------


def gym_masks() -> dict[str, tuple[Mod, int, int]]:
    gym = pytest.importorskip("attn_gym.masks")
    from attn_gym.masks import batchify, jetspec, vsa
    from attn_gym.masks.document_mask import length_to_offsets

    offsets = length_to_offsets([3, 5, 4], "cpu")
    tree = jetspec.build_tree_ancestor_matrix([-1, 0, 0, 1], "cpu")
    sizes, chosen = torch.tensor([4, 3, 4]), torch.tensor([[[[0, 2], [1, 2], [0, 1]]]])
    found = {
        "causal": gym.causal_mask,
        "sliding window": gym.generate_sliding_window(3),
        "prefix": gym.generate_prefix_lm_mask(4),
        "documents": gym.generate_doc_mask_mod(gym.causal_mask, offsets),
        "packed documents": gym.generate_packed_causal_doc_mask_mod(offsets),
        "shared prefixes": gym.generate_shared_prefix_mask_mod(offsets, torch.tensor([0, 0, 2])),
        "dilated window": gym.generate_dilated_sliding_window(4, 2),
        "global tokens": gym.generate_global_sliding_window(2, torch.arange(12) % 5 == 0),
        "flamingo": gym.generate_vision_cross_attention_mask_mod(torch.tensor([[0, 4], [3, 9]]), 6),
        "block diffusion": gym.generate_block_diffusion_mask(6, 2),
        "spatial": gym.generate_spatial_head_mask_mod(2, 2, 5, 1, True, 4),
        "temporal": gym.generate_temporal_head_mask_mod(2, 2, 5, 1),
        "vsa": vsa.generate_vsa_mask_mod(chosen, 4, sizes),
        "vsa padding": vsa.generate_vsa_padding_mask_mod(sizes, 4),
        "batchified": batchify.batchify_mask_mod(gym.causal_mask, 4),
    }
    square = {
        "natten": gym.generate_natten(4, 4, 3, 3),
        "tiled natten": gym.generate_tiled_natten(4, 4, 3, 3, 2, 2),
        "morton natten": gym.generate_morton_natten(4, 4, 3, 3),
        "tiles 2d": gym.generate_sta_mask_mod_2d((4, 4), (2, 2), (2, 2)),
        "tiles 3d": gym.generate_sta_mask_mod_3d((2, 4, 2), (2, 2, 2), (2, 2, 2)),
    }
    trees = {
        "tree": (jetspec.generate_jetspec_tree_causal_mask_mod(4, tree), 4, 8),
        "tree training": (jetspec.generate_jetspec_training_mask_mod(4, 2), 8, 12),
    }
    return {n: (m, 12, 12) for n, m in found.items()} | {n: (m, 16, 16) for n, m in square.items()} | trees


NAMES = [
    "causal", "sliding window", "prefix", "documents", "packed documents", "shared prefixes", "dilated window", "global tokens", "flamingo",
    "block diffusion", "spatial", "temporal", "vsa", "vsa padding", "batchified", "natten", "tiled natten", "morton natten", "tiles 2d",
    "tiles 3d", "tree", "tree training",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_mask_of_attn_gym(name: str) -> None:
    """With keys that all have one value, each row's weights sum over what it sees: values of their own show which keys these are."""
    found = gym_masks()
    assert sorted(found) == sorted(NAMES)
    mod, queries, keys = found[name]
    mask, tables = masks.Predicate.from_mask_mod(mod, q=queries, k=keys)
    kernel, zero = kernel_of(mask, queries, keys), torch.zeros
    weights = kernel(zero(1, 1, queries, 16), zero(1, 1, keys, 16), torch.eye(keys, 16)[None, None], **tables)[0, 0, :, :keys]
    assert torch.equal(weights > 0, dense_mask(mod, 1, 1, queries, keys)[0, 0])


def gym_scores() -> dict[str, Mod]:
    mods = pytest.importorskip("attn_gym.mods")
    torch.manual_seed(0)
    graph = torch.rand(2, 9, 9) < 0.2
    edges = mods.shortest_path_edge_types(graph, torch.randint(0, 3, (2, 9, 9)), 2)
    return {
        "softcap": mods.generate_tanh_softcap(20),
        "alibi": mods.generate_alibi_bias(2),
        "gelu": mods.generate_activation_score_mod(),
        "relu": mods.generate_activation_score_mod(torch.relu),
        "spatial": mods.generate_graphormer_spatial_bias(torch.randn(2, 5), mods.shortest_path_distances(graph, 3)),
        "edges": mods.generate_graphormer_edge_bias(torch.randn(2, 2, 3), *edges),
        "rope": mods.generate_mla_rope_score_mod(torch.randn(2, 2, 9, 4), torch.randn(2, 1, 9, 4), 2, 0.3),
        "sandwich": mods.generate_sandwich_bias(2, 9),
    }


@pytest.mark.parametrize("name", ["softcap", "alibi", "gelu", "relu", "spatial", "edges", "rope", "sandwich"])
def test_every_score_map_of_attn_gym(name: str) -> None:
    mod = gym_scores()[name]
    score, tables = scores.Expression.from_score_mod(mod)
    q, k, v = (torch.randn(2, 2, 9, 16) for _ in range(3))
    got = kernel_of(masks.Full(), 9, 9, 2, (score,))(q, k, v, **tables)
    want = torch.softmax(dense_scores(mod, q @ k.mT * 16**-0.5), -1) @ v
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


# ---- random mods -------------------------------------------------------------------------------------------------------------------

N, HEADS = 24, 2


def random_mask(draw: random.Random) -> Mod:
    """A mask_mod of a few of the things people write."""
    labels, window = torch.tensor([draw.randrange(3) for _ in range(N)]), draw.randrange(1, N)
    table = torch.tensor([[draw.random() < 0.7 for _ in range(4)] for _ in range(4)])
    kinds: list[Mod] = [
        lambda b, h, q, k: q >= k,
        lambda b, h, q, k: (q - k).abs() <= window,
        lambda b, h, q, k: labels[q] == labels[k],
        lambda b, h, q, k: table[q // 6, k // 6],
        lambda b, h, q, k: torch.where(h == 0, k % 2 == q % 2, k < window),
        lambda b, h, q, k: torch.logical_or(k < 2, torch.clamp(k, min=3, max=window + 3) == k),
    ]
    first, second = draw.sample(kinds, 2)
    joined: list[Mod] = [
        flex.and_masks(first, second),
        flex.or_masks(first, second),
        first,
        lambda b, h, q, k: ~second(b, h, q, k) | (q == k),
    ]
    return draw.choice(joined)


def random_score(draw: random.Random) -> Mod:
    """A score_mod that applies two or three steps."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    bias, near = torch.randn(HEADS, 2 * N - 1, generator=generator), torch.randn(N, generator=generator)
    kind = torch.randint(0, 5, (N, N), generator=generator)
    cap, scale = draw.uniform(1, 9), draw.uniform(-0.2, 0.2)
    steps: list[Mod] = [
        lambda s, b, h, q, k: cap * torch.tanh(s / cap),
        lambda s, b, h, q, k: s + scale * (q - k),
        lambda s, b, h, q, k: s + bias[h, k - q + N - 1],
        lambda s, b, h, q, k: s * torch.sigmoid(near[k]) + near[q],
        lambda s, b, h, q, k: s + near[kind[q, k]],
        lambda s, b, h, q, k: torch.where((q + k) % 3 == h, s, s - 0.5 * s**2),
        lambda s, b, h, q, k: torch.log(torch.nn.functional.relu(s) + torch.exp2(-(h + 1.0))),
        lambda s, b, h, q, k: torch.where(k % 5 == 4, -float("inf"), s),
    ]
    chosen = draw.sample(steps, draw.randint(1, 3))

    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        for step in chosen:
            s = step(s, b, h, q, k)
        return s

    return score_mod


@pytest.mark.parametrize("seed", range(50))
def test_random_mods_give_what_flex_attention_gives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly, and in float64 by the mods' own values."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    draw = random.Random(seed)
    mask_mod, score_mod = random_mask(draw), random_score(draw)
    mask, read = masks.Predicate.from_mask_mod(mask_mod, q=N, k=N)
    score, more = scores.Expression.from_score_mod(score_mod)
    named = {name: f"{name}_of_scores" for name in more if name in read}
    score = score.model_copy(update=renamed(score, named))
    more = {named.get(name, name): x for name, x in more.items()}
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, HEADS, N, 16, generator=generator) for _ in range(3))
    got = kernel_of(mask, N, N, HEADS, (score,))(q, k, v, **read, **more)
    block_mask = flex.create_block_mask(mask_mod, 1, HEADS, N, N, device="cpu", BLOCK_SIZE=8)
    theirs = flex.flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
    s = dense_scores(score_mod, q.double() @ k.double().mT * 16**-0.5).double()
    s = s.masked_fill(~dense_mask(mask_mod, 1, HEADS, N, N), -torch.inf)
    exact = torch.softmax(s, -1).nan_to_num() @ v.double()
    for want in (theirs, exact):
        assert float((got - want).norm()) <= 1e-5 * max(float(want.norm()), 1e-3)


def renamed(score: Any, names: dict[str, str]) -> dict[str, Any]:
    """Text and tables under other names."""
    text = score.text
    for old, new in names.items():
        text = text.replace(f"{old}[", f"{new}[")
    return {"text": text, "tables": tuple(t.model_copy(update={"name": names.get(t.name, t.name)}) for t in score.tables)}


def test_captured_tensors_keep_their_gradients() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 5))
    gain = torch.nn.Parameter(torch.tensor(0.7))

    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s * gain + weight[h, (k - q).abs().clamp(max=4)]

    score, tables = scores.Expression.from_score_mod(score_mod)
    assert sorted(tables) == ["gain", "weight"]
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    got = kernel_of(masks.Causal(), 12, 12, 2, (score,))(q, k, v, **tables)
    s = dense_scores(score_mod, q @ k.mT * 16**-0.5).masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf)
    want = torch.softmax(s, -1) @ v
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), [weight, gain]) for out in (got, want))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_short_names_are_read_as_people_write_them() -> None:
    document = torch.tensor([0, 0, 1])
    mask, tables = masks.Predicate.from_mask_mod(lambda b, h, q, k: (document[q] == document[k]) & (q >= k))
    assert mask.text == "document[q] == document[k] and k <= q"
    assert tables["document"].dtype is torch.int32
    assert masks.Predicate.from_mask_mod(lambda b, h, q, k: 7 - q > k)[0].text == "k < 7 - q"


# ---- refusals ----------------------------------------------------------------------------------------------------------------------

TABLE, VECTOR = torch.arange(12).view(3, 4), torch.arange(4.0)
REFUSED: dict[str, tuple[Mod, str]] = {
    "a branch": (lambda b, h, q, k: q if q > k else k, "a branch on a value in a mod is not supported"),
    "a Python number": (lambda b, h, q, k: list(range(9))[q] > k, "a value used as a Python number"),
    "an unknown function": (lambda b, h, q, k: torch.sin(q) > 0, "sin in a mod"),
    "an unknown method": (lambda b, h, q, k: q.cumsum(0) > k, "cumsum in a mod"),
    "an item": (lambda b, h, q, k: q.item() > k, "item in a mod"),
    "a slice": (lambda b, h, q, k: TABLE[:, q].sum() > k, "a slice beside an index in a mod"),
    "rounding to zero": (lambda b, h, q, k: torch.div(q, 3, rounding_mode="trunc") > k, "division rounded by trunc"),
    "a rounded float": (lambda b, h, q, k: VECTOR[q] // 2 > k, "// of a float in a mod"),
    "bits": (lambda b, h, q, k: (q & k) == 0, "and of integers in a mod"),
    "bits of an unknown length": (lambda b, h, q, k: (q & 5) == 0, "give q=, how many there are"),
    "other arguments": (lambda b, h, q, k: torch.nn.functional.softplus(q, 2.0) > 3, "softplus of 2 arguments"),
    "an option": (lambda b, h, q, k: torch.add(q, k, alpha=2) > 3, "add(alpha=..) in a mod"),
    "several numbers": (lambda b, h, q, k: TABLE[q] > k, "a result of shape [4] in a mod"),
    "a large array": (lambda b, h, q, k: (torch.zeros(70, 70) < q).any(), "in a mod is not supported"),
    "a long text": (lambda b, h, q, k: (torch.arange(600) * q == k).any(), "characters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    mod, message = REFUSED[name]
    with pytest.raises(UnsupportedError) as error:
        masks.Predicate.from_mask_mod(mod)
    assert message in str(error.value)


def test_floats_in_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="no integer"):
        masks.Predicate.from_mask_mod(lambda b, h, q, k: VECTOR[q] > 0.5)
