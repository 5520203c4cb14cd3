"""Searches: published claims, equality with `simulate`, fronts by brute force, one clear error for bad input."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import attncc
from attncc import AttentionSpec, Candidate, masks, pipeline, scores
from attncc.cli.app import app
from attncc.errors import AttnccError, InputError, TargetError
from attncc.simulator import machine, many, search

LINE = AttentionSpec(tokens=(32768,), heads=1, head_dim=128, mask=masks.Neighborhood(window=2048))
FLUX = AttentionSpec(tokens=(256, 256), heads=24, head_dim=128, mask=masks.Neighborhood(window=(80, 80), stride=(16, 16)))
VIDEO = AttentionSpec(tokens=(30, 48, 80), heads=24, head_dim=128, mask=masks.Neighborhood(window=(18, 24, 24), stride=(16, 8, 8)))
SMALL = AttentionSpec(tokens=(48, 40), heads=2, head_dim=64, mask=masks.Neighborhood(window=(8, 8)))
OPEN = AttentionSpec(tokens=(None,), heads=2, head_dim=64, mask=masks.SlidingWindow(left=1023, right=0))


# ---- published claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q_tile", "k_tile"), [(128, 128), (256, 128)])
def test_smallest_stride_of_a_line(q_tile: int, k_tile: int) -> None:
    assert search.smallest_stride(LINE, (q_tile,), (k_tile,)) == (256,)


@pytest.mark.parametrize(
    ("spec", "q_tile", "k_tile", "bound"),
    [(FLUX, (16, 8), (16, 8), "10.24"), (FLUX, (16, 16), (16, 8), "10.24"), (VIDEO, (2, 8, 8), (2, 8, 8), "11.1")],
)
def test_published_grids(spec: AttentionSpec, q_tile: Any, k_tile: Any, bound: str) -> None:
    """Fully block-sparse as published, with strides no larger than theirs, and with none below those found."""
    (report,) = attncc.simulate_many([spec], "h100", q_tile=q_tile, k_tile=k_tile)
    found = search.smallest_stride(spec, q_tile, k_tile)
    assert report.block_sparse and f"{report.flop_bound:.{len(bound.partition('.')[2])}f}" == bound
    assert isinstance(spec.mask, masks.Neighborhood) and isinstance(spec.mask.stride, tuple)
    assert all(n is not None and n <= published for n, published in zip(found, spec.mask.stride))


def test_smallest_strides_are_brute_force() -> None:
    spec = AttentionSpec(tokens=(96, 64), heads=1, head_dim=64, mask=masks.Neighborhood(window=(32, 12), dilation=(1, 2)))
    found = search.smallest_stride(spec, (8, 4), (8, 4))
    tried = search.neighborhoods(spec, [[32], [12]], [range(1, 33), range(1, 13)], [[1], [2]])
    sparse = [r.spec.mask for r in attncc.simulate_many(tried, "cpu", q_tile=(8, 4), k_tile=(8, 4)) if r.block_sparse]
    strides = [m.stride for m in sparse if isinstance(m, masks.Neighborhood) and isinstance(m.stride, tuple)]
    assert found == tuple(min(s[a] for s in strides) for a in range(2))
    assert search.smallest_stride(LINE.model_copy(update={"mask": masks.Neighborhood(window=2047)}), (128,), (128,)) == (None,)
    cut_short = AttentionSpec(tokens=(100,), heads=1, head_dim=64, mask=masks.Neighborhood(window=16))
    assert search.smallest_stride(cut_short, (8,), (8,)) == (None,), "aligned at the beginning, not at the end"


# ---- as `simulate` ---------------------------------------------------------------------------------------------------------------


def candidate(rng: random.Random) -> Candidate:
    """Grids of any rank, dilations that do not divide, causal axes, tiles that overhang."""
    rank = rng.choice([1, 2, 3])
    tokens = tuple(rng.randint(3, (900, 50, 14)[rank - 1]) for _ in range(rank))
    dilation = tuple(rng.randint(1, min(3, n)) for n in tokens)
    window = tuple(rng.choice([n // d, rng.randint(1, n // d)]) for n, d in zip(tokens, dilation))
    stride = tuple(rng.randint(1, w) for w in window)
    causal = tuple(rng.random() < 0.3 for _ in tokens)
    mask = masks.Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)
    maps: Any = rng.choice([(), (scores.Softcap(cap=3.0),), (scores.RelativeBias(extent=(3,) * rank),)])
    spec = AttentionSpec(tokens=tokens, heads=rng.choice([1, 40]), head_dim=64, mask=mask, scores=maps)
    sizes = {1: [16, 64, 128, 48], 2: [4, 8, 16, 3], 3: [2, 4, 8, 3]}[rank]
    return Candidate(spec, *(tuple(rng.choice(sizes) for _ in tokens) for _ in range(2)))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch": 2, "splits": 3},
    {"direction": "backward", "mask_policy": "every tile", "pipeline": "warp-specialised"},
]


@pytest.mark.parametrize("seed", range(len(OPTIONS)))
def test_many_are_as_one(seed: int) -> None:
    """Every figure equal to the last bit: counts, bounds, times, limits."""
    options = OPTIONS[seed]
    candidates = [candidate(random.Random(seed * 1000 + i)) for i in range(60)]
    found = attncc.simulate_many(candidates, "h100", **options)
    assert found == [attncc.simulate(c.spec, "h100", c.q_tile, c.k_tile, **options) for c in candidates]
    assert sum(r.prediction is not None for r in found) > 10


OTHERS: list[Any] = [
    masks.Causal(),
    masks.Full(),
    masks.Sinks(count=3),
    masks.Predicate(text="(q * k) % 7 < 3"),
    masks.Causal() & masks.Prefix(length=99),
]


@pytest.mark.parametrize("target", ["h100", "cpu", "sm_90"])
def test_other_masks_are_as_one_too(target: str) -> None:
    specs = [AttentionSpec(tokens=(1000,), heads=3, head_dim=64, mask=mask) for mask in OTHERS]
    found = attncc.simulate_many([*specs, Candidate(specs[0], (16,), (32,))], target, k_tile=(64,))
    wanted = [attncc.simulate(s, target, k_tile=(64,)) for s in specs]
    assert found == [*wanted, attncc.simulate(specs[0], target, (16,), (32,))]


def test_queues_are_scheduled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds over all queues, or one block after the other: the same end, copies and long queues included."""
    rng = np.random.default_rng(0)
    patterns = [rng.choice([1.1, 2.3, 7.7], size=n) * rng.uniform() for n in (1, 5, 40, 300, 77)]
    copies, slots = [9, 1, 7, 3, 24], 33
    for longest in (1 << 16, 100):
        monkeypatch.setattr(machine, "LONGEST_QUEUE", longest)
        queues = machine._Queues.of(patterns, copies)
        assert queues.in_rounds(slots).tolist() == queues.one_by_one(slots).tolist()


def test_progress_counts_candidates() -> None:
    done: list[int] = []
    attncc.simulate_many([SMALL] * 5, "h100", q_tile=(8, 8), k_tile=(8, 8), progress=done.append)
    assert sum(done) == 5


def test_a_copied_spec_keeps_nothing_of_the_old_one() -> None:
    """The baseline is a copy without its mask."""
    first = FLUX.digest, FLUX.predicate
    copy = FLUX.model_copy(update={"mask": masks.Full()})
    assert copy == AttentionSpec(tokens=(256, 256), heads=24, head_dim=128)
    assert (copy.digest, copy.predicate) != first
    with pytest.raises(ValueError, match="window 80"):
        FLUX.model_copy(update={"tokens": (64, 64)})


# ---- searches --------------------------------------------------------------------------------------------------------------------


def test_best_tiles_are_the_best() -> None:
    ranked = search.best_tiles(SMALL, "h100")
    times = [attncc.simulate(SMALL, "h100", r.q_tile, r.k_tile).prediction for r in ranked[:: len(ranked) // 7]]
    assert [t.milliseconds for t in times if t] == sorted(r.prediction.milliseconds for r in ranked[:: len(ranked) // 7] if r.prediction)
    assert search.best_tiles(SMALL, "h100", top=2) == ranked[:2]
    planned = attncc.simulate(SMALL, "h100").prediction
    assert planned and ranked[0].prediction and ranked[0].prediction.milliseconds <= planned.milliseconds


@pytest.mark.parametrize("by", ["predicted", "tiles"])
def test_the_front_is_a_front(by: Any) -> None:
    specs = search.neighborhoods(SMALL, [range(4, 25, 4)], [[1, 3, 4, 8]], [[1, 2]])
    kept = search.pareto(specs, "h100", (8, 8), (8, 8), by=by)
    every = attncc.simulate_many(specs, "h100", q_tile=(8, 8), k_tile=(8, 8))

    def point(r: Any) -> tuple[float, float]:
        return (r.predicted_speedup if by == "predicted" else r.tile_bound, 1 - r.sparsity)

    def beaten(r: Any) -> bool:
        return any(point(o) != point(r) and point(o)[0] >= point(r)[0] and point(o)[1] >= point(r)[1] for o in every)

    wanted = [r for r in every if not beaten(r)]
    assert len(kept) == len(wanted) > 3
    assert all(r in wanted for r in kept)
    assert [point(r)[0] for r in kept] == sorted((point(r)[0] for r in kept), reverse=True)


def test_what_is_asked_for_is_reached() -> None:
    specs = search.neighborhoods(SMALL, [range(4, 25, 4)])
    assert all(r.sparsity >= 0.9 for r in search.pareto(specs, "h100", (8, 8), (8, 8), sparsity=0.9))
    assert all((r.predicted_speedup or 0) >= 1.5 for r in search.pareto(specs, "h100", (8, 8), (8, 8), speedup=1.5))
    assert search.pareto(specs, "h100", (8, 8), (8, 8), speedup=1e6) == []


def test_the_cheapest_mask() -> None:
    specs = [
        OPEN.model_copy(update={"mask": m, "heads": 32}) for m in (masks.Full(), masks.SlidingWindow(left=255, right=0), masks.Causal())
    ]
    assert [i for i, _ in search.cheapest(specs, "h100", lengths=8192)] == [1, 2, 0]


def test_growth_with_length() -> None:
    found = search.by_length(OPEN, "h100", [4096 << i for i in range(9)])
    assert [r.tokens for r in found] == [(4096 << i,) for i in range(9)]
    speedups = [r.predicted_speedup or 0.0 for r in found]
    assert speedups == sorted(speedups) and speedups[-1] > 100 * speedups[0]
    assert [r.tokens for r in search.by_length(SMALL, "cpu", [16, 32], axis=1)] == [(48, 16), (48, 32)]


# ---- end to end ------------------------------------------------------------------------------------------------------------------


def test_end_to_end() -> None:
    report = attncc.simulate(LINE, "h100", baseline=1e9)
    assert report.end_to_end(0.0) == 1.0
    assert report.end_to_end(0.5) == pytest.approx(2.0)
    assert report.end_to_end(1.0) == pytest.approx(report.predicted_speedup)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="attention_share"):
            report.end_to_end(wrong)
    with pytest.raises(InputError, match="sm_90 is an architecture"):
        attncc.simulate(LINE, "sm_90").end_to_end(0.5)


# ---- bad input -------------------------------------------------------------------------------------------------------------------

BAD: list[tuple[Any, type[AttnccError], str]] = [
    (lambda: attncc.simulate_many([SMALL], "h101"), TargetError, "'h101' is unknown"),
    (lambda: attncc.simulate_many([SMALL], "h100", q_tile=(8,)), InputError, "q_tile: has 1 sides"),
    (lambda: attncc.simulate_many([SMALL], "h100", splits=0), InputError, "splits: must be a positive integer"),
    (lambda: search.best_tiles(SMALL, "sm_90"), TargetError, "target: sm_90 is an architecture"),
    (lambda: search.best_tiles(OPEN, "h100"), InputError, "lengths: give one"),
    (lambda: search.smallest_stride(OPEN, (8,), (8,), 64), InputError, "spec: its mask must be a neighborhood"),
    (lambda: search.smallest_stride(SMALL, (8,), (8, 8)), InputError, "q_tile: has 1 sides"),
    (lambda: search.neighborhoods(SMALL, [[41]]), InputError, "windows: window 41 exceeds the 40 tokens of axis 1"),
    (lambda: search.neighborhoods(SMALL, [[]]), InputError, "windows: an empty range"),
    (lambda: search.neighborhoods(SMALL, [[4], [4], [4]]), InputError, "windows: has 3 axes, tokens have 2"),
    (lambda: search.neighborhoods(SMALL, [[4]], [[5]]), InputError, "strides: every stride exceeds its window"),
    (lambda: search.neighborhoods(SMALL, [[0, 4]]), InputError, "windows: must be positive integers"),
    (lambda: search.pareto([SMALL], "h100", (8, 8), (8, 8), sparsity=1.0), InputError, "sparsity: must be"),
    (lambda: search.pareto([SMALL], "h100", (8, 8), (8, 8), speedup=-1.0), InputError, "speedup: must be"),
    (lambda: search.cheapest([SMALL, LINE], "h100"), InputError, "specs: grids of rank 1 and 2 cannot be compared"),
    (lambda: search.cheapest([], "h100"), InputError, "specs: none given"),
    (lambda: search.by_length(OPEN, "h100", []), InputError, "lengths: an empty range"),
    (lambda: search.by_length(LINE, "h100", [64]), InputError, "lengths: mask: window 2048"),
    (lambda: search.by_length(OPEN, "h100", [64], axis=1), InputError, "axis: must be below 1"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call: Any, kind: type[AttnccError], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# ---- command line ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run("search", "tiles", "small.json")`: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    for name, spec in {"line": LINE, "small": SMALL, "flux": FLUX, "open": OPEN}.items():
        Path(f"{name}.json").write_text(spec.to_json(), encoding="utf-8")

    def run(*arguments: Any) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        return result.exit_code, result.stdout, result.stderr

    return run


def test_commands(run: Any) -> None:
    stride = run("search", "stride", "line.json", "--q-tile", 128, "--k-tile", 128, "--json")
    assert json.loads(stride[1]) == {"stride": [256], "block_sparse": True}
    assert len(json.loads(run("search", "tiles", "small.json", "--top", 3, "--json")[1])) == 3
    found = run("search", "lengths", "open.json", "--lengths", "4096..1048576", "--csv")[1]
    rows = list(csv.DictReader(io.StringIO(found)))
    assert [int(row["tokens"]) for row in rows] == [4096 << i for i in range(9)]
    code, out, err = run("search", "masks", "flux.json", "small.json", "--csv")
    assert (code, err) == (0, "") and [line.split(",")[0] for line in out.splitlines()] == ["spec", "small.json", "flux.json"]
    tiles = ("--q-tile", "8,8", "--k-tile", "8,8")
    front = json.loads(run("search", "front", "small.json", "--windows", "8..24/8x8,16", "--strides", "1..8", *tiles, "--json")[1])
    assert front and all(attncc.SpeedupReport.model_validate(r) for r in front)
    assert "nothing reaches" in run("search", "front", "small.json", "--windows", 8, *tiles, "--speedup", 1e6)[1]


def test_options_of_simulate(run: Any) -> None:
    tiles = ("--target", "h100", "--q-tile", "16,8", "--k-tile", "16,8")
    report = json.loads(run("simulate", "flux.json", *tiles, "--attention-share", 0.6, "--baseline-ms", 100, "--json")[1])
    assert report["end_to_end"]["speedup"] == pytest.approx(1 / (0.4 + 0.6 / report["predicted_speedup"]))
    assert report["baseline_prediction"]["milliseconds"] == 100
    for option, value, name in [
        ("--direction", "up", "direction"), ("--splits", 0, "splits"), ("--baseline-ms", -1, "baseline"),
        ("--mask-policy", "no", "mask_policy"),
        ("--pipeline", "no", "pipeline"), ("--resources", "no", "resources"), ("--constants", "no", "constants"),
        ("--attention-share", 2, "attention_share"),
    ]:  # fmt: skip
        code, out, err = run("simulate", "flux.json", *tiles, option, value)
        assert (code, out) == (1, "") and err.startswith(f"attncc: {name}: ") and err.count("\n") == 1


@pytest.mark.parametrize(("windows", "code"), [("a", 2), ("8..", 2), ("8/2", 2), ("24..8", 1), ("999", 1), ("0", 2)])
def test_bad_ranges(run: Any, windows: str, code: int) -> None:
    assert run("search", "front", "small.json", "--windows", windows, "--q-tile", "8,8", "--k-tile", "8,8")[0] == code


def test_candidates_that_differ_in_their_mask_share_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    plan = pipeline.plan

    def counted(*given: Any) -> Any:
        planned.append(given)
        return plan(*given)

    monkeypatch.setattr(pipeline, "plan", counted)
    fields: dict[str, Any] = {"tokens": (64, 64), "heads": 2, "head_dim": 64, "dtype": "bfloat16"}
    specs = [AttentionSpec(**fields, mask=masks.Neighborhood(window=(w, 9))) for w in range(3, 13)]
    assert len(list(many.simulate_many(specs, "h100", q_tile=(8, 8), k_tile=(8, 8)))) == 10
    assert len(planned) <= 2  # of the masks, and of none
