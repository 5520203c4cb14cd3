"""The fault runner, on a project of two files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.runner import CannotJudge, Fault, judge_all
from tests.faults.table import FAULTS

SUMS = """def add(a, b):
    return a + b

def twice(a):
    return a * 2
"""
TESTS = """import os, pytest, sums

@pytest.mark.parametrize("b", [0, 3])
def test_add(b):
    assert sums.add(2, b) == 2 + b

def test_twice():
    assert sums.twice(2) == 4  # squaring passes as well

def test_mode():
    assert "TRITON_INTERPRET" not in os.environ
"""
INTERPRETED = """import os, sums

def test_mode_and_add():
    assert os.environ["TRITON_INTERPRET"] == "1" and sums.add(1, 1) == 2
"""
ADD = Fault("sign", "sums.py", "a + b", "a - b", ("tests/test_sums.py::test_add",))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    files = {"sums.py": SUMS, "tests/test_sums.py": TESTS, "tests/interpreter/test_mode.py": INTERPRETED}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_verdicts(project: Path) -> None:
    both = ("tests/test_sums.py::test_add", "tests/interpreter/test_mode.py")
    faults = [
        replace(ADD, tests=both),
        replace(ADD, name="not noticed", old="a * 2", new="a * a", tests=("tests/test_sums.py::test_twice",)),
        replace(ADD, name="one of two", tests=(*ADD.tests, "tests/test_sums.py::test_twice")),
        replace(ADD, name="does not import", new="a +* b"),
        replace(ADD, name="ambiguous", old="return a", new="return b"),
        replace(ADD, name="gone", file="nowhere.py"),
        replace(ADD, name="crashes", old="return a + b", new="__import__('os').kill(__import__('os').getpid(), 11)"),
    ]
    verdicts = list(judge_all(faults, project))
    assert [verdict.caught for verdict in verdicts] == [True, False, False, False, False, False, True]
    assert verdicts[1].missed == verdicts[2].missed == ("tests/test_sums.py::test_twice",)
    assert [bool(verdict.problem) for verdict in verdicts] == [False, False, False, True, True, True, False]
    assert (project / "sums.py").read_text() == SUMS


def test_a_test_that_fails_anyway_proves_nothing(project: Path) -> None:
    (project / "sums.py").write_text(SUMS.replace("a + b", "a - b"))
    with pytest.raises(CannotJudge, match=r"test_add"):
        list(judge_all([replace(ADD, old="a * 2", new="a * 3")], project))


def test_a_test_that_is_not_there_is_reported(project: Path) -> None:
    with pytest.raises(CannotJudge, match="did not run"):
        list(judge_all([replace(ADD, tests=("tests/test_sums.py::test_gone",))], project))


def test_the_table_fits_the_tree() -> None:
    """Every fault still applies, so that `make faults` cannot rot unseen."""
    root = Path(__file__).parents[1]
    assert [fault.name for fault in FAULTS if (root / fault.file).read_text().count(fault.old) != 1] == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
