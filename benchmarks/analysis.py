"""What block-mask analysis costs: a million tokens; packed documents; and PyTorch's `create_block_mask` in the same run.

python -m benchmarks.analysis [--tokens 16384] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import environment, print_table, write_json

MILLION, WINDOW, TILE = 1 << 20, 4096, 128
PACKED, DOCUMENTS, PACKINGS = 1 << 15, 40, 100
RUNS = 7


def a_million() -> dict[str, Any]:
    """Seconds and extra memory of the bounds of a causal window over a million tokens, in a process that has done nothing else.

    `first` has what the first call imports and allocates, `median` does not.
    """
    from attncc import AttentionSpec, masks, simulate

    mask = masks.SlidingWindow(left=WINDOW - 1, right=0)
    simulate(AttentionSpec(tokens=(TILE,), heads=1, head_dim=64, mask=masks.Full()), "h100", (TILE,), (TILE,))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        spec = AttentionSpec(tokens=(MILLION,), heads=1, head_dim=64, mask=mask)
        report = simulate(spec, "h100", (TILE,), (TILE,))
        times.append(time.perf_counter() - start)
    return {
        "visited": report.tiles.visited,
        "total": report.tiles.total,
        "first_s": times[0],
        "median_s": statistics.median(times),
        "extra_bytes": _extra_bytes(lambda: simulate(spec, "h100", (TILE,), (TILE,))),
    }


def _extra_bytes(run: Callable[[], Any]) -> int:
    """The most that Python and numpy hold at once for it, beyond what they held before."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def in_fresh_process() -> dict[str, Any]:
    """`a_million` where neither torch nor another benchmark has left its memory."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.analysis", "--million"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def beside_torch(tokens: int) -> dict[str, Any]:
    """Best seconds for FlexAttention's block mask of the same window: ours, and theirs, eager and compiled.

    Ours is of another window every time, so that nothing it may have kept serves it; it is called so often that both take as long.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    from attncc import AttentionSpec, masks, simulate

    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k < WINDOW)

    windows = itertools.count(WINDOW + 1)

    def spec(window: int) -> AttentionSpec:
        return AttentionSpec(tokens=(tokens,), heads=1, head_dim=64, mask=masks.SlidingWindow(left=window - 1, right=0))

    def ours() -> Any:
        return spec(next(windows)).to_block_mask()

    def theirs() -> Any:
        return create_block_mask(window, None, None, tokens, tokens, device="cpu")

    def analysis() -> Any:
        return simulate(spec(next(windows)), "h100", (TILE,), (TILE,))

    block_mask, (_, ours_s) = spec(WINDOW).to_block_mask(), _best(ours, 1000)
    _, analysis_s = _best(analysis, 100)
    compiled = torch.compile(create_block_mask)
    made, compiling_s = _best(lambda: compiled(window, None, None, tokens, tokens, device="cpu"), 1)
    eager, eager_s = _best(theirs, 2)
    _, compiled_s = _best(lambda: compiled(window, None, None, tokens, tokens, device="cpu"), 3)
    assert torch.equal(block_mask.to_dense(), eager.to_dense())
    assert torch.equal(block_mask.to_dense(), made.to_dense())
    times = {"analysis_s": analysis_s, "ours_s": ours_s, "eager_s": eager_s, "compiled_s": compiled_s, "compiling_s": compiling_s}
    return {"tokens": tokens, **times}


def packed() -> list[dict[str, Any]]:
    """Milliseconds of the block mask of packed documents, a new packing every time: its tiles, and as FlexAttention's `BlockMask`."""
    import numpy as np
    import torch

    import attncc
    from attncc import AttentionSpec, masks, pipeline
    from attncc.passes.block_mask import block_mask
    from attncc.passes.tiles import bind

    inside: dict[str, masks.Mask] = {
        "causal": masks.Causal(),
        "causal window 1024": masks.SlidingWindow(left=1023, right=0),
        "neighborhood 129": masks.Neighborhood(window=(129,)),
    }
    draw = np.random.default_rng(0)
    found = []
    for name, mask in inside.items():
        spec = AttentionSpec(tokens=(PACKED,), heads=1, head_dim=64, mask=masks.Documents(mask=mask))
        bound = bind(pipeline.plan(spec, "cpu").kernels[0].graph, (PACKED,), (PACKED,))
        times: dict[str, list[float]] = {"tiles_ms": [], "block_mask_ms": []}
        for _ in range(PACKINGS):
            cuts = torch.from_numpy(np.sort(draw.choice(np.arange(1, PACKED), DOCUMENTS - 1, replace=False)))
            tables = attncc.document_tables(torch.cat([torch.tensor([0]), cuts, torch.tensor([PACKED])]), PACKED)
            arrays = {key: table.numpy() for key, table in tables.items()}
            start = time.perf_counter()
            block_mask(bound, (TILE,), (TILE,), arrays)
            middle = time.perf_counter()
            spec.to_block_mask(tables=tables)
            times["tiles_ms"].append((middle - start) * 1e3)
            times["block_mask_ms"].append((time.perf_counter() - middle) * 1e3)
        found.append({"mask": name, **{key: statistics.median(values) for key, values in times.items()}})
    return found


def _best(run: Callable[[], Any], runs: int) -> tuple[Any, float]:
    """The result and the least time of some runs: a busy machine lengthens short runs more than long ones."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return result, min(times)


def show(found: dict[str, Any]) -> None:
    million, flex = found["million"], found["flex"]
    print_table(
        f"Bounds of a causal window of {WINDOW} over {MILLION:,} tokens",
        ["", "first call", "median", "extra memory", "tiles visited"],
        [
            [
                "attncc",
                f"{million['first_s'] * 1e3:.0f} ms",
                f"{million['median_s'] * 1e3:.0f} ms",
                f"{million['extra_bytes'] / 1e6:.0f} MB",
                f"{million['visited']:,} of {million['total']:,}",
            ]
        ],
    )
    rows = [
        ("attncc: spec to BlockMask", "ours_s"),
        ("attncc: spec to bounds", "analysis_s"),
        ("create_block_mask, eager", "eager_s"),
        ("create_block_mask, compiled", "compiled_s"),
    ]
    print_table(
        f"FlexAttention's block mask of it, {flex['tokens']:,} tokens",
        ["", "best time", "times ours"],
        [[name, f"{flex[key] * 1e3:,.1f} ms", _times(flex[key] / flex["ours_s"])] for name, key in rows],
        note=f"compiling took another {flex['compiling_s'] - flex['compiled_s']:.0f} s",
    )

    print_table(
        f"Block mask of {DOCUMENTS} packed documents, {PACKED:,} tokens: medians of {PACKINGS} packings",
        ["inside a document", "tiles", "FlexAttention's BlockMask"],
        [[row["mask"], f"{row['tiles_ms']:.2f} ms", f"{row['block_mask_ms']:.2f} ms"] for row in found["packed"]],
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="for the comparison with PyTorch")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--million", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.million:
        print(json.dumps(a_million()))
        return
    found = {"environment": environment(), "million": in_fresh_process(), "flex": beside_torch(arguments.tokens), "packed": packed()}
    show(found)
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
