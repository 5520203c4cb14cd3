"""One self-contained HTML page of a spec: levels, block mask to zoom into, where the time goes, pictures, graph, plan. No network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from attncc.passes.given import Lengths
from attncc.passes.tiles import Shape
from attncc.simulator.html.sections import Story, sections
from attncc.simulator.measured import Measured
from attncc.simulator.pictures.scene import words
from attncc.spec.attention import AttentionSpec

__all__ = ["page"]


def page(
    spec: AttentionSpec,
    target: str,
    q_tile: Shape | None = None,
    k_tile: Shape | None = None,
    *,
    lengths: Lengths = None,
    tables: Mapping[str, Any] | None = None,
    measured: Sequence[Measured] = (),
) -> str:
    """The page as text; arguments and errors as of `attncc.simulate`. Pictures need matplotlib; without it the page says so."""
    story = Story.of(spec, target, q_tile, k_tile, lengths, tables, measured)
    title = f"{words(spec.mask)} · {' × '.join(f'{n:,}' for n in story.report.tokens)} tokens · {story.report.target}"
    return Template(_file("report.html")).substitute(
        title=escape(title), style=_file("report.css"), script=_file("report.js"), data=story.cells.to_script(), **sections(story)
    )


def _file(name: str) -> str:
    return (resources.files("attncc.simulator.html") / name).read_text(encoding="utf-8")
