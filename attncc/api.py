"""`attncc.compile`: from a spec to a kernel."""

from __future__ import annotations

from attncc import pipeline
from attncc.errors import UnsupportedError
from attncc.passes.plan import Plan
from attncc.runtime import cache
from attncc.runtime.devices import auto_target
from attncc.runtime.kernel import Kernel
from attncc.spec.attention import AttentionSpec
from attncc.targets import Target
from attncc.targets import target as target_record

MAX_HEAD_DIM = 256
"""Widest head of a generated kernel."""


def compile(spec: AttentionSpec, target: str = "auto", plan: Plan | None = None) -> Kernel:
    """The kernel of a spec.

    For a GPU target it is a generated Triton file, kept in the disk cache; nothing is compiled to machine code before the first call.
    For the cpu it is torch, visiting only the tiles that are not empty.

    Args:
        spec: what to compute.
        target: a name from `attncc.targets`, a target's file, or "auto": the first visible GPU, cpu without one. A kernel made with
            "auto" runs torch on tensors that are on no GPU; one made for a GPU refuses them (unless TRITON_INTERPRET=1).
        plan: a plan to follow, say one that was committed; default: the best one that the passes find.

    Raises:
        TargetError: an unknown target, or a file that is refused.
        UnsupportedError: what the target cannot do, why, and the nearest spec that it can.
        PlanError: a plan that was made for another spec or target.
        CacheError: a cached file that is not what attncc wrote.
    """
    name = auto_target() if target == "auto" else target_record(target).name
    record = target_record(name)
    if record.backend != "cpu":
        _check_supported(spec, record)
    chosen = pipeline.plan(spec, name) if plan is None else pipeline.check(plan, spec, name)
    if record.backend != "cpu":
        cache.source(chosen, spec.to_json(indent=None))
    return Kernel(spec, chosen, flexible=target == "auto")


def _check_supported(spec: AttentionSpec, record: Target) -> None:
    """Refuses what has no generated kernel, before any pass runs."""
    if spec.dtype == "float64":
        raise UnsupportedError(f"dtype float64 on {record.name}", "generated kernels compute in float32", "dtype float32, or target='cpu'")
    widest = max(spec.head_dims)
    if widest > MAX_HEAD_DIM:
        field = "head_dim" if spec.head_dims[0] == widest else "value_dim"
        raise UnsupportedError(
            f"{field} {widest} on {record.name}",
            "the rows of a tile must fit the registers and shared memory of one block",
            f"{field} <= {MAX_HEAD_DIM}, or target='cpu'",
        )
