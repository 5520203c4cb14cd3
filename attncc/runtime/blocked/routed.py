"""Head routing: which rows of a call are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.graph import Graph, GraphOp
from attncc.ir.values import evaluate
from attncc.runtime.blocked.formulas import Env, Places
from attncc.runtime.blocked.rules import Where
from attncc.runtime.operands import Operands


def row_env(graph: Graph, operands: Operands) -> Env:
    """What expressions of output rows see: positions that broadcast to `[B, H, N, 1]`, lengths and tables."""
    q = operands.q
    b, h, n = (torch.arange(size, device=q.device).view(-1, *[1] * after) for size, after in zip(q.shape[:3], (3, 2, 1)))
    return Places.of(graph, operands).env(Where(b, h, n, n))  # no such expression reads a key


def kept_rows(graph: Graph, operands: Operands) -> Tensor | None:
    """Which rows are routed, bool `[B, H, N]`; None where all are."""
    route = graph.find(GraphOp.ROUTE)
    if not route:
        return None
    kept: Tensor = evaluate(route[0]["rows"], row_env(graph, operands), torch_arrays(operands.compute))
    return kept.expand(*operands.q.shape[:3], 1)[..., 0]
