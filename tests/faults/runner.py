"""Applies faults one at a time in a copy of the tree and says which of the named tests failed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".hypothesis", ".*_cache")
TESTS_FAILED = 1  # pytest's exit code; any other but 0 means that the tests did not run


@dataclass(frozen=True)
class Fault:
    """One seeded mistake: `old`, which occurs once in `file`, becomes `new`, and every one of `tests` must fail.

    A test is named as pytest does, `tests/folder/test_x.py::test_y`; without its parameters, one failing case will do.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What became of one fault: caught if every named test failed and nothing else was wrong."""

    fault: Fault
    missed: tuple[str, ...]
    problem: str
    seconds: float

    @property
    def caught(self) -> bool:
        return not self.missed and not self.problem

    def __str__(self) -> str:
        word = "caught    " if self.caught else "NOT caught"
        why = f": {self.problem}" if self.problem else "".join(f"\n           {test} passed" for test in self.missed)
        return f"{word} {self.fault.name} ({self.seconds:.0f} s){why}"


class CannotJudge(Exception):
    """The fault does not apply, or its tests did not run: that says nothing about the tests."""


def copy_tree(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True, ignore=NOT_COPIED)
    return target


@contextmanager
def applied(fault: Fault, tree: Path) -> Iterator[None]:
    """The tree with the fault in it; the file is put back afterwards."""
    path = tree / fault.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(fault.old) != 1:
        raise CannotJudge(f"{fault.old!r} occurs {text.count(fault.old)} times in {fault.file}, not once")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def environment(tree: Path, interpret: bool, caches: str) -> dict[str, str]:
    """This process's, but: the tree's own code, nothing compiled before, the same examples on every run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ATTNCC", "TRITON", "PYTEST"))}
    fixed = {
        "HYPOTHESIS_PROFILE": "faults",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a fault of the same length, in the same second, would find the old bytecode
        "PYTHONPATH": str(tree),
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "XDG_CACHE_HOME": caches,
    }
    return kept | fixed | ({"TRITON_INTERPRET": "1"} if interpret else {})


def failures(tree: Path, tests: Sequence[str], interpret: bool, limit: float) -> list[str]:
    """The ids of the cases that failed, of all that `tests` name, in one pytest process."""
    options = ["-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider", "--color=no"]
    with tempfile.TemporaryDirectory() as caches:
        process = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env=environment(tree, interpret, caches),
            capture_output=True,
            text=True,
            timeout=limit,
            stdin=subprocess.DEVNULL,
        )
    if process.returncode < 0:  # killed by a signal: the fault reads or writes memory that is not its own
        return list(tests)
    if process.returncode not in (0, TESTS_FAILED):
        last = (process.stdout + process.stderr).strip().splitlines()[-1:]
        raise CannotJudge(f"the tests did not run: {''.join(last)}")
    return re.findall(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", process.stdout, re.MULTILINE)


def failing(tree: Path, tests: Iterable[str], limit: float) -> set[str]:
    """Those of `tests` of which a case failed; interpreter tests run in a process of their own."""
    wanted = tuple(dict.fromkeys(tests))
    failed: list[str] = []
    for interpret in (False, True):
        mine = [test for test in wanted if test.startswith("tests/interpreter") == interpret]
        if mine:
            failed += failures(tree, mine, interpret, limit)
    return {test for test in wanted if any(case == test or case.startswith((f"{test}[", f"{test}::")) for case in failed)}


def judge(fault: Fault, tree: Path, limit: float = 300.0) -> Verdict:
    """Apply one fault in `tree`, run its tests for at most `limit` seconds a process, and take it out again."""
    start, missed, problem = time.perf_counter(), tuple[str, ...](), ""
    try:
        with applied(fault, tree):
            failed = failing(tree, fault.tests, limit)
        missed = tuple(test for test in fault.tests if test not in failed)
    except CannotJudge as reason:
        problem = str(reason)
    except subprocess.TimeoutExpired:
        problem = f"its tests ran past {limit:.0f} s"
    return Verdict(fault, missed, problem, time.perf_counter() - start)


def already_failing(faults: Iterable[Fault], tree: Path, limit: float = 900.0) -> set[str]:
    """Named tests that fail without any fault: they would prove nothing."""
    return failing(tree, (test for fault in faults for test in fault.tests), limit)


def judge_all(faults: Sequence[Fault], root: Path = ROOT, jobs: int = 2) -> Iterator[Verdict]:
    """Verdicts in the table's order, `jobs` at a time, each job in a copy of `root` of its own.

    Raises:
        CannotJudge: a named test fails, or cannot run, in the tree as it is.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        first = copy_tree(root, Path(folder, "0"))
        if broken := already_failing(faults, first):
            raise CannotJudge(f"these fail without any fault: {', '.join(sorted(broken))}")
        for tree in [first, *(copy_tree(root, Path(folder, str(job))) for job in range(1, jobs))]:
            trees.put(tree)

        def in_a_free_tree(fault: Fault) -> Verdict:
            tree = trees.get()
            try:
                return judge(fault, tree)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(in_a_free_tree, faults)
