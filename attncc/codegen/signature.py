"""The default specialisation of a kernel, as `triton.compile` wants it: argument types, compile-time values, alignment hints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attncc.codegen.facts import Facts
from attncc.codegen.kernel import LISTS, Kernel
from attncc.codegen.loads import Loads
from attncc.codegen.routing import ROUTED
from attncc.passes.footprint import BYTES

SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "int32": "i32"}
NUMBERS = {"tl.int64": "i64", "tl.int32": "i32"}


@dataclass(frozen=True)
class Specialization:
    """What decides the machine code beside the source: exactly what the launcher's cache is keyed by.

    `types` has every argument in order; `constants` the compile-time values; `aligned` the arguments whose addresses are multiples
    of 16 bytes; `small` those whose storage is known to be below 2 GB (AMD buffer loads).
    """

    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    small: tuple[str, ...]


def default_specialization(facts: Facts) -> Specialization:
    """Contiguous, aligned tensors of fewer than 2**31 elements a head; boxes where the plan has them."""
    kernel = Kernel(facts)
    boxed = _boxes(facts, kernel)
    types = {name: boxed.get(name) or f"*{SHORT[_dtype(name, facts)]}" for name in kernel.pointers}
    types |= {name: NUMBERS[kind] for name, kind in kernel.scalars}
    types |= dict.fromkeys(kernel.constants, "constexpr")
    constants: dict[str, Any] = {"ALIGNED": 16 // BYTES[facts.dtype], "INDEX": "int32"}
    if facts.boxes:
        constants["BOX"] = 1
    pointers = tuple(name for name in kernel.pointers if name not in boxed)
    return Specialization(types, constants, pointers, pointers if facts.target.backend == "hip" else ())


def prepare_specialization(facts: Facts) -> Specialization:
    """The same of the kernel that makes keys ready, in plans that have one."""
    names, scalars = Loads(facts).prepare_arguments()
    types = {name: f"*{SHORT[_dtype(name, facts)]}" for name in names} | {name: NUMBERS[kind] for name, kind in scalars}
    return Specialization(types, {}, tuple(names), tuple(names) if facts.target.backend == "hip" else ())


def _boxes(facts: Facts, kernel: Kernel) -> dict[str, str]:
    lead = (1,) if facts.rank == 3 else (1, 1)
    found = {}
    for operand, parts in (("k", kernel.visit.key_chunks), ("v", kernel.visit.value_chunks)):
        for name, chunk in zip(kernel.visit.box_names(operand), parts):
            box = [*lead, *facts.plan.k_tile, chunk.width]
            found[name] = f"tensordesc<{SHORT[facts.dtype]}{box}>"
    return found


def _dtype(name: str, facts: Facts) -> str:
    if name in (*LISTS, *ROUTED):
        return "int32"
    if name == facts.row_number or name.endswith(("_cos", "_sin")):
        return "float32"
    return str(facts.inputs[name]["dtype"]) if name in facts.inputs else facts.dtype
