"""Random tensors for a kernel, by its signature: what `attncc verify` and `attncc bench` run on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncc.passes.tiles import Shape
from attncc.runtime.signature import Signature, Slot

LABEL_RUNS = 8
"""Runs of equal labels in a row of a random integer table, about: packed documents."""


def sample(
    signature: Signature, query: Shape, key: Shape, batch: int, seed: int, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """One random tensor for every slot, by name.

    Args:
        signature: what the kernel takes.
        query: tokens of every axis of the query's grid.
        key: the same of the key's grid.
        batch: batch elements.
        seed: equal seeds give equal tensors on equal machines.
        device: where the tensors live.
        dtype: type of the floating-point tensors; default: each slot's own.

    Returns:
        Normal numbers; integer tables hold ascending labels from 1, in runs, as packed documents have.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": batch, "NQ": math.prod(query), "NK": math.prod(key)}
    return {slot.name: _tensor(slot, sizes, generator, dtype).to(device) for slot in signature.slots}


def _tensor(slot: Slot, sizes: dict[str, int], generator: torch.Generator, dtype: torch.dtype | None) -> Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in slot.shape]
    if not slot.dtypes[0].is_floating_point:
        starts = torch.rand(shape, generator=generator) < LABEL_RUNS / shape[-1]
        return (starts.cumsum(-1) + 1).to(slot.dtypes[0])
    return torch.randn(shape, generator=generator).to(dtype or slot.dtypes[0])
