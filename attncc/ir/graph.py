"""The attention graph: immutable, hash-consed nodes over one op enum. A pass takes a graph and gives a graph.

    norm, rotate  ->  scores = scale * q k^T  ->  maps  ->  mask  ->  route  ->  weights  ->  combine with v  ->  weigh  ->  gate

A chain may also end in a number of each row (lse, root), which `keep` names as a table that the expressions of another chain read.

What each op takes and gives, and which attributes it must carry at which stage, stands in `SIGNATURES` and `STAGES`;
`attncc.ir.verify` holds graphs to it. Any number of these chains may share inputs and meet in one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Union

from attncc.ir.expr import Expr, Kind, Table, variables

if TYPE_CHECKING:
    import networkx as nx

Attr = Union[int, float, str, bool, None, Expr, "Graph", "tuple[Any, ...]"]


class GraphOp(str, Enum):
    """The vocabulary of attention graphs."""

    INPUT = "input"  # a tensor of the caller: q, k, v, a gate's logits, a table; or a constant table with its values
    NORM = "norm"  # rows divided by their norm, times a table of one factor a column
    ROTATE = "rotate"  # pairs of columns turned by the token's positions; these count grid coordinates, whatever the token order
    SCORES = "scores"  # scale * q k^T
    MAP = "map"  # s -> f(s, b, h, q, k, tables)
    MASK = "mask"  # keeps the scores of the pairs where the predicate holds
    DOT = "dot"  # scale * q . x, with one x a key head: the score of a key that every query sees
    ROUTE = "route"  # keeps the rows (batch element, head, query) where the predicate holds; the others see no key
    WEIGHTS = "weights"  # scores -> weights, by a normalizer's row class and weight; perhaps over a divisor, or with a sink
    COMBINE = "combine"  # weights @ v, each perhaps times a `factor` of its pair and a `value_scale`; a sink's value may follow v
    WEIGH = "weigh"  # o -> f(o, b, h, q, tables)
    LSE = "lse"  # natural log of a row's whole denominator
    ROOT = "root"  # of each row, the t with sum f(s, t) = 1 over its keys, by sweeps over them (`attncc.ir.rows.Root`)
    KEEP = "keep"  # a number of each row, as a table [B, H, NQ]
    GATE = "gate"  # o -> f(o, g); where `packed`, the logits of the query heads of a logit head lie side by side
    KERNEL = "kernel"  # a fused region, one launch; its body is a graph
    PICK = "pick"  # one result of a kernel


@dataclass(frozen=True)
class Signature:
    """Value types an op takes (a final "tables" stands for any number of tensors and logits) and the one it gives."""

    takes: tuple[str, ...]
    gives: str


SIGNATURES: dict[GraphOp, Signature] = {
    GraphOp.INPUT: Signature((), "tensor"),
    GraphOp.NORM: Signature(("tensor", "tables"), "tensor"),
    GraphOp.ROTATE: Signature(("tensor", "tables"), "tensor"),
    GraphOp.SCORES: Signature(("tensor", "tensor"), "scores"),
    GraphOp.MAP: Signature(("scores", "tables"), "scores"),
    GraphOp.MASK: Signature(("scores", "tables"), "scores"),
    GraphOp.ROUTE: Signature(("scores", "tables"), "scores"),
    GraphOp.DOT: Signature(("tensor", "tensor"), "logit"),
    GraphOp.WEIGHTS: Signature(("scores", "tables"), "weights"),
    GraphOp.COMBINE: Signature(("weights", "tensor", "tables"), "rows"),
    GraphOp.WEIGH: Signature(("rows", "tables"), "rows"),
    GraphOp.LSE: Signature(("weights",), "statistic"),
    GraphOp.ROOT: Signature(("scores", "tables"), "statistic"),
    GraphOp.KEEP: Signature(("statistic",), "tensor"),
    GraphOp.GATE: Signature(("rows", "tensor"), "rows"),
    GraphOp.KERNEL: Signature(("tables",), "results"),
    GraphOp.PICK: Signature(("results",), "rows"),
}


def gives(n: Node) -> str:
    """The value type of a node; a pick has that of the result it picks."""
    return SIGNATURES[dict(n.inputs[0]["body"].outputs)[n["result"]].op if n.op is GraphOp.PICK else n.op].gives


class Stage(str, Enum):
    """How far a graph has come. Stages differ only in which ops are legal and which attributes these must carry."""

    LOWERED = "lowered"  # as the spec says it
    ORDERED = "ordered"  # coordinates are those of a token order; congruences are gone from the masks
    CANONICAL = "canonical"  # masks are bands per axis and a residual
    FUSED = "fused"  # kernels with bodies
    PLANNED = "planned"  # kernels with tiles, views, block-mask form, warps and stages


_CORE: dict[GraphOp, frozenset[str]] = {
    GraphOp.INPUT: frozenset({"name", "dtype", "shape"}),
    GraphOp.NORM: frozenset({"norm", "eps"}),
    GraphOp.ROTATE: frozenset({"pairs", "positions", "turns"}),
    GraphOp.SCORES: frozenset({"scale"}),
    GraphOp.DOT: frozenset({"scale"}),
    GraphOp.MAP: frozenset({"value"}),
    GraphOp.MASK: frozenset({"predicate"}),
    GraphOp.ROUTE: frozenset({"rows"}),
    GraphOp.WEIGHTS: frozenset({"row_class", "weight"}),
    GraphOp.COMBINE: frozenset(),
    GraphOp.WEIGH: frozenset({"value"}),
    GraphOp.LSE: frozenset(),
    GraphOp.ROOT: frozenset({"weight", "start", "update", "sweeps"}),
    GraphOp.KEEP: frozenset({"name", "dtype", "shape"}),
    GraphOp.GATE: frozenset({"value"}),
}
_CANONICAL = {**_CORE, GraphOp.MASK: frozenset({"bands", "residual"})}
_BODY: dict[GraphOp, frozenset[str]] = {op: names for op, names in _CANONICAL.items() if op is not GraphOp.KEEP}
_FUSED = {
    GraphOp.INPUT: _CORE[GraphOp.INPUT],
    GraphOp.KEEP: _CORE[GraphOp.KEEP],
    GraphOp.KERNEL: frozenset({"name", "body"}),
    GraphOp.PICK: frozenset({"result"}),
}
_PLANNED = frozenset({"q_tile", "k_tile", "num_warps", "num_stages", "block_mask", "mask_policy", "views", "row_order"})
STAGES: dict[Stage, dict[GraphOp, frozenset[str]]] = {
    Stage.LOWERED: _CORE,
    Stage.ORDERED: _CORE,
    Stage.CANONICAL: _CANONICAL,
    Stage.FUSED: _FUSED,
    Stage.PLANNED: {**_FUSED, GraphOp.KERNEL: _FUSED[GraphOp.KERNEL] | _PLANNED},
}
"""Legal ops of each stage with the attributes they must carry."""
BODIES: dict[Stage, dict[GraphOp, frozenset[str]]] = {
    Stage.FUSED: _BODY,
    Stage.PLANNED: _BODY,
}
"""The same for the bodies of kernels."""


@dataclass(frozen=True, eq=False)
class Node:
    """One op. Equal nodes are one object; build with `node`."""

    op: GraphOp
    inputs: tuple[Node, ...]
    attrs: tuple[tuple[str, Attr], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.attrs)[name]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.attrs).get(name, default)

    def with_attrs(self, **attrs: Attr) -> Node:
        """The same op and inputs with attributes added or replaced; None removes one."""
        merged = {**dict(self.attrs), **attrs}
        return node(self.op, *self.inputs, **{k: v for k, v in merged.items() if v is not None})


_INTERNED: dict[tuple[Any, ...], Node] = {}


def node(op: GraphOp, *inputs: Node, **attrs: Attr) -> Node:
    """The one node with these fields."""
    items = tuple(sorted(attrs.items()))
    key = (op, inputs, tuple((name, _exact(value)) for name, value in items))
    return _INTERNED.setdefault(key, Node(op, inputs, items))


def _exact(value: Any) -> Any:
    """What equals only its like: to Python 1, 1.0 and True are equal, and 0.0 and -0.0."""
    if isinstance(value, tuple):
        return tuple(map(_exact, value))
    return type(value), value.hex() if isinstance(value, float) else value


@dataclass(frozen=True)
class Graph:
    """Named outputs over a token grid.

    `query` and `key` are the grid's axes (None: given at run time). `residues` is the token order: axis a is walked in
    `residues[a]` classes of equal remainder, coordinates `q0` .. count within a class and `r0` .. name it.
    """

    query: tuple[int | None, ...]
    key: tuple[int | None, ...]
    outputs: tuple[tuple[str, Node], ...]
    residues: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.query)

    @property
    def order(self) -> tuple[int, ...]:
        """Residue classes of every axis, ones where tokens keep their order."""
        return self.residues or (1,) * self.rank

    def nodes(self) -> list[Node]:
        """Every node, inputs before users, each once."""
        return list(self._nodes)

    @cached_property
    def _nodes(self) -> tuple[Node, ...]:
        seen: dict[Node, None] = {}
        stack = [(n, False) for _, n in reversed(self.outputs)]
        while stack:
            current, ready = stack.pop()
            if ready:
                seen[current] = None
            elif current not in seen:
                stack.append((current, True))
                stack.extend((n, False) for n in reversed(current.inputs))
        return tuple(seen)

    def find(self, op: GraphOp) -> list[Node]:
        """Nodes of one op, in topological order."""
        return [n for n in self._nodes if n.op is op]

    def rewrite(self, change: Callable[[Node], Node]) -> Graph:
        """The graph with `change` applied to every node, inputs first; `change` sees inputs already changed."""
        done: dict[Node, Node] = {}
        for n in self.nodes():
            done[n] = change(node(n.op, *(done[i] for i in n.inputs), **dict(n.attrs)))
        return replace(self, outputs=tuple((name, done[n]) for name, n in self.outputs))

    def to_networkx(self) -> nx.DiGraph[Node]:
        """A view for graph algorithms and drawing: edges from inputs to users."""
        import networkx as nx

        view: nx.DiGraph[Node] = nx.DiGraph()
        for n in self.nodes():
            view.add_node(n)
            view.add_edges_from((i, n) for i in n.inputs)
        return view

    def __str__(self) -> str:
        from attncc.ir.graph_text import to_text

        return to_text(self)


def source(rows: Node) -> Node:
    """The input whose rows these are, before anything was done to them."""
    while rows.op is not GraphOp.INPUT:
        rows = rows.inputs[0]
    return rows


def loads_of(graph: Graph, side: str) -> tuple[Node, ...]:
    """The ops between the input "q" or "k" and the scores, in order."""
    rows, found = graph.find(GraphOp.SCORES)[0].inputs["qk".index(side)], list[Node]()
    while rows.op is not GraphOp.INPUT:
        found.append(rows)
        rows = rows.inputs[0]
    return tuple(reversed(found))


def gathers(graph: Graph) -> bool:
    """Whether rows are routed one by one, not head by head, so that the rows of a tile stand apart."""
    return any(name.startswith("q") for n in graph.find(GraphOp.ROUTE) for name in variables(n["rows"]))


def sink_names(graph: Graph) -> tuple[str, str] | None:
    """Names of the key and the value of a sink that has them."""
    dots = graph.find(GraphOp.DOT)
    return (dots[0].inputs[1]["name"], graph.find(GraphOp.COMBINE)[0].inputs[2]["name"]) if dots else None


ROW_INPUTS = ("addend", "gate")
"""Inputs of gates, by name: a row of them for every output row, laid out like q."""


def logit_share(gate: Node, heads: int) -> tuple[int, int]:
    """Query heads that share one head of a gate's logits, and columns of a row that belong to each of them."""
    _, own, _, width = gate.inputs[1]["shape"]
    return heads // own, width // (heads // own) if gate.get("packed") else width


def reduction(graph: Graph) -> Node:
    """The op that walks the keys of each row: weights, or a root."""
    return next(n for n in graph.nodes() if n.op in (GraphOp.WEIGHTS, GraphOp.ROOT))


def weight_factor(graph: Graph) -> Expr | None:
    """What the weight of each pair is multiplied by, once it is in what its row divides by; None where it stays."""
    return next((n.get("factor") for n in graph.find(GraphOp.COMBINE)), None)


def row_class(graph: Graph) -> str:
    """What a row keeps from key to key: `attncc.ir.rows`."""
    return str(reduction(graph).get("row_class", "root"))


def statistic(graph: Graph) -> str | None:
    """The name of the number of each row that a kernel's body is for; None where it combines values."""
    return None if graph.find(GraphOp.COMBINE) else graph.outputs[0][0]


TABLES = (GraphOp.INPUT, GraphOp.KEEP)
"""Ops whose results expressions read by name."""


def table_of(tensor: Node) -> Table:
    """The table that expressions read from one of these."""
    kind = Kind.INT if tensor["dtype"] == "int32" else Kind.FLOAT
    return Table(tensor["name"], kind, tensor["shape"], tensor.get("values"))
