"""Work counted in machine code: what `attncc compile` reports of a kernel's loops, in place of counts from its plan.

Matrix products and bytes are the plan's in any case. Instructions of the uniform datapath, waits, and stores of spilled registers are
left out: they run beside, or are no part of the formula.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from attncc.errors import InputError
from attncc.passes.plan import KernelPlan
from attncc.simulator.work import TileWork, Work, tile_work

Loop = Mapping[str, int]

EXPONENTIAL = ("MUFU", "v_exp", "v_rcp", "v_log", "v_sqrt")
FLOAT = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "v_fma", "v_add_f", "v_mul_f", "v_pk_")
ELSEWHERE = (
    "HGMMA", "HMMA", "UTC", "WARPGROUP", "SYNCS", "BAR", "BRA", "NOP", "DEPBAR", "LD", "ST", "UTMA", "U", "R2UR", "S2R", "VOTE", "ELECT",
    "WARPSYNC", "BSSY", "BSYNC", "YIELD", "CS2R", "s_", "ds_", "global_", "buffer_", "v_mfma", "v_accvgpr",
)  # fmt: skip
"""Prefixes of instructions that the arithmetic units do not run."""


@dataclass(frozen=True)
class Compiled:
    """What the model reads of a compiled kernel: `registers` a thread, `shared_bytes` and `threads` a block, `loops` by instruction."""

    registers: int
    shared_bytes: int
    threads: int
    loops: tuple[Loop, ...]


def read_report(path: str | Path) -> Compiled:
    """The resource report that `attncc compile` writes beside a kernel.

    Raises:
        InputError: a file that is none; names it.
    """
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return Compiled(data["registers"], data["shared_bytes"], data["threads"], tuple(data["loops"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("resources", f"{path} is no resource report of `attncc compile`: {error!r}") from error


def loop_work(loop: Loop, threads: int) -> Work:
    """Work of one turn of a loop of all threads of a block."""
    exp = sum(n for name, n in loop.items() if name.startswith(EXPONENTIAL))
    fma = sum(n for name, n in loop.items() if name.startswith(FLOAT))
    other = sum(n for name, n in loop.items() if not name.startswith((*EXPONENTIAL, *FLOAT, *ELSEWHERE)))
    return Work(exp=float(exp * threads), fma=float(fma * threads), integer=float(other * threads))


def compiled_work(compiled: Compiled, kernel: KernelPlan) -> TileWork:
    """Work for each tile as the machine code has it; the plan's where no loop computes a tile.

    The compiler may print a loop twice, once with the work between two rows of tiles in it, and peel parts off it; of the loops that
    compute whole tiles, the shorter copy counts.
    """
    planned = tile_work(kernel)
    pairs = prod(kernel.q_tile) * prod(kernel.k_tile)
    counted = [loop_work(loop, compiled.threads) for loop in compiled.loops]
    whole = [w for w in counted if w.exp >= 0.9 * planned.full.exp and w.fma + w.integer >= pairs]
    loops = sorted(whole, key=lambda w: w.exp + w.fma + w.integer)
    if not loops:
        return planned
    if kernel.mask_policy == "every tile":
        masked = _with_arithmetic(planned.partial, loops[0])
        return TileWork(masked, masked)
    full = _with_arithmetic(planned.full, loops[0])
    masked_loop = next((w for w in loops[1:] if w.integer - loops[0].integer >= pairs), None)
    added = planned.partial.integer - planned.full.integer
    return TileWork(full, _with_arithmetic(full, masked_loop) if masked_loop else full + Work(integer=added))


def _with_arithmetic(planned: Work, counted: Work) -> Work:
    return replace(planned, exp=counted.exp, fma=counted.fma, integer=counted.integer)
