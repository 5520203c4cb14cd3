"""Pass: tile. Chooses tile shapes, warps and pipeline stages that fit the target, by what the mask makes them visit.

Every configuration is priced with its best shapes, or rejected with its reason; the plan keeps both. Some tile always fits: the
smallest one needs 16 rows a side. Pricing reads the bands of the mask, axis by axis; a residual is priced as if every tile were partial.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from math import ceil, inf, log2, prod

from attncc.errors import UnsupportedError
from attncc.ir.graph import Graph, GraphOp, Node, statistic
from attncc.passes.axis_tiles import axis_tiles
from attncc.passes.footprint import Configuration, configurations, unfit
from attncc.passes.tiles import BoundMask, Shape, Tiling, bind, class_lengths
from attncc.targets import Target

NOMINAL = {1: 4096, 2: 64, 3: 24}
"""Length of an axis given at run time, for pricing only, by rank of the grid; longer where short axes leave a grid of those few tokens."""
MASKED_TILE = 1.3
"""Price of a partial tile relative to a full one: evaluating a band mask costs about a third of a tile's work."""
LONGEST = 1 << 16
"""Axes are priced on at most this many tokens: the choice does not depend on more."""


@dataclass(frozen=True)
class Candidate:
    """A tiling with its price (visited multiply-adds, weighted) or the reason it was rejected."""

    q_tile: Shape
    k_tile: Shape
    configuration: Configuration
    price: float = inf
    rejected: str = ""

    def describe(self) -> str:
        """One line for plans and `explain`."""
        c = self.configuration
        return f"{list(self.q_tile)} x {list(self.k_tile)}, {c.num_warps} warps, {c.num_stages} stages"


@dataclass(frozen=True)
class Limits:
    """What a tiling must fit: the target; and, as one block mask serves all, the kernels that run `before` with its tiles.

    `demanded` by the user, a tile may crowd registers.
    """

    target: Target
    demanded: bool
    before: tuple[Graph, ...]

    def unfit(self, body: Graph, c: Configuration) -> str:
        """Why a configuration does not fit; empty where it does."""
        return unfit(body, c, self.target, self.demanded) or next(filter(None, (self._unfit_before(b, c) for b in self.before)), "")

    def _unfit_before(self, body: Graph, c: Configuration) -> str:
        """Why no warps and stages of an earlier kernel go with a configuration's tiles; empty where some do."""
        reasons = [unfit(body, own, self.target, self.demanded) for own in configurations(body, self.target, c.q_rows, c.k_rows)]
        return f"{reasons[0]} (the kernel before it)" if all(reasons) else ""


def tile(graph: Graph, target: Target, q_tile: Shape | None = None, k_tile: Shape | None = None) -> Graph:
    """The graph with tiles on its kernels.

    Args:
        graph: a fused graph.
        target: the device whose limits hold.
        q_tile, k_tile: shapes the user insists on; their products must be powers of two of at least 16.

    Raises:
        UnsupportedError: a demanded shape that does not fit the target.
    """
    # Kernels that run one after another see the same pairs: one block mask serves all, in tiles of the last, which reads values too.
    *before, last = graph.find(GraphOp.KERNEL)
    limits = Limits(target, q_tile is not None or k_tile is not None, tuple(n["body"] for n in before))
    main = _tiled(last, limits, q_tile, k_tile) if before else last

    def change(n: Node) -> Node:
        if n.op is not GraphOp.KERNEL:
            return n
        if statistic(n["body"]) is None:
            return _tiled(n, limits, q_tile, k_tile)
        return _tiled(n, replace(limits, before=()), main["q_tile"], main["k_tile"])

    return graph.rewrite(change)


def _tiled(kernel: Node, limits: Limits, q_tile: Shape | None, k_tile: Shape | None) -> Node:
    """The kernel in its best tiles of those shapes."""
    pricer, target = Pricer(kernel["body"]), limits.target
    candidates = [_priced(pricer, c, limits, q_tile, k_tile) for c in _configurations(pricer.body, target, q_tile, k_tile)]
    best = min(candidates, key=lambda c: c.price)
    if best.rejected:
        raise UnsupportedError(f"a tile of {best.describe()} on {target.name}", best.rejected, "leave q_tile and k_tile out")
    rejected = tuple((c.describe(), c.rejected or f"{c.price / (best.price or 1.0):.2f}x the price") for c in candidates if c is not best)
    c = best.configuration
    return kernel.with_attrs(q_tile=best.q_tile, k_tile=best.k_tile, num_warps=c.num_warps, num_stages=c.num_stages, rejected=rejected)


def _configurations(body: Graph, target: Target, q_tile: Shape | None, k_tile: Shape | None) -> Iterator[Configuration]:
    """What the target offers, at the sizes the user insists on."""
    for name, shape in (("q_tile", q_tile), ("k_tile", k_tile)):
        if shape is not None and (len(shape) != body.rank or any(side < 1 or side & (side - 1) for side in shape)):
            raise UnsupportedError(f"{name}={list(shape)}", f"its sides must be powers of two, {body.rank} of them", "leave it out")
        if shape is not None and prod(shape) < 16:
            raise UnsupportedError(f"a tile of {prod(shape)} tokens", "matrix units take at least 16", "16, 32, 64 or 128 tokens")
    return configurations(body, target, prod(q_tile) if q_tile else None, prod(k_tile) if k_tile else None)


def _priced(pricer: Pricer, c: Configuration, limits: Limits, q_tile: Shape | None, k_tile: Shape | None) -> Candidate:
    work, q_shape, k_shape = pricer.best(c.q_rows, c.k_rows, q_tile, k_tile)
    reason = limits.unfit(pricer.body, c)
    return Candidate(q_shape, k_shape, c, inf if reason else work * c.slowness, reason)


class Pricer:
    """Prices tile shapes of one kernel; every axis and pair of sides is analysed once."""

    def __init__(self, body: Graph) -> None:
        self.body = body
        self.sides, self.best = cache(self._sides), cache(self._best)

    @cached_property
    def mask(self) -> BoundMask:
        """The mask over known or nominal lengths."""
        return bind(self.body, self.lengths(self.body.query), self.lengths(self.body.key))

    def lengths(self, axes: tuple[int | None, ...]) -> Shape:
        """Lengths to price on."""
        nominal = NOMINAL[self.body.rank]
        known = prod(min(n / nominal, 1.0) for n in axes if n is not None)
        longer = 1 << ceil(-log2(known) / max(axes.count(None), 1))
        return tuple(nominal * longer if n is None else min(n, LONGEST) for n in axes)

    def _best(self, q_rows: int, k_rows: int, q_tile: Shape | None, k_tile: Shape | None) -> tuple[float, Shape, Shape]:
        """The cheapest shapes of a size: (work, query tile, key tile); compact ones where several cost the same."""
        q_shapes = [q_tile] if q_tile else shapes(q_rows, self.mask.query)
        k_shapes = [k_tile] if k_tile else shapes(k_rows, self.mask.key)
        priced = ((self.work(q, k), _elongation(q) * _elongation(k), q, k) for q, k in product(q_shapes, k_shapes))
        work, _, q_shape, k_shape = min(priced)
        return work, q_shape, k_shape

    def work(self, q_tile: Shape, k_tile: Shape) -> float:
        """Tile area visited, partial tiles weighted."""
        visited, full = 1, 1
        for axis, (q_side, k_side) in enumerate(zip(q_tile, k_tile)):
            axis_visited, axis_full = self.sides(axis, q_side, k_side)
            visited, full = visited * axis_visited, full * axis_full
        full = full if self.mask.banded else 0
        return prod(q_tile) * prod(k_tile) * (full + MASKED_TILE * (visited - full))

    def _sides(self, axis: int, q_side: int, k_side: int) -> tuple[int, int]:
        """Visited and full tiles of one axis."""
        tiling = Tiling(self.mask, (q_side,) * self.body.rank, (k_side,) * self.body.rank)
        mask, rank = self.mask, self.body.rank
        classes = [(r, class_lengths(mask.query, mask.order, (r,) * rank)[axis]) for r in range(mask.order[axis])]
        found = axis_tiles(mask.hull.bands[axis], axis, classes, tiling.q_tiles[axis], q_side, k_side)
        return int(found.visited.sum()), int(found.full.sum())


def _elongation(shape: Shape) -> float:
    return max(shape) / min(shape)


def shapes(rows: int, lengths: Shape) -> list[Shape]:
    """Factorisations of a tile into power-of-two sides; a side exceeds its axis only where the others cannot take the rest."""
    if len(lengths) == 1:
        return [(rows,)]
    limit = min(rows, 1 << max(0, lengths[0] - 1).bit_length())
    return [(side, *rest) for side in _powers(limit) for rest in shapes(rows // side, lengths[1:])]


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]
