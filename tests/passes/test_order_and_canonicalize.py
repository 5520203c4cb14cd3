"""Token order and canonical masks say what the spec says, on every pair of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attncc.ir.expr import Expr, Op, const, nodes, tables, variables
from attncc.ir.graph import Graph, GraphOp, node
from attncc.ir.values import evaluate, evaluate_all
from attncc.passes.canonicalize import canonicalize, class_length
from attncc.passes.order import order_tokens
from attncc.passes.tiles import BoundMask, the_mask
from attncc.spec.attention import AttentionSpec
from attncc.spec.lower import lower
from tests.passes.brute import bound_mask, boxes
from tests.strategies import Case, Sizes, cases

SIZES = Sizes(tokens=48, heads=(1, 2))


def canonical(**fields: Any) -> Graph:
    return canonicalize(order_tokens(lower(AttentionSpec.model_validate({"heads": 1, "head_dim": 16, **fields}))))


def dense(mask: BoundMask, tables_: dict[str, Any], batch: int, heads: int) -> np.ndarray:
    """A bound mask on every pair: False between classes, its predicate within one."""
    found = np.zeros((batch, heads, int(np.prod(mask.query)), int(np.prod(mask.key))), bool)
    at = {"b": np.arange(batch).reshape(-1, 1, 1, 1), "h": np.arange(heads).reshape(-1, 1, 1)}
    for residue in boxes(mask.order):
        env: dict[str, Any] = {**at, **tables_, **{f"r{a}": r for a, r in enumerate(residue)}}
        tokens = [_class_tokens(grid, mask.order, residue) for grid in (mask.query, mask.key)]
        for side, shape, coordinates in (("q", (-1, 1), tokens[0][1]), ("k", (1, -1), tokens[1][1])):
            env |= {f"{side}{a}": x.reshape(shape) for a, x in enumerate(coordinates)}
        if all(len(flat) for flat, _ in tokens):
            found[:, :, tokens[0][0][:, None], tokens[1][0]] = evaluate(mask.predicate, env)
    return found


def _class_tokens(grid: tuple[int, ...], order: tuple[int, ...], residue: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Flat indices of a class's tokens, and their coordinates within the class."""
    axes = np.meshgrid(*(np.arange(r, n, d) for n, d, r in zip(grid, order, residue)), indexing="ij")
    flat = np.ravel_multi_index([x.ravel() for x in axes], grid) if axes[0].size else np.zeros(0, int)
    return flat, [x.ravel() // d for x, d in zip(axes, order)]


@settings(max_examples=150)
@given(cases(SIZES, mask_only=True))
def test_bands_and_residual_are_the_mask(case: Case) -> None:
    _, _, _, inputs = case.inputs(torch.float32)
    found = dense(bound_mask(case.spec, *case.grids), {n: t.numpy() for n, t in inputs.items()}, case.batch, case.spec["heads"])
    np.testing.assert_array_equal(found, np.broadcast_to(case.mask(inputs), found.shape))


@settings(max_examples=100)
@given(cases(SIZES, mask_only=True))
def test_bands_lie_within_the_keys(case: Case) -> None:
    mask = bound_mask(case.spec, *case.grids)
    given = {name: x.numpy() for name, x in case.inputs(torch.float32)[3].items()}
    for a, (low, high) in enumerate(mask.bands):
        for r, b, h in np.ndindex(mask.order[a], case.batch, case.spec["heads"]):
            queries, keys = (max(0, -(-(grid[a] - r) // mask.order[a])) for grid in (mask.query, mask.key))
            at = {f"q{a}": np.arange(queries), f"r{a}": r, "b": b, "h": h, **given}
            ends = [low, high, *mask.hull.bands[a]]
            least, greatest, lower, upper = (np.broadcast_to(x, queries) for x in evaluate_all(ends, at))
            assert (least >= 0).all() and (greatest <= keys - 1).all()
            assert (lower <= least).all() and (greatest <= upper).all()


@given(cases(SIZES, mask_only=True))
def test_what_bands_may_depend_on(case: Case) -> None:
    """A band of an axis is a function of that axis's query coordinate, its residue, the head, lengths: kernels keep it by row."""
    graph = canonicalize(order_tokens(lower(AttentionSpec.model_validate(case.spec))))
    for a, band in enumerate(the_mask(graph)["bands"]):
        assert all(name in (f"q{a}", f"r{a}", "b", "h") or name.startswith("n") for name in variables(*band))
    mask = bound_mask(case.spec, *case.grids)
    assert not tables(*(end for band in mask.hull.bands for end in band))
    assert all(name in (f"q{a}", f"r{a}") for a, band in enumerate(mask.hull.bands) for name in variables(*band))


def test_a_neighborhood_is_bands_alone() -> None:
    rule = {"kind": "neighborhood", "window": [5, 4, 3], "stride": [2, 1, 3], "dilation": [1, 2, 3], "causal": [False, True, False]}
    graph = canonical(tokens=[9, 8, 10], mask=rule)
    assert the_mask(graph)["residual"] is const(True)
    assert graph.order == (1, 2, 3)


@pytest.mark.parametrize(
    ("mask", "low", "high"),
    [
        ({"kind": "full"}, "0", "63"),
        ({"kind": "causal"}, "0", "q0"),
        ({"kind": "sliding_window", "left": 3, "right": 0}, "max(0, q0 - 3)", "q0"),
        ({"kind": "prefix", "length": 10}, "0", "9"),
        ({"kind": "predicate", "text": "2 * k - 1 <= q and 3 - k < q"}, "max(0, 3 - (q0 - 1))", "(q0 + 1) // 2"),
        ({"kind": "predicate", "text": "k // 4 == q // 4"}, "q0 // 4 * 4", "q0 // 4 * 4 + 3"),
        ({"kind": "predicate", "text": "not (k > q)"}, "0", "q0"),
        ({"kind": "predicate", "text": "-k >= -q + 1"}, "0", "-(-q0 + 1)"),
    ],
)
def test_bands(mask: dict[str, Any], low: str, high: str) -> None:
    found = the_mask(canonical(tokens=[64], mask=mask))
    assert found["residual"] is const(True)
    assert [repr(x) for x in found["bands"][0]] == [low, high]


@pytest.mark.parametrize("text", ["k * q < 9", "q % 3 < k % 3", "abs(q - k) < 5", "k // q == 1", "7 // (k + 1) > 2", "seen[b, k] == 1"])
def test_what_no_band_says_stays(text: str) -> None:
    found = the_mask(canonical(tokens=[64], mask={"kind": "predicate", "text": text}))
    assert found["residual"] is not const(True)


def test_masks_in_a_row_become_one() -> None:
    graph = lower(AttentionSpec.model_validate({"tokens": [8], "heads": 1, "head_dim": 16, "mask": {"kind": "causal"}}))
    again = AttentionSpec.model_validate({"tokens": [8], "heads": 1, "head_dim": 16, "mask": {"kind": "prefix", "length": 3}})
    second = again.mask.predicate(again.grid)
    doubled = graph.rewrite(lambda n: node(GraphOp.MASK, n, predicate=second) if n.op is GraphOp.MASK else n)
    assert len(doubled.find(GraphOp.MASK)) == 2
    assert [repr(x) for x in the_mask(canonicalize(doubled))["bands"][0]] == ["0", "min(q0, 2)"]


# ---- token order -------------------------------------------------------------------------------------------------------------------


def test_an_order_takes_the_congruence_out() -> None:
    graph = order_tokens(lower(AttentionSpec(tokens=(30,), heads=1, head_dim=16, mask=_dilated(3))))
    assert graph.residues == (3,)
    assert not _ops(graph, Op.MOD)


def _dilated(dilation: int) -> Any:
    from attncc.spec.masks import Neighborhood

    return Neighborhood(window=4, dilation=dilation)


def _ops(graph: Graph, op: Op) -> list[Expr]:
    (mask,) = graph.find(GraphOp.MASK)
    return [n for n in nodes(mask["predicate"]) if n.op is op]


def test_no_congruence_no_order() -> None:
    graph = lower(AttentionSpec(tokens=(30,), heads=1, head_dim=16, mask=_dilated(1)))
    assert order_tokens(graph) is graph


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("q0 % 2 == k0 % 2", (2, 1)),
        ("k1 % 3 == q1 % 3 and k0 <= q0", (1, 3)),
        ("q0 % 2 == k0 % 2 or q1 == k1", (1, 1)),
        ("q0 % 2 == k0 % 4", (1, 1)),
        ("q0 % 2 == k1 % 2", (1, 1)),
        ("not (q0 % 2 == k0 % 2)", (1, 1)),
        ("q % 2 == k % 2", (1, 1)),
        ("q0 % nq1 == k0 % nq1", (5, 1)),
        ("q0 % (-2) == k0 % (-2)", (1, 1)),
        ("q0 % 6 == k0 % 6", (6, 1)),
        ("q0 % 7 == k0 % 7", (1, 1)),
        ("q0 % 1000000 == k0 % 1000000", (1, 1)),
    ],
)
def test_which_congruences_are_orders(text: str, order: tuple[int, int]) -> None:
    assert canonical(tokens=[6, 5], mask={"kind": "predicate", "text": text}).order == order


def test_scores_follow_the_order() -> None:
    """A bias by offset reads the offset on the grid, not within the class."""
    spec = {"tokens": [12], "heads": 1, "head_dim": 16, "mask": _dilated(2), "scores": [{"kind": "relative_bias", "extent": [12]}]}
    (bias,) = order_tokens(lower(AttentionSpec.model_validate(spec))).find(GraphOp.MAP)
    assert variables(bias["value"]) >= {"q0", "k0"}
    table = np.arange(23.0)[None]
    value = evaluate(bias["value"], {"s": 0.0, "h": 0, "q0": 1, "k0": 4, "r0": 1, "relative_bias": table})
    assert float(value) == (4 * 2 + 1) - (1 * 2 + 1) + 11


def test_class_lengths_cover_the_axis() -> None:
    graph = canonical(tokens=[11], mask={"kind": "predicate", "text": "q % 4 == k % 4"})
    assert [int(evaluate(class_length("q", 0, graph), {"r0": r})) for r in range(4)] == [3, 3, 3, 2]
