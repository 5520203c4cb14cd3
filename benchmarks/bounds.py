"""What a plan visits of its mask, at given lengths: the counts that useful work and the tile bound are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy.typing as npt

from attncc.ir.expr import tables
from attncc.passes.block_mask import block_mask
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import Shape, bind, ceildiv


@dataclass(frozen=True)
class Work:
    """Pairs that the mask allows and tiles that the plan visits, on average over batch and heads.

    `tiles` are those of the dense grid, without residue classes; `tile_area` the query-key pairs of one tile.
    """

    pairs: float
    all_pairs: int
    visited: float
    tiles: int
    tile_area: int

    @property
    def flop_bound(self) -> float:
        """All pairs over allowed pairs."""
        return self.all_pairs / self.pairs if self.pairs else float("inf")

    @property
    def tile_bound(self) -> float:
        """Tiles of the dense grid over visited tiles: no kernel with these tiles gains more over dense attention."""
        return self.tiles / self.visited if self.visited else float("inf")

    def useful_flops(self, heads: int, widths: tuple[int, int], batch: int = 1) -> float:
        """Multiplies and adds of the allowed pairs; widths of q and v."""
        return 2.0 * self.pairs * sum(widths) * heads * batch

    def hardware_flops(self, heads: int, widths: tuple[int, int], batch: int = 1) -> float:
        """The same of everything in the visited tiles."""
        return 2.0 * self.visited * self.tile_area * sum(widths) * heads * batch


def work(
    plan: KernelPlan, query: Shape, key: Shape, labels: Mapping[str, npt.NDArray[Any]] | None = None, batch: int = 1, heads: int = 1
) -> Work:
    """Counts for a plan at these lengths; `labels` are the integer tables that its mask reads."""
    mask = bind(plan.graph, query, key)
    read = {t.name: (labels or {})[t.name] for t in tables(mask.predicate)}
    found = block_mask(mask, plan.q_tile, plan.k_tile, read, batch, heads)
    copies = found.batch * found.heads
    tiles = prod(ceildiv(n, t) for n, t in (*zip(query, plan.q_tile), *zip(key, plan.k_tile)))
    area = prod(plan.q_tile) * prod(plan.k_tile)
    return Work(found.pairs / copies, prod(query) * prod(key), found.visited / copies, tiles, area)
