"""Devices that attncc plans for: what a kernel may use (`Target`) and what the device can do (`Performance`).

Shipped targets have names (`TARGETS`; `attncc targets` lists them). A device of your own is a JSON file: wherever attncc takes a target,
it takes the path of one. `attncc targets h100 --json` prints a file to start from. Its keys, none of which may be missing:

    name       what it is called from then on: small letters, digits, - and _; none that attncc ships
    device     the product, in words
    backend    "cuda", "hip" or "cpu"
    arch       what is compiled for: "sm_90", "gfx942", or "cpu"
    matrix     the matrix unit: "mma", "wgmma", "tcgen05", "mfma" or "none"
    bulk_copy  whether the device copies boxes to shared memory by descriptor (TMA): true or false
    shared_bytes, registers, warp
               most shared memory of a block, most 32-bit registers of a thread, threads of a warp (32 or 64)

and two that may be left out, where only the compiler needs the target:

    performance  every field of `Performance`, in hertz, bytes, seconds and watts; `matrix_flops` holds a figure an element type
    peak_flops   the vendor's dense peaks in FLOP/s by element type; each must be SMs x clock x rate, within 3 %

Every figure is `{"value": 132, "source": "H100 datasheet"}`: a number and the document or measurement that it is from. Figures are
checked alone and against each other; unknown keys are refused. A file that is not accepted raises `TargetError`, which names the field.
"""

from __future__ import annotations

from attncc.targets.performance import Performance
from attncc.targets.records import Target
from attncc.targets.registry import TARGETS, limits, load, sheet, target
from attncc.targets.sheets import Sheet

__all__ = ["TARGETS", "Performance", "Sheet", "Target", "limits", "load", "sheet", "target"]
