"""Pass: choose views. How a kernel addresses the tiles of each operand.

`rows`: one pointer a token; a token's row is contiguous, so loads stay wide whatever the tile's shape. Works everywhere.
`box`: one bulk copy of the N-D tile through a tensor descriptor (TMA), where the target has it and the tensor allows it; a box may not
have more than five axes, so on rank-3 grids batch and heads merge (heads first) or heads and width merge (heads last). An axis whose
tile can cross its end is never merged. Strides are known at the call only: the launcher checks `guard` and falls back to rows.
"""

from __future__ import annotations

from attncc.ir.graph import Graph, GraphOp, Node, source
from attncc.targets import Target

View = tuple[str, str]
MAX_BOX = 256
"""Longest side of a box, in elements."""


def choose_views(graph: Graph, target: Target) -> Graph:
    """The graph with an address for every streamed operand of its kernels."""

    def change(n: Node) -> Node:
        return n.with_attrs(views=_views(n, target)) if n.op is GraphOp.KERNEL else n

    return graph.rewrite(change)


def _views(kernel: Node, target: Target) -> tuple[View, ...]:
    body: Graph = kernel["body"]
    address = "box" if target.bulk_copy and _boxable(kernel) else "rows"
    # Keys and values stream through the loop; queries and outputs are touched once, so pointers cost them nothing.
    streamed = [body.find(GraphOp.SCORES)[0].inputs[1], body.find(GraphOp.COMBINE)[0].inputs[1]]
    return tuple((source(n)["name"], address) for n in streamed)


def _boxable(kernel: Node) -> bool:
    body: Graph = kernel["body"]
    dense = all(classes == 1 for classes in body.order)
    return dense and all(side <= MAX_BOX and side & (side - 1) == 0 for side in kernel["k_tile"])
