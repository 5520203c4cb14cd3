"""How far a result is from the float64 oracle, and how far a plain dense implementation in the same dtype would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tests.oracle.attention import attention, dense_in_dtype
from tests.oracle.masks import Inputs, Spec

DRAWS = 6
Results = Mapping[str, Tensor]


class Errors(NamedTuple):
    """Relative errors: of the output over all, of its worst row (one much smaller than its kind is measured by the kind), of the lse."""

    overall: float
    worst: float
    lse: float


def errors(got: Results, want: Results) -> Errors:
    """Of results `got`; that of an lse is infinite where other rows are empty."""
    found, exact = got["output"].detach().double(), want["output"].detach()
    difference, size = (found - exact).norm(dim=-1), exact.norm(dim=-1)
    floor = max(float(size.square().mean().sqrt()) / 10, 1e-30)
    overall = float(difference.norm() / max(float(size.norm()), 1e-30))
    lse = _lse_error(got["lse"].detach(), want["lse"].detach()) if "lse" in got else 0.0
    return Errors(overall, float((difference / size.clamp(min=floor)).max()), lse)


def _lse_error(got: Tensor, want: Tensor) -> float:
    full = want != -torch.inf
    if not torch.equal(got != -torch.inf, full):
        return torch.inf
    return float(((got - want) / want.abs().clamp(min=1))[full].abs().max()) if full.any() else 0.0


def errors_of_dense(spec: Spec, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Errors:
    """The greatest errors of the dense formula in the dtype of q, on these inputs and on some that are a few roundings away.

    One draw may be lucky where a formula is ill-conditioned. Rows that overflow count as right: they measure nothing. What LSSAR takes for
    nothing is a step, which may go either way for a weight that is a rounding from it.
    """
    draw = torch.Generator().manual_seed(0)
    found = [_error_of_dense(spec, (q, k, v), inputs)]
    for i in range(DRAWS):
        moved = {name: _moved(x, draw) for name, x in {"q": q, "k": k, "v": v, **inputs}.items()}
        q_, k_, v_ = (moved.pop(name) for name in "qkv")
        found.append(_error_of_dense(spec, (q_, k_, v_), moved, 1 + 4e-3 * (-1) ** i))
    return Errors(*(max(each) for each in zip(*found)))


def _error_of_dense(spec: Spec, qkv: tuple[Tensor, Tensor, Tensor], inputs: Inputs, least: float = 1.0) -> Errors:
    want = attention(spec, *qkv, inputs)
    if spec.get("normalizer", {}).get("kind") == "lssar":
        spec = {**spec, "normalizer": {**spec["normalizer"], "least": least / 4096}}
    got = dense_in_dtype(spec, *qkv, inputs)
    finite = got["output"].isfinite().all(dim=-1)
    kept = {"output": got["output"].double().where(finite[..., None], want["output"])}
    kept |= {"lse": torch.where(finite, got["lse"].double(), want["lse"])} if "lse" in got else {}
    return errors(kept, want)


def _moved(x: Tensor, draw: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x
    step = 4 * torch.finfo(x.dtype).eps
    return (x.detach().double() * (1 + step * (2 * torch.rand(x.shape, generator=draw, dtype=torch.float64) - 1))).to(x.dtype)


def within_float32(found: Errors, spec: Spec, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> bool:
    """Whether errors are 1e-5 at most; where the formula itself is worse in float32, eight times those of the dense formula.

    A row of a pointwise normalizer may be all but zero where its scores are, LSSAR subtracts an offset from what may be about as much, and
    weights of a ratio may vanish. Of a softmax the dense formula is never that bad.
    """
    if all(error <= 1e-5 for error in found):
        return True
    dense = errors_of_dense(spec, q, k, v, inputs)
    return all(error <= max(1e-5, 8 * own) for error, own in zip(found, dense))
