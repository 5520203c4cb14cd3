"""What an engine computes with: the tensors of one call, heads first, and the lengths of its grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.passes.tiles import Shape


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that work on `x` is done in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Operands:
    """q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, v `[B, Hv, Nk, Dv]`, tables by name, and the lengths of the query's and key's axes.

    `trained` names the float tables whose gradients the backward pass must give.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Mapping[str, Tensor]
    query: Shape
    key: Shape
    trained: frozenset[str] = frozenset()

    @property
    def compute(self) -> torch.dtype:
        """The type scores are computed in."""
        return compute_dtype(self.q)

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths as variables of expressions: `nq0`, `nk0`, .. ."""
        sides = (("nq", self.query), ("nk", self.key))
        return {f"{side}{a}": n for side, lengths in sides for a, n in enumerate(lengths)}
