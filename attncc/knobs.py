"""Settings of a process: each has a type, an environment variable and a meaning; `scope` changes them for a while.

Read through `current()` when they are needed, never when a module is imported, so that a scope or a changed environment counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Knobs:
    """The settings.

    Attributes:
        cache_dir: where generated files are kept (`ATTNCC_CACHE_DIR`; default: the user's cache folder for attncc).
        interpret: whether Triton interprets kernels on CPU tensors (`TRITON_INTERPRET=1`, which Triton reads once, when imported).
    """

    cache_dir: Path
    interpret: bool


_scoped: ContextVar[dict[str, Any] | None] = ContextVar("attncc_knobs", default=None)


def current() -> Knobs:
    """The settings that hold now: those of the innermost scope, else the environment's, else the defaults."""
    knobs = Knobs(_cache_dir(), os.environ.get("TRITON_INTERPRET") == "1")
    return replace(knobs, **(_scoped.get() or {}))


def _cache_dir() -> Path:
    given = os.environ.get("ATTNCC_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("attncc", appauthor=False))


@contextmanager
def scope(**changes: Any) -> Iterator[Knobs]:
    """Settings for the code inside: `with knobs.scope(cache_dir=folder): ...`.

    Raises:
        TypeError: a name that is no setting.
    """
    unknown = changes.keys() - Knobs.__dataclass_fields__.keys()
    if unknown:
        raise TypeError(f"unknown knobs {', '.join(sorted(unknown))}; known are {', '.join(Knobs.__dataclass_fields__)}")
    token = _scoped.set({**(_scoped.get() or {}), **changes})
    try:
        yield current()
    finally:
        _scoped.reset(token)
