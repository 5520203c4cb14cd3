"""`attncc simulate`: speedup bounds of a spec. Needs neither a GPU nor torch."""

from __future__ import annotations

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


def simulate(
    spec: SpecPath,
    target: TargetName = DEFAULT_TARGET,
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    lengths: LengthsOption = None,
    tables: TablesPath = None,
    as_json: Json = False,
) -> None:
    """Bounds how much faster than dense attention a spec can be: by pairs (FLOP bound) and by tiles (tile bound)."""
    from attncc.simulator import simulate as run

    the, given = the_spec(spec), the_tables(tables)
    with working("counting tiles"):
        report = run(the, target, q_tile, k_tile, lengths=lengths, tables=given)
    if as_json:
        print_json(report.to_json())
    else:
        console().print(report.table())
