"""The fixtures of conftest.py do what tests rely on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.conftest import Golden


def test_a_seed_gives_the_same_examples_whatever_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[int]:
        found: list[int] = []

        @seed(1)
        @settings(max_examples=300, database=None)
        @given(st.integers())
        def run(n: int) -> None:
            found.append(n)

        run()
        return found

    before = drawn()
    path = tmp_path / "numbers.py"
    path.write_text(f"MANY = {[1000 * n + 17 for n in range(100)]}\n", encoding="utf-8")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("numbers_", path))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "numbers_", module)
    assert drawn() == before


@pytest.mark.usefixtures("poisoned")
def test_fresh_memory_is_poison() -> None:
    like = torch.ones(3)
    fresh = [torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty(3, dtype=torch.bfloat16)]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).min).all()


def test_poison_ends_with_its_test() -> None:
    assert torch.empty.__module__ != __name__
    assert "new_empty" not in vars(torch.Tensor)


def test_golden_agrees(golden: Golden) -> None:
    golden("one\ntwo\n")


def test_golden_shows_the_difference(golden: Golden, tmp_path) -> None:
    golden.stem = tmp_path / "text"
    golden.update = True
    golden("one\ntwo\n")
    golden.update = False
    with pytest.raises(pytest.fail.Exception, match=r"-two\n\+three"):
        golden("one\nthree\n")
    with pytest.raises(pytest.fail.Exception, match="missing"):
        golden("one\n", "other")
