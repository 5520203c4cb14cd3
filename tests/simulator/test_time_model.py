"""The time model: against published timings that nothing is fitted to, and against simulations simple enough to be right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attncc
from attncc import AttentionSpec, loads, masks, normalizers, scores
from attncc.errors import InputError
from attncc.pipeline import plan
from attncc.simulator import constants, machine, predict, work
from attncc.simulator.bounds import classify
from attncc.simulator.instructions import Compiled, compiled_work, loop_work
from attncc.targets import target
from benchmarks import calibrate, simulator
from benchmarks.workers import ROOT

H100 = target("h100")
SHIPPED = constants.shipped()
CAUSAL = masks.Causal()


def line(tokens: int = 4096, mask: Any = None, **fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"tokens": (tokens,), "heads": 8, "head_dim": 128, "dtype": "float16", "mask": mask or masks.Full(), **fields})


# ---- published timings ---------------------------------------------------------------------------------------------------------


def test_predictions_of_published_timings() -> None:
    """The bars of `docs/simulator.md`: half the tile bound's error, 15 % in the median, 30 % at worst."""
    found = simulator.rows()
    errors, bounds = ([abs(e) for e in column] for column in ((r.error for r in found), (r.bound_error for r in found)))
    assert len(found) == 7
    assert median(errors) <= 0.15
    assert max(errors) <= 0.30
    assert median(errors) <= median(bounds) / 2


def test_cases_that_differ_are_in_the_right_order() -> None:
    """Of two published speedups more than 10 % apart, the larger one is predicted to be the larger."""
    found = simulator.rows()
    pairs = [(a, b) for a in found for b in found if a.measured > 1.1 * b.measured]
    assert len(pairs) >= 12
    assert all(a.predicted > b.predicted for a, b in pairs)


def test_nothing_is_fitted_to_the_published_rows() -> None:
    """No file that constants are fitted to holds a time of theirs, and the fit can be repeated."""
    published = json.loads(simulator.PUBLISHED.read_text())
    times = {row[name] for row in published["rows"] for name in ("kernel_ms", "baseline_ms", "permute_ms") if row[name]}
    for path in calibrate.FOLDER.glob("*.json"):
        assert not times & set(_numbers(json.loads(path.read_text())))
    assert calibrate.fit_power() == SHIPPED.power
    rows = [row for row in calibrate.measured() if row.kernel == "triton"]
    assert calibrate.fit(rows, SHIPPED.power, "triton") == SHIPPED.pipelines["triton"]


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")
    cells = [[cell.strip(" *") for cell in line.split("|")] for line in page.replace("\u2212", "-").replace(" %", "%").splitlines()]
    for line in simulator.lines(simulator.rows()):
        assert ["", *line, ""] in cells


def _numbers(data: Any) -> list[float]:
    if isinstance(data, (dict, list)):
        return [n for x in (data.values() if isinstance(data, dict) else data) for n in _numbers(x)]
    return [data] if isinstance(data, float) else []


# ---- work ----------------------------------------------------------------------------------------------------------------------


def test_work_of_a_tile() -> None:
    """128 x 128 scores of width 128: four million multiply-adds, an exponential each, keys and values once from L2."""
    tiles = work.tile_work(plan(line(), "h100", (128,), (128,)).kernels[0])
    pairs = 128 * 128
    assert tiles.full.tensor == 4 * pairs * 128
    assert tiles.full.exp == pairs
    assert tiles.full.cache == 2 * 128 * 128 * 2
    assert tiles.partial.integer > tiles.full.integer
    assert replace(tiles.partial, integer=0.0) == replace(tiles.full, integer=0.0)


def test_sums_and_counts_cost() -> None:
    def kernel(normalizer: Any, mask: masks.Mask = CAUSAL) -> Any:
        return plan(line(normalizer=normalizer, mask=mask), "h100", (128,), (128,)).kernels[0]

    ratio, plain = (work.score_work(kernel(n)) for n in (normalizers.PositiveRatio(weight="sigmoid"), normalizers.Sigmoid()))
    assert replace(ratio, fma=ratio.fma - 1) == plain
    assert work.score_work(kernel(normalizers.PositiveRatio())).exp > ratio.exp
    scaled = plan(line(token_scales=("v",), mask=masks.Causal()), "h100", (128,), (128,)).kernels[0]
    assert work.score_work(scaled).fma == work.score_work(kernel(normalizers.Softmax())).fma + 1
    for mask, counted in ((masks.Segments(), 1), (masks.Causal(), 0)):  # bands say how many keys there are
        mean, relu = (kernel(normalizers.ReLU(divisor=divisor), mask) for divisor in ("allowed", None))
        assert work.score_work(mean) == work.score_work(relu)
        assert work.mask_work(mean).fma == work.mask_work(relu).fma + counted


def test_factors_of_weights_cost() -> None:
    def fma(**fields: Any) -> float:
        return work.score_work(plan(line(mask=CAUSAL, **fields), "h100", (128,), (128,)).kernels[0]).fma

    by_pair = scores.Expression(text="float(q - k) * 0.5")
    assert fma(factor=scores.Bias(index=("k",))) == fma() + 1
    assert fma(factor=by_pair) == fma() + 2


def test_score_maps_and_predicates_cost() -> None:
    plain = work.score_work(plan(line(), "h100").kernels[0])
    capped = work.score_work(plan(line(scores=(scores.Softcap(cap=30.0),)), "h100").kernels[0])
    assert capped.exp > plain.exp and capped.fma > plain.fma
    window = work.mask_work(plan(line(mask=masks.SlidingWindow(left=9, right=9)), "h100").kernels[0])
    free = work.mask_work(plan(line(mask=masks.Predicate(text="(q * k) % 7 < 3")), "h100").kernels[0])
    assert free.integer > window.integer


def test_machine_code_replaces_counts_of_the_plan() -> None:
    """A made-up loop of 128 threads on a tile of 128 x 64: what the arithmetic units run counts, and nothing else."""
    kernel = plan(line(mask=masks.Causal()), "h100", (128,), (64,)).kernels[0]
    loop = {"MUFU.EX2": 64, "FFMA": 100, "FADD": 28, "ISETP": 10, "HGMMA": 9, "BAR": 3, "UMOV": 50, "STL": 70, "LDGSTS": 4}
    assert loop_work(loop, 128) == work.Work(exp=64 * 128, fma=128 * 128, integer=10 * 128)
    masked = loop | {"ISETP": 150, "FSEL": 64}
    peeled = {"FMUL": 300, "ISETP": 1}
    tiles = compiled_work(Compiled(200, 1 << 16, 128, (masked, peeled, loop)), kernel)
    assert (tiles.full.exp, tiles.full.integer, tiles.partial.integer) == (64 * 128, 10 * 128, 214 * 128)
    assert tiles.full.tensor == work.tile_work(kernel).full.tensor


def test_counts_of_the_plan_are_near_the_machine_code() -> None:
    """Softmax within a quarter; masks within a third: the compiler shares comparisons between columns as it likes."""
    for row in json.loads(simulator.PUBLISHED.read_text())["rows"][::3]:
        spec, tile = simulator.spec_of(row), tuple(row["q_tile"])
        kernel = plan(spec, "h100", tile, tile).kernels[0]
        counted = compiled_work(simulator.read_masking()[f"{len(tile)}-D, partial tiles"], kernel)
        planned = work.tile_work(kernel)
        assert planned.full.exp == pytest.approx(counted.full.exp, rel=0.25)
        assert planned.full.fma == pytest.approx(counted.full.fma, rel=0.25)
        assert planned.partial.integer == pytest.approx(counted.partial.integer, rel=0.34)


# ---- one SM --------------------------------------------------------------------------------------------------------------------


def sm(overlap: float = 0.5, blocks: int = 1, dtype: str = "float16") -> machine.Sm:
    assert H100.performance is not None
    return machine.Sm(H100.performance, dtype, constants.Pipeline(overlap=overlap, block_cycles=0.0, source=""), blocks)


def test_overlap() -> None:
    """4096 FLOP a cycle, 16 exponentials a cycle: products of 2048 cycles and exponentials of 1024."""
    tile = work.Work(tensor=4096.0 * 2048, exp=16.0 * 1024)
    assert sm(1.0).cycles(tile) == 2048
    assert sm(0.0).cycles(tile) == 3072
    assert sm(0.5).cycles(tile) == 2560
    assert sm(0.5, blocks=2).cycles(tile) == 2304
    assert sm(-0.5).cycles(tile) == 3584


def test_loads_hide_behind_what_is_slower() -> None:
    tile = work.Work(tensor=4096.0 * 2048, shared=128.0 * 5000)
    assert sm().cycles(tile) == 5000


def test_float32_takes_three_products() -> None:
    assert sm(dtype="float32").tensor_rate == pytest.approx(2048 / 3)


@given(st.floats(1e-6, 10.0), st.floats(0.01, 1.0))
def test_the_clock_keeps_between_its_limits(load: float, duty: float) -> None:
    device, power = H100.performance, SHIPPED.power["h100"]
    assert device is not None
    clock = machine.mean_clock(load, duty, device, power)
    least = device.max_clock_hz * min(1.0, (power.tensor_power * duty) ** (-1 / 3))
    assert least * (1 - 1e-9) <= clock <= device.max_clock_hz * (1 + 1e-9)
    assert machine.mean_clock(load * 2, duty, device, power) <= clock * (1 + 1e-9)


# ---- blocks over SMs -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 9))
def test_blocks_are_scheduled_one_after_the_other(blocks: list[int], slots: int) -> None:
    free = [0] * slots
    for block in blocks:
        i = free.index(min(free))
        free[i] += block
    assert machine.makespan(np.array(blocks, float), slots) == max(free)
    found = machine.timeline([float(b) for b in blocks], slots)
    assert max(slot.edges[-1] for slot in found) == max(free)
    assert sum(len(slot.edges) - 1 for slot in found) == len(blocks)


def test_long_queues_end_like_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = np.random.default_rng(0).uniform(1, 3, 5000)
    exact = machine.makespan(blocks, 7)
    monkeypatch.setattr(machine, "LONGEST_QUEUE", 500)
    assert machine.makespan(blocks, 7) == pytest.approx(exact, rel=5e-3)


# ---- predictions ---------------------------------------------------------------------------------------------------------------


def milliseconds(spec: AttentionSpec, **options: Any) -> float:
    report = attncc.simulate(spec, options.pop("target", "h100"), **options)
    assert report.prediction is not None
    return report.prediction.milliseconds


def test_times_move_as_they_must() -> None:
    dense = milliseconds(line())
    assert milliseconds(line(8192)) > 3 * dense
    assert milliseconds(line(mask=masks.Causal())) < dense
    assert milliseconds(line(), batch=4) > 3 * dense
    assert milliseconds(line(), direction="backward") > 1.5 * dense
    assert milliseconds(line(), target="a100") > dense
    window = line(mask=masks.SlidingWindow(left=300, right=300))
    assert milliseconds(window, mask_policy="every tile") > milliseconds(window)


def test_few_rows_gain_from_split_keys() -> None:
    decode = line(16, key_tokens=(1 << 18,), heads=1)
    assert milliseconds(decode, splits=64) < milliseconds(decode) / 8
    report = attncc.simulate(decode, "h100", splits=64)
    assert report.prediction is not None and report.prediction.blocks == 64


def test_no_row_sees_a_key() -> None:
    report = attncc.simulate(line(mask=masks.Predicate(text="k < 0")), "h100")
    assert report.tile_bound == math.inf
    assert report.predicted_speedup is not None and 1 < report.predicted_speedup < math.inf


def test_a_measured_baseline() -> None:
    report = attncc.simulate(line(mask=masks.Causal()), "h100", baseline=12.5)
    assert report.prediction is not None and report.baseline_prediction is not None
    assert report.baseline_prediction.kernel == "dense attention, measured"
    assert report.predicted_speedup == 12.5 / report.prediction.milliseconds


def test_why_there_is_no_time() -> None:
    assert "sm_90 is an architecture" in attncc.simulate(line(), "sm_90").unpredicted
    report = attncc.simulate(line(), "rtx4090", (512,), (512,))
    assert report.predicted_speedup is None and report.tile_bound == 1.0
    assert "bytes over the 101376 of shared memory" in report.unpredicted


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"direction": "sideways"}, "direction"),
        ({"splits": 0}, "splits"),
        ({"splits": True}, "splits"),
        ({"baseline": -1.0}, "baseline"),
        ({"baseline": math.nan}, "baseline"),
        ({"mask_policy": "none"}, "mask_policy"),
        ({"pipeline": "magic"}, "pipeline"),
        ({"resources": "no/such/file.json"}, "resources"),
        ({"constants": "no/such/file.json"}, "constants"),
    ],
)
def test_wrong_options_are_named(options: Any, name: str) -> None:
    with pytest.raises(InputError, match=name):
        attncc.simulate(line(mask=masks.Causal()), "h100", **options)


def test_constants_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    slow = SHIPPED.pipelines["triton"].model_copy(update={"overlap": -1.0})
    path.write_text(SHIPPED.model_copy(update={"pipelines": {**SHIPPED.pipelines, "triton": slow}}).model_dump_json())
    assert milliseconds(line(), constants=path) > milliseconds(line())
    path.write_text('{"pipelines": {"triton": {"overlap": 7}}, "power": {}}')
    with pytest.raises(InputError, match="constants"):
        attncc.simulate(line(), "h100", constants=path)


def test_occupancy_is_what_registers_and_shared_memory_allow() -> None:
    kernel = plan(line(head_dim=64), "h100").kernels[0]
    for registers, shared, blocks in ((255, 1 << 16, 2), (64, 1 << 14, 8), (32, 200_000, 1)):
        c = predict.Conditions(H100, compiled=Compiled(registers, shared, kernel.num_warps * 32, ()))
        limit = min(65536 // (kernel.num_warps * 32 * registers), 233472 // (shared + 1024))
        assert predict.blocks_per_sm(kernel, c) == limit
        assert limit == blocks or kernel.num_warps != 4


def test_keys_that_turn_are_moved_once_more() -> None:
    """A launch of their own reads and writes them: 2 x 4 heads x 4096 x 128 x 2 bytes."""
    plain, turned = (attncc.simulate(line(key_heads=4, loads=each), "h100").prediction for each in ((), (loads.Rotary(),)))
    assert plain is not None and turned is not None
    device = H100.performance
    assert device is not None
    moved = 2 * 4 * 4096 * 128 * 2 / device.memory_bytes_per_second
    extra = (turned.milliseconds - plain.milliseconds) / 1e3
    assert extra == pytest.approx(moved + device.launch_seconds, rel=1e-9)


# ---- kernels one after another -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("normalizer", [normalizers.Entmax(), normalizers.LSSAR(power=2.0)], ids=lambda n: n.kind)
def test_times_of_two_kernels_add_up(normalizer: Any, direction: Any) -> None:
    spec = line(normalizer=normalizer, mask=masks.Causal())
    report, made = attncc.simulate(spec, "h100", direction=direction), plan(spec, "h100")
    mask = classify(spec, made.kernels[0].q_tile, made.kernels[0].k_tile)
    rows = predict.Rows.of(mask, spec.heads, 1, made.kernels[0].row_order == "descending")
    apart = [predict.predict(kernel, rows, predict.Conditions(H100, direction=direction)) for kernel in made.kernels]
    assert report.prediction is not None and report.prediction.milliseconds == pytest.approx(sum(p.milliseconds for p in apart))
    assert report.prediction.busy["launch"] == pytest.approx(sum(p.busy["launch"] for p in apart))
    assert report.tile_bound == attncc.simulate(line(mask=masks.Causal()), "h100", report.q_tile, report.k_tile).tile_bound
    tiles = report.q_tile, report.k_tile
    assert attncc.simulate_many([attncc.Candidate(spec, *tiles)], "h100", direction=direction) == [
        attncc.simulate(spec, "h100", *tiles, direction=direction)
    ]


def test_every_sweep_walks_over_the_keys() -> None:
    few, many = (plan(line(normalizer=normalizers.Entmax(sweeps=n)), "h100").kernels[0] for n in (3, 15))
    assert work.tile_work(many).full.tensor == pytest.approx(4 * work.tile_work(few).full.tensor)
    assert work.tile_work(many).partial.integer == pytest.approx(4 * work.tile_work(few).partial.integer)
    assert work.tile_work(many, "backward").full.tensor == pytest.approx(work.tile_work(few, "backward").full.tensor)


def test_a_resource_report_is_of_one_kernel(tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    path.write_text(json.dumps({"registers": 128, "shared_bytes": 65536, "threads": 256, "loops": []}))
    with pytest.raises(InputError, match="resources: are of one kernel, and this plan has 2"):
        attncc.simulate(line(normalizer=normalizers.Entmax()), "h100", resources=path)
