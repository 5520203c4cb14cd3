"""What every benchmark prints and writes: tables, progress, JSON, and on what it ran."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table; `|` in a cell is escaped."""
    rows = [columns, ["---"] * len(columns), *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def print_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], note: str = "") -> None:
    """A table on standard output, by rich where it is installed; the first column is text, the others are numbers."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([title, *plain_table(columns, lines), *([note] if note else [])]))
        return
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    # A pipe has no width of its own, and 80 columns would break every line.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def plain_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The same in letters alone."""
    widths = [max(len(row[i]) for row in (columns, *lines)) for i in range(len(columns))]
    return ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in (columns, *lines)]


def tracked(items: Iterable[T], total: int, what: str, show: bool = True) -> Iterator[T]:
    """The items, counted on standard error as they come: on a terminal in one line, elsewhere a line for every tenth of them."""
    for done, item in enumerate(items, 1):
        if show and sys.stderr.isatty():
            print(f"\r{what} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif show and done * 10 // total > (done - 1) * 10 // total:
            print(f"{what} {done}/{total}", file=sys.stderr, flush=True)
        yield item


def write_json(path: Path, data: Any) -> None:
    """The data as JSON, in a folder that is made; what is no number, which JSON has no form for, as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(data), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def environment() -> dict[str, Any]:
    """Versions and processors of this run."""
    import torch

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "torch": str(torch.__version__),
        "triton": triton,
        "python": platform.python_version(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _processor() -> str:
    """The processor's name as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
