"""What attncc is timed against: PyTorch's scaled dot product attention and compiled FlexAttention, with masks as their users write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Mod = Callable[..., Any]


# ---- FlexAttention's mask and score functions ----------------------------------------------------------------------------------------


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q


def window(left: int, right: int) -> Mod:
    """Keys from `left` before the query to `right` after it."""
    return lambda b, h, q, k: (k >= q - left) & (k <= q + right)


def documents(labels: Tensor, and_causal: bool = False) -> Mod:
    """Tokens of the same document; labels [B, N]."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        same = labels[b, q] == labels[b, k]
        return same & (k <= q) if and_causal else same

    return mask


def neighborhood(grid: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> Mod:
    """Generalized neighborhood attention on row-major tokens."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        found, after = None, math.prod(grid)
        for n, w, s in zip(grid, size, stride):
            after //= n
            i, j = q // after % n, k // after % n
            leader = torch.clamp(i // s * s + s // 2, max=n - 1)
            start = torch.clamp(leader - w // 2, min=0, max=n - w)
            inside = (j >= start) & (j < start + w)
            found = inside if found is None else found & inside
        return found

    return mask


def softcap_alibi(cap: float, slopes: Tensor) -> Mod:
    """Capped scores less a slope by head times the distance."""

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return cap * torch.tanh(s / cap) - slopes[h] * (q - k).abs()

    return score


def relative_bias(table: Tensor, extent: int) -> Mod:
    """A learned bias by offset; table [H, 2 * extent - 1]."""
    return lambda s, b, h, q, k: s + table[h, torch.clamp(k - q, 1 - extent, extent - 1) + extent - 1]


# ---- the rivals ----------------------------------------------------------------------------------------------------------------------


def sdpa(is_causal: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense attention by whatever backend the context leaves; fewer key heads are shared (GQA)."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=shared)

    return run


def flex_block_mask(mask: Mod | None, q: Tensor, k: Tensor, batch: bool = False) -> Any:
    """FlexAttention's block mask of 128 x 128 tiles, built by compiled code on a GPU: the eager way needs memory for every pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    if mask is None:
        return None
    build = torch.compile(create_block_mask) if q.is_cuda else create_block_mask
    return build(mask, q.shape[0] if batch else None, None, q.shape[2], k.shape[2], device=str(q.device))


def flex(score: Mod | None = None) -> Callable[..., Tensor]:
    """Compiled FlexAttention: (q, k, v, block_mask) to the output."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        out: Tensor = compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return out

    return run
