"""Roots of rows, block by block: the number for which a row's weights add up to 1, and its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncc.runtime.blocked.block import Block, mapped, raw_scores, spread, through_maps
from attncc.runtime.blocked.rules import Root, Rules, TableSums
from attncc.runtime.blocked.workers import host_reads


def solve(rules: Rules, block: Block) -> None:
    """Fill row "lse" with the roots; 0 in rows without a key.

    The scores of a row tile are kept for all sweeps.
    """
    found, root = block.rows["lse"], rules.root
    assert root is not None
    pieces = [mapped(rules, raw_scores(rules, block, piece, "scores"), piece).clone() for piece in block.pieces]
    if not pieces:
        found.zero_()
        return
    s = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
    peak = s.amax(-1, keepdim=True)
    dead = peak == -math.inf
    t = _swept(root, s, root.start(peak.masked_fill_(dead, 0.0)))
    found.copy_(t.masked_fill_(dead, 0.0))


def _swept(root: Root, s: Tensor, t: Tensor) -> Tensor:
    """The roots from where they start; where the host may look, sweeps end once none moves: no later one would move it."""
    looks = host_reads(s.device)
    for _ in range(root.sweeps):
        before = t
        t = root.update(t, root.value(s, t).sum(-1, keepdim=True), root.slope(s, t).sum(-1, keepdim=True))
        if looks and torch.equal(before, t):
            break
    return t


def solve_backward(rules: Rules, block: Block, sums: TableSums) -> None:
    """Fill row "dq", add to every piece's dk and to the gradients of tables, from rows "q", "lse" (the roots) and "grad_lse"."""
    dq, t, root = block.rows["dq"], block.rows["lse"], rules.root
    assert root is not None
    if "grad_lse" not in block.rows:
        dq.zero_()
        return
    slopes = torch.zeros_like(t)
    for piece in block.pieces:
        slopes.add_(root.slope(mapped(rules, raw_scores(rules, block, piece, "scores"), piece), t).sum(-1, keepdim=True))
    share = torch.where(slopes > 0, block.rows["grad_lse"] / slopes, 0.0)
    total: Tensor | None = None
    for piece in block.pieces:
        raw = raw_scores(rules, block, piece, "scores")
        ds = root.slope(mapped(rules, raw, piece), t) * share
        total = spread(rules, block, piece, through_maps(rules, raw, ds, piece, sums), total)
    if total is None:
        dq.zero_()
        return
    torch.mul(total.view(dq.shape), rules.scale, out=dq)
