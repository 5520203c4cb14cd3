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
Ints = npt.NDArray[np.int64]
UNITS = ("tensor", "exp", "fma", "integer", "shared", "cache")
ARITHMETIC = ("exp", "fma", "integer")
LONGEST_QUEUE = 1 << 16
"""Blocks that are scheduled one by one; of longer queues only the end is, where the SMs run dry."""
CELLS = 1 << 16
"""Slots of all queues that are scheduled at once: they stay in cache."""
FEW_CELLS = 1 << 7
"""Below this many a heap is quicker."""


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
    return float(makespans([blocks], slots, [1])[0])


def makespans(patterns: Sequence[Floats], slots: int, copies: Sequence[int]) -> Floats:
    """`makespan` of many queues at once; queue i is `patterns[i]`, `copies[i]` times in a row."""
    ends = np.zeros(len(patterns))
    uneven = []
    for i, blocks in enumerate(patterns):
        if len(blocks) and blocks.min() == blocks.max():
            ends[i] = blocks[0] * -(-len(blocks) * copies[i] // slots)
        elif len(blocks):
            uneven.append(i)
    together = max(1, CELLS // slots)
    for at in range(0, len(uneven), together):
        chosen = uneven[at : at + together]
        queues = _Queues.of([patterns[i] for i in chosen], [copies[i] for i in chosen])
        ends[chosen] = queues.one_by_one(slots) if len(chosen) * slots < FEW_CELLS else queues.in_rounds(slots)
    return ends


@dataclass(frozen=True)
class _Queues:
    """Queues of repeated patterns: block j of queue i is `blocks[starts[i] + j % lengths[i]]`, from `begins[i]` to `totals[i]`.

    `spent` adds up the blocks before that.
    """

    blocks: Floats
    starts: Ints
    lengths: Ints
    begins: Ints
    totals: Ints
    spent: Floats

    @staticmethod
    def of(patterns: Sequence[Floats], copies: Sequence[int]) -> _Queues:
        lengths = np.array([len(p) for p in patterns])
        totals = lengths * np.array(copies)
        begins = np.maximum(totals - LONGEST_QUEUE, 0)
        spent = [n // len(p) * p.sum() + p[: n % len(p)].sum() for p, n in zip(patterns, begins.tolist())]
        return _Queues(np.concatenate(patterns), np.cumsum(lengths) - lengths, lengths, begins, totals, np.array(spent))

    def one_by_one(self, slots: int) -> Floats:
        """With a heap: the quicker way for one queue and few slots."""
        ends = []
        for start, length, begin, total, spent in zip(self.starts, self.lengths, self.begins, self.totals, self.spent):
            free = [float(spent) / slots] * slots
            for block in self.blocks[start + np.arange(begin, total) % length].tolist():
                heapq.heapreplace(free, free[0] + block)
            ends.append(max(free))
        return np.array(ends)

    def in_rounds(self, slots: int) -> Floats:
        """In rounds over all queues; the sums are the same ones, so results are equal to the last bit.

        A round gives the next blocks to the slots in order of when they are free, up to the first slot that one of these blocks frees
        earlier.
        """
        ends, alive, at = np.zeros(len(self.lengths)), np.arange(len(self.lengths)), self.begins.copy()
        free = np.repeat(self.spent[:, None] / slots, slots, axis=1)
        while len(alive):
            index = at[:, None] + np.arange(slots)
            taken = index < self.totals[alive, None]
            blocks = self.blocks[self.starts[alive, None] + index % self.lengths[alive, None]]
            done = np.where(taken, free + blocks, np.inf)
            taken[:, 1:] &= free[:, 1:] <= np.minimum.accumulate(done, axis=1)[:, :-1]
            free = np.sort(np.where(taken, done, free), axis=1)
            at = at + taken.sum(axis=1)
            running = at < self.totals[alive]
            ends[alive[~running]] = free[~running, -1]
            alive, at, free = alive[running], at[running], free[running]
        return ends


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
