"""`simulate`: the three levels of one spec, from the plan that codegen would print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path
from typing import Any, Literal

from attncc import pipeline as compiler
from attncc.errors import InputError, TargetError, UnsupportedError
from attncc.passes.block_mask import BlockMask
from attncc.passes.given import Lengths
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import Shape, Tiling, tiles_per_axis
from attncc.simulator import constants as constant_files
from attncc.simulator.bounds import classify, count
from attncc.simulator.instructions import read_report
from attncc.simulator.predict import Conditions, Launch, Prediction, Rows, predict, predict_many, together
from attncc.simulator.report import SpeedupReport
from attncc.simulator.routed import Shares, shares_of
from attncc.simulator.work import Direction
from attncc.spec.attention import AttentionSpec
from attncc.spec.masks import Full
from attncc.targets import Target
from attncc.targets import target as target_record

MaskPolicy = Literal["partial tiles", "every tile"]


def simulate(
    spec: AttentionSpec,
    target: str,
    q_tile: Shape | None = None,
    k_tile: Shape | None = None,
    *,
    lengths: Lengths = None,
    tables: Mapping[str, Any] | None = None,
    batch: int | None = None,
    baseline: float | None = None,
    direction: Direction = "forward",
    splits: int = 1,
    mask_policy: MaskPolicy | None = None,
    pipeline: str | None = None,
    resources: str | Path | None = None,
    constants: str | Path | None = None,
) -> SpeedupReport:
    """How much faster than dense attention a spec can be, at three levels: by pairs, by tiles, and by predicted time.

    Args:
        spec: what would be computed.
        target: a name from `attncc.targets`, or a target's file. A bare architecture such as sm_90 has bounds, but no times.
        q_tile: tokens of a query tile by axis, any positive numbers; default: those of the plan for the target.
        k_tile: the same of a key tile.
        lengths: tokens of each axis that the spec leaves open (of `tokens`, then of `key_tokens`).
        tables: integer tables that the mask reads at run time, by name: `segments` `[B, Nq]` and the like; weights of a router
            (`routing`) or a head mask are counted where they are given, otherwise the spec's top-k is.
        batch: elements of a batch; default: what the tables say, else 1. Bounds average over them where the mask differs between them.
        baseline: milliseconds measured of the dense attention to compare with; default: the same kernel without its mask, predicted.
        direction: "forward" or "backward".
        splits: blocks that share the keys of one row of tiles; their results are merged by a second launch.
        mask_policy: "partial tiles" or "every tile"; default: the plan's.
        pipeline: the kind of kernel whose overlap is assumed, a key of the constants; default: "triton", or "torch" on a CPU.
        resources: the resource report that `attncc compile` wrote of this kernel: its instructions are counted instead of the plan's.
        constants: a file of constants fitted on a device of one's own (`python -m benchmarks.calibrate`).

    Returns:
        The report. FLOP bound = all pairs / allowed pairs; tile bound = tiles of the dense grid without dilation / visited tiles (Hassani
        et al., Generalized Neighborhood Attention, arXiv 2504.16922); predicted speedup = the baseline's time / the kernel's.

    Raises:
        TargetError: an unknown target.
        UnsupportedError: no tile fits the target (where none is given).
        InputError: a tile of the wrong rank, missing lengths or tables, an option that is no option; names the argument.
    """
    record = target_record(target)
    q_sides, k_sides = sides("q_tile", q_tile, spec), sides("k_tile", k_tile, spec)
    planned = _Planned.of(spec, record.name, q_sides, k_sides, mask_policy)
    if q_sides is None or k_sides is None:
        q_sides, k_sides = q_sides or planned.kernel.q_tile, k_sides or planned.kernel.k_tile
    mask = classify(spec, q_sides, k_sides, lengths, tables, batch)
    conditions = conditions_of(record, batch or mask.batch, direction, splits, pipeline, resources, constants)
    shares = shares_of(spec, mask.tiling.mask.query, tables)
    return report(spec, mask, conditions.target, _times(spec, mask, planned, conditions, baseline, shares), shares)


def conditions_of(
    record: Target,
    batch: int = 1,
    direction: Direction = "forward",
    splits: int = 1,
    pipeline: str | None = None,
    resources: str | Path | None = None,
    constants: str | Path | None = None,
) -> Conditions:
    """Arguments of `simulate`, checked.

    Raises:
        InputError: an option that is no option; names the argument.
    """
    conditions = Conditions(
        record,
        batch,
        _one_of("direction", direction, ("forward", "backward")),
        _at_least_one("splits", splits),
        pipeline=pipeline or ("torch" if record.backend == "cpu" else "triton"),
        constants=constant_files.shipped() if constants is None else constant_files.read(constants),
        compiled=None if resources is None else read_report(resources),
    )
    conditions.constants.pipeline(conditions.pipeline)
    return conditions


@dataclass(frozen=True)
class _Planned:
    """The plan's kernels with the tiles asked for, and why these cannot be timed, where they cannot."""

    kernels: tuple[KernelPlan, ...]
    problem: str = ""

    @property
    def kernel(self) -> KernelPlan:
        """The one that reads values."""
        return self.kernels[-1]

    @staticmethod
    def of(spec: AttentionSpec, target: str, q_tile: Shape | None, k_tile: Shape | None, policy: MaskPolicy | None) -> _Planned:
        if policy is not None:
            _one_of("mask_policy", policy, ("partial tiles", "every tile"))
        try:
            kernels, problem = compiler.plan(spec, target, q_tile, k_tile).kernels, ""
        except UnsupportedError as error:
            if q_tile is None and k_tile is None:
                raise
            kernels, problem = compiler.plan(spec, target).kernels, str(error)
        chosen = {} if policy is None else {"mask_policy": policy}
        return _Planned(tuple(kernel.model_copy(update=chosen) for kernel in kernels), problem)


Times = tuple[Prediction | None, Prediction | None, str]
"""The kernel's time, the baseline's, and why there are none."""


def report(spec: AttentionSpec, mask: BlockMask, target: Target, times: Times, shares: Shares | None = None) -> SpeedupReport:
    """What the levels say of a classified mask; of heads whose masks differ, shares are averaged."""
    counts, tiling = count(mask, 1.0 if shares is None else sum(shares) / len(shares)), mask.tiling
    ours, dense, problem = times
    # Every part is valid already, and to validate the spec again would take longer than all the rest.
    return SpeedupReport.model_construct(
        spec=spec,
        target=target.name,
        tokens=tiling.mask.query,
        key_tokens=tiling.mask.key,
        q_tile=tiling.q_tile,
        k_tile=tiling.k_tile,
        flop_bound=counts.flop_bound,
        tile_bound=counts.tile_bound,
        predicted_speedup=_speedup(ours, dense),
        prediction=ours,
        baseline_prediction=dense,
        unpredicted=problem,
        sparsity=counts.sparsity,
        block_sparse=mask.partial == 0,
        exact=mask.exact,
        tiles=counts.tiles,
    )


def _speedup(ours: Prediction | None, dense: Prediction | None) -> float | None:
    if ours is None or dense is None:
        return None
    return dense.milliseconds / ours.milliseconds if ours.milliseconds else inf


def _times(spec: AttentionSpec, mask: BlockMask, planned: _Planned, c: Conditions, baseline: float | None, shares: Shares | None) -> Times:
    if planned.problem:
        return None, None, planned.problem
    if c.target.performance is None:
        return None, None, without_times(c.target)
    kernel = planned.kernel
    rows = Rows.of(mask, spec.heads, c.batch, kernel.row_order == "descending", shares)
    try:
        if c.compiled is not None and len(planned.kernels) > 1:
            raise InputError("resources", f"are of one kernel, and this plan has {len(planned.kernels)}; leave them out")
        ours = together([predict(each, rows, c) for each in planned.kernels])
        dense = _dense(spec, mask, c) if baseline is None else _measured(baseline, ours)
        return ours, dense, ""
    except TargetError as error:
        return None, None, str(error)


def without_times(target: Target) -> str:
    """Why there are no times for an architecture."""
    return f"{target.name} is an architecture; name a device that has it for times"


def _dense(spec: AttentionSpec, mask: BlockMask, c: Conditions) -> Prediction:
    """The same kernel without its mask and routing, over the same tokens and with the same tiles."""
    dense = spec.model_copy(update={"mask": Full(), "routing": None})
    kernels = compiler.plan(dense, c.target.name, mask.tiling.q_tile, mask.tiling.k_tile).kernels
    return together(predict_many([dense_launch(kernel, mask.tiling, spec.heads, c) for kernel in kernels]))


def dense_launch(kernel: KernelPlan, tiling: Tiling, heads: int, c: Conditions) -> tuple[Launch, Rows]:
    """What a kernel without its mask is launched for."""
    query, key, whole = tiling.mask.query, tiling.mask.key, (1,) * tiling.rank
    tiles = (prod(tiles_per_axis(query, whole, tiling.q_tile)), prod(tiles_per_axis(key, whole, tiling.k_tile)))
    launch = Launch(kernel, replace(c, compiled=None), "the same kernel without its mask, predicted")
    return launch, Rows.dense(tiles, (prod(query), prod(key)), heads * c.batch)


def _measured(milliseconds: Any, like: Prediction) -> Prediction:
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)) or not 0 < milliseconds < inf:
        raise InputError("baseline", f"must be milliseconds, positive and finite, not {milliseconds!r}")
    unknown = {"limit": "unknown", "busy": {}, "blocks": 0, "blocks_per_sm": 0, "idle": 0.0, "clock_hz": 0.0}
    return like.model_copy(update={**unknown, "kernel": "dense attention, measured", "milliseconds": float(milliseconds)})


# ---- arguments -----------------------------------------------------------------------------------------------------------------------


def sides(name: str, tile: Any, spec: AttentionSpec) -> Shape | None:
    """A tile shape as a tuple, checked.

    Raises:
        InputError: a wrong rank, or sides that are no positive integers.
    """
    if tile is None:
        return None
    given = (tile,) if isinstance(tile, int) else tuple(tile)
    if len(given) != spec.grid.rank:
        raise InputError(name, f"has {len(given)} sides, tokens have {spec.grid.rank} axes")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise InputError(name, f"sides must be positive integers, not {list(given)}")
    return given


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise InputError(name, f"must be one of {', '.join(known)}, not {value!r}")
    return value


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(name, f"must be a positive integer, not {value!r}")
    return value
