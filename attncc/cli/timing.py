"""Times a kernel against dense attention on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attncc.cli.calling import Call, prepared
from attncc.passes.given import Lengths
from attncc.simulator import simulate
from attncc.spec.attention import AttentionSpec

MOST = 1000
"""Rounds, at most: no more than a median needs."""


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds of `rounds`; `tile_bound` is that of the kernel's own tiles over dense attention with the same."""

    device: str
    what: str
    rounds: int
    kernel_ms: float
    dense_ms: float
    tile_bound: float

    @property
    def speedup(self) -> float:
        """How many times faster than dense attention."""
        return self.dense_ms / self.kernel_ms

    def to_data(self) -> dict[str, Any]:
        """The timing as JSON data."""
        return {**asdict(self), "speedup": self.speedup, "of_tile_bound": self.speedup / self.tile_bound}


def timed(
    spec: AttentionSpec, target: str, lengths: Lengths, batch: int, seconds: float, backward: bool, say: Callable[[str], Any]
) -> Timing:
    """Times a spec's kernel and dense attention in turn, on random inputs.

    Args:
        spec: what is computed.
        target: as for `attncc.compile`.
        lengths: tokens of each axis that the spec leaves open.
        batch: batch elements.
        seconds: time to spend on both together, warm-up apart; one round at least.
        backward: whether the gradients of q, k and v are part of it.
        say: told what is being done.

    Raises:
        AttnccError: whatever compiling or calling refuses.
    """
    call = prepared(spec, target, lengths, batch, 0)
    x = call.tensors
    contestants = (lambda: call.run(x)["output"], lambda: _dense(spec, x))
    runs = [_differentiated(run, x) if backward else run for run in contestants]
    say("warming up")
    once = [[_milliseconds(run, call.device) for _ in range(2)][1] for run in runs]
    times: list[list[float]] = [[], []]
    rounds = max(1, min(MOST, int(1000 * seconds / sum(once))))
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        for run, found in zip(runs, times):
            found.append(_milliseconds(run, call.device))
    kernel_ms, dense_ms = map(statistics.median, times)
    what = "forward and backward" if backward else "forward"
    return Timing(_name(call.device), what, rounds, kernel_ms, dense_ms, _tile_bound(call, lengths, batch))


def _tile_bound(call: Call, lengths: Lengths, batch: int) -> float:
    plan = call.kernel.plan
    tiles = plan.kernels[-1].q_tile, plan.kernels[-1].k_tile
    tables = {name: x for name, x in call.tensors.items() if not x.is_floating_point()}
    return simulate(call.kernel.spec, plan.target, *tiles, lengths=lengths, tables=tables, batch=batch).tile_bound


def _dense(spec: AttentionSpec, x: Mapping[str, Tensor]) -> Tensor:
    """Attention of every pair: the baseline of the bounds."""
    heads, key_heads, value_heads = spec.head_counts
    k, v = x["k"], x["v"]
    if key_heads != value_heads:
        k, v = k.repeat_interleave(heads // key_heads, 1), v.repeat_interleave(heads // value_heads, 1)
    return F.scaled_dot_product_attention(x["q"], k, v, scale=spec.scale, enable_gqa=k.shape[1] != heads)


def _differentiated(run: Callable[[], Tensor], tensors: Mapping[str, Tensor]) -> Callable[[], Any]:
    """The run with its backward pass."""
    leaves = [tensors[name].requires_grad_() for name in "qkv"]

    def both() -> Any:
        out = run()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
