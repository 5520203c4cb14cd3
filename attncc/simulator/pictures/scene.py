"""What a picture is drawn of: a spec over known lengths, its tiles, one head and one query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from attncc.errors import InputError
from attncc.ir.values import evaluate
from attncc.passes.block_mask import BlockMask
from attncc.passes.given import Lengths, known_grid, known_tables
from attncc.passes.tiles import Shape, unflatten
from attncc.simulator.bounds import classify
from attncc.simulator.levels import simulate
from attncc.simulator.pictures.style import MOST_CELLS
from attncc.simulator.report import SpeedupReport
from attncc.spec.attention import AttentionSpec


@dataclass(frozen=True)
class Scene:
    """What is drawn: a spec over known lengths, its tiles, and one head and query of it."""

    spec: AttentionSpec
    report: SpeedupReport
    tables: Mapping[str, Any]
    lengths: Lengths
    head: int
    query: int

    @property
    def rank(self) -> int:
        """Axes of the grid."""
        return len(self.report.tokens)

    @property
    def at(self) -> Shape:
        """Coordinates of the query."""
        return unflatten(self.query, self.report.tokens)

    @cached_property
    def mask(self) -> BlockMask:
        """The block mask of the report's tiles."""
        r = self.report
        return classify(self.spec, r.q_tile, r.k_tile, self.lengths, self.tables)

    def allowed(self, queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether queries see keys, flattened indices that broadcast."""
        r, env = self.report, {"b": 0, "h": self.head, **self.tables}
        for side, index, lengths in (("q", queries, r.tokens), ("k", keys, r.key_tokens)):
            for a in reversed(range(self.rank)):
                env |= {f"{side}{a}": index % lengths[a], f"n{side}{a}": lengths[a]}
                index = index // lengths[a]
        value = evaluate(self.spec.predicate, env)
        return np.broadcast_to(value, np.broadcast_shapes(queries.shape, keys.shape))


def make_scene(
    spec: AttentionSpec,
    q_tile: Shape,
    k_tile: Shape,
    lengths: Lengths = None,
    tables: Mapping[str, Any] | None = None,
    head: int = 0,
    query: int | None = None,
) -> Scene:
    """What is to be drawn.

    Raises:
        InputError: a head or query that does not exist, missing lengths or tables.
    """
    if not 0 <= head < spec.heads:
        raise InputError("head", f"{head} is none of the {spec.heads} heads")
    grid, key = known_grid(spec, lengths)
    if query is None:
        middle = [n // 2 for n in grid]
        query = int(np.ravel_multi_index(middle, grid))
    if not 0 <= query < prod(grid):
        raise InputError("query", f"{query} is none of the {prod(grid)} tokens")
    sizes = {"H": spec.heads, "NQ": prod(grid), "NK": prod(key)}
    known, _ = known_tables(spec.predicate, tables, sizes)
    report = simulate(spec, "cpu", q_tile, k_tile, lengths=lengths, tables=known)
    return Scene(spec, report, known, lengths, head, query)


def words(mask: Any, longest: int = 60) -> str:
    """What a mask is called: `sliding window or sinks`."""
    parts, name = [words(part) for part in mask.parts], mask.kind.replace("_", " ")
    if parts:
        name = f" {name} ".join(parts) if mask.kind in ("and", "or") else f"{name} ({', '.join(parts)})"
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


def rows_of(scene: Scene, first: int, stop: int) -> npt.NDArray[np.int8]:
    """Kinds of all key tiles for some rows of query tiles."""
    mask = scene.mask
    before = (scene.head if mask.heads > 1 else 0) * mask.tiling.rows
    kinds = np.zeros((stop - first, prod(mask.tiling.k_tiles)), np.int8)
    lists = mask.lists
    for kind, offsets, tiles in ((1, lists.partial_offsets, lists.partial_tiles), (2, lists.full_offsets, lists.full_tiles)):
        for row in range(first, stop):
            kinds[row - first, tiles[offsets[before + row] : offsets[before + row + 1]]] = kind
    return kinds


def coarse(scene: Scene) -> tuple[BlockMask, tuple[int, int]]:
    """The block mask with as many tiles to a cell, queries and keys, as it takes to draw it: a cell is full where all its tiles are."""
    mask, tiles, cell = scene.mask, [scene.report.q_tile, scene.report.k_tile], [1, 1]
    while max(mask.tiling.rows, mask.tiling.classes * prod(mask.tiling.k_tiles)) > 2 * MOST_CELLS:
        for i, counts in enumerate((mask.tiling.q_tiles, mask.tiling.k_tiles)):
            axis = max(range(scene.rank), key=lambda a: counts[a])
            tiles[i] = tuple(side * (2 if a == axis else 1) for a, side in enumerate(tiles[i]))
            cell[i] *= 2
        mask = classify(scene.spec, tiles[0], tiles[1], scene.lengths, scene.tables)
    return mask, (cell[0], cell[1])


def classes_apart(dense: npt.NDArray[np.int8], mask: BlockMask) -> npt.NDArray[np.int8]:
    """Rows of every class against its own key tiles, classes down the diagonal."""
    classes, columns = mask.tiling.classes, dense.shape[1]
    apart = np.zeros((len(dense), classes * columns), np.int8)
    rows = len(dense) // classes
    for c in range(classes):
        apart[c * rows : (c + 1) * rows, c * columns : (c + 1) * columns] = dense[c * rows : (c + 1) * rows]
    return apart
