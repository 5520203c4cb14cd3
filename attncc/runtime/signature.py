"""What a kernel takes: its tensors with their shapes and types, and the token grid, read off its plan once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncc.ir.graph import ROW_INPUTS, Graph, GraphOp, Node, statistic
from attncc.passes.tiles import Shape

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32")}
STREAMED = ("q", "k", "v")


@dataclass(frozen=True)
class Slot:
    """One tensor of a call, heads first. `shape` names run-time sizes: "B" batch, "NQ" and "NK" tokens."""

    name: str
    shape: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def per_token(self) -> bool:
        """Whether it has heads and columns, so that the layout of the call speaks of it: q, k, v, the gate and what is added."""
        return self.name in (*STREAMED, *ROW_INPUTS)


@dataclass(frozen=True)
class Signature:
    """Tensors and grid of a kernel.

    `slots` are q, k, v, then the gate and tables given at the call; `constants` are tables that the spec gives, with their values.
    An axis of `query` or `key` is None where its length is given at the call; `shared` grids are one and the same.
    """

    slots: tuple[Slot, ...]
    constants: tuple[tuple[str, Shape, tuple[float, ...], torch.dtype], ...]
    query: tuple[int | None, ...]
    key: tuple[int | None, ...]
    shared: bool

    @property
    def extras(self) -> tuple[Slot, ...]:
        """What a call takes besides q, k and v."""
        return self.slots[len(STREAMED) :]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the extras, in the order ops take them."""
        return tuple(slot.name for slot in self.extras)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.slots[0].shape[1])

    @property
    def value_width(self) -> int:
        """Columns of v and of the output."""
        return int(self.slots[2].shape[3])


def signature(bodies: Sequence[Graph], shared: bool) -> Signature:
    """The signature of some kernels' bodies run one after another; `shared` where queries and keys are the same tokens.

    What one of them makes for another is no part of it. Values of a body that reads none have no columns.
    """
    body, made = bodies[-1], {statistic(body) for body in bodies}
    inputs = {n["name"]: n for body in bodies for n in body.find(GraphOp.INPUT) if n["name"] not in made}
    inputs.setdefault("v", inputs["k"].with_attrs(name="v", shape=(*inputs["k"]["shape"][:3], 0)))
    order = [*STREAMED, *(name for name in ROW_INPUTS if name in inputs), *inputs]
    nodes = [inputs[name] for name in dict.fromkeys(order)]
    heads, dtype = int(inputs["q"]["shape"][1]), inputs["q"]["dtype"]
    slots = tuple(_slot(n, heads, dtype) for n in nodes if n.get("values") is None)
    constants = tuple((n["name"], n["shape"], n["values"], _constant_type(n, dtype)) for n in nodes if n.get("values") is not None)
    return Signature(slots, constants, body.query, body.key, shared)


def _slot(n: Node, heads: int, dtype: str) -> Slot:
    shape = tuple(heads if dim == "H" else dim for dim in n["shape"])
    return Slot(n["name"], shape, _dtypes(n, dtype))


def _constant_type(n: Node, dtype: str) -> torch.dtype:
    return torch.int32 if n["dtype"] == "int32" else _dtypes(n, dtype)[-1]


def _dtypes(n: Node, dtype: str) -> tuple[Any, ...]:
    """Types an input may have: its own; a float table of a float64 attention may be either, an integer table may hold booleans."""
    if n["dtype"] == "int32":
        return torch.int32, torch.bool
    wide = dtype == "float64" and n["dtype"] == "float32"
    return (torch.float32, torch.float64) if wide else (DTYPES[n["dtype"]],)
