"""The text of `Kernel.explain()`: every step's graph, then the plan in words."""

from __future__ import annotations

from collections.abc import Iterator

from attncc import pipeline
from attncc.ir.graph import Graph
from attncc.passes.plan import KernelPlan, Plan
from attncc.spec.attention import AttentionSpec

MOST_REJECTED = 12
"""Rejected candidates shown, cheapest first as the plan lists them; the plan has them all."""


def explain(spec: AttentionSpec, plan: Plan) -> str:
    """How a spec becomes a plan, step by step, and what `plan` (which may be another, pinned one) says."""
    steps: list[tuple[str, Graph]] = []
    made = pipeline.plan(spec, plan.target, watch=lambda name, graph: steps.append((name, graph)))
    lines = [f"spec {spec.digest[:12]} for {plan.target}", ""]
    seen: Graph | None = None
    for name, graph in steps:
        lines += [f"-- {name}", *(["(unchanged)"] if graph == seen else str(graph).splitlines()), ""]
        seen = graph
    lines.append("-- plan" if made == plan else "-- plan (pinned: not what the steps above choose)")
    return "\n".join([*lines, *(line for kernel in plan.kernels for line in _kernel_lines(kernel))])


def _kernel_lines(kernel: KernelPlan) -> Iterator[str]:
    yield f"{kernel.name}: query tile {list(kernel.q_tile)}, key tile {list(kernel.k_tile)}"
    yield f"  {kernel.num_warps} warps, {kernel.num_stages} stages, rows {kernel.row_order}, {kernel.mask_policy} are masked"
    form = "read from lists" if kernel.block_mask == "lists" else "computed in the kernel"
    yield f"  key tiles {form}; " + ", ".join(str(v) for v in kernel.views)
    for rejected in kernel.rejected[:MOST_REJECTED]:
        yield f"  rejected {rejected.candidate}: {rejected.reason}"
    if len(kernel.rejected) > MOST_REJECTED:
        yield f"  and {len(kernel.rejected) - MOST_REJECTED} more in the plan"
