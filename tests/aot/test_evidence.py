"""A sample of the covering array compiles, fits its targets and spills nothing; `make evidence` compiles all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import evidence
from benchmarks.compiled import Record
from benchmarks.variants import TARGETS


def test_a_sample_has_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    code = evidence.main(["--sample", "12", "--quiet"])
    assert code == 0, capsys.readouterr().out


def test_samples_are_fixed_and_even() -> None:
    sample = evidence.jobs(12)
    assert sample == evidence.jobs(12)
    assert [job["target"] for job in sample] == [*TARGETS, *TARGETS]
    assert len({json.dumps(job["row"]) for job in sample}) == 12


def record(target: str, **changed: object) -> Record:
    row = evidence.jobs(1)[0]["row"]
    figures = {"q_tile": [8, 16], "k_tile": [4, 16], "warps": 8, "stages": 2, "registers": 200, "shared_bytes": 65536, "tensor_columns": 0}
    return {"row": row, "target": target, **figures, "spills": 0, "stack_bytes": 0, "problems": [], "seconds": 1.0, **changed}


def test_tables_show_what_is_wrong(tmp_path: Path) -> None:
    records = [record(name) for name in TARGETS]
    records[1] = record("sm_86", problems=["9 spilled registers"], spills=9)
    records[2] = {"row": records[0]["row"], "target": "sm_89", "problems": ["CompileError: no"], "failed": True}
    assert len(evidence.problems(records)) == 2
    evidence.write(records, tmp_path)
    [text] = [path.read_text() for path in tmp_path.glob("*.md")]
    assert "| 8·16 x 4·16, 8/2; 200; 64 | **8·16 x 4·16, 8/2; 200; 64** | **failed** |" in text
    [data] = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert [r["target"] for r in data["kernels"]] == list(TARGETS) and "seconds" not in data["kernels"][0]
