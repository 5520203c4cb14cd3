"""Pass: choose views. How a kernel addresses the tiles of each operand.

`rows`: one pointer a token; a token's row is contiguous, so loads stay wide whatever the tile's shape. Works everywhere.
`box`: one bulk copy of the N-D tile through a tensor descriptor (TMA), where the target has it and the tensor allows it; a box may not
have more than five axes, so on rank-3 grids batch and heads merge (heads first) or heads and width merge (heads last). An axis whose
tile can cross its end is never merged. Strides are known at the call only: the launcher checks `guard` and falls back to rows.

Keys with loads of their own (norms, rotations) are prepared by a launch before, or each time a tile is loaded, which needs row pointers.
"""

from __future__ import annotations

import math

from attncc.ir.graph import Graph, GraphOp, Node, loads_of, source
from attncc.targets import Target

View = tuple[str, str, bool]
MOST_VISITS = 2
"""Of a key tile whose rows are made ready each time they are loaded. A pass before reads and writes keys once more than the kernel reads
them; at load every visit reads them, their partners and their angles, four times as much, from an L2 a few times as fast as memory."""
MAX_BOX = 256
"""Longest side of a box, in elements."""


def choose_views(graph: Graph, target: Target) -> Graph:
    """The graph with an address for every streamed operand of its kernels."""

    def change(n: Node) -> Node:
        return n.with_attrs(views=_views(n, target)) if n.op is GraphOp.KERNEL else n

    return graph.rewrite(change)


def _views(kernel: Node, target: Target) -> tuple[View, ...]:
    body: Graph = kernel["body"]
    box = target.bulk_copy and _boxable(kernel)
    # Keys and values stream through the loop; queries and outputs are touched once, so pointers cost them nothing.
    k = source(body.find(GraphOp.SCORES)[0].inputs[1])
    values = [source(combine.inputs[1])["name"] for combine in body.find(GraphOp.COMBINE)]
    changed = bool(loads_of(body, "k"))
    prepared = changed and _visits(kernel) > MOST_VISITS
    own = "box" if box else "rows"
    return (k["name"], own if changed == prepared else "rows", prepared), *((name, own, False) for name in values)


def _visits(kernel: Node) -> float:
    """How often a key tile is loaded, at most: once for every query tile and query head that share it."""
    body: Graph = kernel["body"]
    heads, key_heads = (source(rows)["shape"][1] for rows in body.find(GraphOp.SCORES)[0].inputs)
    tiles = [math.inf if n is None else -(-n // side) for n, side in zip(body.query, kernel["q_tile"])]
    return float(math.prod(tiles) * heads / key_heads)


def _boxable(kernel: Node) -> bool:
    body: Graph = kernel["body"]
    dense = all(classes == 1 for classes in body.order)
    return dense and all(side <= MAX_BOX and side & (side - 1) == 0 for side in kernel["k_tile"])
