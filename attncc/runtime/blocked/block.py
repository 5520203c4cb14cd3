"""One block of attention in torch: a few row tiles against the keys they visit, forward and (recomputing) backward.

All matrix products are batched; scores live in reused scratch of cache size.  Softmax works in base 2: exp2 has no slow
path for -inf or underflow, exp has one on some CPUs (5 to 50 times slower).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from attncc.runtime.blocked.workers import capturing

LOG2E = math.log2(math.e)
# |s| up to this needs no row maximum: sums of exp(s) stay far inside float32.
SAFE_SCORE = 60.0
# Smaller exponents (relative to the row maximum) weigh 0: denormal weights would slow the matrix product many times.
LEAST_EXPONENT = -120.0
KEPT_BYTES = 32 << 20


class Where(NamedTuple):
    """Positions of a score block: integer tensors that broadcast to its shape [..., rows, columns].

    Blocks with an equal `shape` have equal positions but for a shift along axis 0, the same for queries and keys; None says nothing.
    """

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor
    shape: object = None


@dataclass(frozen=True)
class ScoreMap:
    """A map on scaled scores, before the mask.

    `value(s, where)` leaves `s` as it is; `vjp(s, grad, where, grads)` returns the gradient of `s` and adds those of the `trained`
    tables to `grads`. A map that only adds something to s says what in `offset`; then neither reads `s`, and where the offset is
    `steady` it depends on the shape of the positions only. `bound` is one of |value| for every s; `tables` are the float tables read.
    """

    value: Callable[[Tensor, Where], Tensor]
    vjp: Callable[[Tensor, Tensor, Where, dict[str, Tensor]], Tensor]
    offset: Callable[[Where], Tensor] | None = None
    steady: bool = False
    bound: float = math.inf
    tables: tuple[Tensor, ...] = ()
    trained: dict[str, Tensor] = field(default_factory=dict)


class TableSums:
    """One task's share of the gradients of trained tables.

    Where an additive map is steady, blocks of one shape read the same entries: their gradients are added up before they are
    scattered, which costs many times as much.
    """

    def __init__(self, scores: ScoreMap | None, dtype: torch.dtype) -> None:
        self.scores = scores
        trained = {} if scores is None else scores.trained
        self.tables = {name: torch.zeros(x.shape, dtype=dtype, device=x.device) for name, x in trained.items()}
        self._waiting: dict[object, tuple[Where, Tensor]] = {}

    def through(self, s: Tensor, grad: Tensor, where: Where) -> Tensor:
        """The gradient of scaled scores from that of the mapped ones, as `ScoreMap.vjp`."""
        assert self.scores is not None
        if self.scores.offset is None or (self.tables and (where.shape is None or not self.scores.steady)):
            return self.scores.vjp(s, grad, where, self.tables)
        if where.shape in self._waiting:
            self._waiting[where.shape][1].add_(grad)
        elif self.tables:
            if sum(x.nbytes for _, x in self._waiting.values()) > KEPT_BYTES:
                self.finish()
            self._waiting[where.shape] = (where, grad.clone())
        return grad

    def finish(self) -> dict[str, Tensor]:
        """The gradients by name, with all that waited."""
        for where, grad in self._waiting.values():
            assert self.scores is not None
            self.scores.vjp(grad, grad, where, self.tables)
        self._waiting.clear()
        return self.tables


@dataclass(frozen=True)
class Pointwise:
    """A normalizer without a row sum: weight `value(s)` and its derivative `slope(s)`, both 0 at -inf.

    Neither overwrites its argument.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


class Kept:
    """What blocks add to scores (masks, offsets), made so far; at most about `KEPT_BYTES` of it.

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
    """What turns scores into weights, the same for every block.

    `bounded`: no score can overflow exp. `finite`: no score is NaN or infinite, so that adding -inf masks it. `like` has the compute
    dtype and device; `mask` is that of tile plans.
    """

    scale: float
    scores: ScoreMap | None
    pointwise: Pointwise | None
    bounded: bool
    finite: bool
    like: Tensor
    mask: TileMask | None = None
    offsets: Kept = field(default_factory=Kept)
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
    def base(self) -> float:
        """The factor that brings scores to the base of the exponential that follows."""
        return LOG2E if self.pointwise is None else 1.0

    def offset(self, where: Where) -> Tensor:
        """What an additive map adds to scores, which are in their base already."""
        assert self.scores is not None and self.scores.offset is not None
        add = self.scores.offset
        if where.shape is None or not self.scores.steady:
            return add(where) * self.base
        return self.offsets(where.shape, self.like.device, lambda: add(where) * self.base)

    def scratch(self, slot: str, shape: tuple[int, ...]) -> Tensor:
        """This thread's reused buffer `slot`, uninitialised."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch(self.like)
        buffers: Scratch = self._local.scratch
        return buffers.take(slot, shape)


class Part(NamedTuple):
    """Columns [start, stop) of a block and the additive mask (0 or -inf) they need, broadcast over heads."""

    start: int
    stop: int
    mask: Tensor


class Piece(NamedTuple):
    """Some keys of a block: k [Mk, L, D], v [Mv, L, Dv], masked columns, positions; in backward the sums to add to."""

    k: Tensor
    v: Tensor
    parts: list[Part]
    where: Where | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


class Block(NamedTuple):
    """Row tiles with equal key counts: `rows` by name, each [*lead, rows, width]; `lead` regroups to Mk or Mv.

    A piece may lie in scratch that the next one overwrites.
    """

    rows: dict[str, Tensor]
    pieces: Iterable[Piece]


def attend(rules: Rules, block: Block) -> None:
    """Fill rows "out" and (softmax) "lse", the natural log, from "q"."""
    out, lse = block.rows["out"], block.rows.get("lse")
    state = _State()
    for piece in block.pieces:
        s = _mapped(rules, _raw_scores(rules, block, piece, "scores"), piece)
        weights = s if rules.pointwise is None else rules.pointwise.value(s)
        if rules.pointwise is None:
            state.normalize(s, rules.bounded)
        state.accumulate(weights.view(piece.v.shape[0], -1, s.shape[-1]), piece.v)
    if state.acc is None:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    acc = state.acc.view(out.shape)
    if lse is None or state.total is None:
        out.copy_(acc)
        return
    # A row without a key has acc = 0: dividing by at least `tiny` leaves 0 there.
    torch.div(acc, state.total.clamp(min=torch.finfo(acc.dtype).tiny), out=out)
    torch.log(state.total, out=lse)
    if state.peak is not None:
        lse.add_(state.peak, alpha=1 / LOG2E)


class _State:
    """Weighted values, and for softmax the row sum and maximum, of the pieces so far."""

    acc: Tensor | None = None
    total: Tensor | None = None
    peak: Tensor | None = None

    def normalize(self, s: Tensor, bounded: bool) -> None:
        """Turn base-2 scores into weights, in place; without `bounded` relative to the running row maximum."""
        if not bounded:
            self._shift(s)
        total = s.exp2_().sum(-1, keepdim=True)
        self.total = total if self.total is None else self.total.add_(total)

    def _shift(self, s: Tensor) -> None:
        peak = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min / 2)
        if self.peak is not None and self.total is not None and self.acc is not None:
            peak = torch.maximum(peak, self.peak)
            decay = (self.peak - peak).exp2_()
            self.total.mul_(decay)
            self.acc.view(*decay.shape[:-1], -1).mul_(decay)
        self.peak = peak
        torch.threshold_(s.sub_(peak), LEAST_EXPONENT, -math.inf)

    def accumulate(self, weights: Tensor, v: Tensor) -> None:
        self.acc = torch.bmm(weights, v) if self.acc is None else self.acc.baddbmm_(weights, v)


def _raw_scores(rules: Rules, block: Block, piece: Piece, slot: str) -> Tensor:
    """`factor` q k^T of a block, [*lead, rows, columns]."""
    q = block.rows["q"]
    matrices, columns = piece.k.shape[0], piece.k.shape[1]
    q2 = q.reshape(matrices, -1, q.shape[-1])
    s = rules.scratch(slot, (matrices, q2.shape[1], columns))
    s.baddbmm_(q2, piece.k.transpose(1, 2), beta=0, alpha=rules.factor)
    return s.view(*q.shape[:-1], columns)


def _mapped(rules: Rules, s: Tensor, piece: Piece) -> Tensor:
    """Scores after map and mask, in their base; overwrites `s` where no map needs to see it again."""
    if rules.scores is not None:
        assert piece.where is not None
        if rules.scores.offset is not None:
            s.add_(rules.offset(piece.where))
        else:
            s = rules.scores.value(s, piece.where) * rules.base
    _mask(rules, s, piece, -math.inf)
    return s


def _mask(rules: Rules, s: Tensor, piece: Piece, value: float) -> None:
    """Put -inf, or another `value`, where the mask says so. A NaN or infinite score has to be replaced."""
    for start, stop, mask in piece.parts:
        part = s[..., start:stop]
        if rules.finite and value == -math.inf:
            part.add_(mask)
        else:
            part.masked_fill_(mask < 0, value)


def attend_backward(rules: Rules, block: Block, sums: TableSums) -> None:
    """Fill row "dq", add to every piece's dk and dv and to the gradients of tables.

    Needs rows "q" and "grad_out", for softmax also "out" and "lse" (+inf where no key is allowed), perhaps "grad_lse".
    """
    dq = block.rows["dq"]
    grad_out, delta, lse = _row_gradients(rules, block)
    total: Tensor | None = None
    for piece in block.pieces:
        weights, ds = _score_gradients(rules, block, piece, (grad_out, delta, lse), sums)
        matrices, columns = piece.k.shape[0], piece.k.shape[1]
        assert piece.dk is not None and piece.dv is not None
        values = piece.v.shape[0]
        piece.dv.baddbmm_(weights.view(values, -1, columns).transpose(1, 2), grad_out.view(values, -1, grad_out.shape[-1]))
        ds = ds.reshape(matrices, -1, columns)
        q = block.rows["q"]
        piece.dk.baddbmm_(ds.transpose(1, 2), q.reshape(matrices, -1, q.shape[-1]), alpha=rules.scale)
        total = torch.bmm(ds, piece.k) if total is None else total.baddbmm_(ds, piece.k)
    if total is None:
        dq.zero_()
        return
    torch.mul(total.view(dq.shape), rules.scale, out=dq)


def _row_gradients(rules: Rules, block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad_out, delta = rowsum(grad_out * out) - grad_lse and the base-2 lse.

    For bounded scores the first two are divided by exp(lse) here, so that the weights need no normalising later.
    """
    grad_out, lse = block.rows["grad_out"], block.rows.get("lse")
    if lse is None:
        return grad_out.contiguous(), None, None
    delta = (grad_out * block.rows["out"]).sum(-1, keepdim=True)
    if "grad_lse" in block.rows:
        delta.sub_(block.rows["grad_lse"])
    if not rules.bounded:
        return grad_out.contiguous(), delta, lse * LOG2E
    inverse = torch.exp(-lse)
    return (grad_out * inverse).contiguous(), delta.mul_(inverse), None


def _score_gradients(
    rules: Rules,
    block: Block,
    piece: Piece,
    rowwise: tuple[Tensor, Tensor | None, Tensor | None],
    sums: TableSums,
) -> tuple[Tensor, Tensor]:
    """Weights of one piece and the gradient of its scaled scores, both [*lead, rows, columns]."""
    grad_out, delta, lse = rowwise
    raw = _raw_scores(rules, block, piece, "scores")
    s = _mapped(rules, raw, piece)
    values, columns = piece.v.shape[0], piece.v.shape[1]
    ds = rules.scratch("grads", (values, s.numel() // (values * columns), columns))
    torch.bmm(grad_out.view(values, -1, grad_out.shape[-1]), piece.v.transpose(1, 2), out=ds)
    ds = ds.view(s.shape)
    if rules.pointwise is not None:
        weights = rules.pointwise.value(s)
        ds.mul_(rules.pointwise.slope(s))
    else:
        weights = (s if lse is None else torch.threshold_(s.sub_(lse), LEAST_EXPONENT, -math.inf)).exp2_()
        assert delta is not None
        ds.sub_(delta).mul_(weights)
    if rules.scores is not None:
        assert piece.where is not None
        ds = sums.through(raw, ds, piece.where)
        if not rules.finite:
            _mask(rules, ds, piece, 0.0)
    return weights, ds
