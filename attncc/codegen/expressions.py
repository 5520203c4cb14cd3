"""Code interpretation: prints expressions as Triton, or as torch for the dense check in the generated file.

`//` and `%` of Triton truncate; they are printed only where an interval proves the numerator non-negative and the divisor positive,
the floor forms `_floordiv` and `_mod` elsewhere. Its integers have 32 bits, which an interval must prove to be enough too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from attncc.ir.expr import Expr, Kind, Op, Table, const, nodes, variables
from attncc.ir.intervals import interval, intervals
from attncc.ir.ops import ATOM, CONJUNCTION, TABLE, UNARY, Interval

Loader = Callable[[Table, "list[str]"], str]
TORCH: dict[Op, str] = {
    Op.MIN: "_min({0}, {1})", Op.MAX: "_max({0}, {1})", Op.ABS: "abs({0})", Op.SELECT: "torch.where({0}, {1}, {2})",
    Op.FLOAT: "torch.as_tensor({0}).double()", Op.EXP: "torch.exp({0})", Op.LOG: "torch.log({0})", Op.SQRT: "torch.sqrt({0})",
    Op.TANH: "torch.tanh({0})", Op.SIGMOID: "torch.sigmoid({0})", Op.SOFTPLUS: "torch.nn.functional.softplus({0})",
    Op.ERF: "torch.erf({0})", Op.RELU: "torch.relu({0})", Op.POW: "({0}) ** ({1})",
}  # fmt: skip
"""What torch calls the ops that Triton calls otherwise."""
_LOGIC = (Op.AND, Op.OR, Op.NOT)
_GROWING = (Op.ADD, Op.SUB, Op.MUL, Op.NEG, Op.ABS)


@dataclass(frozen=True)
class Names:
    """How a place in the code sees the language: `variables` gives code for a variable, `nodes` for a node computed before.

    `box` bounds variables by expressions, `limits` by numbers; `widened` are the nodes that compute in 64 bits from here on.
    """

    variables: Mapping[str, str]
    load: Loader
    box: Mapping[str, Interval]
    limits: Mapping[str, Interval] = field(default_factory=dict)
    nodes: Mapping[Expr, str] = field(default_factory=dict)
    torch: bool = False
    widened: frozenset[Expr] = frozenset()


def code(root: Expr, names: Names) -> str:
    """Code for an expression."""
    return _print(root, names if names.torch else replace(names, widened=widened(root, names.limits)))[0]


def _print(node: Expr, names: Names) -> tuple[str, int]:
    if node in names.nodes:
        return names.nodes[node], ATOM
    if node.op is Op.CONST:
        return _literal(node)
    if node.op is Op.VAR:
        return names.variables[str(node.value)], ATOM
    if isinstance(node.value, Table):
        return names.load(node.value, [_print(a, names)[0] for a in node.args]), ATOM
    if node.op in (Op.FLOORDIV, Op.MOD) and not names.torch and not _truncation_is_floor(node, names.box):
        function = "_floordiv" if node.op is Op.FLOORDIV else "_mod"
        return f"{function}({', '.join(_print(a, names)[0] for a in node.args)})", ATOM
    return _applied(node, names)


def _applied(node: Expr, names: Names) -> tuple[str, int]:
    row = TABLE[node.op]
    template = TORCH.get(node.op, row.code) if names.torch else row.code
    binding = row.binding
    parts = [_print(a, names) for a in node.args]
    if node in names.widened:  # one operand of 64 bits makes the operation one of 64 bits
        at = next(i for i, a in enumerate(node.args) if a.op is not Op.CONST)
        parts[at] = (f"{_wrapped(parts[at], ATOM)}.to(tl.int64)", ATOM)
    if "(" in template:
        return template.format(*(p[0] for p in parts)), ATOM
    if node.op in _LOGIC:
        # &, | and ~ bind tighter than comparisons in Python, unlike the language's and, or, not.
        parts = [(p[0], ATOM if a.op is node.op and node.op is not Op.NOT else min(p[1], UNARY)) for p, a in zip(parts, node.args)]
        return template.format(*(_wrapped(p, ATOM) for p in parts)), CONJUNCTION
    right = binding + (len(parts) > 1)
    return template.format(_wrapped(parts[0], binding), *(_wrapped(p, right) for p in parts[1:])), binding


def _wrapped(part: tuple[str, int], needed: int) -> str:
    return part[0] if part[1] >= needed else f"({part[0]})"


def _literal(node: Expr) -> tuple[str, int]:
    value = node.value
    if isinstance(value, float) and math.isinf(value):
        return ('float("inf")' if value > 0 else 'float("-inf")'), ATOM
    return repr(value), UNARY if repr(value).startswith("-") else ATOM


def _truncation_is_floor(node: Expr, box: Mapping[str, Interval]) -> bool:
    numerator, divisor = (interval(a, box)[0] for a in node.args)
    return proved(const(0) <= numerator) and proved(const(0) < divisor)


def widened(root: Expr, limits: Mapping[str, Interval]) -> frozenset[Expr]:
    """Operations on 32-bit integers whose results may need more, for all that numbers say of their operands."""
    reads = {n: (const(-(2**31)), const(2**31 - 1)) for n in nodes(root) if isinstance(n.value, Table)}
    bounds = intervals(root, limits, reads)
    wide: set[Expr] = set()
    found: set[Expr] = set()
    for n in nodes(root):
        if n.kind is Kind.INT and n not in reads and any(a in wide for a in n.args):
            wide.add(n)
        elif n.kind is Kind.INT and n.op in _GROWING and not _fits(*bounds[n]):
            found.add(n)
            wide.add(n)
    return frozenset(found)


def _fits(low: Expr, high: Expr) -> bool:
    return proved(const(-(2**31)) <= low) and proved(high <= const(2**31 - 1))


def proved(claim: Expr) -> bool:
    """Whether construction has already folded a claim to True."""
    return claim is const(True)


def needs_floor(roots: list[Expr], box: Mapping[str, Interval]) -> set[Op]:
    """Which floor forms the code for some expressions calls."""
    found = [n for n in nodes(*roots) if n.op in (Op.FLOORDIV, Op.MOD)]
    return {n.op for n in found if not _truncation_is_floor(n, box)}


def hoistable(root: Expr, known: frozenset[str]) -> list[Expr]:
    """Largest subexpressions that read a table and depend on the variables in `known` alone, so that a loop need not repeat them."""
    if root.kind is not Kind.BOOL and variables(root) <= known and any(isinstance(n.value, Table) for n in nodes(root)):
        return [root]
    found = [h for a in root.args for h in hoistable(a, known)]
    return list(dict.fromkeys(found))
