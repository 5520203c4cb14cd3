"""`attncc env`: versions, devices, folders, and combinations that are known to fail. What to put in a bug report."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

from attncc import knobs
from attncc.cli.shared import Json, console, print_json
from attncc.version import VERSION

PACKAGES = ("torch", "triton", "numpy", "pydantic", "sympy", "networkx", "rich", "typer", "matplotlib", "pyyaml")


def environment(as_json: Json = False) -> None:
    """Prints versions, devices and folders, and warns of combinations that are known to fail."""
    data = collected()
    if as_json:
        print_json(data)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in data.items():
        if name not in ("packages", "warnings"):
            table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    for name, version in data["packages"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    out = console()
    out.print(table)
    for warning in data["warnings"]:
        out.print(f"[yellow]warning:[/] {warning}")


def collected() -> dict[str, Any]:
    """Everything `attncc env` says."""
    packages = {name: _version(name) for name in PACKAGES}
    return {
        "attncc": VERSION,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "devices": _devices() if packages["torch"] else [],
        "cache": str(knobs.current().cache_dir),
        "interpret": knobs.current().interpret,
        "packages": packages,
        "warnings": warnings_for(packages, knobs.current().interpret),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """Visible GPUs with the targets they are."""
    try:
        import torch

        from attncc.runtime.devices import device_target

        return [f"{torch.cuda.get_device_name(i)}: {device_target(i)}" for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError) as error:
        return [f"torch does not import or see its devices: {' '.join(str(error).split())}"]


def warnings_for(packages: dict[str, str | None], interpret: bool = False) -> list[str]:
    """Combinations of versions that are known to fail, and what still works; `interpret`: whether kernels are interpreted."""
    triton, numpy = (_numbers(packages.get(name)) for name in ("triton", "numpy"))
    found = []
    if packages.get("torch") is None:
        found.append("torch is not installed: simulate, explain, validate and schema work; kernels do not run")
    if triton is None:
        found.append("triton is not installed: kernels for GPUs can be printed, but neither compiled nor run")
    elif triton[:2] == (3, 6) and numpy is not None and numpy >= (2, 4):
        found.append("Triton 3.6's interpreter fails with numpy 2.4 and later: use numpy 2.3 or Triton 3.7.1 to interpret; compiling works")
    if triton is not None and interpret:
        found.append("TRITON_INTERPRET is set: Triton's interpreter multiplies bfloat16 wrongly, so check kernels in float16 or float32")
    return found


def _numbers(version: str | None) -> tuple[int, ...] | None:
    if version is None:
        return None
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
