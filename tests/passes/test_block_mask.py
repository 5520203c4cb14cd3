"""The block mask agrees with brute force, tile by tile, and its counts and lists say the same."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.passes.block_mask import BlockMask, block_mask
from tests.passes.brute import bound_mask, classes
from tests.strategies import Case, Sizes, cases, neighborhoods, tiles

SIZES = Sizes(tokens=60, heads=(1, 2))


def analysed(case: Case, q_tile: tuple[int, ...], k_tile: tuple[int, ...]) -> tuple[BlockMask, np.ndarray]:
    """The block mask of a case and the dense mask it should agree with."""
    _, _, _, inputs = case.inputs(torch.float32)
    mask = bound_mask(case.spec, *case.grids)
    tables = {name: table.numpy() for name, table in inputs.items()}
    return block_mask(mask, q_tile, k_tile, tables, case.batch, case.spec["heads"]), case.mask(inputs)


def agrees(case: Case, q_tile: tuple[int, ...], k_tile: tuple[int, ...]) -> BlockMask:
    """Asserts that the block mask of a case is what brute force finds."""
    found, allowed = analysed(case, q_tile, k_tile)
    wanted = classes(allowed, found.tiling.mask.order, *case.grids, q_tile, k_tile)
    shape = np.broadcast_shapes(wanted.shape, found.to_dense().shape)
    assert found.exact
    np.testing.assert_array_equal(np.broadcast_to(found.to_dense(), shape), np.broadcast_to(wanted, shape))
    counts_agree(found, allowed)
    return found


def counts_agree(found: BlockMask, allowed: np.ndarray) -> None:
    dense, copies = found.to_dense(), found.batch * found.heads
    assert (found.visited, found.full, found.partial) == ((dense > 0).sum(), (dense == 2).sum(), (dense == 1).sum())
    whole = np.broadcast_to(allowed, (max(found.batch, allowed.shape[0]), max(found.heads, allowed.shape[1]), *allowed.shape[2:]))
    assert found.pairs * whole.shape[0] * whole.shape[1] == whole.sum() * copies
    for offsets, flat in ((found.lists.full_offsets, found.lists.full_tiles), (found.lists.partial_offsets, found.lists.partial_tiles)):
        assert len(offsets) == copies * found.tiling.rows + 1
        assert offsets[0] == 0 and offsets[-1] == len(flat)
        for begin, end in itertools.pairwise(offsets):
            assert (np.diff(flat[begin:end]) > 0).all()


@st.composite
def tiled_cases(draw: st.DrawFn) -> tuple[Case, tuple[int, ...], tuple[int, ...]]:
    case = draw(cases(SIZES, mask_only=True))
    rank = len(case.spec["tokens"])
    return case, draw(tiles(rank)), draw(tiles(rank))


@settings(max_examples=300)
@given(tiled_cases())
def test_block_mask_is_brute_force(tiled: tuple[Case, tuple[int, ...], tuple[int, ...]]) -> None:
    agrees(*tiled)


@st.composite
def tiled_neighborhoods(draw: st.DrawFn) -> tuple[Case, tuple[int, ...], tuple[int, ...]]:
    rank = draw(st.sampled_from([1, 2]))
    grid = draw(st.tuples(*[st.integers(1, 40 // rank**2)] * rank))
    spec = {"tokens": list(grid), "heads": 1, "head_dim": 16, "mask": draw(neighborhoods(grid))}
    return Case(spec), draw(tiles(rank, 12)), draw(tiles(rank, 12))


@settings(max_examples=150)
@given(tiled_neighborhoods())
def test_neighborhoods_need_no_search(tiled: tuple[Case, tuple[int, ...], tuple[int, ...]]) -> None:
    """A neighborhood is a product of bands, whatever its strides, dilations and causal axes."""
    found = agrees(*tiled)
    assert found.tiling.mask.separable


def case_of(mask: Any, tokens: list[int], **fields: Any) -> Case:
    return Case({"tokens": tokens, "heads": 2, "head_dim": 16, "mask": mask, **fields}, batch=2)


def predicate(text: str) -> dict[str, str]:
    return {"kind": "predicate", "text": text}


HARD: dict[str, tuple[Case, tuple[int, ...], tuple[int, ...]]] = {
    "rows without keys between rows with keys": (
        case_of(predicate("5 * q <= k and k <= 5 * q - q % 2 * 100"), [24]), (4,), (4,),
    ),
    "bands that leap": (case_of(predicate("3 * q <= k and k <= 3 * q"), [40]), (2,), (2,)),
    "a pair table beside tables of one token": (
        case_of(predicate("epsilon[q, k] == 2 and alpha[b, q] == beta[b, k]"), [20]), (4,), (4,),
    ),
    "one token": (case_of({"kind": "causal", "align": "top_left"}, [1]), (16,), (16,)),
    "more queries than keys": (case_of({"kind": "causal", "align": "bottom_right"}, [30], key_tokens=[7]), (4,), (4,)),
    "more keys than queries": (case_of({"kind": "causal", "align": "bottom_right"}, [7], key_tokens=[30]), (4,), (4,)),
    "no key at all": (case_of(predicate("k < 0"), [9]), (4,), (4,)),
    "a class without queries": (case_of(predicate("q % 4 == k % 4"), [3], key_tokens=[9]), (2,), (2,)),
    "a class without keys": (case_of(predicate("q % 4 == k % 4"), [9], key_tokens=[3]), (2,), (2,)),
    "two congruences on one axis": (case_of(predicate("q % 2 == k % 2 and q % 3 == k % 3"), [25]), (2,), (2,)),
    "negative coordinates in a floor": (case_of(predicate("(q - 2) // 4 == (k - 2) // 4"), [19]), (4,), (4,)),
    "negative coordinates in a remainder": (case_of(predicate("(q - k) % 5 < 2"), [19]), (4,), (4,)),
    "a negative divisor": (case_of(predicate("(q - k) // (-3) > 1 and (k - q) % (-4) < -1"), [19]), (4,), (4,)),
    "the head decides": (case_of(predicate("k <= q * (h + 1)"), [19]), (4,), (4,)),
    "the batch element decides": (case_of(predicate("k * (b + 1) <= q"), [19]), (4,), (4,)),
    "documents": (
        case_of({"kind": "documents", "mask": {"kind": "sliding_window", "left": 9, "right": 9, "align": "top_left"}}, [57]), (4,), (4,),
    ),
    "a window for each head": (case_of(predicate("abs(q - k) <= 7 * h + 6"), [41]), (4,), (4,)),
    "a hole in a square": (case_of(predicate("not (2 <= q0 - k0 < 4 or k1 == q1)"), [6, 7]), (2, 4), (3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_hard_masks(name: str) -> None:
    agrees(*HARD[name])


@pytest.mark.parametrize("seed", range(6))
def test_segments_sorted_and_not(seed: int) -> None:
    mask = {"kind": "segments", "ids": "segments", "key_ids": None}
    found = agrees(Case({"tokens": [57], "heads": 2, "head_dim": 16, "mask": mask}, batch=3, seed=seed), (8,), (4,))
    assert (found.batch, found.heads) == (3, 1)


def test_segments_with_the_least_integer() -> None:
    mask = bound_mask({"tokens": [4], "heads": 1, "head_dim": 16, "mask": predicate("t[q, k] < -2147483647")}, (4,), (4,))
    table = np.full((4, 4), np.iinfo(np.int32).min, np.int32)
    assert block_mask(mask, (2,), (2,), {"t": table}).full == 4


def test_a_key_tile_that_crosses_the_end_is_partial() -> None:
    dense = analysed(case_of({"kind": "full"}, [10]), (4,), (4,))[0].to_dense()
    np.testing.assert_array_equal(dense[0, 0], [[2, 2, 1]] * 3)


def test_rows_beyond_the_grid_never_matter() -> None:
    """The last query tile has one row, which sees all keys; the rows after it would see none."""
    found = analysed(case_of(predicate("q > 7"), [9], key_tokens=[8]), (4,), (4,))[0]
    np.testing.assert_array_equal(found.to_dense()[0, 0], [[0, 0], [0, 0], [2, 2]])


def test_residue_classes_are_walked_one_by_one() -> None:
    """Dilation 3 over 8 tokens: classes of 3, 3 and 2 tokens, row-major, each over its own keys."""
    mask = {"kind": "neighborhood", "window": [2], "stride": [1], "dilation": [3], "causal": [False]}
    found = agrees(case_of(mask, [8]), (2,), (2,))
    assert found.tiling.mask.order == (3,) and found.tiling.rows == 6
    np.testing.assert_array_equal(found.to_dense()[0, 0], [[2, 0], [1, 1], [2, 0], [1, 1], [2, 0], [0, 0]])


def test_what_does_not_depend_on_the_batch_is_analysed_once() -> None:
    found = analysed(case_of({"kind": "causal", "align": "top_left"}, [8]), (4,), (4,))[0]
    assert (found.batch, found.heads) == (1, 1)


@settings(max_examples=50)
@given(tiled_cases(), st.integers(0, 2000))
def test_past_the_budget_tiles_are_partial(tiled: tuple[Case, tuple[int, ...], tuple[int, ...]], budget: int) -> None:
    """Sound always: a tile never becomes full or empty for want of budget, and `exact` says when one became partial."""
    case, q_tile, k_tile = tiled
    found, allowed = analysed(case, q_tile, k_tile)
    if found.classifier is None:
        return
    wanted = classes(allowed, found.tiling.mask.order, *case.grids, q_tile, k_tile)
    hurried = found.classifier.classify(budget)
    got = BlockMask(found.tiling, found.batch, found.heads, hurried.exact, None, hurried, found.classifier).to_dense()
    assert ((got == wanted) | (got == 1)).all()
    assert not hurried.exact or (got == wanted).all()


def test_a_million_tokens_in_closed_form() -> None:
    n, window, tile = 1 << 20, 4096, 128
    mask = {"kind": "sliding_window", "left": window - 1, "right": 0, "align": "top_left"}
    found = block_mask(bound_mask({"tokens": [n], "heads": 1, "head_dim": 16, "mask": mask}, (n,), (n,)), (tile,), (tile,))
    ramp = window // tile
    assert found.pairs == window * n - window * (window - 1) // 2
    assert found.visited == (n // tile) * (ramp + 1) - ramp * (ramp + 1) // 2
    assert found.exact
