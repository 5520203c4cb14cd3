"""HunyuanVideo's token grid with generalized neighborhood attention: bounds, a kernel for sm_90, and a cropped grid against dense.

Grid 30 x 48 x 80 (115,200 tokens), window 18 x 24 x 24, stride 16 x 8 x 8: the configuration that the GNA paper (arXiv 2504.16922)
and NATTEN report. No GPU is needed; the cropped grid keeps the structure, with strides that do not divide it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attncc
from attncc import AttentionSpec, masks

FOLDER = Path("build/demo")
TARGET, TILE = "sm_90", (2, 8, 8)
VIDEO = AttentionSpec(
    tokens=(30, 48, 80),
    heads=24,
    head_dim=128,
    dtype="bfloat16",
    mask=masks.Neighborhood(window=(18, 24, 24), stride=(16, 8, 8)),
)
CROP = AttentionSpec(tokens=(5, 10, 12), heads=2, head_dim=32, dtype="float32", mask=masks.Neighborhood(window=(4, 5, 6), stride=(4, 2, 3)))


def allowed(tokens: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The mask `[N, N]` in loops, from the paper's definition: the window of a group's leader, shifted into the grid."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, w, s in zip(tokens, window, stride, strict=True):
        axis = torch.zeros(length, length, dtype=torch.bool)
        for q in range(length):
            leader = min(q // s * s + s // 2, length - 1)
            start = min(max(leader - w // 2, 0), length - w)
            axis[q, start : start + w] = True
        mask = torch.kron(mask, axis)
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The cropped attention as a dense formula in float64."""
    mask: Any = CROP.mask
    keep = allowed(tuple(n or 0 for n in CROP.tokens), mask.window, mask.stride)
    scores = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), 3) @ v.double()


def crop_error(target: str) -> float:
    """Relative error of the cropped attention on a target, against the dense formula."""
    shape = (1, CROP.heads, CROP.tokens[0] * CROP.tokens[1] * CROP.tokens[2], CROP.head_dim)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    want = dense(q, k, v)
    return float((attncc.compile(CROP, target=target)(q, k, v) - want).norm() / want.norm())


def interpreted_error() -> float:
    """The same of the generated Triton file, run by Triton's interpreter in a process of its own."""
    command = [sys.executable, "-c", f"from examples.hunyuan import crop_error; print(crop_error({TARGET!r}))"]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"the interpreter failed:\n{ran.stderr}")
    return float(ran.stdout.splitlines()[-1])


def compile_ahead(folder: Path) -> dict[str, Any]:
    """Writes the kernel, its plan and its machine code for the whole grid; gives what the machine code uses."""
    from attncc.cli.compile import generated, write

    files, report = generated(VIDEO, attncc.compile(VIDEO, target=TARGET).plan)
    write(folder, files)
    return report


def table(cpu: float, interpreted: float) -> Table:
    """Errors of the cropped grid, to print."""
    shown = Table(title="cropped grid 5 x 10 x 12 against the dense formula in float64")
    shown.add_column("backend")
    shown.add_column("relative error", justify="right")
    shown.add_row("blocked torch", f"{cpu:.1e}")
    shown.add_row(f"generated Triton for {TARGET}, interpreted", f"{interpreted:.1e}")
    return shown


def main(folder: Path = FOLDER) -> None:
    """Simulates, compiles, runs; leaves the kernel, its machine code and the report in `folder`."""
    console = Console()
    report = attncc.simulate(VIDEO, target="h100", q_tile=TILE, k_tile=TILE)
    console.print(report.table())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(report.to_json())
    with console.status(f"compiling for {TARGET}, no GPU needed"):
        compiled = compile_ahead(folder)
    console.print(
        f"{compiled['kernel']} for {TARGET}: {compiled['registers']} registers, {compiled['spills']} spills, "
        f"{compiled['shared_bytes']:,} of {compiled['shared_limit']:,} bytes of shared memory"
    )
    with console.status("running the cropped grid, in torch and in Triton's interpreter"):
        cpu, interpreted = crop_error("cpu"), interpreted_error()
    console.print(table(cpu, interpreted))
    if max(cpu, interpreted) > 1e-5:
        raise SystemExit("the cropped grid disagrees with the dense formula")


if __name__ == "__main__":
    main()
