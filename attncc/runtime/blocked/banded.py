"""Which calls the strip engine takes, and what it is told: a band for every axis, from the plan's bands and the call's labels."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from attncc.ir.expr import Expr, Op, Table, var
from attncc.ir.graph import GraphOp
from attncc.ir.values import evaluate_all
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import BoundMask, Shape, bind
from attncc.runtime.blocked.attention import Problem
from attncc.runtime.blocked.bands import AxisBand, BandPlan, plan_bands
from attncc.runtime.operands import Operands


def banded(kernel: KernelPlan, operands: Operands) -> Problem | None:
    """The call as a problem of bands; None where it is not one."""
    q, body = operands.q, kernel.graph
    if not prod(q.shape) or not prod(operands.k.shape) or not _plain(kernel):
        return None
    plans = _plans(kernel, operands)
    if plans is None:
        return None
    heads = (q.shape[1], operands.k.shape[1], operands.v.shape[1])
    return Problem(heads, plans, float(body.find(GraphOp.SCORES)[0]["scale"]))


@lru_cache(maxsize=64)
def _plain(kernel: KernelPlan) -> bool:
    """Whether scores go straight to a softmax."""
    body = kernel.graph
    return not body.find(GraphOp.MAP) and bool(body.find(GraphOp.WEIGHTS)[0]["row_class"] == "softmax")


def _plans(kernel: KernelPlan, operands: Operands) -> list[tuple[range, BandPlan]] | None:
    """Plans over the flattened (batch, head) range; one for all where the mask reads no labels."""
    batch, heads = operands.q.shape[:2]
    mask = _bound(kernel, operands.query, operands.key)
    if mask.separable:
        return [(range(batch * heads), _plan(kernel, operands.query, operands.key))]
    labels = _labels(mask, operands)
    if labels is None:
        return None
    band = _axis_band(mask, 0)
    return [
        (range(b * heads, (b + 1) * heads), plan_bands([band & AxisBand.of_segments(ids, key_ids)]))
        for b, (ids, key_ids) in enumerate(labels)
    ]


@lru_cache(maxsize=64)
def _bound(kernel: KernelPlan, query: Shape, key: Shape) -> BoundMask:
    return bind(kernel.graph, query, key)


@lru_cache(maxsize=64)
def _plan(kernel: KernelPlan, query: Shape, key: Shape) -> BandPlan:
    mask = _bound(kernel, query, key)
    return plan_bands([_axis_band(mask, axis) for axis in range(len(query))])


def _axis_band(mask: BoundMask, axis: int) -> AxisBand:
    """First and last key of every query of an axis, on the whole grid: class coordinates become tokens again."""
    step, queries = mask.order[axis], torch.arange(mask.query[axis])
    residue = queries % step
    env = {f"q{axis}": (queries // step).numpy(), f"r{axis}": residue.numpy()}
    low, high = (torch.as_tensor(x).expand(len(queries)) * step + residue for x in evaluate_all(mask.bands[axis], env))
    return AxisBand(mask.key[axis], torch.stack([low, high]), step)


def _labels(mask: BoundMask, operands: Operands) -> list[tuple[Tensor, Tensor]] | None:
    """Labels of queries and keys by batch element, where the residual is their equality and keys come in order."""
    tables = _compared(mask.residual)
    if tables is None or len(mask.query) != 1 or mask.order != (1,):
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
