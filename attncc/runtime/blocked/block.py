"""One block of attention in torch: a few row tiles against the keys they visit, forward and (recomputing) backward.

All matrix products are batched; scores live in reused scratch of cache size. Softmax works in base 2: exp2 has no slow path for -inf or
underflow, exp has one on some CPUs (5 to 50 times slower).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from attncc.runtime.blocked.rules import LOG2E, SAFE_SCORE, Place, Rules, TableSums

# Smaller exponents (relative to the row maximum) weigh 0: denormal weights would slow the matrix product many times.
LEAST_EXPONENT = -120.0


class Part(NamedTuple):
    """Columns [start, stop) of a block with what their scores may be at most, broadcast over heads: negative where masked.

    It is infinite, or beyond all scores where these are bounded (`Rules.steep`).
    """

    start: int
    stop: int
    ceiling: Tensor

    @property
    def hidden(self) -> Tensor:
        """True where masked."""
        return self.ceiling < 0


class Piece(NamedTuple):
    """Some keys of a block: k [Mk, L, D], v [Mv, L, Dv], masked columns, positions; in backward the sums to add to."""

    k: Tensor
    v: Tensor
    parts: list[Part]
    place: Place | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


class Block(NamedTuple):
    """Row tiles with equal key counts: `rows` by name, each [*lead, rows, width]; `lead` regroups to Mk or Mv.

    A piece may lie in scratch that the next one overwrites. Pieces may be walked more than once.
    """

    rows: dict[str, Tensor]
    pieces: Iterable[Piece]


def attend(rules: Rules, block: Block) -> None:
    """Fill rows "out" and, where they have a denominator, "lse", its natural log, from "q"."""
    out, lse = block.rows["out"], block.rows.get("lse")
    state = _State()
    for piece in block.pieces:
        s = mapped(rules, raw_scores(rules, block, piece, "scores"), piece)
        if rules.pointwise is None:
            weights = s
            state.normalize(s, rules.bounded)
        else:
            weights = _masked(rules, rules.pointwise.value(s), piece)
            if rules.pointwise.total is not None:
                state.add(weights.sum(-1, keepdim=True) if rules.pointwise.total == "weights" else _keys(s, piece))
        if rules.weight_factor is not None:
            assert piece.place is not None
            weights = weights * rules.factor_at(piece.place)
        state.accumulate(weights.reshape(piece.v.shape[0], -1, s.shape[-1]), piece.v)
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
    """Weighted values, what rows divide by, and for softmax the maximum, of the pieces so far."""

    acc: Tensor | None = None
    total: Tensor | None = None
    peak: Tensor | None = None

    def normalize(self, s: Tensor, bounded: bool) -> None:
        """Turn base-2 scores into weights, in place; without `bounded` relative to the running row maximum."""
        if not bounded:
            self._shift(s)
        self.add(s.exp2_().sum(-1, keepdim=True))

    def add(self, total: Tensor) -> None:
        """Add to what rows divide by."""
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


def raw_scores(rules: Rules, block: Block, piece: Piece, slot: str) -> Tensor:
    """`factor` q k^T of a block, [*lead, rows, columns]."""
    q = block.rows["q"]
    matrices, columns = piece.k.shape[0], piece.k.shape[1]
    q2 = q.reshape(matrices, -1, q.shape[-1])
    s = rules.scratch(slot, (matrices, q2.shape[1], columns))
    s.baddbmm_(q2, piece.k.transpose(1, 2), beta=0, alpha=rules.factor)
    return s.view(*q.shape[:-1], columns)


def mapped(rules: Rules, s: Tensor, piece: Piece) -> Tensor:
    """Scores after map and mask, in their base; overwrites `s` where no map needs to see it again."""
    if rules.scores is not None:
        assert piece.place is not None
        if rules.scores.offset is not None:
            s.add_(rules.offset(piece.place))
        else:
            s = rules.scores.value(s, piece.place.where()) * rules.base
    if rules.pointwise is None or rules.pointwise.vanishes:
        _mask(rules, s, piece, -math.inf)
    return s


def _masked(rules: Rules, x: Tensor, piece: Piece) -> Tensor:
    """Weights or slopes, 0 where the mask says so, if masked scores have not seen to that."""
    if rules.pointwise is None or rules.pointwise.vanishes:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    _mask(rules, x, piece, 0.0)
    return x


def _keys(s: Tensor, piece: Piece) -> Tensor:
    """How many keys of the piece each row sees, [*lead, rows, 1]."""
    count = s.new_full((*s.shape[:-1], 1), s.shape[-1])
    for part in piece.parts:
        count -= part.hidden.sum(-1, keepdim=True)
    return count


def _mask(rules: Rules, s: Tensor, piece: Piece, value: float) -> None:
    """Put -inf, or another `value`, where the mask says so. A NaN or infinite score has to be replaced."""
    for part in piece.parts:
        scores = s[..., part.start : part.stop]
        if rules.finite and value == -math.inf:
            torch.minimum(scores, part.ceiling, out=scores)  # many times as fast as to fill where a mask of bits says so
        else:
            scores.masked_fill_(part.hidden, value)


def attend_backward(rules: Rules, block: Block, sums: TableSums) -> None:
    """Fill row "dq", add to every piece's dk and dv and to the gradients of tables.

    Needs rows "q" and "grad_out", where rows have a denominator also "out" and "lse" (+inf where no key is allowed), perhaps "grad_lse".
    """
    dq = block.rows["dq"]
    grad_out, delta, lse = _row_gradients(rules, block)
    total: Tensor | None = None
    for piece in block.pieces:
        weights, ds = _score_gradients(rules, block, piece, (grad_out, delta, lse), sums)
        assert piece.dv is not None
        by_value = weights.reshape(piece.v.shape[0], -1, piece.v.shape[1])
        piece.dv.baddbmm_(by_value.transpose(1, 2), grad_out.view(*by_value.shape[:2], grad_out.shape[-1]))
        total = spread(rules, block, piece, ds, total)
    if total is None:
        dq.zero_()
        return
    torch.mul(total.view(dq.shape), rules.scale, out=dq)


def spread(rules: Rules, block: Block, piece: Piece, ds: Tensor, total: Tensor | None) -> Tensor:
    """Add to the piece's dk what gradients of its scaled scores say, and to `total`, which is dq but for the scale."""
    matrices, columns = piece.k.shape[0], piece.k.shape[1]
    assert piece.dk is not None
    ds = ds.reshape(matrices, -1, columns)
    q = block.rows["q"]
    piece.dk.baddbmm_(ds.transpose(1, 2), q.reshape(matrices, -1, q.shape[-1]), alpha=rules.scale)
    return torch.bmm(ds, piece.k) if total is None else total.baddbmm_(ds, piece.k)


def through_maps(rules: Rules, raw: Tensor, ds: Tensor, piece: Piece, sums: TableSums) -> Tensor:
    """The gradient of scaled scores from that of mapped ones."""
    if rules.scores is None:
        return ds
    assert piece.place is not None
    ds = sums.through(raw, ds, piece.place)
    if not rules.finite:
        _mask(rules, ds, piece, 0.0)
    return ds


def _row_gradients(rules: Rules, block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad_out, delta = rowsum(grad_out * out) - grad_lse and the base-2 lse, or what weights are multiplied by (a ratio).

    For bounded scores the first two are divided by exp(lse) here, so that the weights need no normalising later; so are means.
    """
    grad_out, lse = block.rows["grad_out"], block.rows.get("lse")
    total = None if rules.pointwise is None else rules.pointwise.total
    if lse is None:
        return grad_out.contiguous(), None, None
    if total == "keys":
        return (grad_out * torch.exp(-lse)).contiguous(), None, None
    delta = (grad_out * block.rows["out"]).sum(-1, keepdim=True)
    if "grad_lse" in block.rows:
        delta.sub_(block.rows["grad_lse"])
    if total == "weights":
        return grad_out.contiguous(), delta, torch.exp(-lse).clamp_(max=1 / torch.finfo(lse.dtype).tiny)
    if not rules.bounded:
        return grad_out.contiguous(), delta, lse * LOG2E
    # Of a row with keys, no smaller log is possible; a sink alone may have any.
    inverse = torch.exp(-lse.clamp(min=-SAFE_SCORE))
    return (grad_out * inverse).contiguous(), delta.mul_(inverse), None


def _score_gradients(
    rules: Rules,
    block: Block,
    piece: Piece,
    rowwise: tuple[Tensor, Tensor | None, Tensor | None],
    sums: TableSums,
) -> tuple[Tensor, Tensor]:
    """Weights of one piece, times their factor, and the gradient of its scaled scores, both [*lead, rows, columns]."""
    grad_out, delta, lse = rowwise
    raw = raw_scores(rules, block, piece, "scores")
    s = mapped(rules, raw, piece)
    values, columns = piece.v.shape[0], piece.v.shape[1]
    ds = rules.scratch("grads", (values, s.numel() // (values * columns), columns))
    torch.bmm(grad_out.view(*ds.shape[:2], grad_out.shape[-1]), piece.v.transpose(1, 2), out=ds)
    ds = ds.view(s.shape)
    if rules.pointwise is not None:
        weights, slopes = (_masked(rules, f(s), piece) for f in (rules.pointwise.value, rules.pointwise.slope))
        if delta is not None and lse is not None:
            weights, slopes = weights * lse, slopes * lse
        summed = _times_factor(rules, piece, weights, ds, sums)
        if delta is not None and lse is not None:
            ds.sub_(delta)
        ds.mul_(slopes)
    else:
        weights = (s if lse is None else torch.threshold_(s.sub_(lse), LEAST_EXPONENT, -math.inf)).exp2_()
        assert delta is not None
        summed = _times_factor(rules, piece, weights, ds, sums)
        ds.sub_(delta).mul_(weights)
    return summed, through_maps(rules, raw, ds, piece, sums)


def _times_factor(rules: Rules, piece: Piece, weights: Tensor, grads: Tensor, sums: TableSums) -> Tensor:
    """Weights times their factor; what `grads` says of these becomes, in place, what it says of the weights."""
    if rules.weight_factor is None:
        return weights
    assert piece.place is not None
    by_pair = rules.factor_at(piece.place)
    if rules.weight_factor.trained:
        sums.multiplied(weights * grads, piece.place)
    grads.mul_(by_pair)
    return weights * by_pair
