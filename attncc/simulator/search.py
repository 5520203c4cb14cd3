"""Searches by simulation: strides that need no mask, the best tiles, a front of windows, the cheapest mask, growth by length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, Literal

from attncc.errors import InputError, TargetError
from attncc.passes.footprint import SIZES, configurations, unfit
from attncc.passes.given import Lengths, known_grid
from attncc.passes.tile import shapes
from attncc.passes.tiles import Shape
from attncc.pipeline import canonical
from attncc.simulator.levels import sides, without_times
from attncc.simulator.many import Candidate, neighborhood_tiles, simulate_many
from attncc.simulator.report import SpeedupReport
from attncc.spec.attention import AttentionSpec
from attncc.spec.masks import Full, Neighborhood
from attncc.spec.model import Grid
from attncc.targets import Target
from attncc.targets import target as target_record

Speedup = Literal["predicted", "tiles"]
Choices = Sequence[Sequence[int]]


# ---- strides ---------------------------------------------------------------------------------------------------------------------------


def smallest_stride(spec: AttentionSpec, q_tile: Shape, k_tile: Shape, lengths: Lengths = None) -> tuple[int | None, ...]:
    """The smallest stride of each axis with which no tile of a neighborhood needs its mask; None where there is none.

    Args:
        spec: its mask is a neighborhood, whose strides are not looked at. Axes are independent: strides of all together are the smallest
            for which the whole mask is block-sparse.
        q_tile: tokens of a query tile by axis.
        k_tile: tokens of a key tile by axis.
        lengths: tokens of each axis that the spec leaves open.

    Raises:
        InputError: a mask that is no neighborhood, or tiles of the wrong rank; names the argument.
    """
    mask, (query, _) = _the_neighborhood(spec), known_grid(spec, lengths)
    q_sides, k_sides = _both_sides(spec, q_tile, k_tile)
    return tuple(_smallest(*axis) for axis in zip(query, mask.axes(len(query)), q_sides, k_sides))


def _smallest(length: int, rule: tuple[int, int, int, bool], q_side: int, k_side: int) -> int | None:
    window, _, dilation, causal = rule
    for stride in range(1, window + 1):
        # Tiles at the beginning of an axis decide most strides.
        beginning = neighborhood_tiles(length, (window, stride, dilation, causal), q_side, k_side, 4 * max(q_side, k_side, stride))
        if beginning.sums[0] == beginning.sums[1]:
            found = neighborhood_tiles(length, (window, stride, dilation, causal), q_side, k_side)
            if found.sums[0] == found.sums[1]:
                return stride
    return None


# ---- tiles -----------------------------------------------------------------------------------------------------------------------------


def best_tiles(spec: AttentionSpec, target: str, *, top: int | None = None, lengths: Lengths = None, **options: Any) -> list[SpeedupReport]:
    """Reports for all tile shapes that fit a device, the one with the shortest predicted time first.

    Sizes are those that a plan chooses from; every way to spread a size over the axes in powers of two is tried.

    Args:
        spec: what would be computed.
        target: a device, by name or file.
        top: how many; default: all.
        lengths: tokens of each axis that the spec leaves open.
        **options: of `simulate_many`.

    Raises:
        TargetError: an unknown target, or one without times.
        InputError: as `simulate`.
    """
    record, closed = _with_times(target), _closed(spec, lengths)
    found = simulate_many(_tilings(closed, record), record.name, **options)
    ranked = sorted(
        (r for r in found if r.prediction), key=lambda r: (_milliseconds(r), -math.prod((*r.q_tile, *r.k_tile)), _elongation(r))
    )
    return ranked[:top]


def _tilings(spec: AttentionSpec, target: Target) -> Iterator[Candidate]:
    body, (query, key) = canonical(spec), known_grid(spec)
    fitting = {(c.q_rows, c.k_rows) for c in configurations(body, target) if not unfit(body, c, target, demanded=True)}
    for q_rows, k_rows in fitting if target.backend != "cpu" else {(q, k) for q, k, _ in SIZES}:
        yield from (Candidate(spec, q, k) for q, k in product(shapes(q_rows, query), shapes(k_rows, key)))


def _elongation(r: SpeedupReport) -> float:
    return max(r.q_tile) / min(r.q_tile) * max(r.k_tile) / min(r.k_tile)


# ---- windows, strides, dilations -------------------------------------------------------------------------------------------------------


def neighborhoods(spec: AttentionSpec, windows: Choices, strides: Choices = ((1,),), dilations: Choices = ((1,),)) -> list[AttentionSpec]:
    """The spec with every neighborhood that the choices allow.

    Left out are strides that exceed their window, and windows that leave the grid once they are dilated.

    Args:
        spec: its grid is known; its mask is replaced, but causal axes of a neighborhood stay causal.
        windows: for each axis, or one for all of them, the windows to try.
        strides: the same of strides.
        dilations: the same of dilations.

    Raises:
        InputError: choices that are empty, of the wrong rank, no positive integers or past the grid; names the argument.
    """
    query, _ = known_grid(spec)
    if not isinstance(spec.mask, (Neighborhood, Full)) or spec.key_tokens is not None:
        raise InputError("spec", "its mask must be a neighborhood, or full to be replaced by one, over tokens of its own")
    causal = spec.mask.causal if isinstance(spec.mask, Neighborhood) else False
    axes = [_choices(name, c, len(query)) for name, c in (("windows", windows), ("strides", strides), ("dilations", dilations))]
    for axis, (n, chosen) in enumerate(zip(query, axes[0])):
        if max(chosen) > n:
            raise InputError("windows", f"window {max(chosen)} exceeds the {n} tokens of axis {axis}")
    rules = [[r for r in product(*each) if r[1] <= r[0] and r[0] * r[2] <= n] for n, *each in zip(query, *axes)]
    if not all(rules):
        raise InputError("strides", "every stride exceeds its window, or every dilated window its axis")
    return [_with_mask(spec, combination, causal) for combination in product(*rules)]


def _choices(name: str, given: Any, rank: int) -> list[list[int]]:
    axes = [sorted({*each}) for each in given]
    if len(axes) not in (1, rank):
        raise InputError(name, f"has {len(axes)} axes, tokens have {rank}")
    if not all(axes):
        raise InputError(name, "an empty range: there is nothing to try")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for each in axes for n in each):
        raise InputError(name, f"must be positive integers, not {axes}")
    return axes * rank if len(axes) == 1 else axes


def _with_mask(spec: AttentionSpec, rules: tuple[tuple[int, int, int], ...], causal: Any) -> AttentionSpec:
    window, stride, dilation = zip(*rules)
    mask = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)
    # Checked above; validating each would take longer than all the rest.
    return AttentionSpec.model_construct(**{**dict(spec), "mask": mask})


def pareto(
    specs: Iterable[AttentionSpec],
    target: str,
    q_tile: Shape,
    k_tile: Shape,
    *,
    by: Speedup = "predicted",
    sparsity: float | None = None,
    speedup: float | None = None,
    **options: Any,
) -> list[SpeedupReport]:
    """Of some specs those that no other one beats: none keeps as many pairs and is as fast, and better in one of the two.

    Args:
        specs: such as `neighborhoods` gives.
        target: a device, or for `by="tiles"` any target.
        q_tile: tokens of a query tile by axis.
        k_tile: tokens of a key tile by axis.
        by: "predicted" speedup, or the bound by "tiles".
        sparsity: least share of pairs that must be masked.
        speedup: least speedup.
        **options: of `simulate_many`.

    Returns:
        The front, fastest first; empty where nothing reaches what is asked for.

    Raises:
        TargetError: an unknown target, or one without times.
        InputError: an option that is no option; names it.
    """
    if by not in ("predicted", "tiles"):
        raise InputError("by", f"must be one of predicted, tiles, not {by!r}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise InputError("sparsity", f"must be at least 0 and below 1, not {sparsity!r}")
    if speedup is not None and not 0 < speedup < math.inf:
        raise InputError("speedup", f"must be positive and finite, not {speedup!r}")
    record = _with_times(target) if by == "predicted" else target_record(target)
    found = simulate_many(specs, record.name, q_tile=q_tile, k_tile=k_tile, **options)
    reached = [r for r in found if r.sparsity >= (sparsity or 0.0) and (_speedup(r, by) or 0.0) >= (speedup or 0.0)]
    return front(reached, by)


def front(reports: Iterable[SpeedupReport], by: Speedup = "predicted") -> list[SpeedupReport]:
    """Reports that no other one beats in both speedup and share of allowed pairs, fastest first; equals stay together."""
    timed = [(speedup, r) for r in reports if (speedup := _speedup(r, by)) is not None]
    kept: list[tuple[float, SpeedupReport]] = []
    for speedup, r in sorted(timed, key=lambda x: (-x[0], x[1].sparsity)):
        if not kept or r.sparsity < kept[-1][1].sparsity or (speedup, r.sparsity) == (kept[-1][0], kept[-1][1].sparsity):
            kept.append((speedup, r))
    return [r for _, r in kept]


def _speedup(r: SpeedupReport, by: Speedup) -> float | None:
    return r.predicted_speedup if by == "predicted" else r.tile_bound


# ---- masks and lengths -----------------------------------------------------------------------------------------------------------------


def cheapest(specs: Sequence[AttentionSpec], target: str, *, lengths: Lengths = None, **options: Any) -> list[tuple[int, SpeedupReport]]:
    """Reports of several specs, the one with the shortest predicted time first, each with its place in `specs`.

    Args:
        specs: of one rank.
        target: a device.
        lengths: tokens of each axis that a spec leaves open.
        **options: of `simulate_many`.

    Raises:
        TargetError: an unknown target, or one without times.
        InputError: no specs, or grids of different rank.
    """
    record, ranks = _with_times(target), sorted({spec.grid.rank for spec in specs})
    if len(ranks) != 1:
        raise InputError("specs", f"grids of rank {' and '.join(map(str, ranks))} cannot be compared" if ranks else "none given")
    found = simulate_many([_closed(spec, lengths if _is_open(spec) else None) for spec in specs], record.name, **options)
    return sorted(enumerate(found), key=lambda x: _milliseconds(x[1]))


def by_length(spec: AttentionSpec, target: str, lengths: Sequence[int], *, axis: int = 0, **options: Any) -> list[SpeedupReport]:
    """How the levels change as one axis of the grid grows.

    Args:
        spec: its other axes are known.
        target: any target; a bare architecture has bounds only.
        lengths: tokens of the axis, one report for each.
        axis: the axis that grows, of queries and keys where these share a grid, else of both.
        **options: of `simulate_many`.

    Raises:
        TargetError: an unknown target.
        InputError: no lengths, lengths that the mask does not fit, or an axis that is none; names the argument.
    """
    if not lengths:
        raise InputError("lengths", "an empty range: there is nothing to try")
    if not 0 <= axis < spec.grid.rank:
        raise InputError("axis", f"must be below {spec.grid.rank}, not {axis}")
    return simulate_many([_grown(spec, n, axis) for n in lengths], target_record(target).name, **options)


def _grown(spec: AttentionSpec, length: int, axis: int) -> AttentionSpec:
    def at(tokens: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*tokens[:axis], length, *tokens[axis + 1 :])

    query, key = at(spec.tokens), None if spec.key_tokens is None else at(spec.key_tokens)
    _no_problems(spec, Grid(query, query if key is None else key, key is None))
    return spec.model_copy(update={"tokens": query, "key_tokens": key})


# ---- arguments -------------------------------------------------------------------------------------------------------------------------


def _no_problems(spec: AttentionSpec, grid: Grid) -> None:
    if problems := spec.mask.problems(grid):
        raise InputError("lengths", f"mask: {problems[0]}")


def _is_open(spec: AttentionSpec) -> bool:
    return None in (*spec.tokens, *(spec.key_tokens or ()))


def _closed(spec: AttentionSpec, lengths: Lengths) -> AttentionSpec:
    """The spec with its open axes filled in."""
    query, key = known_grid(spec, lengths)
    return spec.model_copy(update={"tokens": query, "key_tokens": None if spec.key_tokens is None else key}) if _is_open(spec) else spec


def _the_neighborhood(spec: AttentionSpec) -> Neighborhood:
    if not isinstance(spec.mask, Neighborhood):
        raise InputError("spec", "its mask must be a neighborhood")
    return spec.mask


def _both_sides(spec: AttentionSpec, q_tile: Shape, k_tile: Shape) -> tuple[Shape, Shape]:
    given = sides("q_tile", q_tile, spec), sides("k_tile", k_tile, spec)
    if given[0] is None or given[1] is None:
        raise InputError("q_tile" if given[0] is None else "k_tile", "is needed here")
    return given[0], given[1]


def _with_times(target: str) -> Target:
    record = target_record(target)
    if record.performance is None:
        raise TargetError(f"target: {without_times(record)}")
    return record


def _milliseconds(r: SpeedupReport) -> float:
    return math.inf if r.prediction is None else r.prediction.milliseconds
