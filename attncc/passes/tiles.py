"""Tilings of a token grid, and masks bound to known lengths: what block-mask analysis works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from attncc.ir.expr import Expr, Op, Table, all_of, const, nodes, substitute, tables, var, variables
from attncc.ir.graph import Graph, GraphOp, Node
from attncc.ir.intervals import intervals
from attncc.passes.canonicalize import Band, bands_predicate, split

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BoundMask:
    """A canonical mask over known lengths. `order` is the token order: residue classes of every axis."""

    bands: tuple[Band, ...]
    residual: Expr
    query: Shape
    key: Shape
    order: Shape

    @cached_property
    def predicate(self) -> Expr:
        """Bands and residual as one predicate over coordinates within a class."""
        return bands_predicate(self.bands) & self.residual

    @property
    def banded(self) -> bool:
        """Whether the mask is a product of bands."""
        return self.residual is const(True)

    @cached_property
    def separable(self) -> bool:
        """Whether the mask is a product of bands that lengths decide: the same for all heads, without tables."""
        return self.banded and all(map(_plain, self.bands))

    def varies_with(self, name: str) -> bool:
        """Whether the mask depends on the batch element ("b") or the head ("h")."""
        return name in variables(self.predicate)

    @cached_property
    def reads(self) -> tuple[Table, ...]:
        """Run-time tables that the mask reads."""
        return tuple(tables(self.predicate))

    @cached_property
    def hull(self) -> BoundMask:
        """A product of bands that allows at least as much: each as wide as its head and its tables may make it."""
        bands = tuple(band if _plain(band) else _widest(band) for band in self.bands)
        return BoundMask(bands, const(True), self.query, self.key, self.order)

    @cached_property
    def beyond_hull(self) -> Expr:
        """What the mask asks beside its hull."""
        ends = [(var(f"k{a}"), *band) for a, band in enumerate(self.bands) if not _plain(band)]
        return all_of([x for key, low, high in ends for x in (low <= key, key <= high)]) & self.residual


def _plain(band: Band) -> bool:
    return not any(tables(end) or {"b", "h"} & variables(end) for end in band)


def _widest(band: Band) -> Band:
    """The least low and the greatest high, for each query, over all heads, batch elements and entries of tables."""
    least, most = const(-(2**31)), const(2**31 - 1)
    box = {name: (const(0), most) for name in ("b", "h")}
    low, high = (intervals(end, box, {n: (least, most) for n in nodes(end) if n.op is Op.LOAD})[end] for end in band)
    return low[0], high[1]


@dataclass(frozen=True)
class Tiling:
    """A grid cut into tiles class by class. Rows are counted class-major: `row = class * tiles + tile`, both row-major."""

    mask: BoundMask
    q_tile: Shape
    k_tile: Shape

    @property
    def rank(self) -> int:
        return len(self.q_tile)

    @property
    def classes(self) -> int:
        """Residue classes of the whole grid."""
        return prod(self.mask.order)

    @property
    def q_tiles(self) -> Shape:
        """Query tiles of one class, by axis."""
        return tiles_per_axis(self.mask.query, self.mask.order, self.q_tile)

    @property
    def k_tiles(self) -> Shape:
        """Key tiles of one class, by axis."""
        return tiles_per_axis(self.mask.key, self.mask.order, self.k_tile)

    @property
    def rows(self) -> int:
        """Rows of query tiles, all classes together."""
        return self.classes * prod(self.q_tiles)

    def residues(self) -> Iterator[Shape]:
        """Every residue class, row-major."""
        for index in range(self.classes):
            yield unflatten(index, self.mask.order)


def tiles_per_axis(lengths: Shape, order: Shape, tile: Shape) -> Shape:
    """Tiles that cover the longest class of every axis."""
    return tuple(ceildiv(ceildiv(n, d), t) for n, d, t in zip(lengths, order, tile))


def ceildiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return (a + b - 1) // b


def unflatten(index: int, shape: Shape) -> Shape:
    """Row-major coordinates of an index."""
    coordinates = []
    for size in reversed(shape):
        coordinates.append(index % size)
        index //= size
    return tuple(reversed(coordinates))


def class_lengths(lengths: Shape, order: Shape, residue: Shape) -> Shape:
    """Tokens of every axis that fall in a residue class."""
    return tuple(max(0, (n - r + d - 1) // d) for n, d, r in zip(lengths, order, residue))


def the_mask(graph: Graph) -> Node:
    """The one mask of a canonical graph or kernel body; chains that meet in a graph share it."""
    *others, mask = graph.find(GraphOp.MASK)
    assert all(m[name] == mask[name] for m in others for name in ("bands", "residual"))
    return mask


def bind(graph: Graph, query: Shape, key: Shape) -> BoundMask:
    """The canonical mask of a graph with its open lengths filled in."""
    mask = the_mask(graph)
    bands = tuple((filled_in(low, query, key), filled_in(high, query, key)) for low, high in mask["bands"])
    return BoundMask(bands, filled_in(mask["residual"], query, key), query, key, graph.order)


def in_plain_order(predicate: Expr, query: Shape, key: Shape) -> BoundMask:
    """A canonical mask of a predicate over known lengths, tokens as they stand; needs no graph."""
    grid = Graph(query, key, ())
    return BoundMask(*split(filled_in(predicate, query, key), grid), query, key, grid.order)


def filled_in(formula: Expr, query: Shape, key: Shape) -> Expr:
    """The formula with its lengths replaced by numbers."""
    return substitute(formula, {f"n{s}{a}": const(n) for s, grid in (("q", query), ("k", key)) for a, n in enumerate(grid)})
