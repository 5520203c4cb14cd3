"""A tiny kernel compiled for GPUs that are not here: resources, loops, limits, errors, and a process that interprets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
from attncc.codegen.aot import (
    Artifacts,
    CompileError,
    Job,
    Resources,
    compile_ahead,
    compile_in_subprocess,
    sass_mix,
)
from attncc.codegen.signature import Specialization
from attncc.targets import target

KERNEL = '''
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps", "stride"])
def products(a, b, c, steps: tl.int32, stride: tl.int64,
             WIDTH: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, ALIGNED: tl.constexpr):
    """Sum of steps products of WIDTH x WIDTH tiles."""
    stride = stride // ALIGNED * ALIGNED
    i = tl.arange(0, WIDTH)
    at = i.to(INDEX)[:, None] * stride.to(INDEX) + i[None, :]
    total = tl.zeros([WIDTH, WIDTH], tl.float32)
    for step in range(steps):
        x = tl.load(a + step * WIDTH + at)
        y = tl.load(b + step * WIDTH + at)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(c + i[:, None] * WIDTH + i[None, :], total)
'''
TYPES = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "steps": "i32", "stride": "i64"}
CONSTANTS = {"WIDTH": 64, "PRECISION": None, "INDEX": "int32", "ALIGNED": 8}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "products.py"
    path.write_text(KERNEL)
    special = Specialization(TYPES | dict.fromkeys(CONSTANTS, "constexpr"), CONSTANTS, ("a", "b", "c"), ())
    return Job(path, "products", special, target("sm_90"), {"num_warps": 4, "num_stages": 2})


def with_constants(job: Job, dtype: str = "*bf16", **changed: object) -> Job:
    types = job.specialization.types | {"a": dtype, "b": dtype}
    return replace(job, specialization=replace(job.specialization, types=types, constants=CONSTANTS | changed))


@pytest.mark.parametrize(
    ("name", "stages", "matrix", "copy"),
    [
        ("sm_80", {"ptx", "cubin"}, "HMMA", "LDGSTS"),
        ("sm_89", {"ptx", "cubin"}, "HMMA", "LDGSTS"),
        ("sm_90", {"ptx", "cubin"}, "HGMMA", "LDGSTS"),
        ("sm_100", {"ptx", "cubin"}, "UTCHMMA", "LDGSTS"),
        ("gfx942", {"amdgcn", "hsaco"}, "v_mfma", "buffer_load"),
    ],
)
def test_reports_what_the_loop_does(job: Job, name: str, stages: set[str], matrix: str, copy: str) -> None:
    record = target(name)
    small = ("a", "b", "c") if record.backend == "hip" else ()
    made = compile_ahead(replace(job, target=record, specialization=replace(job.specialization, small=small)))
    assert stages <= set(made.asm)
    assert made.problems(record) == []
    assert 8192 <= made.shared_bytes <= 2 * 2 * 8192 + 1024
    assert 0 < made.resources.registers <= 255
    [loop] = made.resources.loops
    assert any(op.startswith(matrix) for op in loop)
    assert any(op.startswith(copy) for op in loop), "loads are wide only if alignment reached the compiler"
    assert all(count <= made.resources.instructions[op] for op, count in loop.items())
    assert (made.tensor_columns > 0) == (name == "sm_100")


def test_a_process_that_interprets_compiles_in_another(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CompileError, match="compile_in_subprocess"):
        compile_ahead(job)
    amd = replace(job, target=target("gfx942"))
    cuda, hip = compile_in_subprocess([job, amd])
    assert isinstance(cuda.asm["cubin"], bytes) and cuda.asm["cubin"].startswith(b"\x7fELF")
    assert isinstance(hip.asm["amdgcn"], str)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert compile_ahead(job) == cuda


def test_spills_are_seen(job: Job) -> None:
    """One warp does not hold a float32 tile, split in two for its products."""
    made = compile_ahead(
        with_constants(replace(job, target=target("sm_80"), options={"num_warps": 1, "num_stages": 2}), "*fp32", PRECISION="tf32x3")
    )
    assert made.resources.spills > 0 and made.resources.stack > 0
    assert any("spilled" in problem for problem in made.problems(target("sm_80")))


def test_shared_memory_over_the_limit_is_seen(job: Job) -> None:
    made = compile_ahead(replace(job, options={"num_warps": 4, "num_stages": 8}, target=target("sm_80")))
    assert made.problems(target("sm_80")) == []
    assert any("shared memory" in problem for problem in made.problems(target("sm_86")))


def test_tensor_memory_over_the_limit_is_seen() -> None:
    made = Artifacts(0, 608, Resources(4, 0, 0, {}, []), {})
    assert made.problems(target("sm_100")) == ["608 columns of tensor memory, the limit is 512"]


@pytest.mark.parametrize("subprocess", [False, True])
def test_a_refusal_names_kernel_target_and_reason(job: Job, subprocess: bool) -> None:
    wrong = with_constants(replace(job, target=target("gfx942")), "*fp32", PRECISION="tf32x3")
    with pytest.raises(CompileError, match=r"(?s)products for gfx942.*input_precision") as raised:
        compile_in_subprocess([wrong]) if subprocess else compile_ahead(wrong)
    assert "tf32x3" in str(raised.value)


def test_a_dead_process_is_an_error(job: Job) -> None:
    job.path.write_text("import os\n\nos._exit(9)\n")
    with pytest.raises(CompileError, match="died"):
        compile_in_subprocess([job])


LISTING = """
.L_x_0:
        /*0010*/                   MUFU.RCP R1, R1 ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;
                                                                              /* 0x0000000000007948 */
        /*0030*/              @!P0 MUFU.EX2 R2, R2 ;
.L_x_2:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/              @UP0 FFMA R3, R3, R3, -R4.reuse ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_innermost_loop_with_matrix_products() -> None:
    every, [loop] = sass_mix(LISTING)
    assert loop == {"HGMMA": 1, "MUFU.EX2": 1, "SYNCS": 1, "BRA": 2, "FFMA": 1}
    assert every["MUFU.RCP"] == 1 and every["BRA"] == 4
