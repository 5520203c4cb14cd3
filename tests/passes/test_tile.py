"""Tiles: some always fits, the limits of the target hold, and whatever was not chosen has its reason."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.errors import UnsupportedError
from attncc.passes.block_mask import block_mask
from attncc.passes.footprint import Configuration, shared_bytes, unfit
from attncc.passes.plan import KernelPlan
from attncc.passes.tile import MASKED_TILE, Pricer, shapes
from attncc.pipeline import plan
from attncc.spec.attention import AttentionSpec
from attncc.targets import TARGETS, target
from tests.passes.brute import bound_mask
from tests.strategies import Case, Sizes, cases

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]


def spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec.model_validate({"tokens": [512], "heads": 2, "head_dim": 64, "mask": {"kind": "causal"}, **fields})


def kernel(made: AttentionSpec, name: str, **tiles: Any) -> KernelPlan:
    return plan(made, name, **tiles).kernels[0]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 8), (128, 128), (256, 256), (192, 128), (64, 512)])
def test_some_tile_always_fits(name: str, dtype: str, head_dim: int, value_dim: int) -> None:
    record = target(name)
    found = kernel(spec(dtype=dtype, head_dim=head_dim, value_dim=value_dim), name)
    c = Configuration(prod(found.q_tile), prod(found.k_tile), found.num_warps, found.num_stages, 1.0)
    assert record.backend == "cpu" or shared_bytes(found.graph, c, record) <= record.shared_bytes
    assert min(c.q_rows, c.k_rows) >= 16


@settings(max_examples=40)
@given(cases(Sizes(tokens=4096, longest=600)), st.sampled_from(ARCHITECTURES))
def test_any_spec_gets_a_plan_with_reasons(case: Case, name: str) -> None:
    *before, found = plan(AttentionSpec.model_validate(case.spec), name).kernels
    for size in (prod(found.q_tile), prod(found.k_tile)):
        assert 16 <= size <= 128 and size & (size - 1) == 0
    assert found.rejected  # a kernel before it has its tiles, and perhaps nothing left to choose
    assert all(len({r.candidate for r in k.rejected}) == len(k.rejected) for k in (*before, found))
    for rejected in (r for k in (*before, found) for r in k.rejected):
        assert re.match(r"\[.*\] x \[.*\], \d warps, \d stages$", rejected.candidate)
        priced = re.match(r"([\d.]+)x the price$", rejected.reason)
        # Where no query sees a key every price is 0.
        assert float(priced[1]) >= 1 or float(priced[1]) == 0 if priced else re.search("bytes over|registers|spills|warps", rejected.reason)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("normalizer", [{"kind": "entmax"}, {"kind": "entmax", "alpha": 1.3}, {"kind": "lssar", "power": 3}])
def test_kernels_that_share_a_block_mask_all_fit_its_tiles(name: str, dtype: str, normalizer: dict[str, Any]) -> None:
    """Narrow heads leave the second kernel room for tiles that the first, with more numbers a score, has none for."""
    for head_dim in (16, 32, 64):
        made = plan(spec(dtype=dtype, head_dim=head_dim, normalizer=normalizer, scores=[{"kind": "alibi"}]), name)
        assert len({(k.q_tile, k.k_tile) for k in made.kernels}) == 1 < len(made.kernels)
        for k in made.kernels:
            c = Configuration(prod(k.q_tile), prod(k.k_tile), k.num_warps, k.num_stages, 1.0)
            assert unfit(k.graph, c, target(name)) == ""


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_demanded_tiles_are_kept(rank: int) -> None:
    q_tile, k_tile = {1: ((32,), (64,)), 2: ((8, 4), (4, 16)), 3: ((2, 4, 4), (4, 4, 4))}[rank]
    made = spec(tokens=[512] if rank == 1 else [20] * rank, mask={"kind": "full"})
    both = kernel(made, "sm_90", q_tile=q_tile, k_tile=k_tile)
    assert (both.q_tile, both.k_tile) == (q_tile, k_tile)
    assert kernel(made, "sm_90", q_tile=q_tile).q_tile == q_tile
    assert kernel(made, "sm_90", k_tile=k_tile).k_tile == k_tile


@pytest.mark.parametrize(
    ("q_tile", "k_tile"), [((8,), (16,)), ((16,), (8,)), ((48,), (16,)), ((16,), (24,)), ((0,), (16,)), ((-16,), (16,))]
)
def test_tiles_that_no_matrix_unit_takes_are_refused(q_tile: tuple[int, ...], k_tile: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="tile"):
        plan(spec(), "sm_90", q_tile, k_tile)


@pytest.mark.parametrize("tile", [(), (16,), (2, 2, 4), (-4, -4), (3, 16), (64, 0)])
@pytest.mark.parametrize("side", ["q_tile", "k_tile"])
def test_wrong_sides_are_refused(side: str, tile: tuple[int, ...]) -> None:
    tiles: Any = {"q_tile": (4, 4), "k_tile": (4, 4), side: tile}
    with pytest.raises(UnsupportedError, match=rf"{side}=.*powers of two, 2 of them"):
        plan(spec(tokens=[20, 20], mask={"kind": "full"}), "sm_90", **tiles)


def test_a_demanded_tile_that_does_not_fit_says_so() -> None:
    with pytest.raises(UnsupportedError, match=r"\[128\] x \[128\].* on sm_86 is not supported: \d+ bytes over"):
        plan(spec(dtype="float32", head_dim=256), "sm_86", (128,), (128,))


@given(st.sampled_from([1, 2, 4, 16, 64, 128]), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_shapes_are_factorisations(rows: int, lengths: list[int]) -> None:
    found = shapes(rows, tuple(lengths))
    assert found and len(set(found)) == len(found)
    for shape in found:
        assert prod(shape) == rows and len(shape) == len(lengths)
        assert all(side == 1 or side < 2 * length for side, length in zip(shape[:-1], lengths))


@settings(max_examples=40)
@given(cases(Sizes(tokens=400, longest=120), mask_only=True), st.data())
def test_prices_are_the_block_masks(case: Case, data: st.DataObject) -> None:
    """What a tile shape costs is what the bands of the mask make it visit; a residual makes every tile partial."""
    mask = bound_mask(case.spec, *case.grids)
    side = st.sampled_from([1, 2, 4, 8])
    q_tile, k_tile = (tuple(data.draw(side) for _ in mask.query) for _ in "qk")
    bands = block_mask(mask.hull, q_tile, k_tile)
    full = bands.full if mask.banded else 0
    wanted = prod(q_tile) * prod(k_tile) * (full + MASKED_TILE * (bands.visited - full))
    pricer = Pricer(plan(AttentionSpec.model_validate(case.spec), "cpu").kernels[0].graph)
    vars(pricer)["mask"] = mask  # at the case's lengths, not the nominal ones
    assert pricer.work(q_tile, k_tile) == pytest.approx(wanted) or bands.axes is None


def test_a_window_gets_square_tiles() -> None:
    """A 2-D window visits fewest tiles with compact ones, not with strips of a row."""
    rule = {"kind": "neighborhood", "window": [9, 9], "stride": [1, 1], "dilation": [1, 1], "causal": [False, False]}
    found = kernel(spec(tokens=[64, 64], mask=rule), "sm_90")
    assert max(found.q_tile) <= 4 * min(found.q_tile)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
def test_an_open_axis_beside_a_short_one_is_taken_for_long(name: str) -> None:
    """Frames of a few joints: a grid priced on as many frames as a picture has rows would get tiles of half the size."""
    for tokens, long in (([None, 7], [1024, 7]), ([4, None, None], [4, 96, 96])):
        made, known = (kernel(spec(tokens=each, mask={"kind": "full"}), name) for each in (tokens, long))
        assert (made.q_tile, made.k_tile) == (known.q_tile, known.k_tile)
    assert prod(kernel(spec(tokens=[None, 7], mask={"kind": "full"}), name).q_tile) == 128
