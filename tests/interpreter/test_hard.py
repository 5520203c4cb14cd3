"""Hand-picked specs, each known to break some kernel somewhere, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")
from attncc.passes.plan import KernelPlan
from tests.interpreter.generated import Run, as_planned, assert_equals_oracle, every_tile, on, with_lists
from tests.strategies import Case

Grid = tuple[int, ...]


def run(
    mask: Any, tokens: list[int | None], q_tile: Grid = (16,), k_tile: Grid = (16,), lengths: Grid = (), batch: int = 1, **fields: Any
) -> Run:
    spec = {"tokens": tokens, "heads": 1, "head_dim": 16, "dtype": "float32", "mask": mask, **fields}
    return Run(Case(spec, lengths, batch), "sm_80", q_tile, k_tile)


def predicate(text: str) -> Any:
    return {"kind": "predicate", "text": text}


def neighborhood(window: list[int], stride: int = 1, dilation: int | list[int] = 1, causal: bool = False) -> Any:
    def each(x: Any) -> list[Any]:
        return x if isinstance(x, list) else [x] * len(window)

    return {"kind": "neighborhood", "window": window, "stride": each(stride), "dilation": each(dilation), "causal": each(causal)}


def gate(**fields: str) -> Any:
    return {"kind": "output", "activation": "sigmoid", "granularity": "elementwise", "mode": "multiply", **fields}


def hidden(text: str) -> Any:
    return {"kind": "expression", "text": f"select({text}, -inf, s)"}


FULL = {"kind": "full"}
CAUSAL = {"kind": "causal", "align": "top_left"}
LAST = {"kind": "causal", "align": "bottom_right"}
BOTH = ["output", "lse"]
NORM = {"kind": "qk_norm", "weights": True}
HARD: dict[str, Run] = {
    "even windows": run(neighborhood([4, 6]), [9, 10], (4, 4), (4, 4)),
    "a tail of a stride": run(neighborhood([5], stride=3), [29], outputs=BOTH),
    "a causal stride": run(neighborhood([6], stride=4, causal=True), [29], outputs=BOTH),
    "unequal classes": run(neighborhood([3, 2], dilation=[3, 2]), [11, 7], (4, 4), (2, 8)),
    "a dilated causal axis of three": run(neighborhood([2, 3, 2], dilation=[1, 1, 2], causal=True), [3, 4, 5], (2, 4, 2), (1, 4, 4)),
    "classes of open lengths": run(neighborhood([5], dilation=3), [None], lengths=(37,)),
    "rows without keys": run(LAST, [40], key_tokens=[23], outputs=BOTH),
    "rows without keys, gated": run(LAST, [40], key_tokens=[23], gate=gate(mode="add", activation="silu")),
    "rows without keys, pointwise": run(LAST, [40], key_tokens=[23], normalizer={"kind": "sigmoid", "bias": 0.5}),
    "full tiles that scores mask": run(FULL, [40], scores=[hidden("k < 20 + q // 20 * 20")], outputs=BOTH),
    "tiles of infinite scores": run(CAUSAL, [40], scores=[hidden("q % 3 == 0")], outputs=BOTH),
    "no keys at all": run(predicate("k < 0"), [20], outputs=BOTH),
    "far more keys": run(LAST, [5], key_tokens=[70], outputs=BOTH),
    "norms, then turns in halves": run(CAUSAL, [21], head_dim=40, heads=4, key_heads=2, loads=[NORM, {"kind": "rotary", "width": 36}]),
    "turns in neighbours, then norms": run(
        neighborhood([3, 4]), [5, 6], (4, 4), (4, 4), head_dim=24,
        loads=[{"kind": "rotary", "pairs": "interleaved", "width": 20}, {**NORM, "norm": "l2"}],
    ),
    "keys made ready at load": run(
        LAST,
        [9],
        key_tokens=[45],
        heads=2,
        key_heads=1,
        head_dim=24,
        batch=2,
        loads=[NORM, {"kind": "rotary", "width": 20, "align": "bottom_right"}],
    ),
    "turns by given positions": run(
        LAST, [9], key_tokens=[23], batch=2, loads=[{"kind": "rotary", "positions": "places", "key_positions": "key_places"}]
    ),
    "one token": run(CAUSAL, [1], outputs=BOTH, heads=3, key_heads=1),
    "one token of an open length": run(CAUSAL, [None], lengths=(1,), outputs=BOTH),
    "seventeen tokens of an open length": run(CAUSAL, [None], lengths=(17,), outputs=BOTH),
    "open lengths of two axes": run(neighborhood([3, 3]), [None, 7], (4, 4), (4, 4), lengths=(6,)),
    "open lengths of both sides": run(predicate("q0 + k1 != nq1 % 3"), [None, None], (4, 4), (4, 4), (5, 6, 4, 7), key_tokens=[None, None]),
    "unsorted segments": run({"kind": "segments", "ids": "segments", "key_ids": None}, [45], batch=3, outputs=BOTH),
    "segments of queries and keys": run({"kind": "segments", "ids": "ours", "key_ids": "theirs"}, [29], key_tokens=[50], batch=2),
    "a prefix within a tile": run({"kind": "prefix", "length": 10}, [32]),
    "the first keys of a tile left out": run(predicate("k >= 5"), [32]),
    "columns 72 and 40": run(CAUSAL, [20], head_dim=72, value_dim=40, outputs=BOTH),
    "columns 96 and 8": run(CAUSAL, [20], head_dim=96, value_dim=8, gate=gate()),
    "columns 8 and 24": run(CAUSAL, [20], head_dim=8, value_dim=24, gate=gate(granularity="headwise")),
    "one column": run(CAUSAL, [20], head_dim=1, value_dim=1, gate=gate(granularity="headwise")),
    "a shared gate": run(CAUSAL, [20], heads=4, key_heads=2, value_heads=1, batch=2, gate=gate(granularity="shared", activation="silu")),
    "packed gates, and something added": run(
        CAUSAL, [20], heads=6, key_heads=2, value_dim=24, batch=2, addend=True, gate=gate(granularity="packed", activation="tanh")
    ),
    "scales of tokens": run(
        CAUSAL, [40], heads=6, key_heads=3, value_heads=2, batch=2, token_scales=["q", "k", "v"], outputs=BOTH,
        normalizer={"kind": "softmax", "sink": "key_value"},
    ),
    "weights times a table, on a grid that tiles cross": run(
        neighborhood([3, 5]), [9, 11], (4, 4), (4, 4), heads=4, value_heads=2, outputs=BOTH,
        factor={"kind": "relative_bias", "extent": [3, 4], "table": "urpe"}, token_scales=["v"],
    ),
    "a ratio times a formula, in classes": run(
        neighborhood([3, 2], dilation=[3, 2]), [11, 7], (4, 4), (2, 8), heads=2, outputs=BOTH,
        normalizer={"kind": "positive_ratio", "weight": "softplus"},
        factor={"kind": "expression", "text": "tanh(slant[h, q]) + 0.25 * float((q + 2 * k) % 5)"},
    ),
    "scales of values in classes": run(
        neighborhood([3, 2], dilation=[3, 2]), [11, 7], (4, 4), (2, 8), heads=2, value_heads=1, token_scales=["v"],
        normalizer={"kind": "sigmoid"},
    ),
    "packed gates by head": run(CAUSAL, [20], heads=6, key_heads=2, gate=gate(granularity="packed_headwise", activation="silu")),
    "gates by key head": run(CAUSAL, [20], heads=6, key_heads=2, gate=gate(granularity="per_key_head", activation="relu", mode="add")),
    "a negative scale": run(CAUSAL, [30], scores=[{"kind": "scale", "value": -2.0}], outputs=BOTH),
    "a scale of zero": run(CAUSAL, [30], scores=[{"kind": "scale", "value": 0.0}], outputs=BOTH),
    "a large scale": run(CAUSAL, [30], scores=[{"kind": "scale", "value": 60.0}], outputs=BOTH),
    "softcap, then alibi": run(CAUSAL, [30], heads=3, scores=[{"kind": "softcap", "cap": 2.0}, {"kind": "alibi"}], outputs=BOTH),
    "trainable alibi, keys before queries": run(FULL, [20], key_tokens=[37], scores=[{"kind": "alibi", "trainable": True}]),
    "relative bias, then softcap": run(
        FULL, [5, 6], (4, 4), (4, 4), heads=2, scores=[{"kind": "relative_bias", "extent": [2, 6]}, {"kind": "softcap", "cap": 1.0}]
    ),
    "relative bias in classes": run(
        neighborhood([3, 2], dilation=[2, 3]), [7, 8], (4, 4), (4, 4), scores=[{"kind": "relative_bias", "extent": [7, 3]}]
    ),
    "relu with a bias": run(FULL, [23], key_tokens=[37], normalizer={"kind": "relu"}, scores=[{"kind": "relative_bias", "extent": [9]}]),
    "a sink, rows without keys": run(LAST, [40], key_tokens=[23], outputs=BOTH, normalizer={"kind": "softmax", "sink": -2.0}),
    "a sink by query in classes": run(
        neighborhood([3, 2], dilation=[3, 2]), [11, 7], (4, 4), (2, 8), outputs=BOTH, heads=2, batch=2,
        normalizer={"kind": "softmax", "sink": "per_batch_query"}, scores=[{"kind": "scale", "value": -1.0}],
    ),
    "a key and a value for all": run(
        LAST, [40], key_tokens=[23], heads=4, key_heads=2, value_heads=1, head_dim=24, value_dim=40, outputs=BOTH,
        normalizer={"kind": "softmax", "sink": "key_value"}, gate=gate(),
    ),
    "a sigmoid of an open length": run(CAUSAL, [None], lengths=(33,), normalizer={"kind": "sigmoid", "bias": "minus_log_keys"}),
    "a sigmoid by head": run(CAUSAL, [33], heads=3, normalizer={"kind": "sigmoid", "bias": "per_head"}),
    "relu over its keys": run(
        neighborhood([3, 2], dilation=[3, 2]), [11, 7], (4, 4), (2, 8), normalizer={"kind": "relu", "divisor": "allowed"}
    ),
    "relu over keys of a predicate": run(
        predicate("(q + k) % 5 > q // 8"), [40], normalizer={"kind": "relu", "power": 2.0, "divisor": "allowed"}
    ),
    "relu over its place": run(LAST, [40], key_tokens=[23], normalizer={"kind": "relu", "power": 1.5, "divisor": "position"}),
    "a ratio, rows without keys": run(
        LAST, [40], key_tokens=[23], outputs=BOTH, normalizer={"kind": "positive_ratio", "row_scale": [0.5, 1.0]}
    ),
    "a ratio of far keys alone": run(
        predicate("k + 24 < q"), [60], scores=[{"kind": "alibi", "slopes": [0.7]}], normalizer={"kind": "positive_ratio"}, outputs=BOTH
    ),
    "a ratio in classes": run(
        neighborhood([3, 2], dilation=[3, 2]), [11, 7], (4, 4), (2, 8), outputs=BOTH, heads=2,
        normalizer={"kind": "positive_ratio", "weight": "elu_plus_one", "row_scale": "per_head_query", "epsilon": 0.5},
    ),
    "a ratio of one's own": run(
        predicate("(q + k) % 5 > q // 8"), [40], normalizer={"kind": "positive_ratio", "weight": "exp(min(s, 3.0)) + 0.25"}, outputs=BOTH
    ),
    "floors of negative numbers": run(predicate("(q - 5) // 4 == (k - 5) // 4 or (q - k) % 7 == 3"), [40]),
    "negative divisors": run(predicate("(q - k) // (-3) > 1 or (k - q) % (-4) == -1"), [40]),
    "a head decides": run(predicate("(k - q) % (h + 2) == h"), [40], heads=3),
    "the batch decides": run(predicate("k - q < 9 * b - 4 or table[b] == h"), [33], heads=2, batch=3),
    "tables of all indices": run(predicate("one[b, q] + two[b, k] > ten[h] or four[q, k] == 2 and five[h, q] > 1"), [9], heads=2, batch=2),
    "products beyond 32 bits": run(predicate("k > 69950 and k * k % 7 == 2"), [17], key_tokens=[70_000]),
    "a class without tokens": run(predicate("q % 5 == k % 5"), [None], lengths=(3,)),
    "a key class without tokens": run(predicate("q % 5 == k % 5"), [None], lengths=(23, 3), key_tokens=[None]),
    "a union of masks": run({"kind": "or", "masks": [CAUSAL, {"kind": "sinks", "count": 20}]}, [40]),
    "a difference of masks": run({"kind": "and", "masks": [CAUSAL, {"kind": "not", "mask": neighborhood([9])}]}, [40]),
    "a disc and its box": run({"kind": "disc", "radius": 4}, [9, 10], (4, 4), (2, 8), outputs=BOTH),
    "shifted cells": run({"kind": "partition", "size": [3, 4], "shift": [2, 1]}, [7, 9], (4, 4), (4, 4)),
    "a criss-cross of open lengths": run({"kind": "axial"}, [None, None], (4, 4), (4, 4), lengths=(5, 7)),
    "strided blocks by head": run({"kind": "strided_blocks", "block": 3, "local": 2, "stride": 4, "group": 2}, [45], heads=4, key_heads=2),
    "a window padded by zeros": run(
        {"kind": "window", "left": [3, 1], "right": 2, "edge": "zero_pad"}, [None, 9], (4, 4), (2, 8), lengths=(10,), outputs=BOTH,
        scores=[{"kind": "softcap", "cap": 2.0}], batch=2,
    ),
    "cells padded by a token": run(
        {"kind": "partition", "size": [3, 4], "shift": [2, 1], "edge": "pad_token"}, [7, 9], (4, 4), (4, 4), outputs=BOTH,
        heads=4, key_heads=2, value_heads=1, value_dim=40, token_scales=["q"],
    ),
    "blocks padded by head, rows without keys": run(
        {"kind": "per_head", "masks": [{"kind": "halo", "block": 4, "halo": 2, "edge": "pad_token"}, LAST]}, [40], key_tokens=[23],
        heads=4, key_heads=2, outputs=BOTH,
    ),
    "masks by head": run(
        {"kind": "per_head", "masks": [CAUSAL, {"kind": "halo", "block": 5, "halo": 4}], "groups": [[2], [0, 1]]}, [40], heads=3
    ),
    "documents": run(
        {"kind": "documents", "mask": {"kind": "or", "masks": [CAUSAL, {"kind": "prefix", "length": 6}]}}, [None], lengths=(53,), batch=2
    ),
    "windows that move inward in documents": run(
        {"kind": "documents", "mask": neighborhood([5], stride=2)}, [None], lengths=(70,), batch=3, heads=2, outputs=BOTH
    ),
    "documents of two sides": run(
        {"kind": "documents", "mask": LAST, "key_starts": "key_first", "key_ends": "key_stop"}, [45], key_tokens=[60], batch=3, outputs=BOTH
    ),
    "a window for each head": run(predicate("k <= q and q - k < window[h]"), [40], heads=3, outputs=BOTH),
    "a prefix for each sample": run({"kind": "prefix_per_sample"}, [20], key_tokens=[50], batch=4, outputs=BOTH),
    "a range for each query": run(predicate("low[b, q] * 9 - 9 <= k < high[h, q] * 11"), [40], heads=2, batch=2, outputs=BOTH),
    "text before a picture": run(
        {"kind": "concatenation", "queries": [[13], [5, 6]], "rules": [[CAUSAL, FULL], [FULL, neighborhood([3, 4])]]}, [43], outputs=BOTH
    ),
    "pooled keys beside local ones": run(
        {"kind": "concatenation", "queries": [[6, 6]], "keys": [[6, 6], [3, 3], [2]],
         "rules": [[{"kind": "window", "left": 1, "right": 1}, FULL, None]]},
        [36], key_tokens=[47],
    ),
    "a table of blocks": run({"kind": "block_table", "q_block": 7, "k_block": 5}, [40], key_tokens=[33], heads=2, batch=2, outputs=BOTH),
    "marked tokens and a window": run(
        {"kind": "or", "masks": [{"kind": "global_tokens", "labels": "marks"}, {"kind": "window", "left": 3, "right": 2}]}, [40], batch=2
    ),
    "tiles longer than the grid": run(neighborhood([2, 3]), [3, 5], (2, 16), (32, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_hard_specs(name: str, poisoned: None) -> None:
    assert_equals_oracle(HARD[name])


RANGES = ["a prefix within a tile", "rows without keys", "classes of open lengths", "one token"]
BOXES = [
    "keys made ready at load",
    "norms, then turns in halves",
    "even windows",
    "columns 96 and 8",
    "open lengths of two axes",
    "one token",
    "a dilated causal axis of three",
]


@pytest.mark.parametrize("policy", [as_planned, every_tile])
def test_tiles_that_no_row_may_see_are_not_read(policy: Callable[[KernelPlan], KernelPlan], poisoned: None) -> None:
    """NaN in their values would reach every row; rows past the grid could see them, were there such rows."""
    narrow = on(run({"kind": "sliding_window", "left": 2, "right": 2, "align": "top_left"}, [20], key_tokens=[100]), change=policy)
    assert narrow.plan.kernels[0].block_mask == "ranges"
    narrow.tensors[2][:, :, 32:] = torch.nan
    clean = on(narrow)
    clean.tensors[2][:, :, 32:] = 0.0
    assert_close(narrow.outputs()["output"], clean.outputs()["output"], rtol=0, atol=0)


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("layout", ["heads first", "heads last", "misaligned"])
def test_hard_specs_by_box(name: str, layout: str, poisoned: None) -> None:
    """sm_90 loads keys and values by descriptor where the layout allows it, by rows where it does not."""
    assert_equals_oracle(on(HARD[name], target="sm_90", layout=layout))


@pytest.mark.parametrize("name", [*RANGES, "a tail of a stride", "no keys at all"])
def test_every_tile_may_be_masked(name: str, poisoned: None) -> None:
    assert_equals_oracle(on(HARD[name], change=every_tile))


@pytest.mark.parametrize("name", RANGES)
def test_ranges_may_be_lists(name: str, poisoned: None) -> None:
    assert HARD[name].plan.kernels[0].block_mask == "ranges"
    assert_equals_oracle(on(HARD[name], change=with_lists))


@pytest.mark.parametrize(
    ("layout", "batch", "head_dim", "kind"),
    [
        ("heads first", 2, 32, 1),
        ("heads first", 2, 24, 1),
        ("heads last", 2, 32, 2),
        ("heads last", 2, 24, 0),
        ("heads last", 1, 24, 1),
        ("misaligned", 2, 32, 0),
        ("one key head for all", 2, 32, 0),
    ],
)
def test_boxes_of_three_axes(layout: str, batch: int, head_dim: int, kind: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor has five axes, so a rank-3 grid needs batch and heads merged (1), or heads and columns (2), or rows (0)."""
    fields: Any = {"heads": 2, "key_heads": 2, "head_dim": head_dim}
    boxed = on(run(neighborhood([2, 3, 2]), [2, 3, 5], (2, 2, 4), (2, 4, 2), batch=batch, **fields), target="sm_90", layout=layout)
    assert kinds_of_boxes(boxed, monkeypatch) == [kind]


def test_a_gate_of_one_column_leaves_the_boxes(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are too short for 16-byte boundaries, which is no reason to load keys and values row by row."""
    gated = run(CAUSAL, [20], heads=2, head_dim=16, gate=gate(granularity="headwise"))
    assert kinds_of_boxes(on(gated, target="sm_90"), monkeypatch) == [1]


def kinds_of_boxes(boxed: Run, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the launcher chose in a run that was right."""
    seen: list[int] = []
    choose = boxed.module._box_kind

    def watched(*given: Any) -> int:
        seen.append(choose(*given))
        return seen[-1]

    monkeypatch.setattr(boxed.module, "_box_kind", watched)
    assert_equals_oracle(boxed)
    return seen


def test_ends_of_bands_near_the_ends_of_32_bits(poisoned: None) -> None:
    """Bands that tables give may lie anywhere; sums of their entries need more than 32 bits."""
    far = on(run({"kind": "documents", "mask": {"kind": "sliding_window", "left": 9, "right": 9}}, [40], outputs=BOTH))
    least, most = -(2**31), 2**31 - 1
    starts, ends = far.tensors[3]["document_starts"], far.tensors[3]["document_ends"]
    starts[0, :6], ends[0, :6] = torch.tensor([least, most, 5, 0, least, most]), torch.tensor([most, most, least, most, least, least])
    assert far.plan.kernels[0].block_mask == "ranges"
    lse = far.outputs()["lse"][0, 0]
    assert (lse[:6] > -torch.inf).tolist() == [True, False, False, True, False, False]


def test_a_file_too_large_to_check_says_so() -> None:
    """What a check would take is known before anything is made: 2 elements of 2^17 by 2^17 scores."""
    module = run({"kind": "causal"}, [1 << 17]).module
    assert "There is no check in this file: the dense formula needs 256 GiB" in (module.__doc__ or "")
    with pytest.raises(SystemExit, match=r"256 GiB .* `attncc verify SPEC.json`"):
        module.check()
