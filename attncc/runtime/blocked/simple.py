"""The blocked engine: torch on any device, one tile of query rows at a time against the keys that its row may see.

The forward pass keeps of each row what its class says (softmax: the log-sum-exp); the backward pass recomputes scores from it. The
interface is `run_forward` and `run_backward`; gates are not its business (`attncc.runtime.gate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, Op, const, nodes
from attncc.ir.graph import GraphOp
from attncc.ir.rows import SCORE
from attncc.ir.values import evaluate, evaluate_all
from attncc.passes.block_mask import BlockMask, block_mask
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import BoundMask, Shape, bind, class_lengths, unflatten
from attncc.runtime.operands import Operands

Gradients = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def run_forward(kernel: KernelPlan, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Output rows before any gate, `[B, Hq, Nq, Dv]` in the type of q, and their log-sum-exp `[B, Hq, Nq]` (None: pointwise)."""
    engine = _Engine(kernel, operands)
    q, v = operands.q, operands.v
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=operands.compute, device=q.device)
    for tile in engine.tiles():
        weights, row_lse = engine.weights(tile, None)
        out[:, :, tile.queries] = torch.matmul(weights, engine.values(tile)).to(q.dtype)
        if row_lse is not None:
            lse[:, :, tile.queries] = row_lse
    return out, lse if engine.softmax else None


def run_backward(
    kernel: KernelPlan, operands: Operands, rows: Tensor, lse: Tensor | None, grad: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """Gradients of q, k, v and of the trained tables, from the forward pass's results and the gradients of these."""
    engine = _Engine(kernel, operands)
    dtype = operands.compute
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (operands.q, operands.k, operands.v))
    found = {name: torch.zeros(t.shape, dtype=dtype, device=t.device) for name, t in operands.tables.items() if name in operands.trained}
    for tile in engine.tiles():
        at = tile.queries
        do, raw = grad[:, :, at].to(dtype), engine.raw_scores(tile)
        chain = engine.mapped(tile, raw)
        weights, _ = engine.weights(tile, None if lse is None else lse[:, :, at], chain[-1])
        ds = torch.matmul(do, engine.values(tile).transpose(2, 3))
        if engine.softmax:
            delta = (do * rows[:, :, at].to(dtype)).sum(3, keepdim=True)
            delta = delta if grad_lse is None else delta - grad_lse[:, :, at, None]
            ds = (ds - delta) * weights
        else:
            ds = torch.where(tile.allowed, ds * engine.slope(chain[-1]), 0.0)
        ds = engine.through_maps(tile, chain, ds, found)
        dq[:, :, at] = torch.matmul(ds, engine.keys(tile)) * engine.scale
        _add_heads(dk, tile.keys, torch.matmul(ds.transpose(2, 3), engine.queries(tile)) * engine.scale)
        _add_heads(dv, tile.keys, torch.matmul(weights.transpose(2, 3), do))
    return (
        dq.to(operands.q.dtype),
        dk.to(operands.k.dtype),
        dv.to(operands.v.dtype),
        {n: g.to(operands.tables[n].dtype) for n, g in found.items()},
    )


def _add_heads(total: Tensor, tokens: Tensor, part: Tensor) -> None:
    """Adds a gradient by query head to that of the fewer key or value heads."""
    group = part.shape[1] // total.shape[1]
    total.index_add_(2, tokens, part.reshape(len(part), -1, group, *part.shape[2:]).sum(2))


@dataclass(frozen=True)
class _Tile:
    """One row of query tiles with every key that it may see: token indices, what expressions see of them, and the mask."""

    queries: Tensor
    keys: Tensor
    env: dict[str, Any]
    allowed: Tensor


class _Engine:
    """One call: the plan's expressions over the call's tensors."""

    def __init__(self, kernel: KernelPlan, operands: Operands) -> None:
        self.kernel, self.operands, body = kernel, operands, kernel.graph
        self.scores = body.find(GraphOp.SCORES)[0]
        self.maps: list[Expr] = [n["value"] for n in body.find(GraphOp.MAP)]
        self.weight = body.find(GraphOp.WEIGHTS)[0]
        self.softmax = bool(self.weight["row_class"] == "softmax")
        self.scale = float(self.scores["scale"])
        self.mask = bind(body, operands.query, operands.key)
        self.xp = torch_arrays(operands.compute)

    # ---- tiles ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> BlockMask:
        """Key tiles of every row that the bands do not rule out."""
        m = self.mask
        return block_mask(BoundMask(m.bands, const(True), m.query, m.key, m.order), self.kernel.q_tile, self.kernel.k_tile)

    def tiles(self) -> Iterator[_Tile]:
        """Rows that may see a key at all."""
        lists, tiling = self.candidates.lists, self.candidates.tiling
        residues = list(tiling.residues())
        for row in range(tiling.rows):
            parts = ((lists.full_offsets, lists.full_tiles), (lists.partial_offsets, lists.partial_tiles))
            found = sorted(int(t) for offsets, entries in parts for t in entries[offsets[row] : offsets[row + 1]])
            group, flat = divmod(row, prod(tiling.q_tiles))
            if found:
                yield self._tile(residues[group], flat, found)

    def _tile(self, residue: Shape, row: int, key_tiles: list[int]) -> _Tile:
        tiling = self.candidates.tiling
        queries = self._coordinates(residue, [row], tiling.q_tiles, tiling.q_tile, self.operands.query)
        keys = self._coordinates(residue, key_tiles, tiling.k_tiles, tiling.k_tile, self.operands.key)
        device, q = self.operands.q.device, self.operands.q
        env: dict[str, Any] = {
            "b": torch.arange(q.shape[0], device=device).view(-1, 1, 1, 1),
            "h": torch.arange(q.shape[1], device=device).view(-1, 1, 1),
            **{f"r{a}": r for a, r in enumerate(residue)},
            **{f"q{a}": x[:, None] for a, x in enumerate(queries)},
            **{f"k{a}": x for a, x in enumerate(keys)},
            **self.operands.lengths,
            **self.operands.tables,
        }
        allowed = evaluate(self.mask.predicate, env, self.xp)
        rows, columns = self._tokens(queries, residue, self.operands.query), self._tokens(keys, residue, self.operands.key)
        return _Tile(rows, columns, env, torch.as_tensor(allowed, device=device))

    def _coordinates(self, residue: Shape, tiles: list[int], counts: Shape, sides: Shape, lengths: Shape) -> list[Tensor]:
        """Coordinates within their class of the tokens of some tiles, one vector an axis."""
        found = [self._box(unflatten(t, counts), sides, class_lengths(lengths, self.mask.order, residue)) for t in tiles]
        return [torch.cat([box[a] for box in found]) for a in range(len(sides))]

    def _box(self, at: Shape, sides: Shape, lengths: Shape) -> list[Tensor]:
        device = self.operands.q.device
        axes = [torch.arange(i * side, min((i + 1) * side, n), device=device) for i, side, n in zip(at, sides, lengths)]
        return [x.flatten() for x in torch.meshgrid(*axes, indexing="ij")]

    def _tokens(self, coordinates: list[Tensor], residue: Shape, lengths: Shape) -> Tensor:
        flat = torch.zeros_like(coordinates[0])
        for x, r, d, n in zip(coordinates, residue, self.mask.order, lengths):
            flat = flat * n + x * d + r
        return flat

    # ---- one tile -------------------------------------------------------------------------------------------------------------

    def queries(self, tile: _Tile) -> Tensor:
        return self._gathered(self.operands.q, tile.queries)

    def keys(self, tile: _Tile) -> Tensor:
        return self._gathered(self.operands.k, tile.keys)

    def values(self, tile: _Tile) -> Tensor:
        return self._gathered(self.operands.v, tile.keys)

    def _gathered(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Rows of some tokens for every query head."""
        rows = x.index_select(2, tokens).to(self.operands.compute)
        return rows.repeat_interleave(self.operands.q.shape[1] // x.shape[1], dim=1)

    def raw_scores(self, tile: _Tile) -> Tensor:
        return torch.matmul(self.queries(tile), self.keys(tile).transpose(2, 3)) * self.scale

    def mapped(self, tile: _Tile, scores: Tensor) -> list[Tensor]:
        """The scaled scores, then what each map makes of them."""
        chain = [scores]
        for value in self.maps:
            chain.append(evaluate(value, {**tile.env, "s": chain[-1]}, self.xp))
        return chain

    def weights(self, tile: _Tile, lse: Tensor | None, scores: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weights `[B, H, rows, keys]`, and for softmax the log-sum-exp, which is computed unless given."""
        s = self.mapped(tile, self.raw_scores(tile))[-1] if scores is None else scores
        if not self.softmax:
            return torch.where(tile.allowed, evaluate(self.weight["weight"], {"s": s}, self.xp), 0.0), None
        s = torch.where(tile.allowed, s, -math.inf)
        lse = torch.logsumexp(s, 3) if lse is None else lse
        # A row without a key has lse -inf, and exp(-inf - 0) is its weight 0.
        return torch.exp(s - torch.where(lse == -math.inf, 0.0, lse)[..., None]), lse

    def slope(self, scores: Tensor) -> Tensor:
        """Derivative of a pointwise weight."""
        slope = evaluate(derivative(self.weight["weight"], SCORE), {"s": scores}, self.xp)
        return torch.as_tensor(slope, dtype=scores.dtype, device=scores.device)

    def through_maps(self, tile: _Tile, chain: list[Tensor], ds: Tensor, found: dict[str, Tensor]) -> Tensor:
        """The gradient of the scaled scores from that of the mapped ones; gradients of tables are added to `found`."""
        for value, s in zip(reversed(self.maps), reversed(chain[:-1])):
            reads = [n for n in nodes(value) if n.op is Op.LOAD and n.kind is Kind.FLOAT and n.value.name in found]
            slopes = evaluate_all([derivative(value, x) for x in (SCORE, *reads)], {**tile.env, "s": s}, self.xp)
            for read, slope in zip(reads, slopes[1:]):
                self._scatter(found[read.value.name], read, tile, ds * slope)
            ds = ds * slopes[0]
        return ds

    def _scatter(self, total: Tensor, read: Expr, tile: _Tile, grad: Tensor) -> None:
        """Adds the gradient of every pair to the table entry that it read."""
        index = [torch.as_tensor(i, device=grad.device) for i in evaluate_all(read.args, tile.env, self.xp)]
        clamped = [i.clamp(0, n - 1).expand(grad.shape) for i, n in zip(index, total.shape)]
        total.index_put_(tuple(clamped), grad, accumulate=True)
