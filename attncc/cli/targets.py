"""`attncc targets`: the devices that attncc plans for, and one of them in full, each figure with its source."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attncc.cli.shared import Json, console, print_json
from attncc.targets import TARGETS, Sheet, sheet

Name = Annotated[str | None, typer.Argument(metavar="[TARGET]", help="a name, or a .json file of your own; default: list them all")]


def targets(name: Name = None, as_json: Json = False) -> None:
    """Lists targets, or shows one with the source of every figure. `attncc targets h100 --json` is a file to start your own from."""
    if name is not None:
        _show(sheet(name), as_json)
        return
    rows = [_summary(sheet(known)) for known in TARGETS]
    if as_json:
        print_json(rows)
    else:
        console().print(_list(rows))


def _show(found: Sheet, as_json: bool) -> None:
    if as_json:
        print_json(found.to_data())
    else:
        console().print(_full(found))


def _summary(found: Sheet) -> dict[str, Any]:
    t, p = found.target, found.target.performance
    row: dict[str, Any] = {"name": t.name, "device": found.device, "backend": t.backend, "arch": t.arch, "matrix": t.matrix}
    figures = ("sms", "clock_hz", "memory_bytes", "memory_bytes_per_second", "board_watts")
    row |= {figure: getattr(p, figure, None) for figure in figures}
    return {**row, "peak_flops": p.peak_flops if p else None}


def _list(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="targets", title_justify="left")
    for head in ("name", "device", "arch"):
        table.add_column(head, no_wrap=True)
    for head in ("SMs", "GHz", "fp16 TFLOP/s", "GB", "GB/s", "W"):
        table.add_column(head, justify="right")
    scales = {"sms": 1.0, "clock_hz": 1e9, "float16": 1e12, "memory_bytes": 1e9, "memory_bytes_per_second": 1e9, "board_watts": 1.0}
    for row in rows:
        figures = {**row, **(row["peak_flops"] or {})}
        values = [figures.get(name) and f"{figures[name] / scale:,.4g}" for name, scale in scales.items()]
        table.add_row(row["name"], row["device"], row["arch"], *(value or "" for value in values))
    return table


def _full(found: Sheet) -> Any:
    from rich.markup import escape
    from rich.table import Table

    data = found.to_data()
    words = ", ".join(f"{name} {data[name]}" for name in ("arch", "backend", "matrix", "bulk_copy"))
    table = Table(title=escape(f"{data['name']}: {found.device} ({words})"), title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for name, value in _flat("", data).items():
        table.add_row(name, f"{value:,.10g}", escape(found.sources[name]))
    return table


def _flat(prefix: str, data: Any) -> dict[str, float]:
    """Values by the dotted names that errors use."""
    found: dict[str, float] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= {prefix + key: value["value"]} if set(value) == {"value", "source"} else _flat(f"{prefix}{key}.", value)
    return found
