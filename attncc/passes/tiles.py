"""Tilings of a token grid, and masks bound to known lengths: what block-mask analysis works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from attncc.ir.expr import Expr, const, substitute, variables
from attncc.ir.graph import Graph, GraphOp, Node
from attncc.passes.canonicalize import Band, bands_predicate

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
    def separable(self) -> bool:
        """Whether the mask is a product of bands."""
        return self.residual is const(True)

    def varies_with(self, name: str) -> bool:
        """Whether the mask depends on the batch element ("b") or the head ("h")."""
        return name in variables(self.residual)


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
    """The one mask of a canonical graph or kernel body."""
    (mask,) = graph.find(GraphOp.MASK)
    return mask


def bind(graph: Graph, query: Shape, key: Shape) -> BoundMask:
    """The canonical mask of a graph with its open lengths filled in."""
    mask = the_mask(graph)
    env = {f"n{side}{a}": const(n) for side, lengths in (("q", query), ("k", key)) for a, n in enumerate(lengths)}
    bands = tuple((substitute(low, env), substitute(high, env)) for low, high in mask["bands"])
    return BoundMask(bands, substitute(mask["residual"], env), query, key, graph.order)
