"""What follows the weighted sum of values, in torch, for engines that do not fuse it: row weights, the gate, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, Op, var, variables
from attncc.ir.graph import Graph, GraphOp, Node, logit_share
from attncc.ir.values import evaluate, evaluate_all
from attncc.runtime.blocked.formulas import Env, reads, scatter
from attncc.runtime.blocked.routed import row_env
from attncc.runtime.operands import Operands

Logits = Mapping[str, Tensor]
_O, _G = var("o", Kind.FLOAT), var("g", Kind.FLOAT)


@dataclass(frozen=True)
class Epilogue:
    """The steps of one kernel from the output row `o` on, in order: weights of routed heads, what is added, the gate in its logit `g`."""

    steps: tuple[Node, ...]

    @staticmethod
    def of(graph: Graph) -> Epilogue:
        """The epilogue of a kernel's body."""
        return Epilogue(tuple(n for n in graph.nodes() if n.op in (GraphOp.WEIGH, GraphOp.GATE)))

    def __bool__(self) -> bool:
        return bool(self.steps)

    def apply(self, rows: Tensor, logits: Logits, graph: Graph, operands: Operands, overwrite: bool = False) -> Tensor:
        """The output, in the type of `rows` `[B, H, N, Dv]`, perhaps in their place; `logits` are those of the gates, by name."""
        *_, last = self._chain(rows, logits, row_env(graph, operands), operands.compute, overwrite)
        return last.to(rows.dtype)

    def _chain(self, rows: Tensor, logits: Logits, env: Env, dtype: torch.dtype, overwrite: bool = False) -> Iterator[Tensor]:
        """The rows, and what each step makes of them; those before it may be gone where it is free to `overwrite` them."""
        o = rows.to(dtype)
        yield o
        for step in self.steps:
            given, factor = {**env, **_read(step, logits, o)}, _factor(step["value"]) if overwrite else None
            if factor is not None:
                o = o.mul_(evaluate(factor, given, torch_arrays(dtype)))  # new memory would take longer than the product
            else:
                o = evaluate(step["value"], {**given, "o": o}, torch_arrays(dtype))
            yield o

    def gradients(self, rows: Tensor, logits: Logits, graph: Graph, operands: Operands, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the rows and, by name, of the gates' logits and of trained tables, from that of the output."""
        dtype, env = operands.compute, row_env(graph, operands)
        arrays, found = torch_arrays(dtype), dict[str, Tensor]()
        chain, grad = list(self._chain(rows, logits, env, dtype)), grad.to(dtype)
        for step, o in zip(reversed(self.steps), reversed(chain[:-1])):
            value, given = step["value"], _read(step, logits, o)
            leaves = reads(value, operands.trained)
            slopes = [derivative(value, x) for x in (_O, _G, *leaves)]
            by_row, by_logit, *by_table = evaluate_all(slopes, {**env, **given, "o": o}, arrays)
            if step.op is GraphOp.GATE:
                name = step.inputs[1]["name"]
                by_head = (grad * by_logit).sum_to_size(given["g"].shape)
                found[name] = _gathered(step, by_head, logits[name]).to(logits[name].dtype)
            for leaf, slope in zip(leaves, by_table):
                name = leaf.value.name
                total = found.setdefault(name, torch.zeros(operands.tables[name].shape, dtype=dtype, device=rows.device))
                scatter(total, evaluate_all(leaf.args, env, arrays), grad * slope)
            grad = grad * by_row
        return grad.to(rows.dtype), {name: x if name in logits else x.to(operands.tables[name].dtype) for name, x in found.items()}


def _factor(value: Expr) -> Expr | None:
    """What a formula multiplies the row by; None where it does something else."""
    if value.op is not Op.MUL or _O not in value.args:
        return None
    (factor,) = (x for i, x in enumerate(value.args) if i != value.args.index(_O))
    return None if "o" in variables(factor) else factor


def _read(step: Node, logits: Logits, rows: Tensor) -> dict[str, Tensor]:
    """The logit of a step that reads one, `[B, H, N, Dv or 1]`; one head for all stays one."""
    if step.op is not GraphOp.GATE:
        return {}
    given = logits[step.inputs[1]["name"]].to(rows.dtype)
    share, _ = logit_share(step, rows.shape[1])
    if step.get("packed"):
        batch, heads, tokens, columns = given.shape
        return {"g": given.reshape(batch, heads, tokens, share, columns // share).transpose(2, 3).flatten(1, 2)}
    return {"g": given if given.shape[1] == 1 else given.repeat_interleave(share, 1)}


def _gathered(step: Node, by_head: Tensor, logits: Tensor) -> Tensor:
    """The inverse of `_read` for gradients: query heads that share a logit add up."""
    if by_head.shape == logits.shape:
        return by_head
    batch, heads, tokens, width = by_head.shape
    groups = by_head.reshape(batch, logits.shape[1], heads // logits.shape[1], tokens, width)
    return groups.transpose(2, 3).flatten(3) if step.get("packed") else groups.sum(2)
