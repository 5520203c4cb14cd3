"""The command: checks every case, then times as many as the time budget allows; a table last, and a JSON file after every case.

Each case runs in a process that may crash, hang or lose its device without taking the others along.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu.cases import by_name, names
from benchmarks.workers import ROOT, JobError, Worker, run_all

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BUDGET = {False: 540.0, True: 180.0}
"""Seconds a run may take, by whether it is quick."""
ROOM = 40 << 30
"""Device memory that lets several cases be checked at once."""
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Every process compiles one kernel at a time, and there are several processes."""
NO_GPU = "benchmarks.gpu: torch finds no GPU here, so there is nothing to measure. --dry-run goes through everything up to the launch."
Record = dict[str, Any]


# ---- in workers ----------------------------------------------------------------------------------------------------------------------


def check_case(job: Record) -> Record:
    """Errors of a case's kernels on the device; then what is slow to compile for its timing, checks being over."""
    from benchmarks.gpu.checks import LAYOUTS, check
    from benchmarks.gpu.timing import prepare

    if time.time() > job["until"]:
        return {"skipped": "out of time"}
    case = by_name(job["case"])
    found = check(case, LAYOUTS[:1] if job["quick"] else LAYOUTS)
    if found["ok"] and time.time() < job["until"] - 30:
        found["prepared"] = prepare(case)
    return found


def time_case(job: Record) -> Record:
    """Times of a case."""
    from benchmarks.gpu.timing import measure

    return measure(by_name(job["case"]), job["until"], job["quick"])


def rehearse_case(job: Record) -> Record:
    """A case up to the launch."""
    from benchmarks.gpu.rehearsal import rehearse

    return rehearse(by_name(job["case"]), job["target"])


# ---- a run ---------------------------------------------------------------------------------------------------------------------------


class Run:
    """Results so far, the time left, and the file they go to."""

    def __init__(self, wanted: Sequence[str], quick: bool, path: Path, about: Record) -> None:
        self.quick, self.path, self.start = quick, path, time.time()
        self.until = self.start + BUDGET[quick]
        self.records: dict[str, Record] = {name: {} for name in wanted}
        self.about = {**about, "quick": quick}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def keep(self, name: str, part: str, result: Record | JobError) -> None:
        """A result of a case, on disk at once: the run may be cut off."""
        self.records[name][part] = {"failed": str(result)} if isinstance(result, JobError) else result
        report.write_json(self.path, {**self.about, "seconds": round(time.time() - self.start), "cases": self.records})

    def check(self, workers: int) -> None:
        """Checks every case, several at once: checking is not timing."""
        jobs = [{"case": name, "until": self.start + BUDGET[self.quick] * 0.5, "quick": self.quick} for name in self.records]
        outcomes = run_all("benchmarks.gpu.__main__:check_case", jobs, workers, self.left * 0.8, ENVIRONMENT)
        for job, result in report.tracked(outcomes, len(jobs), "checking"):
            self.keep(job["case"], "check", result)

    def time(self) -> None:
        """Times one case after the other, alone on the device, while there is time."""
        worker = Worker("benchmarks.gpu.__main__:time_case", ENVIRONMENT)
        for name in report.tracked(list(self.records), len(self.records), "timing"):
            if self.left < 20:
                self.keep(name, "times", {"skipped": "out of time"})
                continue
            job = {"case": name, "until": self.until - 5, "quick": self.quick}
            try:
                self.keep(name, "times", worker(job, self.left))
            except JobError as error:
                self.keep(name, "times", error)
        worker.close()

    def failures(self) -> list[str]:
        """Cases that are wrong or ended in an error, one line each."""
        found = []
        for name, parts in self.records.items():
            found += [f"{name}: {part} failed: {r['failed']}" for part, r in parts.items() if "failed" in r]
            found += [f"{name}: wrong: {r}" for r in parts.values() if r.get("ok") is False]
        return found


# ---- tables --------------------------------------------------------------------------------------------------------------------------

COLUMNS = [
    "case",
    "error",
    "ms",
    "20-80 %",
    "predicted",
    "host µs",
    "useful TF/s",
    "tiles TF/s",
    "bound",
    "x own dense",
    "best SDPA ms",
    "x SDPA",
    "flex ms",
    "x flex",
]

NOTE = """x: the rival's time over attncc's. Bound: dense tiles over visited tiles. SDPA is dense, or causal where the mask is causal.
Predicted: milliseconds by the simulator, and how far they are off.
Errors are relative to a float64 formula; TF/s count the pairs that the mask allows (useful) or all in visited tiles."""


def lines_of(records: dict[str, Record]) -> list[list[str]]:
    """A table line for each case."""
    return [[name, _verdict(parts.get("check", {})), *_figures(parts.get("times", {}))] for name, parts in records.items()]


def _verdict(check: Record) -> str:
    if "layouts" not in check:
        return "FAILED" if "failed" in check else "-"
    worst = max(layout["error"] for layout in check["layouts"].values())
    return f"{worst:.0e}" if check["ok"] else f"WRONG {worst:.0e}"


def _figures(times: Record) -> list[str]:
    if "attncc" not in times:
        return ["FAILED" if "failed" in times else "-", *["-"] * (len(COLUMNS) - 3)]
    own, ms = times["attncc"], times["attncc"]["ms"]
    dense, backend = best_sdpa(times)
    flex = times.get("flex", {}).get("ms")
    return [
        f"{ms:.3f}",
        f"{own['low']:.3f}-{own['high']:.3f}",
        _error(times.get("predicted_ms"), ms),
        f"{times['host_us']:.0f}",
        f"{times['useful_tflops']:.0f}",
        f"{times['hardware_tflops']:.0f}",
        f"{times['tile_bound']:.2f}",
        _ratio(times["own_dense"].get("ms"), ms),
        f"{dense:.3f} {backend}" if dense else "-",
        _ratio(dense, ms),
        f"{flex:.3f}" if flex else "-",
        _ratio(flex, ms),
    ]


def best_sdpa(times: Record) -> tuple[float | None, str]:
    """The fastest of PyTorch's backends that ran and its name; with a causal mask, of those that skip what it forbids."""
    prefix = "sdpa_causal_" if any(name.startswith("sdpa_causal_") for name in times) else "sdpa_"
    found = [(r["ms"], name.removeprefix("sdpa_").replace("_", " ")) for name, r in times.items() if name.startswith(prefix) and "ms" in r]
    return min(found, default=(None, ""))


def _error(predicted: float | None, ms: float) -> str:
    return f"{predicted:.3f} ({predicted / ms - 1:+.0%})" if predicted else "-"


def _ratio(rival: float | None, ms: float) -> str:
    return f"{rival / ms:.2f}" if rival else "-"


REHEARSED = ["case", "tiles", "registers", "shared KiB", "FLOP bound", "tile bound", "formulas differ", "problems"]

REHEARSED_NOTE = "Formulas: the reference, the printed formula, the one for sampled rows, and FlexAttention's functions, in float64."


def rehearsed_lines(records: dict[str, Record]) -> list[list[str]]:
    """A table line for each rehearsed case."""
    found = []
    for name, parts in records.items():
        r = parts["rehearsal"]
        if "failed" in r:
            found.append([name, *["-"] * (len(REHEARSED) - 2), r["failed"][:80]])
            continue
        differ = max(r[key] for key in ("printed_formula", "sampled_rows", "flex_functions") if key in r)
        tiles = f"{'·'.join(map(str, r['q_tile']))} x {'·'.join(map(str, r['k_tile']))}"
        bounds = [f"{r['flop_bound']:.2f}", f"{r['tile_bound']:.2f}", f"{differ:.0e}"]
        found.append([name, tiles, str(r["registers"]), f"{r['shared_bytes'] / 1024:.0f}", *bounds, "; ".join(r["problems"]) or "none"])
    return found


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def measure(wanted: list[str], quick: bool, folder: Path) -> int:
    """Checks and times on the device; 2 without one, 1 where anything is wrong."""
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    device = torch.cuda.get_device_properties(0)
    about = {"gpu": device.name, **report.environment(), "cuda": torch.version.cuda, "date": datetime.date.today().isoformat()}
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.name.lower()).strip('-')}-{about['date']}{'-quick' if quick else ''}.json"
    run = Run(wanted, quick, path, about)
    run.check(workers=max(1, min(8, (os.cpu_count() or 1) // 2)) if device.total_memory > ROOM else 1)
    run.time()
    print("\n".join(run.failures()))
    report.print_table(f"{device.name}, {path.name}", COLUMNS, lines_of(run.records), NOTE)
    return 1 if run.failures() else 0


def rehearse(wanted: list[str], target: str, workers: int) -> int:
    """Goes through every case up to the launch; 1 where anything stands in its way."""
    records = {}
    jobs = [{"case": name, "target": target} for name in wanted]
    outcomes = run_all("benchmarks.gpu.__main__:rehearse_case", jobs, workers, 300.0)
    for job, result in report.tracked(outcomes, len(jobs), "rehearsing"):
        records[job["case"]] = {"rehearsal": {"failed": str(result), "ok": False} if isinstance(result, JobError) else result}
    report.print_table(f"dry run for {target}: nothing was launched", REHEARSED, rehearsed_lines(records), REHEARSED_NOTE)
    return 0 if all(parts["rehearsal"]["ok"] for parts in records.values()) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the main cases only, in 3 minutes instead of 9")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="only this case; may be given again")
    parser.add_argument("--dry-run", action="store_true", help="everything up to the launch, on a machine without a GPU")
    parser.add_argument("--target", default="sm_90", help="target of a dry run (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of a dry run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: benchmarks/results/gpu)")
    given = parser.parse_args(arguments)
    try:
        wanted = names(given.case, given.quick)
    except ValueError as error:
        parser.error(str(error))
    return rehearse(wanted, given.target, given.workers) if given.dry_run else measure(wanted, given.quick, given.results)


if __name__ == "__main__":
    raise SystemExit(main())
