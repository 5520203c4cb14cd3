"""Head routing on the CPU: a mixture of heads against all heads, side by side: `python -m benchmarks.routing`.

The two take turns, so that what else the machine does falls on both; the figures are medians. What routing can gain at most is H / k.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import attncc
from attncc import AttentionSpec, masks, routing
from benchmarks import report
from benchmarks.cpu import THREADS, Call, take_turns

HEADS, WIDTH, GOAL = 8, 128, 1.6
"""Query heads, columns of a head, and how many times faster half of the heads must be than all of them."""
MASKS: dict[str, masks.Mask] = {"causal": masks.Causal(), "causal window 1024": masks.SlidingWindow(left=1023, right=0)}


def chosen(tokens: int, top_k: int) -> Tensor:
    """Weights of a router `[1, HEADS, tokens]`: every token's `top_k` best of random heads."""
    scores = torch.rand(1, HEADS, tokens, generator=torch.Generator().manual_seed(0)) + 0.1
    return torch.where(scores.argsort(1).argsort(1) < top_k, scores, 0.0)


def measure(mask: str, tokens: int, top_k: int, rounds: int) -> dict[str, Any]:
    """Times of one mask with every head and with `top_k` of them, forward and with the backward pass."""
    plain = AttentionSpec(tokens=(tokens,), heads=HEADS, head_dim=WIDTH, dtype="float32", mask=MASKS[mask])
    every = attncc.compile(plain, "cpu")
    some = attncc.compile(plain.model_copy(update={"routing": routing.MixtureOfHeads(top_k=top_k)}), "cpu")
    q, k, v, grad = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(4))
    weights = chosen(tokens, top_k)
    forward: dict[str, Call] = {"all": lambda: every(q, k, v), "routed": lambda: some(q, k, v, routing=weights)}
    take_turns(forward, 1)
    found: dict[str, Any] = {"mask": mask, "top_k": top_k, "forward": take_turns(forward, rounds)}
    for x in (q, k, v, weights):
        x.requires_grad_()
    both: dict[str, Call] = {
        "all": lambda: torch.autograd.grad(every(q, k, v), (q, k, v), grad),
        "routed": lambda: torch.autograd.grad(some(q, k, v, routing=weights), (q, k, v, weights), grad),
    }
    take_turns(both, 1)
    return {**found, "forward + backward": take_turns(both, rounds)}


def lines_of(record: dict[str, Any]) -> list[list[str]]:
    """Table lines of a mask, one for each direction."""
    found = []
    for name in ("forward", "forward + backward"):
        times = record[name]
        gain = times["all"] / times["routed"]
        found.append(
            [record["mask"], f"{record['top_k']} of {HEADS}", name, *(f"{times[x]:.0f}" for x in ("all", "routed")), f"{gain:.2f}"]
        )
    return found


COLUMNS = ["mask", "heads", "pass", "all heads ms", "routed ms", "times faster"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 where half of the heads are not {GOAL} times faster")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    cases = [(mask, top_k) for mask in MASKS for top_k in (HEADS // 2, HEADS // 4)]
    tracked = report.tracked(cases, len(cases), "timing")
    lines = [line for mask, top_k in tracked for line in lines_of(measure(mask, given.tokens, top_k, given.rounds))]
    report.print_table(f"float32, {HEADS} heads of {WIDTH}, {given.tokens} tokens, {THREADS} threads", COLUMNS, lines)
    return 1 if given.check and float(lines[0][-1]) < GOAL else 0


if __name__ == "__main__":
    raise SystemExit(main())
