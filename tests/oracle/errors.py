"""How far a result is from the float64 oracle, and how far a plain dense implementation in the same dtype would be."""

from __future__ import annotations

from torch import Tensor

from tests.oracle.attention import dense_in_dtype
from tests.oracle.masks import Inputs, Spec


def relative(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative error over all, and of the worst row; a row much smaller than its kind is measured by the kind."""
    got, want = got.detach().double(), want.detach()
    difference, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    floor = max(float(size.square().mean().sqrt()) / 10, 1e-30)
    return float(difference.norm() / max(float(size.norm()), 1e-30)), float((difference / size.clamp(min=floor)).max())


def relative_of_dense(spec: Spec, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, want: Tensor) -> tuple[float, float]:
    """The same errors of the dense formula in the dtype of q: both as if its rows that overflow were right, for they measure nothing."""
    got = dense_in_dtype(spec, q, k, v, inputs)["output"].detach().double()
    finite = got.isfinite().all(dim=-1, keepdim=True)
    return relative(got.where(finite, want.detach()), want)
