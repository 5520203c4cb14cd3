"""What is done to rows of q and k before their product, in torch: norms and rotations of whole tensors, and their adjoints.

For engines that take rows as they are. Generated kernels do the same to each tile they load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.expr import Expr
from attncc.ir.graph import Graph, GraphOp, Node, loads_of
from attncc.ir.values import evaluate
from attncc.passes.tiles import Shape
from attncc.runtime.operands import Operands

Gradients = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
Columns = tuple[slice, slice]


def prepared(graph: Graph, operands: Operands) -> Operands:
    """The operands with their loads done: q and k as their product takes them, in their own type; v times its factors."""
    sides = {side: _Side(loads_of(graph, side), side, operands) for side in "qk"}
    if any(s.ops for s in sides.values()):
        operands = replace(operands, q=sides["q"].forward(operands.q), k=sides["k"].forward(operands.k))
    factor = _value_factor(graph, operands)
    return operands if factor is None else replace(operands, v=operands.v.to(operands.compute) * factor)


def adjoint(graph: Graph, operands: Operands, grads: tuple[Tensor, Tensor, Tensor]) -> Gradients:
    """Gradients of q, k and v as given, and of the tables of norms and of value scales, from those of the prepared ones."""
    found: dict[str, Tensor] = {}
    dq, dk, dv = grads
    given = {"q": (operands.q, dq), "k": (operands.k, dk)}
    results = [_Side(loads_of(graph, side), side, operands).backward(x, grad, found) for side, (x, grad) in given.items()]
    factor = _value_factor(graph, operands)
    if factor is not None:
        found["v_scale"] = (dv * operands.v).sum(-1).to(operands.tables["v_scale"].dtype)
        dv = (dv * factor).to(operands.v.dtype)
    return results[0], results[1], dv, found


def _value_factor(graph: Graph, operands: Operands) -> Tensor | None:
    """What rows of v are multiplied by, `[B, Hv, M, 1]`."""
    if all(n.get("value_scale") is None for n in graph.find(GraphOp.COMBINE)):
        return None
    return operands.tables["v_scale"].to(operands.compute)[..., None]


@dataclass(frozen=True)
class _Side:
    """The loads of q or of k in one call."""

    ops: tuple[Node, ...]
    side: str
    operands: Operands

    def forward(self, x: Tensor) -> Tensor:
        return self._steps(x)[-1].to(x.dtype) if self.ops else x

    def _steps(self, x: Tensor) -> list[Tensor]:
        """The rows before each op, and at last after all."""
        steps = [x.to(self.operands.compute)]
        for n in self.ops:
            steps.append(self._rotated(n, steps[-1], 1.0) if n.op is GraphOp.ROTATE else self._normed(n, steps[-1]))
        return steps

    def backward(self, x: Tensor, grad: Tensor, found: dict[str, Tensor]) -> Tensor:
        """The gradient of x; those of tables are added to `found`."""
        if not self.ops:
            return grad
        grad = grad.to(self.operands.compute)
        for n, before in reversed(list(zip(self.ops, self._steps(x)))):
            grad = self._rotated(n, grad, -1.0) if n.op is GraphOp.ROTATE else self._unnormed(n, before, grad, found)
        return grad.to(x.dtype)

    # ---- norms -----------------------------------------------------------------------------------------------------------------

    def _normed(self, n: Node, x: Tensor) -> Tensor:
        weight = self._weight(n)
        normed = x * _inverse_norm(n, x)
        return normed if weight is None else normed * weight

    def _unnormed(self, n: Node, x: Tensor, grad: Tensor, found: dict[str, Tensor]) -> Tensor:
        """With r = 1 / norm: d(x r w) = r w grad - x r^3 sum(x w grad), the sum over columns being a mean for `rms`."""
        inverse, weight = _inverse_norm(n, x), self._weight(n)
        if weight is not None:
            found[n.inputs[1]["name"]] = (grad * x * inverse).sum((0, 1, 2)).to(self.operands.tables[n.inputs[1]["name"]].dtype)
            grad = grad * weight
        along = (grad * x).sum(-1, keepdim=True)
        if n["norm"] == "rms":
            return inverse * grad - x * inverse**3 * along / x.shape[-1]
        small = torch.linalg.vector_norm(x, dim=-1, keepdim=True) <= n["eps"]  # there the divisor is a constant
        return inverse * grad - torch.where(small, 0.0, x * inverse**3 * along)

    def _weight(self, n: Node) -> Tensor | None:
        return self.operands.tables[n.inputs[1]["name"]].to(self.operands.compute) if len(n.inputs) > 1 else None

    # ---- rotations -------------------------------------------------------------------------------------------------------------

    def _rotated(self, n: Node, x: Tensor, sign: float) -> Tensor:
        """Rows turned by their positions, or back: a rotation's adjoint is its inverse."""
        out = x.clone()
        for axis, position in enumerate(n["positions"]):
            angle = self._angles(n, position)
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype) * sign
            first, second = _columns(n, axis)
            a, b = x[..., first], x[..., second]
            out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
        return out

    def _angles(self, n: Node, position: Expr) -> Tensor:
        """Angles `[B or 1, 1, N, pairs]` in float64: float32 has no fraction left of a large position times a turn."""
        lengths, device = self.operands.query if self.side == "q" else self.operands.key, self.operands.q.device
        env = {"b": torch.arange(len(self.operands.q), device=device)[:, None], **self.operands.lengths, **self.operands.tables}
        env |= _coordinates(self.side, lengths, device)
        at: Tensor = torch.as_tensor(evaluate(position, env, torch_arrays(torch.float64)), device=device)
        turns: Tensor = torch.tensor(n["turns"], dtype=torch.float64, device=device)
        return at.expand(*at.shape[:-1], prod(lengths)).reshape(-1, 1, prod(lengths), 1).double() * turns


def _inverse_norm(n: Node, x: Tensor) -> Tensor:
    eps = float(n["eps"])
    if n["norm"] == "rms":
        return (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.clamp_min(eps).reciprocal()


def _columns(n: Node, axis: int) -> Columns:
    """Columns of an axis's pairs: their first, their second."""
    pairs = len(n["turns"])
    start, stop = 2 * pairs * axis, 2 * pairs * (axis + 1)
    if n["pairs"] == "half":
        return slice(start, start + pairs), slice(start + pairs, stop)
    return slice(start, stop, 2), slice(start + 1, stop, 2)


def _coordinates(side: str, lengths: Shape, device: torch.device) -> dict[str, Tensor]:
    index, found = torch.arange(prod(lengths), device=device), {}
    for a in reversed(range(len(lengths))):
        found[f"{side}{a}"] = index % lengths[a]
        index = index // lengths[a]
    return found
