"""The block mask as compact data for a page: two bits a cell, in base64, by head."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attncc.simulator.pictures.scene import Scene, classes_apart, coarse

MOST_HEADS = 16
"""Heads on a page, at most, where masks differ between them."""


@dataclass(frozen=True)
class Cells:
    """Kinds of cells (0 empty, 1 partial, 2 full) of some heads; a cell stands for `cell` tiles, of queries and of keys."""

    heads: tuple[npt.NDArray[np.int8], ...]
    cell: tuple[int, int]
    all_heads: int
    tiles: tuple[tuple[int, ...], tuple[int, ...]]

    @staticmethod
    def of(scene: Scene) -> Cells:
        """Those of a scene's block mask, of the first batch element."""
        mask, cell = coarse(scene)
        dense = mask.to_dense()[0]
        heads = tuple(classes_apart(kinds, mask) for kinds in dense[:MOST_HEADS])
        return Cells(heads, cell, mask.heads, (scene.report.q_tile, scene.report.k_tile))

    @property
    def note(self) -> str:
        """What a reader must know to read the picture right."""
        parts = []
        if max(self.cell) > 1:
            parts.append(f"Each cell stands for {self.cell[0]} by {self.cell[1]} tiles and is full where all of them are.")
        if self.all_heads > len(self.heads):
            parts.append(f"The first {len(self.heads)} of {self.all_heads} heads.")
        return " ".join(parts)

    def to_script(self) -> str:
        """As JSON that may stand inside a script element: nothing in it ends one."""
        rows, columns = self.heads[0].shape
        data: dict[str, Any] = {
            "rows": rows,
            "columns": columns,
            "cell": self.cell,
            "tiles": self.tiles,
            "heads": [_packed(kinds) for kinds in self.heads],
        }
        return json.dumps(data).replace("<", "\\u003c")


def _packed(kinds: npt.NDArray[np.int8]) -> str:
    """Four cells a byte, the first in the lowest bits."""
    flat = kinds.reshape(-1).astype(np.uint8)
    fours = np.pad(flat, (0, -len(flat) % 4)).reshape(-1, 4)
    return base64.b64encode((fours << np.array([0, 2, 4, 6], np.uint8)).sum(axis=1).astype(np.uint8).tobytes()).decode()
