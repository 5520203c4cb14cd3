"""Tile lists that the device fills from run-time tables: sound, in order, and never waiting for the host."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attncc import AttentionSpec, pipeline
from attncc.errors import UnsupportedError
from attncc.passes.tiles import Tiling, bind
from attncc.runtime.lists import Filler, ListCache, Lists, candidates
from tests.oracle import dense_mask, random_inputs
from tests.runtime.cases import CAUSAL, SEGMENTS, Json, neighborhood, spec

WINDOW: Json = {"kind": "sliding_window", "left": 40, "right": 7, "align": "top_left"}
MASKS: dict[str, tuple[tuple[int, ...], Json]] = {
    "segments": ((150,), SEGMENTS),
    "causal": ((150,), {"kind": "and", "masks": [SEGMENTS, CAUSAL]}),
    "or": ((150,), {"kind": "or", "masks": [SEGMENTS, CAUSAL]}),
    "not": ((90,), {"kind": "not", "mask": SEGMENTS}),
    "window": ((150,), {"kind": "and", "masks": [SEGMENTS, WINDOW]}),
    "grid": ((10, 18), {"kind": "and", "masks": [SEGMENTS, neighborhood([5, 7], [1, 2], [1, 1], [False, True])]}),
    "dilated": ((14, 15), {"kind": "and", "masks": [SEGMENTS, neighborhood([3, 5], [1, 1], [3, 2], [False, False])]}),
    "by head": ((100,), {"kind": "predicate", "text": "t[b, h, q] * 20 <= k + u[k]"}),
    "by batch": ((100,), {"kind": "predicate", "text": "t[b, q] % 3 == 1 or h == b"}),
    "two indices": ((60,), {"kind": "predicate", "text": "t[q, k] > 2"}),
    "blocks": ((150,), {"kind": "block_table", "q_block": [8], "k_block": [20]}),
    "three blocks of a tile": ((150,), {"kind": "block_table", "q_block": [6], "k_block": [20]}),
    "blocks of a grid": ((10, 18), {"kind": "block_table", "q_block": [4, 6], "k_block": [5, 9], "per_head": False}),
    "small blocks": ((150,), {"kind": "block_table", "q_block": [3], "k_block": [5], "per_batch": False}),
    "documents": ((150,), {"kind": "documents", "mask": {"kind": "halo", "block": 5, "halo": 20}}),
    "marks": ((150,), {"kind": "or", "masks": [{"kind": "global_tokens", "labels": "marks"}, WINDOW]}),
    "prefixes": ((150,), {"kind": "or", "masks": [CAUSAL, {"kind": "prefix_per_sample"}]}),
    "heads": ((150,), {"kind": "per_head", "masks": [SEGMENTS, {"kind": "documents", "mask": CAUSAL}]}),
    "no table": ((100,), {"kind": "predicate", "text": "(q + b) % 3 != h and k // 16 != q // 16"}),
}
BATCH, HEADS = 2, 2


def tile_map(tiling: Tiling, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat tile and residue class of every token."""
    lengths = tiling.mask.query if side == "q" else tiling.mask.key
    counts, sides = (tiling.q_tiles, tiling.q_tile) if side == "q" else (tiling.k_tiles, tiling.k_tile)
    tile = residue = np.zeros(math.prod(lengths), int)
    for x, n, s, d in zip(np.indices(lengths).reshape(len(lengths), -1), counts, sides, tiling.mask.order):
        tile, residue = tile * n + x // d // s, residue * d + x % d
    return tile, residue


def kinds_of(lists: Lists, rows: int, tiles: int) -> np.ndarray:
    """`[batch, heads, rows, key tiles]`: 0 not listed, 1 partial, 2 full; every row's tiles ascend and none comes twice."""
    kinds = np.zeros((BATCH, HEADS, rows, tiles), int)
    for b, h, row in np.ndindex(BATCH, HEADS, rows):
        i = b * lists.lists_b + h * lists.lists_h + row
        found = []
        for kind, (begin, end, entries) in ((2, lists[:3]), (1, lists[3:6])):
            listed = entries.flatten()[int(begin[i]) : int(end[i])].numpy()
            assert (np.diff(listed) > 0).all()
            kinds[b, h, row, listed] = kind
            found += list(listed)
        assert len(set(found)) == len(found)
    return kinds


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("target", ["cpu", "sm_90"])
def test_no_tile_is_lost_and_none_called_full_that_is_not(name: str, target: str, poisoned: None) -> None:
    tokens, mask = MASKS[name]
    json = spec(list(tokens), mask=mask)
    kernel = pipeline.plan(AttentionSpec.model_validate({**json, "dtype": "float32"}), target, *tile_shape(tokens)).kernels[0]
    tiling = Tiling(bind(kernel.graph, tokens, tokens), kernel.q_tile, kernel.k_tile)
    (q_tile, q_class), (k_tile, k_class) = (tile_map(tiling, side) for side in "qk")
    rows, tiles = tiling.rows, math.prod(tiling.k_tiles)
    row = q_class * math.prod(tiling.q_tiles) + q_tile
    cache = ListCache(kernel)
    for seed in range(3):
        inputs = random_inputs(json, BATCH, seed, torch.float32)[3]
        allowed = np.broadcast_to(dense_mask(json, inputs, BATCH), (BATCH, HEADS, len(row), len(row)))
        kinds = kinds_of(cache(tokens, tokens, inputs, BATCH, HEADS, torch.device("cpu")), rows, tiles)
        same = q_class[:, None] == k_class
        listed = kinds[:, :, row][:, :, :, k_tile]
        assert not (allowed & (listed == 0) & same).any(), "a tile with an allowed pair is missing"
        assert not (~allowed & (listed == 2) & same).any(), "a tile with a forbidden pair is called full"
        assert not (allowed & ~same).any()
    sizes = np.zeros((tiling.classes, tiles), int)
    np.add.at(sizes, (k_class, k_tile), 1)
    full = (kinds == 2).any(axis=(0, 1))
    assert (sizes[np.nonzero(full)[0] // math.prod(tiling.q_tiles), np.nonzero(full)[1]] == math.prod(kernel.k_tile)).all()


def tile_shape(tokens: tuple[int, ...]) -> tuple[Any, Any]:
    return ((16,), (16,)) if len(tokens) == 1 else ((4, 4), (2, 8))


def filler(tokens: int, mask: Json) -> Filler:
    kernel = pipeline.plan(AttentionSpec.model_validate(spec([tokens], mask=mask)), "cpu", (16,), (16,)).kernels[0]
    bound = bind(kernel.graph, (tokens,), (tokens,))
    return Filler(bound, candidates(bound, kernel.q_tile, kernel.k_tile, torch.device("cpu")))


def test_the_bands_bound_the_capacity() -> None:
    ids = torch.zeros(1, 4096, dtype=torch.int32)
    windowed = filler(4096, {"kind": "and", "masks": [SEGMENTS, WINDOW]})({"segments": ids}, 1, 2)
    assert windowed.full_tiles.shape[-1] <= 7, "not all 256 key tiles of a row"
    assert windowed.lists_b == windowed.lists_h == 0


def test_packed_documents_visit_their_own_tiles_only() -> None:
    ids = (torch.arange(4096) // 512).int()[None]
    lists = filler(4096, SEGMENTS)({"segments": ids}, 1, 2)
    assert int((lists.full_end - lists.full_begin).sum()) == 256 * 32
    assert int((lists.partial_end - lists.partial_begin).sum()) == 0


def test_filling_reads_no_value_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make the host wait for a device, and break the capture of a CUDA graph."""
    made = filler(300, {"kind": "and", "masks": [SEGMENTS, CAUSAL]})
    ids = torch.zeros(1, 300, dtype=torch.int32)

    class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "_to_copy", "masked_select")
            assert function._schema.name.removeprefix("aten::") not in waits or keeps_device(function, kwargs), function
            return function(*args, **(kwargs or {}))

    with NoSync():
        made({"segments": ids}, 1, 2)


def keeps_device(function: Any, kwargs: dict[str, Any] | None) -> bool:
    return function._schema.name == "aten::_to_copy" and (kwargs or {}).get("device") is None


def test_lists_are_made_once_for_the_same_lengths() -> None:
    json = spec([None], mask={"kind": "or", "masks": [CAUSAL, {"kind": "prefix", "length": 20}]})
    cache = ListCache(pipeline.plan(AttentionSpec.model_validate({**json, "dtype": "float32"}), "sm_80").kernels[0], limit=3)
    device = torch.device("cpu")
    first = cache((100,), (100,), {}, 1, 2, device)
    assert cache((100,), (100,), {}, 5, 2, device) is first
    assert cache((101,), (101,), {}, 1, 2, device) is not first
    for length in range(20):
        cache((length + 1,), (length + 1,), {}, 1, 2, device)
    assert len(cache._kept) == 3
    assert cache((100,), (100,), {}, 1, 2, device) is not first


def test_lists_too_long_to_index_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = filler(300, SEGMENTS)
    with pytest.raises(UnsupportedError, match=r"2\*\*31 entries.*sliding_window"):
        made({"segments": torch.zeros(1, 300, dtype=torch.int32).expand(2**24, 300)}, 2**24, 2)
