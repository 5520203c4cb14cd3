"""Inline SVG: the graph of a kernel, bars, and matplotlib's pictures made fit to stand in a page."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from attncc.ir.graph import Graph, Node

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, GAP_X, GAP_Y = 190, 46, 26, 34
LONGEST_LABEL = 26


def graph_svg(graph: Graph) -> str:
    """The graph, inputs on top; the whole text of a node shows where the pointer rests."""
    places = _places(graph)
    columns = max(x for x, _ in places.values()) + 1
    rows = max(y for _, y in places.values()) + 1
    width, height = columns * (WIDTH + GAP_X) + GAP_X, rows * (HEIGHT + GAP_Y) + GAP_Y
    lines = [_edge(places[source], places[n]) for n in places for source in n.inputs]
    boxes = [_box(n, place) for n, place in places.items()]
    label = f"graph of {len(places)} nodes"
    return (
        f'<svg class="graph" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
        f"{''.join(lines)}{''.join(boxes)}</svg>"
    )


def _places(graph: Graph) -> dict[Node, tuple[int, int]]:
    """Column and row of each node: below all that it takes, the main chain in the first column."""
    depth: dict[Node, int] = {}
    for n in graph.nodes():
        depth[n] = max((depth[i] + 1 for i in n.inputs), default=0)
    for n in graph.nodes():  # an input stands right above what takes it
        if not n.inputs:
            depth[n] = min((depth[m] for m in graph.nodes() if n in m.inputs), default=1) - 1
    used: dict[int, int] = {}
    found = {}
    for n in sorted(graph.nodes(), key=lambda m: not m.inputs):
        found[n] = (used.get(depth[n], 0), depth[n])
        used[depth[n]] = used.get(depth[n], 0) + 1
    return found


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return GAP_X + place[0] * (WIDTH + GAP_X), GAP_Y // 2 + place[1] * (HEIGHT + GAP_Y)


def _edge(source: tuple[int, int], sink: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = _corner(source), _corner(sink)
    x1, y1, x2, middle = x1 + WIDTH // 2, y1 + HEIGHT, x2 + WIDTH // 2, (y1 + HEIGHT + y2) // 2
    return f'<path d="M{x1} {y1} C{x1} {middle} {x2} {middle} {x2} {y2}"/>'


def _box(n: Node, place: tuple[int, int]) -> str:
    x, y = _corner(place)
    name, detail = n.op.value, "; ".join(f"{key} {value}" for key, value in n.attrs)
    short = detail if len(detail) <= LONGEST_LABEL else f"{detail[: LONGEST_LABEL - 1]}…"
    return (
        f'<g class="{"input" if not n.inputs else "op"}"><title>{escape(f"{name} {detail}")}</title>'
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x + 10}" y="{y + 19}" class="name">{escape(name)}</text><text x="{x + 10}" y="{y + 36}">{escape(short)}</text></g>'
    )


def bars(values: dict[str, float], unit: str) -> str:
    """Horizontal bars, as a table that a screen reader can read."""
    most = max(values.values(), default=0.0) or 1.0
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><span style="width:{100 * value / most:.1f}%"></span></td>'
        f'<td class="number">{value:.3g} {escape(unit)}</td></tr>'
        for name, value in values.items()
    ]
    return f'<table class="bars"><tbody>{"".join(rows)}</tbody></table>'


def inline(figure: Figure, name: str) -> str:
    """A matplotlib figure as an SVG element; ids are made its own, so that several may stand in one page."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)  # the others repeat
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, end, rest = svg.partition(">")
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + end + rest
