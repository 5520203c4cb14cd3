"""The op table: for each op its type rule, value, interval, derivative and code, on one row.

An interval of an expression is a pair of expressions (lo, hi) in the same language; for a boolean, lo says "surely true" and hi
"possibly true". A derivative is one factor per argument, in a form that neither overflows nor cancels. Code is a Triton template;
`binding` is how tightly the infix form binds in Python. `simplified` holds the local identities, applied when a node is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attncc.ir.arrays import numpy_arrays
from attncc.ir.expr import Expr, Kind, Number, Op, const, intern

Args = tuple[Expr, ...]
Interval = tuple[Expr, Expr]

ATOM, UNARY, PRODUCT, SUM, COMPARISON, NEGATION, CONJUNCTION, DISJUNCTION = range(8, 0, -1)
"""Binding strengths, strongest first; a call binds as an atom."""


@dataclass(frozen=True)
class Row:
    """One op. `value(arrays, *args)`; `interval(node, *intervals)`; `derivative(node, *args)` gives d node / d arg for each arg."""

    kinds: str  # "n" one numeric kind, "i" integers, "f" floats, "b" booleans, "c" numeric to boolean, "s" select, "x" cast
    value: Callable[..., Any]
    interval: Callable[..., Interval]
    derivative: Callable[..., tuple[Expr | float, ...]] | None
    code: str
    binding: int = ATOM
    commutes: bool = False


# ---- intervals ---------------------------------------------------------------------------------------------------------------


def _corners(op: Callable[[Expr, Expr], Expr], a: Interval, b: Interval) -> Interval:
    """Least and greatest of `op` over the four corners: exact where op is monotone in each argument."""
    if a[0] is a[1] and b[0] is b[1]:
        return op(a[0], b[0]), op(a[0], b[0])
    corners = [op(x, y) for x in dict.fromkeys(a) for y in dict.fromkeys(b)]
    low = high = corners[0]
    for corner in corners[1:]:
        low, high = _min(low, corner), _max(high, corner)
    return low, high


def _min(a: Expr, b: Expr) -> Expr:
    return simplified(Op.MIN, (a, b))


def _max(a: Expr, b: Expr) -> Expr:
    return simplified(Op.MAX, (a, b))


def _select(c: Expr, a: Expr, b: Expr) -> Expr:
    return simplified(Op.SELECT, (c, a, b))


def _mul_interval(_: Expr, a: Interval, b: Interval) -> Interval:
    for x, factor in ((a, b), (b, a)):
        if factor[0] is factor[1] and factor[0].op is Op.CONST:
            c = factor[0]
            return (x[0] * c, x[1] * c) if c.value >= 0 else (x[1] * c, x[0] * c)
    return _corners(lambda x, y: x * y, a, b)


def _positive(x: Interval) -> bool:
    return x[0].op is Op.CONST and x[0].value > 0


def _quotient_interval(op: Op, a: Interval, b: Interval) -> Interval:
    """Corners where the divisor keeps its sign; elsewhere |a // b| <= |a| for integers, nothing for floats."""

    def quotient(x: Expr, y: Expr) -> Expr:
        return simplified(op, (x, y))

    if _positive(b) and b[0] is b[1]:
        return quotient(a[0], b[0]), quotient(a[1], b[0])
    low, high = _corners(quotient, a, b)
    if b[0] is b[1] or _positive(b):
        return low, high
    if op is Op.FLOORDIV:
        bound = _max(simplified(Op.ABS, (a[0],)), simplified(Op.ABS, (a[1],)))
        wide = (-bound, bound)
    else:
        wide = (const(-math.inf), const(math.inf))
    one_sign = (const(0) < b[0]) | (b[1] < 0)
    return _select(one_sign, low, wide[0]), _select(one_sign, high, wide[1])


def _mod_interval(_: Expr, a: Interval, b: Interval) -> Interval:
    low, high = _min(const(0), b[0] + 1), _max(const(0), b[1] - 1)
    if b[0] is not b[1]:
        return low, high
    one_period = (a[0] // b[0]).equals(a[1] // b[0])
    return _select(one_period, a[0] % b[0], low), _select(one_period, a[1] % b[0], high)


def _abs_interval(node: Expr, a: Interval) -> Interval:
    zero = const(0 if node.kind is Kind.INT else 0.0)
    return _max(_max(a[0], -a[1]), zero), _max(a[1], -a[0])


def _pow_interval(_: Expr, a: Interval, b: Interval) -> Interval:
    unknown = (const(-math.inf), const(math.inf))
    if b[0] is not b[1] or b[0].op is not Op.CONST or not (a[0].op is Op.CONST and a[0].value >= 0):
        return unknown
    ends = (simplified(Op.POW, (a[0], b[0])), simplified(Op.POW, (a[1], b[0])))
    return ends if b[0].value >= 0 else (ends[1], ends[0])


def _eq_interval(_: Expr, a: Interval, b: Interval) -> Interval:
    surely = a[0].equals(a[1]) & b[0].equals(b[1]) & a[0].equals(b[0])
    return surely, (a[0] <= b[1]) & (b[0] <= a[1])


def _ne_interval(node: Expr, a: Interval, b: Interval) -> Interval:
    surely, possibly = _eq_interval(node, a, b)
    return ~possibly, ~surely


def _select_interval(_: Expr, c: Interval, a: Interval, b: Interval) -> Interval:
    low = _select(c[0], a[0], _select(c[1], _both(a[0], b[0], _min), b[0]))
    return low, _select(c[0], a[1], _select(c[1], _both(a[1], b[1], _max), b[1]))


def _both(a: Expr, b: Expr, bound: Callable[[Expr, Expr], Expr]) -> Expr:
    if a.kind is Kind.BOOL:
        return a & b if bound is _min else a | b
    return bound(a, b)


def _monotone(node: Expr, *intervals: Interval) -> Interval:
    return simplified(node.op, tuple(i[0] for i in intervals)), simplified(node.op, tuple(i[1] for i in intervals))


def _crossed(node: Expr, a: Interval, b: Interval) -> Interval:
    """Rising in the first argument, falling in the second: a - b."""
    return simplified(node.op, (a[0], b[1])), simplified(node.op, (a[1], b[0]))


def _less(node: Expr, a: Interval, b: Interval) -> Interval:
    return simplified(node.op, (a[1], b[0])), simplified(node.op, (a[0], b[1]))


def _falling(node: Expr, a: Interval) -> Interval:
    return simplified(node.op, (a[1],)), simplified(node.op, (a[0],))


# ---- derivatives -------------------------------------------------------------------------------------------------------------


def _call(op: Op, *args: Expr) -> Expr:
    return simplified(op, args)


def _pow_derivative(node: Expr, a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """By an exponent, a ** b * log(a); 0 where a is 0, as a ** b is there for all b > 0."""
    return b * _call(Op.POW, a, b - 1.0), _select(const(0.0) < a, node * _call(Op.LOG, a), const(0.0))


def _abs_derivative(_: Expr, x: Expr) -> tuple[Expr]:
    return (_select(const(0.0) < x, const(1.0), _select(x < 0.0, const(-1.0), const(0.0))),)


def _pick(first: Expr) -> tuple[Expr, Expr]:
    return _select(first, const(1.0), const(0.0)), _select(first, const(0.0), const(1.0))


TABLE: dict[Op, Row] = {
    Op.ADD: Row("n", lambda xp, a, b: a + b, _monotone, lambda n, a, b: (1.0, 1.0), "{0} + {1}", SUM, True),
    Op.SUB: Row("n", lambda xp, a, b: a - b, _crossed, lambda n, a, b: (1.0, -1.0), "{0} - {1}", SUM),
    Op.MUL: Row("n", lambda xp, a, b: a * b, _mul_interval, lambda n, a, b: (b, a), "{0} * {1}", PRODUCT, True),
    Op.NEG: Row("n", lambda xp, a: -a, _falling, lambda n, a: (-1.0,), "-{0}", UNARY),
    Op.DIV: Row("f", lambda xp, a, b: a / b, lambda n, a, b: _quotient_interval(Op.DIV, a, b),
                lambda n, a, b: (const(1.0) / b, -(n / b)), "{0} / {1}", PRODUCT),
    Op.FLOORDIV: Row("i", lambda xp, a, b: a // b, lambda n, a, b: _quotient_interval(Op.FLOORDIV, a, b), None,
                     "{0} // {1}", PRODUCT),
    Op.MOD: Row("i", lambda xp, a, b: a % b, _mod_interval, None, "{0} % {1}", PRODUCT),
    Op.MIN: Row("n", lambda xp, a, b: xp.minimum(a, b), _monotone, lambda n, a, b: _pick(a <= b), "tl.minimum({0}, {1})",
                commutes=True),
    Op.MAX: Row("n", lambda xp, a, b: xp.maximum(a, b), _monotone, lambda n, a, b: _pick(b <= a), "tl.maximum({0}, {1})",
                commutes=True),
    Op.ABS: Row("n", lambda xp, a: xp.absolute(a), _abs_interval, _abs_derivative, "tl.abs({0})"),
    Op.LT: Row("c", lambda xp, a, b: a < b, _less, None, "{0} < {1}", COMPARISON),
    Op.LE: Row("c", lambda xp, a, b: a <= b, _less, None, "{0} <= {1}", COMPARISON),
    Op.EQ: Row("c", lambda xp, a, b: a == b, _eq_interval, None, "{0} == {1}", COMPARISON, True),
    Op.NE: Row("c", lambda xp, a, b: a != b, _ne_interval, None, "{0} != {1}", COMPARISON, True),
    Op.AND: Row("b", lambda xp, a, b: a & b, _monotone, None, "{0} & {1}", CONJUNCTION, True),
    Op.OR: Row("b", lambda xp, a, b: a | b, _monotone, None, "{0} | {1}", DISJUNCTION, True),
    Op.NOT: Row("b", lambda xp, a: xp.logical_not(a), _falling, None, "~{0}", NEGATION),
    Op.SELECT: Row("s", lambda xp, c, a, b: xp.where(c, a, b), _select_interval,
                   lambda n, c, a, b: (0.0, *_pick(c)), "tl.where({0}, {1}, {2})"),
    Op.FLOAT: Row("x", lambda xp, a: xp.to_float(a), _monotone, None, "({0}).to(tl.float32)"),
    Op.EXP: Row("f", lambda xp, a: xp.exp(a), _monotone, lambda n, a: (n,), "tl.exp({0})"),
    Op.LOG: Row("f", lambda xp, a: xp.log(a), _monotone, lambda n, a: (const(1.0) / a,), "tl.log({0})"),
    Op.SQRT: Row("f", lambda xp, a: xp.sqrt(a), _monotone, lambda n, a: (const(0.5) / n,), "tl.sqrt({0})"),
    Op.TANH: Row("f", lambda xp, a: xp.tanh(a), _monotone, lambda n, a: (const(1.0) - n * n,), "_tanh({0})"),
    Op.SIGMOID: Row("f", lambda xp, a: xp.sigmoid(a), _monotone, lambda n, a: (n * _call(Op.SIGMOID, -a),), "tl.sigmoid({0})"),
    Op.SOFTPLUS: Row("f", lambda xp, a: xp.softplus(a), _monotone, lambda n, a: (_call(Op.SIGMOID, a),), "_softplus({0})"),
    Op.ERF: Row("f", lambda xp, a: xp.erf(a), _monotone, lambda n, a: (const(2.0 / math.sqrt(math.pi)) * _call(Op.EXP, -(a * a)),),
                "tl.erf({0})"),
    Op.RELU: Row("f", lambda xp, a: xp.maximum(a, 0.0), _monotone,
                 lambda n, a: (_select(const(0.0) < a, const(1.0), const(0.0)),), "tl.maximum({0}, 0.0)"),
    Op.POW: Row("f", lambda xp, a, b: xp.power(a, b), _pow_interval, _pow_derivative, "_pow({0}, {1})"),
}  # fmt: skip
"""Rows of the ops that are functions of their arguments; literals, variables and table reads each interpretation treats itself."""


# ---- construction ------------------------------------------------------------------------------------------------------------


_WRONG: dict[str, Callable[[Args], bool]] = {
    "n": lambda args: any(a.kind is not args[0].kind or a.kind is Kind.BOOL for a in args),
    "i": lambda args: any(a.kind is not Kind.INT for a in args),
    "c": lambda args: any(a.kind is not args[0].kind or a.kind is Kind.BOOL for a in args),
    "b": lambda args: any(a.kind is not Kind.BOOL for a in args),
    "f": lambda args: any(a.kind is not Kind.FLOAT for a in args),
    "s": lambda args: args[0].kind is not Kind.BOOL or args[1].kind is not args[2].kind,
    "x": lambda args: args[0].kind is Kind.BOOL,
}


def _kind(op: Op, args: Args) -> Kind:
    """Type of `op(*args)`.

    Raises:
        TypeError: argument types that the op's row does not take.
    """
    rule = TABLE[op].kinds
    if _WRONG[rule](args):
        raise TypeError(f"{op.value} does not take ({', '.join(a.kind.value for a in args)})")
    return Kind.BOOL if rule == "c" else Kind.FLOAT if rule == "x" else args[-1].kind


def _promoted(args: Args) -> Args:
    """Integer operands beside a float one become floats, literals at once."""
    if not any(a.kind is Kind.FLOAT for a in args) or all(a.kind is not Kind.INT for a in args):
        return args
    return tuple(_to_float(a) if a.kind is Kind.INT else a for a in args)


def _to_float(x: Expr) -> Expr:
    return const(float(x.value)) if x.op is Op.CONST else intern(Op.FLOAT, Kind.FLOAT, (x,))


def simplified(op: Op, args: Args) -> Expr:
    """`op(*args)` after constant folding and the local identities; the only constructor of interior nodes."""
    if op is Op.FLOAT and args[0].kind is Kind.FLOAT:
        return args[0]
    args = _promoted(args)
    if TABLE[op].kinds == "f" and args[0].kind is Kind.INT:
        args = tuple(map(_to_float, args))
    kind = _kind(op, args)
    if all(a.op is Op.CONST for a in args):
        return _folded(op, kind, args)
    rule = IDENTITIES.get(op)
    known = rule(*args) if rule else None
    return known if known is not None else intern(op, kind, args)


def _folded(op: Op, kind: Kind, args: Args) -> Expr:
    if op in (Op.FLOORDIV, Op.MOD) and args[1].value == 0:
        return intern(op, kind, args)
    try:
        value = TABLE[op].value(numpy_arrays(), *(a.value for a in args))
    except (ZeroDivisionError, OverflowError):
        return intern(op, kind, args)
    convert: Callable[[Any], Number] = {Kind.BOOL: bool, Kind.INT: int, Kind.FLOAT: float}[kind]
    return intern(op, kind, args) if value != value else const(convert(value))


def _is(x: Expr, value: Number) -> bool:
    return x.op is Op.CONST and x.value == value


def _add(a: Expr, b: Expr) -> Expr | None:
    if _is(a, 0) or _is(b, 0):
        return b if _is(a, 0) else a
    if a.op is Op.CONST:
        a, b = b, a
    if b.op is Op.CONST and a.kind is Kind.INT:
        if b.value < 0:
            return a - const(-b.value)
        if a.op is Op.ADD and a.args[1].op is Op.CONST:
            return a.args[0] + const(a.args[1].value + b.value)
        if a.op is Op.SUB and a.args[1].op is Op.CONST:
            return a.args[0] + const(b.value - a.args[1].value)
    return None


def _sub(a: Expr, b: Expr) -> Expr | None:
    if _is(b, 0):
        return a
    if a is b and a.kind is Kind.INT:
        return const(0)
    if b.op is Op.CONST and a.kind is Kind.INT:
        if b.value < 0:
            return a + const(-b.value)
        if a.op in (Op.ADD, Op.SUB) and a.args[1].op is Op.CONST:
            inner = a.args[1].value if a.op is Op.ADD else -a.args[1].value
            return a.args[0] + const(inner - b.value)
    return None


def _mul(a: Expr, b: Expr) -> Expr | None:
    if _is(a, 1) or _is(b, 1):
        return b if _is(a, 1) else a
    if a.kind is Kind.INT and (_is(a, 0) or _is(b, 0)):
        return const(0)
    return None


def _floordiv(a: Expr, b: Expr) -> Expr | None:
    """x // 1 = x, and (i * d + r) // d = i for a remainder 0 <= r < d: what token order turns coordinates into."""
    if _is(b, 1):
        return a
    split = _split(a, b)
    return split[0] if split else None


def _mod(a: Expr, b: Expr) -> Expr | None:
    if _is(b, 1):
        return const(0)
    split = _split(a, b)
    return split[1] if split else None


def _split(a: Expr, b: Expr) -> tuple[Expr, Expr] | None:
    """(i, r) of `i * d + r` for the divisor d, where r is a residue variable: `r0` .. `r2` lie in [0, d) by definition."""
    if a.op is not Op.ADD or a.args[0].op is not Op.MUL or a.args[0].args[1] is not b:
        return None
    r = a.args[1]
    return (a.args[0].args[0], r) if r.op is Op.VAR and str(r.value)[0] == "r" else None


def _and(a: Expr, b: Expr) -> Expr | None:
    if a is b or _is(a, False) or _is(b, True):
        return a
    return b if _is(a, True) or _is(b, False) else None


def _or(a: Expr, b: Expr) -> Expr | None:
    if a is b or _is(a, True) or _is(b, False):
        return a
    return b if _is(a, False) or _is(b, True) else None


_FLIPPED = {Op.LT: Op.LE, Op.LE: Op.LT, Op.EQ: Op.NE, Op.NE: Op.EQ}


def _not(a: Expr) -> Expr | None:
    """Negations of integer comparisons turn round; floats do not, for NaN is unordered."""
    if a.op is Op.NOT:
        return a.args[0]
    if a.op in _FLIPPED and a.args[0].kind is Kind.INT:
        x, y = a.args
        return simplified(_FLIPPED[a.op], (y, x) if a.op in (Op.LT, Op.LE) else (x, y))
    return None


def _same(result: bool) -> Callable[[Expr, Expr], Expr | None]:
    return lambda a, b: const(result) if a is b and a.kind is not Kind.FLOAT else None


def _extreme(a: Expr, b: Expr) -> Expr | None:
    return a if a is b else None


def _select_rule(c: Expr, a: Expr, b: Expr) -> Expr | None:
    if a is b or _is(c, True):
        return a
    return b if _is(c, False) else None


IDENTITIES: dict[Op, Callable[..., Expr | None]] = {
    Op.ADD: _add, Op.SUB: _sub, Op.MUL: _mul, Op.FLOORDIV: _floordiv, Op.MOD: _mod, Op.AND: _and, Op.OR: _or, Op.NOT: _not,
    Op.MIN: _extreme, Op.MAX: _extreme, Op.LT: _same(False), Op.LE: _same(True), Op.EQ: _same(True), Op.NE: _same(False),
    Op.SELECT: _select_rule, Op.NEG: lambda a: a.args[0] if a.op is Op.NEG else None,
}  # fmt: skip
