"""The dense reference: what a spec means, one graph op after the other, on whole `[B, H, Nq, Nk]` arrays.

Written for reading and for checking engines against: it uses the graph as the spec was lowered, before any pass, evaluates its
expressions as values, and leaves gradients to autograd. It needs memory for every pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attncc.ir.arrays import torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr
from attncc.ir.graph import Graph, GraphOp, Node
from attncc.ir.rows import SCORE
from attncc.ir.values import evaluate
from attncc.passes.tiles import Shape


def reference(
    graph: Graph, tensors: Mapping[str, Tensor], query: Shape, key: Shape, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Results of a lowered graph by name, differentiable in every floating-point tensor.

    Args:
        graph: of `attncc.spec.lower.lower`.
        tensors: q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, v `[B, Hv, Nk, Dv]`, gate and tables, by name.
        query: tokens of each axis of the query's grid.
        key: the same of the key's grid.
        dtype: the type everything is computed in.
    """
    place = _Place(tensors, query, key, dtype)
    values: dict[Node, Any] = {}
    for n in graph.nodes():
        values[n] = _MEANING[n.op](n, [values[i] for i in n.inputs], place)
    return {name: values[n] for name, n in graph.outputs}


class _Place:
    """What expressions see: positions that broadcast to [B, H, Nq, Nk], lengths and tables."""

    def __init__(self, tensors: Mapping[str, Tensor], query: Shape, key: Shape, dtype: torch.dtype) -> None:
        self.tensors, self.dtype, q = tensors, dtype, tensors["q"]
        self.device, self.heads = q.device, q.shape[1]
        self.env: dict[str, Any] = {"b": self._positions(len(q), 3), "h": self._positions(self.heads, 2)}
        for side, lengths, after in (("q", query, 1), ("k", key, 0)):
            index = self._positions(math.prod(lengths), after)
            for a in reversed(range(len(lengths))):
                self.env |= {f"{side}{a}": index % lengths[a], f"n{side}{a}": lengths[a]}
                index = index // lengths[a]

    def _positions(self, n: int, after: int) -> Tensor:
        return torch.arange(n, device=self.device).reshape(-1, *[1] * after)

    def evaluate(self, expression: Expr, **more: Tensor) -> Tensor:
        """Value of an expression here."""
        value = evaluate(expression, {**self.env, **more}, torch_arrays(self.dtype))
        return torch.as_tensor(value, device=self.device)

    def per_query_head(self, x: Tensor) -> Tensor:
        """Heads of keys or values repeated so that each query head has its own."""
        return x.repeat_interleave(self.heads // x.shape[1], dim=1)


def _input(n: Node, _: list[Any], place: _Place) -> Tensor:
    if n.get("values") is not None:
        x = torch.tensor(n["values"], dtype=place.dtype, device=place.device).reshape(n["shape"])
    else:
        x = place.tensors[n["name"]]
    x = x.to(place.dtype) if x.is_floating_point() else x
    place.env[n["name"]] = x
    return x


def _norm(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    x: Tensor = inputs[0]
    if n["norm"] == "rms":
        x = x / (x.square().mean(-1, keepdim=True) + n["eps"]).sqrt()
    else:
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(n["eps"])
    return x * inputs[1] if len(inputs) > 1 else x


def _rotate(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    """Each axis turns its own columns, pair by pair."""
    x, pairs = inputs[0], len(n["turns"])
    columns = list(x.unbind(-1))
    for axis, position in enumerate(n["positions"]):
        # Positions of keys broadcast to [B, 1, 1, Nk], those of queries to [B, 1, Nq, 1]: as columns they are [B, 1, N].
        at = place.evaluate(position).flatten(2) if place.evaluate(position).dim() == 4 else place.evaluate(position).flatten()
        for i, turn in enumerate(n["turns"]):
            first, second = (i, i + pairs) if n["pairs"] == "half" else (2 * i, 2 * i + 1)
            first, second = first + 2 * pairs * axis, second + 2 * pairs * axis
            a, b, angle = columns[first], columns[second], at.to(place.dtype) * turn
            columns[first], columns[second] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(columns, -1)


def _scores(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    q, k = inputs
    return torch.matmul(q, place.per_query_head(k).mT) * float(n["scale"])


def _map(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    return place.evaluate(n["value"], s=inputs[0])


def _mask(n: Node, inputs: list[Any], place: _Place) -> tuple[Tensor, Tensor]:
    """Scores and the pairs that are kept; scores stay finite, so that gradients do."""
    allowed = place.evaluate(n["predicate"])
    scores, before = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0], None)
    return scores, (allowed if before is None else allowed & before).expand(scores.shape)


def _route(n: Node, inputs: list[Any], place: _Place) -> tuple[Tensor, Tensor]:
    """A row that is not kept sees no key."""
    scores, allowed = inputs[0]
    return scores, allowed & place.evaluate(n["rows"])


class _Weights(NamedTuple):
    """Weights, 0 where not allowed, the log of their denominator where they have one, and the weight of a sink `[B, H, Nq, 1]`."""

    keys: Tensor
    lse: Tensor | None = None
    sink: Tensor | None = None


def _dot(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    q, x = inputs
    return torch.matmul(q, place.per_query_head(x[None])[..., None]) * float(n["scale"])


def _weights(n: Node, inputs: list[Any], place: _Place) -> _Weights:
    scores, allowed = inputs[0]
    if n["row_class"] == "softmax":
        return _softmax(n, inputs, place)
    weights = place.evaluate(n["weight"], s=scores).masked_fill(~allowed, 0.0)
    if n["row_class"] == "pointwise":
        divisor = n.get("divisor")
        return _Weights(weights if divisor is None else weights / place.evaluate(divisor))
    total = (weights if n["row_class"] == "ratio" else allowed.to(weights.dtype)).sum(3, keepdim=True)
    if n.get("sink") is not None:
        total = total + _kept(n, allowed, place) * place.evaluate(n["sink"]).exp()
    return _Weights(weights / total.masked_fill(total == 0.0, 1.0), total.log()[..., 0])


def _softmax(n: Node, inputs: list[Any], place: _Place) -> _Weights:
    """A sink is one more column of scores, always allowed."""
    scores, allowed = inputs[0]
    if n.get("sink") is not None:
        sink = place.evaluate(n["sink"], z=inputs[-1]).to(scores.dtype).expand(*scores.shape[:3], 1)
        scores, allowed = torch.cat([scores, sink], 3), torch.cat([allowed, _kept(n, allowed, place)], 3)
    kept = scores.masked_fill(~allowed, -math.inf)
    # A row without a key has other scores until its weights are erased: the softmax of nothing is NaN, and so are its gradients.
    empty = (kept == -math.inf).all(3, keepdim=True)
    kept = kept.masked_fill(empty, 0.0)
    lse = torch.logsumexp(kept, 3).masked_fill(empty[..., 0], -math.inf)
    weights = torch.softmax(kept, 3).masked_fill(empty, 0.0)
    return _Weights(weights, lse) if n.get("sink") is None else _Weights(weights[..., :-1], lse, weights[..., -1:])


def _kept(n: Node, allowed: Tensor, place: _Place) -> Tensor:
    """Which rows a sink joins: all but those that are not routed, `[B, H, Nq, 1]`."""
    route = n.inputs[0]
    kept = place.evaluate(route["rows"]) if route.op is GraphOp.ROUTE else torch.ones((), dtype=torch.bool, device=allowed.device)
    return kept.expand(*allowed.shape[:3], 1)


def _combine(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    weights, v = inputs[:2]
    assert isinstance(weights, _Weights)
    keys = weights.keys
    for each in (n.get("factor"), n.get("value_scale")):
        keys = keys if each is None else keys * place.evaluate(each)
    rows = torch.matmul(keys, place.per_query_head(v))
    if weights.sink is None or not any(i.op is GraphOp.DOT for i in n.inputs[0].inputs):
        return rows
    value: Tensor = place.per_query_head(inputs[2][None])
    return rows + weights.sink * value[:, :, None]


def _lse(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    lse: Tensor = inputs[0].lse
    return lse


def _root(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    """Found without gradients; one more step, whose slope is taken for a constant, gives the gradients of what it solves."""
    scores, allowed = inputs[0]
    s, alive = scores.detach(), allowed.any(3, keepdim=True)
    peak = s.masked_fill(~allowed, -math.inf).amax(3, keepdim=True) if s.shape[3] else s.new_full((*s.shape[:3], 1), -math.inf)
    t, slope = place.evaluate(n["start"], s=peak.masked_fill(~alive, 0.0)), derivative(n["weight"], SCORE)

    def total(value: Expr, s: Tensor) -> Tensor:
        return place.evaluate(value, s=s, t=t).masked_fill(~allowed, 0.0).sum(3, keepdim=True)

    for _ in range(n["sweeps"]):
        t = place.evaluate(n["update"], t=t, w=total(n["weight"], s), d=total(slope, s))
    t = t + (total(n["weight"], scores) - total(n["weight"], s)) / total(slope, s).masked_fill(~alive, 1.0)
    return t.masked_fill(~alive, 0.0)[..., 0]


def _keep(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    place.env[n["name"]] = inputs[0]
    return cast(Tensor, inputs[0])


def _weigh(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    return place.evaluate(n["value"], o=inputs[0])


def _gate(n: Node, inputs: list[Any], place: _Place) -> Tensor:
    rows, logits = inputs
    if n.get("packed"):
        logits = logits.unflatten(3, (place.heads // logits.shape[1], -1)).transpose(2, 3).flatten(1, 2)
    return place.evaluate(n["value"], o=rows, g=place.per_query_head(logits))


_MEANING = {
    GraphOp.INPUT: _input,
    GraphOp.NORM: _norm,
    GraphOp.ROTATE: _rotate,
    GraphOp.SCORES: _scores,
    GraphOp.DOT: _dot,
    GraphOp.MAP: _map,
    GraphOp.MASK: _mask,
    GraphOp.ROUTE: _route,
    GraphOp.WEIGHTS: _weights,
    GraphOp.COMBINE: _combine,
    GraphOp.WEIGH: _weigh,
    GraphOp.LSE: _lse,
    GraphOp.ROOT: _root,
    GraphOp.KEEP: _keep,
    GraphOp.GATE: _gate,
}
