"""What a device can do in a second: the figures that the simulator's cost model reads. Facts only, each checked against the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from attncc.errors import TargetError

Element = Literal["float64", "float32", "tf32", "bfloat16", "float16", "float8", "float4"]
ELEMENTS: tuple[str, ...] = get_args(Element)
RANGES = {
    "clock_hz": (1e8, 1e10, "hertz"),
    "max_clock_hz": (1e8, 1e10, "hertz"),
    "board_watts": (1.0, 1e5, "watts"),
    "l2_bytes": (2.0**16, 2.0**40, "bytes"),
    "l2_bytes_per_second": (1e9, 1e16, "bytes a second"),
    "memory_bytes": (2.0**27, 2.0**50, "bytes"),
    "memory_bytes_per_second": (1e9, 1e16, "bytes a second"),
    "launch_seconds": (1e-8, 1e-2, "seconds"),
}
"""What these may be, with their units: figures in MHz, GB or microseconds fall outside."""


@dataclass(frozen=True)
class Performance:
    """Rates and sizes of a device; an SM is a compute unit on AMD and a core on a CPU, whose vector lanes count as threads.

    Raises:
        TargetError: a figure that is impossible on its own or beside another; names the field.
    """

    sms: int
    """Streaming multiprocessors that the product has, not those of the full die."""
    clock_hz: float
    """The clock at which the vendor's peak figures hold."""
    max_clock_hz: float
    """What the chip boosts to at light load."""
    board_watts: float
    """Power limit of the board."""
    matrix_flops: Mapping[str, float] = field(hash=False)
    """FLOP a cycle and SM of the matrix unit by element type, dense, summed in float32 (float64 in float64). Absent: not on the unit."""
    exp_per_cycle: float
    """Exponentials, reciprocals and the like, results a cycle and SM."""
    fma_per_cycle: float
    """Float32 fused multiply-adds, results a cycle and SM."""
    int_per_cycle: float
    """Int32 sums, comparisons and selections, results a cycle and SM."""
    issue_per_cycle: float
    """Instructions of a thread that are issued a cycle and SM: schedulers times the lanes that each of them serves."""
    shared_bytes_per_cycle: float
    """What an SM reads from its shared memory."""
    shared_bytes_per_sm: int
    """Shared memory of an SM, for all of its blocks."""
    registers_per_sm: int
    """32-bit registers of an SM."""
    threads_per_sm: int
    """Resident threads of an SM, at most."""
    blocks_per_sm: int
    """Resident blocks of an SM, at most."""
    l2_bytes: int
    """The cache that all SMs share, the last one before memory."""
    l2_bytes_per_second: float
    """What all SMs together read from it."""
    memory_bytes: int
    """Memory of the device."""
    memory_bytes_per_second: float
    """Its peak bandwidth."""
    launch_seconds: float
    """What a kernel launch costs where launches follow each other."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name == "matrix_flops":
                _check_rates(self.matrix_flops)
            else:
                _check_number(f.name, getattr(self, f.name), f.type == "int")
        self._check_relations()
        object.__setattr__(self, "matrix_flops", dict(self.matrix_flops))  # the caller's may change

    def _check_relations(self) -> None:
        if self.clock_hz > self.max_clock_hz:
            raise TargetError(f"clock_hz: {self.clock_hz:g} is above max_clock_hz {self.max_clock_hz:g}")
        if self.l2_bytes_per_second < self.memory_bytes_per_second:
            raise TargetError(
                f"l2_bytes_per_second: {self.l2_bytes_per_second:g} is less than memory_bytes_per_second "
                f"{self.memory_bytes_per_second:g}: memory is read through this cache"
            )
        if self.l2_bytes > self.memory_bytes:
            raise TargetError(f"l2_bytes: {self.l2_bytes} is more than memory_bytes {self.memory_bytes}")
        for name in ("exp_per_cycle", "fma_per_cycle", "int_per_cycle"):
            if getattr(self, name) > self.issue_per_cycle:
                raise TargetError(f"{name}: {getattr(self, name):g} results a cycle from {self.issue_per_cycle:g} issued (issue_per_cycle)")
        if self.blocks_per_sm > self.threads_per_sm:
            raise TargetError(f"blocks_per_sm: {self.blocks_per_sm} is more than threads_per_sm {self.threads_per_sm}")

    @property
    def peak_flops(self) -> dict[str, float]:
        """Dense FLOP/s of the matrix unit by element type, at `clock_hz`."""
        return {element: self.sms * self.clock_hz * rate for element, rate in self.matrix_flops.items()}


def _check_rates(rates: Mapping[str, float]) -> None:
    for element, rate in rates.items():
        if element not in ELEMENTS:
            raise TargetError(f"matrix_flops: {element!r} is no element type; known are {', '.join(ELEMENTS)}")
        _check_number(f"matrix_flops.{element}", rate, False)


def _check_number(name: str, value: float, whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TargetError(f"{name}: must be {'an integer' if whole else 'a number'}, not {value!r}")
    if not 0 < value < math.inf:
        raise TargetError(f"{name}: must be positive and finite, not {value!r}")
    low, high, unit = RANGES.get(name, (0.0, math.inf, ""))
    if not low <= value <= high:
        raise TargetError(f"{name}: {value:g} {unit} is outside {low:g} to {high:g}; is it in another unit?")
