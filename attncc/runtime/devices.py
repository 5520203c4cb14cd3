"""Which target a device is, and whether a plan's kernels run on it."""

from __future__ import annotations

from functools import lru_cache

import torch

from attncc.errors import InputError, UnsupportedError
from attncc.targets import TARGETS, Target

NAMED = {
    "h200": "h200", "h100 pcie": "h100-pcie", "h100": "h100", "a100": "a100", "b200": "b200", "l40s": "l40s", "rtx 5090": "rtx5090",
    "rtx 4090": "rtx4090", "rtx 3090": "rtx3090", "mi300x": "mi300x",
}  # fmt: skip
"""Targets by what device names say, in the order of trial."""


def auto_target() -> str:
    """Name of the target for this machine: that of the first visible GPU, or cpu without one.

    Raises:
        UnsupportedError: a GPU that no target describes.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return device_target(0)


@lru_cache
def device_target(index: int) -> str:
    """Name of the target that a GPU is, by its name if that is known, else by its architecture.

    Raises:
        UnsupportedError: no target describes it.
    """
    properties = torch.cuda.get_device_properties(index)
    arch = _arch(index)
    named = [target for text, target in NAMED.items() if text in properties.name.lower()]
    matching = [name for name in named if TARGETS[name].arch == arch]
    if matching:
        return matching[0]
    return _by_arch(arch, properties.name)


def _hip() -> bool:
    return bool(getattr(torch.version, "hip", None))


def _arch(index: int) -> str:
    if _hip():
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _by_arch(arch: str, name: str) -> str:
    """The target of an architecture: its own, or the latest before it of the same generation."""
    known = [t for t in TARGETS if t == arch]
    if not known and arch.startswith("sm_"):
        same = [t for t in TARGETS if t.startswith(arch[:-1]) and len(t) == len(arch) and t <= arch]
        known = sorted(same)[-1:]
    if not known:
        raise UnsupportedError(f"the GPU {name} ({arch})", f"no target describes {arch}", "target='cpu', which runs torch on any device")
    return known[0]


def check_device(target: Target, device: torch.device, interpret: bool) -> None:
    """Holds tensors on `device` to a plan for a GPU target.

    Raises:
        InputError: the kernels of the target do not run there.
    """
    if device.type == "cpu" and interpret:
        return
    if device.type != "cuda":
        raise InputError(
            "q",
            f"is on {device.type}, and the kernel is for {target.name}: move the tensors to the GPU, compile for target='cpu', "
            "or set TRITON_INTERPRET=1 before triton is imported to interpret the kernel on the CPU (slowly)",
        )
    problem = _mismatch(target, device.index)
    if problem:
        raise InputError("q", f"is on {torch.cuda.get_device_name(device)}, which {problem}; compile for target='auto'")


@lru_cache
def _mismatch(target: Target, index: int) -> str:
    """Why a device cannot run the kernels of a target; empty where it can."""
    backend = "hip" if _hip() else "cuda"
    if backend != target.backend:
        return f"is a {backend} device and {target.name} a {target.backend} one"
    if backend == "hip":
        return "" if _arch(index) == target.arch else f"is {_arch(index)}, not {target.arch}"
    if target.bulk_copy and torch.cuda.get_device_capability(index)[0] < 9:
        return f"lacks the bulk copies that plans for {target.name} use"
    # Not every version of torch says it; Triton then refuses at the launch.
    limit = int(getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", target.shared_bytes))
    return f"has less shared memory for a block than {target.name}" if limit < target.shared_bytes else ""
