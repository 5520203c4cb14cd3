"""Band plans of a call: where the mask is a product of bands, or bands and the equality of labels that come in order.

Bands may differ from batch element to batch element and from head to head, and read tables where the host may read these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

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
    if not host_reads(operands.q.device):
        return None
    tables = {t.name: operands.tables[t.name].numpy() for t in mask.reads}
    if mask.banded:
        return _owned_plans(mask, tables, batch, heads)
    labels = _labels(mask, operands)
    if labels is None:
        return None
    return [
        (range(b * heads, (b + 1) * heads), plan_bands([_axis_band(mask, 0, tables, b) & AxisBand.of_segments(ids, key_ids)]))
        for b, (ids, key_ids) in enumerate(labels)
    ]


def _owned_plans(mask: BoundMask, tables: Mapping[str, Any], batch: int, heads: int) -> Plans:
    """A plan for each batch element and head that has bands of its own."""
    if mask.varies_with("h"):
        owners = [(range(i, i + 1), *divmod(i, heads)) for i in range(batch * heads)]
    else:
        owners = [(range(b * heads, (b + 1) * heads), b, 0) for b in range(batch)]
    made: dict[tuple[bytes, ...], BandPlan] = {}
    found = []
    for share, b, h in owners:
        axes = [_axis_band(mask, axis, tables, b, h) for axis in range(len(mask.query))]
        same = tuple(axis.bounds.numpy().tobytes() for axis in axes)
        if same not in made:
            made[same] = plan_bands(axes)
        found.append((share, made[same]))
    return found


@lru_cache(maxsize=64)
def _plan(kernel: KernelPlan, query: Shape, key: Shape) -> BandPlan:
    mask = bind(kernel.graph, query, key)
    return plan_bands([_axis_band(mask, axis) for axis in range(len(query))])


def _routed(kernel: KernelPlan, mask: BoundMask, operands: Operands, kept: Tensor) -> Plans | None:
    """On one axis, in whole: elsewhere rows of a tile are no product of axes any more."""
    labels = None if mask.banded else _labels(mask, operands)
    readable = mask.separable or host_reads(operands.q.device)
    if mask.order != (1,) or not readable or (labels is None and not mask.banded):
        return None
    tables = {} if mask.separable else {t.name: operands.tables[t.name].numpy() for t in mask.reads}
    size = 0
    plans: Plans = []
    for b, rows in enumerate(kept):
        for h, tokens in enumerate(row.nonzero().flatten() for row in rows):
            band = _line(kernel, mask.query, mask.key) if mask.separable else _axis_band(mask, 0, tables, b, h)
            band = band if labels is None else band & AxisBand.of_segments(*labels[b])
            at = b * len(rows) + h
            if len(tokens):
                rows_band = band.rows(tokens)
                size = size or routed_tile(rows_band)  # heads are much alike
                plans.append((range(at, at + 1), replace(plan_bands([rows_band], (size,)), tokens=tokens)))
    return plans


@lru_cache(maxsize=64)
def _line(kernel: KernelPlan, query: Shape, key: Shape) -> AxisBand:
    return _axis_band(bind(kernel.graph, query, key), 0)


def _axis_band(mask: BoundMask, axis: int, tables: Mapping[str, Any] | None = None, b: int = 0, h: int = 0) -> AxisBand:
    """First and last key of every query of an axis, on the whole grid: class coordinates become tokens again."""
    step, queries = mask.order[axis], torch.arange(mask.query[axis])
    residue = queries % step
    env = {f"q{axis}": (queries // step).numpy(), f"r{axis}": residue.numpy(), "b": b, "h": h, **(tables or {})}
    low, high = (torch.as_tensor(x).expand(len(queries)) * step + residue for x in evaluate_all(mask.bands[axis], env))
    return AxisBand(mask.key[axis], torch.stack([low, high]), step)


def _labels(mask: BoundMask, operands: Operands) -> list[tuple[Tensor, Tensor]] | None:
    """Labels of queries and keys by batch element, where the residual is their equality and keys come in order.

    Whether they do, the host must read.
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
