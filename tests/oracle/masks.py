"""Dense boolean masks, read straight from the JSON form of a spec.

Every index is an int64 array that broadcasts to ``[B, H, Nq, Nk]``, so each definition below is its formula.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from tests.oracle.patterns import PATTERNS, pattern_tables

Spec = Mapping[str, Any]
Inputs = Mapping[str, Any]
Indices = dict[str, np.ndarray]


def dense_mask(spec: Spec, inputs: Inputs, batch: int) -> np.ndarray:
    """The allowed pairs, bool ``[B or 1, H or 1, Nq, Nk]``.

    ``inputs`` holds the run-time tables by name. Raises ValueError for a null axis (see `concrete`), a neighborhood
    that does not fit its grid, or text outside the predicate grammar, and FloatingPointError for a division by zero.
    """
    at = indices(spec, batch)
    allowed = _mask(spec.get("mask", {"kind": "full"}), at, inputs)
    shape = np.broadcast_shapes(allowed.shape, (1, 1, int(at["nq"]), int(at["nk"])))
    return np.broadcast_to(allowed, shape).copy()


def concrete(spec: Spec, lengths: Sequence[int] = ()) -> dict[str, Any]:
    """``spec`` with both grids spelled out.

    ``lengths`` gives one length for each null axis of tokens, then for each null axis of key_tokens.
    """
    grids = [list(spec["tokens"]), list(spec.get("key_tokens") or [])]
    missing = sum(axes.count(None) for axes in grids)
    if missing != len(lengths):
        raise ValueError(f"the grids have {missing} null axes, {len(lengths)} lengths were given")
    remaining = iter(lengths)
    tokens, key_tokens = ([next(remaining) if n is None else n for n in axes] for axes in grids)
    return {**spec, "tokens": tokens, "key_tokens": key_tokens or tokens}


def indices(spec: Spec, batch: int) -> Indices:
    """b, h, q, k, the lengths nq, nk, and per axis a the coordinates qa, ka and lengths nqa, nka."""
    spec = concrete(spec)
    at = {"b": np.arange(batch).reshape(-1, 1, 1, 1), "h": np.arange(spec["heads"]).reshape(1, -1, 1, 1)}
    for letter, grid, shape in (("q", spec["tokens"], (1, 1, -1, 1)), ("k", spec["key_tokens"], (1, 1, 1, -1))):
        size = math.prod(grid)
        at |= {letter: np.arange(size).reshape(shape), f"n{letter}": np.array(size)}
        for axis, coordinate in enumerate(np.unravel_index(np.arange(size), grid)):
            at |= {f"{letter}{axis}": coordinate.reshape(shape), f"n{letter}{axis}": np.array(grid[axis])}
    return at


def table_axes(mask: Spec) -> Iterator[tuple[str, Any]]:
    """(name, axes) of every run-time table of ``mask``; axes is a word over b, h, q, k such as ``bq``, or as `pattern_tables` says."""
    if mask["kind"] == "segments":
        yield mask["ids"], "bq"
        if mask.get("key_ids"):
            yield mask["key_ids"], "bk"
    yield from pattern_tables(mask)
    if mask["kind"] == "predicate":
        declared = {t["name"]: t["shape"] for t in mask.get("tables", [])}
        yield from ((name, ("counts", *shape)) for name, shape in declared.items())
        for node in ast.walk(ast.parse(mask["text"], mode="eval")):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) not in declared:
                yield ast.unparse(node.value), "".join(_table_indices(node))
    rules = [rule for row in mask.get("rules", []) for rule in row if rule is not None]
    for part in mask.get("masks", [mask["mask"]] if "mask" in mask else rules):
        yield from table_axes(part)


def _mask(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return _KINDS[mask["kind"]](mask, at, inputs)


def _full(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return np.array(True)


def _offset(mask: Spec, at: Indices) -> np.ndarray:
    """What is added to q so that the first (top_left) or the last (bottom_right) query and key coincide."""
    return {"top_left": np.array(0), "bottom_right": at["nk"] - at["nq"]}[mask.get("align", "top_left")]


def _causal(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return at["k"] <= at["q"] + _offset(mask, at)


def _sliding_window(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    ahead = at["k"] - (at["q"] + _offset(mask, at))
    left, right = mask.get("left"), mask.get("right")
    after_start = np.array(True) if left is None else -left <= ahead
    before_end = np.array(True) if right is None else ahead <= right
    return after_start & before_end


def _prefix(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return at["k"] < mask["length"]


def _sinks(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return at["k"] < mask["count"]


def _segments(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    ids, key_ids = _table(inputs[mask["ids"]]), _table(inputs[mask.get("key_ids") or mask["ids"]])
    if (ids.shape[1], key_ids.shape[1]) != (at["nq"], at["nk"]):
        raise ValueError(f"segments need ids of length {at['nq']} and {at['nk']}")
    return ids[at["b"], at["q"]] == key_ids[at["b"], at["k"]]


def _neighborhood(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    rank = len(mask["window"])
    stride, dilation = mask.get("stride") or [1] * rank, mask.get("dilation") or [1] * rank
    options = (mask["window"], stride, dilation, mask.get("causal") or [False] * rank)
    grid, key_grid = ([int(n) for name, n in at.items() if name[:-1] == f"n{letter}"] for letter in "qk")
    if grid != key_grid or len(grid) != rank:
        raise ValueError("a neighborhood needs one grid for queries and keys, of the rank of its window")
    axes = [neighborhood_axis(*each, "short" in at) for each in zip(grid, *options, strict=True)]
    return reduce(np.kron, axes)  # row-major tokens: AND over axes is the Kronecker product


def neighborhood_axis(length: int, window: int, stride: int, dilation: int, causal: bool, short: bool = False) -> np.ndarray:
    """Generalized neighborhood attention on one axis (arXiv 2504.16922), bool ``[length, length]``; ``short`` axes may hold no window."""
    if window * dilation > length and not short:
        raise ValueError(f"window {window} with dilation {dilation} does not fit {length} tokens")
    allowed = np.zeros((length, length), dtype=bool)
    for residue in range(dilation):
        tokens = np.arange(residue, length, dilation)  # one residue class; classes may differ in length
        last = len(tokens) - 1
        for i, query in enumerate(tokens):
            group = i // stride * stride  # the first of the queries that share one window
            if causal:
                leader = min(group + stride - 1, last)
                start, stop = max(leader - window + 1, 0), i + 1
            else:
                leader = min(group + stride // 2, last)
                start = max(min(max(leader - window // 2, 0), len(tokens) - window), 0)  # shifted inward, never cut
                stop = start + window
            allowed[query, tokens[start:stop]] = True
    return allowed


def _and(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return reduce(np.logical_and, [_mask(part, at, inputs) for part in mask["masks"]])


def _or(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return reduce(np.logical_or, [_mask(part, at, inputs) for part in mask["masks"]])


def _not(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    return np.logical_not(_mask(mask["mask"], at, inputs))


def _per_head(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    heads, masks = at["h"].size, mask["masks"]
    groups = mask.get("groups") or np.array_split(np.arange(heads), len(masks))
    each = np.broadcast_arrays(at["h"] * 0 == 0, *[_mask(part, at, inputs) for part in masks])[1:]
    allowed = np.zeros_like(each[0])
    for group, part in zip(groups, each, strict=True):
        for head in group:
            allowed[:, head] = part[:, head]
    return allowed


def _documents(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    """Documents one by one: each is a small attention of its own, put in its place."""
    names = [mask.get(name) or f"document_{name}" for name in ("starts", "ends")]
    key_names = [mask.get(f"key_{name}") or names[i] for i, name in enumerate(("starts", "ends"))]
    tables = [_table(inputs[name]) for name in (*names, *key_names)]
    allowed = np.zeros((at["b"].size, at["h"].size, int(at["nq"]), int(at["nk"])), dtype=bool)
    for b in range(at["b"].size):
        for q0, q1, k0, k1 in {tuple(int(t[b, q]) for t in tables) for q in range(int(at["nq"]))}:
            if k0 < k1:
                own = indices({"tokens": [q1 - q0], "key_tokens": [k1 - k0], "heads": at["h"].size}, 1)
                own |= {"b": at["b"][b : b + 1], "short": np.array(True)}
                allowed[b, :, q0:q1, k0:k1] = _mask(mask["mask"], own, inputs)
    return allowed


def _concatenation(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    """Pairs of grids one by one: each is an attention of its own, put in its place; null sees nothing."""
    heads, queries, keys = at["h"].size, mask["queries"], mask.get("keys") or mask["queries"]
    allowed = np.zeros((at["b"].size, heads, int(at["nq"]), int(at["nk"])), dtype=bool)
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            rule, alike = mask["rules"][i][j], len(query) == len(key)
            own = indices(
                {"tokens": query if alike else [math.prod(query)], "key_tokens": key if alike else [math.prod(key)], "heads": heads}, 1
            )
            rows, columns = (slice(sum(map(math.prod, g[:n])), sum(map(math.prod, g[: n + 1]))) for g, n in ((queries, i), (keys, j)))
            if rule is not None:
                allowed[:, :, rows, columns] = _mask(rule, own | {"b": at["b"]}, inputs)
    return allowed


@dataclass(frozen=True)
class Anywhere:
    """A table that any integers index; they are clipped into it."""

    table: np.ndarray


def _predicate(mask: Spec, at: Indices, inputs: Inputs) -> np.ndarray:
    declared = {t["name"]: Anywhere(_table(inputs[t["name"]])) for t in mask.get("tables", [])}
    inputs = {**inputs, **declared}
    with np.errstate(divide="raise"):
        return np.asarray(_evaluate(ast.parse(mask["text"], mode="eval").body, at, inputs), dtype=bool)


_KINDS: dict[str, Callable[[Spec, Indices, Inputs], np.ndarray]] = {
    **PATTERNS,
    "full": _full,
    "causal": _causal,
    "sliding_window": _sliding_window,
    "neighborhood": _neighborhood,
    "segments": _segments,
    "prefix": _prefix,
    "sinks": _sinks,
    "predicate": _predicate,
    "and": _and,
    "or": _or,
    "not": _not,
    "per_head": _per_head,
    "documents": _documents,
    "concatenation": _concatenation,
}

# numpy's integer // and % round towards minus infinity: the floor semantics that the predicate language has.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.FloorDiv: np.floor_divide, ast.Mod: np.remainder,
    ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal,
    ast.Eq: np.equal, ast.NotEq: np.not_equal, ast.And: np.logical_and, ast.Or: np.logical_or,
    ast.Not: np.logical_not, ast.USub: np.negative, "min": np.minimum, "max": np.maximum,
}  # fmt: skip


def _evaluate(node: ast.expr, at: Indices, inputs: Inputs) -> Any:
    def value(part: ast.expr) -> Any:
        return _evaluate(part, at, inputs)

    match node:
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _FUNCTIONS:
            return _FUNCTIONS[type(op)](value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _FUNCTIONS:
            return _FUNCTIONS[type(op)](value(left), value(right))
        case ast.BoolOp(op=op, values=parts):
            return reduce(_FUNCTIONS[type(op)], map(value, parts))
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _FUNCTIONS for op in ops):
            sides = [value(side) for side in (left, *rest)]
            pairs = zip(ops, sides[:-1], sides[1:], strict=True)
            return reduce(np.logical_and, [_FUNCTIONS[type(op)](a, b) for op, a, b in pairs])
        case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
            return np.abs(value(argument))
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=[_, _, *_] as arguments, keywords=[]):
            return reduce(_FUNCTIONS[name], map(value, arguments))
    return _leaf(node, at, inputs)


def _leaf(node: ast.expr, at: Indices, inputs: Inputs) -> Any:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return np.array(number)
        case ast.Name(id=name) if name in at:
            return at[name]
        case ast.Subscript(value=ast.Name(id=name), slice=index) if isinstance(inputs[name], Anywhere):
            table = inputs[name].table
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            return table[tuple(np.clip(_evaluate(x, at, inputs), 0, n - 1) for x, n in zip(parts, table.shape, strict=True))]
        case ast.Subscript(value=ast.Name(id=name)):
            return _table(inputs[name])[tuple(at[index] for index in _table_indices(node))]
    raise ValueError(f"not in the predicate grammar: {ast.unparse(node)}")


def _table_indices(node: ast.Subscript) -> list[str]:
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    names = [ast.unparse(part) for part in parts]
    if not set(names) <= set("bhqk"):
        raise ValueError(f"a table is indexed by b, h, q, k alone: {ast.unparse(node)}")
    return names


def _table(table: Any) -> np.ndarray:
    """A run-time table (tensor on any device, or array) as int64, so that arithmetic on it cannot overflow."""
    return np.asarray(table.cpu() if hasattr(table, "cpu") else table, dtype=np.int64)
