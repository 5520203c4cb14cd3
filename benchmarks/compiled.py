"""Compiles the default plan of a row of the covering array for a target; keeps its figures under the digest of all that decides them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from attncc import pipeline
from attncc.codegen.aot import Job, compile_ahead
from attncc.codegen.facts import Facts
from attncc.codegen.module import emit
from attncc.passes.plan import KernelPlan
from attncc.targets import target
from benchmarks.variants import spec_of, specialization
from benchmarks.workers import ROOT

KEPT = ROOT / "build" / "evidence"
LOCAL = ("STL", "LDL", "scratch_")
"""Instructions that move a thread's registers to memory and back, by the start of their names."""
FORGIVEN = ("spilled registers", "bytes of stack")
"""Problems of unaligned tensors that are none."""
Record = dict[str, Any]


def compile_row(job: dict[str, Any]) -> Record:
    """Figures of the default plan of a row on a target: from an earlier run, or compiled now."""
    row, name = job["row"], job["target"]
    spec, record = spec_of(row), target(name)
    plan = pipeline.plan(spec, name)
    source = emit(plan, spec.to_json(indent=None))
    found = _together([_compiled(source, Facts(kernel, record), row["layout"]) for kernel in plan.kernels])
    found["source"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return found | {"problems": [p for p in found["problems"] if row["layout"] != "unaligned" or not p.endswith(FORGIVEN)]}


def _together(parts: list[Record]) -> Record:
    """Figures of the last of some kernels; of what may go wrong, the worst, and problems and spills of all."""
    found = dict(parts[-1])
    for field in ("registers", "shared_bytes", "tensor_columns"):
        found[field] = max(part[field] for part in parts)
    for field in ("spills", "stack_bytes", "instructions", "loop_spills", "seconds"):
        found[field] = round(sum(part[field] for part in parts), 2)
    for field in ("loops", "problems"):
        found[field] = [item for part in parts for item in part[field]]
    return found


def _compiled(source: str, facts: Facts, layout: str) -> Record:
    """Figures of one kernel of a file."""
    kernel, record = facts.plan, facts.target
    special, options = specialization(facts, layout), facts.options
    text = json.dumps([source, kernel.name, asdict(special), asdict(record), options, triton_version(), _readers()], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    kept = KEPT / f"{digest[:32]}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{kernel.name}.py"
            path.write_text(source, encoding="utf-8")
            _keep(kept, _figures(Job(path, kernel.name, special, record, options), kernel))
    found: Record = json.loads(kept.read_text(encoding="utf-8"))
    return found


def _figures(job: Job, kernel: KernelPlan) -> Record:
    start = time.perf_counter()
    made = compile_ahead(job)
    used = made.resources
    return {
        "q_tile": kernel.q_tile,
        "k_tile": kernel.k_tile,
        "warps": kernel.num_warps,
        "stages": kernel.num_stages,
        "block_mask": kernel.block_mask,
        "registers": used.registers,
        "shared_bytes": made.shared_bytes,
        "shared_limit": job.target.shared_bytes,
        "tensor_columns": made.tensor_columns,
        "spills": used.spills,
        "stack_bytes": used.stack,
        "instructions": sum(used.instructions.values()),
        "loops": [sum(loop.values()) for loop in used.loops],
        "loop_spills": sum(n for loop in used.loops for name, n in loop.items() if name.startswith(LOCAL)),
        "problems": made.problems(job.target),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _keep(path: Path, record: Record) -> None:
    """Whole or not at all: a run may be interrupted, and another may be going on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(record), encoding="utf-8")
    part.replace(path)


def triton_version() -> str:
    """The installed Triton's."""
    import triton

    return str(triton.__version__)


@cache
def _readers() -> list[str]:
    """Digests of what makes the figures: others from the same code are other results."""
    files = (ROOT / "attncc" / "codegen" / "aot.py", Path(__file__))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
