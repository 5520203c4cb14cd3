"""Loads: what is done to rows of q and k before their product, as they are loaded. They act in order, and never on v.

Everything is computed in float32 (float64 for float64) and rounded to the spec's dtype once, after the last of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Table, load, tables, var
from attncc.ir.graph import GraphOp, Node, node
from attncc.spec.masks.base import TABLE_NAME, Align
from attncc.spec.model import Grid, Part

Width = Annotated[int, Field(ge=2, le=1024, multiple_of=2)]


class Load(Part):
    """What every kind has. `problems` says what contradicts the grid or the head, `apply` adds its op to the rows of a side."""

    def problems(self, grid: Grid, head_dim: int) -> list[str]:
        return []

    def read(self, grid: Grid, head_dim: int) -> tuple[Table, ...]:
        """The run-time tables it takes, of both sides."""
        return ()

    def apply(self, rows: Node, side: str, grid: Grid, head_dim: int) -> Node:
        """The rows of side "q" or "k", changed."""
        raise NotImplementedError


class QKNorm(Load):
    """Each row of q and of k divided by its norm: `rms` x / sqrt(mean(x^2) + eps), `l2` x / max(|x|, eps).

    With `weights` the row is then multiplied by the run-time table `q_norm` or `k_norm` `[D]` (float32, with gradient). With `l2`, a
    `Scale(value=1)` and a temperature, scores are cosines (Henry et al., arXiv 2010.04245; Swin V2); `rms` is what Qwen3 and Gemma 3 do.
    """

    kind: Literal["qk_norm"] = "qk_norm"
    norm: Literal["rms", "l2"] = "rms"
    eps: float = Field(default=1e-6, gt=0)
    weights: bool = False

    def read(self, grid: Grid, head_dim: int) -> tuple[Table, ...]:
        return tuple(Table(f"{side}_norm", Kind.FLOAT, (head_dim,)) for side in "qk" if self.weights)

    def apply(self, rows: Node, side: str, grid: Grid, head_dim: int) -> Node:
        weight = [node(GraphOp.INPUT, name=f"{side}_norm", dtype="float32", shape=(head_dim,))] if self.weights else []
        return node(GraphOp.NORM, rows, *weight, norm=self.norm, eps=self.eps)


class Rotary(Load):
    """Rotary position embedding: pairs of columns turned by position * base^(-2i / width) (Su et al., arXiv 2104.09864).

    `pairs` says which columns turn together: column i and i + width / 2 (`half`, GPT-NeoX and Llama), or 2i and 2i + 1 (`interleaved`,
    the paper and GPT-J). `width` columns turn, the rest stay (default: all). On a grid each axis turns its own equal share of them by
    its own coordinate. `factor` multiplies positions (position interpolation, arXiv 2306.15595).

    Positions are the tokens' coordinates; `bottom_right` shifts queries so that the last one stands opposite the last key (decoding
    with a cache). Or they are run-time integer tables `[B, Nq]` and `[B, Nk]` named by `positions` and `key_positions`: positions in
    a document, or places in a cache as StreamingLLM counts them (arXiv 2309.17453).
    """

    kind: Literal["rotary"] = "rotary"
    base: float = Field(default=10_000.0, gt=0)
    width: Width | None = None
    pairs: Literal["half", "interleaved"] = "half"
    factor: float = Field(default=1.0, gt=0)
    align: Align = "top_left"
    positions: str | None = Field(default=None, pattern=TABLE_NAME)
    key_positions: str | None = Field(default=None, pattern=TABLE_NAME)

    def problems(self, grid: Grid, head_dim: int) -> list[str]:
        width = self.width or head_dim
        found = [f"width: {width} columns of {head_dim}"] if width > head_dim else []
        if width % (2 * grid.rank):
            found.append(f"width: {width} columns are not {grid.rank} shares of whole pairs")
        if self.key_positions and not self.positions:
            found.append("key_positions: stands beside positions only")
        if self.positions and grid.rank > 1:
            found.append("positions: tables give one position a token, tokens have several axes")
        if self.positions and not grid.shared and not self.key_positions:
            found.append("key_positions: is needed where keys have a grid of their own (key_tokens)")
        return found

    def read(self, grid: Grid, head_dim: int) -> tuple[Table, ...]:
        return tables(*(p for side in "qk" for p in self._positions(side, grid)))

    def apply(self, rows: Node, side: str, grid: Grid, head_dim: int) -> Node:
        share = (self.width or head_dim) // grid.rank
        turns = tuple(self.factor * self.base ** (-2 * i / share) for i in range(share // 2))
        positions = self._positions(side, grid)
        inputs = [node(GraphOp.INPUT, name=t.name, dtype="int32", shape=t.shape) for t in tables(*positions)]
        return node(GraphOp.ROTATE, rows, *inputs, pairs=self.pairs, positions=positions, turns=turns)

    def _positions(self, side: str, grid: Grid) -> tuple[Expr, ...]:
        """One position an axis."""
        if self.positions:
            name, count = (self.positions, "NQ") if side == "q" or not self.key_positions else (self.key_positions, "NK")
            return (load(Table(name, Kind.INT, ("B", count)), var("b"), grid.flat(side)),)
        shifted = side == "q" and self.align == "bottom_right"
        return tuple(self._coordinate(side, grid, a, shifted) for a in range(grid.rank))

    def _coordinate(self, side: str, grid: Grid, axis: int, shifted: bool) -> Expr:
        at = grid.coordinate(side, axis)
        return at + (grid.length("k", axis) - grid.length("q", axis)) if shifted else at


LoadSpec = Annotated[QKNorm | Rotary, Field(discriminator="kind")]
