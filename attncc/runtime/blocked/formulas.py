"""Score maps, weights and masks of a plan's graph as functions of a block's positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from attncc.ir.arrays import Arrays, torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, Op, const, nodes, substitute, tables, variables
from attncc.ir.graph import Graph, GraphOp, reduction, weight_factor
from attncc.ir.intervals import interval, may_be_infinite
from attncc.ir.rows import SCORE
from attncc.ir.values import evaluate, evaluate_all
from attncc.passes.tiles import Shape
from attncc.runtime.blocked.rules import Factor, Pointwise, Root, ScoreMap, Total, Where
from attncc.runtime.operands import Operands

Env = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """What expressions see of positions: coordinates within a residue class (`order` classes an axis), lengths and tables."""

    query: Shape
    key: Shape
    order: Shape
    known: Mapping[str, Any]
    arrays: Arrays

    @staticmethod
    def of(graph: Graph, operands: Operands) -> Places:
        """The places of one call."""
        known = {**operands.lengths, **operands.tables}
        return Places(operands.query, operands.key, graph.order, known, torch_arrays(operands.compute))

    def env(self, where: Where) -> Env:
        """Variables and tables at some positions."""
        found: Env = {"b": where.b, "h": where.h, **self.known}
        for side, tokens, lengths in (("q", where.q, self.query), ("k", where.k, self.key)):
            for a, at in enumerate(_coordinates(tokens, lengths)):
                classes = self.order[a]
                found[f"{side}{a}"] = at if classes == 1 else at // classes
                if side == "q":
                    found[f"r{a}"] = 0 if classes == 1 else at % classes
        return found

    def allowed(self, predicate: Expr, where: Where) -> Tensor:
        """Which pairs a mask keeps; broadcasts to their shape."""
        return _tensor(evaluate(predicate, self.env(where), self.arrays), where.q.device)


def _tensor(value: Any, device: torch.device) -> Tensor:
    """A value as a tensor. torch.full, for a number: as_tensor would copy from the host, which no CUDA graph can capture."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)


def _coordinates(tokens: Tensor, lengths: Shape) -> list[Tensor]:
    """Grid coordinates of flat tokens."""
    found = []
    for n in reversed(lengths[1:]):
        found.append(tokens % n)
        tokens = tokens // n
    return [tokens, *reversed(found)]


# ---- score maps ------------------------------------------------------------------------------------------------------------------


def score_map(graph: Graph, operands: Operands) -> ScoreMap | None:
    """The maps of a graph, one after the other; None where there is none."""
    maps = tuple(n["value"] for n in graph.find(GraphOp.MAP))
    if not maps:
        return None
    read = {t.name: operands.tables[t.name] for t in tables(*maps) if t.kind is Kind.FLOAT}
    trained = {name: x for name, x in read.items() if name in operands.trained}
    chain, added = _Chain(maps, Places.of(graph, operands), operands.compute), _added(maps)
    offset = None if added is None else partial(chain.at, added)
    steady, finite = added is not None and _steady(added), not may_be_infinite(*maps)
    return ScoreMap(chain.value, chain.vjp, offset, steady, _bound(maps), finite, tuple(read.values()), trained)


@lru_cache(maxsize=256)
def _added(maps: tuple[Expr, ...]) -> Expr | None:
    """What maps add to s, if that is all they do: each has the slope 1."""
    if any(_slope(value, SCORE) is not const(1.0) for value in maps):
        return None
    s: Expr = const(0.0)
    for value in maps:
        s = substitute(value, {"s": s})
    return s


@lru_cache(maxsize=256)
def _steady(value: Expr) -> bool:
    """Whether a value stays what it is when q0 and k0 rise by the same number."""
    rise: dict[Expr, int | None] = {}
    for n in nodes(value):
        inner = [rise[a] for a in n.args]
        if n.op is Op.VAR:
            rise[n] = int(n.value in ("q0", "k0"))
        elif n.op in (Op.ADD, Op.SUB) and None not in inner:
            a, b = (x or 0 for x in inner)
            rise[n] = a + b if n.op is Op.ADD else a - b
        else:
            rise[n] = 0 if not any(x != 0 for x in inner) else None
    return rise[value] == 0


@lru_cache(maxsize=256)
def _bound(maps: tuple[Expr, ...]) -> float:
    """What the maps bound scores of any size to; infinity where intervals prove nothing."""
    low, high = const(-math.inf), const(math.inf)
    for value in maps:
        low, high = interval(value, {"s": (low, high)})
        if low.op is not Op.CONST or high.op is not Op.CONST:
            return math.inf
    return max(abs(float(low.value)), abs(float(high.value)))


@dataclass(frozen=True)
class _Chain:
    """Maps applied left to right to scaled scores of `dtype`."""

    maps: tuple[Expr, ...]
    places: Places
    dtype: torch.dtype

    def value(self, s: Tensor, where: Where) -> Tensor:
        """The mapped scores."""
        env = self.places.env(where)
        for value in self.maps:
            s = self._mapped(value, s, env)
        return s

    def at(self, value: Expr, where: Where) -> Tensor:
        """A value that depends on positions only."""
        return _tensor(evaluate(value, self.places.env(where), self.places.arrays), where.q.device).to(self.dtype)

    def _mapped(self, value: Expr, s: Tensor, env: Env) -> Tensor:
        mapped: Tensor = evaluate(value, {**env, "s": s}, self.places.arrays)
        return mapped.to(self.dtype)

    def vjp(self, s: Tensor, grad: Tensor, where: Where, grads: Mapping[str, Tensor]) -> Tensor:
        """The gradient of the scaled scores from that of the mapped ones; adds those of trained tables to `grads`."""
        env, chain = self.places.env(where), [s]
        for value in self.maps[:-1]:
            chain.append(self._mapped(value, chain[-1], env))
        for value, before in zip(reversed(self.maps), reversed(chain)):
            leaves = reads(value, frozenset(grads))
            slopes = evaluate_all([_slope(value, x) for x in (SCORE, *leaves)], {**env, "s": before}, self.places.arrays)
            for read, slope in zip(leaves, slopes[1:]):
                index = evaluate_all(read.args, env, self.places.arrays)
                scatter(grads[read.value.name], index, _product(grad, slope, _slope(value, read)))
            grad = grad if _is_one(slopes[0]) else _product(grad, slopes[0], _slope(value, SCORE)).to(self.dtype)
        return grad


def pair_factor(graph: Graph, operands: Operands) -> Factor | None:
    """What weights are multiplied by, if anything."""
    value = weight_factor(graph)
    if value is None:
        return None
    places = Places.of(graph, operands)

    def at(where: Where) -> Tensor:
        return _tensor(evaluate(value, places.env(where), places.arrays), where.q.device).to(operands.compute)

    def vjp(grad: Tensor, where: Where, grads: Mapping[str, Tensor]) -> None:
        _scatter_reads(value, grad, places.env(where), places.arrays, grads)

    trained = {t.name: operands.tables[t.name] for t in tables(value) if t.name in operands.trained}
    return Factor(at, vjp, _steady(value), trained)


@lru_cache(maxsize=1024)
def _slope(value: Expr, leaf: Expr) -> Expr:
    return derivative(value, leaf)


@lru_cache(maxsize=1024)
def reads(value: Expr, names: frozenset[str]) -> tuple[Expr, ...]:
    """Reads of the trained tables in an expression."""
    return tuple(n for n in nodes(value) if n.op is Op.LOAD and n.value.name in names)


def table_gradients(value: Expr, grad: Tensor, env: Env, operands: Operands) -> dict[str, Tensor]:
    """Gradients of the trained tables that an expression reads, from that of its value."""
    arrays = torch_arrays(operands.compute)
    sums = {t.name: grad.new_zeros(operands.tables[t.name].shape) for t in tables(value) if t.name in operands.trained}
    _scatter_reads(value, grad, env, arrays, sums)
    return {name: x.to(operands.tables[name].dtype) for name, x in sums.items()}


def _scatter_reads(value: Expr, grad: Tensor, env: Env, arrays: Arrays, grads: Mapping[str, Tensor]) -> None:
    """Adds to `grads` the gradients of the tables that an expression reads, from that of its value."""
    for read in reads(value, frozenset(grads)):
        slope = evaluate(_slope(value, read), env, arrays)
        scatter(grads[read.value.name], evaluate_all(read.args, env, arrays), _product(grad, slope, _slope(value, read)))


def _product(grad: Tensor, slope: Any, formula: Expr) -> Tensor:
    """grad * slope, 0 where grad is: at a masked pair a slope may be infinite."""
    return torch.where(grad == 0, grad, grad * slope) if _open(formula) else grad * slope


@lru_cache(maxsize=1024)
def _open(formula: Expr) -> bool:
    """Whether a slope may be infinite: it depends on scores or tables, which may be, and no interval bounds it."""
    if "s" not in variables(formula) and not tables(formula):
        return may_be_infinite(formula)
    bounds = interval(formula, {"s": (const(-math.inf), const(math.inf))})
    return any(x.op is not Op.CONST or math.isinf(x.value) for x in bounds)


def _is_one(slope: Any) -> bool:
    return not isinstance(slope, Tensor) and slope == 1.0


def scatter(total: Tensor, index: Sequence[Any], grad: Tensor) -> None:
    """Adds the gradient of every pair to the table entry that it read; pairs that read one entry together are summed first."""
    at = torch.zeros((), dtype=torch.int64, device=total.device)
    for i, n in zip(index, total.shape):
        at = at * n + _tensor(i, total.device).clamp(0, n - 1)
    at = at.view((1,) * (grad.dim() - at.dim()) + at.shape)
    summed = grad.sum_to_size(at.shape) if at.shape != grad.shape else grad
    total.view(-1).index_add_(0, at.flatten(), summed.flatten().to(total.dtype))


# ---- weights ---------------------------------------------------------------------------------------------------------------------


TOTALS: dict[str, Total] = {"mean": "keys", "ratio": "weights"}


def pointwise(graph: Graph, operands: Operands) -> Pointwise | None:
    """The weights of a normalizer other than softmax; None for that, and where there are none."""
    node = reduction(graph)
    if node.op is GraphOp.ROOT or node["row_class"] == "softmax":
        return None
    weight, slope = node["weight"], _slope(node["weight"], SCORE)
    arrays, lengths = torch_arrays(operands.compute), operands.lengths

    def value(of: Expr, s: Tensor) -> Tensor:
        found = evaluate(of, {**lengths, "s": s}, arrays)
        return found if isinstance(found, Tensor) else torch.full((), found, dtype=s.dtype, device=s.device).expand(s.shape)

    return Pointwise(partial(value, weight), partial(value, slope), TOTALS.get(node["row_class"]), _vanishes(weight, slope, lengths))


def root(graph: Graph, operands: Operands) -> Root | None:
    """The root that a kernel finds, if it does."""
    node, arrays = reduction(graph), torch_arrays(operands.compute)
    if node.op is not GraphOp.ROOT:
        return None

    def formula(of: Expr, *names: str) -> Callable[..., Tensor]:
        return lambda *values: cast(Tensor, evaluate(of, {**operands.lengths, **dict(zip(names, values))}, arrays))

    weight, slope = (formula(f, "s", "t") for f in (node["weight"], _slope(node["weight"], SCORE)))
    return Root(weight, slope, formula(node["start"], "s"), formula(node["update"], "t", "w", "d"), node["sweeps"])


def _vanishes(weight: Expr, slope: Expr, lengths: Mapping[str, int]) -> bool:
    """Whether a weight and its slope are 0 at the score -inf, so that masking scores masks both."""
    with np.errstate(all="ignore"):
        found = evaluate_all([weight, slope], {**lengths, "s": np.float64(-math.inf)})
    return all(float(x) == 0.0 for x in found)
