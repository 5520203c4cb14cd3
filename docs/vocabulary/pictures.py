"""Small pictures of masks: all pairs, and on a grid the keys that one query sees."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attncc import AttentionSpec, simulate
from attncc.simulator.pictures.scene import Scene
from attncc.simulator.pictures.style import EMPTY, FULL, INK, QUERY
from docs.vocabulary.examples import Example

HEADS, SIDE, DPI, LINED = 2, 2.1, 80, 40


def draw_mask(example: Example, path: Path) -> None:
    """A PNG: queries down, keys across; heads side by side where they differ; beside it, what a query in the middle sees of a grid."""
    from matplotlib.figure import Figure

    panels = _panels(example)
    figure = Figure(figsize=(SIDE * len(panels), SIDE + 0.2), layout="constrained")
    for axes, (title, kinds) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        _grid(axes, kinds)
        axes.set_title(title, fontsize=8, color=INK)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def scenes(example: Example) -> list[Scene]:
    """The scene of each head."""
    spec = AttentionSpec(tokens=example.tokens, heads=HEADS, head_dim=16, mask=example.part)
    tile = (1,) * len(example.tokens)
    report = simulate(spec, "cpu", tile, tile, tables=example.tables)
    return [Scene.of(report, example.tables, head=h) for h in range(HEADS)]


def _panels(example: Example) -> list[tuple[str, npt.NDArray[np.int8]]]:
    """Title and cells: 0 hidden, 1 seen, 2 the query."""
    tokens = np.arange(prod(example.tokens))
    every = [(s, s.allowed(tokens[:, None], tokens[None]).astype(np.int8)) for s in scenes(example)]
    differ = bool((every[0][1] != every[1][1]).any())
    shown = every if differ else every[:1]
    panels = [(f"head {s.head}" if differ else "queries × keys", kinds) for s, kinds in shown]
    if len(example.tokens) == 1:
        return panels
    scene, kinds = every[0]
    view = kinds[scene.query].copy()
    view[scene.query] = 2
    return [*panels, (f"query {scene.at} sees", view.reshape(example.tokens))]


def _grid(axes: Any, kinds: npt.NDArray[np.int8]) -> None:
    from matplotlib.colors import ListedColormap

    rows, columns = kinds.shape
    lines = {"edgecolors": "white", "linewidth": 0.4} if max(rows, columns) <= LINED else {}
    axes.pcolormesh(kinds, cmap=ListedColormap([EMPTY, FULL, QUERY]), vmin=0, vmax=2, **lines)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
