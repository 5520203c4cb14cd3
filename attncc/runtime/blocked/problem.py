"""A call as the engine takes it: which blocks are visited, under which mask, and what turns scores into weights."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

from attncc.ir.graph import GraphOp
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import BoundMask, Shape, bind
from attncc.runtime.blocked.attention import Problem
from attncc.runtime.blocked.banded import band_plans
from attncc.runtime.blocked.formulas import pair_factor, pointwise, root, score_map
from attncc.runtime.blocked.listed import routed_plans, tile_plans
from attncc.runtime.blocked.routed import read_rows
from attncc.runtime.blocked.workers import capturing
from attncc.runtime.operands import Operands

_captured: list[Problem] = []


def problem(kernel: KernelPlan, operands: Operands) -> Problem:
    """The problem of a call. One that a CUDA graph captures stays: the graph reads its plans' tensors when it runs again."""
    found = _problem(kernel, operands)
    if capturing(operands.q.device):
        _captured.append(found)
    return found


def _problem(kernel: KernelPlan, operands: Operands) -> Problem:
    """Without queries or without keys it visits nothing."""
    graph, q, k, v = kernel.graph, operands.q, operands.k, operands.v
    heads, scale = (q.shape[1], k.shape[1], v.shape[1]), float(graph.find(GraphOp.SCORES)[0]["scale"])
    formulas = score_map(graph, operands), pointwise(graph, operands)
    nothing = Problem(heads, (), scale, *formulas, root=root(graph, operands), weight_factor=pair_factor(graph, operands))
    if not prod(q.shape[:3]) or not prod(k.shape[:3]):
        return nothing
    mask = _bound(kernel, operands.query, operands.key)
    kept = read_rows(graph, operands)
    bands = band_plans(kernel, mask, operands, kept)
    if bands is not None:
        return replace(nothing, plans=bands, whole=kept is None)
    plans, partial_mask = tile_plans(kernel, mask, operands) if kept is None else routed_plans(kernel, mask, operands, kept)
    return replace(nothing, plans=plans, mask=partial_mask, whole=kept is None)


@lru_cache(maxsize=64)
def _bound(kernel: KernelPlan, query: Shape, key: Shape) -> BoundMask:
    return bind(kernel.graph, query, key)
