"""Pass: token order. A congruence `k_a % d == q_a % d` in the mask becomes the order in which tokens are walked.

Axis a is split into d classes of equal remainder; coordinates become `q_a * d + r_a`, where q_a now counts within the class and r_a
names it. Query and key share r_a, so the congruence is true and gone, and tiles of the residual mask never cross a class (a dilated
neighborhood is a plain neighborhood within each class).
"""

from __future__ import annotations

from attncc.ir.expr import Expr, Op, substitute, var
from attncc.ir.graph import Graph, GraphOp, Node, node

MOST_CLASSES = 1024
"""Of an axis whose length only run time knows."""


def order_tokens(graph: Graph) -> Graph:
    """The graph in the token order its masks ask for; the same graph where they ask for none."""
    residues = tuple(_common_dilation(graph, axis) for axis in range(graph.rank))
    if set(residues) == {1}:
        return graph
    env = {f"{side}{a}": var(f"{side}{a}") * d + var(f"r{a}") for a, d in enumerate(residues) if d > 1 for side in "qk"}
    ordered = graph.rewrite(lambda n: _substituted(n, env))
    return Graph(graph.query, graph.key, ordered.outputs, residues)


def _common_dilation(graph: Graph, axis: int) -> int:
    """The dilation that every mask demands on an axis, or 1; more classes than tokens would be mostly empty."""
    found = {_dilation(mask["predicate"], axis) for mask in graph.find(GraphOp.MASK)}
    dilation = found.pop() if len(found) == 1 else 1
    return dilation if 1 <= dilation <= (graph.query[axis] or MOST_CLASSES) else 1


def _dilation(predicate: Expr, axis: int) -> int:
    for term in conjuncts(predicate):
        if term.op is Op.EQ and all(side.op is Op.MOD for side in term.args):
            (x, d), (y, e) = term.args[0].args, term.args[1].args
            if {x, y} == {var(f"q{axis}"), var(f"k{axis}")} and d is e and d.op is Op.CONST:
                return int(d.value)
    return 1


def conjuncts(predicate: Expr) -> list[Expr]:
    """The terms of a conjunction, in order."""
    if predicate.op is not Op.AND:
        return [predicate]
    return [term for side in predicate.args for term in conjuncts(side)]


def _substituted(n: Node, env: dict[str, Expr]) -> Node:
    attrs = {name: substitute(value, env) if isinstance(value, Expr) else value for name, value in n.attrs}
    return node(n.op, *n.inputs, **attrs)
