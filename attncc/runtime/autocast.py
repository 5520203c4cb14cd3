"""Autocast: inside it a call's tensors are cast to the types that the spec names; what a kernel does itself is never cast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attncc.runtime.signature import Signature


def cast(signature: Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """Floating tensors of another type than their slot's become the slot's, where autocast is on for their device."""
    kinds = {slot.name: slot.dtypes for slot in signature.slots}
    return {name: _cast(x, kinds.get(name, ())) for name, x in given.items()}


def _cast(x: Any, dtypes: tuple[torch.dtype, ...]) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in dtypes or not dtypes:
        return x
    if not dtypes[0].is_floating_point or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtypes[0])


def off(device: torch.device) -> Any:
    """A context in which nothing is cast: a kernel's own products have the precision of its spec."""
    return torch.autocast(device.type, enabled=False)
