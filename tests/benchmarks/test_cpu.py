"""What the CPU benchmark says of its figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attncc
from attncc import AttentionSpec, masks
from benchmarks import cpu, rivals
from benchmarks.bounds import work
from benchmarks.inputs import packed


def record(case: str, **times: float) -> dict[str, Any]:
    both = {"attncc": 10.0, "sdpa": 100.0}
    return {
        "case": case,
        "tile_bound": 20.0,
        "forward_ms": {"attncc": 10.0, "sdpa": 100.0, "flex": 20.0, **times},
        "forward_backward_ms": both,
    }


def test_goals() -> None:
    assert cpu.missed([record("window ±512"), record("packed documents")], {"times_inputs": 3.9}) == []
    assert len(cpu.missed([record("packed documents", sdpa=60.0)], {"times_inputs": 4.1})) == 2
    assert len(cpu.missed([record("window ±512", sdpa=45.0, flex=14.0)], {})) == 3
    assert cpu.lines_of(record("any"))[1][4:7] == ["-", "10.00", "-"]


def test_a_case_is_measured_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "flex_block_mask", lambda *a, **k: 1 / 0)
    for case in cpu.cases(64 * 64)[:2]:
        small = cpu.Case(
            case.name, (256,), case.mask if case.labels is not None else masks.SlidingWindow(left=9, right=9), case.mod, packed(256, 8, 32)
        )
        small = small if case.labels is not None else cpu.Case(case.name, (256,), small.mask, case.mod)
        found = cpu.measure(small, rounds=1)
        assert set(found["forward_ms"]) == set(found["forward_backward_ms"]) == {"attncc", "sdpa"}
        assert found["flex"].startswith("ZeroDivisionError")


@pytest.mark.parametrize("at", range(3, 7))
def test_cases_without_flex_are_measured(at: int) -> None:
    case = cpu.cases(36 * 36)[at]
    found = cpu.measure(case, rounds=1)
    assert set(found["forward_ms"]) == {"attncc", "sdpa"} and found["flex"] == "not compared"


def test_memory_is_that_of_the_pass() -> None:
    found = cpu.measured_memory(2048)
    assert found["input_bytes"] == 3 * 4 * 2048 * 64 * 4
    assert 0 < found["times_inputs"] < 60


def test_documents_fill_the_row_in_order() -> None:
    labels = packed(16384)
    assert labels.shape == (1, 16384) and labels.dtype is torch.int32
    lengths = torch.bincount(labels[0])[1:]
    assert (labels.diff() >= 0).all() and lengths[:-1].min() >= 64 and lengths.max() <= 4096 and len(lengths) > 8


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(left=20, right=5), masks.Segments()])
def test_counts_of_work(mask: masks.Mask) -> None:
    spec = AttentionSpec(tokens=(300,), heads=1, head_dim=16, dtype="float32", mask=mask)
    plan = attncc.compile(spec, target="cpu").plan.kernels[0]
    q, k = np.arange(300)[:, None], np.arange(300)
    labels = packed(300, 8, 64).numpy()
    allowed = {"causal": k <= q, "sliding_window": (k >= q - 20) & (k <= q + 5), "segments": labels[0][:, None] == labels[0]}[mask.kind]
    found = work(plan, (300,), (300,), {"segments": labels})
    (rows,), (columns,) = plan.q_tile, plan.k_tile
    touched = {(i // rows, j // columns) for i, j in zip(*np.nonzero(allowed))}
    assert (found.pairs, found.visited) == (allowed.sum(), len(touched))
    assert found.tiles == -(-300 // rows) * -(-300 // columns)
    assert found.useful_flops(2, (16, 16)) == 2 * 2 * 32 * allowed.sum()


def test_flex_masks_mean_the_neighborhood() -> None:
    from tests.oracle import dense_mask

    grid, rule = (9, 10), {"window": [4, 3], "stride": [3, 1], "dilation": [2, 3]}
    index = torch.arange(90)
    found = rivals.neighborhood(grid, *rule.values())(0, 0, index[:, None], index)
    spec = {"tokens": [9, 10], "heads": 1, "mask": {"kind": "neighborhood", **rule}}
    assert np.array_equal(found.numpy(), dense_mask(spec, {}, 1)[0, 0])
