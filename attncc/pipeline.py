"""The whole compile: a spec becomes a plan, step by step. This is what `attncc explain` prints."""

from __future__ import annotations

from collections.abc import Callable

from attncc.ir.graph import Graph, Stage
from attncc.ir.verify import verify
from attncc.passes.canonicalize import canonicalize
from attncc.passes.fuse import fuse
from attncc.passes.order import order_tokens
from attncc.passes.plan import Plan, make_plan
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
        target: a name from `attncc.targets`.
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
    return make_plan(graph, spec.digest, target)
