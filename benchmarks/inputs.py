"""Random tensors for a kernel, made on the device they are used on."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from attncc.passes.tiles import Shape
from attncc.runtime import documents
from attncc.runtime.signature import Signature, Slot

Tensors = dict[str, Tensor]


def random_inputs(signature: Signature, query: Shape, key: Shape, batch: int, device: str, seed: int) -> Tensors:
    """A tensor for every slot of a call, by name, heads first."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {"B": batch, "NQ": prod(query), "NK": prod(key)}
    shapes = {slot.name: [sizes[dim] if isinstance(dim, str) else dim for dim in slot.shape] for slot in signature.slots}
    labels = integer_tables(signature, query, key, batch, device)
    return {s.name: labels[s.name] if s.name in labels else _numbers(s, shapes[s.name], generator) for s in signature.slots}


def integer_tables(signature: Signature, query: Shape, key: Shape, batch: int, device: str) -> Tensors:
    """The integer tables among them: packed documents, by bounds or labels, the same for equal lengths; of blocks every other one."""
    sizes = {"B": batch, "NQ": prod(query), "NK": prod(key)}
    found = {}
    for slot in signature.slots:
        if not slot.dtypes[0].is_floating_point:
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in slot.shape]
            found[slot.name] = _integers(slot.name, shape).to(device).expand(shape).contiguous()
    return found


def _integers(name: str, shape: list[int]) -> Tensor:
    if name == "block_table":
        return torch.randint(2, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    labels = packed(shape[-1], max(2, shape[-1] // 64), max(4, shape[-1] // 4))
    if name in documents.TABLES:
        ends = torch.unique_consecutive(labels[0], return_counts=True)[1].cumsum(0)
        return documents.document_tables(torch.cat([ends.new_zeros(1), ends]), shape[-1])[name]
    return labels


def _numbers(slot: Slot, shape: list[int], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    if slot.name == "routing":  # half of the heads, more or less, for each token
        return torch.relu(x).to(slot.dtypes[0])
    # Values of mean zero average out over many keys, and a wrong denominator would hardly show.
    return (x + 0.5 if slot.name == "v" else x).to(slot.dtypes[0])


def packed(tokens: int, shortest: int = 64, longest: int = 4096) -> Tensor:
    """Labels of documents end to end, most of them short: int32 `[1, tokens]`, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    lengths = (shortest * (longest / shortest) ** torch.rand(tokens // shortest + 1, generator=generator)).int()
    return torch.repeat_interleave(torch.arange(1, len(lengths) + 1, dtype=torch.int32), lengths)[:tokens][None]
