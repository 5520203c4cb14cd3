"""Block-sparse attention in torch: forward and recomputing backward over the visited blocks only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attncc.runtime.blocked.bands import BandPlan
from attncc.runtime.blocked.block import SAFE_SCORE, Pointwise, Rules, ScoreMap, attend, attend_backward
from attncc.runtime.blocked.strips import Operands, Strip, plan_strips
from attncc.runtime.blocked.tiles import TileOrder, TilePlan, TileRun
from attncc.runtime.blocked.workers import Turn, run_tasks, worker_count


@dataclass(frozen=True)
class Problem:
    """One attention.

    ``heads`` (Hq, Hk, Hv); ``plans`` covers the flattened (batch, query head) range, each part with the blocks it
    visits; ``order`` is needed by tile plans whose tokens are not in tile order already.
    """

    heads: tuple[int, int, int]
    plans: Sequence[tuple[range, BandPlan | TilePlan]]
    scale: float
    scores: ScoreMap | None = None
    pointwise: Pointwise | None = None
    order: TileOrder | None = None

    def tasks(self, workers: int) -> list[Strip | TileRun]:
        """What can be computed independently (up to the key-side sums)."""
        tasks: list[Strip | TileRun] = []
        for heads, plan in self.plans:
            if isinstance(plan, BandPlan):
                tasks += plan_strips(plan, heads, self.heads, workers)
            else:
                tasks += plan.runs(heads, self.heads, workers)
        return tasks


@torch.no_grad()
def forward(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attend: q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hv, Nk, Dv] to out [B, Hq, Nq, Dv] and lse [B, Hq, Nq].

    ``out`` has q's dtype; ``lse`` (natural log) is float32, float64 for float64 inputs, None for pointwise weights.
    A row without a key gives 0 and -inf.
    """
    tokens = q.shape[2]
    if problem.order is not None:
        q, k, v = _arranged(problem.order, q, k, v)
    rules = _rules(problem, q, k)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:3], 1), dtype=rules.dtype, device=q.device)
    results = {"out": _flat(out)} | ({} if problem.pointwise is not None else {"lse": _flat(lse)})
    operands = Operands(problem.heads, {"q": _flat(q)}, results, _keys(rules, k, v), {})
    workers = worker_count(q.device)
    run_tasks([partial(_forward_task, rules, task, operands) for task in problem.tasks(workers)], workers)
    if problem.order is not None:
        out, lse = (TileOrder.restore(x, problem.order.queries, tokens) for x in (out, lse))
    return out, None if problem.pointwise is not None else lse.squeeze(-1)


@torch.no_grad()
def _forward_task(rules: Rules, task: Strip | TileRun, operands: Operands) -> None:
    loaded = task.load(rules, operands)
    for block in loaded.blocks():
        attend(rules, block)
    loaded.store()


@torch.no_grad()
def backward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Gradients of q, k, v and of the score map's inputs, from what ``forward`` took and gave.

    ``grad_lse`` [B, Hq, Nq] is the gradient of lse, if it was used.
    """
    shapes = q.shape, k.shape
    rows = {"q": q, "out": out, "grad_out": grad_out}
    if lse is not None:
        # exp(s - inf) = 0: rows without a key get zero gradients.
        rows["lse"] = lse.masked_fill(lse == -math.inf, math.inf)[..., None]
    if grad_lse is not None:
        rows["grad_lse"] = grad_lse[..., None]
    if problem.order is not None:
        rows = {name: TileOrder.arrange(x, problem.order.queries) for name, x in rows.items()}
        k, v = (TileOrder.arrange(x, problem.order.keys) for x in (k, v))
    rules = _rules(problem, rows["q"], k)
    dq = torch.empty(rows["q"].shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=rules.dtype, device=x.device) for x in (k, v))
    operands = Operands(
        problem.heads,
        {name: _flat(x) for name, x in rows.items()},
        {"dq": _flat(dq)},
        _keys(rules, k, v),
        {"dk": _flat(dk), "dv": _flat(dv)},
    )
    inputs = _backward_tasks(problem, rules, operands)
    if problem.order is not None:
        dq = TileOrder.restore(dq, problem.order.queries, shapes[0][2])
        dk, dv = (TileOrder.restore(x, problem.order.keys, shapes[1][2]) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), inputs


def _backward_tasks(problem: Problem, rules: Rules, operands: Operands) -> dict[str, Tensor]:
    """Run the backward tasks; returns the gradients of the score map's inputs."""
    workers = worker_count(rules.like.device)
    tasks = problem.tasks(workers)
    wanted = problem.scores.inputs if problem.scores is not None else {}
    inputs = {name: torch.zeros_like(x, dtype=rules.dtype) for name, x in wanted.items()}
    turns = _turns(problem, tasks)
    run_tasks([partial(_backward_task, rules, operands, inputs, *task) for task in zip(tasks, turns, strict=True)], workers)
    return inputs


def _turns(problem: Problem, tasks: Sequence[Strip | TileRun]) -> list[Turn]:
    """A turn a task; tasks of query heads that share key or value heads follow each other."""
    group = problem.heads[0] // min(problem.heads[1:])
    last: dict[int, Turn] = {}
    turns = []
    for task in tasks:
        turns.append(Turn(last.get(task.heads.start // group)))
        last[task.heads.start // group] = turns[-1]
    return turns


@torch.no_grad()
def _backward_task(rules: Rules, operands: Operands, inputs: dict[str, Tensor], task: Strip | TileRun, turn: Turn) -> None:
    try:
        loaded = task.load(rules, operands)
        for block in loaded.blocks():
            attend_backward(rules, block, inputs)
        loaded.store()
        turn.wait()
        loaded.add_sums()
    finally:
        turn.done()


def _rules(problem: Problem, q: Tensor, k: Tensor) -> Rules:
    dtype = torch.promote_types(q.dtype, torch.float32)
    bound = abs(problem.scale) * float(_longest(q, dtype) * _longest(k, dtype))
    if problem.scores is not None:
        bound = problem.scores.bound(bound)
    like = torch.empty(0, dtype=dtype, device=q.device)
    return Rules(problem.scale, problem.scores, problem.pointwise, bound <= SAFE_SCORE, like)


def _longest(x: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norms.amax()


def _arranged(order: TileOrder, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return TileOrder.arrange(q, order.queries), TileOrder.arrange(k, order.keys), TileOrder.arrange(v, order.keys)


def _keys(rules: Rules, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {"k": _flat(k).to(rules.dtype), "v": _flat(v).to(rules.dtype)}


def _flat(x: Tensor) -> Tensor:
    """[B, H, N, width] -> [B * H, N, width]."""
    return x.reshape(-1, *x.shape[2:])
