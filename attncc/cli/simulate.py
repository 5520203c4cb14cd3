"""`attncc simulate`: bounds and predicted time of a spec. Needs neither a GPU nor torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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

Batch = Annotated[int | None, typer.Option("--batch", min=1, help="elements of a batch; default: what the tables say, else 1")]
Baseline = Annotated[
    float | None, typer.Option("--baseline-ms", help="milliseconds measured of dense attention; default: the same kernel without its mask")
]
DirectionOption = Annotated[str, typer.Option("--direction", help="forward or backward")]
Splits = Annotated[int, typer.Option("--splits", help="blocks that share the keys of one row of tiles")]
Policy = Annotated[str | None, typer.Option("--mask-policy", help="'partial tiles' or 'every tile'; default: the plan's")]
PipelineName = Annotated[
    str | None, typer.Option("--pipeline", help="the kind of kernel whose overlap is assumed; default: triton, or torch")
]
Resources = Annotated[Path | None, typer.Option("--resources", metavar="FILE", help="resource report that attncc compile wrote")]
ConstantsPath = Annotated[Path | None, typer.Option("--constants", metavar="FILE", help="constants fitted on a device of one's own")]
Share = Annotated[float | None, typer.Option("--attention-share", help="share of a model's time that is attention, 0 to 1")]


def simulate(
    spec: SpecPath,
    target: TargetName = DEFAULT_TARGET,
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    lengths: LengthsOption = None,
    tables: TablesPath = None,
    batch: Batch = None,
    direction: DirectionOption = "forward",
    splits: Splits = 1,
    baseline_ms: Baseline = None,
    mask_policy: Policy = None,
    pipeline: PipelineName = None,
    resources: Resources = None,
    constants: ConstantsPath = None,
    attention_share: Share = None,
    as_json: Json = False,
) -> None:
    """Says how much faster than dense attention a spec can be: by pairs (FLOP bound), by tiles (tile bound), and by predicted time."""
    from attncc.simulator import simulate as run

    the, given = the_spec(spec), the_tables(tables)
    options: dict[str, Any] = {
        "batch": batch,
        "direction": direction,
        "splits": splits,
        "baseline": baseline_ms,
        "mask_policy": mask_policy,
    }
    files: dict[str, Any] = {"pipeline": pipeline, "resources": resources, "constants": constants}
    with working("counting tiles"):
        report = run(the, target, q_tile, k_tile, lengths=lengths, tables=given, **options, **files)
    whole = None if attention_share is None else report.end_to_end(attention_share)
    if as_json:
        share = {} if whole is None else {"end_to_end": {"attention_share": attention_share, "speedup": whole}}
        print_json({**json.loads(report.to_json()), **share})
        return
    console().print(report.table())
    if whole is not None:
        console().print(f"end to end: {whole:.2f}x, attention being {attention_share:.0%} of the model's time")
