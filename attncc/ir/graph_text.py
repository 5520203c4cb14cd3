"""Text form of graphs; `parse_graph(to_text(g)) == g`.

One node a line: `%name = op(%input, ...) attribute=value`. Values are JSON, expressions stand in backquotes, a kernel's body is an
indented block. So a plan shows what it does, and a diff of two plans shows what changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from attncc.errors import GraphError
from attncc.ir.expr import Expr, Kind, Table, var
from attncc.ir.graph import TABLES, Graph, GraphOp, Node, node, table_of
from attncc.ir.text import parse, table_loads
from attncc.ir.text import to_text as expression_text

_INTEGERS = ["b", "h", *(f"{p}{a}" for p in ("q", "k", "r", "nq", "nk") for a in range(3))]
VARIABLES: dict[str, Expr] = {
    **{name: var(name) for name in _INTEGERS},
    **{name: var(name, Kind.FLOAT) for name in ("s", "z", "o", "g", "t", "w", "d")},
}
"""Every variable that an expression in a graph may use."""

LONGEST = 1 << 18
"""Characters of one expression in a graph; the masks of a spec are far shorter, and so is what passes make of them."""

_LINE = re.compile(r"%(?P<name>\w+) = (?P<op>\w+)(?:\((?P<inputs>[^)]*)\))?(?P<attrs>.*)")
_AXES = r"\[(?:(?:null|\d+)(?:, (?:null|\d+))*)?\]"
_HEAD = re.compile(rf"graph query=(?P<query>{_AXES}) key=(?P<key>{_AXES}) residues=(?P<residues>{_AXES}) {{")


def to_text(graph: Graph, mark: Node | None = None) -> str:
    """The graph as text; the line of `mark` (of an error) is pointed at."""
    return "\n".join(_lines(graph, mark))


def _lines(graph: Graph, mark: Node | None) -> Iterator[str]:
    head = (f"{field}={json.dumps(list(getattr(graph, field)))}" for field in ("query", "key", "residues"))
    yield f"graph {' '.join(head)} {{"
    names = _names(graph)
    for n in graph.nodes():
        yield from _node_lines(n, names, mark)
    yield f"  return {' '.join(f'{name}=%{names[n]}' for name, n in graph.outputs)}"
    yield "}"


def _names(graph: Graph) -> dict[Node, str]:
    names: dict[Node, str] = {}
    for n in graph.nodes():
        names[n] = n["name"] if n.op in TABLES else str(len(names))
    return names


def _node_lines(n: Node, names: dict[Node, str], mark: Node | None) -> Iterator[str]:
    inputs = f"({', '.join('%' + names[i] for i in n.inputs)})" if n.inputs else ""
    plain = [(k, v) for k, v in n.attrs if not isinstance(v, Graph)]
    line = f"  %{names[n]} = {n.op.value}{inputs}" + "".join(f" {k}={_value(v)}" for k, v in plain)
    body = [v for _, v in n.attrs if isinstance(v, Graph)]
    pointer = "  # <-- here" if n is mark else ""
    if not body:
        yield line + pointer
        return
    inner = list(_lines(body[0], mark))
    yield f"{line} body={inner[0]}{pointer}"
    yield from ("  " + text for text in inner[1:])


def _value(value: Any) -> str:
    if isinstance(value, Expr):
        return f"`{expression_text(value)}`"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)


def parse_graph(text: str) -> Graph:
    """The graph that text says.

    Raises:
        GraphError: a line that is not in the format.
    """
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    graph, rest = _parse_block(lines, 0, lines[0])
    if rest != len(lines):
        raise GraphError(f"text after the end of the graph: {lines[rest]!r}")
    return graph


def _parse_block(lines: list[str], at: int, head: str) -> tuple[Graph, int]:
    match = _HEAD.fullmatch(head)
    if not match:
        raise GraphError(f"not the head of a graph: {head!r}")
    axes = {name: tuple(json.loads(value)) for name, value in match.groupdict().items()}
    nodes: dict[str, Node] = {}
    at += 1
    while at < len(lines) and not lines[at].startswith("return"):
        at = _parse_node(lines, at, nodes)
    if at + 1 >= len(lines) or lines[at + 1] != "}":
        raise GraphError("a graph ends with its return and a closing brace")
    pairs = (item.split("=%") for item in lines[at].split()[1:])
    outputs = tuple((name, _known(nodes, ref)) for name, ref in pairs)
    return Graph(axes["query"], axes["key"], outputs, axes["residues"]), at + 2


def _known(nodes: dict[str, Node], name: str) -> Node:
    if name not in nodes:
        raise GraphError(f"%{name} is used before it is defined")
    return nodes[name]


def _parse_node(lines: list[str], at: int, nodes: dict[str, Node]) -> int:
    match = _LINE.fullmatch(lines[at].removesuffix("# <-- here").strip())
    if not match or match["op"] not in list(GraphOp):
        raise GraphError(f"not a node: {lines[at]!r}")
    refs = [r.strip().removeprefix("%") for r in (match["inputs"] or "").split(",") if r.strip()]
    inputs = tuple(_known(nodes, r) for r in refs)
    text, attrs, after = match["attrs"].strip(), {}, at + 1
    if " body=graph " in f" {text}":
        text, head = f" {text}".split(" body=", 1)
        attrs["body"], after = _parse_block(lines, at, head)
    try:
        tables = {n["name"]: table_of(n) for n in nodes.values() if n.op in TABLES}
        attrs.update(_Attributes(text.strip(), tables).read())
    except (ValueError, LookupError) as error:
        raise GraphError(f"not a node: {lines[at]!r}: {error}") from None
    nodes[match["name"]] = node(GraphOp(match["op"]), *inputs, **attrs)
    return after


class _Attributes:
    """Reads `name=value name=value`: JSON scalars, bracketed lists, expressions in backquotes."""

    def __init__(self, text: str, tables: dict[str, Table]) -> None:
        self.text, self.at, self.tables = text, 0, tables

    def read(self) -> dict[str, Any]:
        attrs: dict[str, Any] = {}
        while self.at < len(self.text):
            name, _, _ = self.text[self.at :].partition("=")
            self.at += len(name) + 1
            attrs[name.strip()] = self._value()
            self._skip(" ")
        return attrs

    def _skip(self, characters: str) -> None:
        while self.at < len(self.text) and self.text[self.at] in characters:
            self.at += 1

    def _value(self) -> Any:
        start = self.text[self.at : self.at + 1]
        if start == "`":
            end = self.text.index("`", self.at + 1)
            source, self.at = self.text[self.at + 1 : end], end + 1
            return parse(source, VARIABLES, table_loads(self.tables), longest=LONGEST)
        if start == "[":
            return self._list()
        value, length = json.JSONDecoder().raw_decode(self.text[self.at :])
        self.at += length
        return value

    def _list(self) -> tuple[Any, ...]:
        items: list[Any] = []
        self.at += 1
        self._skip(" ")
        while self.text[self.at] != "]":
            items.append(self._value())
            self._skip(", ")
        self.at += 1
        return tuple(items)
