"""Holds a call to its kernel's signature: every tensor is checked, and what is wrong gets one error that names the argument.

Written for `torch.compile` too: plain loops over plain data, so that a call traces without a graph break.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from attncc.errors import InputError
from attncc.runtime.signature import STREAMED, Signature, Slot
from attncc.spec.model import NO_DROPOUT

LAYOUTS = ("bhsd", "bshd")
Tokens = Sequence[int] | int | None
ABSENT = {"dropout": NO_DROPOUT, "dropout_p": NO_DROPOUT}
"""Arguments of other attentions that attncc has not, and what to do instead."""


@dataclass(frozen=True)
class Call:
    """A checked call: tensors heads first, extras in the signature's order, lengths of the query's and the key's axes."""

    q: Tensor
    k: Tensor
    v: Tensor
    extras: list[Tensor]
    lengths: list[int]


def checked(
    signature: Signature,
    given: Mapping[str, Tensor],
    layout: str,
    tokens: Tokens,
    key_tokens: Tokens,
) -> Call:
    """The call, if it fits the signature.

    Raises:
        InputError: the first argument that does not fit, and what would.
    """
    if layout not in LAYOUTS:
        raise InputError("layout", f"{layout!r} is unknown; use bhsd for [B, H, N, D] or bshd for [B, N, H, D]")
    for name in given:
        if name not in STREAMED and name not in signature.names:
            raise InputError(name, ABSENT.get(name, f"is no input of this spec; it takes {', '.join(['q, k, v', *signature.names])}"))
    first = _strided("q", given["q"])
    tensors = {}
    for slot in signature.slots:
        tensors[slot.name] = _heads_first(slot, _given(slot, given), first, layout)
    lengths = _lengths(signature, tensors["q"].shape[2], tensors["k"].shape[2], tokens, key_tokens)
    sizes = {"B": first.shape[0], "NQ": tensors["q"].shape[2], "NK": tensors["k"].shape[2]}
    for slot in signature.slots:
        _check_shape(slot, tensors[slot.name], sizes, layout)
    return Call(tensors["q"], tensors["k"], tensors["v"], [tensors[name] for name in signature.names], lengths)


def _given(slot: Slot, given: Mapping[str, Any]) -> Any:
    if slot.name not in given or given[slot.name] is None:
        raise InputError(slot.name, f"is missing; it is {_form(slot.shape)} of {_names(slot.dtypes)}")
    return given[slot.name]


def _strided(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise InputError(name, f"must be a tensor, not {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise InputError(name, "must be a plain strided tensor, neither sparse nor nested")
    return x


def _heads_first(slot: Slot, given: Any, first: Tensor, layout: str) -> Tensor:
    """The tensor as [B, H, N, D], its type, device, rank and strides checked."""
    x = _strided(slot.name, given)
    if x.dtype not in slot.dtypes:
        raise InputError(slot.name, f"has dtype {_names((x.dtype,))}, must be {_names(slot.dtypes)}")
    if x.device != first.device:
        raise InputError(slot.name, f"is on {x.device}, q is on {first.device}")
    if x.dim() != len(slot.shape):
        raise InputError(slot.name, f"has {x.dim()} axes, must be {_form(slot.shape, layout if slot.per_token else 'bhsd')}")
    if not slot.per_token:
        return x
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise InputError(slot.name, f"its last axis has stride {x.stride(3)}, must have 1; call .contiguous()")
    return x.transpose(1, 2) if layout == "bshd" else x


def _check_shape(slot: Slot, x: Tensor, sizes: Mapping[str, int], layout: str) -> None:
    wanted = [sizes[dim] if isinstance(dim, str) else dim for dim in slot.shape]
    for axis in range(len(wanted)):
        if x.shape[axis] != wanted[axis]:
            swapped = layout == "bshd" and slot.per_token
            shape = x.transpose(1, 2).shape if swapped else x.shape
            form = _form(slot.shape, "bshd" if swapped else "bhsd", sizes)
            raise InputError(slot.name, f"has shape {list(shape)}, must be {form} (layout {layout})")


def _lengths(signature: Signature, queries: int, keys: int, tokens: Tokens, key_tokens: Tokens) -> list[int]:
    if signature.shared and key_tokens is not None:
        raise InputError("key_tokens", "this spec has no key_tokens: queries and keys are the same tokens")
    query = _axis_lengths("tokens", signature.query, queries, "q", tokens)
    if signature.shared:
        if keys != queries:
            raise InputError("k", f"has {keys} tokens, q has {queries}: this spec has no key_tokens, so they are the same tokens")
        return [*query, *query]
    return [*query, *_axis_lengths("key_tokens", signature.key, keys, "k", key_tokens)]


def _axis_lengths(name: str, known: tuple[int | None, ...], total: int, tensor: str, given: Tokens) -> list[int]:
    """Length of every axis: the spec's, those given, or the one that follows from the number of tokens."""
    unknown = [a for a in range(len(known)) if known[a] is None]
    if given is not None:
        lengths = _given_lengths(name, known, given)
    elif len(unknown) > 1:
        raise InputError(name, f"is needed: {len(unknown)} axes of the spec's grid {_grid(known)} are open, so pass {name}=(..)")
    else:
        rest = prod([n for n in known if n is not None])
        lengths = [total // rest if n is None else n for n in known]
    if prod(lengths) != total or total < 1:
        raise InputError(tensor, f"has {total} tokens, the grid {_grid(lengths if given is not None else known)} has another number")
    return lengths


def _given_lengths(name: str, known: tuple[int | None, ...], given: Sequence[int] | int) -> list[int]:
    lengths = [given] if isinstance(given, int) else list(given)
    if len(lengths) != len(known):
        raise InputError(name, f"{_grid(lengths)} has {len(lengths)} axes, the spec's grid {_grid(known)} has {len(known)}")
    for a in range(len(known)):
        if lengths[a] < 1 or (known[a] is not None and lengths[a] != known[a]):
            raise InputError(name, f"{_grid(lengths)} contradicts the spec's grid {_grid(known)}")
    return lengths


def _grid(lengths: Sequence[int | None]) -> str:
    return " x ".join("?" if n is None else str(n) for n in lengths)


def _form(shape: tuple[int | str, ...], layout: str = "bhsd", sizes: Mapping[str, int] | None = None) -> str:
    """`[B, 4, NQ, 64]`, with run-time sizes where they are known: `[B=2, 4, NQ=128, 64]`."""
    dims = [f"{d}={sizes[d]}" if sizes and isinstance(d, str) else str(d) for d in shape]
    if layout == "bshd":
        dims[1], dims[2] = dims[2], dims[1]
    return f"[{', '.join(dims)}]"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
