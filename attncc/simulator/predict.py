"""The time model: milliseconds of a planned kernel on a device, and what limits it.

Work for each tile (`work`, or `instructions` where machine code is at hand) becomes cycles of an SM (`machine`); the rows of the block
mask become blocks of so many tiles each, which the SMs take in turn; reads and writes of memory overlap with that as the pipeline says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from attncc.ir.graph import GraphOp, Node, source
from attncc.passes.block_mask import BlockMask
from attncc.passes.footprint import BYTES, Configuration, shared_bytes, thread_registers
from attncc.passes.plan import KernelPlan
from attncc.simulator.constants import Constants, Pipeline, Power, shipped
from attncc.simulator.instructions import Compiled, compiled_work
from attncc.simulator.machine import ARITHMETIC, UNITS, Floats, Sm, makespans, overlapped, seconds
from attncc.simulator.routed import Shares, compacted
from attncc.simulator.work import Direction, TileWork, tile_work
from attncc.targets import Performance, Target

LIMITS = {
    "tensor": "matrix products", "exp": "exponentials", "fma": "float arithmetic", "integer": "integer arithmetic and masking",
    "shared": "shared memory", "cache": "L2", "memory": "memory", "launch": "launches",
}  # fmt: skip
"""What a prediction calls the units that may limit a kernel."""
RESERVED_SHARED = 1024
"""Bytes of an SM's shared memory that each resident block costs beside its own (CUDA C++ Programming Guide)."""
REGISTERS_BESIDE_TILES = 48
"""Registers a thread needs for addresses, row states and loop control, where no machine code says."""


class Prediction(BaseModel):
    """Time of one launch (two with split keys) and where it goes; a prediction, not a measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kernel: str = Field(description="what is timed")
    milliseconds: float
    limit: str = Field(description="the unit that is busy longest")
    busy: dict[str, float] = Field(description="milliseconds that each unit is busy, all SMs at once")
    blocks: int = Field(description="blocks that are launched")
    blocks_per_sm: int = Field(description="blocks that an SM holds at once")
    idle: float = Field(description="share of the SMs' time in which they have no block, at the end")
    clock_hz: float = Field(description="mean clock while it runs")


@dataclass(frozen=True)
class Conditions:
    """What a prediction is made for, beside the kernel: how many batch elements, which direction, how the machine behaves.

    `splits` cuts the keys of every row into as many blocks, whose results a second launch merges. `repeats` runs in a row warm the device
    up. `compiled` is what machine code says of the kernel.
    """

    target: Target
    batch: int = 1
    direction: Direction = "forward"
    splits: int = 1
    repeats: float = 1.0
    pipeline: str = "triton"
    constants: Constants = field(default_factory=shipped)
    compiled: Compiled | None = None

    @property
    def device(self) -> Performance:
        """What the target can do; a bare architecture has no such record and is never asked."""
        assert self.target.performance is not None
        return self.target.performance

    @property
    def overlap(self) -> Pipeline:
        """How the kernel's units overlap."""
        return self.constants.pipeline(self.pipeline)

    @property
    def power(self) -> Power | None:
        """What is known of the clock under load."""
        return self.constants.power.get(self.target.name)


@dataclass(frozen=True)
class Rows:
    """Tiles of each block of one launch, in its order: visited ones, and among them those that need no mask. And tokens of a head.

    The launch has all of this `copies` times in a row: once for each head and batch element where the mask is the same for all.
    """

    visited: Floats
    full: Floats
    queries: int
    keys: int
    copies: int = 1

    @staticmethod
    def of(mask: BlockMask, heads: int, batch: int, descending: bool = False, shares: Shares | None = None) -> Rows:
        """The rows of a block mask, for every head and batch element; of each head, the share of `shares` that is routed to it."""
        visited, full = _row_counts(mask)
        step, rows = -1 if descending else 1, mask.tiling.rows
        tokens = (prod(mask.tiling.mask.query), prod(mask.tiling.mask.key))
        if shares is not None:
            return Rows._routed(mask, (visited, full), shares, batch, step)
        if mask.batch == mask.heads == 1:
            return Rows(visited[::step], full[::step], *tokens, batch * heads)
        visited, full = (np.broadcast_to(x.reshape(mask.batch, mask.heads, rows), (batch, heads, rows)) for x in (visited, full))
        return Rows(visited[..., ::step].reshape(-1), full[..., ::step].reshape(-1), *tokens)

    @staticmethod
    def _routed(mask: BlockMask, counts: tuple[Floats, Floats], shares: Shares, batch: int, step: int) -> Rows:
        shape = (mask.batch, len(shares), mask.tiling.rows)
        each = [np.broadcast_to(x.reshape(mask.batch, mask.heads, -1), shape) for x in counts]
        parts = [compacted(each[0][b, h], each[1][b, h], share) for b in range(mask.batch) for h, share in enumerate(shares)]
        visited, full = (np.concatenate([part[i][::step] for part in parts]) for i in (0, 1))
        tokens = (prod(mask.tiling.mask.query), prod(mask.tiling.mask.key))
        return Rows(visited, full, *tokens, batch // mask.batch)

    @staticmethod
    def dense(tiles: tuple[int, int], tokens: tuple[int, int], instances: int) -> Rows:
        """Every key tile for every query tile, none masked."""
        visited = np.full(tiles[0], float(tiles[1]))
        return Rows(visited, visited, *tokens, instances)


def _row_counts(mask: BlockMask) -> tuple[Floats, Floats]:
    if mask.axes is None:
        lists = mask.lists
        full = np.diff(lists.full_offsets).astype(np.float64)
        return full + np.diff(lists.partial_offsets), full
    rank = mask.tiling.rank
    visited, full = (np.ones((1,) * 2 * rank) for _ in range(2))
    for a, axis in enumerate(mask.axes):
        classes, tiles = axis.visited.shape
        shape = tuple({a: classes, rank + a: tiles}.get(i, 1) for i in range(2 * rank))
        visited = visited * axis.visited.reshape(shape)
        full = full * axis.full.reshape(shape)
    return visited.reshape(-1), full.reshape(-1)


@dataclass(frozen=True)
class Launch:
    """A planned kernel on a machine: all of its prediction that does not depend on the rows, computed once.

    Raises:
        TargetError: the device says nothing of the element type.
    """

    kernel: KernelPlan
    conditions: Conditions
    name: str = "this kernel"

    @cached_property
    def sm(self) -> Sm:
        """An SM as the kernel sees it."""
        return Sm(self.conditions.device, dtype_of(self.kernel), self.conditions.overlap, blocks_per_sm(self.kernel, self.conditions))

    @cached_property
    def work(self) -> TileWork:
        """Work of a tile."""
        return _work(self.kernel, self.conditions)

    @cached_property
    def cycles(self) -> tuple[float, float]:
        """Cycles of a tile without its mask, and with it."""
        return self.sm.cycles(self.work.full), self.sm.cycles(self.work.partial)

    @property
    def slots(self) -> int:
        """Blocks that the device holds at once."""
        return self.conditions.device.sms * self.sm.blocks

    def masked(self, rows: Rows) -> Floats:
        """Tiles of each block that are masked."""
        every = self.kernel.mask_policy == "every tile" and self.conditions.compiled is None
        return rows.visited if every else rows.visited - rows.full

    def blocks(self, rows: Rows) -> Floats:
        """Cycles of each block."""
        masked, (full, partial), splits = self.masked(rows), self.cycles, self.conditions.splits
        blocks = masked * partial + (rows.visited - masked) * full
        return np.repeat(blocks / splits, splits) * self.sm.blocks + self.conditions.overlap.block_cycles

    def moving(self, queries: int, keys: int) -> float:
        """Seconds that memory is busy."""
        if (queries, keys) not in self._moving:
            moved = memory_bytes(self.kernel, queries, keys, self.conditions)
            self._moving[queries, keys] = moved / self.conditions.device.memory_bytes_per_second
        return self._moving[queries, keys]

    @cached_property
    def _moving(self) -> dict[tuple[int, int], float]:
        return {}


def predict(kernel: KernelPlan, rows: Rows, conditions: Conditions, name: str = "this kernel") -> Prediction:
    """Predicts a planned kernel.

    Args:
        kernel: the plan; its tiles, type, expressions and masking policy decide the work of a tile.
        rows: tiles of every block.
        conditions: the machine, and what runs on it.
        name: what the prediction says that it is of.
    """
    return predict_many([(Launch(kernel, conditions, name), rows)])[0]


def predict_many(launches: Sequence[tuple[Launch, Rows]]) -> list[Prediction]:
    """`predict` of many launches: their blocks are scheduled together, to the same result."""
    blocks = [launch.blocks(rows) for launch, rows in launches]
    slots = [launch.slots for launch, _ in launches]
    ends = np.zeros(len(launches))
    for n in set(slots):
        same = [i for i, own in enumerate(slots) if own == n]
        ends[same] = makespans([blocks[i] for i in same], n, [launches[i][1].copies for i in same])
    return [_prediction(launch, rows, own, float(end)) for (launch, rows), own, end in zip(launches, blocks, ends)]


def _prediction(launch: Launch, rows: Rows, blocks: Floats, end: float) -> Prediction:
    c, sm, device, masked = launch.conditions, launch.sm, launch.conditions.device, float(launch.masked(rows).sum()) * rows.copies
    total = launch.work.partial * masked + launch.work.full * (float(rows.visited.sum()) * rows.copies - masked)
    moving = launch.moving(rows.queries, rows.keys)
    busy = {unit: cycles / device.sms for unit, cycles in sm.by_unit(total).items()}
    computing = seconds(end, busy["tensor"], device, c.power, c.repeats)
    clock = end / computing if computing else device.clock_hz
    before = prepared_bytes(launch.kernel, rows.keys, c) / device.memory_bytes_per_second
    launches = device.launch_seconds * (1 + (c.splits > 1) + (before > 0))
    time = overlapped(computing, moving, max(c.overlap.overlap, 0.0)) + before + launches
    moving += before
    spent = {unit: cycles / clock * 1e3 for unit, cycles in busy.items()} | {"memory": moving * 1e3, "launch": launches * 1e3}
    return Prediction(
        kernel=launch.name,
        milliseconds=time * 1e3,
        limit=_limit(spent),
        busy={unit: spent[unit] for unit in (*UNITS, "memory", "launch")},
        blocks=len(blocks) * rows.copies,
        blocks_per_sm=sm.blocks,
        idle=1.0 - float(blocks.sum()) * rows.copies / (launch.slots * end) if end else 0.0,
        clock_hz=clock,
    )


def together(parts: Sequence[Prediction]) -> Prediction:
    """Launches one after another as one: their times add up."""
    if len(parts) == 1:
        return parts[0]
    busy, total = {unit: sum(p.busy[unit] for p in parts) for unit in parts[0].busy}, sum(p.milliseconds for p in parts)

    def mean(name: str) -> float:
        return sum(float(getattr(p, name)) * p.milliseconds for p in parts) / total

    return Prediction(
        kernel=parts[-1].kernel,
        milliseconds=total,
        limit=_limit(busy),
        busy=busy,
        blocks=sum(p.blocks for p in parts),
        blocks_per_sm=parts[-1].blocks_per_sm,
        idle=mean("idle"),
        clock_hz=mean("clock_hz"),
    )


def _limit(spent: Mapping[str, float]) -> str:
    """The busiest unit. The stages of a softmax wait for each other: together they count as one, named by the busiest of them."""
    arithmetic = sum(spent[unit] for unit in ARITHMETIC)
    rest = {unit: time for unit, time in spent.items() if unit not in ARITHMETIC}
    longest = max(rest, key=lambda unit: rest[unit])
    if arithmetic <= rest[longest]:
        return LIMITS[longest]
    return LIMITS[max(ARITHMETIC, key=lambda unit: spent[unit])]


def _work(kernel: KernelPlan, c: Conditions) -> TileWork:
    if c.compiled is not None and c.direction == "forward":
        return compiled_work(c.compiled, kernel)
    return tile_work(kernel, c.direction)


# ---- what a kernel takes of an SM, and of memory ---------------------------------------------------------------------------------------


def dtype_of(kernel: KernelPlan) -> str:
    """Element type of q, k and v."""
    return str(source(kernel.graph.find(GraphOp.SCORES)[0])["dtype"])


def blocks_per_sm(kernel: KernelPlan, c: Conditions) -> int:
    """Blocks that an SM holds at once, by its shared memory, registers and threads; at least one."""
    if c.target.backend == "cpu":
        return 1
    body, device = kernel.graph, c.device
    configuration = Configuration(prod(kernel.q_tile), prod(kernel.k_tile), kernel.num_warps, kernel.num_stages, 1.0)
    threads = kernel.num_warps * c.target.warp
    shared = c.compiled.shared_bytes if c.compiled else shared_bytes(body, configuration, c.target)
    planned = min(thread_registers(body, configuration, c.target) + REGISTERS_BESIDE_TILES, c.target.registers)
    registers = c.compiled.registers if c.compiled else planned
    return max(
        1,
        min(
            device.shared_bytes_per_sm // (shared + RESERVED_SHARED),
            device.registers_per_sm // (threads * registers),
            device.threads_per_sm // threads,
            device.blocks_per_sm,
        ),
    )


def memory_bytes(kernel: KernelPlan, queries: int, keys: int, c: Conditions) -> float:
    """Bytes that must move: every operand once, the output once, twice as much again in backward; partial results of split keys."""
    body = kernel.graph
    heads, width = source(body.find(GraphOp.SCORES)[0])["shape"][1], sum(n.inputs[1]["shape"][3] for n in body.find(GraphOp.COMBINE))
    sizes = {"B": c.batch, "H": heads, "NQ": queries, "NK": keys}
    read = sum(_bytes(n, sizes) for n in body.nodes() if n.op is GraphOp.INPUT and n.get("values") is None)
    outputs = float(c.batch * heads * queries * width)
    written = outputs * BYTES[dtype_of(kernel)] if width else 4.0 * c.batch * heads * queries
    if c.direction == "backward":
        return 2.0 * (read + written)
    # Partial results are float32, written by one launch and read by the other.
    return read + written + (2.0 * 4.0 * outputs * c.splits if c.splits > 1 else 0.0)


def prepared_bytes(kernel: KernelPlan, keys: int, c: Conditions) -> float:
    """Bytes that a launch before the kernel moves: keys that norms or rotations change are read and written once."""
    if not any(view.prepared for view in kernel.views):
        return 0.0
    return 2.0 * _bytes(source(kernel.graph.find(GraphOp.SCORES)[0].inputs[1]), {"B": c.batch, "NK": keys})


def _bytes(node: Node, sizes: Mapping[Any, int]) -> float:
    return float(prod(sizes.get(n, n) for n in node["shape"]) * BYTES.get(node["dtype"], 4))
