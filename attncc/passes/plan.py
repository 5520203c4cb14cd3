"""The Plan: the only thing that codegen and the simulator read. JSON that a user can commit, diff and pin."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from attncc.errors import PlanError
from attncc.ir.graph import Graph, GraphOp, Node
from attncc.ir.graph_text import parse_graph, to_text
from attncc.targets import limits
from attncc.targets import target as target_record

Sides = tuple[int, ...]


class Rejected(BaseModel):
    """A candidate that was not chosen, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    candidate: str
    reason: str


class View(BaseModel):
    """How tiles of an operand are addressed: `rows` by pointers, `box` by a tensor descriptor (see `attncc.passes.views`).

    `prepared`: its norms and rotations are done by a launch before, not where tiles are loaded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    operand: str
    address: Literal["rows", "box"]
    prepared: bool = False

    def __str__(self) -> str:
        return f"{self.operand} by {self.address}" + (", made ready before" if self.prepared else "")


class KernelPlan(BaseModel):
    """One kernel: what it computes (`body`, a graph in text form) and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    body: tuple[str, ...]
    q_tile: Sides
    k_tile: Sides
    num_warps: int = Field(ge=1)
    num_stages: int = Field(ge=1)
    block_mask: Literal["ranges", "box", "lists"]
    mask_policy: Literal["partial tiles", "every tile"]
    row_order: Literal["ascending", "descending"]
    views: tuple[View, ...]
    rejected: tuple[Rejected, ...] = ()

    @cached_property
    def graph(self) -> Graph:
        """The body as a graph."""
        return parse_graph("\n".join(self.body))

    @property
    def form(self) -> str:
        """The block-mask form in words."""
        return {
            "ranges": "computed in the kernel from its rows",
            "box": "all between the first and the last on each axis, computed in the kernel from its rows",
            "lists": "read from lists",
        }[self.block_mask]

    @model_validator(mode="after")
    def _tiles_fit_the_grid(self) -> KernelPlan:
        rank = self.graph.rank
        for name, tile in (("q_tile", self.q_tile), ("k_tile", self.k_tile)):
            if len(tile) != rank or any(side < 1 or side & (side - 1) for side in tile):
                raise ValueError(f"{name}: needs {rank} powers of two, not {list(tile)}")
        return self


class Plan(BaseModel):
    """What will run, on which target, for which spec."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    spec: str = Field(description="SHA-256 of the spec it was made for")
    target: str
    kernels: tuple[KernelPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_tiling(self) -> Plan:
        if len({(kernel.q_tile, kernel.k_tile, kernel.block_mask) for kernel in self.kernels}) > 1:
            raise ValueError("kernels: all take the same tiles and block_mask, for they see the same pairs")
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the generated file: everything but the rejected candidates, and the limits behind the target's name.

        Raises:
            TargetError: a target of a file that has not been read in this process.
        """
        data = self.model_dump(mode="json", exclude={"kernels": {"__all__": {"rejected"}}})
        data["limits"] = asdict(limits(target_record(self.target)))
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The kernels' bodies, in the order they run."""
        return tuple(kernel.graph for kernel in self.kernels)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that JSON text says.

        Raises:
            pydantic.ValidationError: anything that is no plan.
        """
        return cls.model_validate_json(text)

    def check(self, spec_digest: str, target: str) -> Plan:
        """The plan itself, if it was made for this spec and target.

        Raises:
            PlanError: it was not.
        """
        if self.spec != spec_digest:
            raise PlanError(f"plan: made for another spec ({self.spec[:12]}, this one is {spec_digest[:12]})")
        if self.target != target:
            raise PlanError(f"plan: made for target {self.target!r}, not {target!r}")
        return self


def make_plan(graph: Graph, spec_digest: str, target: str) -> Plan:
    """The plan that a graph at its last stage says."""
    return Plan(spec=spec_digest, target=target, kernels=tuple(map(_kernel_plan, graph.find(GraphOp.KERNEL))))


def _kernel_plan(kernel: Node) -> KernelPlan:
    fields: dict[str, Any] = {name: value for name, value in kernel.attrs if name not in ("body", "views", "rejected")}
    return KernelPlan(
        body=tuple(to_text(kernel["body"]).splitlines()),
        views=tuple(View(operand=operand, address=address, prepared=prepared) for operand, address, prepared in kernel["views"]),
        rejected=tuple(Rejected(candidate=c, reason=r) for c, r in kernel.get("rejected", ())),
        **fields,
    )
