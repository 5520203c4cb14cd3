"""The GPU harness around the device: what it does with results, failures and the time it has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attncc
from attncc import AttentionSpec, masks
from benchmarks import report
from benchmarks.gpu import __main__ as harness
from benchmarks.gpu import timing
from benchmarks.gpu.cases import Case, by_name
from benchmarks.workers import JobError

TIMES = {"attncc": {"ms": 2.0, "low": 1.9, "high": 2.2}, "host_us": 40.0, "useful_tflops": 300.0, "hardware_tflops": 320.0}
RIVALS = {
    "sdpa_flash": {"ms": 8.0},
    "sdpa_cudnn": {"ms": 6.0},
    "sdpa_math": {"skipped": "no"},
    "own_dense": {"ms": 9.0},
    "flex": {"ms": 3.0},
}
CHECKED = {"ok": True, "layouts": {"bhsd": {"error": 2e-3}, "bshd": {"error": 3e-3}}}


class FakeWorker:
    """Answers at once, or fails."""

    def __init__(self, function: str, environment: Any) -> None:
        self.jobs: list[Any] = []

    def __call__(self, job: Any, timeout: float) -> Any:
        if job["case"] == "window 4096":
            raise JobError("the process died (exit code -11)")
        return {**TIMES, **RIVALS, "tile_bound": 4.0, "predicted_ms": 1.5}

    def close(self) -> None:
        pass


def fake_checks(function: str, jobs: list[Any], *rest: Any) -> Iterator[Any]:
    for job in jobs:
        yield job, {**CHECKED, "ok": job["case"] != "causal d64"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> harness.Run:
    monkeypatch.setattr(harness, "Worker", FakeWorker)
    monkeypatch.setattr(harness, "run_all", fake_checks)
    return harness.Run(["causal d128", "window 4096", "causal d64"], True, tmp_path / "some" / "gpu.json", {"gpu": "none"})


def test_one_failure_does_not_stop_the_rest(run: harness.Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.check(2)
    run.time()
    lines = harness.lines_of(run.records)
    assert [len(line) for line in lines] == [len(harness.COLUMNS)] * 3
    assert lines[0] == [
        "causal d128",
        "3e-03",
        "2.000",
        "1.900-2.200",
        "1.500 (-25%)",
        "40",
        "300",
        "320",
        "4.00",
        "4.50",
        "6.000 cudnn",
        "3.00",
        "3.000",
        "1.50",
    ]
    assert lines[1][2] == "FAILED" and lines[2][1].startswith("WRONG")
    assert len(run.failures()) == 2
    kept = json.loads(run.path.read_text())
    assert kept["quick"] and list(kept["cases"]) == list(run.records)
    report.print_table("title", harness.COLUMNS, lines)
    assert "cudnn" in capsys.readouterr().out


def test_no_case_begins_without_time(run: harness.Run) -> None:
    run.until = time.time() + 10
    run.time()
    assert all(parts["times"] == {"skipped": "out of time"} for parts in run.records.values())
    assert run.failures() == []


def test_the_best_backend_of_a_causal_case_skips_what_is_forbidden() -> None:
    assert harness.best_sdpa({"sdpa_flash": {"ms": 1.0}, "sdpa_causal_flash": {"ms": 0.6}, "sdpa_causal_math": {"skipped": ""}}) == (
        0.6,
        "causal flash",
    )
    assert harness.best_sdpa({"sdpa_math": {"skipped": ""}}) == (None, "")


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing without a device."""

    def times(run: Callable[[], Any], repeat_ms: int) -> dict[str, float]:
        run()
        return {"ms": 1.0, "low": 1.0, "high": 1.0}

    monkeypatch.setattr(timing, "times", times)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "flex", lambda *a: 1 / 0)


@pytest.mark.usefixtures("clockwork")
def test_every_rival_is_timed_or_says_why_not() -> None:
    spec = AttentionSpec(tokens=(96,), heads=4, key_heads=2, head_dim=16, dtype="float32", mask=masks.Causal())
    record = timing.measure(Case("tiny", spec, spec, (96,), (96,)), time.time() + 100, quick=False, device="cpu")
    assert record["attncc"]["ms"] == record["own_dense"]["ms"] == record["sdpa_math"]["ms"] == record["sdpa_causal_math"]["ms"] == 1.0
    assert record["flex"]["skipped"].startswith("ZeroDivisionError")
    assert record["flop_bound"] == pytest.approx(2 * 96 / 97, abs=1e-3)
    # 4 heads, 96 * 97 / 2 pairs, twice 16 columns, a multiply and an add each, in a millisecond
    assert record["useful_tflops"] == pytest.approx(4 * 96 * 97 / 2 * 32 * 2 / 1e9, abs=0.01)
    assert record["hardware_tflops"] >= record["useful_tflops"]


@pytest.mark.usefixtures("clockwork")
def test_what_no_longer_fits_is_skipped() -> None:
    spec = AttentionSpec(tokens=(64,), heads=1, head_dim=16, dtype="float32")
    record = timing.measure(Case("tiny", spec, spec, (64,), (64,)), time.time() + 5, quick=True, device="cpu")
    assert record["flex"] == record["own_dense"] == {"skipped": "out of time"}
    assert not any(name.endswith(timing.SLOW) for name in record)


def test_bounds_of_a_case_that_reads_labels() -> None:
    case = by_name("packed documents")
    found = timing.counts(case, attncc.compile(case.spec, target="sm_90"))
    assert found.all_pairs == 32768**2 and 1 < found.tile_bound <= found.flop_bound
