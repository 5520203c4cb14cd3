"""How long work takes on a device: the units of one SM, its clock under load, and the blocks that its SMs take turns to run."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from attncc.errors import TargetError
from attncc.simulator.constants import Pipeline, Power
from attncc.simulator.work import Work
from attncc.targets import Performance

Floats = npt.NDArray[np.float64]
UNITS = ("tensor", "exp", "fma", "integer", "shared", "cache")
ARITHMETIC = ("exp", "fma", "integer")
LONGEST_QUEUE = 1 << 16
"""Blocks that are scheduled one by one; of longer queues only the end is, where the SMs run dry."""


@dataclass(frozen=True)
class Sm:
    """One SM of a device as a kernel of an element type sees it.

    Args of its methods are `Work`; results are cycles.

    Raises:
        TargetError: the device says nothing of the element type.
    """

    device: Performance
    dtype: str
    pipeline: Pipeline
    blocks: int = 1

    def by_unit(self, work: Work) -> dict[str, float]:
        """Cycles that each unit is busy."""
        d = self.device
        rates = (
            self.tensor_rate,
            d.exp_per_cycle,
            d.fma_per_cycle,
            d.int_per_cycle,
            d.shared_bytes_per_cycle,
            d.l2_bytes_per_second / d.sms / d.clock_hz,
        )
        return {unit: getattr(work, unit) / rate for unit, rate in zip(UNITS, rates)}

    @property
    def tensor_rate(self) -> float:
        """FLOP a cycle of matrix products; float32 takes three products in tf32, or vector lanes where there is no such unit."""
        rates = self.device.matrix_flops
        if self.dtype in rates:
            return rates[self.dtype]
        if self.dtype == "float32":
            return max(rates.get("tf32", 0.0) / 3, 2.0 * self.device.fma_per_cycle)
        if self.dtype == "float64":
            raise TargetError("matrix_flops: the device's record has no rate for float64; a file of your own may give it")
        return 2.0 * self.device.fma_per_cycle

    def cycles(self, work: Work) -> float:
        """Cycles from one tile to the next: products and arithmetic overlap as the pipeline says, loads hide behind both.

        The stages of a softmax wait for each other, so its units add up. Blocks that share an SM hide each other's waits.
        """
        busy = self.by_unit(work)
        products, arithmetic = busy["tensor"], sum(busy[unit] for unit in ARITHMETIC)
        exposed = (1.0 - self.pipeline.overlap) / self.blocks
        computing = max(products, arithmetic) + exposed * min(products, arithmetic)
        return max(computing, busy["shared"], busy["cache"])


def overlapped(a: float, b: float, overlap: float) -> float:
    """Time of two phases of which the share `overlap` of the shorter one is hidden."""
    return max(a, b) + (1.0 - overlap) * min(a, b)


# ---- the clock -----------------------------------------------------------------------------------------------------------------------


def seconds(cycles: float, tensor_cycles: float, device: Performance, power: Power | None, repeats: float = 1.0) -> float:
    """Seconds that cycles take from rest, when of them the matrix units are busy `tensor_cycles`.

    `repeats` runs in a row warm the device up first: the mean over all of them is given.
    """
    time = cycles / device.clock_hz
    if power is None or cycles == 0.0:
        return time
    for _ in range(8):  # the clock depends on the time; this converges at once
        time = cycles / mean_clock(time * repeats, tensor_cycles / cycles, device, power)
    return time


def mean_clock(load_seconds: float, duty: float, device: Performance, power: Power) -> float:
    """Mean clock over a load's first seconds: highest at first, later what the power limit leaves."""
    least = device.max_clock_hz * min(1.0, (1.0 / max(power.tensor_power * duty, 1e-9)) ** (1 / 3))
    passed = max(load_seconds / power.settle_seconds, 1e-9)
    return float(least + (device.max_clock_hz - least) * -math.expm1(-passed) / passed)


# ---- blocks over SMs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One place for a block on an SM, and when its blocks start and end: `edges[i]` to `edges[i + 1]`."""

    edges: tuple[float, ...]


def makespan(blocks: Floats, slots: int) -> float:
    """When the last block ends, if each goes to the first free slot, in order."""
    if not len(blocks):
        return 0.0
    if blocks.min() == blocks.max():
        return float(blocks[0]) * -(-len(blocks) // slots)
    early = max(len(blocks) - LONGEST_QUEUE, 0)
    free = [float(blocks[:early].sum()) / slots] * slots
    for block in blocks[early:].tolist():
        heapq.heapreplace(free, free[0] + block)
    return max(free)


def timeline(blocks: Sequence[float], slots: int) -> list[Slot]:
    """Which slot runs which blocks when, in the order of `makespan`; for pictures."""
    free = [(0.0, slot) for slot in range(slots)]
    edges: list[list[float]] = [[0.0] for _ in range(slots)]
    for block in blocks:
        start, slot = heapq.heappop(free)
        edges[slot].append(start + block)
        heapq.heappush(free, (start + block, slot))
    return [Slot(tuple(e)) for e in edges]


def idle_share(slots: Sequence[Slot]) -> float:
    """Share of the slots' time, up to the last block's end, in which they run nothing."""
    end = max(slot.edges[-1] for slot in slots)
    busy = sum(b - a for slot in slots for a, b in pairwise(slot.edges))
    return 1.0 - busy / (end * len(slots)) if end else 0.0
