"""Packed sequences: the run-time tables of `masks.Documents` from cumulative lengths, made where these live, without waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.errors import InputError

TABLES = ("document_starts", "document_ends")
KEY_TABLES = ("key_document_starts", "key_document_ends")


def document_tables(cu_seqlens: Tensor, tokens: int, key_cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
    """The tables of a packing, by the names that `masks.Documents` has by default, to be passed to a kernel.

    Tokens behind the last document are padding: they see nothing, and nothing sees them. Documents may be empty.

    Args:
        cu_seqlens: where documents begin, and at last where they end: integers `[documents + 1]` or `[B, documents + 1]`, ascending from 0.
        tokens: of the packed sequence, padding included.
        key_cu_seqlens: the same of keys with a grid of their own, as many documents; their tables are "key_document_starts" and
            "key_document_ends".

    Returns:
        int32 tables `[B, tokens]` (B = 1 for one axis) on the device of `cu_seqlens`.

    Raises:
        InputError: shapes or types that do not fit. Values are not looked at, for that would wait for the device.
    """
    bounds = _rows("cu_seqlens", cu_seqlens)
    keys = bounds if key_cu_seqlens is None else _rows("key_cu_seqlens", key_cu_seqlens)
    if keys.shape != bounds.shape:
        raise InputError("key_cu_seqlens", f"has shape {list(keys.shape)}, cu_seqlens has {list(bounds.shape)}: as many documents")
    at = torch.arange(tokens, device=bounds.device).expand(len(bounds), tokens).contiguous()
    document = torch.searchsorted(bounds, at, right=True)
    inside = (document > 0) & (document < bounds.shape[1])
    found = {}
    for names, side, beyond in ((TABLES, bounds, tokens), *(((KEY_TABLES, keys, 2**30),) if key_cu_seqlens is not None else ())):
        # Padding has a range that ends before it begins, and widens the range of no tile.
        for name, shift, none in zip(names, (1, 0), (beyond, 0)):
            entry = side.gather(1, (document - shift).clamp(0, side.shape[1] - 1))
            found[name] = torch.where(inside, entry, none).int()
    return found


def _rows(name: str, bounds: Tensor) -> Tensor:
    if bounds.dim() not in (1, 2) or bounds.shape[-1] < 2 or bounds.dtype not in (torch.int32, torch.int64):
        raise InputError(name, f"has shape {list(bounds.shape)} of {bounds.dtype}, must be integers [documents + 1] or [B, documents + 1]")
    return (bounds if bounds.dim() == 2 else bounds[None]).long().contiguous()
