"""Masks that run-time integer tables decide: labels of tokens, tables of blocks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Table, const, load, var
from attncc.spec.masks.base import TABLE_NAME, Pattern, Sizes, axis_problems, by_axis
from attncc.spec.model import Axes, Grid


class Segments(Pattern):
    """Tokens with equal labels see each other: packed documents, padding, regions.

    `ids` names a run-time integer table `[B, Nq]`; `key_ids` one `[B, Nk]` for the keys (default: the same table).
    """

    flat: ClassVar[bool] = True
    kind: Literal["segments"] = "segments"
    ids: str = Field(default="segments", pattern=TABLE_NAME)
    key_ids: str | None = Field(default=None, pattern=TABLE_NAME)

    def problems(self, grid: Grid) -> list[str]:
        return [] if self.key_ids or grid.shared else ["key_ids is needed where keys have a grid of their own (key_tokens)"]

    def predicate(self, grid: Grid) -> Expr:
        queries = Table(self.ids, Kind.INT, ("B", "NQ"))
        keys = Table(self.key_ids, Kind.INT, ("B", "NK")) if self.key_ids else queries
        return load(queries, var("b"), grid.flat("q")).equals(load(keys, var("b"), grid.flat("k")))


class BlockTable(Pattern):
    """Pairs of blocks that a run-time integer table allows: any number but zero lets the block's queries see the block's keys.

    The table `[B, H, query blocks, key blocks]` lives on the device and may change with every call; `per_batch` and `per_head` make
    its first two axes 1. Blocks have `q_block` and `k_block` tokens on each axis, the last ones what is left; they count row-major.
    """

    bounded: ClassVar[bool] = True
    kind: Literal["block_table"] = "block_table"
    q_block: Sizes
    k_block: Sizes
    table: str = Field(default="block_table", pattern=TABLE_NAME)
    per_batch: bool = True
    per_head: bool = True

    def problems(self, grid: Grid) -> list[str]:
        if None in (*grid.query, *grid.key):
            return ["tokens: a block_table needs every length, which its table's shape follows from"]
        return axis_problems(self, ("q_block", "k_block"), grid)

    def predicate(self, grid: Grid) -> Expr:
        (row, rows), (column, columns) = self._cells(grid, "q", grid.query, self.q_block), self._cells(grid, "k", grid.key, self.k_block)
        shape = ("B" if self.per_batch else 1, "H" if self.per_head else 1, rows, columns)
        first = (var("b") if self.per_batch else const(0), var("h") if self.per_head else const(0))
        return ~load(Table(self.table, Kind.INT, shape), *first, row, column).equals(0)

    def _cells(self, grid: Grid, side: str, lengths: Axes, block: Sizes) -> tuple[Expr, int]:
        """A token's block, and how many blocks there are."""
        index, total = const(0), 1
        for axis, (length, size) in enumerate(zip(lengths, by_axis(block, grid.rank))):
            count = -(-(length or 1) // size)
            index, total = index * count + grid.coordinate(side, axis) // size, total * count
        return index, total
