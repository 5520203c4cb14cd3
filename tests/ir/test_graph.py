"""Graphs read back from their text, the verifier refuses each kind of broken graph and points at the culprit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings

from attncc.errors import GraphError
from attncc.ir.expr import Kind, Op, Table, apply, const, load, var
from attncc.ir.graph import Graph, GraphOp, Node, Stage, node, table_of
from attncc.ir.graph_text import parse_graph, to_text
from attncc.ir.rows import BIAS_SCORE, SCORE
from attncc.ir.verify import declared_tables, verify
from attncc.passes.canonicalize import canonicalize
from attncc.passes.fuse import fuse
from attncc.passes.order import order_tokens
from attncc.spec.attention import AttentionSpec
from attncc.spec.lower import lower
from tests.strategies import Case, cases


def tensor(name: str, *shape: int | str, dtype: str = "float16") -> Node:
    return node(GraphOp.INPUT, name=name, dtype=dtype, shape=shape)


Q, K, V = (tensor(name, "B", 2, "NQ" if name == "q" else "NK", 16) for name in "qkv")
GATE = tensor("gate", "B", 2, "NQ", 16)
BIAS = tensor("bias", "H", dtype="float32")
SCORES = node(GraphOp.SCORES, Q, K, scale=0.25)
MASK = node(GraphOp.MASK, SCORES, predicate=var("k0") <= var("q0"))
WEIGHTS = node(GraphOp.WEIGHTS, MASK, row_class="softmax", weight=apply(Op.EXP, SCORE))
ROWS = node(GraphOp.COMBINE, WEIGHTS, V)
READ = load(Table("bias", Kind.FLOAT, ("H",)), var("h"))


def graph(rows: Node = ROWS, rank: int = 1) -> Graph:
    return Graph((8,) * rank, (8,) * rank, (("output", rows),))


def above(scores: Node) -> Graph:
    """A whole graph over some scores."""
    weights = node(GraphOp.WEIGHTS, scores, row_class="softmax", weight=apply(Op.EXP, SCORE))
    return graph(node(GraphOp.COMBINE, weights, V))


FUSED = fuse(canonicalize(graph()))
KERNEL = FUSED.find(GraphOp.KERNEL)[0]
BROKEN: dict[str, tuple[Callable[[], Graph], Stage, str, str]] = {
    "an op of a later stage": (lambda: FUSED, Stage.LOWERED, "not legal at this stage", "kernel"),
    "an op of an earlier stage": (graph, Stage.FUSED, "not legal at this stage", "scores"),
    "a mask not yet split": (graph, Stage.CANONICAL, "lacks bands, residual", "mask"),
    "a kernel not yet tiled": (lambda: FUSED, Stage.PLANNED, "lacks block_mask, k_tile", "kernel"),
    "a scale forgotten": (lambda: above(node(GraphOp.SCORES, Q, K)), Stage.LOWERED, "lacks scale", "scores"),
    "an input too few": (lambda: above(node(GraphOp.SCORES, Q, scale=1.0)), Stage.LOWERED, r"takes \(tensor, tensor\)", "scores"),
    "an input too many": (lambda: above(node(GraphOp.SCORES, Q, K, V, scale=1.0)), Stage.LOWERED, r"takes \(tensor, tensor\)", "scores"),
    "the score of a key that is none": (
        lambda: graph(node(GraphOp.COMBINE, node(GraphOp.WEIGHTS, MASK, row_class="softmax", weight=SCORE, sink=BIAS_SCORE), V)),
        Stage.LOWERED, "uses 'z', the score of no key", "weights",
    ),
    "rows where weights belong": (lambda: graph(node(GraphOp.COMBINE, ROWS, V)), Stage.LOWERED, r"given \(rows, tensor\)", "combine"),
    "scores where a table belongs": (
        lambda: above(node(GraphOp.MAP, SCORES, SCORES, value=SCORE + 1.0)), Stage.LOWERED, r"takes \(scores, tensor\)", "map",
    ),
    "a mask that is a number": (lambda: above(node(GraphOp.MASK, SCORES, predicate=SCORE)), Stage.LOWERED, "is float, not bool", "mask"),
    "a map that is a mask": (lambda: above(node(GraphOp.MAP, SCORES, value=SCORE < 1.0)), Stage.LOWERED, "is bool, not float", "map"),
    "a mask of the score": (
        lambda: above(node(GraphOp.MASK, SCORES, predicate=SCORE < 1.0)), Stage.LOWERED, "uses 's', which has no meaning here", "mask",
    ),
    "a map of the output": (
        lambda: above(node(GraphOp.MAP, SCORES, value=SCORE + var("o", Kind.FLOAT))), Stage.LOWERED, "uses 'o'", "map",
    ),
    "a gate of the score": (lambda: graph(node(GraphOp.GATE, ROWS, GATE, value=SCORE)), Stage.LOWERED, "uses 's'", "gate"),
    "rows routed by their keys": (
        lambda: above(node(GraphOp.ROUTE, MASK, rows=var("k0") < 2)), Stage.LOWERED, "uses 'k0', and rows are routed by", "route",
    ),
    "a row weight of the score": (lambda: graph(node(GraphOp.WEIGH, ROWS, value=SCORE)), Stage.LOWERED, "uses 's'", "weigh"),
    "an unknown variable": (lambda: above(node(GraphOp.MASK, SCORES, predicate=var("z") < 1)), Stage.LOWERED, "uses 'z'", "mask"),
    "a coordinate beyond the rank": (
        lambda: above(node(GraphOp.MASK, SCORES, predicate=var("k1") < 1)), Stage.LOWERED, "uses 'k1' on a grid of rank 1", "mask",
    ),
    "a table that is no input": (lambda: above(node(GraphOp.MAP, SCORES, value=SCORE + READ)), Stage.LOWERED, "reads bias", "map"),
    "another table than its input": (
        lambda: above(node(GraphOp.MAP, SCORES, tensor("bias", "B", dtype="float32"), value=SCORE + READ)),
        Stage.LOWERED, "reads bias", "map",
    ),
    "a class of rows that is none": (
        lambda: graph(node(GraphOp.COMBINE, node(GraphOp.WEIGHTS, MASK, row_class="hardmax", weight=SCORE), V)),
        Stage.LOWERED, "row_class", "weights",
    ),
    "two inputs of one name": (
        lambda: above(node(GraphOp.MAP, SCORES, tensor("k", "H", dtype="float32"), value=SCORE + 1.0)), Stage.LOWERED, "two .*'k'", "input",
    ),
    "an output of the wrong kind": (lambda: graph(WEIGHTS), Stage.LOWERED, "output", "weights"),
    "a broken body": (
        lambda: FUSED.rewrite(lambda n: n.with_attrs(body=graph()) if n.op is GraphOp.KERNEL else n), Stage.FUSED, "lacks bands", "mask",
    ),
    "a result that the kernel lacks": (
        lambda: FUSED.rewrite(lambda n: n.with_attrs(result="lse") if n.op is GraphOp.PICK else n), Stage.FUSED, "lse", "pick",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graphs_are_refused(name: str) -> None:
    """The message says what is wrong, and the text of the graph follows with the culprit's line marked."""
    make, stage, problem, culprit = BROKEN[name]
    with pytest.raises(GraphError, match=problem) as refused:
        verify(make(), stage)
    (marked,) = [line for line in str(refused.value).splitlines() if line.endswith("# <-- here")]
    assert f" = {culprit}" in marked


def test_a_graph_without_outputs_is_refused() -> None:
    with pytest.raises(GraphError, match="needs an output"):
        verify(Graph((8,), (8,), ()), Stage.LOWERED)


def test_whole_graphs_pass() -> None:
    assert verify(graph(), Stage.LOWERED) == graph()
    verify(canonicalize(graph()), Stage.CANONICAL)
    assert verify(FUSED, Stage.FUSED) is FUSED


# ---- text --------------------------------------------------------------------------------------------------------------------------

TEXT = """\
graph query=[8] key=[8] residues=[] {
  %q = input dtype="float16" name="q" shape=["B", 2, "NQ", 16]
  %k = input dtype="float16" name="k" shape=["B", 2, "NK", 16]
  %2 = scores(%q, %k) scale=0.25
  %3 = mask(%2) predicate=`k0 <= q0`
  %4 = weights(%3) row_class="softmax" weight=`exp(s)`
  %v = input dtype="float16" name="v" shape=["B", 2, "NK", 16]
  %6 = combine(%4, %v)
  return output=%6
}"""


def test_text() -> None:
    assert str(graph()) == TEXT
    assert parse_graph(TEXT) == graph()


def test_marks_are_read_over() -> None:
    assert parse_graph(to_text(graph(), mark=MASK)) == graph()


@settings(max_examples=60)
@given(cases())
def test_every_step_reads_back(case: Case) -> None:
    """conftest.py does the same to every graph of every test."""
    ordered = order_tokens(lower(AttentionSpec.model_validate(case.spec)))
    canonical = canonicalize(ordered)
    for step in (ordered, canonical, fuse(canonical)):
        assert parse_graph(str(step)) == step


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("graph query=[8]", "graph quarry=[8]", "not the head"),
        ("  %2 = scores(%q, %k) scale=0.25", "  %2 scores", "not a node"),
        ("%2 = scores", "%2 = sores", "not a node"),
        ("(%q, %k)", "(%q, %kk)", "used before"),
        ("output=%6", "output=%7", "used before"),
        ("  return output=%6\n}", "  return output=%6", "closing brace"),
        ("  return output=%6\n}", "  return output=%6\n}\n}", "after the end"),
    ],
)
def test_broken_text_is_refused(old: str, new: str, problem: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(GraphError, match=problem):
        parse_graph(TEXT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("`k0 <= q0`", "`__import__('os')`"),
        ("`k0 <= q0`", "`k0 <= q0"),
        ("scale=0.25", "scale="),
        ('["B", 2, "NQ", 16]', '["B", 2'),
        ("query=[8]", "query=[,]"),
        ("", ""),
    ],
)
def test_broken_values_are_refused(old: str, new: str) -> None:
    with pytest.raises(GraphError, match=r"not (a node|the head)"):
        parse_graph(TEXT.replace(old, new) if old else "")


# ---- nodes -------------------------------------------------------------------------------------------------------------------------


def test_equal_nodes_are_one() -> None:
    assert node(GraphOp.SCORES, Q, K, scale=0.25) is SCORES
    assert node(GraphOp.SCORES, Q, K, scale=1) is not node(GraphOp.SCORES, Q, K, scale=1.0)
    assert node(GraphOp.SCORES, Q, K, scale=True) is not node(GraphOp.SCORES, Q, K, scale=1)
    assert node(GraphOp.INPUT, shape=(1, 2)) is not node(GraphOp.INPUT, shape=(1.0, 2))
    assert node(GraphOp.SCORES, Q, K, scale=0.0) is not node(GraphOp.SCORES, Q, K, scale=-0.0)


def test_nodes_come_inputs_first() -> None:
    order = graph().nodes()
    assert all(order.index(i) < order.index(n) for n in order for i in n.inputs)
    assert len(order) == len(set(order)) == 7


def test_networkx_view() -> None:
    import networkx as nx

    view = graph().to_networkx()
    assert nx.is_directed_acyclic_graph(view)
    assert set(view.edges) == {(i, n) for n in graph().nodes() for i in n.inputs}


def test_rewrite_keeps_what_it_does_not_change() -> None:
    assert graph().rewrite(lambda n: n) == graph()
    doubled = graph().rewrite(lambda n: n.with_attrs(scale=0.5) if n.op is GraphOp.SCORES else n)
    assert doubled.find(GraphOp.SCORES)[0]["scale"] == 0.5
    assert doubled.find(GraphOp.INPUT) == graph().find(GraphOp.INPUT)


def test_declared_tables() -> None:
    biased = above(node(GraphOp.MAP, SCORES, BIAS, value=SCORE + READ))
    assert declared_tables(biased) == {"bias": table_of(BIAS)}


def test_constant_predicates_survive() -> None:
    whole: Any = above(node(GraphOp.MASK, SCORES, predicate=const(True)))
    assert parse_graph(str(whole)) == whole
