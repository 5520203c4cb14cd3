"""One self-contained HTML page of a spec: levels, block mask to zoom into, where the time goes, pictures, graph, plan. No network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from attncc.simulator.html.sections import Story, sections
from attncc.simulator.measured import Measured
from attncc.simulator.pictures.scene import words
from attncc.simulator.report import SpeedupReport

__all__ = ["page"]


def page(report: SpeedupReport, *, tables: Mapping[str, Any] | None = None, measured: Sequence[Measured] = ()) -> str:
    """The page of a report as text. Pictures need matplotlib; without it the page says so.

    Args:
        report: what `attncc.simulate` gave.
        tables: those that the mask reads, by name, as they were given to `simulate`.
        measured: points to show beside the levels (`attncc.simulator.measured`).

    Raises:
        InputError: missing tables.
    """
    story = Story.of(report, tables, measured)
    title = f"{words(report.spec.mask)} · {' × '.join(f'{n:,}' for n in report.tokens)} tokens · {report.target}"
    return Template(_file("report.html")).substitute(
        title=escape(title), style=_file("report.css"), script=_file("report.js"), data=story.cells.to_script(), **sections(story)
    )


def _file(name: str) -> str:
    return (resources.files("attncc.simulator.html") / name).read_text(encoding="utf-8")
