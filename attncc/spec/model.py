"""What every part of a spec shares: frozen pydantic models that refuse unknown keys, and the token grid their formulas speak of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from attncc.ir.expr import Expr, const, var

Axes = tuple[int | None, ...]
NO_DROPOUT = "dropout of weights is not built; leave it out, and drop parts of the output instead"


class Part(BaseModel):
    """A piece of a spec: immutable, hashable, compared by value; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Grid:
    """Query and key token grids of equal rank. Lengths given at run time (None) are the variables `nq0` .. and `nk0` .. .

    Self-attention (`shared`) has one grid: its key lengths are its query lengths, known or not. `heads` counts query heads, where known.
    """

    query: Axes
    key: Axes
    shared: bool = False
    heads: int | None = None

    @property
    def rank(self) -> int:
        return len(self.query)

    def length(self, side: str, axis: int) -> Expr:
        """Length of an axis of side "q" or "k"."""
        known = (self.query if side == "q" else self.key)[axis]
        return var(f"n{'q' if self.shared else side}{axis}") if known is None else const(known)

    def coordinate(self, side: str, axis: int) -> Expr:
        """Coordinate of the token on an axis."""
        return var(f"{side}{axis}")

    def flat(self, side: str) -> Expr:
        """Row-major index of the token."""
        index = self.coordinate(side, 0)
        for axis in range(1, self.rank):
            index = index * self.length(side, axis) + self.coordinate(side, axis)
        return index

    def tokens(self, side: str) -> Expr:
        """Number of tokens of a side."""
        total = self.length(side, 0)
        for axis in range(1, self.rank):
            total = total * self.length(side, axis)
        return total

    @cached_property
    def offset(self) -> Expr:
        """How far bottom-right alignment shifts the diagonal: key tokens minus query tokens."""
        return const(0) if self.shared else self.tokens("k") - self.tokens("q")
