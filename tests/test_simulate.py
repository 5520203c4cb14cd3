"""The simulator's bounds: published claims exactly, counts equal to brute force, and no torch behind them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attncc
from attncc import AttentionSpec, masks, pipeline
from attncc.errors import InputError, TargetError
from attncc.simulator import SpeedupReport, simulate
from tests.strategies import cases, tiles

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_h100.json").read_text(encoding="utf-8"))
CLAIMS = [(claim, q, k) for claim in PUBLISHED["claims"] for q, k in claim["tiles"]]


def a_spec(mask: Any, tokens: Any, **fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"tokens": tokens, "heads": 1, "head_dim": 128, "mask": mask, **fields})


def neighborhood(tokens: list[int], window: list[int], stride: list[int]) -> AttentionSpec:
    return a_spec(masks.Neighborhood(window=tuple(window), stride=tuple(stride)), tuple(tokens))


# ---- published claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("claim", "q_tile", "k_tile"), CLAIMS)
def test_published_claims(claim: Any, q_tile: list[int], k_tile: list[int]) -> None:
    """FLOP bounds to every published digit; fully block-sparse, or not, as published. Then the two bounds agree."""
    report = simulate(neighborhood(claim["tokens"], claim["window"], claim["stride"]), "h100", tuple(q_tile), tuple(k_tile))
    exact = Fraction(math.prod(claim["tokens"]), math.prod(claim["window"]))
    digits = len(claim["flop_bound"].partition(".")[2])
    assert report.flop_bound == float(exact)
    assert f"{report.flop_bound:.{digits}f}" == claim["flop_bound"]
    assert report.block_sparse == claim["block_sparse"] == (report.tiles.partial == 0)
    assert report.exact
    if report.block_sparse:
        assert report.tile_bound == report.flop_bound


@pytest.mark.parametrize(("q_tile", "k_tile"), PUBLISHED["smallest_stride"]["tiles"])
def test_the_smallest_block_sparse_stride(q_tile: list[int], k_tile: list[int]) -> None:
    claim = PUBLISHED["smallest_stride"]
    sparse = [
        stride
        for stride in range(1, claim["stride"] + 1)
        if simulate(neighborhood(claim["tokens"], claim["window"], [stride]), "h100", tuple(q_tile), tuple(k_tile)).block_sparse
    ]
    assert sparse == [claim["stride"]]


TILE_BOUNDS = {
    "1d-32k-na": 65536 / 4336, "1d-32k-s256": 16.0, "1d-32k-blocked": 16.0, "flux-4k-na": 262144 / 34884, "flux-4k-gna": 10.24,
    "hunyuan-na": 810000 / 148896, "hunyuan-gna": 810000 / 72900,
}  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED["rows"], ids=lambda row: row["name"])
def test_published_configurations(row: Any) -> None:
    """Tile counts of the published configurations (brute force agrees), and no tile bound above its FLOP bound."""
    report = simulate(neighborhood(row["tokens"], row["window"], row["stride"]), "h100", tuple(row["q_tile"]), tuple(row["k_tile"]))
    assert report.tile_bound == TILE_BOUNDS[row["name"]]
    assert report.tile_bound <= report.flop_bound


# ---- counts --------------------------------------------------------------------------------------------------------------------


@given(data=st.data(), case=cases())
@settings(max_examples=200)
def test_counts_are_brute_force(data: Any, case: Any) -> None:
    spec = AttentionSpec.model_validate(case.spec)
    q_tile, k_tile = data.draw(tiles(spec.grid.rank)), data.draw(tiles(spec.grid.rank))
    inputs = case.inputs(torch.float32)[3]
    tables = {name: x.numpy() for name, x in inputs.items() if not x.is_floating_point()}
    report = simulate(spec, "cpu", q_tile, k_tile, lengths=case.lengths, tables=tables, batch=case.batch)
    allowed = np.broadcast_to(case.mask(inputs), (case.batch, spec.heads, *case.mask(inputs).shape[2:]))
    share = _routed_share(case.spec, inputs)
    if allowed.shape[1] > 1 and share != 1 and case.mask(inputs).shape[1] > 1:
        return  # of masks that differ by head, shares are averaged
    computed = allowed.mean() * share
    assert report.sparsity == pytest.approx(1 - computed, abs=1e-12)
    assert report.flop_bound == (pytest.approx(1 / computed) if computed else math.inf)
    query, key = case.grids
    assert report.tiles.query == math.prod(-(-n // t) for n, t in zip(query, q_tile))
    assert report.tiles.total == report.tiles.query * report.tiles.key
    assert report.tiles.visited == pytest.approx(report.tiles.full + report.tiles.partial)  # means of six heads are thirds
    assert report.block_sparse == (report.tiles.partial == 0) or not share
    assert report.tile_bound == (pytest.approx(report.tiles.total / report.tiles.visited) if report.tiles.visited else math.inf)
    if set(pipeline.canonical(spec).order) == {1}:  # with residue classes, tiles are no boxes of the grid
        visited, full = _brute(allowed, query, key, q_tile, k_tile)
        assert [report.tiles.visited, report.tiles.full] == pytest.approx([visited * share, full * share])


def _routed_share(spec: Any, inputs: Any) -> float:
    """Share of rows that are routed, as far as the spec and its integer tables say."""
    routing = spec.get("routing") or {"kind": None}
    if routing["kind"] == "mixture_of_heads":
        return float((routing["shared"] + routing["top_k"]) / spec["heads"])
    return float(inputs["head_mask"].double().mean()) if routing["kind"] == "head_mask" else 1.0


def _brute(allowed: Any, query: Any, key: Any, q_tile: Any, k_tile: Any) -> tuple[float, float]:
    """Mean number of visited and of full tiles, tile by tile; a tile that keys do not fill is never full."""
    grid = allowed.reshape(-1, *query, *key)
    visited = full = 0
    for at in np.ndindex(*(-(-n // t) for n, t in zip((*query, *key), (*q_tile, *k_tile)))):
        box = tuple(slice(i * t, (i + 1) * t) for i, t in zip(at, (*q_tile, *k_tile)))
        inside = all((i + 1) * t <= n for i, t, n in zip(at[len(query) :], k_tile, key))
        pairs = grid[(slice(None), *box)].reshape(len(grid), -1)
        visited += int(pairs.any(axis=1).sum())
        full += int(pairs.all(axis=1).sum()) if inside else 0
    return visited / len(grid), full / len(grid)


def test_dilated_tiles_never_cross_a_class() -> None:
    """Two classes of 32 tokens: each is dense within itself, and no tile joins them."""
    report = simulate(a_spec(masks.Neighborhood(window=32, dilation=2), 64), "cpu", (16,), (16,))
    assert report.tiles.total == 16
    assert (report.tiles.visited, report.tiles.full) == (8, 8)
    assert report.tile_bound == report.flop_bound == 2.0


def test_heads_are_averaged() -> None:
    report = simulate(a_spec(masks.Predicate(text="h < 1 or k <= q"), 64, heads=4), "cpu", (16,), (16,))
    assert report.tiles.visited == (16 + 3 * 10) / 4
    assert report.sparsity == pytest.approx(0.75 * (1 - 65 / 128))


def test_tables_given_at_run_time() -> None:
    spec = a_spec(masks.Segments() & masks.Causal(), (None,), heads=2)
    labels = np.repeat(np.arange(8), 128)[None]
    report = simulate(spec, "h100", (128,), (128,), lengths=1024, tables={"segments": labels})
    assert (report.tiles.visited, report.tiles.partial) == (8, 8)
    assert report.tokens == (1024,)


def test_empty_and_full_masks() -> None:
    nothing = simulate(a_spec(masks.Predicate(text="k < 0"), 64), "cpu", (16,), (16,))
    assert (nothing.flop_bound, nothing.tile_bound, nothing.sparsity) == (math.inf, math.inf, 1.0)
    everything = simulate(a_spec(masks.Full(), 64), "cpu", (16,), (16,))
    assert (everything.flop_bound, everything.tile_bound, everything.sparsity, everything.block_sparse) == (1.0, 1.0, 0.0, True)


# ---- the report ----------------------------------------------------------------------------------------------------------------


def test_report_round_trips_and_names_its_baseline() -> None:
    spec = a_spec(masks.Predicate(text="k < 0"), 64)
    report = attncc.simulate(spec, "sm_90")
    data = json.loads(report.to_json())
    assert SpeedupReport.from_json(report.to_json()) == report
    assert data["flop_bound"] is None
    assert data["predicted_speedup"] is None and "sm_90 is an architecture" in data["unpredicted"]
    assert data["baseline"] == "dense attention, same tiles"
    assert data["spec"] == spec.model_dump(mode="json")
    with pytest.raises(ValueError, match="frozen"):
        setattr(report, "exact", False)  # noqa: B010 (a plain assignment is one that type checkers refuse)


def test_default_tiles_are_the_plans() -> None:
    from attncc.pipeline import plan

    spec = a_spec(masks.Neighborhood(window=(33, 33)), (128, 128))
    kernel, report = plan(spec, "sm_90").kernels[0], simulate(spec, "sm_90")
    assert (report.q_tile, report.k_tile) == (kernel.q_tile, kernel.k_tile)
    one_given = simulate(spec, "sm_90", q_tile=(3, 5))
    assert (one_given.q_tile, one_given.k_tile) == ((3, 5), kernel.k_tile)


def test_table_says_what_the_report_says() -> None:
    from io import StringIO

    from rich.console import Console

    out = Console(file=StringIO(), width=120)
    report = simulate(neighborhood([256, 256], [80, 80], [1, 1]), "h100", (16, 8), (16, 8))
    out.print(report)
    for text in (out.file.getvalue(), str(report)):  # type: ignore[attr-defined]
        for part in ("10.24×", "7.51×", "34,884 of 262,144", "17,284 full, 17,600 partial", "dense attention, same tiles"):
            assert part in text


# ---- bad input -----------------------------------------------------------------------------------------------------------------

LABELLED = a_spec(masks.Segments(), 64)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (a_spec(masks.Causal(), 64), {"q_tile": (16, 8)}, "q_tile: has 2 sides, tokens have 1 axes"),
        (a_spec(masks.Causal(), 64), {"k_tile": (0,)}, "k_tile: sides must be positive integers"),
        (a_spec(masks.Causal(), 64), {"lengths": 64}, "lengths: every axis of the spec is known; 1 given"),
        (a_spec(masks.Causal(), (None, 4)), {"lengths": (1, 2)}, r"lengths: give one for each of tokens\[0\]; 2 given"),
        (a_spec(masks.Causal(), (None,)), {"lengths": (-1,)}, "lengths: must be positive integers"),
        (a_spec(masks.Neighborhood(window=9), (None,)), {"lengths": 8}, "lengths: mask: window 9 x dilation 1 exceeds the 8 tokens"),
        (LABELLED, {}, r"tables: the mask reads segments \[B, NQ\]"),
        (
            LABELLED,
            {"tables": {"segments": np.zeros((1, 63), int)}},
            r"segments has shape \[1, 63\], must be segments \[B, NQ\] = \[1, 64\]",
        ),
        (LABELLED, {"tables": {"segments": np.zeros(64, int)}}, "segments has shape"),
        (LABELLED, {"tables": {"segments": np.zeros((1, 64))}}, "segments has dtype float64, must be integers"),
        (LABELLED, {"tables": {"segments": np.full((1, 64), 2**40)}}, "do not fit 32 bits"),
        (a_spec(masks.Predicate(text="q * k % 7 < 3"), 9999), {"q_tile": (4096,), "k_tile": (4096,)}, "tiles of at most"),
    ],
)
def test_bad_input_is_named(spec: AttentionSpec, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(spec, "h100", **{"q_tile": (16,) * spec.grid.rank, "k_tile": (16,) * spec.grid.rank, **arguments})


def test_unknown_target() -> None:
    with pytest.raises(TargetError, match="'h101' is unknown; known are cpu"):
        simulate(LABELLED, "h101")


# ---- cost ----------------------------------------------------------------------------------------------------------------------


def test_a_million_tokens_in_little_memory() -> None:
    """Exact counts; what Python and numpy allocate stays far below what an array of all tiles, let alone of all pairs, would need."""
    spec = a_spec(masks.SlidingWindow(left=4095, right=0), 1 << 20)
    simulate(a_spec(masks.Causal(), 64), "h100", (16,), (16,))  # imports
    tracemalloc.start()
    report = simulate(spec, "h100", (128,), (128,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows, full_span = (1 << 20) // 128, 31
    assert report.tiles.visited == sum(min(row, 32) + 1 for row in range(rows))
    assert report.tiles.full == sum(min(row, full_span) for row in range(rows))
    assert report.flop_bound == 2**40 / (4096 * 2**20 - 4096 * 4095 // 2)
    assert peak < 20e6


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
"""


def test_no_torch_and_no_triton() -> None:
    code = f"""{BLOCKER}
import attncc
spec = attncc.AttentionSpec(tokens=(30, 48, 80), heads=24, head_dim=128, mask=attncc.masks.Neighborhood(window=(18, 24, 24)))
print(attncc.simulate(spec, "h100").tiles.visited > 0, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
