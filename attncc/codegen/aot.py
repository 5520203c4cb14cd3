"""Compiles a kernel of a generated file for a named target on a machine without one, and reports what the machine code uses.

Triton reads TRITON_INTERPRET once, when it is imported, and an interpreting process cannot compile; so `compile_in_subprocess` starts a
process of its own without it. Figures are read from the machine code, not from compiler logs, so cached results have them too.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from attncc.codegen.signature import Specialization
from attncc.errors import AttnccError
from attncc.targets import Target, limits

TENSOR_COLUMNS = 512
"""Columns of tensor memory of one multiprocessor (sm_100); Triton emits a kernel that traps where it needs more."""


class CompileError(AttnccError, RuntimeError):
    """Triton, or the assembler behind it, refused a kernel; names the kernel and the target."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: a file, the kernel's name in it, and all that decides its machine code."""

    path: Path
    kernel: str
    specialization: Specialization
    target: Target
    options: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """What the machine code of a kernel uses, of one thread or block.

    `registers` counts vector registers (AMD: accumulator registers too), `spills` stores to the stack because registers ran out,
    `stack` bytes a thread, `instructions` every instruction by name, `loops` the same for each innermost loop that has matrix products.
    """

    registers: int
    spills: int
    stack: int
    instructions: dict[str, int]
    loops: list[dict[str, int]]


@dataclass(frozen=True)
class Artifacts:
    """A compiled kernel: its cost, and texts and binaries by stage (cuda: ttir ttgir llir ptx cubin; hip: ... llir amdgcn hsaco)."""

    shared_bytes: int
    tensor_columns: int
    resources: Resources
    asm: dict[str, str | bytes] = field(repr=False)

    def problems(self, target: Target) -> list[str]:
        """Why the kernel cannot run, or runs badly, on a target; Triton itself checks the first two at launch only."""
        checks = (
            (self.shared_bytes > target.shared_bytes, f"{self.shared_bytes} bytes of shared memory, the limit is {target.shared_bytes}"),
            (self.tensor_columns > TENSOR_COLUMNS, f"{self.tensor_columns} columns of tensor memory, the limit is {TENSOR_COLUMNS}"),
            (self.resources.spills > 0, f"{self.resources.spills} spilled registers"),
            (self.resources.stack > 0, f"{self.resources.stack} bytes of stack"),
        )
        return [message for wrong, message in checks if wrong]


# ---- compiling -----------------------------------------------------------------------------------------------------------------


def compile_ahead(job: Job) -> Artifacts:
    """Compile in this process, which must not see TRITON_INTERPRET.

    Raises:
        CompileError: Triton refused the kernel.
    """
    import triton
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CompileError("TRITON_INTERPRET is set: this process interprets and cannot compile; use compile_in_subprocess")
    try:
        function = getattr(_load(job.path), job.kernel)
        special = job.specialization
        source = ASTSource(function, special.types, _constants(special), _attributes(special, function.arg_names))
        compiled = triton.compile(source, target=_gpu(job.target), options=dict(job.options))
    except Exception as error:  # Triton raises types of its own, of MLIR and of subprocess
        raise CompileError(f"{job.kernel} for {job.target.name}: {_causes(error)}") from error
    asm = dict(compiled.asm)
    resources = resource_report(asm["cubin"]) if "cubin" in asm else amd_report(asm["amdgcn"])
    return Artifacts(compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0, resources, asm)


def compile_in_subprocess(jobs: Sequence[Job], timeout: float = 600.0) -> list[Artifacts]:
    """Compile jobs one after the other in a fresh process without TRITON_INTERPRET.

    Args:
        jobs: what to compile.
        timeout: seconds for all of them.

    Raises:
        CompileError: the first job that failed, or the process died.
        subprocess.TimeoutExpired: it took too long.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "attncc.codegen.aot"]
    text = json.dumps([asdict(replace(job, target=limits(job.target))) for job in jobs], default=str)
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise CompileError(done.stderr.strip().splitlines()[-1] if done.returncode == 3 else f"the compiling process died:\n{done.stderr}")
    return [_artifacts(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """The process behind `compile_in_subprocess`: jobs as JSON on standard input, one line of JSON for each on standard output."""
    for data in json.load(sys.stdin):
        special = Specialization(**data["specialization"])
        job = Job(Path(data["path"]), data["kernel"], special, Target(**data["target"]), data["options"])
        try:
            made = compile_ahead(job)
        except CompileError as error:
            print(str(error).replace("\n", " | "), file=sys.stderr)
            raise SystemExit(3) from error
        print(json.dumps(asdict(made), default=lambda binary: {"base64": base64.b64encode(binary).decode()}), flush=True)


def _artifacts(data: dict[str, Any]) -> Artifacts:
    asm = {stage: base64.b64decode(text["base64"]) if isinstance(text, dict) else text for stage, text in data["asm"].items()}
    return Artifacts(data["shared_bytes"], data["tensor_columns"], Resources(**data["resources"]), asm)


def _load(path: Path) -> ModuleType:
    name = f"attncc_aot_{re.sub(r'[^0-9A-Za-z]', '_', str(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _constants(special: Specialization) -> dict[str, Any]:
    """Compile-time values; a string that names a Triton type stands for the type."""
    import triton.language as tl

    named = {name: getattr(tl, value, None) if isinstance(value, str) else None for name, value in special.constants.items()}
    return {name: named[name] if isinstance(named[name], tl.dtype) else value for name, value in special.constants.items()}


def _attributes(special: Specialization, names: list[str]) -> dict[tuple[int, ...], list[list[Any]]]:
    """What Triton's launcher would say of addresses; by position of the argument."""
    aligned, small = ["tt.divisibility", 16], ["tt.pointer_range", 32]
    return {(names.index(name),): [aligned, small] if name in special.small else [aligned] for name in special.aligned}


def _gpu(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    arch = target.arch if target.backend == "hip" else int(target.arch.removeprefix("sm_"))
    return GPUTarget(target.backend, arch, target.warp)


def _causes(error: BaseException | None) -> str:
    """An exception's message and those behind it: Triton reports the call first and the reason last."""
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\n".join(found)


# ---- reading machine code ------------------------------------------------------------------------------------------------------

SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Z]\w*)?)")
SASS_LABEL, SASS_JUMP = re.compile(r"(\.L_x_\w+):"), re.compile(r"\bBRA\b.*`\((\.L_x_\w+)\)")
GCN = re.compile(r"\t([a-z]+_[a-z0-9_]+)()")
GCN_LABEL, GCN_JUMP = re.compile(r"(\.LBB\w+):"), re.compile(r"\ts_c?branch\w*\s+(\.LBB\w+)")
MATRIX = ("HMMA", "HGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCMMA", "v_mfma")


def resource_report(cubin: bytes) -> Resources:
    """Figures of an NVIDIA binary with one kernel, by the tools in Triton's wheel; spills are stores to local memory (STL)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        text = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    every, loops = sass_mix(text)
    return Resources(figures["REG"], every["STL"], figures["STACK"], dict(every), loops)


def amd_report(amdgcn: str) -> Resources:
    """Figures of an AMD kernel, from its assembly text and the metadata at its end."""
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", amdgcn))
    lines = amdgcn.splitlines()
    every = _mix(lines, GCN)
    spills, stack = int(found["vgpr_spill_count"]), int(found["private_segment_fixed_size"])
    return Resources(int(found["vgpr_count"]), spills, stack, dict(every), _loops(lines, GCN, GCN_LABEL, GCN_JUMP))


def sass_mix(text: str) -> tuple[Counter[str], list[dict[str, int]]]:
    """Instructions of a disassembly by name, of all of it and of each innermost loop with matrix products."""
    lines = text.splitlines()
    return _mix(lines, SASS), _loops(lines, SASS, SASS_LABEL, SASS_JUMP)


def _mix(lines: Sequence[str], instruction: re.Pattern[str]) -> Counter[str]:
    """Counts by name. MUFU keeps its function: an exponential costs as much as a reciprocal, but only one is in the formula."""
    found = (match for line in lines if (match := instruction.match(line)))
    return Counter(m[1] + m[2] if m[1] == "MUFU" else m[1] for m in found)


def _loops(lines: Sequence[str], instruction: re.Pattern[str], label: re.Pattern[str], jump: re.Pattern[str]) -> list[dict[str, int]]:
    """Mixes of the loops that hold matrix products and no smaller such loop; waits on barriers are loops, too, and left out."""
    bodies = {span: _mix(lines[slice(*span)], instruction) for span in _back_edges(lines, label, jump)}
    matrix = [span for span, mix in bodies.items() if any(name.startswith(MATRIX) for name in mix)]
    inner = [a for a in matrix if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in matrix)]
    return [dict(bodies[span]) for span in inner]


def _back_edges(lines: Sequence[str], label: re.Pattern[str], jump: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Line ranges of loops: from a label to a jump back to it."""
    seen: dict[str, int] = {}
    for at, line in enumerate(lines):
        if match := label.match(line):
            seen[match[1]] = at
        elif (match := jump.search(line)) and match[1] in seen:
            yield seen[match[1]], at + 1


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
