"""Infix text of expressions, and the whitelist parser that reads it back.

The grammar is the arithmetic, comparison and boolean subset of Python's; Python's own parser makes the tree and this module accepts
the few node types it knows. Nothing is ever evaluated: specs come from files.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping

from attncc.errors import PredicateError
from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, load, var
from attncc.ir.ops import ATOM, TABLE, UNARY

MAX_TEXT = 2000
_INFIX = {
    Op.ADD: "+", Op.SUB: "-", Op.MUL: "*", Op.DIV: "/", Op.FLOORDIV: "//", Op.MOD: "%",
    Op.LT: "<", Op.LE: "<=", Op.EQ: "==", Op.NE: "!=", Op.AND: "and", Op.OR: "or",
}  # fmt: skip
_BINARY = {
    ast.Add: Op.ADD,
    ast.Sub: Op.SUB,
    ast.Mult: Op.MUL,
    ast.Div: Op.DIV,
    ast.FloorDiv: Op.FLOORDIV,
    ast.Mod: Op.MOD,
}
_COMPARE = {ast.Lt: Op.LT, ast.LtE: Op.LE, ast.Eq: Op.EQ, ast.NotEq: Op.NE, ast.Gt: Op.LT, ast.GtE: Op.LE}
_CALLS = {
    op.value: op
    for op in (Op.MIN, Op.MAX, Op.ABS, Op.SELECT, Op.FLOAT, Op.EXP, Op.LOG, Op.SQRT, Op.TANH, Op.SIGMOID, Op.SOFTPLUS, Op.ERF,
               Op.RELU, Op.POW)
}  # fmt: skip
INTEGER_CALLS = frozenset({"min", "max", "abs", "select"})

Loads = Callable[[str, "tuple[Expr, ...]"], Expr]


def to_text(root: Expr) -> str:
    """Infix form with the parentheses that are needed; `parse` gives the same node back."""
    return _print(root)[0]


def _print(node: Expr) -> tuple[str, int]:
    if node.op is Op.CONST:
        infinite = isinstance(node.value, float) and math.isinf(node.value)
        literal = repr(node.value) if not infinite else "inf" if node.value > 0 else "-inf"
        return literal, UNARY if literal.startswith("-") else ATOM
    if node.op is Op.VAR:
        return str(node.value), ATOM
    if isinstance(node.value, Table):
        return f"{node.value.name}[{', '.join(_print(a)[0] for a in node.args)}]", ATOM
    parts = [_print(a) for a in node.args]
    binding = TABLE[node.op].binding if node.op in TABLE else ATOM
    if node.op in _INFIX:
        # Left operands may bind equally (the language is left-associative); comparisons may not, for Python would chain them.
        left = _wrapped(parts[0], binding + (node.op in _COMPARE.values()))
        return f"{left} {_INFIX[node.op]} {_wrapped(parts[1], binding + 1)}", binding
    if node.op in (Op.NEG, Op.NOT):
        # A literal after a minus sign would read back as a negative literal.
        needed = ATOM + 1 if node.op is Op.NEG and node.args[0].op is Op.CONST else binding
        return f"{'not ' if node.op is Op.NOT else '-'}{_wrapped(parts[0], needed)}", binding
    return f"{node.op.value}({', '.join(p[0] for p in parts)})", ATOM


def _wrapped(part: tuple[str, int], needed: int) -> str:
    return part[0] if part[1] >= needed else f"({part[0]})"


def parse(
    text: str, variables: Mapping[str, Expr], loads: Loads | None = None, calls: frozenset[str] | None = None, longest: int = MAX_TEXT
) -> Expr:
    """The expression a text says.

    Args:
        text: infix text.
        variables: the names it may use.
        loads: makes a table read from a name and its indices; None forbids tables.
        calls: the functions it may use (default: all of the language).
        longest: characters of text, at most.

    Raises:
        PredicateError: what is not in the grammar, with its column.
    """
    if len(text) > longest:
        raise PredicateError(f"longer than {longest} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _Reader(variables, loads, calls if calls is not None else frozenset(_CALLS)).read(tree.body)
    except SyntaxError as error:
        raise PredicateError(f"{error.msg} at column {error.offset}") from None
    except (TypeError, ValueError) as error:
        raise PredicateError(str(error)) from None
    except (RecursionError, MemoryError):
        raise PredicateError("nested too deeply") from None


class _Reader:
    """Walks Python's syntax tree; every method is one production of the grammar."""

    def __init__(self, variables: Mapping[str, Expr], loads: Loads | None, calls: frozenset[str]) -> None:
        self.variables, self.loads, self.calls = variables, loads, calls

    def read(self, node: ast.expr) -> Expr:
        method: Callable[[ast.expr], Expr] | None = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            raise PredicateError(f"{type(node).__name__} is not allowed at column {node.col_offset + 1}")
        return method(node)

    def _refuse(self, node: ast.expr, what: str) -> PredicateError:
        return PredicateError(f"{what} at column {node.col_offset + 1}")

    def _Constant(self, node: ast.Constant) -> Expr:
        if isinstance(node.value, bool | int | float):
            return const(node.value)
        raise self._refuse(node, f"a literal must be a number, not {type(node.value).__name__},")

    def _Name(self, node: ast.Name) -> Expr:
        if node.id == "inf":
            return const(float("inf"))
        if node.id not in self.variables:
            raise self._refuse(node, f"unknown name {node.id!r} (known: {', '.join(sorted(self.variables))})")
        return self.variables[node.id]

    def _UnaryOp(self, node: ast.UnaryOp) -> Expr:
        if isinstance(node.op, ast.USub):
            operand = self.read(node.operand)
            return const(-operand.value) if operand.op is Op.CONST else -operand
        if isinstance(node.op, ast.Not):
            return ~self.read(node.operand)
        raise self._refuse(node, f"{type(node.op).__name__} is not allowed")

    def _BinOp(self, node: ast.BinOp) -> Expr:
        op = _BINARY.get(type(node.op))
        if op is None:
            raise self._refuse(node, f"{type(node.op).__name__} is not allowed")
        return apply(op, self.read(node.left), self.read(node.right))

    def _BoolOp(self, node: ast.BoolOp) -> Expr:
        op = Op.AND if isinstance(node.op, ast.And) else Op.OR
        result = self.read(node.values[0])
        for value in node.values[1:]:
            result = apply(op, result, self.read(value))
        return result

    def _Compare(self, node: ast.Compare) -> Expr:
        result, left = const(True), self.read(node.left)
        for comparison, right_node in zip(node.ops, node.comparators):
            op = _COMPARE.get(type(comparison))
            if op is None:
                raise self._refuse(node, f"{type(comparison).__name__} is not allowed")
            right = self.read(right_node)
            swapped = isinstance(comparison, (ast.Gt, ast.GtE))
            result = result & apply(op, *((right, left) if swapped else (left, right)))
            left = right
        return result

    def _Call(self, node: ast.Call) -> Expr:
        if not isinstance(node.func, ast.Name) or node.func.id not in self.calls or node.keywords:
            raise self._refuse(node, f"only {', '.join(sorted(self.calls))} may be called")
        op, args = _CALLS[node.func.id], [self.read(a) for a in node.args]
        if op in (Op.MIN, Op.MAX) and len(args) > 2:
            return apply(op, self._fold(op, args[:-1]), args[-1])
        arity = {Op.MIN: 2, Op.MAX: 2, Op.POW: 2, Op.SELECT: 3}.get(op, 1)
        if len(args) != arity:
            raise self._refuse(node, f"{op.value} takes {arity} arguments, {len(args)} given,")
        return apply(op, *args)

    def _fold(self, op: Op, args: list[Expr]) -> Expr:
        result = args[0]
        for arg in args[1:]:
            result = apply(op, result, arg)
        return result

    def _Subscript(self, node: ast.Subscript) -> Expr:
        if self.loads is None or not isinstance(node.value, ast.Name):
            raise self._refuse(node, "only a run-time table may be indexed,")
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return self.loads(node.value.id, tuple(self.read(i) for i in index))


def table_loads(known: Mapping[str, Table]) -> Loads:
    """Reads of declared tables only."""

    def make(name: str, index: tuple[Expr, ...]) -> Expr:
        if name not in known:
            raise ValueError(f"unknown table {name!r}")
        return load(known[name], *index)

    return make


def float_variable(name: str) -> Expr:
    """A float variable: `s` the scaled score, `o` the output row, `g` the gate logit."""
    return var(name, Kind.FLOAT)
