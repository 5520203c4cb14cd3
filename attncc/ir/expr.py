"""Expressions: immutable, hash-consed nodes over one op table (`attncc.ir.ops`).

An expression says what a mask, a score map, a weight or a gate means. It is written once, in the spec, and interpreted four ways:
as values (`values`), as intervals (`intervals`), as derivatives (`derivatives`) and as code (`attncc.codegen.expressions`).
Structural equality is identity, so `==` between expressions is a dictionary lookup; comparisons *in* the language are
`a < b`, `a <= b`, `a.equals(b)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any


class Kind(str, Enum):
    """The type of an expression: integers are exact, floats are what attention computes in, booleans are masks."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"


class Op(str, Enum):
    """The whole vocabulary. What each op means, in all four interpretations, is its row in `attncc.ir.ops`."""

    CONST = "const"  # a literal
    VAR = "var"  # a coordinate, a length, the score s, the output row o, the gate logit g
    LOAD = "load"  # table[index, ...]; indices are clamped into the table
    RANGE_MIN = "range_min"  # least entry of a table between two positions of one index
    RANGE_MAX = "range_max"  # greatest entry, likewise
    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    NEG = "neg"
    DIV = "div"  # true division, floats only
    FLOORDIV = "floordiv"  # rounds toward minus infinity, as Python does and C does not
    MOD = "mod"  # has the sign of the divisor
    MIN = "min"
    MAX = "max"
    ABS = "abs"
    LT = "lt"
    LE = "le"
    EQ = "eq"
    NE = "ne"
    AND = "and"
    OR = "or"
    NOT = "not"
    SELECT = "select"  # select(condition, then, otherwise)
    FLOAT = "float"  # integer to float
    EXP = "exp"
    LOG = "log"
    SQRT = "sqrt"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"
    ERF = "erf"
    RELU = "relu"
    POW = "pow"


@dataclass(frozen=True)
class Table:
    """A tensor that expressions read. `shape` names run-time sizes ("B", "H", "NQ", "NK") or gives them; a constant has `values`."""

    name: str
    kind: Kind
    shape: tuple[int | str, ...]
    values: tuple[float, ...] | None = None


Number = int | float | bool
_INTERNED: dict[tuple[Any, ...], Expr] = {}


class Expr:
    """One node. Build with the functions and operators of this module, never with the class."""

    __slots__ = ("args", "kind", "op", "value")
    op: Op
    args: tuple[Expr, ...]
    value: Any  # a number (CONST), a name (VAR), a Table (LOAD), a Table and an axis (range reductions), None
    kind: Kind

    def __add__(self, other: Operand) -> Expr:
        return apply(Op.ADD, self, other)

    def __radd__(self, other: Operand) -> Expr:
        return apply(Op.ADD, other, self)

    def __sub__(self, other: Operand) -> Expr:
        return apply(Op.SUB, self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return apply(Op.SUB, other, self)

    def __mul__(self, other: Operand) -> Expr:
        return apply(Op.MUL, self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return apply(Op.MUL, other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return apply(Op.DIV, self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return apply(Op.DIV, other, self)

    def __floordiv__(self, other: Operand) -> Expr:
        return apply(Op.FLOORDIV, self, other)

    def __mod__(self, other: Operand) -> Expr:
        return apply(Op.MOD, self, other)

    def __neg__(self) -> Expr:
        return apply(Op.NEG, self)

    def __lt__(self, other: Operand) -> Expr:
        return apply(Op.LT, self, other)

    def __le__(self, other: Operand) -> Expr:
        return apply(Op.LE, self, other)

    def __gt__(self, other: Operand) -> Expr:
        return apply(Op.LT, other, self)

    def __ge__(self, other: Operand) -> Expr:
        return apply(Op.LE, other, self)

    def __and__(self, other: Operand) -> Expr:
        return apply(Op.AND, self, other)

    def __or__(self, other: Operand) -> Expr:
        return apply(Op.OR, self, other)

    def __invert__(self) -> Expr:
        return apply(Op.NOT, self)

    def __bool__(self) -> bool:
        raise TypeError("an expression has no truth value: use &, |, ~ and select()")

    def equals(self, other: Operand) -> Expr:
        """The comparison `self == other` in the language (`==` itself is identity of nodes)."""
        return apply(Op.EQ, self, other)

    def __repr__(self) -> str:
        from attncc.ir.text import to_text

        return to_text(self)

    def __reduce__(self) -> tuple[Any, ...]:
        from attncc.ir.expr_json import from_json, to_json

        return from_json, (to_json(self),)


Operand = Expr | int | float | bool


def intern(op: Op, kind: Kind, args: tuple[Expr, ...] = (), value: Any = None) -> Expr:
    """The one node with these fields. No simplification: `apply` is the constructor that simplifies."""
    key = (op, kind, value.hex() if type(value) is float else value, *args)
    node = _INTERNED.get(key)
    if node is None:
        node = object.__new__(Expr)
        node.op, node.kind, node.args, node.value = op, kind, args, value
        node = _INTERNED.setdefault(key, node)
    return node


def const(value: Number) -> Expr:
    """A literal; bool, int and float stay apart. NaN is no value of the language."""
    if value != value:
        raise ValueError("NaN is no constant of the expression language")
    kind = Kind.BOOL if isinstance(value, bool) else Kind.INT if isinstance(value, int) else Kind.FLOAT
    return intern(Op.CONST, kind, (), value)


def var(name: str, kind: Kind = Kind.INT) -> Expr:
    """A variable: `q0`, `nk1`, `h` are integers; `s`, `o`, `g` are declared float by their users."""
    return intern(Op.VAR, kind, (), name)


def lift(operand: Operand) -> Expr:
    """An expression from an expression or a Python number."""
    return operand if isinstance(operand, Expr) else const(operand)


def load(table: Table, *index: Operand) -> Expr:
    """`table[index]`, one index for each axis of the table."""
    if len(index) != len(table.shape):
        raise ValueError(f"table {table.name!r} has {len(table.shape)} axes, {len(index)} indices given")
    return intern(Op.LOAD, table.kind, tuple(map(lift, index)), table)


def apply(op: Op, *operands: Operand) -> Expr:
    """The expression `op(*operands)`, folded and simplified by the local rules of `attncc.ir.ops`."""
    from attncc.ir.ops import simplified

    return simplified(op, tuple([x if isinstance(x, Expr) else const(x) for x in operands]))


def minimum(a: Operand, b: Operand) -> Expr:
    return apply(Op.MIN, a, b)


def maximum(a: Operand, b: Operand) -> Expr:
    return apply(Op.MAX, a, b)


def clamp(x: Operand, low: Operand, high: Operand) -> Expr:
    return minimum(maximum(x, low), high)


def select(condition: Expr, then: Operand, otherwise: Operand) -> Expr:
    return apply(Op.SELECT, condition, then, otherwise)


def all_of(terms: list[Expr]) -> Expr:
    """Conjunction of any number of masks; True for none."""
    result = const(True)
    for term in terms:
        result = result & term
    return result


def nodes(*roots: Expr) -> list[Expr]:
    """Every node below `roots`, arguments before users, each once."""
    return list(_below(*roots))


@lru_cache(1 << 14)
def _below(*roots: Expr) -> tuple[Expr, ...]:
    seen: dict[Expr, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            seen[node] = None
        elif node not in seen:
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))
    return tuple(seen)


def depth(root: Expr) -> int:
    """Nodes on the longest path down from `root`."""
    found: dict[Expr, int] = {}
    for node in nodes(root):
        found[node] = 1 + max((found[a] for a in node.args), default=0)
    return found[root]


@lru_cache(1 << 14)
def variables(*roots: Expr) -> frozenset[str]:
    """Names of the variables below `roots`."""
    return frozenset(str(n.value) for n in nodes(*roots) if n.op is Op.VAR)


@lru_cache(1 << 14)
def tables(*roots: Expr) -> tuple[Table, ...]:
    """Tables read below `roots`, in order of first use."""
    return tuple(dict.fromkeys(n.value for n in nodes(*roots) if isinstance(n.value, Table)))


def substitute(root: Expr, env: dict[str, Expr]) -> Expr:
    """`root` with variables replaced, simplified again on the way up."""
    done: dict[Expr, Expr] = {}
    for node in nodes(root):
        if node.op is Op.VAR:
            done[node] = env.get(str(node.value), node)
        elif all(done[a] is a for a in node.args):
            done[node] = node
        else:
            done[node] = rebuild(node, tuple(done[a] for a in node.args))
    return done[root]


def rebuild(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """`node` over other arguments; table reads keep their table."""
    if node.op in (Op.LOAD, Op.RANGE_MIN, Op.RANGE_MAX):
        return intern(node.op, node.kind, args, node.value)
    return apply(node.op, *args) if args else node
