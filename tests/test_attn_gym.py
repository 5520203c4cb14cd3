"""Masks and score maps agree, on every pair of tokens, with the independent package attn-gym where it defines the same thing.

Its NATTEN masks are for odd windows on square grids only: others it gets wrong (an even window holds one key too many).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attncc
from attncc.ir.rows import SCORE
from attncc.ir.values import evaluate
from attncc.spec import masks, scores
from attncc.spec.attention import AttentionSpec

pytest.importorskip("attn_gym")
from attn_gym import masks as theirs
from attn_gym import mods
from attn_gym.masks.document_mask import length_to_offsets

Mod = Callable[..., Any]
Order = Callable[[tuple[int, ...]], int]


def ours(mask: Any, tokens: Any, key_tokens: Any = None, **tables: Any) -> np.ndarray:
    """A mask of ours on every pair, `[Nq, Nk]`."""
    spec = AttentionSpec(tokens=tokens, key_tokens=key_tokens, heads=1, head_dim=16, mask=mask)
    env: dict[str, Any] = {"b": 0, "h": 0, **{name: np.asarray(table) for name, table in tables.items()}}
    for side, grid, shape in (("q", spec.grid.query, (-1, 1)), ("k", spec.grid.key, (1, -1))):
        lengths = [int(n or 0) for n in grid]
        env |= {f"{side}{a}": x.reshape(shape) for a, x in enumerate(np.unravel_index(np.arange(prod(lengths)), lengths))}
    found = evaluate(spec.mask.predicate(spec.grid), env)
    return np.broadcast_to(found, [prod(int(n or 0) for n in grid) for grid in (spec.grid.query, spec.grid.key)])


def gym(mod: Mod, queries: int, keys: int | None = None) -> np.ndarray:
    """A mask of theirs on every pair."""
    q, k = torch.arange(queries)[:, None], torch.arange(keys or queries)[None, :]
    return np.asarray(mod(torch.tensor(0), torch.tensor(0), q, k).expand(queries, keys or queries))


def same(mask: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_array_equal(mask, other)


LENGTHS = st.integers(1, 60)


@given(LENGTHS)
def test_causal(n: int) -> None:
    same(ours(masks.Causal(), n), gym(theirs.causal_mask, n))


@given(LENGTHS, st.data())
def test_sliding_window(n: int, data: st.DataObject) -> None:
    window = data.draw(st.integers(0, n))
    same(ours(masks.SlidingWindow(left=window, right=0), n), gym(theirs.generate_sliding_window(window), n))


@given(LENGTHS, st.data())
def test_prefix(n: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, n))
    same(ours(masks.Causal() | masks.Prefix(length=length), n), gym(theirs.generate_prefix_lm_mask(length), n))


DOCUMENTS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(DOCUMENTS)
def test_documents(lengths: list[int]) -> None:
    offsets, n = length_to_offsets(lengths, "cpu"), sum(lengths)
    labels = np.repeat(np.arange(len(lengths)), lengths)[None]
    packed = ours(masks.Segments() & masks.Causal(), n, segments=labels)
    same(packed, gym(theirs.generate_doc_mask_mod(theirs.causal_mask, offsets), n))
    same(packed, gym(theirs.generate_packed_causal_doc_mask_mod(offsets), n))


@given(DOCUMENTS, st.data())
def test_windows_within_documents(lengths: list[int], data: st.DataObject) -> None:
    """Distances within a document are distances in the sequence, so a window needs no restart."""
    offsets, n = length_to_offsets(lengths, "cpu"), sum(lengths)
    window = data.draw(st.integers(0, n))
    labels = np.repeat(np.arange(len(lengths)), lengths)[None]
    mask = masks.Segments() & masks.SlidingWindow(left=window, right=0)
    same(ours(mask, n, segments=labels), gym(theirs.generate_doc_mask_mod(theirs.generate_sliding_window(window), offsets), n))


@given(DOCUMENTS, st.data())
def test_shared_prefixes(lengths: list[int], data: st.DataObject) -> None:
    n, count = sum(lengths), len(lengths)
    prefix = [data.draw(st.sampled_from([i, *range(i)])) for i in range(count)]
    prefix = [p if prefix[p] == p else i for i, p in enumerate(prefix)]
    labels = np.repeat(np.arange(count), lengths)
    text = "own[q] == own[k] and k <= q or own[q] != its[q] and own[k] == its[q]"
    mod = theirs.generate_shared_prefix_mask_mod(length_to_offsets(lengths, "cpu"), torch.tensor(prefix))
    same(ours(masks.Predicate(text=text), n, own=labels, its=np.array(prefix)[labels]), gym(mod, n))


@given(LENGTHS, st.integers(0, 20), st.integers(1, 6))
def test_dilated_window(n: int, window: int, dilation: int) -> None:
    text = f"abs(q - k) <= {window} and abs(q - k) % {dilation} == 0"
    same(ours(masks.Predicate(text=text), n), gym(theirs.generate_dilated_sliding_window(window, dilation), n))


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 8))
def test_global_tokens(is_global: list[bool], window: int) -> None:
    mask = masks.Predicate(text=f"abs(q - k) <= {window} or whole[q] == 1 or whole[k] == 1")
    mod = theirs.generate_global_sliding_window(window, torch.tensor(is_global))
    same(ours(mask, len(is_global), whole=np.array(is_global, int)), gym(mod, len(is_global)))


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4), st.integers(1, 5))
def test_images_seen_in_an_interval(n: int, intervals: list[tuple[int, int]], tokens: int) -> None:
    """Flamingo's cross-attention: text between the two ends of an image's interval sees its tokens."""
    first, stop = (np.repeat(column, tokens) for column in zip(*intervals))
    mod = theirs.generate_vision_cross_attention_mask_mod(torch.tensor(intervals), tokens)
    wanted = np.stack([gym(_at_key(mod, k), n, 1)[:, 0] for k in range(len(first))], axis=1)
    same(ours(masks.Predicate(text="first[k] <= q < stop[k]"), n, len(first), first=first, stop=stop), wanted)


def _at_key(mod: Mod, key: int) -> Mod:
    """Their mask indexes a pair of numbers by key, so it takes one key at a time."""
    return lambda b, h, q, k: mod(b, h, q, torch.tensor(key))


@given(st.integers(1, 20), st.integers(1, 8))
def test_block_diffusion(n: int, block: int) -> None:
    mine, its = f"q % {n} // {block}", f"k % {n} // {block}"
    text = (
        f"{mine} == {its} and q // {n} == k // {n} or {mine} > {its} and q < {n} and k >= {n} or {mine} >= {its} and q >= {n} and k >= {n}"
    )
    same(ours(masks.Predicate(text=text), 2 * n), gym(theirs.generate_block_diffusion_mask(n, block), 2 * n))


@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_sparse_videogen(prompt: int, frames: int, per_frame: int, width: int, sink: bool) -> None:
    n, rounded = prompt + frames * per_frame, width * per_frame // 4 * 4
    first = prompt + per_frame if sink else prompt
    spatial = f"q < {prompt} or k < {first} or abs(q - k) < {rounded}"
    mod = theirs.generate_spatial_head_mask_mod(prompt, frames, per_frame, width, sink, round_width=4)
    same(ours(masks.Predicate(text=spatial), n), gym(mod, n))
    column = "({} - {}) % {}".format
    mine, its = column("q", prompt, per_frame), column("k", prompt, per_frame)
    temporal = f"q < {prompt} or k < {prompt} or abs({mine} - {its}) < {width * per_frame // frames}"
    same(ours(masks.Predicate(text=temporal), n), gym(theirs.generate_temporal_head_mask_mod(prompt, frames, per_frame, width), n))


@given(DOCUMENTS, st.integers(0, 9))
def test_positions_that_start_over(lengths: list[int], count: int) -> None:
    """Any mask within documents: theirs counts positions from the start of each, as ours."""
    offsets, n = length_to_offsets(lengths, "cpu"), sum(lengths)
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)[None]
    mask = masks.Documents(mask=masks.Predicate(text=f"k <= q or k < {count}"))
    mod = theirs.generate_doc_mask_mod(theirs.generate_prefix_lm_mask(count), offsets)
    ends = starts + np.repeat(lengths, lengths)
    same(ours(mask, n, document_starts=starts, document_ends=ends), gym(mod, n))


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 8))
def test_marked_tokens(is_global: list[bool], window: int) -> None:
    n, near = len(is_global), min(window, len(is_global))
    mask = masks.GlobalTokens(labels="marks") | masks.SlidingWindow(left=near, right=near)
    same(
        ours(mask, n, marks=np.array(is_global, int)[None]), gym(theirs.generate_global_sliding_window(window, torch.tensor(is_global)), n)
    )


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_batches_in_a_row(batches: int, size: int, data: st.DataObject) -> None:
    """Batchified masks of a shift-free relation are cells of a partition."""
    from attn_gym.masks.batchify import batchify_mask_mod

    n = batches * size
    mod = batchify_mask_mod(theirs.causal_mask, size)
    same(ours(masks.Partition(size=size) & masks.Causal(), n), gym(mod, n))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_video_sparse_attention(tiles: int, tile: int, data: st.DataObject) -> None:
    """Chosen tiles are a table of blocks, and padding is what a predicate leaves out."""
    from attn_gym.masks import vsa

    n, top = tiles * tile, data.draw(st.integers(1, tiles))
    chosen = [data.draw(st.permutations(range(tiles)))[:top] for _ in range(tiles)]
    sizes = [data.draw(st.integers(1, tile)) for _ in range(tiles)]
    table = np.zeros((1, 1, tiles, tiles), int)
    table[0, 0, np.arange(tiles)[:, None], chosen] = 1
    real = masks.Predicate(text=f"k % {tile} < sizes[k // {tile}]", tables=(masks.Captured(name="sizes", shape=(tiles,)),))
    mask = masks.BlockTable(q_block=tile, k_block=tile) & real
    mod = vsa.generate_vsa_mask_mod(torch.tensor(chosen)[None, None], tile, torch.tensor(sizes))
    wanted = np.array([[bool(mod(*map(torch.tensor, (0, 0, q, k)))) for k in range(n)] for q in range(n)])
    same(ours(mask, n, block_table=table, sizes=np.array(sizes)), wanted)


@given(st.integers(0, 5), st.lists(st.integers(0, 9), max_size=6))
def test_trees_of_drafts(prefix: int, parents: list[int]) -> None:
    """Each node sees the prefix and its ancestors: a table of the tree."""
    from attn_gym.masks import jetspec

    tree = jetspec.build_tree_ancestor_matrix([-1, *(p % (i + 1) for i, p in enumerate(parents))], "cpu")
    n = len(tree)
    text = f"k < {prefix} or k >= {prefix} and tree[q, k - {prefix}] == 1"
    mask = masks.Predicate(text=text, tables=(masks.Captured(name="tree", shape=(n, n)),))
    mod = jetspec.generate_jetspec_tree_causal_mask_mod(prefix, tree)
    same(ours(mask, n, prefix + n, tree=tree.int().numpy()), gym(mod, n, prefix + n))


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))
def test_training_of_draft_heads(prefix: int, blocks: int, size: int) -> None:
    from attn_gym.masks import jetspec

    queries, keys = blocks * size, prefix + blocks * size
    mask = masks.Prefix(length=prefix) | masks.Predicate(
        text=f"k >= {prefix} and (k - {prefix}) // {size} == q // {size} and k - {prefix} <= q"
    )
    mod = jetspec.generate_jetspec_training_mask_mod(prefix, size)
    same(ours(mask, queries, keys), gym(mod, queries, keys))


# ---- neighborhoods -----------------------------------------------------------------------------------------------------------------


@st.composite
def odd_windows(draw: st.DrawFn, most: int = 9) -> tuple[int, int]:
    side = draw(st.integers(1, most))
    return side, draw(st.sampled_from(range(1, side + 1, 2)))


@given(odd_windows())
def test_natten_with_odd_windows_on_square_grids(square: tuple[int, int]) -> None:
    side, window = square
    same(ours(masks.Neighborhood(window=window), (side, side)), gym(theirs.generate_natten(side, side, window, window), side * side))


def test_where_their_natten_differs() -> None:
    """An even window of theirs has a key too many; the worked examples of GNA are the reference there (tests/oracle)."""
    theirs_, mine = gym(theirs.generate_natten(8, 8, 4, 4), 64), ours(masks.Neighborhood(window=4), (8, 8))
    assert set(theirs_.sum(1)) != {16} == set(mine.sum(1))


def reordered(mask: np.ndarray, tokens: tuple[int, ...], order: Order) -> np.ndarray:
    """A mask over row-major tokens as one over another order; `order` gives the place of a coordinate."""
    place = np.array([order(at) for at in product(*map(range, tokens))])
    found = np.empty_like(mask)
    found[np.ix_(place, place)] = mask
    return found


def tiled(tokens: tuple[int, ...], tile: tuple[int, ...]) -> Order:
    """Tiles row-major, tokens of a tile row-major within it."""

    def order(at: tuple[int, ...]) -> int:
        outer, inner = np.array(at) // tile, np.array(at) % tile
        tiles = [n // t for n, t in zip(tokens, tile)]
        return int(np.ravel_multi_index(outer, tiles) * prod(tile) + np.ravel_multi_index(inner, tile))

    return order


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 3, 5]))
def test_tiled_natten(tiles: int, tile: int, window: int) -> None:
    side = tiles * tile
    window = min(window, side - (side + 1) % 2)
    mask = reordered(ours(masks.Neighborhood(window=window), (side, side)), (side, side), tiled((side, side), (tile, tile)))
    same(mask, gym(theirs.generate_tiled_natten(side, side, window, window, tile, tile), side * side))


@pytest.mark.parametrize(("side", "window"), [(4, 3), (8, 5), (8, 7)])
def test_natten_along_a_morton_curve(side: int, window: int) -> None:
    from attn_gym.masks.natten import morton_encode

    mask = reordered(ours(masks.Neighborhood(window=window), (side, side)), (side, side), lambda at: int(morton_encode(at[1], at[0])))
    same(mask, gym(theirs.generate_morton_natten(side, side, window, window), side * side))


@settings(max_examples=30)
@given(st.data(), st.sampled_from([2, 3]))
def test_sliding_tiles(data: st.DataObject, rank: int) -> None:
    """Sliding tile attention is a neighborhood whose stride is the tile, for windows of an odd number of even tiles."""
    tile = tuple(data.draw(st.sampled_from([2, 4] if rank == 2 else [2])) for _ in range(rank))
    tiles = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    window = tuple(t * data.draw(st.sampled_from(range(1, n + 1, 2))) for t, n in zip(tile, tiles))
    grid = tuple(t * n for t, n in zip(tile, tiles))
    mask = reordered(ours(masks.Neighborhood(window=window, stride=tile), grid), grid, tiled(grid, tile))
    make = theirs.generate_sta_mask_mod_2d if rank == 2 else theirs.generate_sta_mask_mod_3d
    same(mask, gym(make(grid, window, tile), prod(grid)))


# ---- score maps --------------------------------------------------------------------------------------------------------------------


def scored(score: Any, s: torch.Tensor, heads: int = 1, **tables: torch.Tensor) -> np.ndarray:
    """A score map of ours on scores `[(B,) H, N, N]`."""
    spec = AttentionSpec(tokens=(s.shape[-1],), heads=heads, head_dim=16, scores=(score,))
    value = score.apply(SCORE, spec.grid, heads)
    env = {name: np.asarray(x) for name, x in {"s": s, **_places(s), **tables}.items()}
    return np.asarray(evaluate(value, {"alibi_slopes": np.array(scores.standard_slopes(heads)), **env}))


def modded(mod: Mod, s: torch.Tensor) -> np.ndarray:
    """A score map of theirs, a pair at a time, as FlexAttention calls it."""
    places = [x.expand(s.shape).flatten() for x in _places(s).values()]
    found = torch.func.vmap(lambda *pair: mod(*pair))(s.flatten(), *places)
    return np.asarray(found.reshape(s.shape))


def _places(s: torch.Tensor) -> dict[str, torch.Tensor]:
    batch, (heads, n) = s.shape[0] if s.dim() == 4 else 1, s.shape[-3:-1]
    b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
    places = {"b": b if s.dim() == 4 else torch.tensor(0), "h": h}
    return places | {"q0": torch.arange(n).view(-1, 1), "k0": torch.arange(n)}


@pytest.mark.parametrize("cap", [1, 20, 50])
def test_softcap(cap: int) -> None:
    s = torch.linspace(-200, 200, 49, dtype=torch.float64).view(1, 7, 7)
    np.testing.assert_allclose(scored(scores.Softcap(cap=cap), s), modded(mods.generate_tanh_softcap(cap), s), rtol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 8, 16])
def test_alibi_below_the_diagonal(heads: int) -> None:
    """Theirs is signed, ours takes the distance: the same for the keys that a causal mask keeps. Slopes of powers of two only."""
    s = torch.randn(heads, 30, 30, dtype=torch.float64)
    below = np.tri(30, dtype=bool)
    mine, other = scored(scores.Alibi(), s, heads), modded(mods.generate_alibi_bias(heads), s)
    np.testing.assert_allclose(mine[:, below], other[:, below], rtol=1e-6, atol=1e-6)  # their slopes are float32


def random_scores(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def close(mine: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6)  # what they compute from positions is float32


def test_signed_alibi() -> None:
    """Theirs on both sides of the diagonal, for any number of heads."""
    s = random_scores(6, 20, 20)
    slopes = torch.exp2(-(torch.arange(6) + 1) * 8.0 / 6)
    close(scored(scores.Expression(text="s + float(k - q) * slope[h]"), s, 6, slope=slopes), modded(mods.generate_alibi_bias(6), s))


ACTIVATIONS = {
    "gelu": ("0.5 * s * (1 + erf(s * 0.7071067811865476))", torch.nn.functional.gelu),
    "relu": ("relu(s)", torch.relu),
    "sigmoid": ("sigmoid(s)", torch.sigmoid),
    "silu": ("s * sigmoid(s)", torch.nn.functional.silu),
    "softplus": ("softplus(s)", torch.nn.functional.softplus),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_place_of_the_exponential(name: str) -> None:
    s, (text, function) = random_scores(2, 20, 20), ACTIVATIONS[name]
    score = scores.Expression(text=f"log({text} + 1.0)")
    np.testing.assert_allclose(scored(score, s, 2), modded(mods.generate_activation_score_mod(function), s), rtol=1e-9, atol=1e-9)


def test_sandwich() -> None:
    """A relative bias whose table is their sum of cosines."""
    s, n, heads = random_scores(3, 16, 16), 16, 3
    mod = mods.generate_sandwich_bias(heads, n)
    steps = torch.arange(2 * n - 1) - (n - 1)
    zero = torch.zeros(heads, 2 * n - 1)
    table = mod(zero, 0, torch.arange(heads)[:, None], torch.zeros((), dtype=torch.int64), steps)
    close(scored(scores.RelativeBias(extent=(n,)), s, heads, relative_bias=table), modded(mod, s))


@st.composite
def graphs(draw: st.DrawFn) -> torch.Tensor:
    n = draw(st.integers(2, 7))
    edges = draw(st.lists(st.booleans(), min_size=2 * n * n, max_size=2 * n * n))
    return torch.tensor(edges).view(2, n, n)


@settings(max_examples=20)
@given(graphs())
def test_graphormer(adjacency: torch.Tensor) -> None:
    """Biases by the shortest path between two nodes, and by the edges on it."""
    n, heads = adjacency.shape[-1], 2
    s = random_scores(2, heads, n, n)
    h = torch.arange(heads)[:, None, None]
    distances, spatial = mods.shortest_path_distances(adjacency, 3), torch.randn(heads, 5)
    bias = spatial[h, distances.long()[:, None]]
    close(scored(scores.DenseBias(), s, heads, bias=bias), modded(mods.generate_graphormer_spatial_bias(spatial, distances), s))
    kinds = torch.arange(n * n).view(1, n, n).expand(2, n, n) % 3
    path, lengths = mods.shortest_path_edge_types(adjacency, kinds, 2)
    weights = torch.randn(heads, 2, 3)
    on_path = torch.where(torch.arange(2) < lengths[:, None, ..., None], weights[h[..., None], torch.arange(2), path.long()[:, None]], 0.0)
    bias = on_path.sum(-1) / lengths[:, None].clamp(min=1)
    close(scored(scores.DenseBias(), s, heads, bias=bias), modded(mods.generate_graphormer_edge_bias(weights, path, lengths), s))


def test_latent_attention() -> None:
    """Positions in columns of their own: a wider q and k, no score map."""
    heads, n, width, more = 4, 9, 8, 6
    q, k = torch.randn(1, heads, n, width), torch.randn(1, heads, n, width)
    query_rope, key_rope = torch.randn(1, heads, n, more), torch.randn(1, 1, n, more)
    wide_q, wide_k = (torch.cat(x, -1) for x in ((q, query_rope), (k, key_rope.expand(1, heads, n, more))))
    scale = (width + more) ** -0.5
    v = torch.randn(1, heads, n, width)
    spec = AttentionSpec(tokens=(n,), heads=heads, head_dim=width + more, value_dim=width, dtype="float32")
    mod = mods.generate_mla_rope_score_mod(query_rope, key_rope, heads, scale)
    theirs = torch.softmax(torch.from_numpy(modded(mod, (q @ k.mT * scale)[0])), -1) @ v
    close(np.asarray(attncc.compile(spec, "cpu")(wide_q, wide_k, v)), np.asarray(theirs))


@pytest.mark.parametrize(("buckets", "farthest", "both"), [(32, 128, True), (32, 128, False), (12, 20, True), (64, 1000, False)])
def test_buckets_of_t5(buckets: int, farthest: int, both: bool) -> None:
    """Those of the model's own code, which takes logarithms."""
    theirs = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    s, table = random_scores(2, 300, 300), torch.randn(2, buckets, dtype=torch.float64)
    score = scores.T5Bias(buckets=buckets, max_distance=farthest, bidirectional=both)
    steps = torch.arange(300) - torch.arange(300)[:, None]
    want = s + table[:, theirs(steps, both, buckets, farthest)]
    np.testing.assert_array_equal(scored(score, s, 2, t5_bias=table), want)
