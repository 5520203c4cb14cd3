"""Ahead-of-time evidence: default plans of an all-pairs covering array of specs, compiled for every target without a GPU.

Each kernel must compile, keep to the target's shared memory, and spill nothing. Tensors that are not aligned to 16 bytes take a path of
narrow loads that is slow whatever it spills: there, spills are counted and forgiven. Results are kept in build/evidence under the digest
of all that decides them, so a second run compiles what has changed. The tables in benchmarks/results/aot are those of a whole run.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attncc.targets import target
from benchmarks import report
from benchmarks.compiled import Record, triton_version
from benchmarks.covering import Row
from benchmarks.variants import FACTORS, TARGETS, array
from benchmarks.workers import ROOT, JobError, run_all

RESULTS = ROOT / "benchmarks" / "results" / "aot"
LONGEST = 300.0
"""Seconds that one compile may take."""


# ---- a run ---------------------------------------------------------------------------------------------------------------------------


def jobs(sample: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Every row on every target; or a sample, the same for the same seed, with as many for each target as can be."""
    rows = array()
    if sample is None:
        return [{"row": row, "target": name} for row in rows for name in TARGETS]
    order = random.Random(seed).sample(rows, len(rows))
    return [{"row": order[i % len(order)], "target": TARGETS[i % len(TARGETS)]} for i in range(sample)]


def run(wanted: Sequence[dict[str, Any]], workers: int, progress: bool) -> list[Record]:
    """Figures of every job, or the error that it ended in."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_all("benchmarks.compiled:compile_row", wanted, workers, LONGEST, {"TRITON_CACHE_DIR": folder})
        for job, result in report.tracked(outcomes, len(wanted), "compiling", progress):
            figures = {"problems": [str(result)], "failed": True} if isinstance(result, JobError) else result
            found.append({**job, **figures})
    return found


def problems(records: Sequence[Record]) -> list[str]:
    """What is wrong, one line for each kernel."""
    return [f"{r['target']}: {'; '.join(r['problems'])} ({_named(r['row'])})" for r in records if r["problems"]]


def _named(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.items())


# ---- tables --------------------------------------------------------------------------------------------------------------------------


def write(records: Sequence[Record], folder: Path) -> None:
    """`triton-<version>.json` and `.md` of a whole run."""
    folder.mkdir(parents=True, exist_ok=True)
    version = triton_version()
    stem = folder / f"triton-{version}"
    lines = ",\n".join(json.dumps({k: v for k, v in r.items() if k != "seconds"}) for r in records)
    stem.with_suffix(f"{stem.suffix}.json").write_text(f'{{"triton": "{version}", "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    stem.with_suffix(f"{stem.suffix}.md").write_text(markdown(records, version), encoding="utf-8")


def markdown(records: Sequence[Record], version: str) -> str:
    """One line for each row of the array, one column for each target."""
    by_row: dict[str, dict[str, Record]] = {}
    for record in records:
        by_row.setdefault(json.dumps(record["row"]), {})[record["target"]] = record
    lines = [[*json.loads(row).values(), *(_cell(cells.get(name)) for name in TARGETS)] for row, cells in by_row.items()]
    bad = len(problems(records))
    return "\n".join([
        f"# Default plans, compiled ahead of time by Triton {version}",
        "",
        f"{len(records)} kernels: {len(lines)} specs, in which every legal pair of values of two factors occurs, for {len(TARGETS)}",
        f"targets; {bad or 'none'} with problems (**bold**). A cell: query tile x key tile, warps/stages; registers a thread; KiB of",
        "shared memory.",
        "`make evidence` compiles them again; the JSON beside this file has every figure.",
        "",
        *summary(records),
        "",
        *report.markdown_table([*FACTORS, *TARGETS], lines),
        "",
    ])  # fmt: skip


def summary(records: Sequence[Record]) -> list[str]:
    """Most registers and shared memory by target."""
    columns = ["target", "kernels", "failed", "spilling", "spilling, unaligned", "most registers", "most shared KiB", "limit KiB"]
    lines = []
    for name in TARGETS:
        mine = [r for r in records if r["target"] == name]
        made = [r for r in mine if "failed" not in r]
        most = [max((r[field] for r in made), default=0) for field in ("registers", "shared_bytes")]
        spilling = [r["row"]["layout"] == "unaligned" for r in made if r["spills"] > 0 or r["stack_bytes"] > 0]
        cells = [
            name,
            len(mine),
            len(mine) - len(made),
            spilling.count(False),
            spilling.count(True),
            most[0],
            _kib(most[1]),
            _kib(target(name).shared_bytes),
        ]
        lines.append([str(cell) for cell in cells])
    return report.markdown_table(columns, lines)


def _cell(record: Record | None) -> str:
    if record is None or "failed" in record:
        return "" if record is None else "**failed**"
    q, k = ("·".join(map(str, record[side])) for side in ("q_tile", "k_tile"))
    text = f"{q} x {k}, {record['warps']}/{record['stages']}; {record['registers']}; {_kib(record['shared_bytes'])}"
    return f"**{text}**" if record["problems"] else text


def _kib(size: int) -> str:
    return f"{size / 1024:.0f}"


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints what is wrong and a summary, writes the tables; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="compile a fixed sample of N kernels and write no tables")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables (default: benchmarks/results/aot)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    records = run(jobs(given.sample), given.workers, not given.quiet)
    wrong = problems(records)
    print("\n".join([*wrong, *summary(records)]))
    print(f"{len(records)} kernels, {len(wrong)} with problems, {time.perf_counter() - start:.0f} s")
    if given.sample is None:
        write(records, given.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
