"""What a block of a planned kernel does for each tile of keys, counted by the unit that does it. Reads a plan and nothing else.

A tile of `q` rows and `k` keys costs two matrix products, and for each of its q x k scores: a multiply-add that scales it and takes the
maximum off, an exponential, a maximum, a sum, half a conversion; each score map, and the mask where the tile needs one, adds its own
operations. `attncc.simulator.instructions` counts the same in machine code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Literal

from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, Op, const, nodes, variables
from attncc.ir.graph import GraphOp, reduction, row_class, weight_factor
from attncc.ir.rows import SCORE
from attncc.passes.footprint import element_bytes, widths
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import the_mask

Direction = Literal["forward", "backward"]
Cost = tuple[float, float, float]

COSTS: dict[Op, Cost] = {
    Op.DIV: (1, 2, 0), Op.EXP: (1, 1, 0), Op.LOG: (1, 1, 0), Op.SQRT: (1, 1, 0), Op.TANH: (2, 4, 1), Op.SIGMOID: (2, 2, 0),
    Op.SOFTPLUS: (3, 6, 2), Op.ERF: (1, 10, 0), Op.POW: (2, 3, 0), Op.LOAD: (0, 0, 3), Op.RANGE_MIN: (0, 0, 3), Op.RANGE_MAX: (0, 0, 3),
    Op.FLOORDIV: (0, 0, 4), Op.MOD: (0, 0, 5), Op.MIN: (0, 0, 1), Op.MAX: (0, 0, 1), Op.LT: (0, 0, 1), Op.LE: (0, 0, 1),
    Op.EQ: (0, 0, 1), Op.NE: (0, 0, 1), Op.SELECT: (0, 0, 1), Op.RELU: (0, 0, 1), Op.FLOAT: (0, 0, 1),
}  # fmt: skip
"""(exponentials, float multiply-adds, integer operations) of an op; sums and products are one of their kind, all others free."""
THREAD_COLUMNS = 32
"""Columns of a tile that one thread of a matrix unit holds of a row, at most: what it computes of a column serves all of its rows."""
OVERHEAD = 0.5
"""Integer operations a score beside those of the formula: loop control, addresses, reductions across lanes."""
SELECTS = 2.0
"""Selections of a masked score: of the score, and of its weight where a row may have no key yet."""


@dataclass(frozen=True)
class Work:
    """Amounts by unit: `tensor` FLOP, `exp`, `fma` and `integer` results, `shared` and `cache` bytes read from shared memory and L2."""

    tensor: float = 0.0
    exp: float = 0.0
    fma: float = 0.0
    integer: float = 0.0
    shared: float = 0.0
    cache: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class TileWork:
    """Work of one visited tile, without and with its mask."""

    full: Work
    partial: Work


def tile_work(kernel: KernelPlan, direction: Direction = "forward") -> TileWork:
    """Work for each tile of a planned kernel.

    A backward tile recomputes its scores and has five products instead of two; the chain rule doubles the arithmetic of a score.
    """
    pairs = prod(kernel.q_tile) * prod(kernel.k_tile)
    score, masked = score_work(kernel), mask_work(kernel)
    if direction == "backward":
        score = score + Work(fma=2.0, integer=1.0) + map_work(kernel) * 2.0
    full = _products(kernel, 1.0 if direction == "forward" else _recomputed(kernel)) + score * pairs
    return TileWork(full * walks(kernel), (full + masked * pairs) * walks(kernel))


def walks(kernel: KernelPlan) -> float:
    """How often a kernel walks over its keys: once, but for the sweeps to a root, of which the first finds the greatest score."""
    return 1.0 + float(reduction(kernel.graph).get("sweeps", 0))


def _recomputed(kernel: KernelPlan) -> float:
    """Products of a backward tile, relative to its forward ones; a statistic has those of scores, dq and dk, a root its scores twice."""
    found = reduction(kernel.graph)
    if found.op is GraphOp.ROOT:
        return 4.0 / walks(kernel)
    return 2.5 if kernel.graph.find(GraphOp.COMBINE) else 3.0


def _products(kernel: KernelPlan, times: float) -> Work:
    """Both matrix products of a tile, what they read of shared memory, and the keys and values that come from L2."""
    key_width, value_width = widths(kernel.graph)
    rows, keys, size = prod(kernel.q_tile), prod(kernel.k_tile), element_bytes(kernel.graph)
    streamed = keys * (key_width + value_width) * size
    # 64 rows at a time take the whole key or value tile from shared memory.
    reads = -(-rows // 64) * streamed
    return Work(tensor=2.0 * rows * keys * (key_width + value_width) * times, shared=reads * times, cache=streamed)


def score_work(kernel: KernelPlan) -> Work:
    """Work for each score of a tile that needs no mask."""
    body = kernel.graph
    weight, kind = reduction(body), row_class(body)
    convert = 0.5 if element_bytes(body) == 2 and body.find(GraphOp.COMBINE) else 0.0
    own = _expression(weight["weight"])
    if kind == "root":
        sums = weight["weight"], derivative(weight["weight"], SCORE)
        own = _expression(*sums) + Work(fma=2.0, integer=1.0)  # both sums, and the greatest score
    if kind == "softmax":
        rescale = widths(body)[1] / prod(kernel.k_tile)
        own = Work(exp=1.0, fma=2.0 + rescale, integer=1.0)
    if kind == "ratio":
        own = own + Work(fma=1.0)  # the sum of weights
    if any(n.get("value_scale") is not None for n in body.find(GraphOp.COMBINE)):
        own = own + Work(fma=1.0)
    if (factor := weight_factor(body)) is not None:
        own = own + _expression(factor) + Work(fma=1.0)
    return own + map_work(kernel) + Work(integer=convert + OVERHEAD)


def map_work(kernel: KernelPlan) -> Work:
    """Work of the score maps for each score."""
    total = Work()
    for node in kernel.graph.find(GraphOp.MAP):
        total = total + _expression(node["value"])
    return total


def mask_work(kernel: KernelPlan) -> Work:
    """Work of the mask for each score of a masked tile: comparisons of bands, the residual, the selections."""
    mask = the_mask(kernel.graph)
    bands = mask["bands"]
    compared = sum(2.0 * share for share in _shares(kernel.k_tile))
    combined = 1.0 if len(bands) > 1 else 0.0
    counts = row_class(kernel.graph) == "mean" and mask["residual"] is not const(True)
    counted = Work(fma=1.0, integer=1.0) if counts else Work()  # in full tiles a constant; bands say how many keys a row sees
    return counted + Work(integer=compared + combined + SELECTS) + _expression(mask["residual"])


def _shares(k_tile: tuple[int, ...]) -> Iterator[float]:
    """For each axis, different coordinates among the columns of a thread, by columns; neighbouring columns lie in four threads."""
    columns = min(prod(k_tile) // 4, THREAD_COLUMNS) or 1
    for axis, side in enumerate(k_tile):
        own = side // 4 if axis == len(k_tile) - 1 else side
        yield min(max(own, 1), columns) / columns


def _expression(*roots: Expr) -> Work:
    """What is computed anew for each pair: nodes that depend on the score, or on both the query and the key."""
    total = Work()
    for node in nodes(*roots):
        if _differs_by_pair(node):
            total = total + _cost(node)
    return total


def _differs_by_pair(node: Expr) -> bool:
    names = variables(node)
    return "s" in names or (any(n.startswith("q") for n in names) and any(n.startswith("k") for n in names))


def _cost(node: Expr) -> Work:
    if node.op in (Op.ADD, Op.SUB, Op.MUL):
        return Work(fma=1.0) if node.kind is Kind.FLOAT else Work(integer=1.0)
    exp, fma, integer = COSTS.get(node.op, (0, 0, 0))
    return Work(exp=exp, fma=fma, integer=integer)
