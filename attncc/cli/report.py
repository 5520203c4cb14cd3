"""`attncc report`: one self-contained HTML page of a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncc.cli.shared import (
    DEFAULT_TARGET,
    Json,
    KeyTile,
    LengthsOption,
    QueryTile,
    SpecPath,
    TablesPath,
    TargetName,
    console,
    print_json,
    the_spec,
    the_tables,
    working,
)
from attncc.errors import InputError

PagePath = Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="the page, overwritten")]
Results = Annotated[Path | None, typer.Option("--results", metavar="FILE", help="measurements, as attncc bench --json prints them")]


def report(
    spec: SpecPath,
    output: PagePath = Path("report.html"),
    target: TargetName = DEFAULT_TARGET,
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    lengths: LengthsOption = None,
    tables: TablesPath = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Writes a page: levels, block mask to zoom into, where the time goes, pictures, graph, plan, rejected candidates."""
    from attncc.simulator import simulate
    from attncc.simulator.html import page
    from attncc.simulator.measured import read_measured

    the, given = the_spec(spec), the_tables(tables)
    measured = read_measured(results) if results is not None else []
    with working("drawing"):
        text = page(simulate(the, target, q_tile, k_tile, lengths=lengths, tables=given), tables=given, measured=measured)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("output", f"cannot write {output}: {error.strerror or error}") from None
    if as_json:
        print_json({"report": str(output), "bytes": len(text.encode())})
        return
    console().print(f"report: {output}", soft_wrap=True)
