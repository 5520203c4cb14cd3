"""`attncc explain`: every step from spec to plan, what was rejected and why, what triggers a recompile, and what the mask leaves to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attncc import pipeline
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
from attncc.ir.graph import Graph
from attncc.passes.plan import KernelPlan, Plan
from attncc.simulator import SpeedupReport
from attncc.simulator import simulate as run_simulation
from attncc.spec.attention import AttentionSpec

PicturePath = Annotated[Path | None, typer.Option("--picture", metavar="FILE.png", help="draw mask and block mask (.png, .svg or .pdf)")]
Head = Annotated[int, typer.Option("--head", min=0, help="the head that is drawn, where heads differ")]
Query = Annotated[
    Any, typer.Option("--query", metavar="N", help="the query (flattened token) whose window is drawn; default: near the middle")
]


@dataclass
class Explanation:
    """How a spec became a plan. `report` is None where lengths or tables are missing; `note` then says which."""

    plan: Plan
    steps: list[tuple[str, Graph]] = field(default_factory=list)
    specialization: list[dict[str, Any]] = field(default_factory=list)
    report: SpeedupReport | None = None
    note: str = ""

    def to_data(self) -> dict[str, Any]:
        """The explanation as JSON data."""
        return {
            "steps": [{"step": name, "graph": str(graph).splitlines()} for name, graph in self.steps],
            "plan": self.plan.model_dump(mode="json"),
            "specialization": self.specialization,
            "block_mask": self.report and self.report.model_dump(mode="json", exclude={"spec"}),
            "note": self.note,
        }


def explain(
    spec: SpecPath,
    target: TargetName = DEFAULT_TARGET,
    q_tile: QueryTile = None,
    k_tile: KeyTile = None,
    lengths: LengthsOption = None,
    tables: TablesPath = None,
    picture: PicturePath = None,
    head: Head = 0,
    query: Query = None,
    as_json: Json = False,
) -> None:
    """Shows every step from spec to plan, rejected candidates, the specialisation key, and how many tiles the mask leaves."""
    the, given = the_spec(spec), the_tables(tables)
    with working("planning"):
        explanation = explained(the, target, q_tile, k_tile, lengths, given)
    if picture is not None:
        _draw(the, explanation, picture, lengths, given, head, query)
    if as_json:
        print_json({**explanation.to_data(), "picture": picture and str(picture)})
        return
    out = console()
    _print(out, explanation)
    if picture is not None:
        out.print(f"picture: {picture}", soft_wrap=True)


def explained(
    spec: AttentionSpec, target: str, q_tile: Any = None, k_tile: Any = None, lengths: Any = None, tables: dict[str, Any] | None = None
) -> Explanation:
    """The explanation of a spec on a target; arguments as of `attncc.simulate`."""
    steps: list[tuple[str, Graph]] = []
    plan = pipeline.plan(spec, target, q_tile, k_tile, watch=lambda name, graph: steps.append((name, graph)))
    found = Explanation(plan, steps, [_specialization(kernel, target) for kernel in plan.kernels])
    try:
        kernel = plan.kernels[-1]
        found.report = run_simulation(spec, target, kernel.q_tile, kernel.k_tile, lengths=lengths, tables=tables)
    except InputError as error:
        if lengths is not None and error.argument == "lengths":
            raise
        found.note = f"tiles are not counted: {error} (--{error.argument})"
    return found


def _specialization(kernel: KernelPlan, target: str) -> dict[str, Any]:
    """What the generated kernel is compiled for anew, and what it is not."""
    from attncc.codegen.facts import Facts
    from attncc.codegen.kernel import Kernel
    from attncc.targets import target as target_record

    record = target_record(target)
    if record.backend == "cpu":
        return {"kernel": kernel.name, "recompiles": {}, "never": ["everything: torch runs it, nothing is compiled"]}
    printer = Kernel(Facts(kernel, record))
    meanings = {
        "ALIGNED": "whether every row of every tensor starts on a 16-byte boundary",
        "INDEX": "32-bit offsets within a head, or 64-bit where a tensor needs them",
        "BOX": "keys and values by bulk copy: heads first (1), heads last (2), or by row pointers (0)",
    }
    recompiles = {name: meanings[name] for name in printer.constants}
    return {"kernel": kernel.name, "recompiles": recompiles, "never": [name for name, _ in printer.scalars]}


def _draw(spec: AttentionSpec, explanation: Explanation, path: Path, lengths: Any, tables: dict[str, Any], head: int, query: Any) -> None:
    if query is not None and not str(query).isdecimal():
        raise typer.BadParameter(f"--query {query!r} is no token index")
    kernel = explanation.plan.kernels[-1]
    with working("drawing"):
        chosen = None if query is None else int(query)
        # Without a report something is missing, and the simulator says what.
        report = explanation.report or run_simulation(spec, "cpu", kernel.q_tile, kernel.k_tile, lengths=lengths, tables=tables)
        report.plot(path, tables=tables, head=head, query=chosen)


# ---- printing ------------------------------------------------------------------------------------------------------------------


def _print(out: Console, found: Explanation) -> None:
    before: Graph | None = None
    for name, graph in found.steps:
        out.rule(f"[bold]{name}", align="left")
        # Rejected candidates have a table of their own below.
        shown = graph.rewrite(lambda n: n.with_attrs(rejected=None) if n.get("rejected") else n)
        out.print("unchanged" if graph == before else str(shown), markup=False, soft_wrap=True)
        before = graph
    for kernel, special in zip(found.plan.kernels, found.specialization):
        out.rule(f"[bold]plan for {found.plan.target}: {kernel.name}", align="left")
        out.print(_plan_table(kernel))
        out.print(_rejected_table(kernel))
        _print_specialization(out, special)
    out.rule("[bold]block mask", align="left")
    out.print(found.report.table() if found.report else found.note, soft_wrap=not found.report)


def _plan_table(kernel: KernelPlan) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    form = kernel.form
    rows = {
        "query tile": " × ".join(map(str, kernel.q_tile)),
        "key tile": " × ".join(map(str, kernel.k_tile)),
        "warps, stages": f"{kernel.num_warps}, {kernel.num_stages}",
        "key tiles": form,
        "masked": kernel.mask_policy,
        "rows": kernel.row_order,
        "views": ", ".join(str(v) for v in kernel.views),
    }
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    return table


def _rejected_table(kernel: KernelPlan) -> Table:
    table = Table(title=f"rejected: {len(kernel.rejected)} candidates", title_justify="left")
    table.add_column("candidate")
    table.add_column("reason")
    for rejected in kernel.rejected:
        table.add_row(rejected.candidate, rejected.reason)
    return table


def _print_specialization(out: Console, special: dict[str, Any]) -> None:
    out.print("[bold]specialisation key[/]: what triggers a recompile, besides another spec or another plan")
    for name, meaning in special["recompiles"].items():
        out.print(f"  {name}: {meaning}", soft_wrap=True)
    out.print(f"  never: {', '.join(special['never'])}", soft_wrap=True)
