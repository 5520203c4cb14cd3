"""Keys beyond the grid: what windows of edge `zero_pad` and `pad_token` add to the rows of a softmax.

A row with m of them has m scores more, all alike: those of a key of zeros, or of the learned key `k_pad`. Together they are one key whose
logit is that score plus log m, which is what the sink of a row is. Every score map acts on it as on any score; one that asks where the
key stands has no answer, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attncc.ir.expr import Expr, Op, apply, const, maximum, substitute, variables
from attncc.ir.rows import BIAS_SCORE, SCORE, RowClass
from attncc.spec.masks.base import PADDING, Missing
from attncc.spec.masks.combine import Mask, PerHead

if TYPE_CHECKING:
    from attncc.spec.attention import AttentionSpec


def padding_logit(spec: AttentionSpec, missing: Missing) -> Expr:
    """The log of what the missing keys of a row add to its denominator; -inf where it has none."""
    score = const(0.0) if missing.edge == "zero_pad" else BIAS_SCORE
    if "q" in spec.token_scales:
        score = score * spec.scale_reads["q"]
    for each in spec.scores:
        score = substitute(each.apply(SCORE, spec.grid, spec.heads), {"s": score})
    some = apply(Op.LOG, apply(Op.FLOAT, maximum(missing.count, 1)))
    return apply(Op.SELECT, missing.count >= 1, score + some, float("-inf"))


def padding_problems(spec: AttentionSpec) -> list[str]:
    """Why missing keys have no meaning beside the rest of a spec, one sentence each."""
    if found := list(_nested(spec.mask)):
        return found[:1]
    missing = spec.mask.missing(spec.grid)
    if missing is None:
        return []
    beside = f"keys of mask edge {missing.edge!r}"
    if spec.factor is not None:
        return [f"factor: what it says of {beside} is not defined; leave it out, or use edge 'truncate'"]
    return [*_score_problems(spec, beside), *_normalizer_problems(spec, missing, beside), *_token_problems(spec, missing)]


def _nested(mask: Mask, within: str | None = None) -> Iterator[str]:
    """Windows that keep missing keys inside masks that would have to say which of these they allow."""
    edge = getattr(mask, "edge", None)
    if within is not None and edge in PADDING:
        yield f"mask: edge {edge!r} of {mask.kind} within {within}: what else may see a missing key is not defined; use truncate there"
    policies = {part.edge for part in mask.parts if getattr(part, "edge", None) in PADDING} if isinstance(mask, PerHead) else set()
    if len(policies) > 1:
        yield "mask: masks of heads keep missing keys by different policies; use zero_pad or pad_token for all"
    for part in mask.parts:
        yield from _nested(part, within if isinstance(mask, PerHead) else mask.kind)


def _score_problems(spec: AttentionSpec, beside: str) -> Iterator[str]:
    for i, each in enumerate(spec.scores):
        if any(name.startswith("k") for name in variables(each.apply(SCORE, spec.grid, spec.heads))):
            reads = f"{each.kind} reads where a key stands, {beside} stand nowhere"
            yield f"scores.{i}: {reads}; use maps of the score alone, or edge 'truncate'"


def _normalizer_problems(spec: AttentionSpec, missing: Missing, beside: str) -> Iterator[str]:
    normalizer: Any = spec.normalizer
    record = normalizer.record(spec.grid)
    if normalizer.kind == "softmax":
        if normalizer.sink is not None:
            yield f"normalizer: a sink beside {beside} is not supported; use either"
    elif record.row_class is not RowClass.POINTWISE or record.statistic is not None or missing.edge == "pad_token":
        yield f"normalizer: {normalizer.kind} rows have no place for {beside}; use softmax, or edge 'truncate'"


def _token_problems(spec: AttentionSpec, missing: Missing) -> Iterator[str]:
    """A padded key is learned as its product takes it: nothing is done to it as to a token's."""
    if missing.edge != "pad_token":
        return
    if spec.loads:
        yield "loads.0: k_pad of mask edge 'pad_token' is no token to norm or rotate; leave loads out, or use edge 'zero_pad'"
    if {"k", "v"} & set(spec.token_scales):
        yield "token_scales: k_pad and v_pad of mask edge 'pad_token' are no tokens to scale; scale q alone, or use edge 'zero_pad'"
