"""Runs independent block tasks on CPU worker threads, one torch thread each.

Torch alone would split every small operator over its threads and wait for all of them a dozen times a block; on a
shared machine each wait can cost a scheduler slice. Here a thread keeps its block in its own L2 and waits once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def worker_count(device: torch.device) -> int:
    """How many tasks can run at once: torch's thread count on a CPU, else 1 (a device queue needs one feeder)."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def host_reads(device: torch.device) -> bool:
    """Whether the host can look at tensors without waiting. It never waits for a device: CUDA graphs could not be captured."""
    return device.type == "cpu"


def capturing(device: torch.device) -> bool:
    """Whether what runs on a device now is recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def run_tasks(tasks: Sequence[Callable[[], None]], workers: int) -> None:
    """Run `tasks`, started in order; returns when all are done, raising the first error."""
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            task()
        return
    inference = torch.is_inference_mode_enabled()
    futures = [_pool(workers).submit(_run, task, inference) for task in tasks]
    wait(futures)
    for future in futures:
        future.result()


def _run(task: Callable[[], None], inference: bool) -> None:
    """Run a task in its caller's mode, which is per thread: inference tensors can be written in inference mode only."""
    with torch.inference_mode(inference):
        task()


def _alone() -> None:
    """Torch runs this thread's operators on it alone."""
    torch.set_num_threads(1)
    # A thread takes the default, which is not this setting, when it is first asked for its own: ask now.
    torch.get_num_threads()


def _pool(workers: int) -> ThreadPoolExecutor:
    """The pool of this process (threads do not survive a fork) with `workers` threads."""
    key = (os.getpid(), workers)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(workers, "attncc", _alone)
            started = threading.Barrier(workers)
            for future in [_pools[key].submit(started.wait) for _ in range(workers)]:
                future.result()
            # The workers' setting also became the default of new threads: restore it.
            torch.set_num_threads(workers)
        return _pools[key]


class Turn:
    """Orders the additions of tasks that share a target, so that sums do not depend on timing."""

    def __init__(self, previous: Turn | None) -> None:
        self._previous = previous
        self._done = threading.Event()

    def wait(self) -> None:
        """Return once the task before is done; it has been started, for tasks start in order."""
        if self._previous is not None:
            self._previous._done.wait()

    def done(self) -> None:
        """Let the next task add; to be called even after an error."""
        self._previous = None
        self._done.set()
