"""The simulator against published timings: `python -m benchmarks.simulator [--compile]`, no GPU needed.

Seven timings of the NATTEN project on an H100 that nothing here is fitted to. Their kernels mask every visited tile unless the whole mask
is block-sparse. What masking costs is counted in the machine code of our own kernels, compiled with and without the policy "every tile";
`--compile` compiles them again, else benchmarks/calibration/masking.json is read. The table goes to benchmarks/results/simulator.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from attncc import AttentionSpec
from attncc.passes.block_mask import BlockMask
from attncc.passes.plan import KernelPlan, Plan
from attncc.passes.tiles import Shape
from attncc.pipeline import plan
from attncc.simulator.bounds import classify, count
from attncc.simulator.constants import Constants, shipped
from attncc.simulator.instructions import Compiled
from attncc.simulator.predict import Conditions, Rows, predict
from attncc.targets import target
from benchmarks import report
from benchmarks.workers import ROOT

PUBLISHED = ROOT / "tests" / "data" / "published_h100.json"
MASKING = ROOT / "benchmarks" / "calibration" / "masking.json"
RESULTS = ROOT / "benchmarks" / "results" / "simulator.md"
DEVICE, PIPELINE = "h100", "warp-specialised"
BASELINE_TILE = 128
POLICIES = ("partial tiles", "every tile")


@dataclass(frozen=True)
class Row:
    """Predicted and measured milliseconds of one published configuration, of the kernel and of its dense baseline."""

    name: str
    kernel: float
    kernel_measured: float
    baseline: float
    baseline_measured: float
    tile_bound: float

    @property
    def predicted(self) -> float:
        return self.baseline / self.kernel

    @property
    def measured(self) -> float:
        return self.baseline_measured / self.kernel_measured

    @property
    def error(self) -> float:
        """Of the ratio."""
        return self.predicted / self.measured - 1

    @property
    def bound_error(self) -> float:
        """Of the tile bound, taken as a prediction."""
        return self.tile_bound / self.measured - 1


# ---- predictions ---------------------------------------------------------------------------------------------------------------------


def rows(constants: Constants | None = None) -> list[Row]:
    """Every published configuration."""
    data, masking = json.loads(PUBLISHED.read_text(encoding="utf-8")), read_masking()
    return [_row(row, masking, constants or shipped()) for row in data["rows"]]


def _row(row: dict[str, Any], masking: dict[str, Compiled], constants: Constants) -> Row:
    spec, q_tile, k_tile = spec_of(row), tuple(row["q_tile"]), tuple(row["k_tile"])
    mask = classify(spec, q_tile, k_tile)
    kernel = published_kernel(spec, mask, q_tile, k_tile)
    compiled = masking[f"{len(q_tile)}-D, {kernel.mask_policy}"]
    conditions = Conditions(target(DEVICE), pipeline=PIPELINE, constants=constants, compiled=compiled)
    ours = predict(kernel, Rows.of(mask, spec.heads, 1), conditions)
    return Row(
        row["name"], ours.milliseconds, row["kernel_ms"], baseline_ms(mask, spec.heads, constants), row["baseline_ms"],
        count(mask).tile_bound,
    )  # fmt: skip


def spec_of(row: dict[str, Any]) -> AttentionSpec:
    """The spec of a published row."""
    mask = {"kind": "neighborhood", "window": row["window"], "stride": row["stride"]}
    return AttentionSpec.model_validate({"tokens": row["tokens"], "heads": row["heads"], "head_dim": 128, "mask": mask})


def published_kernel(spec: AttentionSpec, mask: BlockMask, q_tile: Shape, k_tile: Shape) -> KernelPlan:
    """Our plan with the published kernel's tiles and masking policy."""
    policy = POLICIES[mask.partial > 0]
    return plan(spec, DEVICE, q_tile, k_tile).kernels[0].model_copy(update={"mask_policy": policy})


def baseline_ms(mask: BlockMask, heads: int, constants: Constants) -> float:
    """Dense attention over as many tokens on one axis, by a kernel of the same kind."""
    tokens = 1
    for n in mask.tiling.mask.query:
        tokens *= n
    spec = AttentionSpec.model_validate({"tokens": [tokens], "heads": heads, "head_dim": 128, "mask": {"kind": "full"}})
    kernel = plan(spec, DEVICE, (BASELINE_TILE,), (BASELINE_TILE,)).kernels[0]
    tiles = -(-tokens // BASELINE_TILE)
    conditions = Conditions(target(DEVICE), pipeline=PIPELINE, constants=constants, compiled=read_masking()["1-D, partial tiles"])
    return predict(kernel, Rows.dense((tiles, tiles), (tokens, tokens), heads), conditions).milliseconds


# ---- what masking costs, in machine code ---------------------------------------------------------------------------------------------


def read_masking() -> dict[str, Compiled]:
    """Compiled kernels by rank and masking policy."""
    data = json.loads(MASKING.read_text(encoding="utf-8"))
    return {name: Compiled(**{**fields, "loops": tuple(fields["loops"])}) for name, fields in data["kernels"].items()}


def compile_masking() -> None:
    """Compiles our kernels of the published tiles for sm_90 and keeps what `instructions` reads of them."""
    from benchmarks.compiled import triton_version

    found = {}
    for row in json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"]:
        for policy in POLICIES:
            name = f"{len(row['tokens'])}-D, {policy}"
            if name not in found and max(row["stride"]) == 1:
                found[name] = asdict(_compile(row, policy))
    about = "Kernels of the published configurations with stride 1 and tiles of 128 x 128, compiled for sm_90: innermost loops."
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(fields)}" for name, fields in found.items())
    text = f'{{\n "about": {json.dumps(about)},\n "triton": "{triton_version()}",\n "kernels": {{\n{lines}\n }}\n}}\n'
    MASKING.write_text(text, encoding="utf-8")


def _compile(row: dict[str, Any], policy: str) -> Compiled:
    from attncc.codegen.aot import Job, compile_ahead
    from attncc.codegen.facts import Facts
    from attncc.codegen.module import emit
    from attncc.codegen.signature import default_specialization

    spec = spec_of(row)
    made: Plan = plan(spec, DEVICE, tuple(row["q_tile"]), tuple(row["k_tile"]))
    kernel = made.kernels[0].model_copy(update={"mask_policy": policy})
    facts = Facts(kernel, target(DEVICE))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kernel.name}.py"
        path.write_text(emit(made.model_copy(update={"kernels": (kernel,)}), spec.to_json(indent=None)), encoding="utf-8")
        artifacts = compile_ahead(Job(path, kernel.name, default_specialization(facts), target(DEVICE), facts.options))
    used = artifacts.resources
    return Compiled(used.registers, artifacts.shared_bytes, kernel.num_warps * 32, tuple(used.loops))


# ---- the table -----------------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "configuration",
    "kernel ms",
    "measured",
    "error",
    "baseline ms",
    "measured",
    "error",
    "speedup",
    "measured",
    "error",
    "tile bound",
    "error",
)


def lines(found: Sequence[Row]) -> list[list[str]]:
    """One line a row, and one of medians."""
    body = [
        [
            r.name,
            *_three(r.kernel, r.kernel_measured, 3),
            *_three(r.baseline, r.baseline_measured, 3),
            *_three(r.predicted, r.measured, 2),
            f"{r.tile_bound:.2f}",
            f"{r.bound_error:+.0%}",
        ]
        for r in found
    ]
    errors = [median(abs(e) for e in column) for column in zip(*(_errors(r) for r in found))]
    worst = [max(abs(e) for e in column) for column in zip(*(_errors(r) for r in found))]
    for name, figures in (("median", errors), ("worst", worst)):
        k, b, s, t = (f"{e:.0%}" for e in figures)
        body.append([name, "", "", k, "", "", b, "", "", s, "", t])
    return body


def _three(predicted: float, measured: float, digits: int) -> list[str]:
    return [f"{predicted:.{digits}f}", f"{measured:.{digits}f}", f"{predicted / measured - 1:+.0%}"]


def _errors(r: Row) -> tuple[float, float, float, float]:
    return r.kernel / r.kernel_measured - 1, r.baseline / r.baseline_measured - 1, r.error, r.bound_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the kernels again that say what masking costs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes (default: benchmarks/results/simulator.md)")
    given = parser.parse_args(arguments)
    if given.compile:
        compile_masking()
    table = lines(rows())
    report.print_table("Published timings on an H100, none of them fitted", COLUMNS, table)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["# The simulator against published timings", "", *report.markdown_table(COLUMNS, table), ""])
    given.results.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
