"""`simulate_many`: the reports of `simulate` for thousands of candidates a second.

A mask that is a product of bands is analysed axis by axis, and candidates share axes: each (band, length, sides) is analysed once. Plans
depend on the sizes of tiles, not on their shapes; blocks of many candidates are scheduled together. Results are those of `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from attncc import pipeline as compiler
from attncc.errors import TargetError, UnsupportedError
from attncc.ir.expr import const
from attncc.passes.axis_tiles import AxisTiles, axis_tiles
from attncc.passes.block_mask import BlockMask
from attncc.passes.canonicalize import Band
from attncc.passes.given import known_grid
from attncc.passes.plan import KernelPlan
from attncc.passes.schedule import row_order
from attncc.passes.tiles import BoundMask, Shape, Tiling, bind, ceildiv, class_lengths
from attncc.simulator.levels import MaskPolicy, Times, conditions_of, dense_launch, report, sides, simulate, without_times
from attncc.simulator.predict import Conditions, Launch, Prediction, Rows, predict_many
from attncc.simulator.report import SpeedupReport
from attncc.simulator.work import Direction
from attncc.spec.attention import AttentionSpec
from attncc.spec.masks import Full, Neighborhood
from attncc.targets import Target
from attncc.targets import target as target_record

Progress = Callable[[int], None]
"""Called with the number of candidates done since the last call."""
Rule = tuple[int, int, int, bool]
TOGETHER = 1 << 20
"""Rows of candidates that are predicted together, at most: bounds memory."""
BANDS, AXES = 1 << 16, 1 << 12
"""Solved and analysed axes that are kept."""


@dataclass(frozen=True)
class Candidate:
    """A spec and tiles for it; without tiles, the plan's."""

    spec: AttentionSpec
    q_tile: Shape | None = None
    k_tile: Shape | None = None


def simulate_many(
    candidates: Iterable[AttentionSpec | Candidate],
    target: str,
    *,
    q_tile: Shape | None = None,
    k_tile: Shape | None = None,
    batch: int | None = None,
    direction: Direction = "forward",
    splits: int = 1,
    mask_policy: MaskPolicy | None = None,
    pipeline: str | None = None,
    constants: str | Path | None = None,
    progress: Progress | None = None,
) -> list[SpeedupReport]:
    """`simulate` of many candidates: equal reports, in order, far sooner where masks are products of bands and tiles are given.

    Args:
        candidates: specs whose lengths are known, or specs with tiles.
        target: as for `simulate`.
        q_tile: tokens of a query tile by axis, for candidates without tiles of their own; default: those of each candidate's plan.
        k_tile: the same of a key tile.
        batch: as for `simulate`.
        direction: as for `simulate`.
        splits: as for `simulate`.
        mask_policy: as for `simulate`.
        pipeline: as for `simulate`.
        constants: as for `simulate`.
        progress: called with the number of candidates done since it was last called.

    Raises:
        TargetError: an unknown target.
        InputError: what `simulate` refuses, of any candidate; names the argument.
    """
    options = {"direction": direction, "splits": splits, "pipeline": pipeline, "constants": constants}
    conditions = conditions_of(target_record(target), batch or 1, direction, splits, pipeline, None, constants)
    slow = {**options, "batch": batch, "mask_policy": mask_policy}
    many = _Many(conditions, mask_policy, slow)
    found: list[SpeedupReport] = []
    for chunk in _chunks(map(many.analysed, (_candidate(c, q_tile, k_tile) for c in candidates))):
        found += many.reports(chunk)
        if progress is not None:
            progress(len(chunk))
    return found


def _candidate(given: AttentionSpec | Candidate, q_tile: Shape | None, k_tile: Shape | None) -> Candidate:
    own = given if isinstance(given, Candidate) else Candidate(given)
    return Candidate(own.spec, *(sides(n, t, own.spec) for n, t in (("q_tile", own.q_tile or q_tile), ("k_tile", own.k_tile or k_tile))))


@dataclass(frozen=True)
class _Analysed:
    """A candidate with its tiles counted; or, where it takes the long way, its report."""

    spec: AttentionSpec
    mask: BlockMask | None
    order: str = ""
    report: SpeedupReport | None = None

    @property
    def tiles(self) -> BlockMask:
        assert self.mask is not None
        return self.mask


def _chunks(analysed: Iterable[_Analysed]) -> Iterator[list[_Analysed]]:
    chunk: list[_Analysed] = []
    rows = 0
    for one in analysed:
        chunk.append(one)
        rows += one.mask.tiling.rows if one.mask else TOGETHER // 16
        if rows >= TOGETHER:
            yield chunk
            chunk, rows = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _Many:
    """Everything that candidates share: axes, plans, launches, baselines."""

    conditions: Conditions
    policy: MaskPolicy | None
    slow: dict[str, Any]
    plans: dict[Any, KernelPlan] = field(default_factory=dict)
    launches: dict[Any, Launch | str] = field(default_factory=dict)
    baselines: dict[Any, Prediction | str] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        return self.conditions.target

    # ---- tiles -----------------------------------------------------------------------------------------------------------------------

    def analysed(self, c: Candidate) -> _Analysed:
        """The candidate's tiles."""
        mask = block_mask(c.spec, c.q_tile, c.k_tile) if c.q_tile and c.k_tile else None
        if mask is None:
            return _Analysed(c.spec, None, "", simulate(c.spec, self.target.name, c.q_tile, c.k_tile, **self.slow))
        return _Analysed(c.spec, mask, row_order(mask.tiling.mask.bands[0]))

    # ---- reports ---------------------------------------------------------------------------------------------------------------------

    def reports(self, chunk: list[_Analysed]) -> list[SpeedupReport]:
        """Reports of some candidates, predicted together."""
        return [c.report or report(c.spec, c.tiles, self.target, t) for c, t in zip(chunk, self.times(chunk))]

    def times(self, chunk: list[_Analysed]) -> list[Times]:
        """Times of each; none where its report is made already."""
        if self.target.performance is None:
            return [(None, None, without_times(self.target))] * len(chunk)
        launches = [self.launch(c.spec, c.mask, c.order) if c.mask else "" for c in chunk]
        ready = [(i, launch) for i, launch in enumerate(launches) if isinstance(launch, Launch)]
        rows = [self.rows(chunk[i]) for i, _ in ready]
        ours = dict(zip((i for i, _ in ready), predict_many([(launch, r) for (_, launch), r in zip(ready, rows)])))
        return [self.pair(c, ours.get(i), str(launches[i]) if i not in ours else "") for i, c in enumerate(chunk)]

    def rows(self, c: _Analysed) -> Rows:
        """The blocks of a candidate."""
        return Rows.of(c.tiles, c.spec.heads, self.conditions.batch, c.order == "descending")

    def pair(self, c: _Analysed, ours: Prediction | None, problem: str) -> Times:
        """A prediction and its baseline."""
        if ours is None or c.mask is None:
            return None, None, problem
        dense = self.dense(c.spec, c.mask.tiling)
        return (None, None, dense) if isinstance(dense, str) else (ours, dense, "")

    def launch(self, spec: AttentionSpec, mask: BlockMask, order: str) -> Launch | str:
        """The kernel of a candidate on the machine, or why it has no time."""
        tiling = mask.tiling
        # Score maps see dilated coordinates, so their work depends on the dilation; nothing else of a plan does.
        kind = (order, tiling.mask.order if spec.scores else ()) if isinstance(spec.mask, Neighborhood) else spec.mask
        key = (_besides_mask(spec), kind, tiling.q_tile, tiling.k_tile)
        if key not in self.launches:
            self.launches[key] = self._launch(spec, key)
        return self.launches[key]

    def _launch(self, spec: AttentionSpec, key: tuple[Any, Any, Shape, Shape]) -> Launch | str:
        try:
            kernel = self.plan(spec, key)
            launch = Launch(kernel if self.policy is None else kernel.model_copy(update={"mask_policy": self.policy}), self.conditions)
            _ = launch.cycles
        except (UnsupportedError, TargetError) as error:
            return str(error)
        return launch

    def plan(self, spec: AttentionSpec, key: tuple[Any, Any, Shape, Shape]) -> KernelPlan:
        """The plan with the key's tiles; tiles of one size differ in nothing else.

        Raises:
            UnsupportedError: tiles that the target cannot take.
        """
        *kind, q_tile, k_tile = key
        powers = all(side & (side - 1) == 0 for side in (*q_tile, *k_tile))
        size = (*kind, prod(q_tile), prod(k_tile))
        if not powers or size not in self.plans:
            self.plans[size] = compiler.plan(spec, self.target.name, q_tile, k_tile).kernels[0]
        return self.plans[size].model_copy(update={"q_tile": q_tile, "k_tile": k_tile})

    def dense(self, spec: AttentionSpec, tiling: Tiling) -> Prediction | str:
        """The baseline: the same kernel without its mask."""
        key = (_besides_mask(spec), None, tiling.q_tile, tiling.k_tile)
        if key not in self.baselines:
            try:
                kernel = self.plan(spec.model_copy(update={"mask": Full()}), key)
                self.baselines[key] = predict_many([dense_launch(kernel, tiling, spec.heads, self.conditions)])[0]
            except TargetError as error:
                self.baselines[key] = str(error)
        return self.baselines[key]


def _besides_mask(spec: AttentionSpec) -> tuple[Any, ...]:
    return tuple(value for name, value in spec if name != "mask")


# ---- masks that are products of bands --------------------------------------------------------------------------------------------------


def block_mask(spec: AttentionSpec, q_tile: Shape, k_tile: Shape) -> BlockMask | None:
    """The block mask of a spec whose mask is a product of bands, or None: axes that were analysed before are not analysed again.

    Raises:
        InputError: lengths that are not known.
    """
    mask = _bound(spec)
    if not mask.separable:
        return None
    lengths = zip(mask.bands, mask.query, mask.order, q_tile, k_tile)
    axes = tuple(_axis(band, a, *rest) for a, (band, *rest) in enumerate(lengths))
    return None if any(axis.gaps for axis in axes) else BlockMask(Tiling(mask, q_tile, k_tile), 1, 1, True, axes)


def _bound(spec: AttentionSpec) -> BoundMask:
    if not isinstance(spec.mask, Neighborhood) or spec.key_tokens is not None or None in spec.tokens:
        return bind(compiler.canonical(spec), *known_grid(spec))
    query = tuple(n for n in spec.tokens if n is not None)
    axes = [_axis_band(n, a, rule) for a, (n, rule) in enumerate(zip(query, spec.mask.axes(len(query))))]
    return BoundMask(tuple(band for band, _ in axes), const(True), query, query, tuple(order for _, order in axes))


@lru_cache(BANDS)
def _axis_band(length: int, axis: int, rule: Rule) -> tuple[Band, int]:
    """The band of one axis of a neighborhood and its residue classes, solved as part of a grid whose other axes have one token."""
    tokens = tuple(length if a == axis else 1 for a in range(axis + 1))
    whole: Rule = (1, 1, 1, False)
    window, stride, dilation, causal = zip(*(rule if a == axis else whole for a in range(axis + 1)))
    mask = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)
    graph = compiler.canonical(AttentionSpec(tokens=tokens, heads=1, head_dim=16, mask=mask))
    return bind(graph, tokens, tokens).bands[axis], graph.order[axis]


@lru_cache(AXES)
def _axis(band: Band, axis: int, length: int, order: int, q_side: int, k_side: int) -> AxisTiles:
    classes = [(r, class_lengths((length,), (order,), (r,))[0]) for r in range(order)]
    return axis_tiles(band, axis, classes, ceildiv(ceildiv(length, order), q_side), q_side, k_side)
