"""Rows that combine several: one spec for each branch, whose coefficient is a head scale, and the branch before it as its addend.

No kernel walks several rows at once, so a branch is a launch, and reads its own keys. What it costs beside one that would is a write and a
read of the output. The sum is made in float32 by the last launch, and gradients reach every coefficient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

import attncc
from attncc import AttentionSpec, masks, routing, scores

Inputs = dict[str, Any]
SCALED = routing.HeadScale()
CAUSAL = AttentionSpec(tokens=(None,), heads=4, head_dim=32, value_dim=64, dtype="float32", mask=masks.Causal(), routing=SCALED)
PLANE = AttentionSpec(tokens=(14, 14), heads=4, head_dim=32, dtype="float32", routing=SCALED)
PLACE = scores.Expression(
    text="along[h] * float(k0 - q0) + across[h] * float(k1 - q1) + far[h] * float((k0 - q0) * (k0 - q0) + (k1 - q1) * (k1 - q1))"
)


@cache
def weighted(specs: tuple[AttentionSpec, ...], target: str = "auto") -> Callable[[list[Inputs]], Tensor]:
    """The sum of what specs compute, each times its `head_scale` `[H]`: a function of a list of their inputs by name."""
    kernels = [attncc.compile(spec.model_copy(update={"addend": i > 0}), target=target) for i, spec in enumerate(specs)]

    def run(branches: list[Inputs]) -> Tensor:
        total: Inputs = {}
        for kernel, inputs in zip(kernels, branches, strict=True):
            total = {"addend": kernel(**inputs, **total)}
        found: Tensor = total["addend"]
        return found

    return run


def differential(q: Tensor, k: Tensor, v: Tensor, share: Tensor, target: str = "auto") -> Tensor:
    """softmax(q1 k1) v - share softmax(q2 k2) v, q and k `[B, 2, H, N, D]`, v `[B, H, N, 2 D]` (Ye et al., arXiv 2410.05258).

    `share` is a number for all heads, the paper's lambda, with a gradient.
    """
    run = weighted((CAUSAL, CAUSAL), target)
    scales = (share.new_ones(q.shape[2]), -share.expand(q.shape[2]))
    return run([{"q": q[:, i], "k": k[:, i], "v": v, "head_scale": scale} for i, scale in enumerate(scales)])


def positional(q: Tensor, k: Tensor, v: Tensor, share: Tensor, places: dict[str, Tensor], target: str = "auto") -> Tensor:
    """(1 - share) softmax(q k) v + share softmax(places) v on a plane, all `[B, H, N, D]`: GPSA (d'Ascoli et al., arXiv 2103.10697).

    `share` `[H]` is a sigmoid of the head's parameter; `places` are `along`, `across` and `far` `[H]`, what a step on either axis adds to
    a score, and a unit of squared distance.
    """
    run = weighted((PLANE, PLANE.model_copy(update={"scores": (PLACE,)})), target)
    operands = {"q": q, "k": k, "v": v}
    return run([{**operands, "head_scale": 1 - share}, {**operands, **places, "head_scale": share}])


def softened(q: Tensor, k: Tensor, v: Tensor, share: Tensor, target: str = "auto") -> Tensor:
    """(1 - share) softmax(q k) v + share v, all `[B, H, N, D]`: the perturbed branch of SoftPAG (arXiv 2506.10978); share 1 is PAG's.

    `share` is `[H]`. A branch that attends to nothing but itself needs no spec.
    """
    kernel = attncc.compile(PLANE.model_copy(update={"addend": True}), target=target)
    found: Tensor = kernel(q, k, v, head_scale=1 - share, addend=share[:, None, None] * v)
    return found
