"""Runs a generated file as it is: planned, printed, imported from a file of its own, launched by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attncc.codegen.module import emit
from attncc.ir.graph import ROW_INPUTS, reduction, statistic
from attncc.passes.block_mask import BlockMask, block_mask
from attncc.passes.plan import KernelPlan, Plan
from attncc.passes.tiles import bind
from attncc.pipeline import plan
from attncc.spec.attention import AttentionSpec
from tests.oracle import attention, errors, errors_of_dense, within_float32
from tests.strategies import Case, Grid

Tensors = dict[str, Tensor]
LAYOUTS = ("heads first", "heads last", "misaligned", "one key head for all", "one batch element for all")


def module_of(source: str) -> ModuleType:
    """The module that a source is; Triton reads functions from their file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "generated.py")
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("generated", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["generated"] = module
        spec.loader.exec_module(module)
        return module


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A view with the values of `x` (but for what a layout expands) and other strides."""
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "misaligned":
        return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
    if layout == "one key head for all":
        return x[:, :1].expand(x.shape)
    return x[:1].expand(x.shape) if layout == "one batch element for all" else x


def as_planned(kernel: KernelPlan) -> KernelPlan:
    return kernel


def every_tile(kernel: KernelPlan) -> KernelPlan:
    """The kernel with its mask computed in every tile."""
    return kernel.model_copy(update={"mask_policy": "every tile"})


def with_lists(kernel: KernelPlan) -> KernelPlan:
    """The kernel with its tiles read from lists."""
    return kernel.model_copy(update={"block_mask": "lists"})


@dataclass(frozen=True)
class Run:
    """A case on a target: how it is tiled, what its plan changes to, how its tensors lie."""

    case: Case
    target: str = "sm_80"
    q_tile: Grid | None = None
    k_tile: Grid | None = None
    layout: str = "heads first"
    change: Callable[[KernelPlan], KernelPlan] = as_planned

    @cached_property
    def spec(self) -> AttentionSpec:
        return AttentionSpec.model_validate(self.case.spec)

    @cached_property
    def plan(self) -> Plan:
        made = plan(self.spec, self.target, self.q_tile, self.k_tile)
        return Plan.from_json(made.model_copy(update={"kernels": tuple(map(self.change, made.kernels))}).to_json())

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        """(q, k, v, inputs), laid out."""
        q, k, v, inputs = self.case.inputs(getattr(torch, self.spec.dtype))
        wide = "heads first" if "for all" in self.layout else self.layout
        inputs = {name: laid_out(x, wide) if name in ROW_INPUTS else x for name, x in inputs.items()}
        return laid_out(q, wide), laid_out(k, self.layout), laid_out(v, self.layout), inputs

    @cached_property
    def block_mask(self) -> BlockMask:
        kernel = self.plan.kernels[0]
        tables = {name: x.numpy() for name, x in self.tensors[3].items()}
        mask = bind(kernel.graph, *self.case.grids)
        return block_mask(mask, kernel.q_tile, kernel.k_tile, tables, self.case.batch, self.spec.heads)

    @property
    def steps(self) -> int:
        """Tiles that the interpreter walks."""
        found = self.block_mask
        walks = sum(1 + reduction(graph).get("sweeps", 0) for graph in self.plan.graphs)
        return int(found.visited * self.case.batch * self.spec.heads * walks // (found.batch * found.heads))

    @cached_property
    def source(self) -> str:
        return emit(self.plan, self.spec.model_dump_json())

    @cached_property
    def module(self) -> ModuleType:
        return module_of(self.source)

    def outputs(self) -> Tensors:
        """What the kernel writes into memory full of NaN."""
        q, k, v, inputs = self.tensors
        kernel = self.plan.kernels[-1]
        made = {statistic(graph) for graph in self.plan.graphs}
        tables = [n["name"] for n in kernel.graph.nodes() if n.op.value == "input" and n["name"] not in made]
        given = self._tables(tables) | {name: inputs[name] for name in ROW_INPUTS if name in inputs}
        given |= {"lists": self.lists()} if kernel.block_mask == "lists" else {}
        options: dict[str, Any] = {"tokens": self._tokens()} if "tokens=None" in self.source else {}
        out = laid_out(torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), "heads last" if self.layout == "heads last" else "")
        result = self.module.forward(q, k, v, **given, out=out.fill_(torch.nan), **options)
        return dict(zip(self.spec.outputs, result)) if isinstance(result, tuple) else {"output": result}

    def _tables(self, names: list[str]) -> dict[str, Any]:
        """Tables by name; those of the spec itself have their values in the graph."""
        constant = {n["name"]: n.get("values") for n in self.plan.kernels[-1].graph.nodes() if n.op.value == "input"}
        chosen = [n for n in names if n not in ("q", "k", "v", *ROW_INPUTS)]
        return {n: self.tensors[3][n] if constant[n] is None else torch.tensor(constant[n]) for n in chosen}

    def _tokens(self) -> tuple[int, ...]:
        body = self.plan.kernels[0].graph
        return tuple(n for known, grid in zip((body.query, body.key), self.case.grids) for k, n in zip(known, grid) if k is None)

    def lists(self) -> tuple[Any, ...]:
        """The block mask as a kernel reads it: begin, end and tiles of every row, and the steps of batch and head."""
        found, rows = self.block_mask, self.block_mask.tiling.rows
        listed: list[Any] = []
        for offsets, tiles in (
            (found.lists.full_offsets, found.lists.full_tiles),
            (found.lists.partial_offsets, found.lists.partial_tiles),
        ):
            padded = torch.from_numpy(tiles).to(torch.int32)
            begin_end = (torch.from_numpy(x.copy()).to(torch.int32) for x in (offsets[:-1], offsets[1:]))
            listed += [*begin_end, torch.cat([padded, padded.new_zeros(1)])]
        by_batch, by_head = (n > 1 for n in (found.batch, found.heads))
        return (*listed, rows * found.heads * by_batch, rows * by_head)


def assert_equals_oracle(run: Run) -> None:
    """float16: at most twice the error of the dense formula in that type, an lse within 1e-2 as well. Otherwise as `within_float32`."""
    q, k, v, inputs = run.tensors
    got, dense = run.outputs(), (run.case.concrete, q, k, v, inputs)
    assert "lse" not in got or got["lse"].dtype is torch.float32
    found = errors(got, attention(*dense))
    if run.spec.dtype == "float32":
        assert within_float32(found, *dense)
    else:
        by_dense = errors_of_dense(*dense)
        assert found.overall <= max(2 * by_dense.overall, rounding(run.spec.dtype))
        assert found.lse <= max(2 * by_dense.lse, 1e-2)


def rounding(dtype: str) -> float:
    """Relative error of rounding a result once: the dense formula makes none where a row has a single key."""
    return float(torch.finfo(getattr(torch, dtype)).eps) / 4


def on(run: Run, **fields: Any) -> Run:
    """The run with fields replaced."""
    return replace(run, **fields)
