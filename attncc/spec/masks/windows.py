"""Masks over the coordinates of a grid: windows around the query, cells of a partition, lines, discs, congruences."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from attncc.ir.expr import Expr, all_of, const, maximum, minimum
from attncc.spec.masks.base import (
    PADDING,
    Edge,
    Missing,
    Pattern,
    PerAxis,
    Reach,
    Reaches,
    Sizes,
    any_of,
    axis_problems,
    beyond,
    by_axis,
    edge_problems,
)
from attncc.spec.model import Grid


class Neighborhood(Pattern):
    """Generalized neighborhood attention: on each axis the `window` keys nearest the query, shifted inward at the edges.

    Queries in a group of `stride` share the window of the group's leader; `dilation` attends within a residue class; a `causal` axis
    sees the window's part up to the query. Every parameter is one number for all axes or one for each.

    Source: Hassani et al., Generalized Neighborhood Attention, arXiv 2504.16922; edge cases as NATTEN computes them.
    """

    bounded: ClassVar[bool] = True
    kind: Literal["neighborhood"] = "neighborhood"
    window: PerAxis
    stride: PerAxis = 1
    dilation: PerAxis = 1
    causal: bool | tuple[bool, ...] = False

    def axes(self, rank: int) -> list[tuple[int, int, int, bool]]:
        """(window, stride, dilation, causal) of every axis."""
        fields = (self.window, self.stride, self.dilation, self.causal)
        columns = [by_axis(f, rank) for f in fields]
        return list(zip(*columns))

    def problems(self, grid: Grid) -> list[str]:
        if uneven := axis_problems(self, ("window", "stride", "dilation", "causal"), grid):
            return uneven[:1]
        found = [] if grid.shared else ["needs key_tokens to be left out: queries and keys share one grid"]
        for axis, (window, stride, dilation, _) in enumerate(self.axes(grid.rank)):
            length = grid.key[axis]
            if min(window, stride, dilation) < 1:
                found.append(f"window, stride and dilation of axis {axis} must be at least 1")
            elif stride > window:
                found.append(f"stride {stride} exceeds window {window} on axis {axis}")
            elif length is not None and window * dilation > length:
                found.append(f"window {window} x dilation {dilation} exceeds the {length} tokens of axis {axis}")
        return found

    def predicate(self, grid: Grid) -> Expr:
        return all_of([neighborhood_axis(grid, axis, *rule) for axis, rule in enumerate(self.axes(grid.rank))])


def neighborhood_axis(grid: Grid, axis: int, window: int | Expr, stride: int | Expr, dilation: int, causal: bool) -> Expr:
    """One axis of a neighborhood, on positions i and j within a residue class.

    Classes differ in length when the dilation does not divide the axis.
    """
    query, key = grid.coordinate("q", axis), grid.coordinate("k", axis)
    i, j, residue = query // dilation, key // dilation, query % dilation
    length = (grid.length("k", axis) - residue + (dilation - 1)) // dilation
    same = (key % dilation).equals(residue)
    group = i // stride * stride
    if causal:
        leader = minimum(group + (stride - 1), length - 1)
        return same & (maximum(leader - (window - 1), 0) <= j) & (j <= i)
    leader = minimum(group + stride // 2, length - 1)
    start = minimum(maximum(leader - window // 2, 0), length - window)
    return same & (start <= j) & (j < start + window)


class Window(Pattern):
    """Keys from `left` before the query to `right` after it on every axis, cut at the grid's ends: q_a - left <= k_a <= q_a + right.

    None leaves a side open. Unlike a `Neighborhood`, whose window moves inward, edge queries have fewer keys (TransNeXt's local
    part, ColorMNet's 15 x 15 window), or keep the m keys that lie beyond the grid, all alike. `edge` "zero_pad": keys and values of zeros,
    which add m exp(score of 0) to a softmax's denominator and nothing to its output, as `unfold` with zero padding does (SASA, arXiv
    1906.05909). "pad_token": the learned key and value `k_pad` `[key_heads, head_dim]` and `v_pad` `[value_heads, value_dim]`, run-time
    inputs, float32 with gradients. Score maps act on these scores too; a map that reads where a key stands is refused beside them.
    """

    kind: Literal["window"] = "window"
    left: Reaches | tuple[Reach | None, ...] | None = None
    right: Reaches | tuple[Reach | None, ...] | None = None
    edge: Edge = "truncate"

    def problems(self, grid: Grid) -> list[str]:
        found = [*axis_problems(self, ("left", "right"), grid), *edge_problems(self.edge, ("truncate", *PADDING))]
        open_sides = [name for name in ("left", "right") if None in by_axis(getattr(self, name), 1)]
        return [*found, *([f"edge {self.edge!r} needs {open_sides[0]} on every axis"] if self.edge in PADDING and open_sides else [])]

    def predicate(self, grid: Grid) -> Expr:
        terms = []
        for axis, (left, right) in enumerate(zip(by_axis(self.left, grid.rank), by_axis(self.right, grid.rank))):
            query, key = grid.coordinate("q", axis), grid.coordinate("k", axis)
            terms += [] if left is None else [query - left <= key]
            terms += [] if right is None else [key <= query + right]
        return all_of(terms)

    def missing(self, grid: Grid) -> Missing | None:
        sides = enumerate(zip(by_axis(self.left, grid.rank), by_axis(self.right, grid.rank)))
        return beyond(
            self.edge, grid, [(grid.coordinate("q", a) - (left or 0), (left or 0) + (right or 0) + 1) for a, (left, right) in sides]
        )


class Partition(Pattern):
    """The tokens of the query's own cell: (q_a - shift) // size == (k_a - shift) // size on every axis.

    A shift moves the cells; the first and the last are then shorter. That is Swin's cyclic shift with its mask of regions, without
    rolling the tokens (arXiv 2103.14030); shift 0 is block attention (MaxViT). `must_divide` holds a grid to whole cells; `edge`
    "zero_pad" and "pad_token" (DaViT, arXiv 2204.03645) fill up the others as those of a `Window`.
    """

    bounded: ClassVar[bool] = True
    kind: Literal["partition"] = "partition"
    size: Sizes
    shift: Reaches = 0
    edge: Edge = "truncate"

    def problems(self, grid: Grid) -> list[str]:
        found = [*axis_problems(self, ("size", "shift"), grid), *edge_problems(self.edge, ("truncate", "must_divide", *PADDING))]
        if found:
            return found
        sizes, shifts = by_axis(self.size, grid.rank), by_axis(self.shift, grid.rank)
        found = [f"shift {s} is no less than size {n} on axis {a}" for a, (n, s) in enumerate(zip(sizes, shifts)) if s >= n]
        return [*found, *(_not_divided("size", sizes, grid) if self.edge == "must_divide" else [])]

    def predicate(self, grid: Grid) -> Expr:
        rules = enumerate(zip(by_axis(self.size, grid.rank), by_axis(self.shift, grid.rank)))
        return all_of([self._cell(grid, "q", a, n, s).equals(self._cell(grid, "k", a, n, s)) for a, (n, s) in rules])

    def missing(self, grid: Grid) -> Missing | None:
        rules = enumerate(zip(by_axis(self.size, grid.rank), by_axis(self.shift, grid.rank)))
        return beyond(self.edge, grid, [(self._cell(grid, "q", a, n, s) * n + s, n) for a, (n, s) in rules])

    def _cell(self, grid: Grid, side: str, axis: int, size: int, shift: int) -> Expr:
        return (grid.coordinate(side, axis) - shift) // size


def _not_divided(name: str, sizes: tuple[int, ...], grid: Grid) -> list[str]:
    """Sizes that do not divide the known lengths of their axis."""
    sides = {"query": grid.query, "key": () if grid.shared else grid.key}
    pairs = ((side, a, n, length) for side, axes in sides.items() for a, (n, length) in enumerate(zip(sizes, axes)) if length)
    return [f"{name} {n} does not divide the {length} {side} tokens of axis {a}" for side, a, n, length in pairs if length % n]


class Congruence(Pattern):
    """Keys with the query's remainder on every axis: k_a % step == q_a % step.

    Strided attention (Sparse Transformer, arXiv 1904.10509) and MaxViT's grid attention, whose step is length / grid size. Tokens are
    walked class by class, so that tiles stay dense. `must_divide` holds a grid to classes of equal size.
    """

    bounded: ClassVar[bool] = True
    kind: Literal["congruence"] = "congruence"
    step: Sizes
    edge: Edge = "truncate"

    def problems(self, grid: Grid) -> list[str]:
        found = [*axis_problems(self, ("step",), grid), *edge_problems(self.edge, ("truncate", "must_divide"))]
        if found or self.edge != "must_divide":
            return found
        return _not_divided("step", by_axis(self.step, grid.rank), grid)

    def predicate(self, grid: Grid) -> Expr:
        steps = enumerate(by_axis(self.step, grid.rank))
        return all_of([(grid.coordinate("q", a) % n).equals(grid.coordinate("k", a) % n) for a, n in steps if n > 1])


class Halo(Pattern):
    """The query's block and `halo` keys around it, on every axis: all queries of a block share their keys.

    With start = q_a // block * block: start - halo <= k_a < start + block + halo. Keys beyond the grid are cut off, or kept by `edge`
    "zero_pad" (as HaloNet does) or "pad_token" as those of a `Window`. `must_divide` holds a grid to whole blocks.

    Source: Vaswani et al., Scaling Local Self-Attention (HaloNet), arXiv 2103.12731.
    """

    bounded: ClassVar[bool] = True
    kind: Literal["halo"] = "halo"
    block: Sizes
    halo: Reaches
    edge: Edge = "truncate"

    def problems(self, grid: Grid) -> list[str]:
        found = [*axis_problems(self, ("block", "halo"), grid), *edge_problems(self.edge, ("truncate", "must_divide", *PADDING))]
        if found or self.edge != "must_divide":
            return found
        return _not_divided("block", by_axis(self.block, grid.rank), grid)

    def predicate(self, grid: Grid) -> Expr:
        rules = zip(by_axis(self.block, grid.rank), by_axis(self.halo, grid.rank))
        return all_of([self._axis(grid, a, block, halo) for a, (block, halo) in enumerate(rules)])

    def missing(self, grid: Grid) -> Missing | None:
        rules = enumerate(zip(by_axis(self.block, grid.rank), by_axis(self.halo, grid.rank)))
        return beyond(self.edge, grid, [(grid.coordinate("q", a) // n * n - halo, n + 2 * halo) for a, (n, halo) in rules])

    def _axis(self, grid: Grid, axis: int, block: int, halo: int) -> Expr:
        start, key = grid.coordinate("q", axis) // block * block, grid.coordinate("k", axis)
        return (start - halo <= key) & (key <= start + (block + halo - 1))


class Disc(Pattern):
    """Keys nearer than `radius`: the sum of (k_a - q_a) ** 2 over the axes is less than radius ** 2, in integers.

    Source: Liu et al., CLEAR, arXiv 2412.16112 (strictly less: radius 2 is the 3 x 3 square); cut at the grid's ends.
    """

    kind: Literal["disc"] = "disc"
    radius: Annotated[int, Field(ge=1, le=20_000)]
    edge: Edge = "truncate"

    def problems(self, grid: Grid) -> list[str]:
        return edge_problems(self.edge, ("truncate",))

    def predicate(self, grid: Grid) -> Expr:
        steps = [grid.coordinate("k", a) - grid.coordinate("q", a) for a in range(grid.rank)]
        # The bands bound what is squared, and give each row its ranges of keys.
        box = all_of([self._band(grid, a) for a in range(grid.rank)])
        distance: Expr = const(0)
        for step in steps:
            distance = distance + step * step
        return box & (distance < self.radius**2) if grid.rank > 1 else box

    def _band(self, grid: Grid, axis: int) -> Expr:
        query, key = grid.coordinate("q", axis), grid.coordinate("k", axis)
        return (query - (self.radius - 1) <= key) & (key <= query + (self.radius - 1))


class Axial(Pattern):
    """Keys on a line through the query: all coordinates but one are the query's. On two axes, its row and its column.

    `axes` says along which axes lines run (default: all).

    Source: Huang et al., CCNet (criss-cross attention), arXiv 1811.11721; the query itself counts once.
    """

    kind: Literal["axial"] = "axial"
    axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] | None = Field(default=None, min_length=1)

    def problems(self, grid: Grid) -> list[str]:
        return [f"axes: there is no axis {a}, tokens have {grid.rank}" for a in self.axes or () if a >= grid.rank]

    def predicate(self, grid: Grid) -> Expr:
        same = [grid.coordinate("q", a).equals(grid.coordinate("k", a)) for a in range(grid.rank)]
        lines = range(grid.rank) if self.axes is None else self.axes
        return any_of([all_of([same[a] for a in range(grid.rank) if a != along]) for along in lines])
