"""Programs: what the torch ops run. One a kernel, found by name, for an op's arguments are tensors, numbers and text only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from attncc import knobs
from attncc.codegen.facts import Facts
from attncc.errors import AttnccError, InputError
from attncc.ir.expr import tables
from attncc.ir.graph import ROW_INPUTS, GraphOp, gives, row_class, statistic
from attncc.passes.plan import KernelPlan, Plan
from attncc.passes.tiles import Shape
from attncc.runtime import blocked, cache
from attncc.runtime.devices import check_device
from attncc.runtime.epilogue import Epilogue
from attncc.runtime.lists import ListCache
from attncc.runtime.operands import Operands, compute_dtype
from attncc.runtime.signature import Signature, signature
from attncc.spec.attention import AttentionSpec
from attncc.spec.masks import Mask
from attncc.spec.model import Grid
from attncc.targets import target as target_record

Engine = Literal["triton", "blocked"]
Results = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
_programs: dict[str, Program] = {}
_said: set[str] = set()


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel of a plan with what running it needs. `flexible`: tensors that are not on the plan's target run `blocked`."""

    name: str
    spec: AttentionSpec
    plan: Plan
    kernel: KernelPlan
    signature: Signature
    interpret: bool
    flexible: bool

    @cached_property
    def spec_json(self) -> str:
        """The spec as the generated file shows it."""
        return self.spec.to_json(indent=None)

    @cached_property
    def _fitting(self) -> set[tuple[Shape, Shape]]:
        return set()

    def check_lengths(self, query: Shape, key: Shape) -> None:
        """Holds lengths given at run time to what the mask says of them.

        Raises:
            InputError: a neighborhood that is larger than its axis.
        """
        if (query, key) not in self._fitting:
            grid = Grid(query, key, self.signature.shared)
            for problem in (p for mask in _bounded(self.spec.mask) for p in mask.problems(grid)):
                raise InputError("tokens", f"{list(query)} do not fit the spec's mask: {problem}")
            self._fitting.add((query, key))

    @cached_property
    def epilogue(self) -> Epilogue:
        """What follows the weighted sum of values."""
        return Epilogue.of(self.kernel.graph)

    @cached_property
    def divides(self) -> bool:
        """Whether rows have a number that the backward pass needs: a root, or what they divide by (a sum of weights, a number of keys)."""
        return row_class(self.kernel.graph) != "pointwise"

    @property
    def statistic(self) -> str | None:
        """The number of each row that the kernel is for, by name; None where it combines values."""
        return statistic(self.kernel.graph)

    @cached_property
    def launcher(self) -> str:
        """The generated file's function that launches the kernel."""
        before = () if self.statistic else self.plan.kernels[:-1]
        return Facts(self.kernel, target_record(self.plan.target), before).launcher

    @cached_property
    def prints_lse(self) -> bool:
        """Whether the generated kernel writes a number of each row."""
        return any(gives(n) == "statistic" for _, n in self.kernel.graph.outputs)

    @cached_property
    def lists(self) -> ListCache:
        """Tile lists by lengths."""
        return ListCache(self.kernel)

    @cached_property
    def _constants(self) -> dict[torch.device, dict[str, Tensor]]:
        return {}

    def engine(self, device: torch.device) -> Engine:
        """What runs tensors on a device.

        Raises:
            InputError: the plan is for another device.
        """
        record = target_record(self.plan.target)
        if record.backend == "cpu" or (self.flexible and device.type != "cuda" and not self.interpret):
            return "blocked"
        check_device(record, device, self.interpret)
        return "triton"

    def tables(self, extras: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
        """Tables by name, contiguous: those of the call, and the spec's own, put on the device once."""
        if device not in self._constants:
            self._constants[device] = {
                name: torch.tensor(values, dtype=dtype, device=device).reshape(shape)
                for name, shape, values, dtype in self.signature.constants
            }
        given = {name: _integral(x).contiguous() for name, x in zip(self.signature.names, extras) if name not in ROW_INPUTS}
        return {**given, **self._constants[device]}

    def logits(self, extras: Sequence[Tensor]) -> dict[str, Tensor]:
        """What gates read, by name."""
        return {name: x for name, x in zip(self.signature.names, extras) if name in ROW_INPUTS}


def _integral(x: Tensor) -> Tensor:
    return x.int() if x.dtype is torch.bool else x


def _bounded(mask: Mask) -> list[Mask]:
    """What of a mask some lengths do not fit; it speaks for its parts, on grids of their own. A window longer than the sequence fits."""
    return [mask] if mask.bounded else [found for part in mask.parts for found in _bounded(part)]


# ---- the registry ----------------------------------------------------------------------------------------------------------------


def make_programs(spec: AttentionSpec, plan: Plan, flexible: bool) -> tuple[Program, ...]:
    """The programs of a plan's kernels, in order and registered; the same ones for the same plan."""
    interpret = knobs.current().interpret
    entry = cache.entry_name(plan) + ("-flexible" if flexible else "") + ("-interpreted" if interpret else "")
    names = [entry if kernel is plan.kernels[-1] else f"{entry}-{kernel.name}" for kernel in plan.kernels]
    made = [
        Program(name, spec, plan, kernel, signature([kernel.graph], spec.grid.shared), interpret, flexible)
        for name, kernel in zip(names, plan.kernels)
    ]
    return tuple(_programs.setdefault(program.name, program) for program in made)


def find_program(name: str) -> Program:
    """The program of a name.

    Raises:
        AttnccError: no kernel of this name has been compiled in this process.
    """
    if name not in _programs:
        raise AttnccError(f"kernel: {name!r} is not known in this process; run attncc.compile(spec) before what was traced with its kernel")
    return _programs[name]


# ---- running ---------------------------------------------------------------------------------------------------------------------


def empty_rows(q: Tensor, width: int, heads_last: bool) -> Tensor:
    """Room for output rows `[B, H, N, width]`, in memory `[B, N, H, width]` for heads last."""
    batch, heads, tokens = q.shape[:3]
    if heads_last:
        return q.new_empty(batch, tokens, heads, width).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, width)


def keeps_rows(program: Program, device: torch.device, train: bool) -> bool:
    """Whether the forward pass gives the rows before the epilogue too, for the backward pass."""
    return train and bool(program.epilogue) and program.engine(device) == "blocked"


def keeps_lse(program: Program, device: torch.device) -> bool:
    """Whether the forward pass gives the log-sum-exp."""
    return program.divides and (program.prints_lse or program.engine(device) == "blocked")


def room(program: Program, q: Tensor, heads_last: bool, train: bool) -> Results:
    """Room for the results of a call: output, log-sum-exp and rows before the gate; the last two empty where they are not kept."""
    out = empty_rows(q, program.signature.value_width, heads_last)
    lse = q.new_empty(q.shape[:3] if keeps_lse(program, q.device) else 0, dtype=compute_dtype(q))
    return out, lse, q.new_empty(out.shape if keeps_rows(program, q.device, train) else 0)


def forward(program: Program, operands: Operands, logits: Mapping[str, Tensor], heads_last: bool, train: bool) -> Results:
    """The results of a call, as `room` shapes them."""
    out, lse, kept = room(program, operands.q, heads_last, train)
    if not out.shape[0]:
        return out, lse, kept
    if program.engine(out.device) == "triton":
        return out, _launched(program, operands, logits, out, lse), kept
    rows, row_lse = blocked.run_forward(program.kernel, operands)
    result = program.epilogue.apply(rows, logits, program.kernel.graph, operands, not kept.numel()) if program.epilogue else rows
    if (result.dtype, result.stride()) != (out.dtype, out.stride()):
        result = out.copy_(result)
    return result, lse if row_lse is None else row_lse, kept if not kept.numel() else rows


def _launched(program: Program, operands: Operands, logits: Mapping[str, Tensor], out: Tensor, lse: Tensor) -> Tensor:
    """Runs the generated kernel into `out` on the tensors' device and its current stream; gives its log-sum-exp, if any, or `lse`."""
    arguments: dict[str, Any] = {**operands.tables, **{name: _rows_contiguous(x) for name, x in logits.items()}}
    arguments |= {} if program.statistic else {"out": out}
    device = operands.q.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if program.kernel.block_mask == "lists":
            batch, heads = operands.q.shape[:2]
            arguments["lists"] = program.lists(operands.query, operands.key, operands.tables, batch, heads, device)
        arguments |= _open_lengths(program, operands)
        streamed = (_rows_contiguous(x) for x in (operands.q, operands.k, *(() if program.statistic else (operands.v,))))
        result = getattr(cache.module(program.plan, program.spec_json), program.launcher)(*streamed, **arguments)
    if program.statistic:
        return cast(Tensor, result)
    return result[1] if program.prints_lse else lse


def _rows_contiguous(x: Tensor) -> Tensor:
    """Calls are checked for it; a compiler may still have changed strides on the way."""
    return x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()


def _open_lengths(program: Program, operands: Operands) -> Mapping[str, tuple[int, ...]]:
    """Lengths that a generated file cannot read off the tensors' shapes."""
    body = program.kernel.graph
    axes = (*zip(body.query, operands.query), *zip(body.key, operands.key))
    lengths = tuple(n for known, n in axes if known is None)
    return {"tokens": lengths} if body.rank > 1 and lengths else {}


def backward(
    program: Program, operands: Operands, logits: Mapping[str, Tensor], saved: tuple[Tensor, Tensor], grad: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """Gradients of q, k, v and, by name, of the gate and the trained tables. `saved` are rows before the gate and log-sum-exp."""
    if not operands.q.shape[0]:
        return _zero_gradients(operands, logits)
    if program.engine(operands.q.device) == "triton":
        _say_once("the backward pass of generated kernels runs in torch (the blocked engine) for now")
    rows, lse = _recomputed(program, operands, *saved)
    found: dict[str, Tensor] = {}
    if program.epilogue:
        grad, found = program.epilogue.gradients(rows, logits, program.kernel.graph, operands, grad)
    dq, dk, dv, by_table = blocked.run_backward(program.kernel, operands, rows, lse, grad, grad_lse)
    return dq, dk, dv, {**_deciding(program, operands), **by_table, **found}


def _deciding(program: Program, operands: Operands) -> dict[str, Tensor]:
    """Zeros for the trained tables that decide which rows are kept: where a kernel reads them for nothing else, that is their gradient."""
    read = {t.name for n in program.kernel.graph.find(GraphOp.ROUTE) for t in tables(n["rows"])}
    return {name: torch.zeros_like(operands.tables[name]) for name in read & operands.trained}


def _zero_gradients(operands: Operands, logits: Mapping[str, Tensor]) -> Gradients:
    found = {**operands.tables, **logits}
    dq, dk, dv = (torch.zeros_like(x) for x in (operands.q, operands.k, operands.v))
    return dq, dk, dv, {name: torch.zeros_like(x) for name, x in found.items()}


def _recomputed(program: Program, operands: Operands, rows: Tensor, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows and log-sum-exp, computed again where the forward pass could not keep them."""
    needs_rows = program.divides or bool(program.epilogue)
    if (needs_rows and rows.dim() == 1) or (program.divides and lse.dim() == 1):
        return blocked.run_forward(program.kernel, operands)
    return rows, lse if program.divides else None


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(f"attncc: {text}", stacklevel=2)
