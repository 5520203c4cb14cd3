"""Holds kernels to float64: at a small size the whole output to two dense formulas, at full size a sample of its rows.

The two formulas are attncc's `reference`, which evaluates the graph as the spec was lowered, and the `dense` function printed into the
generated file. A kernel may err twice as much as the dense formula computed in its own type, and its worst row three times as much.
Whatever torch allocates without a value is poison while a kernel runs, and every call has fresh random inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import attncc
from attncc import AttentionSpec
from attncc.ir.arrays import torch_arrays
from attncc.ir.graph import Graph, GraphOp, statistic
from attncc.ir.values import evaluate
from attncc.passes.tiles import Shape
from attncc.runtime import cache
from attncc.runtime.kernel import Kernel
from attncc.runtime.reference import reference
from attncc.runtime.signature import signature
from attncc.spec.lower import lower
from benchmarks.gpu.cases import Case
from benchmarks.inputs import Tensors, random_inputs

LAYOUTS = ("bhsd", "bshd", "unaligned")
BATCH = 2
FLOOR = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-4}
"""An error that is always good enough: a dense formula may by chance err less."""
AGREE = 1e-6
"""Two formulas in float64, of which one may hold the spec's own tables in float32."""
SAMPLED = 48
"""Rows of a full-size output that are computed again."""
Record = dict[str, Any]


# ---- inputs --------------------------------------------------------------------------------------------------------------------------


def inputs_of(kernel: Kernel, tokens: Shape, batch: int, device: str, seed: int) -> Tensors:
    """Fresh tensors for a kernel."""
    return random_inputs(signature(kernel.plan.graphs, kernel.spec.grid.shared), tokens, tokens, batch, device, seed)


def call(kernel: Kernel, tensors: Tensors, tokens: Shape, layout: str = "bhsd") -> Tensors:
    """The kernel's results by name, heads first, from tensors in memory as `layout` says."""
    given = {name: _laid_out(x, layout) if name in PER_TOKEN else x for name, x in tensors.items()}
    form = "bshd" if layout == "bshd" else "bhsd"
    lengths = tokens if None in kernel.spec.tokens else None
    results = kernel(given.pop("q"), given.pop("k"), given.pop("v"), layout=form, tokens=lengths, key_tokens=None, **given)
    outputs = dict(zip(kernel.spec.outputs, results if isinstance(results, tuple) else (results,)))
    if layout == "bshd":
        outputs["output"] = outputs["output"].transpose(1, 2)
    return outputs


PER_TOKEN = ("q", "k", "v", "gate")


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """As it is; with heads after tokens; or as columns of a wider tensor, so that no row starts on a 16-byte boundary."""
    if layout == "bshd":
        return x.transpose(1, 2).contiguous()
    if layout == "unaligned":
        return torch.cat([x, x[..., :1]], 3)[..., : x.shape[3]]
    return x


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the least integer, until something is written there."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x if x.dtype is torch.bool else x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return made

    places = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    patches = [mock.patch.object(owner, name, poison(getattr(owner, name))) for owner, name in places]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


# ---- what is right -------------------------------------------------------------------------------------------------------------------


def by_reference(spec: AttentionSpec, tensors: Tensors, tokens: Shape, dtype: torch.dtype = torch.float64) -> Tensors:
    """The spec's results by the reference backend."""
    return reference(lower(spec), tensors, tokens, tokens, dtype)


def by_printed_formula(kernel: Kernel, tensors: Tensors, tokens: Shape) -> Tensors:
    """The spec's results by the `dense` function of the generated file."""
    module = generated(kernel)
    lengths = {f"n{side}{a}": n for side in "qk" for a, n in enumerate(tokens)}
    known = {**tensors, **lengths, **_constants(kernel, tensors["q"].device)}
    for name in filter(None, map(statistic, kernel.plan.graphs)):
        before = getattr(module, f"dense_{name}")
        known[name] = before(*(known[each] for each in inspect.signature(before).parameters))
    results = module.dense(*(known[name] for name in inspect.signature(module.dense).parameters))
    return {"output": results[0], "lse": results[1]} if isinstance(results, tuple) else {"output": results}


def generated(kernel: Kernel) -> ModuleType:
    """The generated file of a kernel, imported."""
    return cache.module(kernel.plan, kernel.spec.to_json(indent=None))


def _constants(kernel: Kernel, device: torch.device) -> Tensors:
    """Tables that the spec gives."""
    constants = signature(kernel.plan.graphs, kernel.spec.grid.shared).constants
    return {name: torch.tensor(values, dtype=dtype, device=device).reshape(shape) for name, shape, values, dtype in constants}


def rows_by_formula(spec: AttentionSpec, tensors: Tensors, tokens: Shape, b: int, h: int, rows: Tensor) -> Tensor:
    """Some rows of the output of one head, in float64 and without the rest: `[rows, Dv]`."""
    graph, device = lower(spec), rows.device
    keys = torch.arange(tensors["k"].shape[2], device=device)
    env: dict[str, Any] = {"b": torch.tensor(b, device=device), "h": torch.tensor(h, device=device)}
    env |= {f"n{side}{a}": n for side in "qk" for a, n in enumerate(tokens)}
    for side, index in (("q", rows[:, None]), ("k", keys)):
        env |= {f"{side}{a}": x for a, x in enumerate(_coordinates(index, tokens))}
    for n in graph.find(GraphOp.INPUT):
        table = tensors.get(n["name"])
        env[n["name"]] = torch.tensor(n["values"], device=device).reshape(n["shape"]) if table is None else table
    return _row_outputs(graph, env, tensors, b, h, rows)


def _coordinates(index: Tensor, tokens: Shape) -> list[Tensor]:
    found = []
    for n in reversed(tokens):
        found.append(index % n)
        index = index // n
    return found[::-1]


def _row_outputs(graph: Graph, env: dict[str, Any], tensors: Tensors, b: int, h: int, rows: Tensor) -> Tensor:
    """Scores, maps, mask, weights, values and gate of some rows."""
    heads, xp = tensors["q"].shape[1], torch_arrays(torch.float64)
    key, value = (tensors[name][b, h // (heads // tensors[name].shape[1])].double() for name in "kv")
    s = tensors["q"][b, h, rows].double() @ key.T * float(graph.find(GraphOp.SCORES)[0]["scale"])
    for n in graph.find(GraphOp.MAP):
        s = evaluate(n["value"], {**env, "s": s}, xp)
    out = _row_weights(graph, env, s) @ value
    for n in graph.find(GraphOp.GATE):
        gate = tensors["gate"]
        out = evaluate(n["value"], {"o": out, "g": gate[b, min(h, gate.shape[1] - 1), rows].double()}, xp)
    return out


def _row_weights(graph: Graph, env: dict[str, Any], s: Tensor) -> Tensor:
    xp = torch_arrays(torch.float64)
    keep = torch.as_tensor(True, device=s.device)
    for n in graph.find(GraphOp.MASK):
        keep = keep & evaluate(n["predicate"], env, xp)
    weights = graph.find(GraphOp.WEIGHTS)[0]
    if weights["row_class"] == "softmax":
        return torch.softmax(s.masked_fill(~keep, -torch.inf), 1).nan_to_num()
    found: Tensor = evaluate(weights["weight"], {"s": s}, xp)
    return found.masked_fill(~keep, 0.0)


# ---- errors --------------------------------------------------------------------------------------------------------------------------


def error(found: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm; NaN where anything is NaN."""
    return float((found.double() - right).norm() / right.norm().clamp_min(1e-30))


def worst_row(found: Tensor, right: Tensor) -> float:
    """The largest error of a row, relative to it; rows much smaller than the others are held to a hundredth of their mean norm."""
    norms = right.norm(dim=-1)
    return float(((found.double() - right).norm(dim=-1) / norms.clamp_min(float(norms.mean()) / 100 + 1e-30)).max())


def judged(found: Tensors, right: Tensors, dense: Tensors, dtype: str) -> Record:
    """Errors of every result beside their limits."""
    record: Record = {"ok": True}
    for name, x in right.items():
        if name == "lse":
            figures = {"lse_error": float((found[name].double() - x).abs().nan_to_num(nan=torch.inf).max()), "lse_limit": 2e-2}
        else:
            floor = FLOOR[dtype]
            figures = {
                "error": error(found[name], x),
                "limit": max(2 * error(dense[name], x), floor),
                "worst_row": worst_row(found[name], x),
                "worst_row_limit": max(3 * worst_row(dense[name], x), 10 * floor),
            }
        pairs = list(figures.values())
        record |= figures
        record["ok"] = record["ok"] and all(value <= limit for value, limit in zip(pairs[::2], pairs[1::2]))
    return record


# ---- the checks ----------------------------------------------------------------------------------------------------------------------


def check(case: Case, layouts: Sequence[str] = LAYOUTS) -> Record:
    """Layouts at the small size, replay from a CUDA graph, run-time lengths, and rows at full size; all on the GPU."""
    kernel, tokens = attncc.compile(case.small), case.small_tokens
    record: Record = {"layouts": {layout: check_layout(kernel, tokens, layout, "cuda", seed) for seed, layout in enumerate(layouts)}}
    record["graph"] = check_graph(kernel, tokens)
    full = attncc.compile(case.spec)
    if case.plain:
        record["rows"] = sampled_rows(full, case.tokens, "cuda")
    if case.lengths:
        record["lengths"] = check_lengths(full, case.lengths)
    parts = [*record["layouts"].values(), *(record[name] for name in ("graph", "rows", "lengths") if name in record)]
    record["ok"] = all(part["ok"] for part in parts)
    return record


def check_layout(kernel: Kernel, tokens: Shape, layout: str, device: str, seed: int) -> Record:
    """One call against the two dense formulas, which are held against each other too."""
    tensors = inputs_of(kernel, tokens, BATCH, device, seed)
    with poisoned():
        found = call(kernel, tensors, tokens, layout)
    right, printed, dense = formulas(kernel, tensors, tokens)
    record = judged(found, right, dense, kernel.spec.dtype)
    record["formulas_differ"] = error(printed["output"], right["output"])
    record["ok"] = record["ok"] and record["formulas_differ"] <= AGREE
    return record


def formulas(kernel: Kernel, tensors: Tensors, tokens: Shape) -> tuple[Tensors, Tensors, Tensors]:
    """Results by the reference, by the printed formula, and by the reference in the kernel's own type."""
    right = by_reference(kernel.spec, tensors, tokens)
    dense = by_reference(kernel.spec, tensors, tokens, getattr(torch, kernel.spec.dtype))
    return right, by_printed_formula(kernel, tensors, tokens), dense


def check_graph(kernel: Kernel, tokens: Shape) -> Record:
    """A captured call, replayed on new inputs, gives what a plain call gives."""
    tensors, fresh = (inputs_of(kernel, tokens, BATCH, "cuda", seed) for seed in (90, 91))
    fresh = {name: x if x.is_floating_point() else x.flip(-1).contiguous() for name, x in fresh.items()}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(kernel, tensors, tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(kernel, tensors, tokens)["output"]
    for name, x in tensors.items():
        x.copy_(fresh[name])
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return {"ok": bool(torch.equal(captured, call(kernel, fresh, tokens)["output"]))}


def sampled_rows(kernel: Kernel, tokens: Shape, device: str) -> Record:
    """Rows of the first and the last head, the first and the last query among them, at a size where no dense formula fits."""
    tensors = inputs_of(kernel, tokens, 1, device, 7)
    with poisoned():
        out = call(kernel, tensors, tokens)["output"]
    queries, heads = out.shape[2], out.shape[1]
    chosen = torch.randint(queries, (SAMPLED,), generator=torch.Generator().manual_seed(queries))
    chosen[0], chosen[-1] = 0, queries - 1
    rows = chosen.to(out.device)
    worst = 0.0
    for h in sorted({0, heads - 1}):
        found = error(out[0, h, rows], rows_by_formula(kernel.spec, tensors, tokens, 0, h, rows))
        worst = max(worst, found) if found == found else found
    finite = bool(torch.isfinite(out).all())
    limit = 20 * FLOOR[kernel.spec.dtype]  # what rounding of the type gives on any case, with room
    return {"error": worst, "limit": limit, "ok": finite and worst <= limit}


def check_lengths(kernel: Kernel, lengths: Sequence[int]) -> Record:
    """Every length is right, and all of them together compile once."""
    function = getattr(generated(kernel), kernel.plan.kernels[-1].name)
    function.device_caches.clear()
    found = {n: sampled_rows(kernel, (n,), "cuda") for n in lengths}
    compiles = sum(len(entry[0]) for entry in function.device_caches.values())
    errors = {n: part["error"] for n, part in found.items()}
    return {"compiles": compiles, "errors": errors, "ok": compiles == 1 and all(part["ok"] for part in found.values())}
