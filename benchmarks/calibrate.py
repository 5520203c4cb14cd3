"""Fits the constants of the time model to measured files, never to those by which its error is reported.

`python -m benchmarks.calibrate` fits to benchmarks/calibration and writes attncc/simulator/data/constants.json.
`python -m benchmarks.calibrate --results R.json --device h100 -o mine.json` fits the pipeline "triton" to a results file of
`python -m benchmarks.gpu` as well; `attncc simulate --constants mine.json` then uses it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from attncc import AttentionSpec, masks
from attncc.passes.plan import KernelPlan
from attncc.pipeline import plan
from attncc.simulator.bounds import classify
from attncc.simulator.constants import Constants, Pipeline, Power, shipped
from attncc.simulator.predict import Conditions, Rows, predict
from attncc.targets import target
from benchmarks.gpu.cases import Case, by_name
from benchmarks.workers import ROOT

FOLDER = ROOT / "benchmarks" / "calibration"
SHIPPED = ROOT / "attncc" / "simulator" / "data" / "constants.json"
FAMILIES = {"warp-specialised": ("fa3", "cudnn"), "triton": ("triton",)}
"""Pipelines, and the kernels of the measured files that each is fitted to: all of them, together."""
SUPERSEDED = {("triton", 128, "flashattention3.json")}
"""Rows left out: Triton of head width 128 was measured again a month later, a fifth faster."""
REPEATS = 30.0
"""Runs in a row that a benchmark makes of one kernel."""
TILE = 128
OVERLAPS = [i / 50 for i in range(-15, 50)]
BLOCK_CYCLES = [250.0 * i for i in range(1, 33)]
TORCH = Pipeline(overlap=0.0, block_cycles=20000.0, source="a core does one thing at a time; about 10 microseconds of calls a block")


@dataclass(frozen=True)
class Measured:
    """One measured kernel: dense or causal attention with `heads` heads in 16-bit."""

    kernel: str
    head_dim: int
    causal: bool
    tokens: int
    heads: int
    batch: int
    tflops: float

    @property
    def seconds(self) -> float:
        pairs = self.tokens**2 * (0.5 if self.causal else 1.0)
        return 4.0 * pairs * self.head_dim * self.heads * self.batch / (self.tflops * 1e12)


def measured(folder: Path = FOLDER) -> list[Measured]:
    """All rows of the measured files, but for superseded ones."""
    found = []
    for path in (folder / "flashattention3.json", folder / "triton.json"):
        rows = [Measured(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        found += [row for row in rows if (row.kernel, row.head_dim, path.name) not in SUPERSEDED]
    return found


@cache
def _planned(head_dim: int, causal: bool, tokens: int) -> tuple[KernelPlan, Rows]:
    spec = AttentionSpec(tokens=(tokens,), heads=1, head_dim=head_dim, dtype="float16", mask=masks.Causal() if causal else masks.Full())
    kernel = plan(spec, "h100", (TILE,), (TILE,)).kernels[0]
    return kernel, Rows.of(classify(spec, (TILE,), (TILE,)), 1, 1, kernel.row_order == "descending")


def predicted_seconds(row: Measured, constants: Constants, pipeline: str, device: str = "h100") -> float:
    """What the model says of a measured kernel."""
    kernel, rows = _planned(row.head_dim, row.causal, row.tokens)
    instances = row.heads * row.batch
    launch = Rows(rows.visited.repeat(instances), rows.full.repeat(instances), rows.queries, rows.keys)
    conditions = Conditions(target(device), instances, repeats=REPEATS, pipeline=pipeline, constants=constants)
    return predict(kernel, launch, conditions).milliseconds / 1e3


def log_errors(rows: Sequence[Measured], constants: Constants, pipeline: str) -> list[float]:
    """Logarithms of predicted / measured."""
    return [math.log(predicted_seconds(row, constants, pipeline) / row.seconds) for row in rows]


def fit(rows: Sequence[Measured], power: dict[str, Power], name: str) -> Pipeline:
    """The overlap and the cycles of a block with the least mean square of logarithmic errors, on a grid refined once."""

    def error(overlap: float, cycles: float) -> float:
        pipeline = Pipeline(overlap=overlap, block_cycles=cycles, source="")
        return sum(e * e for e in log_errors(rows, Constants(pipelines={name: pipeline}, power=power), name))

    coarse = min(((o, c) for o in OVERLAPS[::5] for c in BLOCK_CYCLES[3::4]), key=lambda at: error(*at))
    best = min(_around(*coarse), key=lambda at: error(*at))
    rms = math.sqrt(error(*best) / len(rows))
    kernels = ", ".join(sorted({row.kernel for row in rows}))
    source = f"fitted to {len(rows)} published forward times of {kernels} on an H100; root mean square error {rms:.1%}"
    return Pipeline(overlap=best[0], block_cycles=best[1], source=source)


def _around(overlap: float, cycles: float) -> Iterator[tuple[float, float]]:
    o, c = OVERLAPS.index(overlap), BLOCK_CYCLES.index(cycles)
    for x in OVERLAPS[max(o - 4, 0) : o + 5]:
        for y in BLOCK_CYCLES[max(c - 3, 0) : c + 4]:
            yield x, y


def fit_power(path: Path = FOLDER / "power.json") -> dict[str, Power]:
    """From a matrix product on zeros, at the highest clock, and on random numbers, at what the limit leaves."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    device = target(data["devices"][0]).performance
    assert device is not None
    highest = device.max_clock_hz
    duty = data["zeros_tflops"] * 1e12 / (device.sms * device.matrix_flops["bfloat16"] * highest)
    mean = highest * data["random_tflops"] / data["zeros_tflops"]
    passed = data["runs"] * data["flop"] / (data["random_tflops"] * 1e12) / data["settle_seconds"]
    share = -math.expm1(-passed) / passed
    least = (mean - share * highest) / (1.0 - share)
    power = Power(
        tensor_power=round((highest / least) ** 3 / duty, 3), settle_seconds=data["settle_seconds"],
        source=f"{data['source']}; {data['settle_source']}",
    )  # fmt: skip
    return dict.fromkeys(data["devices"], power)


def calibrate(extra: Sequence[Measured] = ()) -> Constants:
    """All constants, from the measured files and, for what attncc prints, from rows of one's own."""
    rows, power = measured(), fit_power()
    pipelines = {name: fit([row for row in rows if row.kernel in kernels], power, name) for name, kernels in FAMILIES.items()}
    if extra:
        pipelines["triton"] = fit(extra, power, "triton")
    return Constants(pipelines=pipelines | {"torch": TORCH}, power=power)


def from_results(path: Path) -> list[Measured]:
    """Dense and causal cases of a results file of `python -m benchmarks.gpu`, as measured kernels.

    Raises:
        ValueError: a file without any such case.
    """
    cases: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    found = [row for name, parts in cases.items() for row in _row(by_name(name), parts.get("times", {}))]
    if not found:
        raise ValueError(f"{path}: no case of 16-bit dense or causal attention on one axis with a time")
    return found


def _row(case: Case, times: dict[str, Any]) -> Iterator[Measured]:
    spec, ms = case.spec, times.get("attncc", {}).get("ms")
    plain = isinstance(spec.mask, (masks.Full, masks.Causal)) and not spec.scores and spec.gate is None and spec.grid.rank == 1
    if ms and plain and spec.dtype in ("float16", "bfloat16"):
        row = Measured("triton", spec.head_dim, isinstance(spec.mask, masks.Causal), case.tokens[0], spec.heads, 1, 1.0)
        yield replace(row, tflops=row.seconds / (ms / 1e3))


def main(arguments: Sequence[str] | None = None) -> int:
    """Fits, prints the constants, writes them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__)
    parser.add_argument("--results", type=Path, help="results of `python -m benchmarks.gpu` on a device of your own")
    parser.add_argument("-o", "--output", type=Path, default=SHIPPED, help="where the constants go (default: those attncc comes with)")
    given = parser.parse_args(arguments)
    constants = calibrate(from_results(given.results) if given.results else ())
    text = constants.model_dump_json(indent=1) + "\n"
    given.output.write_text(text, encoding="utf-8")
    print(text, end="")
    if given.output.resolve() == SHIPPED.resolve():
        shipped.cache_clear()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
