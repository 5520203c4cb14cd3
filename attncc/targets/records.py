"""Targets: one frozen record each, shared by the tiling pass, codegen and the simulator. Facts only; no code depends on a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncc.errors import TargetError

Backend = Literal["cuda", "hip", "cpu"]
Matrix = Literal["mma", "wgmma", "tcgen05", "mfma", "none"]
KIB = 1024


@dataclass(frozen=True)
class Target:
    """What a kernel may use on a device.

    `shared_bytes` is the most shared memory one block may have, `registers` the 32-bit registers of one thread at most, `warp` the
    threads of a warp, `matrix` its matrix unit, `bulk_copy` whether the device copies N-D boxes to shared memory by descriptor (TMA).
    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA reference.
    """

    name: str
    arch: str
    backend: Backend
    shared_bytes: int
    registers: int = 255
    warp: int = 32
    bulk_copy: bool = False
    matrix: Matrix = "mma"

    def __post_init__(self) -> None:
        if self.backend != "cpu" and (self.shared_bytes < 16 * KIB or self.warp not in (32, 64)):
            raise TargetError(f"target {self.name}: shared_bytes={self.shared_bytes} or warp={self.warp} is impossible")

    @property
    def fp32_precision(self) -> str:
        """How float32 matrix products keep their precision on the matrix unit."""
        return "tf32x3" if self.backend == "cuda" else "ieee"


def _cuda(name: str, arch: str, shared_kib: int, bulk_copy: bool = False, matrix: Matrix = "mma") -> Target:
    return Target(name, arch, "cuda", shared_kib * KIB, bulk_copy=bulk_copy, matrix=matrix)


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("cpu", "cpu", "cpu", 0, matrix="none"),
        _cuda("sm_80", "sm_80", 163),
        _cuda("a100", "sm_80", 163),
        _cuda("sm_86", "sm_86", 99),
        _cuda("rtx3090", "sm_86", 99),
        _cuda("sm_89", "sm_89", 99),
        _cuda("l40s", "sm_89", 99),
        _cuda("rtx4090", "sm_89", 99),
        _cuda("sm_90", "sm_90", 227, True, "wgmma"),
        _cuda("h100", "sm_90", 227, True, "wgmma"),
        _cuda("h200", "sm_90", 227, True, "wgmma"),
        _cuda("sm_100", "sm_100", 227, True, "tcgen05"),
        _cuda("b200", "sm_100", 227, True, "tcgen05"),
        _cuda("sm_120", "sm_120", 99, True),
        _cuda("rtx5090", "sm_120", 99, True),
        Target("gfx942", "gfx942", "hip", 64 * KIB, 512, 64, matrix="mfma"),
        Target("mi300x", "gfx942", "hip", 64 * KIB, 512, 64, matrix="mfma"),
    )
}


def target(name: str) -> Target:
    """The record of a target.

    Raises:
        TargetError: an unknown name; lists the known ones.
    """
    if name not in TARGETS:
        raise TargetError(f"target: {name!r} is unknown; known are {', '.join(TARGETS)}")
    return TARGETS[name]
