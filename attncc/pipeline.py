"""The whole compile: a spec becomes a plan, step by step. This is what `attncc explain` prints."""

from __future__ import annotations

from collections.abc import Callable

from attncc.errors import PlanError
from attncc.ir.graph import Graph, GraphOp, Node, Stage, gathers
from attncc.ir.verify import verify
from attncc.passes.canonicalize import canonicalize
from attncc.passes.fuse import fuse
from attncc.passes.order import order_tokens
from attncc.passes.plan import KernelPlan, Plan, make_plan
from attncc.passes.schedule import schedule
from attncc.passes.tile import tile
from attncc.passes.tiles import Shape
from attncc.passes.views import choose_views
from attncc.spec.attention import AttentionSpec
from attncc.spec.lower import lower
from attncc.targets import target as target_record

Watch = Callable[[str, Graph], None]


def plan(
    spec: AttentionSpec,
    target: str,
    q_tile: Shape | None = None,
    k_tile: Shape | None = None,
    watch: Watch | None = None,
) -> Plan:
    """The plan of a spec on a target.

    Args:
        spec: what to compute.
        target: a name from `attncc.targets`, or a target's file.
        q_tile, k_tile: tile shapes to insist on.
        watch: called with every step's name and graph.

    Raises:
        TargetError: an unknown target.
        UnsupportedError: what the target cannot do, with the nearest spec that it can.
    """
    record = target_record(target)

    def step(name: str, graph: Graph, stage: Stage) -> Graph:
        if watch:
            watch(name, graph)
        return verify(graph, stage)

    graph = step("lower", lower(spec), Stage.LOWERED)
    graph = step("token order", order_tokens(graph), Stage.ORDERED)
    graph = step("canonicalize", canonicalize(graph), Stage.CANONICAL)
    graph = step("fuse", fuse(graph), Stage.FUSED)
    graph = step("tile", tile(graph, record, q_tile, k_tile), Stage.FUSED)
    graph = step("choose views", choose_views(graph, record), Stage.FUSED)
    graph = step("schedule", schedule(graph), Stage.PLANNED)
    return make_plan(graph, spec.digest, record.name)


def check(given: Plan, spec: AttentionSpec, target: str) -> Plan:
    """A plan from outside, if it computes what the spec says: tiles, warps, stages and order are the user's, the rest the passes'.

    A plan is a file that people pass around, and its kernels' bodies end up as code; so these must be exactly what the passes make.

    Raises:
        PlanError: another spec's or target's plan, or one that says what no pass would.
    """
    record = target_record(target)
    given.check(spec.digest, record.name)
    graph = fuse(canonicalize(order_tokens(lower(spec))))
    bodies = [(n["name"], n["body"]) for n in graph.find(GraphOp.KERNEL)]
    if bodies != [(k.name, k.graph) for k in given.kernels]:
        raise PlanError("plan: its kernels do not compute what the spec says; was it made by another version of attncc? Make it again")
    chosen = {k.name: k for k in given.kernels}

    def tiled(n: Node) -> Node:
        if n.op is not GraphOp.KERNEL:
            return n
        k = chosen[n["name"]]
        return n.with_attrs(q_tile=k.q_tile, k_tile=k.k_tile, num_warps=k.num_warps, num_stages=k.num_stages)

    made = make_plan(schedule(choose_views(graph.rewrite(tiled), record)), spec.digest, record.name)
    for ours, theirs in zip(made.kernels, given.kernels):
        if ours.body != theirs.body or theirs.block_mask not in _forms(ours):
            raise PlanError(f"plan: block_mask {theirs.block_mask!r} of {theirs.name} cannot describe the mask")
        if [(v.operand, v.prepared) for v in ours.views] != [(v.operand, v.prepared) for v in theirs.views] or _boxes(theirs) - _boxes(
            ours
        ):
            raise PlanError(f"plan: views of {theirs.name} that {record.name} or its tiles do not allow")
    return given


def _forms(kernel: KernelPlan) -> set[str]:
    """Forms that describe the block mask of a kernel: lists describe that of any but gathered rows."""
    return {kernel.block_mask} if gathers(kernel.graph) else {kernel.block_mask, "lists"}


def _boxes(kernel: KernelPlan) -> set[str]:
    return {view.operand for view in kernel.views if view.address == "box"}


def canonical(spec: AttentionSpec) -> Graph:
    """The graph of a spec with its mask as bands and a residual: all that analyses without tiles of their own need."""
    return verify(canonicalize(order_tokens(lower(spec))), Stage.CANONICAL)
