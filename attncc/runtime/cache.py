"""The disk cache of generated files: `<kernel>-<target>-<digest>.py`, one a plan.

The digest covers the plan, the version of attncc and the code that prints, so a file is never stale. A file's first line records the
hash of the rest; one that does not match is refused, for it would be executed. Files appear whole or not at all, whatever happens and
however many processes write. Where the directory cannot be used, modules live in memory only, and a warning says so once.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import json
import os
import sys
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from attncc import knobs
from attncc.codegen.module import emit
from attncc.errors import CacheError
from attncc.passes.plan import Plan
from attncc.version import VERSION

_MARK = "# attncc cache entry, sha256 of what follows: "
_PRINTS = ("ir", "spec", "passes", "codegen", "targets")
_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}
_unusable: set[Path] = set()


# ---- names ---------------------------------------------------------------------------------------------------------------------


def entry_name(plan: Plan) -> str:
    """Readable and unique: the kernel, the target, and a digest of everything that decides the generated text."""
    parts = json.dumps([plan.digest, VERSION, printer_digest()])
    return f"{plan.kernels[-1].name}-{plan.target}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


@lru_cache
def printer_digest() -> str:
    """SHA-256 of the source files that take part in printing."""
    package = Path(__file__).parents[1]
    files = sorted(path for part in _PRINTS for path in (package / part).rglob("*.py"))
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


# ---- text ----------------------------------------------------------------------------------------------------------------------


def source(plan: Plan, spec_json: str) -> str:
    """The generated file of a plan: from the cache, or printed and put there.

    Raises:
        CacheError: a cached file that is not what attncc wrote.
        UnsupportedError: a plan with no Triton form.
    """
    return _text(plan, spec_json)[0]


def _text(plan: Plan, spec_json: str) -> tuple[str, Path | None]:
    """The text, and the file it stands in (None: the cache directory cannot be used)."""
    directory = knobs.current().cache_dir
    path = directory / f"{entry_name(plan)}.py"
    found = _read(path)
    if found is not None:
        return found, path
    text = emit(plan, spec_json)
    try:
        _write(path, text)
    except OSError as error:
        _say_unusable(directory, error)
        return text, None
    return text, path


def _read(path: Path) -> str | None:
    """The verified text of an entry; None where there is none that can be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, _, body = content.partition(b"\n")
    if head.decode(errors="replace") != _MARK + hashlib.sha256(body).hexdigest():
        raise CacheError(f"cache: {path} is not what attncc wrote there, so it is not run; delete it (or: attncc cache clear) and retry")
    return body.decode()


def _write(path: Path, text: str) -> None:
    """Puts an entry in place, whole, unless another process has.

    Raises:
        OSError: the directory is read-only, full, or locked for long.
    """
    import filelock

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with filelock.FileLock(path.parent / ".lock", timeout=30):
        if not path.exists():
            _replace(path, f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def _replace(path: Path, content: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _say_unusable(directory: Path, error: OSError) -> None:
    if directory not in _unusable:
        _unusable.add(directory)
        reason = error.strerror or str(error)
        warnings.warn(
            f"attncc cannot write its cache {directory} ({reason}); generated files stay in memory. ATTNCC_CACHE_DIR names another folder.",
            RuntimeWarning,
            stacklevel=2,
        )


# ---- modules -------------------------------------------------------------------------------------------------------------------


class _Loader(importlib.abc.ExecutionLoader):
    """Runs a text that has been verified, not what the file may have become since."""

    def __init__(self, text: str, filename: str) -> None:
        self.text, self.filename = text, filename

    def get_source(self, fullname: str) -> str:
        """The text; the line of the record comes first, so that line numbers are the file's."""
        return self.text

    def get_filename(self, fullname: str) -> str:
        """Where the text stands, or that it stands in memory (no name in angle brackets: `inspect` looks behind none)."""
        return self.filename

    def is_package(self, fullname: str) -> bool:
        """Never."""
        return False


def module(plan: Plan, spec_json: str) -> ModuleType:
    """The generated file of a plan, imported; once a process.

    Raises:
        CacheError: a cached file that is not what attncc wrote.
    """
    name = "attncc_generated." + entry_name(plan).replace("-", "_")
    with _lock:
        if name not in _modules:
            _modules[name] = _imported(name, *_text(plan, spec_json))
        return _modules[name]


def _imported(name: str, text: str, path: Path | None) -> ModuleType:
    record = f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"
    loader = _Loader(record + text, str(path) if path else f"in memory: {name}.py")
    spec = importlib.util.spec_from_loader(name, loader, origin=loader.filename)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    # Triton reads a kernel's source through its module, so the module must be found by name.
    sys.modules[name] = made
    try:
        loader.exec_module(made)
    except BaseException:
        del sys.modules[name]
        raise
    return made


# ---- the directory -------------------------------------------------------------------------------------------------------------


def entries() -> list[Path]:
    """Files in the cache, by name."""
    return sorted(path for path in knobs.current().cache_dir.glob("*.py") if _is_entry(path))


def _is_entry(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MARK)) == _MARK.encode() or path.stem.count("-") >= 2
    except OSError:
        return False


def clear() -> int:
    """Deletes every entry and what an interrupted write may have left; gives the number of entries deleted.

    Raises:
        CacheError: the directory cannot be written.
    """
    directory, count = knobs.current().cache_dir, 0
    try:
        for path in (*entries(), *directory.glob(".*.tmp")):
            path.unlink(missing_ok=True)
            count += path.suffix == ".py"
    except OSError as error:
        raise CacheError(f"cache: cannot delete in {directory}: {error.strerror or error}") from None
    return count
