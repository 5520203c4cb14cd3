"""Block-sparse attention in torch: forward and recomputing backward over the visited blocks only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attncc.runtime.blocked.bands import BandPlan
from attncc.runtime.blocked.block import attend, attend_backward
from attncc.runtime.blocked.roots import solve, solve_backward
from attncc.runtime.blocked.rules import SAFE_SCORE, Factor, Pointwise, Root, Rules, ScoreMap, TableSums, TileMask, trained_tables
from attncc.runtime.blocked.strips import HeadTensors, Strip, plan_strips
from attncc.runtime.blocked.tiles import Slots, TilePlan, TileRun
from attncc.runtime.blocked.workers import Turn, host_reads, run_tasks, worker_count

Task = Strip | TileRun


@dataclass(frozen=True)
class Problem:
    """One attention.

    `heads` (Hq, Hk, Hv); `plans` covers the flattened (batch, query head) range, each part with the blocks it visits (no plans: nothing
    to visit); `mask` is that of the tile plans' partial tiles; `whole` says that plans hold every row.
    """

    heads: tuple[int, int, int]
    plans: Sequence[tuple[range, BandPlan | TilePlan]]
    scale: float
    scores: ScoreMap | None = None
    pointwise: Pointwise | None = None
    mask: TileMask | None = None
    whole: bool = True
    root: Root | None = None
    weight_factor: Factor | None = None

    @property
    def slots(self) -> Slots | None:
        """The order that tile plans want keys in."""
        return next((plan.keys for _, plan in self.plans if isinstance(plan, TilePlan)), None)

    def tasks(self, workers: int) -> list[Task]:
        """What can be computed independently (up to the key-side sums), the most first: none of it is left to one worker in the end."""
        tasks: list[Task] = []
        for heads, plan in self.plans:
            if isinstance(plan, BandPlan):
                tasks += plan_strips(plan, heads, self.heads, workers)
            else:
                tasks += plan.runs(heads, self.heads, workers)
        return sorted(tasks, key=lambda task: -task.pairs)


@torch.no_grad()
def forward(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attend: q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hv, Nk, Dv] to out [B, Hq, Nq, Dv] and lse [B, Hq, Nq].

    `out` has q's dtype; `lse`, the natural log of what rows divide by, is float32, float64 for float64 inputs, None for pointwise weights.
    A row without a key gives 0 and -inf. Of a kernel that finds a root, values have no columns and `lse` is the root, 0 without a key.
    """
    slots = problem.slots
    k, v = (k, v) if slots is None else (slots.arrange(k), slots.arrange(v))
    rules = _rules(problem, q, k)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:3], 1), dtype=rules.dtype, device=q.device)
    if not problem.plans or not problem.whole:
        out.zero_()
        lse.fill_(rules.nothing)
    results = {"out": _flat(out)} | ({"lse": _flat(lse)} if rules.totals else {})
    operands = HeadTensors(problem.heads, {"q": _flat(q)}, results, _keys(rules, k, v), {})
    workers = worker_count(q.device)
    run_tasks([partial(_forward_task, rules, task, operands) for task in problem.tasks(workers)], workers)
    return out, lse.squeeze(-1) if rules.totals else None


@torch.no_grad()
def _forward_task(rules: Rules, task: Task, operands: HeadTensors) -> None:
    loaded = task.load(rules, operands)
    for block in loaded.blocks():
        (attend if rules.root is None else solve)(rules, block)
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
    """Gradients of q, k, v and of the score map's inputs, from what `forward` took and gave.

    `grad_lse` [B, Hq, Nq] is the gradient of lse, if it was used.
    """
    rows = {"q": q, "out": out, "grad_out": grad_out}
    if lse is not None:
        # exp(s - inf) = 0: rows without a key get zero gradients.
        rows["lse"] = lse.masked_fill(lse == -math.inf, math.inf)[..., None]
    if grad_lse is not None:
        rows["grad_lse"] = grad_lse[..., None]
    slots = problem.slots
    keys = (k, v) if slots is None else (slots.arrange(k), slots.arrange(v))
    rules = _rules(problem, q, k)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not problem.plans or not problem.whole:
        dq.zero_()
    dk, dv = (torch.zeros(x.shape, dtype=rules.dtype, device=x.device) for x in keys)
    operands = HeadTensors(
        problem.heads,
        {name: _flat(x) for name, x in rows.items()},
        {"dq": _flat(dq)},
        _keys(rules, *keys),
        {"dk": _flat(dk), "dv": _flat(dv)},
    )
    tables = _backward_tasks(problem, rules, operands)
    if slots is not None:
        dk, dv = slots.restore(dk), slots.restore(dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype), tables


def _backward_tasks(problem: Problem, rules: Rules, operands: HeadTensors) -> dict[str, Tensor]:
    """Run the backward tasks; returns the gradients of the trained tables."""
    workers = worker_count(rules.like.device)
    tasks = problem.tasks(workers)
    tables = TableSums(problem.scores, problem.weight_factor, rules.dtype).tables
    turns = _turns(problem, tasks, bool(tables))
    run_tasks([partial(_backward_task, rules, operands, tables, *task) for task in zip(tasks, turns, strict=True)], workers)
    trained = trained_tables(problem.scores, problem.weight_factor)
    return {name: total.to(trained[name].dtype) for name, total in tables.items()}


def _turns(problem: Problem, tasks: Sequence[Task], one_by_one: bool) -> list[Turn]:
    """A turn a task; tasks of query heads that share key or value heads, or all of them, follow each other."""
    group = math.lcm(*(problem.heads[0] // n for n in problem.heads[1:]))
    last: dict[int, Turn] = {}
    turns = []
    for task in tasks:
        shared = 0 if one_by_one else task.heads.start // group
        turns.append(Turn(last.get(shared)))
        last[shared] = turns[-1]
    return turns


@torch.no_grad()
def _backward_task(rules: Rules, operands: HeadTensors, tables: dict[str, Tensor], task: Task, turn: Turn) -> None:
    try:
        sums = TableSums(rules.scores, rules.weight_factor, rules.dtype)
        loaded = task.load(rules, operands)
        for block in loaded.blocks():
            (attend_backward if rules.root is None else solve_backward)(rules, block, sums)
        loaded.store()
        own = sums.finish()
        turn.wait()
        loaded.add_sums()
        for name, found in own.items():
            tables[name].add_(found)
    finally:
        turn.done()


def _rules(problem: Problem, q: Tensor, k: Tensor) -> Rules:
    """How scores are treated: a CPU looks at the norms of q and k first; elsewhere the host would have to wait for them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bound, finite = math.inf, False
    if host_reads(q.device) and problem.plans:
        bound = abs(problem.scale) * float(_longest(q, dtype) * _longest(k, dtype))
        finite = math.isfinite(bound)
    if problem.scores is not None:
        bound = problem.scores.bound
        finite = finite and problem.scores.finite and all(math.isfinite(float(table.sum())) for table in problem.scores.tables)
    like = torch.empty(0, dtype=dtype, device=q.device)
    given = (problem.mask, problem.root, problem.weight_factor)
    return Rules(problem.scale, problem.scores, problem.pointwise, bound <= SAFE_SCORE, finite, like, *given)


def _longest(x: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norms.amax()


def _keys(rules: Rules, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {"k": _flat(k).to(rules.dtype), "v": _flat(v).to(rules.dtype)}


def _flat(x: Tensor) -> Tensor:
    """[B, H, N, width] -> [B * H, N, width]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
