"""What a page says, section by section. Everything that comes from a spec or a file is escaped here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from attncc import pipeline
from attncc.errors import InputError, UnsupportedError
from attncc.passes.plan import KernelPlan, Plan
from attncc.simulator.html.cells import Cells
from attncc.simulator.html.drawing import bars, graph_svg, inline
from attncc.simulator.measured import Measured
from attncc.simulator.pictures import plot
from attncc.simulator.pictures.scene import Scene
from attncc.simulator.predict import LIMITS
from attncc.simulator.report import Kind, SpeedupReport

PICTURES: dict[Kind, str] = {
    "window": "What one query sees",
    "curves": "Speedup against length",
    "timeline": "Blocks on the SMs",
    "roofline": "Roofline",
}
MOST_REJECTED = 200


@dataclass(frozen=True)
class Story:
    """All that a page is made of."""

    report: SpeedupReport
    plan: Plan
    cells: Cells
    tables: Mapping[str, Any] | None
    measured: Sequence[Measured]

    @staticmethod
    def of(report: SpeedupReport, tables: Mapping[str, Any] | None, measured: Sequence[Measured]) -> Story:
        """The report and its plan. A tile that fits no kernel has bounds; the plan is then the default one."""
        try:
            plan = pipeline.plan(report.spec, report.target, report.q_tile, report.k_tile)
        except UnsupportedError:
            plan = pipeline.plan(report.spec, report.target)
        return Story(report, plan, Cells.of(Scene.of(report, tables)), tables, measured)


def sections(story: Story) -> dict[str, str]:
    """The page's parts by their name in the template."""
    kernel = story.plan.kernels[-1]
    return {
        "cards": cards(story.report),
        "levels": levels(story.report),
        "time": time_spent(story.report),
        "note": escape(story.cells.note),
        "heads": "".join(f'<option value="{i}">head {i}</option>' for i in range(len(story.cells.heads))),
        "several": "" if len(story.cells.heads) > 1 else "hidden",
        "pictures": "".join(picture(story, kind, title) for kind, title in PICTURES.items()),
        "measured": measurements(story.measured),
        "spec": escape(story.report.spec.to_json()),
        "graph": graph_svg(kernel.graph),
        "text": escape("\n".join(line for each in story.plan.kernels for line in each.body)),
        "plan": plan_table(kernel),
        "rejected": table(("candidate", "reason"), ((r.candidate, r.reason) for r in kernel.rejected[:MOST_REJECTED])),
        "count": f"{len(kernel.rejected):,}",
    }


# ---- levels ----------------------------------------------------------------------------------------------------------------------------


def cards(report: SpeedupReport) -> str:
    """The three levels as large numbers."""
    shown = (
        ("FLOP bound", _factor(report.flop_bound), f"{report.sparsity:.1%} of pairs are masked"),
        ("tile bound", _factor(report.tile_bound), f"{report.tiles.visited:,} of {report.tiles.total:,} tiles"),
        ("prediction", _factor(report.predicted_speedup), _prediction(report)),
    )
    return "".join(
        f'<div class="card"><span>{name}</span><strong>{value}</strong><small>{escape(note)}</small></div>' for name, value, note in shown
    )


def _factor(value: float | None) -> str:
    return "–" if value is None else "∞" if value == float("inf") else f"{value:.2f}×"


def _prediction(report: SpeedupReport) -> str:
    if report.prediction is None:
        return report.unpredicted
    return f"{report.prediction.milliseconds:.3g} ms, limited by {report.prediction.limit}"


def levels(report: SpeedupReport) -> str:
    """Counts and times, each with what it is against."""
    tiles = report.tiles
    rows = [
        ("tiles", f"queries {_sides(report.q_tile)}, keys {_sides(report.k_tile)}"),
        ("visited", f"{tiles.visited:,} of {tiles.total:,}: {tiles.full:,} full, {tiles.partial:,} partial"),
        ("block-sparse", "yes: no tile needs its mask" if report.block_sparse else "no: partial tiles need their mask"),
        ("baseline of the bounds", report.baseline),
    ]
    if not report.exact:
        rows.append(("undecided", "some tiles could not be decided within the budget and count as partial"))
    ours, dense = report.prediction, report.baseline_prediction
    if ours is not None and dense is not None:
        rows += [
            ("predicted", f"{ours.milliseconds:.4g} ms on {report.target}, at {ours.clock_hz / 1e9:.2f} GHz"),
            ("its baseline", f"{dense.kernel}: {dense.milliseconds:.4g} ms"),
            ("blocks", f"{ours.blocks:,}, {ours.blocks_per_sm} at once on an SM; idle {ours.idle:.1%}"),
        ]
    return table(("", ""), rows)


def time_spent(report: SpeedupReport) -> str:
    """How long each unit is busy, or why nothing is known of it."""
    if report.prediction is None:
        return f"<p>{escape(report.unpredicted)}</p>"
    return bars({LIMITS.get(unit, unit): value for unit, value in report.prediction.busy.items()}, "ms")


# ---- pictures --------------------------------------------------------------------------------------------------------------------------


def picture(story: Story, kind: Kind, title: str) -> str:
    """One of matplotlib's, or why it cannot be drawn."""
    try:
        options: dict[str, Any] = {"measured": story.measured} if kind == "curves" else {}
        body = inline(plot(story.report, kind=kind, tables=story.tables, **options), kind)
    except (UnsupportedError, InputError) as error:
        body = f"<p>{escape(str(error))}</p>"
    return f'<section id="{kind}"><h2>{title}</h2><div class="paper">{body}</div></section>'


def measurements(measured: Sequence[Measured]) -> str:
    """Measured points as a table."""
    if not measured:
        return "<p>No results file was given: <code>attncc bench --json</code> writes one, <code>--results</code> reads it.</p>"
    rows = (
        (m.device, _sides(m.tokens) if m.tokens else "those of the spec", f"{m.kernel_ms:.4g}", f"{m.dense_ms:.4g}", f"{m.speedup:.2f}×")
        for m in measured
    )
    return table(("device", "tokens", "kernel ms", "dense ms", "speedup"), rows)


# ---- plan ------------------------------------------------------------------------------------------------------------------------------


def plan_table(kernel: KernelPlan) -> str:
    """What was chosen."""
    fields: dict[str, Any] = json.loads(kernel.model_dump_json(exclude={"body", "rejected", "views"}))
    rows = [(name.replace("_", " "), _sides(value) if isinstance(value, list) else str(value)) for name, value in fields.items()]
    rows.append(("views", ", ".join(str(v) for v in kernel.views)))
    return table(("", ""), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first cell of a row is its header."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns) if any(columns) else ""
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _sides(sides: Sequence[int]) -> str:
    return " × ".join(f"{n:,}" for n in sides)
