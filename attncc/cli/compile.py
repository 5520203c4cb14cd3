"""`attncc compile`: the generated file, its machine code and a resource report, for a GPU that need not be here."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncc import pipeline
from attncc.cli.shared import (
    DEFAULT_TARGET,
    Json,
    KeyTile,
    QueryTile,
    SpecPath,
    TargetName,
    console,
    print_json,
    the_spec,
    working,
)
from attncc.errors import InputError, PlanError, UnsupportedError
from attncc.passes.plan import KernelPlan, Plan
from attncc.spec.attention import AttentionSpec
from attncc.targets import Target
from attncc.targets import target as target_record

if TYPE_CHECKING:
    from attncc.codegen.aot import Artifacts

Folder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="where the files go; made if it is not there")]
PlanPath = Annotated[Path | None, typer.Option("--plan", metavar="FILE.json", help="a plan to follow, as an earlier compile wrote it")]
SourceOnly = Annotated[bool, typer.Option("--source-only", help="print the file, do not compile it to machine code (needs no Triton)")]
STAGES = ("ptx", "cubin", "amdgcn", "hsaco")


def compile(
    spec: SpecPath,
    target: TargetName = DEFAULT_TARGET,
    out: Folder = Path("build/attncc"),
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    plan: PlanPath = None,
    source_only: SourceOnly = False,
    as_json: Json = False,
) -> None:
    """Writes the generated .py, plan.json, the PTX and cubin (AMD: amdgcn and hsaco) and a resource report. Needs no GPU."""
    the = the_spec(spec)
    chosen = pipeline.plan(the, target, q_tile, k_tile) if plan is None else pipeline.check(_read_plan(plan), the, target)
    files, report = generated(the, chosen, source_only)
    written = write(out, files)
    if as_json:
        print_json({"files": [str(path) for path in written], **report})
        return
    screen = console()
    for one in (*({**report, **each} for each in report.get("before", ())), report):
        screen.print(_table(one))
    for path in written:
        screen.print(f"  {path}", soft_wrap=True)


def _read_plan(path: Path) -> Plan:
    from pydantic import ValidationError

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"plan: cannot read {path}: {error.strerror or error}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise PlanError(f"plan: {path} is no plan: {str(error).splitlines()[-1].strip()}") from None


def generated(spec: AttentionSpec, plan: Plan, source_only: bool = False) -> tuple[dict[str, str | bytes], dict[str, Any]]:
    """Everything to be written, by file name, and the resource report.

    Raises:
        UnsupportedError: a plan with no Triton form.
        CompileError: Triton refused the kernel.
    """
    from attncc.codegen.module import emit

    record, kernel = target_record(plan.target), plan.kernels[-1]
    source = emit(plan, spec.to_json(indent=None))
    files: dict[str, str | bytes] = {f"{kernel.name}.py": source, "plan.json": plan.to_json() + "\n", "spec.json": spec.to_json() + "\n"}
    report: dict[str, Any] = {"kernel": kernel.name, "target": record.name, "arch": record.arch}
    if not source_only:
        _check_triton()
        with working(f"compiling {kernel.name} for {record.name}"):
            made = _artifacts(source, plan, record)
        for each, artifacts in zip(plan.kernels, made):
            files |= {f"{each.name}.{stage}": artifacts.asm[stage] for stage in STAGES if stage in artifacts.asm}
        *before, figures = (_resources(artifacts, each, record) for each, artifacts in zip(plan.kernels, made))
        report |= figures
        if before:
            report["before"] = [{"kernel": each.name, **found} for each, found in zip(plan.kernels, before)]
        files["resources.json"] = json.dumps(report, indent=2) + "\n"
    return files, report


def _check_triton() -> None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:
        found = False
    if not found:
        raise UnsupportedError("machine code without Triton", "the package triton is not installed", "--source-only")


def _artifacts(source: str, plan: Plan, record: Target) -> list[Artifacts]:
    """The machine code of every kernel in its default specialisation: contiguous, aligned tensors of fewer than 2**31 elements a head."""
    from attncc.codegen.aot import Job, compile_in_subprocess
    from attncc.codegen.facts import Facts
    from attncc.codegen.signature import default_specialization

    every = [Facts(kernel, record) for kernel in plan.kernels]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{plan.kernels[-1].name}.py"
        path.write_text(source, encoding="utf-8")
        return compile_in_subprocess([Job(path, f.plan.name, default_specialization(f), record, f.options) for f in every])


def _resources(made: Artifacts, kernel: KernelPlan, record: Target) -> dict[str, Any]:
    used = asdict(made.resources)
    return {
        "registers": used["registers"],
        "spills": used["spills"],
        "stack_bytes": used["stack"],
        "shared_bytes": made.shared_bytes,
        "shared_limit": record.shared_bytes,
        "threads": kernel.num_warps * record.warp,
        "problems": made.problems(record),
        "loops": [_descending(loop) for loop in used["loops"]],
        "instructions": _descending(used["instructions"]),
    }


def _descending(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def write(folder: Path, files: dict[str, str | bytes]) -> list[Path]:
    """Writes files whole or not at all: each appears under its name when it is complete.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside:
            for name, content in files.items():
                (Path(aside) / name).write_bytes(content.encode() if isinstance(content, str) else content)
            return [(Path(aside) / name).replace(folder / name) for name in files]
    except OSError as error:
        raise InputError("out", f"cannot write {folder}: {error.strerror or error}") from None


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{report['kernel']} for {report['target']} ({report['arch']})", title_justify="left", show_header=False)
    if "registers" in report:
        table.add_row("registers a thread", str(report["registers"]))
        table.add_row("spills, stack", f"{report['spills']}, {report['stack_bytes']} bytes")
        table.add_row("shared memory", f"{report['shared_bytes']:,} of {report['shared_limit']:,} bytes")
        table.add_row("threads", str(report["threads"]))
        for i, loop in enumerate(report["loops"]):
            table.add_row(f"inner loop {i + 1}", _mix(loop))
        table.add_row("problems", ", ".join(report["problems"]) or "none")
    return table


def _mix(loop: dict[str, int], most: int = 9) -> str:
    """The loop's instructions: matrix products and exponentials first, whose rates bound it, then the most frequent."""
    from attncc.codegen.aot import MATRIX

    names = sorted(loop, key=lambda name: not name.startswith((*MATRIX, "MUFU", "v_exp")))
    shown = ", ".join(f"{loop[name]} {name}" for name in names[:most])
    return f"{sum(loop.values())} instructions: {shown}{', ..' if len(loop) > most else ''}"
