"""What follows the weighted sum of values, in torch, for engines that do not fuse it: row weights, the gate, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, var
from attncc.ir.graph import Graph, GraphOp
from attncc.ir.values import evaluate, evaluate_all
from attncc.runtime.blocked.formulas import Env, reads, scatter
from attncc.runtime.blocked.routed import row_env
from attncc.runtime.operands import Operands

_O, _G = var("o", Kind.FLOAT), var("g", Kind.FLOAT)


@dataclass(frozen=True)
class Epilogue:
    """The formulas of one kernel in the output row `o`, in order: the weights of routed heads, then the gate in its logit `g`."""

    weigh: Expr | None
    gate: Expr | None

    @staticmethod
    def of(graph: Graph) -> Epilogue:
        """The epilogue of a kernel's body."""
        weigh, gate = (graph.find(op) for op in (GraphOp.WEIGH, GraphOp.GATE))
        return Epilogue(weigh[0]["value"] if weigh else None, gate[0]["value"] if gate else None)

    def __bool__(self) -> bool:
        return self.weigh is not None or self.gate is not None

    @cached_property
    def steps(self) -> tuple[Expr, ...]:
        """The formulas there are."""
        return tuple(value for value in (self.weigh, self.gate) if value is not None)

    def apply(self, rows: Tensor, logits: Tensor | None, graph: Graph, operands: Operands) -> Tensor:
        """The output, in the type of `rows` `[B, H, N, Dv]`; `logits` of the gate broadcast to them."""
        *_, last = self._chain(rows, _env(graph, operands, logits), operands.compute)
        return last.to(rows.dtype)

    def _chain(self, rows: Tensor, env: Env, dtype: torch.dtype) -> Iterator[Tensor]:
        """The rows, and what each step makes of them."""
        o = rows.to(dtype)
        yield o
        for value in self.steps:
            o = evaluate(value, {**env, "o": o}, torch_arrays(dtype))
            yield o

    def gradients(
        self, rows: Tensor, logits: Tensor | None, graph: Graph, operands: Operands, grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the rows and, by name, of the gate's logits and of trained tables, from that of the output."""
        dtype, env = operands.compute, _env(graph, operands, logits)
        arrays, found = torch_arrays(dtype), dict[str, Tensor]()
        chain, grad = list(self._chain(rows, env, dtype)), grad.to(dtype)
        for value, o in zip(reversed(self.steps), reversed(chain[:-1])):
            leaves = reads(value, operands.trained)
            by_row, by_logit, *by_table = evaluate_all([derivative(value, x) for x in (_O, _G, *leaves)], {**env, "o": o}, arrays)
            if value is self.gate and logits is not None:
                found["gate"] = (grad * by_logit).sum_to_size(logits.shape).to(logits.dtype)
            for leaf, slope in zip(leaves, by_table):
                name = leaf.value.name
                total = found.setdefault(name, torch.zeros(operands.tables[name].shape, dtype=dtype, device=rows.device))
                scatter(total, evaluate_all(leaf.args, env, arrays), grad * slope)
            grad = grad * by_row
        return grad.to(rows.dtype), {name: x if name == "gate" else x.to(operands.tables[name].dtype) for name, x in found.items()}


def _env(graph: Graph, operands: Operands, logits: Tensor | None) -> Env:
    env = row_env(graph, operands)
    return env if logits is None else {**env, "g": logits.to(operands.compute)}
