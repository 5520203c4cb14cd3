"""What a picture is drawn of: a report's mask and tiles, one head and one query."""

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
from attncc.passes.given import known_tables
from attncc.passes.tiles import Shape, unflatten
from attncc.simulator.bounds import classify
from attncc.simulator.pictures.style import MOST_CELLS
from attncc.simulator.report import SpeedupReport


@dataclass(frozen=True)
class Scene:
    """What is drawn: a report's mask and tiles, the tables that the mask reads, and one head and query."""

    report: SpeedupReport
    tables: Mapping[str, Any]
    head: int
    query: int

    @staticmethod
    def of(report: SpeedupReport, tables: Mapping[str, Any] | None = None, head: int = 0, query: int | None = None) -> Scene:
        """The scene of a report, whose tables are checked again; by default of the query in the middle.

        Raises:
            InputError: a head or query that does not exist, missing tables.
        """
        spec, grid = report.spec, report.tokens
        if not 0 <= head < spec.heads:
            raise InputError("head", f"{head} is none of the {spec.heads} heads")
        if query is None:
            query = int(np.ravel_multi_index([n // 2 for n in grid], grid))
        if not 0 <= query < prod(grid):
            raise InputError("query", f"{query} is none of the {prod(grid)} tokens")
        sizes = {"H": spec.heads, "NQ": prod(grid), "NK": prod(report.key_tokens)}
        known, _ = known_tables(spec.predicate, tables, sizes)
        return Scene(report, known, head, query)

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
        return self.cut(self.report.q_tile, self.report.k_tile)

    def cut(self, q_tile: Shape, k_tile: Shape) -> BlockMask:
        """The block mask of other tiles."""
        return classify(self.report.spec, q_tile, k_tile, self.report.lengths, self.tables)

    def allowed(self, queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether queries see keys, flattened indices that broadcast."""
        r, env = self.report, {"b": 0, "h": self.head, **self.tables}
        for side, index, lengths in (("q", queries, r.tokens), ("k", keys, r.key_tokens)):
            for a in reversed(range(self.rank)):
                env |= {f"{side}{a}": index % lengths[a], f"n{side}{a}": lengths[a]}
                index = index // lengths[a]
        value = evaluate(self.report.spec.predicate, env)
        return np.broadcast_to(value, np.broadcast_shapes(queries.shape, keys.shape))


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
        mask = scene.cut(tiles[0], tiles[1])
    return mask, (cell[0], cell[1])


def classes_apart(dense: npt.NDArray[np.int8], mask: BlockMask) -> npt.NDArray[np.int8]:
    """Rows of every class against its own key tiles, classes down the diagonal."""
    classes, columns = mask.tiling.classes, dense.shape[1]
    apart = np.zeros((len(dense), classes * columns), np.int8)
    rows = len(dense) // classes
    for c in range(classes):
        apart[c * rows : (c + 1) * rows, c * columns : (c + 1) * columns] = dense[c * rows : (c + 1) * rows]
    return apart
