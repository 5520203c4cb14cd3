"""Band plans of a call: where the mask is a product of bands, or bands and the equality of labels that come in order."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from attncc.ir.expr import Expr, Op, Table, var
from attncc.ir.values import evaluate_all
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import BoundMask, Shape, bind
from attncc.runtime.blocked.bands import AxisBand, BandPlan, plan_bands, routed_tile
from attncc.runtime.blocked.workers import host_reads
from attncc.runtime.operands import Operands

Plans = list[tuple[range, BandPlan]]


def band_plans(kernel: KernelPlan, mask: BoundMask, operands: Operands, kept: Tensor | None = None) -> Plans | None:
    """Plans over the flattened (batch, head) range, one for all where the mask reads no labels; None where it is no such mask.

    Where rows are routed, `kept` [B, Hq, Nq], every (batch element, head) has a plan of its own rows.
    """
    batch, heads = operands.q.shape[:2]
    if kept is not None:
        return _routed(kernel, mask, operands, kept)
    if mask.separable:
        return [(range(batch * heads), _plan(kernel, mask.query, mask.key))]
    labels = _labels(mask, operands)
    if labels is None:
        return None
    band = _axis_band(mask, 0)
    return [
        (range(b * heads, (b + 1) * heads), plan_bands([band & AxisBand.of_segments(ids, key_ids)]))
        for b, (ids, key_ids) in enumerate(labels)
    ]


@lru_cache(maxsize=64)
def _plan(kernel: KernelPlan, query: Shape, key: Shape) -> BandPlan:
    mask = bind(kernel.graph, query, key)
    return plan_bands([_axis_band(mask, axis) for axis in range(len(query))])


def _routed(kernel: KernelPlan, mask: BoundMask, operands: Operands, kept: Tensor) -> Plans | None:
    """On one axis, in whole: elsewhere rows of a tile are no product of axes any more."""
    labels = None if mask.separable else _labels(mask, operands)
    if mask.order != (1,) or (labels is None and not mask.separable):
        return None
    whole, size = _line(kernel, mask.query, mask.key), 0
    plans: Plans = []
    for b, rows in enumerate(kept):
        band = whole if labels is None else whole & AxisBand.of_segments(*labels[b])
        for h, tokens in enumerate(row.nonzero().flatten() for row in rows):
            at = b * len(rows) + h
            if len(tokens):
                rows_band = band.rows(tokens)
                size = size or routed_tile(rows_band)  # heads are much alike
                plans.append((range(at, at + 1), replace(plan_bands([rows_band], (size,)), tokens=tokens)))
    return plans


@lru_cache(maxsize=64)
def _line(kernel: KernelPlan, query: Shape, key: Shape) -> AxisBand:
    return _axis_band(bind(kernel.graph, query, key), 0)


def _axis_band(mask: BoundMask, axis: int) -> AxisBand:
    """First and last key of every query of an axis, on the whole grid: class coordinates become tokens again."""
    step, queries = mask.order[axis], torch.arange(mask.query[axis])
    residue = queries % step
    env = {f"q{axis}": (queries // step).numpy(), f"r{axis}": residue.numpy()}
    low, high = (torch.as_tensor(x).expand(len(queries)) * step + residue for x in evaluate_all(mask.bands[axis], env))
    return AxisBand(mask.key[axis], torch.stack([low, high]), step)


def _labels(mask: BoundMask, operands: Operands) -> list[tuple[Tensor, Tensor]] | None:
    """Labels of queries and keys by batch element, where the residual is their equality and keys come in order.

    Whether they do, the host must read: on other devices than a CPU it would have to wait.
    """
    tables = _compared(mask.residual)
    if tables is None or mask.order != (1,) or not host_reads(operands.q.device):
        return None
    ids, key_ids = (operands.tables[t.name].contiguous() for t in tables)
    in_order = bool((key_ids.diff(dim=1) >= 0).all())
    return list(zip(ids, key_ids)) if in_order else None


def _compared(residual: Expr) -> tuple[Table, Table] | None:
    """The tables of `ids[b, q] == key_ids[b, k]`."""
    if residual.op is not Op.EQ or any(side.op is not Op.LOAD for side in residual.args):
        return None
    by_token = {side.args: side.value for side in residual.args}
    ids, key_ids = (by_token.get((var("b"), var(token))) for token in ("q0", "k0"))
    return (ids, key_ids) if ids is not None and key_ids is not None else None
