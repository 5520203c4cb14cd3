"""The verifier: holds a graph to its stage. Runs after every pass."""

from __future__ import annotations

from collections.abc import Iterator

from attncc.errors import GraphError
from attncc.ir.expr import Expr, Kind, Table, tables, variables
from attncc.ir.graph import BODIES, SIGNATURES, STAGES, TABLES, Graph, GraphOp, Node, Stage, gives, table_of
from attncc.ir.graph_text import VARIABLES, to_text
from attncc.ir.rows import RowClass

_ALLOWED = {
    GraphOp.ROTATE: (Kind.INT, ""),
    GraphOp.MAP: (Kind.FLOAT, "s"),
    GraphOp.MASK: (Kind.BOOL, ""),
    GraphOp.ROUTE: (Kind.BOOL, ""),
    GraphOp.WEIGHTS: (Kind.FLOAT, "sz"),
    GraphOp.COMBINE: (Kind.FLOAT, ""),
    GraphOp.WEIGH: (Kind.FLOAT, "o"),
    GraphOp.ROOT: (Kind.FLOAT, "stwd"),
    GraphOp.GATE: (Kind.FLOAT, "og"),
}
"""Type of an op's expression and the float variables it may use."""


def verify(graph: Graph, stage: Stage) -> Graph:
    """The graph itself, if its stage allows it.

    Raises:
        GraphError: the first thing that is wrong, with the graph's text and the culprit marked.
    """
    _verify(graph, STAGES[stage])
    for kernel in graph.find(GraphOp.KERNEL):
        _verify(kernel["body"], BODIES[stage])
    return graph


def _verify(graph: Graph, legal: dict[GraphOp, frozenset[str]]) -> None:
    if not graph.outputs:
        raise GraphError("a graph needs an output")
    problems = [(n, problem) for n in graph.nodes() for problem in _problems(n, legal, graph.rank)]
    for n, problem in problems or _graph_problems(graph):
        raise GraphError(f"{n.op.value}: {problem}\n{to_text(graph, mark=n)}")


def _graph_problems(graph: Graph) -> Iterator[tuple[Node, str]]:
    """What no node shows alone."""
    named: dict[str, Node] = {}
    for n in (n for n in graph.nodes() if n.op in TABLES):
        if named.setdefault(n["name"], n) is not n:
            yield n, f"two inputs are called {n['name']!r}"
    for name, n in graph.outputs:
        if gives(n) not in ("rows", "statistic"):
            yield n, f"output {name!r} holds {gives(n)}, not rows or a statistic"


def _problems(n: Node, legal: dict[GraphOp, frozenset[str]], rank: int) -> Iterator[str]:
    if n.op not in legal:
        yield "not legal at this stage"
        return
    missing = legal[n.op] - {name for name, _ in n.attrs}
    if missing:
        yield f"lacks {', '.join(sorted(missing))}"
    yield from _input_problems(n)
    yield from _expression_problems(n, rank)
    if n.op is GraphOp.WEIGHTS and n.get("row_class") not in list(RowClass):
        yield f"row_class {n.get('row_class')!r} is none of {', '.join(RowClass)}"
    if n.op is GraphOp.WEIGHTS and all(i.op is not GraphOp.DOT for i in n.inputs) and "z" in variables(*_expressions(n)):
        yield "uses 'z', the score of no key"
    if n.op is GraphOp.PICK and not missing and n["result"] not in dict(n.inputs[0]["body"].outputs):
        yield f"its kernel has no result {n['result']!r}"


def _input_problems(n: Node) -> Iterator[str]:
    takes = SIGNATURES[n.op].takes
    fixed = [t for t in takes if t != "tables"]
    given = [_gives(i) for i in n.inputs]
    rest = ["logit" if g == "logit" else "tensor" for g in given[len(fixed) :]]
    wanted = fixed + rest if "tables" in takes else fixed
    if given != wanted:
        yield f"takes ({', '.join(wanted)}), given ({', '.join(given)})"


def _gives(n: Node) -> str:
    """As `gives`, for a graph not known to be sound."""
    sound = n.op is not GraphOp.PICK or (n.inputs and n.get("result") in dict(getattr(n.inputs[0].get("body"), "outputs", ())))
    return gives(n) if sound else SIGNATURES[n.op].gives


def _expression_problems(n: Node, rank: int) -> Iterator[str]:
    declared = [table_of(i) for i in n.inputs if i.op in TABLES]
    for expression in _expressions(n):
        kind, floats = _ALLOWED.get(n.op, (None, ""))
        bound = n.op is GraphOp.MASK and expression.kind is Kind.INT
        if kind is not None and expression.kind is not kind and not bound:
            yield f"expression `{expression!r}` is {expression.kind.value}, not {kind.value}"
        for name in sorted(variables(expression)):
            if name not in VARIABLES or (VARIABLES[name].kind is Kind.FLOAT and name not in floats):
                yield f"expression uses {name!r}, which has no meaning here"
            elif name.startswith("k") and n.op in (GraphOp.ROUTE, GraphOp.WEIGH):
                yield f"expression uses {name!r}, and rows are routed by their queries"
            elif name[-1].isdigit() and int(name[-1]) >= rank:
                yield f"expression uses {name!r} on a grid of rank {rank}"
        unread = [t.name for t in tables(expression) if t not in declared]
        if unread:
            yield f"expression reads {', '.join(unread)}, not an input of the op"


def _expressions(n: Node) -> Iterator[Expr]:
    stack = [value for _, value in n.attrs]
    while stack:
        value = stack.pop()
        if isinstance(value, Expr):
            yield value
        elif isinstance(value, tuple):
            stack.extend(value)


def declared_tables(graph: Graph) -> dict[str, Table]:
    """Tables that the expressions of a graph read, by name."""
    found = [t for n in graph.nodes() for e in _expressions(n) for t in tables(e)]
    return {t.name: t for t in found}
