"""Score maps: what happens to `s = scale * q.k` before the mask. An ordered tuple, applied left to right; each is one formula."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Op, Table, apply, clamp, load, var
from attncc.spec.model import Grid, Part


class Scale(Part):
    """The factor of q.k, in place of 1 / sqrt(head_dim). Stands first. May be negative: nothing assumes scale > 0."""

    kind: Literal["scale"] = "scale"
    value: float

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        return s  # the scale belongs to the product itself: see `attncc.spec.lower`


class Softcap(Part):
    """cap * tanh(s / cap), which keeps scores within (-cap, cap) (Gemma 2)."""

    kind: Literal["softcap"] = "softcap"
    cap: float = Field(gt=0)

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        return apply(Op.TANH, s * (1.0 / self.cap)) * self.cap


class Alibi(Part):
    """s - slope[h] * |q + Nk - Nq - k|, tokens of one axis (Press et al., arXiv 2108.12409).

    `slopes` gives one per query head (default: the geometric ones of the paper); `trainable` makes them the run-time input
    `alibi_slopes` `[H]`, which then has a gradient.
    """

    kind: Literal["alibi"] = "alibi"
    slopes: tuple[float, ...] | None = None
    trainable: bool = False

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        values = None if self.trainable else self.slopes or standard_slopes(heads)
        slope = load(Table("alibi_slopes", Kind.FLOAT, ("H",) if values is None else (heads,), values), var("h"))
        distance = apply(Op.ABS, grid.flat("q") + grid.offset - grid.flat("k"))
        return s - slope * apply(Op.FLOAT, distance)


class RelativeBias(Part):
    """s + table[h, k - q]: a learned bias by offset, clipped on axis a to `extent[a] - 1` steps either way.

    The run-time input named by `table` has shape `[H, 2 * extent[0] - 1, ...]`, offset zero in the middle (as in NAT and Swin).
    """

    kind: Literal["relative_bias"] = "relative_bias"
    extent: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=3)
    table: str = Field(default="relative_bias", pattern=r"^[a-z][a-z0-9_]*$")

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        shape: tuple[int | str, ...] = ("H", *(2 * e - 1 for e in self.extent))
        steps = [grid.coordinate("k", a) - grid.coordinate("q", a) + (e - 1) for a, e in enumerate(self.extent)]
        index = [clamp(step, 0, 2 * (e - 1)) for step, e in zip(steps, self.extent)]
        return s + load(Table(self.table, Kind.FLOAT, shape), var("h"), *index)


Score = Annotated[Scale | Softcap | Alibi | RelativeBias, Field(discriminator="kind")]


def standard_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 (h+1) / H) for a power of two; otherwise those of the next lower power, then every other one of the next higher."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    extra = [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]
    return tuple(slopes + extra)
