"""Pass: fuse. Each normalizer with everything between its scores and its results becomes one kernel.

A region is convex by construction: what lies on a path from the region's scores to its results is in it. A statistic of rows that
another chain reads is kept by a kernel before: there the graph is cut, and what both sides need they compute twice.
"""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from attncc.errors import GraphError
from attncc.ir.graph import Graph, GraphOp, Node, node, reduction, statistic


def fuse(graph: Graph) -> Graph:
    """The graph with every attention chain as a KERNEL whose body is the chain; those that keep a statistic first."""
    kept: dict[str, Node] = {}
    for keep in graph.find(GraphOp.KEEP):
        ((_, pick),) = _fused(_cut(replace(graph, outputs=((keep["name"], keep.inputs[0]),))), kept).outputs
        kept[keep["name"]] = node(GraphOp.KEEP, pick, **dict(keep.attrs))
    return _fused(_cut(graph), kept)


def _cut(graph: Graph) -> Graph:
    """The graph with every statistic that it reads as an input."""
    return graph.rewrite(lambda n: node(GraphOp.INPUT, **dict(n.attrs)) if n.op is GraphOp.KEEP else n)


def _fused(graph: Graph, kept: dict[str, Node]) -> Graph:
    view = graph.to_networkx()
    picks: dict[Node, Node] = {}
    for top in [*graph.find(GraphOp.WEIGHTS), *graph.find(GraphOp.ROOT)]:
        region = _region(view, top)
        if any(n in picks for n in region):
            raise GraphError(f"two normalizers share {top.op.value} results; such chains are not fused")
        picks |= _kernel(graph, region, kept)
    return replace(graph, outputs=tuple((name, picks[n]) for name, n in graph.outputs))


def _region(view: nx.DiGraph[Node], top: Node) -> set[Node]:
    related = nx.ancestors(view, top) | nx.descendants(view, top) | {top}
    return {n for n in related if n.op is not GraphOp.INPUT}


def _kernel(graph: Graph, region: set[Node], kept: dict[str, Node]) -> dict[Node, Node]:
    """Results of the region, as picks from its kernel."""
    results = [(name, n) for name, n in graph.outputs if n in region]
    body = replace(graph, outputs=tuple(results))
    inputs = [kept.get(n["name"], n) for n in body.nodes() if n.op is GraphOp.INPUT]
    kernel = node(GraphOp.KERNEL, *inputs, name=kernel_name(body), body=body)
    return {n: node(GraphOp.PICK, kernel, result=name) for name, n in results}


def kernel_name(body: Graph) -> str:
    """A stable name that says what the kernel is, for profilers: `attention_3d_softmax_forward`, `attention_1d_threshold`."""
    if (kept := statistic(body)) is not None:
        return f"attention_{body.rank}d_{kept}"
    weights = reduction(body)
    weight = "softmax" if weights["row_class"] == "softmax" else weights["weight"].op.value
    weight = f"{weight}_{weights['row_class']}" if weights["row_class"] in ("mean", "ratio") else weight
    return f"attention_{body.rank}d_{weight}_forward"
