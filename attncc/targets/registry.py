"""Names of targets: what ships with attncc, read when first asked for, and what users add by file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

from attncc.errors import TargetError
from attncc.targets.records import Target, architectures
from attncc.targets.sheets import LIMITS, Sheet, sheet_from

NAMES = (
    "cpu", "sm_80", "a100", "sm_86", "rtx3090", "sm_89", "l40s", "rtx4090", "sm_90", "h100", "h100-pcie", "h200",
    "sm_100", "b200", "sm_120", "rtx5090", "gfx942", "mi300x",
)  # fmt: skip
"""Every shipped target; those without a file in `data` are bare architectures."""
ARCHITECTURE_SOURCE = {
    "cuda": "CUDA C++ Programming Guide, Technical Specifications per Compute Capability",
    "hip": "AMD Instinct MI300 (CDNA 3) Instruction Set Architecture reference",
}
_added: dict[str, Sheet] = {}


class _Shipped(Mapping[str, Target]):
    """The shipped records by name. Names are known at once; a record is read when it is looked up."""

    def __getitem__(self, name: str) -> Target:
        if name not in NAMES:
            raise KeyError(name)
        return _shipped(name).target

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


TARGETS: Mapping[str, Target] = _Shipped()


@cache
def _shipped(name: str) -> Sheet:
    bare = architectures()
    if name in bare:
        source = ARCHITECTURE_SOURCE[bare[name].backend]
        return Sheet(bare[name], f"limits of {bare[name].arch} only", dict.fromkeys(LIMITS, source), {})
    file = resources.files("attncc.targets") / "data" / f"{name}.json"
    return sheet_from(name, lambda: file.read_text(encoding="utf-8"))


def sheet(name: str) -> Sheet:
    """A target with its sources; arguments and errors as of `target`."""
    if name in NAMES:
        return _shipped(name)
    if name in _added:
        return _added[name]
    if name.endswith(".json") or os.path.isfile(name):
        return _read(Path(name))
    raise TargetError(f"target: {name!r} is unknown; known are {', '.join((*NAMES, *_added))}, or a .json file of your own")


def target(name: str) -> Target:
    """The record of a target.

    Args:
        name: a shipped target, one that was loaded from a file, or the path of a file: one that ends in .json or exists.

    Raises:
        TargetError: an unknown name (lists the known ones), or a file that is refused (names the field).
    """
    return sheet(name).target


def load(path: str | os.PathLike[str]) -> Target:
    """The target that a file describes (see `attncc.targets`); known by its name from then on, in this process.

    Raises:
        TargetError: a file that cannot be read or is refused, or a name that is taken; names the field.
    """
    return _read(Path(path)).target


def _read(path: Path) -> Sheet:
    found = sheet_from(str(path), lambda: path.read_text(encoding="utf-8"))
    name = found.target.name
    if name in NAMES:
        raise TargetError(f"target {path}: name: {name!r} is that of a target of attncc's own; take another")
    # Kernels find their record by name, so the limits behind a name must not change under them; what it can do may.
    if name in _added and limits(_added[name].target) != limits(found.target):
        raise TargetError(f"target {path}: name: {name!r} was read before with other limits; take another")
    _added[name] = found
    return found


def limits(record: Target) -> Target:
    """The record without its performance: all that plans and generated code depend on."""
    return replace(record, performance=None)
