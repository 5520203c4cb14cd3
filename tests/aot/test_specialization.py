"""Lengths and strides trigger no recompile: one specialisation for 1 to 65536 tokens, on the key of Triton's own launcher.

A driver that loads and launches nothing stands in for the GPU; everything before it is the path that a launch on a GPU takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attncc import AttentionSpec, document_tables, gates, knobs, masks, pipeline, scores
from attncc.runtime import cache
from attncc.runtime.lists import ListCache
from attncc.targets import target as target_record

LENGTHS = (1, 17, 4096, 4097, 65536)
OPEN: dict[str, Any] = {"heads": 2, "head_dim": 64, "outputs": ("output", "lse")}


class Launcher:
    """Takes a launch and does nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class Utilities:
    def __init__(self, shared_bytes: int) -> None:
        self.shared_bytes = shared_bytes

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024


class Driver:
    """A GPU of a given target, of which nothing is asked but its name and limits."""

    launcher_cls = Launcher

    def __init__(self, target: GPUTarget, shared_bytes: int) -> None:
        self.target, self.utils = target, Utilities(shared_bytes)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(params=["sm_80", "sm_90"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    record = target_record(request.param)
    triton.compiler.compiler.max_shared_mem.cache_clear()
    # Not set_active: without a GPU there is no driver to go back to.
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(GPUTarget("cuda", int(record.arch[3:]), 32), record.shared_bytes))
    cache._modules.clear()
    with knobs.scope(cache_dir=tmp_path / "attncc"):
        yield request.param
    cache._modules.clear()
    triton.compiler.compiler.max_shared_mem.cache_clear()


def compiled(module: ModuleType) -> int:
    """Specialisations that Triton has compiled of a module's kernel."""
    kernels = [x for name, x in vars(module).items() if isinstance(x, JITFunction) and not name.startswith("_")]
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels)


def tensors(tokens: int, heads: int = 2, width: int = 64, heads_last: bool = False) -> list[torch.Tensor]:
    shape = (1, tokens, heads, width) if heads_last else (1, heads, tokens, width)
    made = [torch.empty(shape, dtype=torch.float16) for _ in range(3)]
    return [x.transpose(1, 2) if heads_last else x for x in made]


def test_causal_of_any_length_is_one_compile(target: str) -> None:
    spec = AttentionSpec(tokens=(None,), mask=masks.Causal(), **OPEN)
    module = cache.module(pipeline.plan(spec, target), spec.to_json(indent=None))
    for length in LENGTHS:
        module.forward(*tensors(length))
    assert compiled(module) == 1
    for length in LENGTHS:
        module.forward(*tensors(length, heads_last=True))
    assert compiled(module) == 1, "nor do strides"


def test_lists_of_any_length_are_one_compile(target: str) -> None:
    spec = AttentionSpec(tokens=(None,), mask=masks.Segments() & masks.SlidingWindow(left=512, right=0), **OPEN)
    plan = pipeline.plan(spec, target)
    module, lists = cache.module(plan, spec.to_json(indent=None)), ListCache(plan.kernels[0])
    for length in LENGTHS:
        ids = torch.zeros(1, length, dtype=torch.int32)
        made = lists((length,), (length,), {"segments": ids}, 1, 2, ids.device)
        module.forward(*tensors(length), segments=ids, lists=made)
    assert compiled(module) == 1


def test_open_grids_are_one_compile(target: str) -> None:
    spec = AttentionSpec(
        tokens=(None, None), heads=2, head_dim=64, mask=masks.Neighborhood(window=3), gate=gates.Output(granularity="headwise"),
        scores=(scores.Softcap(cap=20.0),),
    )  # fmt: skip
    plan = pipeline.plan(spec, target)
    module, lists = cache.module(plan, spec.to_json(indent=None)), ListCache(plan.kernels[0])
    for grid in ((3, 3), (5, 17), (64, 64), (61, 67)):
        q, k, v = tensors(grid[0] * grid[1])
        made = lists(grid, grid, {}, 1, 2, q.device)
        module.forward(q, k, v, gate=q[..., :1].contiguous(), lists=made, tokens=(*grid, *grid))
    assert compiled(module) == 1


def test_misaligned_tensors_are_a_compile_of_their_own(target: str) -> None:
    spec = AttentionSpec(tokens=(None,), mask=masks.Causal(), **OPEN)
    module = cache.module(pipeline.plan(spec, target), spec.to_json(indent=None))
    for length in (17, 4096):
        module.forward(*tensors(length))
        module.forward(*(torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in tensors(length)))
    assert compiled(module) == 2


PACKINGS = 1000


def test_a_thousand_packings_are_one_compile(target: str) -> None:
    """Packed documents of other numbers, lengths and paddings, in sequences of other lengths; nothing is made on the host for them."""
    spec = AttentionSpec(tokens=(None,), mask=masks.Documents(mask=masks.Neighborhood(window=65) & masks.Causal()), **OPEN)
    plan = pipeline.plan(spec, target)
    assert plan.kernels[0].block_mask == "ranges"
    module, random = cache.module(plan, spec.to_json(indent=None)), torch.Generator().manual_seed(0)
    for packing in range(PACKINGS):
        tokens = LENGTHS[packing % 3] + packing // 3
        cuts = torch.randint(0, tokens + 1, (1 + packing % 40,), generator=random).sort().values
        packed = document_tables(torch.cat([torch.zeros(1, dtype=torch.long), cuts]), tokens)
        module.forward(*tensors(tokens), **packed)
    assert compiled(module) == 1


def test_packings_under_lists_are_one_compile(target: str) -> None:
    spec = AttentionSpec(tokens=(None,), mask=masks.Documents(mask=masks.Sinks(count=4) | masks.SlidingWindow(left=64, right=0)), **OPEN)
    plan = pipeline.plan(spec, target)
    module, lists = cache.module(plan, spec.to_json(indent=None)), ListCache(plan.kernels[0])
    for packing in range(40):
        tokens = 300 + packing
        packed = document_tables(torch.tensor([0, packing, 3 * packing, 3 * packing, 290]), tokens)
        made = lists((tokens,), (tokens,), packed, 1, 2, torch.device("cpu"))
        module.forward(*tensors(tokens), **packed, lists=made)
    assert compiled(module) == 1
