"""Sinks and divisors: what joins a row when its keys are done, and its gradients.

A sink is a state like that of any range of keys, so it merges with theirs once, at the end. Backward needs nothing else: with outputs
and log-sum-exp that hold the sink, the gradients of the keys are those of a plain softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr
from attncc.ir.graph import Graph, GraphOp, reduction, sink_names
from attncc.ir.rows import BIAS_SCORE
from attncc.ir.values import evaluate
from attncc.runtime.blocked.formulas import Env, Places, table_gradients
from attncc.runtime.blocked.routed import row_env
from attncc.runtime.operands import Operands


@dataclass(frozen=True)
class Sink:
    """The sink of a call: its logits `value`, what they are computed from, key and value `[H, 1, width]` and their names where it has them.

    Whatever belongs to rows is [B, H, Nq, 1] here, or broadcasts to it.
    """

    operands: Operands
    logit: Expr
    value: Tensor
    env: Env
    scale: float = 1.0
    names: tuple[str, str] = ("", "")
    key: Tensor | None = None
    v: Tensor | None = None

    @staticmethod
    def of(graph: Graph, operands: Operands) -> Sink | None:
        """The sink of a kernel's graph, if it has one."""
        weights = reduction(graph)
        if weights.get("sink") is None:
            return None
        logit: Expr = weights["sink"]
        env, names = row_env(graph, operands), sink_names(graph)
        if names is None:
            return Sink(operands, logit, _evaluated(graph, operands, logit, env), env)
        key, v = (_spread(operands.tables[name].to(operands.compute), operands.q.shape[1]) for name in names)
        scale = float(graph.find(GraphOp.DOT)[0]["scale"])
        env["z"] = (operands.q.to(operands.compute) * key).sum(-1, keepdim=True) * scale
        return Sink(operands, logit, _evaluated(graph, operands, logit, env), env, scale, names, key, v)

    def join(self, rows: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and log-sum-exp `[B, H, Nq]` of the keys, joined by the sink."""
        joined = torch.logaddexp(lse[..., None], self.value)
        result = rows * _share(lse[..., None], joined)
        if self.v is not None:
            result = result + _share(self.value, joined) * self.v
        return result.to(rows.dtype), joined[..., 0]

    def gradients(self, rows: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the sink adds to the gradient of q, and the gradients of its trained inputs, from joined rows and log-sum-exp."""
        share, grad = _share(self.value, lse[..., None]), grad.to(self.operands.compute)
        by_logit = -(grad * rows).sum(-1, keepdim=True)
        if grad_lse is not None:
            by_logit = by_logit + grad_lse[..., None]
        if self.v is not None:
            by_logit = by_logit + (grad * self.v).sum(-1, keepdim=True)
        by_logit = by_logit * share
        found = table_gradients(self.logit, by_logit, self.env, self.operands)
        if self.key is None:
            return None, found
        by_logit = by_logit * evaluate(derivative(self.logit, BIAS_SCORE), self.env, torch_arrays(self.operands.compute)) * self.scale
        q = self.operands.q.to(self.operands.compute)
        both = dict(zip(self.names, (torch.einsum("bhnx,bhnd->hd", by_logit, q), torch.einsum("bhnx,bhnd->hd", share, grad))))
        return by_logit * self.key, found | {name: _gathered(both[name], self.operands.tables[name]) for name in both}


def divided(graph: Graph, operands: Operands, rows: Tensor) -> Tensor:
    """Rows over the divisor of their normalizer; themselves where there is none. So are their gradients divided."""
    divisor = reduction(graph).get("divisor")
    if divisor is None:
        return rows
    return (rows / _evaluated(graph, operands, divisor, row_env(graph, operands))).to(rows.dtype)


def _evaluated(graph: Graph, operands: Operands, value: Expr, env: Env) -> Tensor:
    found = evaluate(value, env, Places.of(graph, operands).arrays)
    shape = (*operands.q.shape[:3], 1)
    return found.to(operands.compute) if isinstance(found, Tensor) else operands.q.new_full(shape, found, dtype=operands.compute)


def _share(log: Tensor, total: Tensor) -> Tensor:
    """exp(log - total), 0 where the total is that of nothing."""
    return (log - total).exp().masked_fill(total == -math.inf, 0.0)


def _spread(x: Tensor, heads: int) -> Tensor:
    """[key or value heads, width] to [H, 1, width]."""
    return x.repeat_interleave(heads // x.shape[0], 0)[:, None]


def _gathered(by_head: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_spread` for gradients [H, width]: heads that share add up."""
    return by_head.view(like.shape[0], -1, like.shape[1]).sum(1).to(like.dtype)
