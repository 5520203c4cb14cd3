"""The simulator counts the rows that are routed, at all three levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attncc import AttentionSpec, masks, routing, simulate, simulate_many
from attncc.errors import InputError
from attncc.simulator.routed import compacted

HEADS, TOKENS = 8, 4096


def a_spec(part: Any, **fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"tokens": TOKENS, "heads": HEADS, "head_dim": 128, "mask": masks.Causal(), "routing": part, **fields})


@pytest.mark.parametrize(("shared", "top_k"), [(0, 1), (0, 4), (2, 2), (4, 4), (0, 8)])
def test_a_mixture_costs_its_share(shared: int, top_k: int) -> None:
    every, some = (simulate(a_spec(part), "h100") for part in (None, routing.MixtureOfHeads(shared=shared, top_k=top_k)))
    gain = HEADS / (shared + top_k)
    assert some.flop_bound == pytest.approx(every.flop_bound * gain)
    assert some.tile_bound == pytest.approx(every.tile_bound * gain)
    assert some.tiles.visited == pytest.approx(every.tiles.visited / gain)
    assert some.prediction and every.prediction and some.baseline_prediction == every.baseline_prediction
    assert some.prediction.milliseconds < every.prediction.milliseconds or gain == 1
    # A gathered tile visits what the last of its rows does, and with few heads these stand far apart.
    assert 0.999 <= some.prediction.busy["tensor"] / every.prediction.busy["tensor"] * gain <= 1 + 0.03 * gain


def test_weights_and_masks_that_are_given_are_counted() -> None:
    weights = np.zeros((2, HEADS, TOKENS))
    weights[0, 1, : TOKENS // 2], weights[1, 3] = 0.5, -1.0
    all_heads, tables = simulate(a_spec(None), "h100"), {"routing": weights}
    assert simulate(a_spec(routing.MixtureOfHeads(top_k=1)), "h100", tables=tables).flop_bound == pytest.approx(
        all_heads.flop_bound * 16 / 1.5
    )
    assert simulate(a_spec(routing.ReLURouting()), "h100", tables=tables).flop_bound == pytest.approx(all_heads.flop_bound * 16 / 0.5)
    assert simulate(a_spec(routing.ReLURouting(shared=2)), "h100", tables=tables).flop_bound == pytest.approx(all_heads.flop_bound * 16 / 4)
    on = {"head_mask": np.arange(HEADS) % 4 == 0}
    assert simulate(a_spec(routing.HeadMask()), "h100", tables=on).tile_bound == pytest.approx(all_heads.tile_bound * 4)


@pytest.mark.parametrize("part", [routing.HeadScale(), routing.ReLURouting(), routing.HeadMask()])
def test_all_rows_are_counted_where_nothing_says_otherwise(part: Any) -> None:
    report, every = simulate(a_spec(part), "h100"), simulate(a_spec(None), "h100")
    assert (report.flop_bound, report.tile_bound, report.tiles) == (every.flop_bound, every.tile_bound, every.tiles)


def test_no_head_at_all() -> None:
    report = simulate(a_spec(routing.HeadMask()), "h100", tables={"head_mask": np.zeros(HEADS, bool)})
    assert report.flop_bound == report.tile_bound == float("inf") and report.sparsity == 1.0


def test_many_are_as_one_by_one() -> None:
    specs = [a_spec(routing.MixtureOfHeads(top_k=k)) for k in (1, 3)]
    assert simulate_many(specs, "h100", q_tile=(128,), k_tile=(128,)) == [simulate(s, "h100", (128,), (128,)) for s in specs]


def test_gathered_tiles_visit_what_the_widest_of_theirs_does() -> None:
    visited, full = np.arange(1.0, 9.0), np.arange(8.0)
    assert [x.tolist() for x in compacted(visited, full, 0.5)] == [[2, 4, 6, 8], [0, 2, 4, 6]]
    assert [x.tolist() for x in compacted(visited, full, 1.0)] == [visited.tolist(), full.tolist()]
    assert compacted(visited, full, 0.3)[0].tolist() == [3, 6, 8] and len(compacted(visited, full, 0.0)[0]) == 0


@pytest.mark.parametrize(
    ("part", "tables", "problem"),
    [
        (routing.ReLURouting(), {"routing": np.ones((2, TOKENS, HEADS))}, r"tables: routing has shape .*, must be \[B, H, NQ\]"),
        (routing.HeadMask(), {"head_mask": np.ones((2, HEADS))}, r"tables: head_mask has shape \[2, 8\], must be \[H\] = \[8\]"),
        (routing.HeadMask(), {"head_mask": 1}, r"tables: head_mask has shape \[\]"),
    ],
)
def test_tables_of_another_shape_are_refused(part: Any, tables: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        simulate(a_spec(part), "h100", tables=tables)
