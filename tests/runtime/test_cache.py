"""The cache of generated files: whole or absent, verified, shared by processes, and not needed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import attncc
from attncc import AttentionSpec, Plan, knobs, masks, pipeline
from attncc.errors import CacheError
from attncc.runtime import cache

SPEC = AttentionSpec(tokens=(None,), heads=2, head_dim=32, mask=masks.Causal())
SPEC_JSON = SPEC.to_json(indent=None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    cache._modules.clear()
    cache._unusable.clear()
    with knobs.scope(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"
    cache._modules.clear()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return pipeline.plan(SPEC, "sm_80")


def only_entry() -> Path:
    (entry,) = cache.entries()
    return entry


def test_a_file_is_named_by_kernel_target_and_digest(folder: Path) -> None:
    kernel = attncc.compile(SPEC, "sm_80")
    assert re.fullmatch(r"attention_1d_softmax_forward-sm_80-[0-9a-f]{16}\.py", only_entry().name)
    assert only_entry().read_text().endswith(kernel.source)
    assert [p for p in folder.iterdir() if p != only_entry() and p.name != ".lock"] == []


def test_the_module_is_the_file(folder: Path, plan: Plan) -> None:
    module = cache.module(plan, SPEC_JSON)
    assert module.forward.__code__.co_filename == str(only_entry())
    assert cache.module(plan, SPEC_JSON) is module
    # What Triton reads of a kernel is what stands in the file.
    import inspect

    lines, first = inspect.getsourcelines(module.forward)
    assert "".join(lines) in only_entry().read_text() and only_entry().read_text().splitlines()[first - 1] == lines[0].rstrip()


def test_a_cached_text_is_not_printed_again(folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    text = cache.source(plan, SPEC_JSON)
    monkeypatch.setattr(cache, "emit", lambda *_: pytest.fail("printed again"))
    assert cache.source(plan, SPEC_JSON) == text


def test_the_key_changes_with_whatever_changes_the_text(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = plan.kernels[0]
    changes: list[dict[str, Any]] = [
        {"q_tile": (16,)}, {"k_tile": (16,)}, {"num_warps": 2}, {"num_stages": 1}, {"mask_policy": "every tile"},
        {"row_order": "ascending"}, {"block_mask": "lists"}, {"name": "another"},
        {"body": tuple(line.replace("scale=", "scale=1") for line in kernel.body)},
    ]  # fmt: skip
    plans = [plan, *(plan.model_copy(update={"kernels": (kernel.model_copy(update=change),)}) for change in changes)]
    plans += [plan.model_copy(update={"target": "sm_90"}), plan.model_copy(update={"spec": "0" * 64})]
    names = [cache.entry_name(Plan.model_validate(p.model_dump())) for p in plans]
    assert len(set(names)) == len(plans)
    monkeypatch.setattr(cache, "VERSION", "9.9.9")
    assert cache.entry_name(plan) not in names
    monkeypatch.undo()
    monkeypatch.setattr(cache, "printer_digest", lambda: "other")
    assert cache.entry_name(plan) not in names


def test_the_key_covers_every_file_that_prints() -> None:
    """A module that printing imports must be in a folder that the digest reads; exports to other libraries print nothing."""
    import ast

    package = Path(cache.__file__).parents[1]
    read = {path.name for part in cache._PRINTS for path in (package / part).iterdir()}
    for part in cache._PRINTS:
        for path in (package / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attncc."):
                    home = (node.module or "").split(".")[1]
                    assert home in (*cache._PRINTS, "errors", "version", "integrations"), f"{path} imports {node.module}"
    assert "visit.py" in read


def test_the_digest_reads_folders_in_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of a spec are a package inside `spec`; a change there may print another file."""
    read: list[Path] = []
    plain = Path.read_bytes

    def reading(path: Path) -> bytes:
        read.append(path)
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    cache.printer_digest.__wrapped__()
    package = Path(cache.__file__).parents[1]
    assert {*read} == {path for part in cache._PRINTS for path in (package / part).rglob("*.py")}
    assert package / "spec" / "masks" / "windows.py" in read


def test_rejected_candidates_do_not_change_the_key(plan: Plan) -> None:
    kernel = plan.kernels[0].model_copy(update={"rejected": ()})
    assert cache.entry_name(plan.model_copy(update={"kernels": (kernel,)})) == cache.entry_name(plan)


TAMPERED: dict[str, Callable[[str], str]] = {
    "a line more": lambda text: text + "import os\n",
    "a word changed": lambda text: text.replace("tl.float32", "tl.float16"),
    "cut short": lambda text: text[: len(text) // 2],
    "no record": lambda text: text.partition("\n")[2],
    "empty": lambda text: "",
    "another file": lambda text: "print('mine')\n",
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_file_that_is_not_what_was_written_is_refused(how: str, folder: Path, plan: Plan) -> None:
    cache.source(plan, SPEC_JSON)
    path = only_entry()
    path.write_text(TAMPERED[how](path.read_text()))
    for load in (cache.source, cache.module):
        with pytest.raises(CacheError, match=rf"{path.name} is not what attncc wrote there.*attncc cache clear"):
            load(plan, SPEC_JSON)
    with pytest.raises(CacheError):
        attncc.compile(SPEC, "sm_80", plan=plan)
    assert cache.clear() == 1
    cache.source(plan, SPEC_JSON)


def unusable(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the cache directory one that cannot be written, in ways that hold for root too."""
    if kind == "a file in its place":
        folder.write_text("")
    if kind == "read-only":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        folder.mkdir()
        monkeypatch.setattr(tempfile, "mkstemp", refuse)
    if kind == "full":
        monkeypatch.setattr(os, "fdopen", full_disk)


def full_disk(handle: int, mode: str):
    """A file that takes a few bytes and no more."""
    file = open(handle, mode)  # noqa: SIM115
    write = file.write

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            file.close()

        def write(self, data: bytes) -> None:
            write(data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return Full()


@pytest.mark.parametrize("kind", ["a file in its place", "read-only", "full"])
def test_a_directory_that_cannot_be_used(kind: str, folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    unusable(kind, folder, monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"attncc cannot write its cache .*; generated files stay in memory. ATTNCC_CACHE_DIR"):
        text = cache.source(plan, SPEC_JSON)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        module = cache.module(plan, SPEC_JSON)
    assert module.__name__ in sys.modules and not Path(module.forward.__code__.co_filename).exists()
    import inspect

    assert inspect.getsource(module.forward) in text
    left = list(folder.iterdir()) if folder.is_dir() else []
    assert [path for path in left if path.name != ".lock"] == [], "nothing half-written"


def test_a_read_only_directory_still_serves_what_it_has(folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    text = cache.source(plan, SPEC_JSON)
    unusable("full", folder, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.source(plan, SPEC_JSON) == text


def test_an_interrupted_write_leaves_no_entry(folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.source(plan, SPEC_JSON)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def compile_in_a_process(folder: str, barrier, results) -> None:
    with knobs.scope(cache_dir=Path(folder)):
        pinned = Plan.from_json(results.get())
        barrier.wait()
        results.put(attncc.compile(SPEC, "sm_80", plan=pinned).source)


def test_processes_compile_the_same_spec_at_once(folder: Path, plan: Plan) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    for _ in range(2):
        queue.put(plan.to_json())
    workers = [context.Process(target=compile_in_a_process, args=(str(folder), barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert queue.get() == queue.get() == cache.source(plan, SPEC_JSON)
    assert {path.name for path in folder.iterdir()} == {only_entry().name, ".lock"}


def test_clear_spares_what_is_not_ours(folder: Path, plan: Plan) -> None:
    cache.source(plan, SPEC_JSON)
    (folder / "mine.py").write_text("x = 1\n")
    (folder / ".killed.tmp").write_text("half")
    assert cache.clear() == 1
    assert {path.name for path in folder.iterdir()} == {"mine.py", ".lock"}


def test_clear_of_a_cache_that_is_not_there(folder: Path) -> None:
    assert cache.clear() == 0 and cache.entries() == []
