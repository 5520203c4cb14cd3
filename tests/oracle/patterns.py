"""Masks of grids and of run-time tables, one scalar rule each, written from the definitions in the papers.

A rule says of two coordinates on one axis whether the key is allowed; it is looked up for every pair that occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

Spec = Mapping[str, Any]
Indices = dict[str, np.ndarray]
Rule = Callable[[int, int], bool]


def _axes(at: Indices) -> range:
    return range(sum(f"q{a}" in at for a in range(3)))


def _each(value: Any, at: Indices) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value for _ in _axes(at)]


def _lookup(at: Indices, axis: int, rule: Rule) -> np.ndarray:
    q, k = at[f"q{axis}"], at[f"k{axis}"]
    table = [[rule(i, j) for j in range(int(k.max()) + 1)] for i in range(int(q.max()) + 1)]
    return np.array(table, dtype=bool)[q, k]


def _every_axis(at: Indices, rules: Sequence[Rule]) -> np.ndarray:
    allowed = np.array(True)
    for axis, rule in zip(_axes(at), rules, strict=True):
        allowed = allowed & _lookup(at, axis, rule)
    return allowed


def window(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    def rule(left: int | None, right: int | None) -> Rule:
        return lambda q, k: not (left is not None and q - k > left) and not (right is not None and k - q > right)

    return _every_axis(at, [rule(*sides) for sides in zip(_each(mask.get("left"), at), _each(mask.get("right"), at), strict=True)])


def _cells(size: int, shift: int, tokens: int) -> list[int]:
    """Which cell each token is in: a first one of `shift` tokens, then whole ones."""
    cells: list[int] = []
    for cell in count():
        cells += [cell] * (shift if cell == 0 else size)
        if len(cells) >= tokens:
            return cells
    raise AssertionError


def partition(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    def rule(axis: int, size: int, shift: int) -> Rule:
        cells = _cells(size, shift, 1 + max(int(at[f"{side}{axis}"].max()) for side in "qk"))
        return lambda q, k: cells[q] == cells[k]

    sizes, shifts = _each(mask["size"], at), _each(mask.get("shift", 0), at)
    return _every_axis(at, [rule(a, *each) for a, each in enumerate(zip(sizes, shifts, strict=True))])


def congruence(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    def rule(step: int) -> Rule:
        return lambda q, k: abs(q - k) in range(0, abs(q - k) + 1, step)

    return _every_axis(at, [rule(step) for step in _each(mask["step"], at)])


def halo(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    def rule(block: int, reach: int) -> Rule:
        # The nearest token of the query's block is at most `reach` away.
        return lambda q, k: any(abs(k - other) <= (reach if other != k else 0) for other in range(q - q % block, q - q % block + block))

    return _every_axis(at, [rule(*each) for each in zip(_each(mask["block"], at), _each(mask["halo"], at), strict=True)])


def disc(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    squares = [np.square(at[f"q{a}"].astype(np.float64) - at[f"k{a}"]) for a in _axes(at)]
    return np.sqrt(sum(squares[1:], squares[0])) < mask["radius"]


def axial(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    differ = [(at[f"q{a}"] != at[f"k{a}"]) for a in _axes(at)]
    number = sum((d.astype(int) for d in differ), np.array(0))
    lines = list(_axes(at)) if mask.get("axes") is None else mask["axes"]
    moved = np.logical_or.reduce(np.broadcast_arrays(*[differ[a] for a in lines]))
    return (number == 0) | ((number == 1) & moved)


def causal_axes(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    last = mask.get("align") == "bottom_right"
    allowed = np.array(True)
    for axis, causal in zip(_axes(at), _each(mask.get("axes", True), at), strict=True):
        # How many tokens follow, for bottom_right; how many precede, for top_left.
        ahead = at[f"q{axis}"] - at[f"k{axis}"]
        if last and f"nq{axis}" in at:
            ahead = (at[f"nk{axis}"] - 1 - at[f"k{axis}"]) - (at[f"nq{axis}"] - 1 - at[f"q{axis}"])
        allowed = allowed & ((ahead >= 0) | (not causal))
    return allowed


def prefix_per_sample(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    return at["k"] < _array(inputs[mask.get("lengths", "prefix_lengths")])[at["b"]]


def global_tokens(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    if mask.get("count") is not None:
        return np.minimum(at["q"], at["k"]) < mask["count"]
    queries = _array(inputs[mask["labels"]])
    keys = _array(inputs[mask.get("key_labels") or mask["labels"]])
    return (queries[at["b"], at["q"]] != 0) | (keys[at["b"], at["k"]] != 0)


def strided_blocks(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    qb, kb = at["q"] // mask["block"], at["k"] // mask["block"]
    g = at["h"] // mask.get("group", 1)
    shared = np.remainder(kb + g * mask.get("head_step", 1) + mask.get("offset", 0), mask["stride"]) == 0
    return (at["k"] <= at["q"]) & ((qb - kb < mask["local"]) | shared)


def block_table(mask: Spec, at: Indices, inputs: Any) -> np.ndarray:
    table = _array(inputs[mask.get("table", "block_table")])
    cells = {side: 0 * at[side] for side in "qk"}
    for side in "qk":
        for axis, block in zip(_axes(at), _each(mask[f"{side}_block"], at), strict=True):
            cells[side] = cells[side] * -(-at[f"n{side}{axis}"] // block) + at[f"{side}{axis}"] // block
    b, h = at["b"] if table.shape[0] > 1 else 0, at["h"] if table.shape[1] > 1 else 0
    return table[b, h, cells["q"], cells["k"]] != 0


def _array(table: Any) -> np.ndarray:
    return np.asarray(table.cpu() if hasattr(table, "cpu") else table, dtype=np.int64)


PATTERNS = {
    "window": window,
    "partition": partition,
    "congruence": congruence,
    "halo": halo,
    "disc": disc,
    "axial": axial,
    "causal_axes": causal_axes,
    "prefix_per_sample": prefix_per_sample,
    "global_tokens": global_tokens,
    "strided_blocks": strided_blocks,
    "block_table": block_table,
}


def pattern_tables(mask: Spec) -> list[tuple[str, tuple[Any, ...]]]:
    """(name, (what it holds, its axes)) of the run-time tables of one mask; an axis in blocks is (side, tokens of a block)."""
    kind, found = mask["kind"], list[tuple[str, tuple[Any, ...]]]()
    if kind == "prefix_per_sample":
        found.append((mask.get("lengths", "prefix_lengths"), ("counts", "b")))
    if kind == "global_tokens" and mask.get("labels"):
        found.append((mask["labels"], ("marks", "b", "q")))
        found += [(mask["key_labels"], ("marks", "b", "k"))] if mask.get("key_labels") else []
    if kind == "documents":
        for end in ("starts", "ends"):
            found.append((mask.get(end) or f"document_{end}", ("packing", end)))
            found += [(mask[f"key_{end}"], ("packing", f"key_{end}"))] if mask.get(f"key_{end}") else []
    if kind == "block_table":
        first = ["b" if mask.get("per_batch", True) else 1, "h" if mask.get("per_head", True) else 1]
        found.append((mask.get("table", "block_table"), ("blocks", *first, ("q", mask["q_block"]), ("k", mask["k_block"]))))
    return found


def random_table(rng: np.random.Generator, holds: str, shape: Sequence[int], keys: int) -> np.ndarray:
    """A table of one of the meanings above, int32."""
    if holds == "counts":
        return rng.integers(0, keys + 2, size=shape).astype(np.int32)
    if holds in ("marks", "blocks"):
        share = 0.15 if holds == "marks" else 0.5
        return (rng.choice([1, -3, 7], size=shape) * (rng.random(shape) < share)).astype(np.int32)
    raise KeyError(holds)


def packing(seed: int, batch: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    """Documents of a batch, some empty, some without queries or without keys, and padding at the end of both; int32 `[batch, queries]`.

    `key_starts` and `key_ends` are those of a key grid of its own.
    """
    rng = np.random.default_rng([seed, queries, keys])
    ends = ("starts", "ends", "key_starts", "key_ends")
    found = {end: np.zeros((batch, queries), np.int32) for end in ends}
    found["starts"][:], found["key_starts"][:] = queries, keys
    for b in range(batch):
        count = int(rng.integers(1, 6))
        cuts, key_cuts = (np.sort(rng.integers(0, n + 1, count + 1)) for n in (queries, keys))
        cuts[0], key_cuts[0] = 0, 0
        if rng.random() < 0.5:
            cuts[-1], key_cuts[-1] = queries, keys
        for row in zip(cuts[:-1], cuts[1:], key_cuts[:-1], key_cuts[1:]):
            for end, value in zip(ends, row, strict=True):
                found[end][b, row[0] : row[1]] = value
    return found
