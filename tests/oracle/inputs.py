"""Random tensors and run-time inputs for any spec."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracle.loads import load_inputs
from tests.oracle.masks import Spec, concrete, table_axes
from tests.oracle.padding import policy
from tests.oracle.patterns import packing, random_table


def random_inputs(
    spec: Spec, batch: int, seed: int, dtype: torch.dtype, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(q, k, v, inputs): fresh tensors and every run-time input that ``spec`` names.

    ``lengths`` gives one length per null axis (see `concrete`). Integer tables are int32 runs of labels, sorted for
    some seeds and not for others; tables of biases and slopes are float32, or float64 where dtype is.
    """
    rng = np.random.default_rng(seed)
    spec = concrete(spec, lengths or ())
    heads, head_dim = spec["heads"], spec["head_dim"]
    key_heads, value_dim = spec.get("key_heads") or heads, spec.get("value_dim") or head_dim
    size = {"b": batch, "h": heads, "q": math.prod(spec["tokens"]), "k": math.prod(spec["key_tokens"])}

    def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    q = normal((batch, heads, size["q"], head_dim), dtype)
    k = normal((batch, key_heads, size["k"], head_dim), dtype)
    v = normal((batch, spec.get("value_heads") or key_heads, size["k"], value_dim), dtype)
    v = v + 0.5  # with values of mean zero, a wrong denominator would hardly show
    inputs = {
        name: torch.from_numpy(_int_table(rng, spec, size, axes))
        for name, axes in dict(table_axes(spec.get("mask", {"kind": "full"}))).items()
    }
    table_dtype = torch.promote_types(dtype, torch.float32)
    for step in [*spec.get("scores", []), *([spec["factor"]] if spec.get("factor") else [])]:
        for name, shape in _float_tables(step, size, rng).items():
            inputs[name] = shape if isinstance(shape, Tensor) else normal(shape, table_dtype)
            inputs[name] = inputs[name].abs() if step["kind"] == "alibi" else inputs[name]
    for name, axes in _normalizer_inputs(spec, v.shape).items():
        inputs[name] = normal([batch if n == "b" else n for n in axes], table_dtype)
    if gate := spec.get("gate"):
        group = heads // key_heads
        gate_heads = {"shared": 1, "headwise": heads, "elementwise": heads}.get(gate["granularity"], key_heads)
        gate_dim = {"headwise": 1, "packed": group * value_dim, "packed_headwise": group}.get(gate["granularity"], value_dim)
        inputs["gate"] = normal((batch, gate_heads, size["q"], gate_dim), dtype)
    inputs |= load_inputs(spec, batch, rng, table_dtype)
    scaled = {side: x for side, x in zip("qkv", (q, k, v)) if side in spec.get("token_scales", ())}
    inputs |= {f"{side}_scale": normal(x.shape[:3], table_dtype) for side, x in scaled.items()}
    if spec.get("addend"):
        inputs["addend"] = normal((batch, heads, size["q"], value_dim), dtype)
    if routing := spec.get("routing"):
        inputs |= _routing(rng, routing, (batch, heads, size["q"]), table_dtype)
    return q, k, v, inputs


def _routing(rng: np.random.Generator, routing: Spec, rows: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a router, with tokens that choose fewer heads or none, heads that no token chooses, and weights that are 0."""
    batch, heads, tokens = rows
    by_head = (batch, heads) if routing.get("per_batch") else (heads,)
    if routing["kind"] == "head_scale":
        return {"head_scale": torch.from_numpy(rng.standard_normal(by_head) * (rng.random(by_head) < 0.8)).to(dtype)}
    if routing["kind"] == "head_mask":
        return {"head_mask": torch.from_numpy(rng.random(by_head) < 0.6)}
    shared, weights = routing.get("shared", 0), rng.standard_normal(rows)
    if routing["kind"] == "mixture_of_heads":
        rank = np.argsort(np.argsort(-weights[:, shared:], axis=1), axis=1)
        weights[:, shared:] = np.where(rank < routing["top_k"], np.exp(weights[:, shared:]), 0.0)
    weights[:, shared:] *= rng.random((batch, 1, tokens)) < 0.9
    weights[:, shared:] *= rng.random((batch, heads - shared, 1)) < 0.9
    return {"routing": torch.from_numpy(weights).to(dtype)}


def _normalizer_inputs(spec: Spec, values: Sequence[int]) -> dict[str, list[Any]]:
    """Shapes of what a normalizer learns; "b" stands for the batch."""
    normalizer, heads, queries = spec.get("normalizer", {}), spec["heads"], math.prod(spec["tokens"])
    bias = {"per_head": [heads], "per_batch_head": ["b", heads]}.get(normalizer.get("bias"))
    sink = {"per_head": [heads], "per_query": [heads, queries], "per_batch_query": ["b", heads, queries]}.get(normalizer.get("sink"))
    scale = {"per_query": [queries], "per_head_query": [heads, queries]}.get(str(normalizer.get("row_scale")))
    shapes: dict[str, Any] = {"sigmoid_bias": bias, "sink": sink, "row_scale": scale}
    if normalizer.get("sink") == "key_value":
        shapes |= {"k_bias": [spec.get("key_heads") or heads, spec["head_dim"]], "v_bias": [values[1], values[3]]}
    if policy(spec.get("mask", {"kind": "full"})) == "pad_token":
        shapes |= {"k_pad": [spec.get("key_heads") or heads, spec["head_dim"]], "v_pad": [values[1], values[3]]}
    return {name: shape for name, shape in shapes.items() if shape}


def _float_tables(step: Spec, size: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
    """Shapes of the float tables of a score map, by name; of an expression's integer ones, the table."""
    match step["kind"]:
        case "relative_bias":
            return {step.get("table", "relative_bias"): (size["h"], *(2 * extent - 1 for extent in step["extent"]))}
        case "alibi" if step.get("trainable"):
            return {"alibi_slopes": (size["h"],)}
        case "bias" | "temperature":
            return {step["table"]: [size[i] for i in step["index"]]}
        case "dense_bias":
            first = (size["b"] if step.get("per_batch", True) else 1, size["h"] if step.get("per_head", True) else 1)
            return {step.get("table", "bias"): (*first, size["q"], size["k"])}
        case "t5_bias":
            return {step.get("table", "t5_bias"): (size["h"], step.get("buckets", 32))}
        case "expression":
            declared = {t["name"]: t for t in step.get("tables", [])}
            reads = re.findall(r"(\w+)\[([^]]*)\]", step["text"])
            shapes = {name: [size[i.strip()] for i in index.split(",")] for name, index in reads if name not in declared}
            shapes |= {name: t["shape"] for name, t in declared.items()}
            integers = [*step.get("integers", ()), *(name for name, t in declared.items() if t["kind"] == "int")]
            whole = {name: torch.from_numpy(rng.integers(0, 9, size=shapes[name])).int() for name in integers}
            return {**shapes, **whole}
    return {}


def _int_table(rng: np.random.Generator, spec: Spec, size: dict[str, int], axes: Any) -> np.ndarray:
    if isinstance(axes, str):
        return _label_runs(rng, [size[axis] for axis in axes])
    if axes[0] == "packing":
        seed = int(rng.bit_generator.seed_seq.entropy)  # type: ignore[attr-defined]
        return packing(seed, size["b"], size["q"], size["k"])[axes[1]]
    grids = {"q": spec["tokens"], "k": spec["key_tokens"]}

    def length(axis: Any) -> int:
        if isinstance(axis, tuple):
            return _blocks(grids[axis[0]], axis[1])
        return axis if isinstance(axis, int) else size[axis]

    return random_table(rng, axes[0], [length(axis) for axis in axes[1:]], size["k"])


def _blocks(grid: Sequence[int], block: Any) -> int:
    sides = block if isinstance(block, list) else [block] * len(grid)
    return math.prod(math.ceil(n / side) for n, side in zip(grid, sides, strict=True))


def _label_runs(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """About five runs along the last axis: labels ascending as in packed documents, or out of order and recurring."""
    run = np.cumsum(rng.random(shape) < 4 / shape[-1], axis=-1)
    label = np.arange(shape[-1] + 1) if rng.random() < 0.5 else rng.integers(0, 4, size=shape[-1] + 1)
    return (label[run] + 1).astype(np.int32)  # never 0: a predicate may divide by a table
