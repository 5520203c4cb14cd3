"""The array functions that the value interpretation needs, for numpy and for torch: one small adapter each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Arrays:
    """An array library. `minimum`, `maximum` and `where` accept Python numbers on either side."""

    name: str
    minimum: Callable[[Any, Any], Any]
    maximum: Callable[[Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    softplus: Callable[[Any], Any]
    erf: Callable[[Any], Any]
    absolute: Callable[[Any], Any]
    logical_not: Callable[[Any], Any]
    power: Callable[[Any, Any], Any]
    to_float: Callable[[Any], Any]
    stack: Callable[[Any], Any]
    positions: Callable[[int, Any], Any]  # 0, 1, .. n - 1, where the array given second lives
    floor_log2: Callable[[Any], Any]  # of positive integers
    read: Callable[[Any, Sequence[Any]], Any]  # table[index], every index clamped into the table
    wide: Callable[[Any], Any]  # integers of any width as 64-bit ones; floats as they are


@lru_cache
def numpy_arrays() -> Arrays:
    """numpy, imported when first used; integers are int64, floats float64."""
    import numpy as np

    def sigmoid(x: Any) -> Any:
        small = np.exp(-np.abs(x))
        return np.where(np.asarray(x) >= 0, 1.0, small) / (1.0 + small)

    def read(table: Any, index: Sequence[Any]) -> Any:
        row = table
        for at in index[:-1] if not any(map(np.ndim, index[:-1])) else ():
            row = row[min(max(at, 0), len(row) - 1)]
        if row.ndim == 1:
            return row.take(index[-1], mode="clip")
        return table[tuple(np.minimum(np.maximum(i, 0), n - 1) for i, n in zip(index, table.shape))]

    return Arrays(
        "numpy", np.minimum, np.maximum, np.where, np.exp, np.log, np.sqrt, np.tanh, sigmoid,
        lambda x: np.logaddexp(0.0, x), np.vectorize(math.erf, otypes=[float]), np.abs, np.logical_not, np.power,
        lambda x: np.asarray(x, dtype=np.float64), np.stack, lambda n, like: np.arange(n), lambda x: np.frexp(x)[1] - 1,
        read, lambda x: x.astype(np.int64) if x.dtype.kind == "i" else x,
    )  # fmt: skip


@lru_cache
def torch_arrays(dtype: Any = None) -> Arrays:
    """torch on whatever device the operands are; integers become floats of `dtype` (float64 unless told)."""
    import torch

    def unary(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: function(x if isinstance(x, torch.Tensor) else number(x))

    def number(x: Any) -> Any:
        return torch.full((), x, dtype=torch.bool if isinstance(x, bool) else dtype or torch.float64)

    lower, upper = _bound(torch, "min"), _bound(torch, "max")
    return Arrays(
        "torch", lower, upper, _where(torch, dtype),
        unary(torch.exp), unary(torch.log), unary(torch.sqrt), unary(torch.tanh), unary(torch.sigmoid),
        unary(lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))),
        unary(torch.erf), abs, unary(torch.logical_not), torch.pow,
        lambda x: x.to(dtype or torch.float64) if isinstance(x, torch.Tensor) else float(x),
        torch.stack, lambda n, like: torch.arange(n, device=like.device), lambda x: torch.frexp(x.double()).exponent - 1,
        lambda table, index: table[tuple(lower(upper(i, 0), n - 1) for i, n in zip(index, table.shape))],
        lambda x: x if x.is_floating_point() else x.long(),
    )  # fmt: skip


def _bound(torch: ModuleType, side: str) -> Callable[[Any, Any], Any]:
    pairwise, clamp = (torch.minimum, "max") if side == "min" else (torch.maximum, "min")
    scalar = min if side == "min" else max

    def bound(a: Any, b: Any) -> Any:
        a_is, b_is = isinstance(a, torch.Tensor), isinstance(b, torch.Tensor)
        if a_is and b_is:
            return pairwise(a, b)
        if a_is or b_is:
            tensor, number = (a, b) if a_is else (b, a)
            return tensor.clamp(**{clamp: number})
        return scalar(a, b)

    return bound


def _where(torch: ModuleType, dtype: Any) -> Callable[[Any, Any, Any], Any]:
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not isinstance(condition, torch.Tensor):
            return a if condition else b
        if isinstance(a, float) and isinstance(b, float):  # of two numbers torch would make its default type
            a = torch.full((), a, dtype=dtype or torch.float64, device=condition.device)
        return torch.where(condition, a, b)

    return where
