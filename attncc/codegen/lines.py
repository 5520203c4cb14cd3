"""Helpers for printing Python: indentation, argument lists, wrapped calls."""

from __future__ import annotations

import re
from collections.abc import Iterable

WIDTH = 120


def indented(lines: Iterable[str], steps: int = 1) -> list[str]:
    """Lines moved right; empty ones stay empty."""
    return [" " * (4 * steps) + line if line else "" for line in lines]


def call(head: str, arguments: list[str], tail: str = ")") -> list[str]:
    """`head(arguments)tail` on one line if it fits, else with the arguments wrapped and indented."""
    single = f"{head}({', '.join(arguments)}{tail}"
    if len(single) + 8 <= WIDTH:
        return [single]
    return [f"{head}(", *indented(filled(arguments)), tail]


def filled(items: list[str], width: int = WIDTH - 16) -> list[str]:
    """Items separated by commas, as many a line as fit, a comma after the last."""
    lines, line = [], ""
    for item in items:
        if line and len(line) + len(item) + 2 > width:
            lines.append(line.rstrip())
            line = ""
        line += f"{item}, "
    return [*lines, line.rstrip()] if line else lines


def used(names: list[str], lines: list[str]) -> list[str]:
    """Those names that occur in some code, in the order given."""
    words = set(re.findall(r"[A-Za-z_]\w*", "\n".join(line.partition("#")[0] for line in lines)))
    return [name for name in names if name in words]
