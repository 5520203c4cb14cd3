"""Covering arrays cover every legal pair, and are small."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.covering import covering_array, pairs, pairs_of
from benchmarks.variants import FACTORS, array, legal, spec_of


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(0, 3))
def test_every_pair_occurs(sizes: list[int], seed: int) -> None:
    factors = {f"f{i}": [f"v{j}" for j in range(n)] for i, n in enumerate(sizes)}
    rows = covering_array(factors, seed=seed)
    assert all(list(row) == list(factors) for row in rows)
    assert {pair for row in rows for pair in pairs_of(row)} == set(pairs(factors))
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(rows) <= 2 * first * second + 4


def test_what_is_not_legal_does_not_occur() -> None:
    factors = {"a": ["0", "1", "2"], "b": ["0", "1", "2"], "c": ["0", "1"]}

    def unequal(row: Mapping[str, str]) -> bool:
        return "a" not in row or row["a"] != row.get("b")

    rows = covering_array(factors, unequal)
    assert all(row["a"] != row["b"] for row in rows)
    assert {(row["a"], row["b"]) for row in rows} == {(a, b) for a in "012" for b in "012" if a != b}


def test_rows_that_stand_already_stay() -> None:
    first = covering_array({"a": ["0", "1"], "b": ["0", "1"]})
    grown: dict[str, list[str]] = {"a": ["0", "1", "2"], "b": ["0", "1"]}
    rows = covering_array(grown, begun=first)
    assert rows[: len(first)] == first and {row["a"] for row in rows[len(first) :]} == {"2"}
    assert {pair for row in rows for pair in pairs_of(row)} == set(pairs(grown))


def test_the_array_of_the_evidence() -> None:
    rows = array()
    assert rows == array()
    assert {pair for row in rows for pair in pairs_of(row)} >= set(pairs(FACTORS, legal))
    assert all(map(legal, rows))
    least = max(sum(legal({a: x, b: y}) for x in FACTORS[a] for y in FACTORS[b]) for a, b in combinations(FACTORS, 2))
    assert least <= len(rows) <= 1.2 * least  # no array has fewer rows than two of its factors have pairs
    assert len({spec_of(row).digest + row["layout"] for row in rows}) == len(rows)


@pytest.mark.parametrize("row", array()[:8], ids=str)
def test_a_row_is_the_spec_it_says(row: dict[str, str]) -> None:
    spec = spec_of(row)
    assert (spec.grid.rank, spec.head_dim, spec.dtype) == (int(row["rank"]), int(row["head_dim"]), row["dtype"])
    assert (spec.tokens[0] is None) == (row["lengths"] == "open")
    assert (spec.gate is None) == (row["gate"] == "none")
