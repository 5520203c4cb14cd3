"""What turns scores into weights, the same for every block of a call: score map, weights, mask of tiles, and what is reused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attncc.runtime.blocked.workers import capturing

LOG2E = math.log2(math.e)
KEPT_BYTES = 64 << 20
SAFE_SCORE = 60.0
"""|s| up to this needs no row maximum: sums of exp(s) stay far inside float32."""


class Where(NamedTuple):
    """Positions of a score block: integer tensors that broadcast to its shape [..., rows, columns]."""

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor


class Place(NamedTuple):
    """Where a score block lies; its positions are made when asked for.

    Blocks with an equal `shape` have equal positions but for a shift along axis 0, the same for queries and keys; None says nothing.
    """

    where: Callable[[], Where]
    shape: object = None


@dataclass(frozen=True)
class ScoreMap:
    """A map on scaled scores, before the mask.

    `value(s, where)` leaves `s` as it is; `vjp(s, grad, where, grads)` returns the gradient of `s` and adds those of the `trained`
    tables to `grads`. A map that only adds something to s says what in `offset`; then neither reads `s`, and where the offset is
    `steady` it depends on the shape of the positions only. `bound` is one of |value| for every s; `tables` are the float tables read.
    With `finite` scores and tables the value of a `finite` map is finite.
    """

    value: Callable[[Tensor, Where], Tensor]
    vjp: Callable[[Tensor, Tensor, Where, dict[str, Tensor]], Tensor]
    offset: Callable[[Where], Tensor] | None = None
    steady: bool = False
    bound: float = math.inf
    finite: bool = True
    tables: tuple[Tensor, ...] = ()
    trained: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Factor:
    """What the weight of each pair is multiplied by once it is in what its row divides by: `value(where)`.

    `vjp(grad, where, grads)` adds the gradients of the `trained` tables to `grads`, from that of the value. A `steady` one depends on the
    shape of the positions only.
    """

    value: Callable[[Where], Tensor]
    vjp: Callable[[Tensor, Where, dict[str, Tensor]], None]
    steady: bool = False
    trained: dict[str, Tensor] = field(default_factory=dict)


def trained_tables(scores: ScoreMap | None, factor: Factor | None) -> dict[str, Tensor]:
    """The tables whose gradients come from pairs."""
    return {name: x for each in (scores, factor) if each is not None for name, x in each.trained.items()}


class TableSums:
    """One task's share of the gradients of trained tables.

    Where an additive map or a factor is steady, blocks of one shape read the same entries: their gradients are added up before they
    are scattered, which costs many times as much.
    """

    def __init__(self, scores: ScoreMap | None, factor: Factor | None, dtype: torch.dtype) -> None:
        self.scores, self.factor = scores, factor
        self.tables = {n: torch.zeros(x.shape, dtype=dtype, device=x.device) for n, x in trained_tables(scores, factor).items()}
        self._waiting: dict[object, tuple[Scatter, Where, Tensor]] = {}

    def through(self, s: Tensor, grad: Tensor, place: Place) -> Tensor:
        """The gradient of scaled scores from that of the mapped ones, as `ScoreMap.vjp`."""
        scores = self.scores
        assert scores is not None
        if scores.offset is None:
            return scores.vjp(s, grad, place.where(), self.tables)
        if scores.trained:  # of a map that adds, the score's gradient stays what it is
            self._take("scores", lambda grad, where, grads: scores.vjp(grad, grad, where, grads), scores.steady, grad, place)
        return grad

    def multiplied(self, grad: Tensor, place: Place) -> None:
        """Takes the gradient of the factor of each pair."""
        assert self.factor is not None
        self._take("factor", self.factor.vjp, self.factor.steady, grad, place)

    def _take(self, whose: str, scatter: Scatter, steady: bool, grad: Tensor, place: Place) -> None:
        if place.shape is None or not steady:
            scatter(grad, place.where(), self.tables)
            return
        key = (whose, place.shape)
        if key in self._waiting:
            self._waiting[key][2].add_(grad)
            return
        if sum(x.nbytes for _, _, x in self._waiting.values()) > KEPT_BYTES:
            self.finish()
        self._waiting[key] = (scatter, place.where(), grad.clone())

    def finish(self) -> dict[str, Tensor]:
        """The gradients by name, with all that waited."""
        for scatter, where, grad in self._waiting.values():
            scatter(grad, where, self.tables)
        self._waiting.clear()
        return self.tables


Scatter = Callable[[Tensor, Where, dict[str, Tensor]], object]
"""Adds the gradients of tables, from that of what pairs read of them."""


Total = Literal["keys", "weights"]
"""What a row divides by: the number of its keys, or the sum of its weights."""


@dataclass(frozen=True)
class Pointwise:
    """A normalizer other than softmax: weight `value(s)` and its derivative `slope(s)`, over the row's `total` if it has one.

    `vanishes`: both are 0 at -inf. Neither overwrites its argument.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    total: Total | None = None
    vanishes: bool = True


@dataclass(frozen=True)
class Root:
    """A number t of each row, found in `sweeps` over its keys: `attncc.ir.rows.Root` in torch, `slope` being the weight's derivative."""

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    start: Callable[[Tensor], Tensor]
    update: Callable[[Tensor, Tensor, Tensor], Tensor]
    sweeps: int


class Kept:
    """Masks and offsets of blocks made so far; at most about `KEPT_BYTES` of them.

    Worker threads share one: two may make the same, none may rely on finding one. What a CUDA graph captures is made anew: kept, it
    would be used before the graph has computed it, or freed before the graph runs again.
    """

    def __init__(self) -> None:
        self._kept: dict[object, Tensor] = {}
        self._bytes = 0

    def __call__(self, key: object, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What is kept under `key` on a device, made if there is nothing."""
        if capturing(device):
            return make()
        found = self._kept.get(key)
        if found is None:
            if self._bytes > KEPT_BYTES:
                self._kept.clear()
                self._bytes = 0
            found = self._kept[key] = make()
            self._bytes += found.nbytes
        return found


@dataclass(frozen=True, eq=False)
class TileMask:
    """The mask of partial tiles, asked at every head where `by_head` says so, else at the first of those computed together."""

    allowed: Callable[[Where], Tensor]
    by_head: bool
    made: Kept = field(default_factory=Kept)


class Scratch:
    """Reused contiguous buffers, one a slot."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, slot: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor of `shape`; it shares memory with what the slot gave before."""
        view = self._views.get((slot, shape))
        if view is None:
            size = math.prod(shape)
            if slot not in self._buffers or self._buffers[slot].numel() < size:
                self._views = {key: x for key, x in self._views.items() if key[0] != slot}
                self._buffers[slot] = self.like.new_empty(size)
            view = self._views[slot, shape] = self._buffers[slot][:size].view(shape)
        return view


@dataclass(frozen=True)
class Rules:
    """What turns scores into weights, or into the root of a row, the same for every block.

    `bounded`: no score can overflow exp. `finite`: no score is NaN or infinite; a ceiling masks it. `like` has the compute
    dtype and device; `mask` is that of tile plans.
    """

    scale: float
    scores: ScoreMap | None
    pointwise: Pointwise | None
    bounded: bool
    finite: bool
    like: Tensor
    mask: TileMask | None = None
    root: Root | None = None
    weight_factor: Factor | None = None
    offsets: Kept = field(default_factory=Kept)
    factors: Kept = field(default_factory=Kept)
    _local: threading.local = field(default_factory=threading.local)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype blocks are computed in."""
        return self.like.dtype

    @property
    def factor(self) -> float:
        """What q k^T is multiplied by: the scores of a softmax go to base 2 at once, unless a map is to see them first."""
        return self.scale * self.base if self.scores is None or self.scores.offset is not None else self.scale

    @property
    def totals(self) -> bool:
        """Whether rows have a denominator, or a root in its place."""
        return self.pointwise is None or self.pointwise.total is not None

    @property
    def steep(self) -> bool:
        """Whether a ceiling may be finite where it masks: of bounded scores a softmax leaves nothing far below the least."""
        return self.bounded and self.pointwise is None and self.root is None

    @property
    def nothing(self) -> float:
        """The row number of a row without keys."""
        return -math.inf if self.root is None else 0.0

    @property
    def base(self) -> float:
        """The factor that brings scores to the base of the exponential that follows."""
        return LOG2E if self.pointwise is None and self.root is None else 1.0

    @property
    def places(self) -> bool:
        """Whether blocks need to know their positions."""
        return self.scores is not None or self.weight_factor is not None

    def factor_at(self, place: Place) -> Tensor:
        """What weights are multiplied by."""
        factor = self.weight_factor
        assert factor is not None
        return self._at(place, self.factors if factor.steady else None, lambda: factor.value(place.where()))

    def offset(self, place: Place) -> Tensor:
        """What an additive map adds to scores, which are in their base already."""
        scores = self.scores
        assert scores is not None and scores.offset is not None
        add = scores.offset
        return self._at(place, self.offsets if scores.steady else None, lambda: add(place.where()) * self.base)

    def _at(self, place: Place, kept: Kept | None, make: Callable[[], Tensor]) -> Tensor:
        """A number of each pair, from what is kept of blocks with the same positions but for a shift."""
        return make() if kept is None or place.shape is None else kept(place.shape, self.like.device, make)

    def scratch(self, slot: str, shape: tuple[int, ...]) -> Tensor:
        """This thread's reused buffer `slot`, uninitialised."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch(self.like)
        buffers: Scratch = self._local.scratch
        return buffers.take(slot, shape)
