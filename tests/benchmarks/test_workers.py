"""A worker outlives what its jobs do to its process."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from benchmarks.workers import JobError, Worker, run_all

HERE = "tests.benchmarks.test_workers:work"


def work(job: dict[str, Any]) -> Any:
    """Runs in the worker."""
    print("not an answer")
    if job["do"] == "sleep":
        time.sleep(60)
    if job["do"] == "die":
        print("last words", flush=True)
        os._exit(7)
    if job["do"] == "raise":
        raise ValueError("no such thing")
    return {"process": os.getpid(), "interpret": os.environ.get("TRITON_INTERPRET"), **job}


@pytest.mark.parametrize(
    ("do", "message"),
    [("raise", "ValueError: no such thing"), ("die", r"died \(exit code 7\).*last words"), ("sleep", r"no answer in 3 s")],
)
def test_a_failure_costs_one_job(do: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    worker = Worker(HERE)
    first = worker({"do": "work"}, 60)
    assert first["interpret"] is None and first == worker({"do": "work"}, 60), "one process for both"
    with pytest.raises(JobError, match=message):
        worker({"do": do}, 3)
    assert worker({"do": "work"}, 60)["process"] != first["process"]
    worker.close()


def test_many_jobs_keep_their_order() -> None:
    jobs = [{"do": "raise" if i == 2 else "work", "i": i} for i in range(6)]
    outcomes = list(run_all(HERE, jobs, workers=2, timeout=60))
    assert [job for job, _ in outcomes] == jobs
    assert [isinstance(result, JobError) for _, result in outcomes] == [i == 2 for i in range(6)]
    assert len({result["process"] for i, (_, result) in enumerate(outcomes) if i != 2}) >= 2
