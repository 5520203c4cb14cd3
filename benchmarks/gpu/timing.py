"""Times a case at full size: the kernel, the same kernel without its mask, PyTorch's dense attention, compiled FlexAttention.

Device time by events with the cache flushed between calls (Triton's `do_bench`): medians, with the 20th and the 80th percentile. What the
host spends on a call, building FlexAttention's block mask, and compiling are timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attncc
from attncc import AttentionSpec, masks
from attncc.passes.tiles import Shape
from attncc.runtime.kernel import Kernel
from attncc.runtime.signature import signature
from benchmarks import rivals
from benchmarks.bounds import Work, work
from benchmarks.gpu.cases import Case, flex_mask, flex_score
from benchmarks.gpu.checks import call, error, inputs_of
from benchmarks.inputs import Tensors, integer_tables

QUANTILES = (0.5, 0.2, 0.8)
MATH_BYTES = 8 << 30
"""PyTorch's `math` backend is skipped where its scores alone take more memory."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SLOW = ("efficient", "math")
"""Backends that a quick run leaves out."""
SECONDS = {"flex": 40, "own_dense": 10}
"""What rivals that compile may take; they are not begun with less time left."""
Record = dict[str, Any]
Part = tuple[str, Callable[[], Any]]


def measure(case: Case, until: float, quick: bool, device: str = "cuda") -> Record:
    """Every time of a case that fits before `until`, a time of the wall clock; what does not fit, or fails, says so."""
    torch.cuda.empty_cache()
    kernel, repeat_ms = attncc.compile(case.spec), 50 if quick else 100
    tensors = inputs_of(kernel, case.tokens, 1, device, 11)
    record: Record = {"attncc": times(lambda: call(kernel, tensors, case.tokens), repeat_ms)}
    record["host_us"] = host_time(lambda: call(kernel, tensors, case.tokens))
    found = counts(case, kernel)
    record |= bounds(found) | rates(found, case.spec, record["attncc"]["ms"]) | predictions(case, kernel)
    for name, part in _rivals(case, kernel, tensors, repeat_ms):
        if not (quick and name.endswith(SLOW)):
            record[name] = attempted(part, until - SECONDS.get(name, 3))
    return record


def prepare(case: Case, device: str = "cuda") -> Record:
    """Runs once what is slow to compile, so that the caches on disk have it when the case is timed."""
    kernel = attncc.compile(case.spec)
    tensors = inputs_of(kernel, case.tokens, 1, device, 11)
    wanted = {name: part for name, part in _rivals(case, kernel, tensors, 1) if name in SECONDS}
    return {name: attempted(part, time.time() + 600) for name, part in wanted.items()}


def attempted(part: Callable[[], Any], until: float) -> Any:
    """A part's result, or why there is none."""
    if time.time() > until:
        return {"skipped": "out of time"}
    try:
        return part()
    except Exception as failed:  # one rival that does not run costs its own figures only
        torch.cuda.synchronize()  # a device error raises again here, and costs the process
        return {"skipped": f"{type(failed).__name__}: {failed}".splitlines()[0][:200]}


def _rivals(case: Case, kernel: Kernel, tensors: Tensors, repeat_ms: int) -> Iterator[Part]:
    """The rivals, the most telling first."""
    causal, device = isinstance(case.spec.mask, masks.Causal), str(tensors["q"].device)
    shape = (case.spec.head_counts, case.spec.head_dims, case.spec.dtype, tensors["q"].shape[2])
    for name in BACKENDS:
        yield f"sdpa_{name}", partial(dense_sdpa, shape, name, False, repeat_ms, device)
        if causal:
            yield f"sdpa_causal_{name}", partial(dense_sdpa, shape, name, True, repeat_ms, device)
    if case.has_flex:
        yield "flex", lambda: flex(case, kernel, tensors, repeat_ms)
    yield "own_dense", lambda: own_dense(unmasked(case.spec).to_json(indent=None), case.tokens, repeat_ms, device)


# ---- clocks --------------------------------------------------------------------------------------------------------------------------


def times(run: Callable[[], Any], repeat_ms: int) -> Record:
    """Median and spread in milliseconds."""
    import triton

    run()
    middle, low, high = triton.testing.do_bench(run, warmup=repeat_ms // 4, rep=repeat_ms, quantiles=list(QUANTILES))
    return {"ms": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def host_time(run: Callable[[], Any], calls: int = 20) -> float:
    """Microseconds that the host spends on a call, without waiting for the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return round(spent / calls * 1e6, 1)


# ---- rivals --------------------------------------------------------------------------------------------------------------------------


def unmasked(spec: AttentionSpec) -> AttentionSpec:
    """The same attention over every key."""
    return AttentionSpec.model_validate({**spec.model_dump(mode="json"), "mask": {"kind": "full"}})


@cache
def own_dense(spec_json: str, tokens: Shape, repeat_ms: int, device: str) -> Record:
    """attncc's own kernel without the mask: what skipping tiles gains, other things equal."""
    kernel = attncc.compile(AttentionSpec.from_json(spec_json))
    tensors = inputs_of(kernel, tokens, 1, device, 12)
    return times(lambda: call(kernel, tensors, tokens), repeat_ms)


@cache
def dense_sdpa(shape: tuple[Any, ...], backend: str, is_causal: bool, repeat_ms: int, device: str) -> Record:
    """PyTorch's attention of a shape by one backend; it knows no mask but the causal one, and softmax only."""
    (heads, key_heads, value_heads), (width, value_width), dtype, tokens = shape
    if backend == "math" and heads * tokens * tokens * 4 > MATH_BYTES:
        return {"skipped": "its scores do not fit"}
    counts = ((heads, width), (key_heads, width), (value_heads, value_width))
    q, k, v = (torch.randn(1, n, tokens, d, device=device, dtype=getattr(torch, dtype)) for n, d in counts)
    run = rivals.sdpa(is_causal)
    with sdpa_kernel([BACKENDS[backend]]):
        return times(lambda: run(q, k, v), repeat_ms)


def flex(case: Case, kernel: Kernel, tensors: Tensors, repeat_ms: int) -> Record:
    """Compiled FlexAttention with the same mask and maps: its times, and how far its output is from ours."""
    torch._dynamo.reset()
    q, k, v, gate = (tensors.get(name) for name in ("q", "k", "v", "gate"))
    assert q is not None and k is not None and v is not None
    mask, batch = flex_mask(case.spec, case.tokens, tensors), "segments" in tensors
    first, _ = _timed(lambda: rivals.flex_block_mask(mask, q, k, batch))
    again, block_mask = _timed(lambda: rivals.flex_block_mask(mask, q, k, batch))
    run = rivals.flex(flex_score(case.spec, case.tokens, tensors))
    compiling, out = _timed(lambda: run(q, k, v, block_mask, gate))
    ours = call(kernel, tensors, case.tokens)["output"]
    found: Record = times(lambda: run(q, k, v, block_mask, gate), repeat_ms)
    some = slice(0, 2)  # heads: all of them in float64 may not fit beside the tensors
    difference = error(out[:, some], ours[:, some].double())
    return {**found, "mask_ms": again, "first_mask_ms": first, "compile_ms": compiling, "difference": difference}


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of one call, the device's work included, and its result."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 1000, 2), result


# ---- rates ---------------------------------------------------------------------------------------------------------------------------


def counts(case: Case, kernel: Kernel) -> Work:
    """What the kernel visits at full size."""
    return work(kernel.plan.kernels[0], case.tokens, case.tokens, _labels(case, kernel), 1, case.spec.heads)


def _labels(case: Case, kernel: Kernel) -> Record:
    """Integer tables of the mask, as numpy arrays."""
    tables = integer_tables(signature(kernel.plan.graphs, kernel.spec.grid.shared), case.tokens, case.tokens, 1, "cpu")
    return {name: x.numpy() for name, x in tables.items()}


def predictions(case: Case, kernel: Kernel) -> Record:
    """What the simulator says of the kernel, and of its dense form; nothing where it does not know the device."""
    grid = case.spec.grid
    sides = (grid.query,) if grid.shared else (grid.query, grid.key)
    lengths = [n for axes in sides for n, known in zip(case.tokens, axes) if known is None]
    report = attncc.simulate(case.spec, kernel.plan.target, lengths=lengths or None, tables=_labels(case, kernel))
    if report.prediction is None or report.baseline_prediction is None:
        return {}
    return {"predicted_ms": report.prediction.milliseconds, "predicted_dense_ms": report.baseline_prediction.milliseconds}


def bounds(found: Work) -> Record:
    """The most that skipping pairs, and tiles, can gain over dense attention."""
    return {"flop_bound": round(found.flop_bound, 3), "tile_bound": round(found.tile_bound, 3)}


def rates(found: Work, spec: AttentionSpec, ms: float) -> Record:
    """Work a second: of the pairs that the mask allows, and of all that the tiles compute."""
    heads, widths = spec.heads, spec.head_dims
    return {
        "useful_tflops": round(found.useful_flops(heads, widths) / ms / 1e9, 2),
        "hardware_tflops": round(found.hardware_flops(heads, widths) / ms / 1e9, 2),
    }
