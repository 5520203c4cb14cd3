"""Pass: fuse. Each normalizer with everything between its scores and its results becomes one kernel.

A region is convex by construction: what lies on a path from the region's scores to its results is in it.
"""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from attncc.errors import GraphError
from attncc.ir.graph import Graph, GraphOp, Node, node


def fuse(graph: Graph) -> Graph:
    """The graph with every attention chain as a KERNEL whose body is the chain."""
    view = graph.to_networkx()
    picks: dict[Node, Node] = {}
    for weights in graph.find(GraphOp.WEIGHTS):
        region = _region(view, weights)
        if any(n in picks for n in region):
            raise GraphError(f"two normalizers share {weights.op.value} results; such chains are not fused")
        picks |= _kernel(graph, region, weights)
    return replace(graph, outputs=tuple((name, picks[n]) for name, n in graph.outputs))


def _region(view: nx.DiGraph[Node], weights: Node) -> set[Node]:
    related = nx.ancestors(view, weights) | nx.descendants(view, weights) | {weights}
    return {n for n in related if n.op is not GraphOp.INPUT}


def _kernel(graph: Graph, region: set[Node], weights: Node) -> dict[Node, Node]:
    """Results of the region, as picks from its kernel."""
    results = [(name, n) for name, n in graph.outputs if n in region]
    body = replace(graph, outputs=tuple(results))
    inputs = [n for n in body.nodes() if n.op is GraphOp.INPUT]
    kernel = node(GraphOp.KERNEL, *inputs, name=kernel_name(body, weights), body=body)
    return {n: node(GraphOp.PICK, kernel, result=name) for name, n in results}


def kernel_name(body: Graph, weights: Node) -> str:
    """A stable name that says what the kernel is, for profilers: `attention_3d_softmax_forward`."""
    weight = "softmax" if weights["row_class"] == "softmax" else weights["weight"].op.value
    weight = f"{weight}_{weights['row_class']}" if weights["row_class"] in ("mean", "ratio") else weight
    return f"attention_{body.rank}d_{weight}_forward"
