"""Lowering: an `AttentionSpec` becomes an attention graph. Everything after this speaks of graphs only."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from attncc.ir.expr import Expr, Kind, Table, const, tables
from attncc.ir.graph import Graph, GraphOp, Node, Stage, node
from attncc.ir.rows import BIAS_SCORE, SCORE, Normalizer, Root, RowClass, Statistic
from attncc.ir.verify import verify
from attncc.spec.attention import AttentionSpec
from attncc.spec.gates import LOGIT, OUTPUT


def lower(spec: AttentionSpec) -> Graph:
    """The graph of a spec: one chain from q, k, v to the outputs, after one for what its weights need to know of their whole row."""
    q, k, v = _operands(spec)
    for each in spec.loads:
        q, k = (each.apply(rows, side, spec.grid, spec.head_dims[0]) for side, rows in (("q", q), ("k", k)))
    scores, factors = node(GraphOp.SCORES, q, k, scale=spec.scale), spec.scale_reads
    scaled = prod((factors[side] for side in "qk" if side in factors), start=SCORE)
    if scaled is not SCORE:
        scores = node(GraphOp.MAP, scores, *_reads(scaled), value=scaled)
    for score in spec.scores:
        value = score.apply(SCORE, spec.grid, spec.heads)
        if value is not SCORE:
            scores = node(GraphOp.MAP, scores, *_reads(value), value=value)
    normalizer = spec.record
    statistics = dict[str, Node]()
    if normalizer.statistic is not None:
        scores = _shifted(scores, normalizer.statistic.shift, {})
        statistics[normalizer.statistic.name] = _statistic(spec, normalizer.statistic, _seen(spec, scores))
    scores = _seen(spec, _shifted(scores, normalizer.shift, statistics))
    weights = _weights(spec, normalizer, scores, q)
    said = {"value_scale": factors.get("v"), "factor": spec.weight_factor}
    by_value = {name: value for name, value in said.items() if value is not None}
    bias = _sink_input(spec, normalizer, 1)
    rows = _weighed(spec, node(GraphOp.COMBINE, weights, v, *bias, *map(_table_input, tables(*by_value.values())), **by_value))
    results = {"output": _gated(spec, rows), "lse": node(GraphOp.LSE, weights)}
    outputs = tuple((name, results[name]) for name in spec.outputs)
    return verify(Graph(spec.grid.query, spec.grid.key, outputs), Stage.LOWERED)


def _shifted(scores: Node, shift: Expr | None, statistics: Mapping[str, Node]) -> Node:
    if shift is None:
        return scores
    reads = (statistics.get(table.name) or _table_input(table) for table in tables(shift))
    return node(GraphOp.MAP, scores, *reads, value=shift)


def _seen(spec: AttentionSpec, scores: Node) -> Node:
    """The scores of the pairs that the mask keeps, of rows that routing keeps."""
    scores = node(GraphOp.MASK, scores, *_reads(spec.predicate), predicate=spec.predicate)
    kept = const(True) if spec.routing is None else spec.routing.rows(spec.grid)
    return scores if kept is const(True) else node(GraphOp.ROUTE, scores, *_reads(kept), rows=kept)


def _statistic(spec: AttentionSpec, statistic: Statistic, scores: Node) -> Node:
    of = statistic.of
    if isinstance(of, Root):
        number = node(GraphOp.ROOT, scores, weight=of.weight, start=of.start, update=of.update, sweeps=of.sweeps)
    else:
        number = node(GraphOp.LSE, node(GraphOp.WEIGHTS, scores, *_reads(of), row_class=RowClass.RATIO.value, weight=of))
    return node(GraphOp.KEEP, number, name=statistic.name, dtype="float32", shape=("B", "H", "NQ"))


def _weights(spec: AttentionSpec, normalizer: Normalizer, scores: Node, q: Node) -> Node:
    sink = normalizer.sink
    if sink is BIAS_SCORE and "q" in spec.token_scales:
        sink = sink * spec.scale_reads["q"]
    known = {"weight": normalizer.weight, "sink": sink, "divisor": normalizer.divisor}
    attrs = {name: value for name, value in known.items() if value is not None}
    reads = dict.fromkeys(read for value in attrs.values() for read in _reads(value))
    logits = [node(GraphOp.DOT, q, x, scale=spec.scale) for x in _sink_input(spec, normalizer, 0)]
    return node(GraphOp.WEIGHTS, scores, *reads, *logits, row_class=normalizer.row_class.value, **attrs)


def _sink_input(spec: AttentionSpec, normalizer: Normalizer, which: int) -> list[Node]:
    """The key (0) or the value (1) of a sink that has both."""
    return [_table_input(list(spec.sink_tables.values())[which])] if normalizer.sink_key else []


def _operands(spec: AttentionSpec) -> tuple[Node, Node, Node]:
    heads, key_heads, value_heads = spec.head_counts
    width, value_width = spec.head_dims
    shapes = {
        "q": ("B", heads, "NQ", width),
        "k": ("B", key_heads, "NK", width),
        "v": ("B", value_heads, "NK", value_width),
    }
    q, k, v = (node(GraphOp.INPUT, name=name, dtype=spec.dtype, shape=shape) for name, shape in shapes.items())
    return q, k, v


def _reads(value: Expr) -> tuple[Node, ...]:
    return tuple(map(_table_input, tables(value)))


def _table_input(table: Table) -> Node:
    values = {} if table.values is None else {"values": table.values}
    dtype = "int32" if table.kind is Kind.INT else "float32"
    return node(GraphOp.INPUT, name=table.name, dtype=dtype, shape=table.shape, **values)


def _weighed(spec: AttentionSpec, rows: Node) -> Node:
    value = OUTPUT if spec.routing is None else spec.routing.weigh(spec.grid)
    return rows if value is OUTPUT else node(GraphOp.WEIGH, rows, *_reads(value), value=value)


def _gated(spec: AttentionSpec, rows: Node) -> Node:
    """The rows, what is added to them, then the gate."""
    (heads, key_heads, _), (_, value_dim) = spec.head_counts, spec.head_dims
    if spec.addend:
        added = node(GraphOp.INPUT, name="addend", dtype=spec.dtype, shape=("B", heads, "NQ", value_dim))
        rows = node(GraphOp.GATE, rows, added, value=OUTPUT + LOGIT)
    if spec.gate is None:
        return rows
    own, width = spec.gate.columns(heads, key_heads, value_dim)
    logits = node(GraphOp.INPUT, name="gate", dtype=spec.dtype, shape=("B", own, "NQ", width))
    packed = {"packed": True} if spec.gate.packed else {}
    return node(GraphOp.GATE, rows, logits, value=spec.gate.expression(), **packed)
