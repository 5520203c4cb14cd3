"""Every kind of mask by examples worked out by hand or published, for the spec's formula and for the oracle; and what each refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from attncc import AttentionSpec
from attncc.ir.values import evaluate, range_tables
from tests.oracle import dense_mask

Json = dict[str, Any]


def by_formula(data: Json, tables: Json, batch: int) -> np.ndarray:
    """The spec's own predicate on every pair, `[B, H, Nq, Nk]`."""
    spec = AttentionSpec.model_validate(data)
    query, key = ([n for n in axes if n] for axes in (spec.grid.query, spec.grid.key))
    env: Json = {"b": np.arange(batch).reshape(-1, 1, 1, 1), "h": np.arange(spec.heads).reshape(1, -1, 1, 1)}
    for side, grid, shape in (("q", query, (1, 1, -1, 1)), ("k", key, (1, 1, 1, -1))):
        env |= {f"{side}{a}": x.reshape(shape) for a, x in enumerate(np.indices(grid))}
    arrays = {name: np.asarray(x, np.int64) for name, x in tables.items()}
    found = evaluate(spec.predicate, {**range_tables([spec.predicate], arrays), **env})
    return np.broadcast_to(found, (batch, spec.heads, math.prod(query), math.prod(key)))


def by_oracle(data: Json, tables: Json, batch: int) -> np.ndarray:
    return np.broadcast_to(dense_mask(data, tables, batch), (batch, data["heads"], *dense_mask(data, tables, batch).shape[2:]))


def masked(mask: Json, tokens: list[int], tables: Json | None = None, batch: int = 1, **fields: Any) -> np.ndarray:
    """The mask, the same by the spec's formula and by the oracle."""
    data = {"tokens": tokens, "heads": 1, "head_dim": 16, "mask": mask, **fields}
    found = by_formula(data, tables or {}, batch)
    np.testing.assert_array_equal(found, by_oracle(data, tables or {}, batch))
    return found


def keys(mask: np.ndarray, query: int, head: int = 0, batch: int = 0) -> list[int]:
    return [int(k) for k in np.flatnonzero(mask[batch, head, query])]


def runs(*parts: tuple[int, int]) -> list[int]:
    """Indices of runs, both ends inclusive."""
    return [k for first, last in parts for k in range(first, last + 1)]


WORKED: dict[str, tuple[Json, list[int], dict[int, list[int]]]] = {
    "a window is cut at both ends": ({"kind": "window", "left": 2, "right": 1}, [6], {0: [0, 1], 2: [0, 1, 2, 3], 5: [3, 4, 5]}),
    "a window with an open side": ({"kind": "window", "left": None, "right": 0}, [4], {0: [0], 3: [0, 1, 2, 3]}),
    "a window by axis": ({"kind": "window", "left": [0, 1], "right": [1, 0]}, [3, 3], {4: [3, 4, 6, 7], 8: [7, 8], 0: [0, 3]}),
    "windows of 3 x 3 have 4, 6 or 9 keys": (
        {"kind": "window", "left": 1, "right": 1}, [4, 4], {0: [0, 1, 4, 5], 1: [0, 1, 2, 4, 5, 6], 5: [0, 1, 2, 4, 5, 6, 8, 9, 10]},
    ),
    "shifted cells: 01, 2345, 67": (
        {"kind": "partition", "size": 4, "shift": 2}, [8], {0: [0, 1], 1: [0, 1], 2: runs((2, 5)), 5: runs((2, 5)), 6: [6, 7]},
    ),
    "the last cell is what is left": ({"kind": "partition", "size": 3}, [8], {2: [0, 1, 2], 6: [6, 7], 7: [6, 7]}),
    "cells by axis": ({"kind": "partition", "size": [1, 2]}, [2, 4], {0: [0, 1], 6: [6, 7]}),
    "a grid of four with step two": ({"kind": "congruence", "step": 2}, [8], {0: [0, 2, 4, 6], 5: [1, 3, 5, 7]}),
    "long distance attention: every second token of a region": (
        {"kind": "and", "masks": [{"kind": "partition", "size": 4}, {"kind": "congruence", "step": 2}]},
        [8, 8], {0: [0, 2, 16, 18], 36: [36, 38, 52, 54]},
    ),
    "halos of one, blocks of four": ({"kind": "halo", "block": 4, "halo": 1}, [8], {0: runs((0, 4)), 3: runs((0, 4)), 4: runs((3, 7))}),
    "halos by axis": ({"kind": "halo", "block": [1, 2], "halo": [1, 0]}, [3, 4], {0: [0, 1, 4, 5], 7: [2, 3, 6, 7, 10, 11]}),
    "a disc of radius 2 is 3 x 3": ({"kind": "disc", "radius": 2}, [5, 5], {12: [6, 7, 8, 11, 12, 13, 16, 17, 18], 0: [0, 1, 5, 6]}),
    "a disc without its rim": ({"kind": "disc", "radius": 5}, [5, 5], {0: [*runs((0, 18)), 20, 21, 22], 24: [2, 3, 4, *runs((6, 24))]}),
    "a disc on a line": ({"kind": "disc", "radius": 3}, [9], {0: [0, 1, 2], 4: runs((2, 6))}),
    "a criss-cross of 3 x 3": ({"kind": "axial"}, [3, 3], {0: [0, 1, 2, 3, 6], 4: [1, 3, 4, 5, 7]}),
    "rows alone": ({"kind": "axial", "axes": [1]}, [3, 3], {4: [3, 4, 5]}),
    "lines of a volume": ({"kind": "axial"}, [2, 2, 2], {0: [0, 1, 2, 4]}),
    "causal in time only": ({"kind": "causal_axes", "axes": [True, False]}, [3, 2], {0: [0, 1], 3: [0, 1, 2, 3], 4: runs((0, 5))}),
    "causal on both axes is no raster order": ({"kind": "causal_axes"}, [2, 2], {1: [0, 1], 2: [0, 2], 3: [0, 1, 2, 3]}),
    "global tokens see and are seen": (
        {"kind": "or", "masks": [{"kind": "window", "left": 1, "right": 1}, {"kind": "global_tokens", "count": 1}]},
        [5], {0: runs((0, 4)), 3: [0, 2, 3, 4]},
    ),
    "an arrow: history, then responses": (
        {"kind": "or", "masks": [{"kind": "partition", "size": 2, "shift": 0}, {"kind": "global_tokens", "count": 2}]},
        [6], {0: runs((0, 5)), 2: [0, 1, 2, 3], 5: [0, 1, 4, 5]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKED)
def test_worked_examples(name: str) -> None:
    mask, tokens, wanted = WORKED[name]
    found = masked(mask, tokens)
    assert {query: keys(found, query) for query in wanted} == wanted


@pytest.mark.parametrize(("radius", "count"), [(2, 9), (8, 193), (16, 793), (32, 3205)])
def test_keys_of_whole_discs(radius: int, count: int) -> None:
    """Published numbers of keys; the spec's formula at the middle of a square."""
    n = 2 * radius + 1
    spec = AttentionSpec.model_validate({"tokens": [n, n], "heads": 1, "head_dim": 16, "mask": {"kind": "disc", "radius": radius}})
    k0, k1 = np.indices((n, n))
    assert int(np.sum(evaluate(spec.predicate, {"q0": np.array(radius), "q1": np.array(radius), "k0": k0, "k1": k1}))) == count


def test_a_large_window_at_the_corner() -> None:
    found = masked({"kind": "window", "left": 7, "right": 7}, [16, 16])[0, 0]
    assert (found[0].sum(), found[8 * 16 + 8].sum()) == (64, 225)


@pytest.mark.parametrize(("length", "size", "shift"), [(8, 4, 2), (12, 4, 1), (15, 5, 2)])
def test_a_shift_is_rolling_with_a_mask_of_regions(length: int, size: int, shift: int) -> None:
    """Tokens rolled, cut into windows, and kept apart where the roll brought them together."""
    rolled = np.roll(np.arange(length), -shift)
    window = np.arange(length) // size
    place = np.arange(length)
    region = (place >= length - size).astype(int) + (place >= length - shift)
    allowed = np.zeros((length, length), bool)
    for i, q in enumerate(rolled):
        for j, k in enumerate(rolled):
            allowed[q, k] = window[i] == window[j] and region[i] == region[j]
    np.testing.assert_array_equal(masked({"kind": "partition", "size": size, "shift": shift}, [length])[0, 0], allowed)


def test_strided_blocks_by_hand() -> None:
    """Twelve tokens in blocks of two, one local block, every third block; head g keeps block j where (j + g) % 3 == 0."""
    found = masked({"kind": "strided_blocks", "block": 2, "local": 1, "stride": 3}, [12], heads=3)
    assert keys(found, 11, 0) == [0, 1, 6, 7, 10, 11]
    assert keys(found, 11, 1) == [4, 5, 10, 11]
    assert keys(found, 11, 2) == [2, 3, 8, 9, 10, 11]
    assert keys(found, 6, 0) == [0, 1, 6]
    grouped = masked({"kind": "strided_blocks", "block": 2, "local": 1, "stride": 3, "group": 2, "offset": 1}, [12], heads=4)
    for head, like in ((0, 1), (1, 1), (2, 2), (3, 2)):
        assert keys(grouped, 11, head) == keys(found, 11, like)
    same = masked({"kind": "strided_blocks", "block": 2, "local": 1, "stride": 3, "head_step": 0}, [12], heads=2)
    assert keys(same, 11, 0) == keys(same, 11, 1) == keys(found, 11, 0)


def test_heads_with_masks_of_their_own() -> None:
    """Stripes over heads: the first half sees columns of width two, the second rows of height two."""
    stripes = {"kind": "per_head", "masks": [{"kind": "partition", "size": [4, 2]}, {"kind": "partition", "size": [2, 4]}]}
    found = masked(stripes, [4, 4], heads=4)
    assert keys(found, 0, 1) == [0, 1, 4, 5, 8, 9, 12, 13]
    assert keys(found, 0, 2) == runs((0, 7))
    listed = masked({**stripes, "groups": [[3, 0], [1, 2]]}, [4, 4], heads=4)
    assert [keys(listed, 0, head) == keys(found, 0, 0) for head in range(4)] == [True, False, False, True]


def test_prefixes_by_sample() -> None:
    mask = {"kind": "or", "masks": [{"kind": "causal"}, {"kind": "prefix_per_sample"}]}
    found = masked(mask, [5], {"prefix_lengths": [3, 0, 9]}, 3)
    assert [keys(found, 1, 0, b) for b in range(3)] == [[0, 1, 2], [0, 1], runs((0, 4))]


def test_marked_tokens() -> None:
    mask = {"kind": "global_tokens", "labels": "marks"}
    found = masked(mask, [4], {"marks": [[0, 0, 5, 0]]})
    assert [keys(found, q) for q in range(4)] == [[2], [2], runs((0, 3)), [2]]
    cross = masked({**mask, "key_labels": "theirs"}, [2], {"marks": [[0, 1]], "theirs": [[0, 0, -1]]}, key_tokens=[3])
    assert [keys(cross, q) for q in range(2)] == [[2], [0, 1, 2]]


def test_documents_restart() -> None:
    """Offsets 0, 2, 5: the fourth token is the second of its document."""
    starts = {"document_starts": [[0, 0, 2, 2, 2, 5, 5]], "document_ends": [[2, 2, 5, 5, 5, 7, 7]]}
    causal = masked({"kind": "documents", "mask": {"kind": "causal"}}, [7], starts)
    assert keys(causal, 3) == [2, 3]
    cells = masked({"kind": "documents", "mask": {"kind": "partition", "size": 2}}, [7], starts)
    assert [keys(cells, q) for q in (0, 2, 4, 6)] == [[0, 1], [2, 3], [4], [5, 6]]
    near = masked({"kind": "documents", "mask": {"kind": "neighborhood", "window": [3]}}, [7], starts)
    assert [keys(near, q) for q in (0, 2, 3, 6)] == [[0, 1], [2, 3, 4], [2, 3, 4], [5, 6]], "a window moves inward within its document"


def test_documents_of_two_sides() -> None:
    """Two and one queries before one and three keys, the last query and key of a document opposite; then padding."""
    mask = {"kind": "documents", "mask": {"kind": "causal", "align": "bottom_right"}, "key_starts": "first", "key_ends": "stop"}
    tables = {"document_starts": [[0, 0, 2, 4]], "document_ends": [[2, 2, 3, 0]], "first": [[0, 0, 1, 9]], "stop": [[1, 1, 4, 0]]}
    found = masked(mask, [4], tables, key_tokens=[6])
    assert [keys(found, q) for q in range(4)] == [[], [0], [1, 2, 3], []]


FULL, NEXT = {"kind": "full"}, {"kind": "window", "left": 0, "right": 1}


def test_two_words_and_a_picture() -> None:
    """Two tokens of text, then 2 x 3 of a picture: words see words causally and the picture, pixels the words and their neighbours."""
    rules = [[{"kind": "causal"}, FULL], [FULL, {"kind": "neighborhood", "window": [1, 2]}]]
    found = masked({"kind": "concatenation", "queries": [[2], [2, 3]], "rules": rules}, [8])
    assert keys(found, 0) == [0, *runs((2, 7))] and keys(found, 1) == runs((0, 7))
    assert [keys(found, q) for q in (2, 3, 4)] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 4]]
    assert [keys(found, q) for q in (5, 7)] == [[0, 1, 5, 6], [0, 1, 6, 7]]


def test_pooled_and_reference_keys() -> None:
    """Local keys of a 2 x 2 grid, one pooled key, and two reference keys that the first two queries alone may see."""
    mask = {"kind": "concatenation", "queries": [[2, 2]], "keys": [[2, 2], [1], [2]], "rules": [[NEXT, FULL, {"kind": "causal"}]]}
    found = masked(mask, [4], key_tokens=[7])
    assert [keys(found, q) for q in range(4)] == [[0, 1, 2, 3, 4, 5], [1, 3, 4, 5, 6], [2, 3, 4, 5, 6], [3, 4, 5, 6]]
    apart = masked({**mask, "rules": [[None, None, {"kind": "causal", "align": "bottom_right"}]]}, [4], key_tokens=[7])
    assert [keys(apart, q) for q in range(4)] == [[], [], [5], [5, 6]]


def test_a_rule_within_a_concatenation_is_that_rule_alone() -> None:
    for rule in ({"kind": "disc", "radius": 3}, {"kind": "axial"}, {"kind": "neighborhood", "window": [3, 4], "dilation": [1, 2]}):
        alone = masked(rule, [5, 9])[0, 0]
        among = masked(
            {"kind": "concatenation", "queries": [[7], [5, 9], [3]], "rules": [[None] * 3, [None, rule, None], [None] * 3]}, [55]
        )
        np.testing.assert_array_equal(among[0, 0, 7:52, 7:52], alone)
        assert among.sum() == alone.sum()


def test_tables_of_blocks() -> None:
    """A table of two blocks by three, for queries of two and keys of one tile of 2 x 2 cells, row-major."""
    table = [[[[0, 2, 0], [-1, 0, 0]]]]
    found = masked({"kind": "block_table", "q_block": 2, "k_block": 2}, [3], {"block_table": table}, key_tokens=[5])
    assert [keys(found, q) for q in range(3)] == [[2, 3], [2, 3], [0, 1]]
    grid = masked({"kind": "block_table", "q_block": [2, 3], "k_block": [2, 3]}, [2, 6], {"block_table": [[[[0, 1], [1, 0]]]]})
    assert keys(grid, 0) == [3, 4, 5, 9, 10, 11]
    uneven = masked({"kind": "block_table", "q_block": [1, 2], "k_block": 9}, [2, 5], {"block_table": [[[[0], [0], [1], [0], [1], [0]]]]})
    assert [q for q in range(10) if keys(uneven, q)] == [4, 7, 8]
    shared = {"kind": "block_table", "q_block": 2, "k_block": 2, "per_batch": False, "per_head": False}
    assert masked(shared, [4], {"block_table": [[[[1, 0], [0, 1]]]]}, 2, heads=3).sum() == 2 * 3 * 8


# ---- bad input -----------------------------------------------------------------------------------------------------------------

LINE: Json = {"tokens": [64], "heads": 4, "head_dim": 16}
SQUARE: Json = {**LINE, "tokens": [8, 8]}


def bad(kind: str, base: Json = LINE, /, **fields: Any) -> Json:
    return {**base, "mask": {"kind": kind, **fields}}


CAUSAL: Json = {"kind": "causal"}
BAD: dict[str, tuple[Json, str]] = {
    "window left": (bad("window", left=-1), r"left.*greater than or equal to 0"),
    "window right": (bad("window", SQUARE, right=[1, 2, 3]), r"right has 3 axes, tokens have 2"),
    "window edge": (bad("window", left=1, edge="shift"), r"edge 'shift' is not supported, use truncate or .*: only a neighborhood"),
    "partition size": (bad("partition", size=0), r"size.*greater than or equal to 1"),
    "partition sizes": (bad("partition", size=[4, 4]), r"size has 2 axes, tokens have 1"),
    "partition shift": (bad("partition", size=4, shift=4), r"shift 4 is no less than size 4 on axis 0"),
    "partition edge": (bad("partition", size=5, edge="must_divide"), r"size 5 does not divide the 64 query tokens of axis 0"),
    "partition padding": (bad("partition", size=5, edge="shift"), r"'shift' is not supported.*only a neighborhood"),
    "congruence step": (bad("congruence", step=0), r"step.*greater than or equal to 1"),
    "congruence steps": (bad("congruence", SQUARE, step=[2]), r"step has 1 axes, tokens have 2"),
    "congruence edge": (bad("congruence", step=3, edge="must_divide"), r"step 3 does not divide the 64 query tokens"),
    "congruence keys": (bad("congruence", {**LINE, "key_tokens": [63]}, step=2, edge="must_divide"), r"step 2 does not divide the 63 key"),
    "halo block": (bad("halo", block=0, halo=1), r"block.*greater than or equal to 1"),
    "halo halo": (bad("halo", block=4, halo=-1), r"halo.*greater than or equal to 0"),
    "halo axes": (bad("halo", SQUARE, block=4, halo=[1, 1, 1]), r"halo has 3 axes, tokens have 2"),
    "halo edge": (bad("halo", block=4, halo=1, edge="shift"), r"edge 'shift' is not supported.*only a neighborhood"),
    "disc padding": (bad("disc", SQUARE, radius=3, edge="zero_pad"), r"edge 'zero_pad' is not supported, use truncate: .*pad k and v"),
    "congruence padding": (bad("congruence", step=3, edge="pad_token"), r"edge 'pad_token' is not supported.*pad the tokens before"),
    "padding, an open side": (bad("window", left=2, edge="zero_pad"), r"edge 'zero_pad' needs right on every axis"),
    "padding within": (
        {**LINE, "mask": {"kind": "and", "masks": [{"kind": "causal"}, {"kind": "halo", "block": 4, "halo": 1, "edge": "zero_pad"}]}},
        r"mask: edge 'zero_pad' of halo within and: .*use truncate there",
    ),
    "padding by two policies": (
        {**LINE, "mask": {"kind": "per_head", "masks": [
            {"kind": "partition", "size": 5, "edge": "zero_pad"}, {"kind": "partition", "size": 6, "edge": "pad_token"}
        ]}},
        r"masks of heads keep missing keys by different policies",
    ),
    "padding, alibi": (bad("partition", {**LINE, "scores": [{"kind": "alibi"}]}, size=5, edge="zero_pad"), r"scores.0: alibi reads where"),
    "padding, a sink": (
        bad("partition", {**LINE, "normalizer": {"kind": "softmax", "sink": 0.0}}, size=5, edge="zero_pad"), r"normalizer: a sink beside",
    ),
    "padding, sigmoid": (
        bad("partition", {**LINE, "normalizer": {"kind": "sigmoid"}}, size=5, edge="pad_token"), r"normalizer: sigmoid rows .*use softmax",
    ),
    "padding, ratio": (
        bad("partition", {**LINE, "normalizer": {"kind": "positive_ratio"}}, size=5, edge="zero_pad"), r"normalizer: positive_ratio rows",
    ),
    "padding, loads": (
        bad("partition", {**LINE, "loads": [{"kind": "qk_norm"}]}, size=5, edge="pad_token"), r"loads.0: k_pad .* is no token",
    ),
    "padding, scales": (
        bad("partition", {**LINE, "token_scales": ["v"]}, size=5, edge="pad_token"), r"token_scales: k_pad and v_pad .*edge 'zero_pad'",
    ),
    "halo blocks": (bad("halo", block=5, halo=1, edge="must_divide"), r"block 5 does not divide the 64 query tokens of axis 0"),
    "disc radius": (bad("disc", SQUARE, radius=0), r"radius.*greater than or equal to 1"),
    "disc too large": (bad("disc", SQUARE, radius=20_001), r"radius.*less than or equal to 20000"),
    "disc edge": (bad("disc", SQUARE, radius=3, edge="must_divide"), r"edge 'must_divide' is not supported, use truncate: nothing has"),
    "axial axes": (bad("axial", SQUARE, axes=[2]), r"axes: there is no axis 2, tokens have 2"),
    "axial without lines": (bad("axial", SQUARE, axes=[]), r"axes.*at least 1"),
    "causal axes": (bad("causal_axes", SQUARE, axes=[True]), r"axes has 1 axes, tokens have 2"),
    "causal axes align": (bad("causal_axes", SQUARE, align="middle"), r"align.*top_left"),
    "prefix table": (bad("prefix_per_sample", lengths="Lengths"), r"lengths.*pattern"),
    "prefix name": (bad("prefix_per_sample", lengths="out"), r"no run-time input may be called 'out'"),
    "no global tokens": (bad("global_tokens"), r"count or labels: give one of them"),
    "global tokens twice": (bad("global_tokens", count=1, labels="marks"), r"count or labels: give one of them"),
    "global tokens count": (bad("global_tokens", count=65), r"count 65 exceeds the 64 key tokens"),
    "global tokens key labels": (bad("global_tokens", count=1, key_labels="theirs"), r"key_labels: stands beside labels only"),
    "global tokens labels": (bad("global_tokens", {**LINE, "key_tokens": [9]}, labels="marks"), r"key_labels is needed"),
    "strided block": (bad("strided_blocks", block=0, local=1, stride=1), r"block.*greater than or equal to 1"),
    "strided local": (bad("strided_blocks", block=1, local=0, stride=1), r"local.*greater than or equal to 1"),
    "strided stride": (bad("strided_blocks", block=1, local=1, stride=0), r"stride.*greater than or equal to 1"),
    "strided head_step": (bad("strided_blocks", block=1, local=1, stride=1, head_step=-1), r"head_step.*greater than or equal to 0"),
    "strided offset": (bad("strided_blocks", block=1, local=1, stride=1, offset=-1), r"offset.*greater than or equal to 0"),
    "strided group": (bad("strided_blocks", block=1, local=1, stride=1, group=0), r"group.*greater than or equal to 1"),
    "block table queries": (bad("block_table", SQUARE, q_block=[4], k_block=4), r"q_block has 1 axes, tokens have 2"),
    "block table keys": (bad("block_table", q_block=4, k_block=0), r"k_block.*greater than or equal to 1"),
    "block table name": (bad("block_table", q_block=4, k_block=4, table="k"), r"no run-time input may be called 'k'"),
    "block table batch": (bad("block_table", q_block=4, k_block=4, per_batch="often"), r"per_batch.*boolean"),
    "block table heads": (bad("block_table", q_block=4, k_block=4, per_head=2), r"per_head.*boolean"),
    "block table lengths": (bad("block_table", {**LINE, "tokens": [None]}, q_block=4, k_block=4), r"tokens: a block_table needs every"),
    "heads without masks": (bad("per_head", masks=[]), r"masks.*at least 1"),
    "heads not shared evenly": (bad("per_head", masks=[CAUSAL] * 3), r"masks: 3 do not divide heads=4; list heads in groups"),
    "heads left out": (bad("per_head", masks=[CAUSAL] * 2, groups=[[0], [1, 2]]), r"groups: list every head from 0 to 3 once"),
    "heads twice": (bad("per_head", masks=[CAUSAL] * 2, groups=[[0, 1], [1, 2, 3]]), r"groups: list every head from 0 to 3 once"),
    "a group too many": (bad("per_head", masks=[CAUSAL] * 2, groups=[[0], [1], [2, 3]]), r"one group for each mask"),
    "what a head's mask refuses": (bad("per_head", masks=[CAUSAL, {"kind": "prefix", "length": 65}]), r"length 65 exceeds the 64 key"),
    "documents of tables": (bad("documents", mask={"kind": "segments"}), r"'segments' is read by positions of the whole sequence"),
    "documents on a grid": (bad("documents", SQUARE, mask=CAUSAL), r"documents are packed on one axis of tokens"),
    "documents of keys": (bad("documents", {**LINE, "key_tokens": [9]}, mask=CAUSAL), r"key_starts and key_ends: both with key_tokens"),
    "documents key_starts": (bad("documents", mask=CAUSAL, key_starts="first"), r"key_starts and key_ends: both with key_tokens, neither"),
    "documents key_ends": (bad("documents", {**LINE, "key_tokens": [9]}, mask=CAUSAL, key_starts="first"), r"key_starts and key_ends:"),
    "documents ends": (bad("documents", mask=CAUSAL, ends="out"), r"no run-time input may be called 'out'"),
    "no grids": (bad("concatenation", queries=[], rules=[[CAUSAL]]), r"queries.*at least 1"),
    "a grid without tokens": (bad("concatenation", queries=[[64, 0]], rules=[[CAUSAL]]), r"queries.*greater than or equal to 1"),
    "too few rules": (bad("concatenation", queries=[[60], [4]], rules=[[CAUSAL, CAUSAL]]), r"rules: give 2 rows of 2, a mask or null"),
    "grids of fewer queries": (bad("concatenation", queries=[[60], [3]], rules=[[None] * 2] * 2), r"queries: hold 63 tokens in all"),
    "grids of more keys": (
        bad("concatenation", {**LINE, "key_tokens": [9]}, queries=[[64]], keys=[[9], [1]], rules=[[CAUSAL, None]]),
        r"keys: hold 10 tokens in all, key_tokens are 9",
    ),
    "what a rule refuses": (
        bad("concatenation", queries=[[60], [4]], rules=[[None, None], [None, {"kind": "neighborhood", "window": 5}]]),
        r"rules\.1\.1: window 5 x dilation 1 exceeds the 4 tokens of axis 0",
    ),
    "rules of tables": (bad("concatenation", queries=[[64]], rules=[[{"kind": "segments"}]]), r"rules.0.0: 'segments' is read by"),
    "concatenated grids": (bad("concatenation", SQUARE, queries=[[64]], rules=[[CAUSAL]]), r"a concatenation is one axis of tokens"),
    "documents starts": (bad("documents", mask=CAUSAL, starts="1st"), r"starts.*pattern"),
    "what a document's mask refuses": (bad("documents", mask={"kind": "partition", "size": 3, "shift": 3}), r"shift 3 is no less"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(ValidationError, match=rf"(?s){message}"):
        AttentionSpec.model_validate(data)


def test_lengths_given_at_run_time_are_held_to_the_edge() -> None:
    import torch

    import attncc
    from attncc.errors import InputError

    mask = {"kind": "partition", "size": 8, "edge": "must_divide"}
    kernel = attncc.compile(AttentionSpec.model_validate({**LINE, "tokens": [None], "dtype": "float32", "mask": mask}), "cpu")
    fits, not_fits = (torch.randn(1, 4, n, 16) for n in (24, 25))
    assert kernel(fits, fits, fits).shape == fits.shape
    with pytest.raises(InputError, match=r"size 8 does not divide the 25 query tokens of axis 0"):
        kernel(not_fits, not_fits, not_fits)
