"""Random expressions twice: as trees of plain tuples with their Python value, and as what the constructors make of them.

The constructors fold and simplify, so a tree and its expression agree only if every identity holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, load, var

Tree = tuple[Any, ...]
INTEGERS = ("q0", "k0", "r0", "h")
TABLES = {
    "line": Table("line", Kind.INT, (9,)),
    "square": Table("square", Kind.INT, (5, 6)),
}
VALUES = {
    "line": np.array([3, -1, 4, 1, -5, 9, 2, 6, -5]),
    "square": np.random.default_rng(0).integers(-7, 8, (5, 6)),
}

_SMALL = st.integers(-4, 12) | st.sampled_from([0, 1, -1, 2])
_NOT_ZERO = st.sampled_from([1, 2, 3, 5, -1, -2, -3])
_TWO = (Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX)
_COMPARISONS = (Op.LT, Op.LE, Op.EQ, Op.NE)


def integers(leaves: int = 6) -> SearchStrategy[Tree]:
    """Trees of integers; divisors are constants other than zero, or 1 + an absolute value."""
    leaf = st.sampled_from(INTEGERS).map(lambda name: (Op.VAR, name)) | _SMALL.map(lambda n: (Op.CONST, n))
    return st.recursive(leaf, _larger_integers, max_leaves=leaves)


def _larger_integers(inner: SearchStrategy[Tree]) -> SearchStrategy[Tree]:
    constant = _NOT_ZERO.map(lambda n: (Op.CONST, n))
    positive = inner.map(lambda x: (Op.ADD, (Op.ABS, x), (Op.CONST, 1)))
    return st.one_of(
        st.tuples(st.sampled_from(_TWO), inner, inner),
        st.tuples(st.sampled_from((Op.FLOORDIV, Op.MOD)), inner, constant | positive),
        st.tuples(st.sampled_from((Op.NEG, Op.ABS)), inner),
        st.tuples(st.just(Op.SELECT), _comparisons(inner), inner, inner),
        st.tuples(st.just(Op.LOAD), st.just("line"), inner),
        st.tuples(st.just(Op.LOAD), st.just("square"), inner, inner),
    )


def _comparisons(inner: SearchStrategy[Tree]) -> SearchStrategy[Tree]:
    return st.tuples(st.sampled_from(_COMPARISONS), inner, inner)


def booleans() -> SearchStrategy[Tree]:
    """Trees of masks."""
    return st.recursive(
        _comparisons(integers(3)),
        lambda inner: st.tuples(st.sampled_from((Op.AND, Op.OR)), inner, inner) | st.tuples(st.just(Op.NOT), inner),
        max_leaves=4,
    )


def built(tree: Tree) -> Expr:
    """The expression of a tree."""
    op, *rest = tree
    if op is Op.CONST:
        return const(rest[0])
    if op is Op.VAR:
        return var(rest[0])
    if op is Op.LOAD:
        return load(TABLES[rest[0]], *map(built, rest[1:]))
    return apply(op, *map(built, rest))


_PYTHON: dict[Op, Callable[..., Any]] = {
    Op.ADD: lambda a, b: a + b, Op.SUB: lambda a, b: a - b, Op.MUL: lambda a, b: a * b, Op.NEG: lambda a: -a, Op.ABS: abs,
    Op.FLOORDIV: lambda a, b: a // b, Op.MOD: lambda a, b: a % b, Op.MIN: min, Op.MAX: max,
    Op.LT: lambda a, b: a < b, Op.LE: lambda a, b: a <= b, Op.EQ: lambda a, b: a == b, Op.NE: lambda a, b: a != b,
    Op.AND: lambda a, b: a and b, Op.OR: lambda a, b: a or b, Op.NOT: lambda a: not a, Op.SELECT: lambda c, a, b: a if c else b,
}  # fmt: skip


def value(tree: Tree, at: Mapping[str, int]) -> Any:
    """What a tree means at a point, in Python's integers."""
    op, *rest = tree
    if op is Op.CONST:
        return rest[0]
    if op is Op.VAR:
        return at[rest[0]]
    if op is Op.LOAD:
        return entry(rest[0], *(value(i, at) for i in rest[1:]))
    return _PYTHON[op](*(value(a, at) for a in rest))


def entry(table: str, *index: int) -> int:
    """A table's entry; every index is clamped into it."""
    data = VALUES[table]
    return int(data[tuple(min(max(int(i), 0), n - 1) for i, n in zip(index, data.shape))])


Box = dict[str, tuple[int, int]]


@st.composite
def boxes(draw: st.DrawFn, widest: int = 4, farthest: int = 12) -> Box:
    """Ranges of the variables, single points among them."""
    box = {}
    for name in INTEGERS:
        low = draw(st.integers(0, farthest))
        box[name] = (low, low + draw(st.integers(0, widest)))
    return box


def points(box: Box) -> list[dict[str, int]]:
    """Every point of a box."""
    axes = np.meshgrid(*(np.arange(low, high + 1) for low, high in box.values()), indexing="ij")
    return [dict(zip(box, map(int, point))) for point in zip(*(x.ravel() for x in axes))]
