"""Targets: one frozen record each, shared by the tiling pass, codegen and the simulator. Facts only; no code depends on a name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from attncc.errors import TargetError
from attncc.targets.performance import Performance

Backend = Literal["cuda", "hip", "cpu"]
Matrix = Literal["mma", "wgmma", "tcgen05", "mfma", "none"]
KIB = 1024
NAME = r"[a-z][a-z0-9_-]{0,63}"
"""What a target may be called: its name ends up in file names and in generated code."""
ARCHES = {"cuda": r"sm_\d{2,3}", "hip": r"gfx[0-9a-f]{3,4}", "cpu": "cpu"}
SMALLEST_SHARED = 16 * KIB


@dataclass(frozen=True)
class Target:
    """What a kernel may use on a device, and what the device can do.

    `shared_bytes` is the most shared memory one block may have, `registers` the 32-bit registers of one thread at most, `warp` the
    threads of a warp, `matrix` its matrix unit, `bulk_copy` whether the device copies N-D boxes to shared memory by descriptor (TMA).
    `performance` is None for a bare architecture, which has limits but is no device; no plan and no generated code depends on it.
    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA reference.

    Raises:
        TargetError: a record that contradicts itself; names the field.
    """

    name: str
    arch: str
    backend: Backend
    shared_bytes: int
    registers: int = 255
    warp: int = 32
    bulk_copy: bool = False
    matrix: Matrix = "mma"
    performance: Performance | None = field(default=None, repr=False, hash=False)

    def __post_init__(self) -> None:
        self._check_words()
        self._check_limits()
        if self.performance is not None:
            self._check_performance(self.performance)

    def _check_words(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise TargetError(f"name: {self.name!r} must be small letters, digits, - and _, a letter first, 64 at most")
        if self.backend not in get_args(Backend):
            raise TargetError(f"backend: {self.backend!r} is unknown; known are {', '.join(get_args(Backend))}")
        if self.matrix not in get_args(Matrix):
            raise TargetError(f"matrix: {self.matrix!r} is unknown; known are {', '.join(get_args(Matrix))}")
        if not re.fullmatch(ARCHES[self.backend], self.arch):
            raise TargetError(f"arch: {self.arch!r} is no architecture of backend {self.backend}, such as sm_90, gfx942 or cpu")

    def _check_limits(self) -> None:
        smallest = 0 if self.backend == "cpu" else SMALLEST_SHARED
        if self.shared_bytes < smallest:
            raise TargetError(f"shared_bytes: {self.shared_bytes} is less than the {smallest} that the smallest tiles need")
        if not 0 < self.registers <= 512:
            raise TargetError(f"registers: {self.registers} is none of the 1 to 512 that a thread can have")
        if self.warp not in (32, 64):
            raise TargetError(f"warp: {self.warp} is impossible; warps have 32 or 64 threads")

    def _check_performance(self, p: Performance) -> None:
        if self.shared_bytes > p.shared_bytes_per_sm:
            raise TargetError(
                f"shared_bytes: a block's {self.shared_bytes} is more than performance.shared_bytes_per_sm {p.shared_bytes_per_sm}"
            )
        if self.matrix == "none" and p.matrix_flops:
            raise TargetError("performance.matrix_flops: must be empty where matrix is 'none'")
        if self.matrix != "none" and not p.matrix_flops:
            raise TargetError(f"performance.matrix_flops: needs the rates of {self.matrix}, such as float16")
        if self.backend != "cpu" and p.threads_per_sm % self.warp:
            raise TargetError(f"performance.threads_per_sm: {p.threads_per_sm} is no multiple of warp {self.warp}")
        if self.backend != "cpu" and p.registers_per_sm < self.warp * self.registers:
            raise TargetError(f"performance.registers_per_sm: {p.registers_per_sm} is not enough for a warp of {self.registers} a thread")

    @property
    def fp32_precision(self) -> str:
        """How float32 matrix products keep their precision on the matrix unit."""
        return "tf32x3" if self.backend == "cuda" else "ieee"


def _cuda(name: str, arch: str, shared_kib: int, bulk_copy: bool = False, matrix: Matrix = "mma") -> Target:
    return Target(name, arch, "cuda", shared_kib * KIB, bulk_copy=bulk_copy, matrix=matrix)


def architectures() -> dict[str, Target]:
    """Records with limits and no performance figures: what compiles for any device of an architecture."""
    found = (
        _cuda("sm_80", "sm_80", 163),
        _cuda("sm_86", "sm_86", 99),
        _cuda("rtx3090", "sm_86", 99),
        _cuda("sm_89", "sm_89", 99),
        _cuda("sm_90", "sm_90", 227, True, "wgmma"),
        _cuda("sm_100", "sm_100", 227, True, "tcgen05"),
        _cuda("sm_120", "sm_120", 99, True),
        Target("gfx942", "gfx942", "hip", 64 * KIB, 512, 64, matrix="mfma"),
    )
    return {t.name: t for t in found}
