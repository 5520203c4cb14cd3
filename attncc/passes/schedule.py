"""Pass: schedule. Which form the block mask takes, which tiles are masked, in which order rows are launched."""

from __future__ import annotations

from attncc.ir.expr import Expr, Op, const, nodes
from attncc.ir.graph import Graph, GraphOp, Node, gathers
from attncc.passes.canonicalize import Band
from attncc.passes.tiles import the_mask


def schedule(graph: Graph, mask_policy: str = "partial tiles") -> Graph:
    """The graph with block-mask form, masking policy and row order on its kernels."""

    def change(n: Node) -> Node:
        if n.op is not GraphOp.KERNEL:
            return n
        mask = the_mask(n["body"])
        form = _form(n["body"], mask)
        policy = "every tile" if form == "box" else mask_policy
        return n.with_attrs(block_mask=form, mask_policy=policy, row_order=row_order(mask["bands"][0]))

    return graph.rewrite(change)


def _form(body: Graph, mask: Node) -> str:
    """How a kernel finds its key tiles.

    `ranges`: from the bands of its rows, and of these the ones that need no mask. `box`: all tiles between the first and the last that
    the bands leave on each axis, under the mask; for gathered rows, which have no tile of their own in a list. `lists`: read from
    arrays made by the host or on the device.
    """
    if body.rank == 1 and mask["residual"] is const(True) and not any(map(_jumps, mask["bands"][0])):
        return "ranges"
    return "box" if gathers(body) and body.order == (1,) * body.rank else "lists"


def _jumps(bound: Expr) -> bool:
    """Whether a bound can leap over keys between neighbouring queries, so that a range would hold empty tiles: it multiplies."""
    return any(n.op is Op.MUL for n in nodes(bound) if _scales(n))


def _scales(n: Expr) -> bool:
    return not any(a.op is Op.FLOORDIV for a in n.args)


def row_order(band: Band) -> str:
    """Long rows first where rows grow with the query (causal masks), so that no long row is left to the end; by the first axis."""
    low, high = band
    grows = any(n.op is Op.VAR and n.value == "q0" for n in nodes(high)) and low.op is Op.CONST
    return "descending" if grows else "ascending"
