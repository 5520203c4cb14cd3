"""Compiles the default plan of a row of the covering array for a target; keeps its figures under the digest of all that decides them.

A plan that makes keys ready beforehand has a second, small kernel for it: its figures stand in the record's `prepare`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from attncc import pipeline
from attncc.codegen.aot import Job, compile_ahead
from attncc.codegen.facts import Facts
from attncc.codegen.loads import PREPARE
from attncc.codegen.module import emit
from attncc.codegen.signature import Specialization, prepare_specialization
from attncc.passes.plan import KernelPlan
from attncc.targets import Target, target
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
    row, record = job["row"], target(job["target"])
    spec = spec_of(row)
    plan = pipeline.plan(spec, job["target"])
    source = emit(plan, spec.to_json(indent=None))
    facts = [Facts(kernel, record) for kernel in plan.kernels]
    found = _together([_chosen(f.plan) | _figures(source, f.plan.name, specialization(f, row["layout"]), record, f.options) for f in facts])
    found["source"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    if prepared := [f for f in facts if f.keys_prepared]:
        special = prepare_specialization(prepared[0])
        special = replace(special, aligned=()) if row["layout"] == "unaligned" else special
        keys = _figures(source, PREPARE, special, record, {})
        found["prepare"] = {name: keys[name] for name in ("registers", "shared_bytes", "spills", "stack_bytes")}
        found["problems"] += [f"{PREPARE}: {problem}" for problem in keys["problems"]]
    return found | {"problems": [p for p in found["problems"] if row["layout"] != "unaligned" or not p.endswith(FORGIVEN)]}


def _chosen(kernel: KernelPlan) -> Record:
    tiles = {"q_tile": kernel.q_tile, "k_tile": kernel.k_tile}
    return tiles | {"warps": kernel.num_warps, "stages": kernel.num_stages, "block_mask": kernel.block_mask}


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


def _figures(source: str, name: str, special: Specialization, record: Target, options: dict[str, int]) -> Record:
    """Figures of one kernel of a generated file."""
    text = json.dumps([_code(source, name), name, asdict(special), asdict(record), options, triton_version(), _readers()], sort_keys=True)
    kept = KEPT / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.py"
            path.write_text(source, encoding="utf-8")
            _keep(kept, _compiled(Job(path, name, special, record, options)))
    found: Record = json.loads(kept.read_text(encoding="utf-8"))
    return found


def _code(source: str, name: str) -> str:
    """The part of a generated file that decides a kernel's machine code: neither its heading nor the host side."""
    parts = [n for n in ast.parse(source).body if not isinstance(n, ast.FunctionDef) or n.decorator_list]
    wanted = [n for n in parts[1:] if not isinstance(n, ast.FunctionDef) or (n.name == PREPARE) == (name == PREPARE)]
    return "\n".join(map(ast.unparse, wanted))


def _compiled(job: Job) -> Record:
    start = time.perf_counter()
    made = compile_ahead(job)
    used = made.resources
    return {
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
