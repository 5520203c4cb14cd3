"""Head routing as the simulator counts it: the share of its rows that each head computes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from attncc.errors import InputError
from attncc.ir.expr import Expr, Table, const, tables
from attncc.ir.values import evaluate
from attncc.passes.tiles import Shape
from attncc.spec.attention import AttentionSpec

Shares = tuple[float, ...]
Floats = npt.NDArray[np.float64]


def shares_of(spec: AttentionSpec, query: Shape, given: Mapping[str, Any] | None = None) -> Shares | None:
    """Share of its rows that each head computes; None where every head computes all of them.

    Args:
        spec: what is computed.
        query: tokens of each axis of the query's grid.
        given: run-time tables by name. With the router's weights (`routing`) or the head mask among them, rows are counted; otherwise
            shares are what the spec says: top-k of the routed heads, all rows where it says nothing.

    Raises:
        InputError: weights, or a head mask, of another shape.
    """
    rows = const(True) if spec.routing is None else spec.routing.rows(spec.grid)
    if spec.routing is None or rows is const(True):
        return None
    (table,) = tables(rows)
    found = _counted(rows, table, given[table.name], spec, query) if given and table.name in given else spec.routing.shares(spec.heads)
    return None if set(found) == {1.0} else found


def _counted(rows: Expr, table: Table, given: Any, spec: AttentionSpec, query: Shape) -> Shares:
    array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    sizes = {"B": array.shape[0] if array.ndim and table.shape[0] == "B" else 1, "H": spec.heads, "NQ": prod(query)}
    wanted = tuple(sizes[str(dim)] for dim in table.shape)
    if array.shape != wanted:
        raise InputError(
            "tables", f"{table.name} has shape {list(array.shape)}, must be [{', '.join(map(str, table.shape))}] = {list(wanted)}"
        )
    env: dict[str, Any] = {table.name: array, "b": np.arange(sizes["B"])[:, None, None], "h": np.arange(spec.heads)[:, None]}
    for a, at in enumerate(np.unravel_index(np.arange(sizes["NQ"]), query)):
        env |= {f"q{a}": at, f"nq{a}": query[a], f"nk{a}": query[a]}
    kept = np.broadcast_to(evaluate(rows, env), (sizes["B"], spec.heads, sizes["NQ"]))
    return tuple(float(x) for x in kept.mean(axis=(0, 2)))


def compacted(visited: Floats, full: Floats, share: float) -> tuple[Floats, Floats]:
    """Key tiles, and full ones, of every tile of a head's routed rows: it spans several tiles, and visits what the widest of them does."""
    starts = (np.arange(np.ceil(len(visited) * share)) / share).astype(np.int64) if share else np.zeros(0, np.int64)
    if not len(starts):
        return visited[:0], full[:0]
    return np.maximum.reduceat(visited, starts), np.minimum.reduceat(full, starts)
