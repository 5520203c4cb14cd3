"""Work in a process of its own: plain data in, plain data out, one line of JSON each way.

A crash, a hang, or a device error that nothing in a process survives then costs one job and not the run. The process starts on first
use and again after a failure; it never sees TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

ROOT = Path(__file__).parents[1]


class JobError(RuntimeError):
    """A job raised, took too long, or killed its process; the message says which."""


class Worker:
    """One process that calls one function, `"module:name"`, on jobs."""

    def __init__(self, function: str, environment: dict[str, str] | None = None) -> None:
        self.function, self.environment = function, environment or {}
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def __call__(self, job: Any, timeout: float) -> Any:
        """The function's result.

        Raises:
            JobError: whatever went wrong.
        """
        process, late = self._started(), threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            answer = self._asked(process, job)
        finally:
            timer.cancel()
        if answer is None:
            raise JobError(self._end(f"no answer in {timeout:.0f} s" if late.is_set() else "the process died"))
        if "error" in answer:
            self.close()  # the device may be in any state
            raise JobError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | self.environment
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
            self._log = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the process
            command = [sys.executable, "-m", "benchmarks.workers", self.function]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=environment)
        return self._process

    @staticmethod
    def _asked(process: subprocess.Popen[str], job: Any) -> dict[str, Any] | None:
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps(job), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line else None

    def _end(self, why: str) -> str:
        """Ends the process; `why`, its exit code and its last words."""
        assert self._process is not None and self._log is not None
        self._process.kill()
        code = self._process.wait()
        self._process = None
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-4:]
        return " | ".join([f"{why} (exit code {code})", *last])


Outcome = tuple[Any, Any]
"""A job, and its result or the JobError."""


def run_all(
    function: str, jobs: Iterable[Any], workers: int, timeout: float, environment: dict[str, str] | None = None
) -> Iterator[Outcome]:
    """Results of many jobs as they come, in the order of the jobs."""
    free: SimpleQueue[Worker] = SimpleQueue()
    made: Sequence[Worker] = [Worker(function, environment) for _ in range(workers)]
    for worker in made:
        free.put(worker)

    def run(job: Any) -> Outcome:
        worker = free.get()
        try:
            return job, worker(job, timeout)
        except JobError as error:
            return job, error
        finally:
            free.put(worker)

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(run, jobs)
        finally:
            for worker in made:
                worker.close()


def main() -> None:
    """The process behind a worker. What jobs print goes to standard error: standard output carries results alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    function: Callable[[Any], Any] = getattr(import_module(module), name)
    for line in sys.stdin:
        try:
            answer = {"result": function(json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
