"""The CPU backend against dense attention and FlexAttention, and the memory of a long backward pass.

Rivals take turns, so that what else the machine does falls on all of them; the figures are medians. Dense attention computes every pair:
its time over the kernel's is held against the tile bound, the most that skipping tiles can gain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attncc
from attncc import AttentionSpec, masks, normalizers, scores
from benchmarks import report, rivals
from benchmarks.bounds import work
from benchmarks.inputs import packed
from benchmarks.workers import ROOT, JobError, Worker

HEADS, WIDTH, THREADS = 4, 64, 2
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
FRACTION, OVER_SDPA, OVER_FLEX, TIMES_INPUTS = 0.35, 5.0, 1.5, 4.0
"""Goals: of the tile bound in every case; over dense attention and over FlexAttention with the window; extra memory over the inputs'."""
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A mask on a grid, with FlexAttention's form of it (None: not compared), and what is not plain softmax attention."""

    name: str
    tokens: tuple[int, ...]
    mask: masks.Mask
    mod: rivals.Mod | None = None
    labels: Tensor | None = None
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(tokens=self.tokens, heads=HEADS, head_dim=WIDTH, dtype="float32", mask=self.mask, **self.rest)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {} if self.labels is None else {"segments": self.labels}


def cases(tokens: int) -> list[Case]:
    """Masks on `tokens` tokens, a square number of them on the plane; then what is no band, no softmax or has a score map.

    Dense attention is the plain softmax in every case, the fastest there is.
    """
    labels = packed(tokens)
    side = round(tokens**0.5)
    plane, near = (side, side), (33, 33)
    window = masks.SlidingWindow(left=512, right=512)
    return [
        Case("window ±512", (tokens,), window, rivals.window(512, 512)),
        Case("packed documents", (tokens,), masks.Segments(), rivals.documents(labels), labels),
        Case("2-D neighborhood 33x33", plane, masks.Neighborhood(window=near), rivals.neighborhood(plane, near, (1, 1), (1, 1))),
        Case("causal window 1024, ALiBi", (tokens,), masks.SlidingWindow(left=1023, right=0), rest={"scores": (scores.Alibi(),)}),
        Case("window ±512, sigmoid", (tokens,), window, rest={"normalizer": normalizers.Sigmoid(bias=-7.0)}),
        Case("documents that recur", (tokens,), masks.Segments(), labels=labels * 5 % 16),
        Case("window and columns", (tokens,), masks.Predicate(text="k <= q and (q - k < 512 or k % 1024 < 64)")),
    ]


# ---- timing --------------------------------------------------------------------------------------------------------------------------


def take_turns(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1000)
    return {name: round(statistics.median(found), 3) for name, found in times.items()}


def trained(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    """Forward and backward; gradients are dropped."""
    torch.autograd.grad(run(q, k, v), (q, k, v), grad)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times of a case, forward and with the backward pass, and its bounds."""
    spec = case.spec
    kernel = attncc.compile(spec, target="cpu")
    shape = (1, HEADS, prod(case.tokens), WIDTH)
    q, k, v, grad = (torch.randn(shape) for _ in range(4))
    dense = rivals.sdpa()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = kernel(q, k, v, layout="bhsd", tokens=None, key_tokens=None, **case.inputs)
        return out

    first = take_turns({"attncc": lambda: run(q, k, v)}, 1)["attncc"]
    compared, calls = _flex(case, q, k, v, run(q, k, v))
    forward = take_turns({"attncc": lambda: run(q, k, v), "sdpa": lambda: dense(q, k, v), **calls}, rounds)
    for x in (q, k, v):
        x.requires_grad_()
    trained(run, q, k, v, grad)
    both = take_turns({"attncc": lambda: trained(run, q, k, v, grad), "sdpa": lambda: trained(dense, q, k, v, grad)}, rounds)
    labels = {name: table.numpy() for name, table in case.inputs.items()}
    counts = work(kernel.plan.kernels[0], case.tokens, case.tokens, labels)
    return {
        "case": case.name,
        "tokens": case.tokens,
        "q_tile": kernel.plan.kernels[0].q_tile,
        "k_tile": kernel.plan.kernels[0].k_tile,
        "flop_bound": round(counts.flop_bound, 3),
        "tile_bound": round(counts.tile_bound, 3),
        "first_call_ms": first,
        "forward_ms": forward,
        "forward_backward_ms": both,
        **compared,
    }


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor, ours: Tensor) -> tuple[dict[str, Any], dict[str, Call]]:
    """Compiled FlexAttention, where it compiles: its mask's time, its error against ours, and the call to time."""
    if case.mod is None:
        return {"flex": "not compared"}, {}
    try:
        start = time.perf_counter()
        mask = rivals.flex_block_mask(case.mod, q, k, batch=case.labels is not None)
        built, run = time.perf_counter() - start, rivals.flex()
        error = float((run(q, k, v, mask) - ours).norm() / ours.norm())
    except Exception as failed:  # no compiler on this machine, say: the other rivals are still worth timing
        return {"flex": f"{type(failed).__name__}: {failed}".splitlines()[0]}, {}
    found = {"flex": "compiled; no backward pass on the CPU", "flex_mask_ms": round(built * 1000, 1), "flex_difference": error}
    return found, {"flex": lambda: run(q, k, v, mask)}


# ---- memory --------------------------------------------------------------------------------------------------------------------------


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Most memory that forward and backward take beyond what is there before them, outputs and gradients included (in a worker)."""
    torch.set_num_threads(THREADS)
    tokens = job["tokens"]
    spec = AttentionSpec(tokens=(None,), heads=HEADS, head_dim=WIDTH, dtype="float32", mask=masks.SlidingWindow(left=512, right=512))
    kernel = attncc.compile(spec, target="cpu")

    def step(n: int) -> tuple[int, int]:
        q, k, v = (torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3))
        grad = torch.randn(1, HEADS, n, WIDTH)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
        trained(kernel, q, k, v, grad)
        return _resident("VmHWM") - before, 3 * q.nbytes

    step(4096)  # what libraries allocate once
    extra, inputs = step(tokens)
    return {"tokens": tokens, "input_bytes": inputs, "extra_bytes": extra, "times_inputs": round(extra / inputs, 3)}


def _resident(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured_memory(tokens: int) -> dict[str, Any]:
    """The figures, or why there are none."""
    worker = Worker("benchmarks.cpu:memory")
    try:
        found: dict[str, Any] = worker({"tokens": tokens}, timeout=900)
    except JobError as error:
        return {"tokens": tokens, "error": str(error)}
    finally:
        worker.close()
    return found


# ---- the report ----------------------------------------------------------------------------------------------------------------------


def lines_of(record: dict[str, Any]) -> list[list[str]]:
    """Table lines of a case, one for each direction."""
    found = []
    for name, column in (("forward", "forward_ms"), ("forward + backward", "forward_backward_ms")):
        times, bound = record[column], record["tile_bound"]
        gain = times["sdpa"] / times["attncc"]
        flex = times.get("flex")
        cells = [f"{times['attncc']:.0f}", f"{times['sdpa']:.0f}", f"{flex:.0f}" if flex else "-", f"{gain:.2f}"]
        cells += [f"{flex / times['attncc']:.2f}" if flex else "-", f"{bound:.2f}", f"{gain / bound:.2f}"]
        found.append([record["case"], name, *cells])
    return found


def missed(records: Sequence[dict[str, Any]], used: dict[str, Any]) -> list[str]:
    """Goals that these figures miss, one line each."""
    found = []
    for line in (line for record in records for line in lines_of(record)):
        case, direction, over_sdpa, over_flex, fraction = line[0], line[1], float(line[5]), line[6], float(line[8])
        found += [f"{case}, {direction}: {fraction} of the tile bound, goal {FRACTION}"] if fraction < FRACTION else []
        if case == "window ±512" and direction == "forward":
            found += [f"{case}: {over_sdpa} x dense attention, goal {OVER_SDPA}"] if over_sdpa < OVER_SDPA else []
            found += [f"{case}: {over_flex} x FlexAttention, goal {OVER_FLEX}"] if over_flex != "-" and float(over_flex) < OVER_FLEX else []
    if used.get("times_inputs", 0.0) > TIMES_INPUTS:
        found.append(f"extra memory {used['times_inputs']} x the inputs, goal {TIMES_INPUTS}")
    return found


COLUMNS = ["case", "pass", "attncc ms", "dense SDPA ms", "flex ms", "x SDPA", "x flex", "tile bound", "of bound"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of every case, a square number (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every rival (default: %(default)s)")
    parser.add_argument("--long", type=int, default=65536, help="tokens of the memory measurement (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file (default: benchmarks/results/cpu.json)")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    wanted = cases(given.tokens)
    records = [measure(case, given.rounds) for case in report.tracked(wanted, len(wanted), "timing")]
    used = measured_memory(given.long)
    goals = missed(records, used)
    report.write_json(given.results, {**report.environment(), "threads": THREADS, "cases": records, "memory": used, "missed": goals})
    extra = f"extra memory of forward and backward at {used['tokens']} tokens, window ±512: {used.get('times_inputs', used.get('error'))}"
    title = f"float32, {HEADS} heads of {WIDTH}, {given.tokens} tokens, {THREADS} threads"
    report.print_table(title, COLUMNS, [line for record in records for line in lines_of(record)], f"{extra} times the inputs")
    print("\n".join(["goals missed:", *goals] if goals else ["every goal is met"]))
    return 1 if goals and given.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
