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


def neighborhood(grid: Sequence[int], size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Mod:
    """Generalized neighborhood attention on row-major tokens, one parameter an axis."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        found, after = None, math.prod(grid)
        for n, *rule in zip(grid, size, stride, dilation):
            after //= n
            inside = _near(q // after % n, k // after % n, n, *rule)
            found = inside if found is None else found & inside
        return found

    return mask


def _near(i: Any, j: Any, n: int, size: int, stride: int, dilation: int) -> Any:
    """One axis of n tokens: within the window of i's leader, in the same residue class."""
    r = i % dilation
    length = (n - r + dilation - 1) // dilation
    leader = torch.minimum(i // dilation // stride * stride + stride // 2, length - 1)
    start = torch.minimum(torch.clamp(leader - size // 2, min=0), length - size)
    place = j // dilation
    return (j % dilation == r) & (place >= start) & (place < start + size)


def softcap_alibi(cap: float, slopes: Tensor) -> Mod:
    """Capped scores less a slope by head times the distance."""

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return cap * torch.tanh(s / cap) - slopes[h] * (q - k).abs()

    return score


def relative_bias(table: Tensor, grid: Sequence[int]) -> Mod:
    """A learned bias by offset on every axis; table [H, 2 e0 - 1, ..]."""
    middle = [n // 2 for n in table.shape[1:]]

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        index, after = [], math.prod(grid)
        for n, m in zip(grid, middle):
            after //= n
            index.append(torch.clamp(k // after % n - q // after % n, -m, m) + m)
        return s + table[(h, *index)]

    return score


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
    """Compiled FlexAttention: (q, k, v, block_mask, gate) to the output; a gate is one more operation, which the compiler may fuse."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, gate: Tensor | None = None) -> Any:
        out = flex_attention(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return out if gate is None else out * torch.sigmoid(gate)

    return torch.compile(attend, dynamic=False)
