"""`attncc verify`: a compiled kernel against the dense float64 reference, forward and backward, on random inputs."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from attncc.cli.shared import Json, LengthsOption, SpecPath, console, print_json, the_spec, working
from attncc.errors import UnsupportedError

Target = Annotated[str, typer.Option("--target", "-t", help="auto: this machine's GPU, or the cpu without one")]
Interpret = Annotated[bool, typer.Option("--interpret", help="run the Triton file on the CPU by Triton's interpreter (slow)")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="batch elements")]
Seed = Annotated[int, typer.Option("--seed", help="of the random inputs")]
LIMIT = "--limit"
Limit = Annotated[float, typer.Option(LIMIT, min=0.0, help="most pairs (queries x keys x heads x batch) the dense reference may have")]
FAILED = 3
"""Exit code where an error is above its limit."""


def verify(
    spec: SpecPath,
    target: Target = "auto",
    lengths: LengthsOption = None,
    batch: Batch = 1,
    seed: Seed = 0,
    interpret: Interpret = False,
    limit: Limit = 2.0**28,
    as_json: Json = False,
) -> None:
    """Compares a compiled kernel with the dense reference in float64, and with dense attention in the kernel's own type.

    Exit code 3 if an error is above 1e-5 (float64: 1e-12) and above twice that of the dense formula in the spec's type.
    """
    the = the_spec(spec)
    if interpret:
        _interpret(the.dtype)
    _check_size(the, lengths, batch, limit)
    from attncc.cli.verification import verified

    with working("verifying") as say:
        rows = verified(the, "sm_80" if interpret and target == "auto" else target, lengths, batch, seed, say)
    ok = all(row.ok for row in rows)
    if as_json:
        print_json({"ok": ok, "errors": [row.to_data() for row in rows]})
    else:
        _print(rows, ok)
    if not ok:
        raise typer.Exit(FAILED)


def _interpret(dtype: str) -> None:
    """Makes Triton interpret: it reads the variable once, when it is imported."""
    if dtype == "bfloat16":
        raise UnsupportedError("dtype bfloat16 with --interpret", "Triton's interpreter multiplies it wrongly", "float16 or float32")
    if os.environ.get("TRITON_INTERPRET") != "1" and "triton" in sys.modules:
        raise UnsupportedError("--interpret in this process", "triton is imported already, without TRITON_INTERPRET=1", "a new process")
    os.environ["TRITON_INTERPRET"] = "1"


def _check_size(spec: Any, lengths: Any, batch: int, limit: float) -> None:
    from math import prod

    from attncc.passes.given import known_grid

    query, key = known_grid(spec, lengths)
    pairs = prod(query) * prod(key) * spec.heads * batch
    if pairs > limit:
        raise UnsupportedError(
            f"a dense reference of {pairs:.2g} pairs",
            f"it holds several arrays of them in float64 ({LIMIT} raises the limit of {limit:.2g})",
            "the same mask on a smaller grid, with fewer heads",
        )


def _print(rows: list[Any], ok: bool) -> None:
    from rich.table import Table

    table = Table(title="relative errors against dense float64", title_justify="left", caption="ok" if ok else "errors above their limits")
    for name in ("result", "overall", "worst row", "dense formula", "ok"):
        table.add_column(name, justify="left" if name == "result" else "right")
    for row in rows:
        mark = "[green]yes[/]" if row.ok else "[red]no[/]"
        table.add_row(row.name, f"{row.overall:.1e}", f"{row.worst_row:.1e}", f"{row.dense:.1e}", mark)
    console().print(table)
