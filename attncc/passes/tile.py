"""Pass: tile. Chooses tile shapes, warps and pipeline stages that fit the target, by what the mask makes them visit.

Every candidate is either priced or rejected with its reason; the plan keeps both. Some tile always fits: sizes halve until one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import inf, prod

from attncc.errors import UnsupportedError
from attncc.ir.expr import const, tables, variables
from attncc.ir.graph import Graph, GraphOp, Node
from attncc.passes.block_mask import block_mask
from attncc.passes.footprint import Configuration, configurations, shared_bytes
from attncc.passes.tiles import Shape, bind
from attncc.targets import Target

NOMINAL = {1: 4096, 2: 64, 3: 24}
"""Length of an axis given at run time, for pricing only, by rank of the grid."""
MASKED_TILE = 1.3
"""Price of a partial tile relative to a full one: evaluating a band mask costs about a third of a tile's work."""


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


def tile(graph: Graph, target: Target, q_tile: Shape | None = None, k_tile: Shape | None = None) -> Graph:
    """The graph with tiles on its kernels.

    Args:
        graph: a fused graph.
        target: the device whose limits hold.
        q_tile, k_tile: shapes the user insists on; their products must be powers of two of at least 16.

    Raises:
        UnsupportedError: a demanded shape that does not fit the target.
    """

    def change(n: Node) -> Node:
        return _tiled(n, target, q_tile, k_tile) if n.op is GraphOp.KERNEL else n

    return graph.rewrite(change)


def _tiled(kernel: Node, target: Target, q_tile: Shape | None, k_tile: Shape | None) -> Node:
    candidates = [_priced(kernel, c, target) for c in _candidates(kernel, target, q_tile, k_tile)]
    best = min(candidates, key=lambda c: c.price)
    if best.rejected:
        raise UnsupportedError(f"a tile of {best.describe()} on {target.name}", best.rejected, "leave q_tile and k_tile out")
    rejected = tuple(
        (c.describe(), c.rejected or f"{c.price / best.price:.2f}x the price of the chosen tile") for c in candidates if c is not best
    )
    c = best.configuration
    return kernel.with_attrs(q_tile=best.q_tile, k_tile=best.k_tile, num_warps=c.num_warps, num_stages=c.num_stages, rejected=rejected)


def _candidates(kernel: Node, target: Target, q_tile: Shape | None, k_tile: Shape | None) -> Iterator[Candidate]:
    body: Graph = kernel["body"]
    for configuration in configurations(body, target):
        q_shapes = [q_tile] if q_tile else shapes(configuration.q_rows, _lengths(body, "q"))
        k_shapes = [k_tile] if k_tile else shapes(configuration.k_rows, _lengths(body, "k"))
        for q_shape, k_shape in product(q_shapes, k_shapes):
            sized = configuration.resized(prod(q_shape), prod(k_shape))
            if (q_tile and sized.q_rows != prod(q_tile)) or not _worth_pricing(q_shape, k_shape):
                continue
            yield Candidate(q_shape, k_shape, sized)


def _worth_pricing(q_shape: Shape, k_shape: Shape) -> bool:
    """Query and key tiles of like proportions: a window that suits one suits the other."""
    return len(q_shape) == 1 or all(max(a, b) <= 4 * min(a, b) for a, b in zip(q_shape, k_shape))


def shapes(rows: int, lengths: Shape) -> list[Shape]:
    """Factorisations of a tile into power-of-two sides, none longer than its axis needs."""
    if len(lengths) == 1:
        return [(rows,)]
    found = []
    for side in _powers(min(rows, _next_power(lengths[0]))):
        found += [(side, *rest) for rest in shapes(rows // side, lengths[1:])]
    return found


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]


def _next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _lengths(body: Graph, side: str) -> Shape:
    known = body.query if side == "q" else body.key
    return tuple(NOMINAL[body.rank] if n is None else n for n in known)


def _priced(kernel: Node, candidate: Candidate, target: Target) -> Candidate:
    body: Graph = kernel["body"]
    needed = shared_bytes(body, candidate.configuration, target)
    if needed > target.shared_bytes > 0:
        over = needed - target.shared_bytes
        return Candidate(
            candidate.q_tile,
            candidate.k_tile,
            candidate.configuration,
            inf,
            f"{over} bytes over the shared memory of a block",
        )
    price = _work(body, candidate) * candidate.configuration.slowness
    return Candidate(candidate.q_tile, candidate.k_tile, candidate.configuration, price)


def _work(body: Graph, candidate: Candidate) -> float:
    """Tile area visited, partial tiles weighted; what only run time knows counts as visited everywhere and partial."""
    area = prod(candidate.q_tile) * prod(candidate.k_tile)
    mask = bind(body, _lengths(body, "q"), _lengths(body, "k"))
    if tables(mask.residual) or variables(mask.residual) & {"b", "h"}:
        mask = type(mask)(mask.bands, const(True), mask.query, mask.key, mask.order)
    found = block_mask(mask, candidate.q_tile, candidate.k_tile)
    return area * (found.full + MASKED_TILE * found.partial)
