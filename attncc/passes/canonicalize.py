"""Pass: canonicalize. A mask becomes one band per axis, `lo(q_a) <= k_a <= hi(q_a)`, and a residual predicate for the rest.

Bands are what everything fast rests on: a tile is classified by comparing numbers, the kernel keeps lo and hi of its rows in
registers, and N-D masks are products of 1-D ones. Whatever cannot be solved for one key coordinate stays in the residual, so nothing
is lost. Every band lies within the key grid: a key tile that crosses the grid's end is never full.

A band may also depend on the head, the batch element and run-time tables read by the query (where a packed document begins, a window
for each head): to the kernel these are numbers of its rows like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attncc.ir.expr import Expr, Kind, Op, all_of, const, maximum, minimum, tables, var, variables
from attncc.ir.graph import Graph, GraphOp, Node, node
from attncc.ir.intervals import interval
from attncc.passes.order import conjuncts

Band = tuple[Expr, Expr]


@dataclass(frozen=True)
class Bound:
    """`k_axis >= limit` (low) or `k_axis <= limit`."""

    axis: int
    low: bool
    limit: Expr


def canonicalize(graph: Graph) -> Graph:
    """The graph with its masks merged, then split into bands and residual."""
    return graph.rewrite(_merge_masks).rewrite(lambda n: _split_mask(n, graph) if n.op is GraphOp.MASK else n)


def _merge_masks(n: Node) -> Node:
    below = n.inputs[0] if n.op is GraphOp.MASK else None
    if below is None or below.op is not GraphOp.MASK:
        return n
    reads = dict.fromkeys((*below.inputs[1:], *n.inputs[1:]))
    return node(GraphOp.MASK, below.inputs[0], *reads, predicate=below["predicate"] & n["predicate"])


def split(predicate: Expr, graph: Graph) -> tuple[tuple[Band, ...], Expr]:
    """A band for each axis and the residual of a predicate over a graph's grids, in its token order."""
    bounds, rest = [], []
    for term in conjuncts(predicate):
        solved = _solve_term(term, graph.rank)
        bounds.extend(solved) if solved is not None else rest.append(term)
    return tuple(_band(axis, [b for b in bounds if b.axis == axis], graph) for axis in range(graph.rank)), all_of(rest)


def _split_mask(mask: Node, graph: Graph) -> Node:
    bands, residual = split(mask["predicate"], graph)
    used = {t.name for expression in (residual, *(end for band in bands for end in band)) for t in tables(expression)}
    reads = tuple(i for i in mask.inputs[1:] if i["name"] in used)
    return node(GraphOp.MASK, mask.inputs[0], *reads, bands=bands, residual=residual)


# ---- solving a comparison for one key coordinate -------------------------------------------------------------------------------


def _solve_term(term: Expr, rank: int) -> list[Bound] | None:
    """Bounds equivalent to the term, or None. Of coordinates, a bound may depend on its own axis's query coordinate and residue only."""
    if term.op is Op.CONST and term.value is True:
        return []
    if term.op not in (Op.LT, Op.LE, Op.EQ) or term.args[0].kind is not Kind.INT:
        return None
    axes = [axis for axis in range(rank) if f"k{axis}" in variables(term)]
    if len(axes) != 1 or not _depends_only_on(term, axes[0]):
        return None
    return _solve_comparison(term, axes[0])


def _depends_only_on(term: Expr, axis: int) -> bool:
    allowed = {f"k{axis}", f"q{axis}", f"r{axis}", "b", "h"}
    return all(name in allowed or name.startswith("n") for name in variables(term))


def _solve_comparison(term: Expr, axis: int) -> list[Bound] | None:
    left, right = term.args
    if term.op is Op.EQ:
        sides = [_solve_le(left, right, axis), _solve_le(right, left, axis)]
        return None if None in sides else [b for side in sides for b in side or []]
    return _solve_le(left, right - 1 if term.op is Op.LT else right, axis)


def _solve_le(left: Expr, right: Expr, axis: int) -> list[Bound] | None:
    """left <= right, where the key coordinate stands on one side only."""
    key = f"k{axis}"
    on_left, on_right = key in variables(left), key in variables(right)
    if on_left == on_right:
        return None
    limit = _isolate(left, right, axis, False) if on_left else _isolate(right, left, axis, True)
    return None if limit is None else [limit]


def _isolate(side: Expr, limit: Expr, axis: int, low: bool) -> Bound | None:
    """Moves everything but the key coordinate from `side` to `limit`, one op at a time; flips the sense where an op falls."""
    key = var(f"k{axis}")
    while side is not key:
        if side.op not in (Op.ADD, Op.SUB, Op.NEG, Op.MUL, Op.FLOORDIV):
            return None
        at = next(i for i, a in enumerate(side.args) if str(key.value) in variables(a))
        others = [a for i, a in enumerate(side.args) if i != at]
        if any(str(key.value) in variables(o) for o in others):
            return None
        moved = _move(side.op, at, others, limit, low)
        if moved is None:
            return None
        side, (limit, low) = side.args[at], moved
    return Bound(axis, low, cancelled(limit))


def _move(op: Op, at: int, others: list[Expr], limit: Expr, low: bool) -> tuple[Expr, bool] | None:
    """The bound on the argument at `at`, given the bound on op(...)."""
    if op is Op.NEG:
        return -limit, not low
    other = others[0]
    if op is Op.ADD:
        return limit - other, low
    if op is Op.SUB:
        return (limit + other, low) if at == 0 else (other - limit, not low)
    positive = other.op is Op.CONST and int(other.value) > 0
    if not positive or (op is Op.FLOORDIV and at == 1):
        return None
    if op is Op.MUL:  # x * c >= limit means x >= ceil(limit / c)
        return ((limit + (other - 1)) // other, True) if low else (limit // other, False)
    return (limit * other, True) if low else (limit * other + (other - 1), False)


def cancelled(total: Expr) -> Expr:
    """A sum without what it both adds and takes away, as the start of a document often is."""
    counts: dict[Expr, int] = {}
    terms = _summands(total, 1)
    for term, sign in terms:
        counts[term] = counts.get(term, 0) + sign
    kept = [(term, n) for term, n in counts.items() if n]
    if len(kept) == len(terms):
        return total
    found: Expr = const(0)
    for term, n in kept:
        found = found + term * n if n > 0 else found - term * -n
    return found


def _summands(total: Expr, sign: int) -> list[tuple[Expr, int]]:
    if total.op in (Op.ADD, Op.SUB):
        left, right = total.args
        return _summands(left, sign) + _summands(right, sign if total.op is Op.ADD else -sign)
    return _summands(total.args[0], -sign) if total.op is Op.NEG else [(total, sign)]


# ---- bands -----------------------------------------------------------------------------------------------------------------


def _band(axis: int, bounds: list[Bound], graph: Graph) -> Band:
    """Intersection of the bounds and the key grid; what an interval proves to be implied is left out."""
    last = class_length("k", axis, graph) - 1
    low, high = const(0), last
    for bound in bounds:
        low = _tighter(low, bound.limit, maximum, axis, graph) if bound.low else low
        high = high if bound.low else _tighter(high, bound.limit, minimum, axis, graph)
    return low, high


def _tighter(current: Expr, limit: Expr, bound: Callable[[Expr, Expr], Expr], axis: int, graph: Graph) -> Expr:
    box = {f"q{axis}": (const(0), class_length("q", axis, graph) - 1)}
    if graph.order[axis] > 1:
        box[f"r{axis}"] = (const(0), const(graph.order[axis] - 1))
    (limit_low, limit_high), (low, high) = interval(limit, box), interval(current, box)
    proof = (high <= limit_low, limit_high <= low) if bound is maximum else (limit_high <= low, high <= limit_low)
    if proof[0] is const(True):
        return limit
    return current if proof[1] is const(True) else bound(current, limit)


def class_length(side: str, axis: int, graph: Graph) -> Expr:
    """Tokens of an axis in the residue class r_axis (all of them where there is one class)."""
    known = (graph.query if side == "q" else graph.key)[axis]
    length = var(f"n{side}{axis}") if known is None else const(known)
    classes = graph.order[axis]
    return length if classes == 1 else (length - var(f"r{axis}") + (classes - 1)) // classes


def bands_predicate(bands: tuple[Band, ...]) -> Expr:
    """The bands as one predicate."""
    terms = [t for a, (low, high) in enumerate(bands) for t in (low <= var(f"k{a}"), var(f"k{a}") <= high)]
    return all_of(terms)


def mask_predicate(mask: Node) -> Expr:
    """The whole predicate of a canonical mask."""
    residual: Expr = mask["residual"]
    return bands_predicate(mask["bands"]) & residual
