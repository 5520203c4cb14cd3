"""`attncc search`: strides, tiles, windows, masks and lengths compared by simulation. Needs neither a GPU nor torch."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from attncc.cli.shared import Json, KeyTile, LengthsOption, QueryTile, SpecPath, TargetName, console, counting, print_json, the_spec
from attncc.errors import InputError

if TYPE_CHECKING:
    from attncc.simulator import SpeedupReport

DEVICE = "h100"
MOST = 1_000_000
"""Values of one range, at most."""


def _range(text: str) -> Iterable[int]:
    """`64`, `16..128/8` in steps of 8, or `4096..65536` doubling."""
    span, _, step = text.partition("/")
    first, dots, last = span.partition("..")
    low, high = int(first), int(last if dots else first)
    if low < 1 or (step and (int(step) < 1 or not dots)) or high - low > MOST * int(step or MOST):
        raise ValueError(text)
    if step:
        return range(low, high + 1, int(step))
    return [low << i for i in range((high // low).bit_length())] if dots else [low]


def _values(text: str) -> tuple[tuple[int, ...], ...]:
    """Values by axis: `16..128/8,160x8,16`."""
    try:
        return tuple(tuple(n for part in axis.split(",") for n in _range(part)) for axis in text.split("x"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list such as 16,24 or 16..128/8 or 4096..65536 (doubling), axes separated by x") from None


def _option(name: str, help: str) -> Any:
    return typer.Option(name, parser=_values, metavar="VALUES", help=help)


VALUES = "values, or ranges A..B/STEP or A..B (doubling), separated by commas; axes by x, or one for all"
Csv = Annotated[bool, typer.Option("--csv", help="print CSV on standard output")]
Top = Annotated[int, typer.Option("--top", min=1, help="rows to print")]
Specs = Annotated[list[str], typer.Argument(metavar="SPEC...", help=".json or .yaml files")]
Windows = Annotated[Any, _option("--windows", f"windows to try: {VALUES}")]
Strides = Annotated[Any, _option("--strides", "strides to try, written like windows; default: 1")]
Dilations = Annotated[Any, _option("--dilations", "dilations to try, written like windows; default: 1")]
Growing = Annotated[Any, _option("--lengths", "tokens of the axis: values, or 4096..1048576 (doubling)")]
Axis = Annotated[int, typer.Option("--axis", min=0, help="the axis that grows")]
Sparsity = Annotated[float | None, typer.Option("--sparsity", help="least share of pairs that must be masked")]
Speedup = Annotated[float | None, typer.Option("--speedup", help="least speedup")]
By = Annotated[Literal["predicted", "tiles"], typer.Option("--by", help="which speedup: predicted, or the bound by tiles")]


def stride(spec: SpecPath, q_tile: QueryTile = None, k_tile: KeyTile = None, lengths: LengthsOption = None, as_json: Json = False) -> None:
    """Finds, for each axis, the smallest stride of a neighborhood with which no tile needs its mask."""
    from attncc.simulator.search import smallest_stride

    found = smallest_stride(the_spec(spec), q_tile, k_tile, lengths)
    if as_json:
        print_json({"stride": found, "block_sparse": None not in found})
    else:
        console().print(" × ".join("none" if n is None else str(n) for n in found))


def tiles(
    spec: SpecPath, target: TargetName = DEVICE, lengths: LengthsOption = None, top: Top = 10, as_json: Json = False, as_csv: Csv = False
) -> None:
    """Ranks tile shapes by predicted time."""
    from attncc.simulator.search import best_tiles

    the = the_spec(spec)
    with counting("tile shapes") as progress:
        found = best_tiles(the, target, top=top, lengths=lengths, progress=progress)
    _show(found, as_json, as_csv)


def front(
    spec: SpecPath,
    windows: Windows,
    strides: Strides = None,
    dilations: Dilations = None,
    target: TargetName = DEVICE,
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    sparsity: Sparsity = None,
    speedup: Speedup = None,
    by: By = "predicted",
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """Lists the neighborhoods that no other one beats in both attended share and speedup."""
    from attncc.simulator.search import neighborhoods, pareto

    specs = neighborhoods(the_spec(spec), windows, strides or ((1,),), dilations or ((1,),))
    with counting("neighborhoods", len(specs)) as progress:
        found = pareto(specs, target, q_tile, k_tile, by=by, sparsity=sparsity, speedup=speedup, progress=progress)
    _show(found, as_json, as_csv)


def masks(
    specs: Specs,
    target: TargetName = DEVICE,
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    lengths: LengthsOption = None,
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """Ranks specs by predicted time."""
    from attncc.simulator.search import cheapest

    given = [the_spec(path) for path in specs]
    with counting("masks", len(given)) as progress:
        found = cheapest(given, target, lengths=lengths, q_tile=q_tile, k_tile=k_tile, progress=progress)
    _show([report for _, report in found], as_json, as_csv, [specs[i] for i, _ in found])


def lengths(
    spec: SpecPath,
    lengths: Growing,
    target: TargetName = DEVICE,
    axis: Axis = 0,
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """Shows how the levels change as one axis of the grid grows."""
    from attncc.simulator.search import by_length

    if len(lengths) != 1:
        raise InputError("lengths", f"has {len(lengths)} axes, one grows")
    the = the_spec(spec)
    with counting("lengths", len(lengths[0])) as progress:
        found = by_length(the, target, lengths[0], axis=axis, q_tile=q_tile, k_tile=k_tile, progress=progress)
    _show(found, as_json, as_csv)


# ---- output ----------------------------------------------------------------------------------------------------------------------------


def _show(reports: Sequence[SpeedupReport], as_json: bool, as_csv: bool, names: Sequence[str] = ()) -> None:
    rows = [{**({"spec": names[i]} if names else {}), **_row(r)} for i, r in enumerate(reports)]
    if as_json:
        print_json([{**({"file": names[i]} if names else {}), **json.loads(r.to_json(None))} for i, r in enumerate(reports)])
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        console().print(_table(rows) if rows else "nothing reaches what is asked for")


def _row(r: SpeedupReport) -> dict[str, Any]:
    """A report as one flat row; sides of N-D things are joined by x."""
    shapes = {"tokens": r.tokens, "q_tile": r.q_tile, "k_tile": r.k_tile, **_rule(r)}
    return {
        **{name: "x".join(map(str, sides)) for name, sides in shapes.items()},
        "flop_bound": r.flop_bound,
        "tile_bound": r.tile_bound,
        "predicted_speedup": r.predicted_speedup,
        "milliseconds": r.prediction and r.prediction.milliseconds,
        "limit": r.prediction.limit if r.prediction else r.unpredicted,
        "attended": 1.0 - r.sparsity,
        "block_sparse": r.block_sparse,
    }


def _rule(r: SpeedupReport) -> dict[str, tuple[int, ...]]:
    if r.spec.mask.kind != "neighborhood":
        return {}
    window, stride, dilation, _ = zip(*r.spec.mask.axes(len(r.tokens)))
    return {"window": window, "stride": stride, "dilation": dilation}


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


HEADS = {
    "flop_bound": "FLOP",
    "tile_bound": "tiles",
    "predicted_speedup": "time",
    "milliseconds": "ms",
    "attended": "pairs",
    "block_sparse": "sparse",
}


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption="FLOP, tiles, time: speedup over dense attention with the same tiles, at each level", caption_justify="left")
    for name in _columns(rows):
        table.add_column(HEADS.get(name, name.replace("_", " ")), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(row.get(name))) for name in _columns(rows)))
    return table


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
