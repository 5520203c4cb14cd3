"""`simulate_many`: the reports of `simulate` for thousands of candidates a second.

A mask that is a product of bands is analysed axis by axis, and candidates share axes: each (band, length, sides) is analysed once. Plans
depend on the sizes of tiles, not on their shapes; blocks of many candidates are scheduled together. Results are those of `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from attncc import pipeline as compiler
from attncc.errors import TargetError, UnsupportedError
from attncc.ir.expr import Expr, const, var
from attncc.ir.graph import Graph, GraphOp, node
from attncc.passes.axis_tiles import AxisTiles, axis_tiles
from attncc.passes.block_mask import BlockMask
from attncc.passes.canonicalize import Band, canonicalize
from attncc.passes.given import known_grid
from attncc.passes.order import order_tokens
from attncc.passes.plan import KernelPlan
from attncc.passes.schedule import row_order
from attncc.passes.tiles import BoundMask, Shape, Tiling, bind, ceildiv, class_lengths, the_mask
from attncc.simulator.levels import MaskPolicy, Times, conditions_of, dense_launch, report, sides, simulate, without_times
from attncc.simulator.predict import Conditions, Launch, Prediction, Rows, predict_many
from attncc.simulator.report import SpeedupReport
from attncc.simulator.work import Direction
from attncc.spec.attention import AttentionSpec
from attncc.spec.masks import Full, Neighborhood, neighborhood_axis
from attncc.spec.model import Grid
from attncc.targets import Target
from attncc.targets import target as target_record

Progress = Callable[[int], None]
"""Called with the number of candidates done since the last call."""
Rule = tuple[int, int, int, bool]
TOGETHER = 1 << 20
"""Rows of candidates that are predicted together, at most: bounds memory."""
AXES = 1 << 12
"""Analysed axes that are kept."""


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
        plain = c.spec.routing is None and c.spec.normalizer.record(c.spec.grid).statistic is None
        mask = block_mask(c.spec, c.q_tile, c.k_tile) if c.q_tile and c.k_tile and plain else None
        if mask is None:
            return _Analysed(c.spec, None, "", simulate(c.spec, self.target.name, c.q_tile, c.k_tile, **self.slow))
        return _Analysed(c.spec, mask, _row_order(mask, c.spec))

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
        # Score maps and factors see dilated coordinates, so their work depends on it; nothing else of a plan does.
        seen = tiling.mask.order if spec.scores or spec.factor is not None else ()
        kind = (order, seen) if isinstance(spec.mask, Neighborhood) else spec.mask
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
            self.plans[size] = compiler.plan(spec, self.target.name, q_tile, k_tile).kernels[-1]
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
    """The fields of a spec but its mask; iterating over a spec would give what it has cached as well."""
    return tuple(getattr(spec, name) for name in type(spec).model_fields if name != "mask")


# ---- masks that are products of bands --------------------------------------------------------------------------------------------------


def block_mask(spec: AttentionSpec, q_tile: Shape, k_tile: Shape) -> BlockMask | None:
    """The block mask of a spec whose mask is a product of bands, or None: axes that were analysed before are not analysed again.

    Raises:
        InputError: lengths that are not known.
    """
    if isinstance(spec.mask, Neighborhood) and spec.key_tokens is None and None not in spec.tokens:
        return _neighborhood(spec, q_tile, k_tile)
    mask = _bound(spec)
    if not mask.separable:
        return None
    lengths = zip(mask.bands, mask.query, mask.order, q_tile, k_tile)
    axes = tuple(_axis(band, a, *rest) for a, (band, *rest) in enumerate(lengths))
    return None if any(axis.gaps for axis in axes) else BlockMask(Tiling(mask, q_tile, k_tile), 1, 1, True, axes)


def _bound(spec: AttentionSpec) -> BoundMask:
    return bind(compiler.canonical(spec), *known_grid(spec))


@lru_cache(AXES)
def _axis(band: Band, axis: int, length: int, order: int, q_side: int, k_side: int) -> AxisTiles:
    classes = [(r, class_lengths((length,), (order,), (r,))[0]) for r in range(order)]
    return axis_tiles(band, axis, classes, ceildiv(ceildiv(length, order), q_side), q_side, k_side)


# ---- neighborhoods -------------------------------------------------------------------------------------------------------------------


def _neighborhood(spec: AttentionSpec, q_tile: Shape, k_tile: Shape) -> BlockMask | None:
    """The block mask of a neighborhood; its bands are solved once, for any window and stride."""
    query = tuple(n for n in spec.tokens if n is not None)
    rules = spec.mask.axes(len(query)) if isinstance(spec.mask, Neighborhood) else []
    axes = tuple(neighborhood_tiles(*each) for each in zip(query, rules, q_tile, k_tile))
    mask = BoundMask((), const(True), query, query, tuple(rule[2] for rule in rules))
    return None if any(axis.gaps for axis in axes) else BlockMask(Tiling(mask, q_tile, k_tile), 1, 1, True, axes)


@lru_cache(AXES)
def neighborhood_tiles(length: int, rule: Rule, q_side: int, k_side: int, beginning: int | None = None) -> AxisTiles:
    """Tiles of one axis of a neighborhood (window, stride, dilation, causal); of the first `beginning` queries of a class, if given.

    Residue classes are plain neighborhoods of their own lengths, of which there are two at most.
    """
    dilation = rule[2]
    lengths = [class_lengths((length,), (dilation,), (r,))[0] for r in range(dilation)]
    tiles = ceildiv(lengths[0], q_side)
    by_length = {n: _class(n, rule, min(n, beginning or n), tiles, q_side, k_side) for n in set(lengths)}
    classes = [by_length[n] for n in lengths]
    if len(classes) == 1:
        return classes[0]
    first, full_first, full_stop, stop, pairs = (np.concatenate([getattr(c, name) for c in classes]) for name in RANGES)
    return AxisTiles(first, full_first, full_stop, stop, pairs, any(c.gaps for c in classes))


RANGES = ("first", "full_first", "full_stop", "stop", "pairs")


def _class(length: int, rule: Rule, queries: int, tiles: int, q_side: int, k_side: int) -> AxisTiles:
    window, stride, _, causal = rule
    known = {"nq0": length, "nk0": length, "nwindow": window, "nstride": stride}
    return axis_tiles(_template(causal), 0, [(0, queries)], tiles, q_side, k_side, known)


@cache
def _template(causal: bool) -> Band:
    """The band of a neighborhood whose window and stride are variables."""
    open_grid = Grid((None,), (None,), True)
    return _solved(neighborhood_axis(open_grid, 0, var("nwindow"), var("nstride"), 1, causal), open_grid)


def _solved(predicate: Expr, grid: Grid) -> Band:
    """The first axis's band, as the passes solve it on a graph that is only this mask."""
    mask = node(GraphOp.MASK, node(GraphOp.INPUT, name="scores"), predicate=predicate)
    band: Band = the_mask(canonicalize(order_tokens(Graph(grid.query, grid.key, (("output", mask),)))))["bands"][0]
    return band


def _row_order(mask: BlockMask, spec: AttentionSpec) -> str:
    """The plan's row order. Only bands that all begin at one key are launched in another than the usual one."""
    assert mask.axes is not None
    if np.ptp(mask.axes[0].first) or not isinstance(spec.mask, Neighborhood):
        return "ascending" if isinstance(spec.mask, Neighborhood) else row_order(mask.tiling.mask.bands[0])
    (n,), rule = mask.tiling.mask.query[:1], spec.mask.axes(mask.tiling.rank)[0]
    return _exact_order(n, rule)


@lru_cache(AXES)
def _exact_order(length: int, rule: Rule) -> str:
    grid = Grid((length,), (length,), True)
    return row_order(_solved(neighborhood_axis(grid, 0, *rule), grid))
