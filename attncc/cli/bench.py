"""`attncc bench`: a kernel timed against dense attention (SDPA) on this machine, beside its tile bound."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attncc.cli.shared import Json, LengthsOption, SpecPath, console, print_json, the_spec, working

Target = Annotated[str, typer.Option("--target", "-t", help="auto: this machine's GPU, or the cpu without one")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="batch elements")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.0, help="time to spend, warm-up apart; at least one round is run")]
Backward = Annotated[bool, typer.Option("--backward", help="time forward and backward together")]


def bench(
    spec: SpecPath,
    target: Target = "auto",
    lengths: LengthsOption = None,
    batch: Batch = 1,
    seconds: Seconds = 2.0,
    backward: Backward = False,
    as_json: Json = False,
) -> None:
    """Times the kernel and dense attention in turn (medians), and says which share of the tile bound is reached."""
    the = the_spec(spec)
    from attncc.cli.timing import timed

    with working("timing") as say:
        result = timed(the, target, lengths, batch, seconds, backward, say)
    if as_json:
        print_json(result.to_data())
    else:
        _print(result)


def _print(result: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{result.device}: medians of {result.rounds} rounds, {result.what}", title_justify="left", show_header=False)
    table.add_row("kernel", f"{result.kernel_ms:.3f} ms")
    table.add_row("dense SDPA", f"{result.dense_ms:.3f} ms")
    table.add_row("speedup", f"{result.speedup:.2f}×")
    table.add_row("tile bound", f"{result.tile_bound:.2f}×, {result.speedup / result.tile_bound:.0%} of it reached")
    console().print(table)
