"""Normalizers that know their whole row before any weight: entmax by sorting or bisection, and re-weighted softplus ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def entmax(alpha: float, s: Tensor, allowed: Tensor) -> Tensor:
    """Weights of rows of scores `s`, 0 where not allowed; a row without a key is 0."""
    alive = allowed.any(-1, keepdim=True)
    kept = torch.where(allowed, s, -torch.inf).masked_fill(~alive, 0.0)
    weights: Tensor = _Entmax.apply(kept, alpha)
    return weights.masked_fill(~alive, 0.0)


class _Entmax(torch.autograd.Function):
    """p = max((alpha - 1) s - tau, 0) ** (1 / (alpha - 1)); with u = p ** (2 - alpha) on the support, ds = u (dp - sum(u dp) / sum(u))."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, alpha: float) -> Tensor:
        z = (alpha - 1) * s
        tau = _threshold(z.double(), alpha).to(s.dtype)
        p: Tensor = (z - tau).clamp(min=0) ** (1 / (alpha - 1))
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        u = torch.where(p > 0, p ** (2 - ctx.alpha), 0.0)
        return u * (grads[0] - (u * grads[0]).sum(-1, keepdim=True) / u.sum(-1, keepdim=True)), None


def _threshold(z: Tensor, alpha: float) -> Tensor:
    """tau of each row; what is more than 1 below a row's maximum has no weight, whatever it is."""
    peak = z.amax(-1, keepdim=True)
    z = torch.maximum(z - peak, torch.full_like(z, -2.0))
    found = {2.0: sparsemax_threshold, 1.5: entmax15_threshold}.get(alpha, lambda z: bisected_threshold(z, alpha))(z)
    return found + peak


def sparsemax_threshold(z: Tensor) -> Tensor:
    """Of the m largest, tau = (their sum - 1) / m, for the largest m of which all lie above their tau."""
    down = z.sort(-1, descending=True).values
    counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    taus = (down.cumsum(-1) - 1) / counts
    support = (down > taus).sum(-1, keepdim=True)
    return taus.gather(-1, support - 1)


def entmax15_threshold(z: Tensor) -> Tensor:
    """Of the m largest, tau solves sum (z - tau)^2 = 1: mean - sqrt((1 - m var) / m), for the largest m that it leaves positive."""
    down = z.sort(-1, descending=True).values
    counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean, squares = down.cumsum(-1) / counts, down.square().cumsum(-1)
    taus = mean - ((1 - (squares - counts * mean.square())) / counts).clamp(min=0).sqrt()
    support = (taus <= down).sum(-1, keepdim=True)
    return taus.gather(-1, support - 1)


def bisected_threshold(z: Tensor, alpha: float) -> Tensor:
    """tau between max - 1, where the largest weighs 1, and max, where nothing weighs anything; to the last bit."""
    low = z.amax(-1, keepdim=True) - 1
    high = low + 1
    for _ in range(100):
        middle = (low + high) / 2
        above = ((z - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low


def lssar(normalizer: Mapping[str, Any], s: Tensor, allowed: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of rows of scores `s`, already times their row's factor, and the log of their second sum."""
    first = torch.logaddexp(s, torch.zeros_like(s)).masked_fill(~allowed, 0.0)
    total = first.sum(-1, keepdim=True)
    n = place.clamp(min=1).to(s) if normalizer.get("count", "position") == "position" else s.new_tensor(float(s.shape[-1]))
    offset = normalizer.get("offset", 1.0)
    x = n * first / torch.where(total == 0, 1.0, total) - offset
    weighs = allowed & (x > offset * normalizer.get("least", 1 / 4096)) & (x > 0)
    weights = torch.where(weighs, torch.where(weighs, x, 1.0) ** normalizer["power"], 0.0)
    total = weights.sum(-1)
    lse = torch.where(total > 0, total, 1.0).log().masked_fill(total == 0, -torch.inf)
    return weights / torch.where(total == 0, 1.0, total)[..., None], lse
