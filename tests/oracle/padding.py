"""Keys beyond the grid, literally: a wider grid whose new tokens are zeros, or the padded token, and which windows see as any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tests.oracle.patterns import PATTERNS, Indices

Spec = Mapping[str, Any]
PADDED = ("zero_pad", "pad_token")


def policy(mask: Spec) -> str | None:
    """The edge policy of the windows that keep keys beyond the grid."""
    found = {part["edge"] for part, _ in _windows(mask, np.arange(0))}
    return found.pop() if found else None


def columns(mask: Spec, at: Indices) -> np.ndarray:
    """Which of the keys beyond the grid each row sees, bool ``[1, H, Nq, keys]``; those that no row sees are left out."""
    heads = at["h"].ravel()
    found = [np.zeros((1, len(heads), int(at["nq"]), 0), dtype=bool)]
    for part, own in _windows(mask, heads):
        seen = np.broadcast_to(_beyond(part, at), (1, len(heads), int(at["nq"]), _beyond(part, at).shape[3])).copy()
        seen[:, ~np.isin(heads, own)] = False
        found.append(seen)
    return np.concatenate(found, axis=3)


def _windows(mask: Spec, heads: np.ndarray) -> Iterator[tuple[Spec, np.ndarray]]:
    """The padded windows and the heads that have them."""
    if mask["kind"] == "per_head":
        groups = mask.get("groups") or np.array_split(heads, len(mask["masks"]))
        for part, group in zip(mask["masks"], groups):
            yield from _windows(part, np.array(group))
    elif mask.get("edge") in PADDED:
        yield mask, heads


def _beyond(mask: Spec, at: Indices) -> np.ndarray:
    axes = range(sum(f"q{a}" in at for a in range(3)))
    before, after = zip(*[_margins(mask, a, int(at[f"nq{a}"]), int(at[f"nk{a}"])) for a in axes])
    wide = np.indices([n + int(at[f"nk{a}"]) + m for a, n, m in zip(axes, before, after)]).reshape(len(axes), -1)
    outside = np.logical_or.reduce([(wide[a] < before[a]) | (wide[a] >= before[a] + int(at[f"nk{a}"])) for a in axes])
    moved = {f"q{a}": at[f"q{a}"] + before[a] for a in axes} | {f"k{a}": wide[a][outside].reshape(1, 1, 1, -1) for a in axes}
    if not outside.any():
        return np.zeros((1, 1, int(at["nq"]), 0), dtype=bool)
    seen = np.broadcast_to(PATTERNS[mask["kind"]](mask, moved, {}), (1, 1, int(at["nq"]), int(outside.sum())))
    return seen[..., seen.any(axis=(0, 1, 2))]


def _margins(mask: Spec, axis: int, queries: int, keys: int) -> tuple[int, int]:
    """Tokens to add before and after an axis: enough for any window, before it whole blocks or cells, so that these stay in step."""
    over = max(0, queries - keys)
    if mask["kind"] == "window":
        return _of(mask["left"], axis), _of(mask["right"], axis) + over
    if mask["kind"] == "halo":
        block, halo = _of(mask["block"], axis), _of(mask["halo"], axis)
        return math.ceil(halo / block) * block, halo + block + over
    size = _of(mask["size"], axis)
    return 2 * size, size + over


def _of(value: int | Sequence[int], axis: int) -> int:
    return value if isinstance(value, int) else value[axis]
