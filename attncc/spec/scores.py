"""Score maps: what happens to `s = scale * q.k` before the mask. An ordered tuple, applied left to right; each is one formula."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Op, Table, apply, clamp, const, load, maximum, minimum, select, substitute, tables, var, variables
from attncc.spec.masks.base import TABLE_NAME
from attncc.spec.masks.text import Captured, read_text
from attncc.spec.model import Grid, Part


class ScoreMap(Part):
    """A score map. `problems` says what contradicts the grid, each after the field's name."""

    def problems(self, grid: Grid) -> list[str]:
        return []

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        """The mapped score."""
        raise NotImplementedError


class AddedMap(ScoreMap):
    """A score map that adds what positions and tables say."""

    def term(self, grid: Grid, heads: int) -> Expr:
        """What it adds."""
        raise NotImplementedError

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        return s + self.term(grid, heads)


class Scale(ScoreMap):
    """The factor of q.k, in place of 1 / sqrt(head_dim). Stands first. May be negative: nothing assumes scale > 0."""

    kind: Literal["scale"] = "scale"
    value: float

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        return s  # the scale belongs to the product itself: see `attncc.spec.lower`


class Softcap(ScoreMap):
    """cap * tanh(s / cap), which keeps scores within (-cap, cap) (Gemma 2)."""

    kind: Literal["softcap"] = "softcap"
    cap: float = Field(gt=0)

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        return apply(Op.TANH, s * (1.0 / self.cap)) * self.cap


class Alibi(ScoreMap):
    """s - slope[h] * |q + Nk - Nq - k|, tokens of one axis (Press et al., arXiv 2108.12409).

    `slopes` gives one per query head (default: the geometric ones of the paper); `trainable` makes them the run-time input
    `alibi_slopes` `[H]`, which then has a gradient.
    """

    kind: Literal["alibi"] = "alibi"
    slopes: tuple[float, ...] | None = None
    trainable: bool = False

    def problems(self, grid: Grid) -> list[str]:
        if grid.rank != 1:
            return ["kind: alibi is defined on one axis of tokens"]
        if self.slopes is not None and (self.trainable or len(self.slopes) != grid.heads):
            return [f"slopes: give {grid.heads}, one for each head, or make them trainable"]
        return []

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        values = None if self.trainable else self.slopes or standard_slopes(heads)
        slope = load(Table("alibi_slopes", Kind.FLOAT, ("H",) if values is None else (heads,), values), var("h"))
        distance = apply(Op.ABS, grid.flat("q") + grid.offset - grid.flat("k"))
        return s - slope * apply(Op.FLOAT, distance)


class RelativeBias(AddedMap):
    """s + table[h, k - q]: a learned bias by offset, clipped on axis a to `extent[a] - 1` steps either way.

    The run-time input named by `table` has shape `[H, 2 * extent[0] - 1, ...]`, offset zero in the middle (as in NAT and Swin).
    """

    kind: Literal["relative_bias"] = "relative_bias"
    extent: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=3)
    table: str = Field(default="relative_bias", pattern=r"^[a-z][a-z0-9_]*$")

    def problems(self, grid: Grid) -> list[str]:
        same = len(self.extent) == grid.rank
        return [] if same else [f"extent: has {len(self.extent)} axes, tokens have {grid.rank}"]

    def term(self, grid: Grid, heads: int) -> Expr:
        shape: tuple[int | str, ...] = ("H", *(2 * e - 1 for e in self.extent))
        steps = [grid.coordinate("k", a) - grid.coordinate("q", a) + (e - 1) for a, e in enumerate(self.extent)]
        index = [clamp(step, 0, 2 * (e - 1)) for step, e in zip(steps, self.extent)]
        return load(Table(self.table, Kind.FLOAT, shape), var("h"), *index)


class DenseBias(AddedMap):
    """s + table[b, h, q, k]: a bias for every pair, a run-time float table `[B, H, Nq, Nk]`, which has a gradient.

    Without `per_batch` or `per_head` that axis of the table is 1. Holds what no formula says: Graphormer's spatial encoding.
    """

    kind: Literal["dense_bias"] = "dense_bias"
    table: str = Field(default="bias", pattern=TABLE_NAME)
    per_batch: bool = True
    per_head: bool = True

    def term(self, grid: Grid, heads: int) -> Expr:
        shape = ("B" if self.per_batch else 1, "H" if self.per_head else 1, "NQ", "NK")
        first = (var("b") if self.per_batch else const(0), var("h") if self.per_head else const(0))
        return load(Table(self.table, Kind.FLOAT, shape), *first, grid.flat("q"), grid.flat("k"))


class _Indexed(Part):
    """A run-time float table over some of the batch b, the query head h, the query q and the key k, in this order."""

    index: tuple[Literal["b", "h", "q", "k"], ...] = Field(default=("h",), min_length=1)

    def problems(self, grid: Grid) -> list[str]:
        ordered = list(self.index) == [i for i in "bhqk" if i in self.index]
        return [] if ordered else ["index: name each of b, h, q and k at most once, in this order"]

    def _read(self, name: str, grid: Grid) -> Expr:
        sizes = {"b": "B", "h": "H", "q": "NQ", "k": "NK"}
        at = {"b": var("b"), "h": var("h"), "q": grid.flat("q"), "k": grid.flat("k")}
        return load(Table(name, Kind.FLOAT, tuple(sizes[i] for i in self.index)), *(at[i] for i in self.index))


class Bias(_Indexed, AddedMap):
    """s + table[index]: a run-time bias for each head, query row, key or what `index` names; has a gradient."""

    kind: Literal["bias"] = "bias"
    table: str = Field(default="bias", pattern=TABLE_NAME)

    def term(self, grid: Grid, heads: int) -> Expr:
        return self._read(self.table, grid)


class Temperature(_Indexed, ScoreMap):
    """s * table[index]: a run-time factor for each head, query row, key or what `index` names; of any sign; has a gradient.

    The factor is the inverse temperature. With `scale` 1 and normalized q and k it is Swin V2's and QK-norm's logit scale.
    """

    kind: Literal["temperature"] = "temperature"
    table: str = Field(default="temperature", pattern=TABLE_NAME)

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        return s * self._read(self.table, grid)


class T5Bias(AddedMap):
    """s + table[h, bucket(k - q)]: T5's relative bias, a run-time float table `[H, buckets]`, which has a gradient.

    Small distances have a bucket each, larger ones share buckets that grow as the logarithm, up to `max_distance`, and what is farther
    shares the last. `bidirectional` gives half of the buckets to keys after the query; otherwise these share bucket 0.

    Source: Raffel et al., arXiv 1910.10683. Bucket limits are whole numbers, found by exact integer comparison.
    """

    kind: Literal["t5_bias"] = "t5_bias"
    buckets: int = Field(default=32, ge=2, le=256)
    max_distance: int = Field(default=128, ge=2, le=1 << 20)
    bidirectional: bool = True
    table: str = Field(default="t5_bias", pattern=TABLE_NAME)

    def problems(self, grid: Grid) -> list[str]:
        if grid.rank != 1:
            return ["kind: t5_bias is defined on one axis of tokens"]
        if self.bidirectional and (self.buckets % 2 or self.buckets < 4):
            return ["buckets: must be even and at least 4 where bidirectional"]
        return [] if self.max_distance > self._side // 2 else [f"max_distance: must exceed {self._side // 2}, half of a side's buckets"]

    @property
    def _side(self) -> int:
        return self.buckets // 2 if self.bidirectional else self.buckets

    def term(self, grid: Grid, heads: int) -> Expr:
        step = grid.flat("k") - grid.flat("q")
        distance = apply(Op.ABS, step) if self.bidirectional else maximum(-step, 0)
        bucket = self._bucket(distance)
        if self.bidirectional:
            bucket = bucket + select(step <= 0, 0, self._side)
        return load(Table(self.table, Kind.FLOAT, ("H", self.buckets)), var("h"), bucket)

    def _bucket(self, distance: Expr) -> Expr:
        exact = self._side // 2
        bucket = minimum(distance, exact)
        for limit in _shared_buckets(self._side, self.max_distance):
            bucket = bucket + select(distance < limit, 0, 1)
        return bucket


@lru_cache
def _shared_buckets(side: int, farthest: int) -> tuple[int, ...]:
    """Least distance of every bucket that several distances share, but the first, which begins at side // 2."""
    exact = side // 2
    shared, found, distance = side - exact, [], exact
    for step in range(1, shared):
        # floor(log(distance / exact) / log(farthest / exact) * shared) >= step, without logarithms.
        distance = bisect_left(range(farthest), farthest**step * exact**shared, distance, key=lambda n: n**shared * exact**step)
        found.append(distance)
    return tuple(found)


class Expression(ScoreMap):
    """A score map written as text over the score `s` and the vocabulary of `Predicate`, with floats and the functions of the language.

    `name[b, h, q, k]` (each index at most once) reads a run-time float table, which has a gradient, or an integer one where `integers`
    lists the name. `exp log sqrt tanh sigmoid softplus erf relu pow abs min max select float` may be called; `float(q)` is a number.
    Under a softmax a score of `-inf` masks its pair. A table declared in `tables` has the shape given there and may be indexed by any
    integers.
    """

    kind: Literal["expression"] = "expression"
    text: str
    integers: tuple[str, ...] = ()
    tables: tuple[Captured, ...] = ()

    def problems(self, grid: Grid) -> list[str]:
        try:
            value = self._read(grid)
        except ValueError as error:
            return [f"text: {error}"]
        unread = set(self.integers) - {t.name for t in tables(value)}
        found = [f"integers: the text reads no table {name!r}" for name in sorted(unread)]
        return found if value.kind is Kind.FLOAT else [*found, f"text: must be a float, this one is {value.kind.value}"]

    def apply(self, s: Expr, grid: Grid, heads: int) -> Expr:
        return substitute(self._read(grid), {"s": s})

    def _read(self, grid: Grid) -> Expr:
        return read_text(self.text, grid, {"s": _S}, lambda name: Kind.INT if name in self.integers else Kind.FLOAT, None, self.tables)

    @classmethod
    def from_score_mod(cls, mod: Callable[..., Any], **lengths: int) -> tuple[Expression, dict[str, Any]]:
        """The score map that FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)` computes, read by calling it once with tracers.

        Args:
            mod: the function, over flattened tokens.
            lengths: `b=`, `h=`, `q=`, `k=`, how many of an index there are; needed where bits of that index are used.

        Returns:
            The score map, and by name the tensors that it captured, for every call of its kernel; float ones keep their gradients.

        Raises:
            UnsupportedError: what the language of specs has not; names the operation.
        """
        from attncc.integrations.flex_import import from_score_mod

        return from_score_mod(mod, lengths)


_S = var("s", Kind.FLOAT)
Score = Annotated[
    Scale | Softcap | Alibi | RelativeBias | DenseBias | Bias | Temperature | T5Bias | Expression, Field(discriminator="kind")
]


Factor = Annotated[RelativeBias | DenseBias | Bias | T5Bias | Expression, Field(discriminator="kind")]
"""Of the score maps, those that can say a factor of weights: what they add to a score, or a text of positions and tables."""


def factor_value(factor: Factor, grid: Grid, heads: int) -> Expr:
    """What normalized weights are multiplied by."""
    return factor.apply(_S, grid, heads) if isinstance(factor, Expression) else factor.term(grid, heads)


def factor_problems(factor: Factor, grid: Grid, heads: int) -> list[str]:
    """What contradicts the grid or the use as a factor, each after the field's name."""
    found = factor.problems(grid)
    if not found and "s" in variables(factor_value(factor, grid, heads)):
        return ["text: reads the score s; a factor of weights is one of positions and tables"]
    return found


def standard_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 (h+1) / H) for a power of two; otherwise those of the next lower power, then every other one of the next higher."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    extra = [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]
    return tuple(slopes + extra)
