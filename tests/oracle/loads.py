"""What is done to rows of q and k before their product: norms from their definitions, rotations as products of complex numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Spec = Mapping[str, Any]
Inputs = Mapping[str, Tensor]


def loaded(spec: Spec, x: Tensor, side: str, inputs: Inputs) -> Tensor:
    """Rows ``[B, H, N, D]`` of side "q" or "k" after every load of ``spec``, which has known lengths.

    Low precision is left once, before the first load, and entered once, after the last.
    """
    steps = spec.get("loads") or []
    y = x.to(torch.promote_types(x.dtype, torch.float32)) if steps else x
    for step in steps:
        y = _norm(step, y, side, inputs) if step["kind"] == "qk_norm" else _rotary(spec, step, y, side, inputs)
    return y.to(x.dtype)


def _norm(step: Spec, x: Tensor, side: str, inputs: Inputs) -> Tensor:
    total = (x * x).sum(-1, keepdim=True)
    eps = step.get("eps", 1e-6)
    if step.get("norm", "rms") == "rms":
        x = x / torch.sqrt(total / x.shape[-1] + eps)
    else:
        x = x / torch.maximum(torch.sqrt(total), torch.full_like(total, eps))
    return x * inputs[f"{side}_norm"].to(x.dtype) if step.get("weights") else x


def _rotary(spec: Spec, step: Spec, x: Tensor, side: str, inputs: Inputs) -> Tensor:
    rank, width = len(spec["tokens"]), step.get("width") or x.shape[-1]
    share = width // rank
    blocks = [_turned(step, x[..., a * share : (a + 1) * share], _positions(spec, step, a, side, inputs)) for a in range(rank)]
    return torch.cat([*blocks, x[..., width:]], -1)


def _turned(step: Spec, x: Tensor, positions: Tensor) -> Tensor:
    """Columns as complex numbers times exp(i position base^(-2j / width)); positions ``[N]`` or ``[B, N]``."""
    width = x.shape[-1]
    if step.get("pairs", "half") == "half":
        x = torch.stack([x[..., : width // 2], x[..., width // 2 :]], -1).flatten(-2)
    turns = torch.tensor([step.get("base", 10000.0) ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
    angles = positions.double()[..., None] * step.get("factor", 1.0) * turns
    angles = angles[:, None] if angles.dim() == 3 else angles
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], width // 2, 2).contiguous())
    y = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles).to(numbers.dtype)).flatten(-2)
    return torch.cat([y[..., 0::2], y[..., 1::2]], -1) if step.get("pairs", "half") == "half" else y


def _positions(spec: Spec, step: Spec, axis: int, side: str, inputs: Inputs) -> Tensor:
    if step.get("positions"):
        name = step["key_positions"] if side == "k" and step.get("key_positions") else step["positions"]
        return inputs[name]
    grids = {"q": spec["tokens"], "k": spec["key_tokens"] or spec["tokens"]}
    at = np.indices(grids[side])[axis].reshape(-1)
    shift = grids["k"][axis] - grids["q"][axis] if step.get("align") == "bottom_right" and side == "q" else 0
    return torch.from_numpy(at + shift)


def load_inputs(spec: Spec, batch: int, rng: np.random.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of norms, and positions that repeat, jump and stand in no order."""
    found: dict[str, Tensor] = {}
    for step in spec.get("loads") or []:
        if step["kind"] == "qk_norm" and step.get("weights"):
            found |= {f"{side}_norm": torch.from_numpy(rng.standard_normal(spec["head_dim"]) + 1.0).to(dtype) for side in "qk"}
        if step.get("positions"):
            sides = {step["positions"]: spec["tokens"]}
            sides |= {step["key_positions"]: spec["key_tokens"]} if step.get("key_positions") else {}
            for name, tokens in sides.items():
                found[name] = torch.from_numpy(rng.integers(0, 5000, (batch, math.prod(tokens)))).int()
    return found
