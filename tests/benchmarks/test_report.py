"""Tables and progress."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def test_tables_need_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    importing = builtins.__import__

    def without_rich(name: str, *rest: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    report.print_table("title", ["case", "ms"], [["a long name", "1.5"], ["b", "10.25"]], "a note")
    assert capsys.readouterr().out.splitlines() == ["title", "case            ms", "a long name    1.5", "b            10.25", "a note"]


def test_markdown_escapes_bars() -> None:
    assert report.markdown_table(["a"], [["x | y"]]) == ["| a |", "| --- |", "| x \\| y |"]


def test_progress_says_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(report.tracked(range(40), 40, "doing")) == list(range(40))
    assert capsys.readouterr().err.splitlines() == [f"doing {n}/40" for n in range(4, 41, 4)]


def test_a_wrong_kernel_can_be_written_down(tmp_path: Path) -> None:
    """The error of a kernel that gives NaN is NaN."""
    report.write_json(tmp_path / "new" / "a.json", {"x": 1.5, "cases": [{"error": float("nan")}, (float("inf"), 1)]})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1.5, "cases": [{"error": "nan"}, ["inf", 1]]}


def test_environment_is_plain_data() -> None:
    found = report.environment()
    assert json.loads(json.dumps(found)) == found and found["torch"] and found["cpu"]
