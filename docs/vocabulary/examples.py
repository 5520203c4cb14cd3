"""One example of every kind a spec may hold: the line of Python that the page prints, and what its picture is drawn of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attncc import gates, loads, masks, normalizers, routing, scores

LINE, SQUARE = (32,), (8, 8)


@dataclass(frozen=True)
class Example:
    """A part of a spec and the grid that its picture has; `tables` are the run-time tables that a mask reads, one batch element each."""

    part: Any
    tokens: tuple[int, ...] = LINE
    tables: Mapping[str, Any] = field(default_factory=dict)


_DOCUMENTS = np.repeat([0, 1, 2], [9, 5, 18])
_PACKED = {"document_starts": np.repeat([[0, 9, 14]], [9, 5, 18], 1), "document_ends": np.repeat([[9, 14, 32]], [9, 5, 18], 1)}
_MARKED = np.isin(np.arange(32), [4, 19]).astype(np.int64)
_BLOCKS = np.array([[[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]], [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]])

MASKS = (
    Example(masks.Full()),
    Example(masks.Causal()),
    Example(masks.CausalAxes(axes=(True, False)), SQUARE),
    Example(masks.SlidingWindow(left=6, right=2)),
    Example(masks.Window(left=2, right=1), SQUARE),
    Example(masks.Neighborhood(window=(3, 5), stride=(1, 2)), SQUARE),
    Example(masks.Halo(block=4, halo=1, edge="zero_pad"), SQUARE),
    Example(masks.Disc(radius=4), SQUARE),
    Example(masks.Axial(), SQUARE),
    Example(masks.Partition(size=4, shift=2), SQUARE),
    Example(masks.Congruence(step=2), SQUARE),
    Example(masks.StridedBlocks(block=4, local=2, stride=3)),
    Example(masks.Segments(), tables={"segments": _DOCUMENTS[None]}),
    Example(masks.BlockTable(q_block=8, k_block=8), tables={"block_table": _BLOCKS[None]}),
    Example(masks.Prefix(length=10)),
    Example(masks.PrefixPerSample(), tables={"prefix_lengths": np.array([13])}),
    Example(masks.Sinks(count=3)),
    Example(masks.GlobalTokens(labels="summaries"), tables={"summaries": _MARKED[None]}),
    Example(masks.Predicate(text="k <= q and (q - k) % 3 != 1")),
    Example(masks.SlidingWindow(left=8, right=0) & masks.Segments(), tables={"segments": _DOCUMENTS[None]}),
    Example(masks.SlidingWindow(left=5, right=0) | masks.Sinks(count=2)),
    Example(~masks.Partition(size=8)),
    Example(masks.PerHead(masks=(masks.SlidingWindow(left=4, right=0), masks.Causal()))),
    Example(masks.Concatenation(queries=((8,), (4, 6)), rules=((masks.Causal(), None), (masks.Full(), masks.Neighborhood(window=3))))),
    Example(masks.Documents(mask=masks.SlidingWindow(left=5, right=0)), tables=_PACKED),
)
LOADS = (Example(loads.QKNorm(weights=True)), Example(loads.Rotary(base=500_000.0)))
SCORES = (
    Example(scores.Scale(value=0.5)),
    Example(scores.Softcap(cap=2.0)),
    Example(scores.Alibi()),
    Example(scores.RelativeBias(extent=(8,))),
    Example(scores.T5Bias(buckets=32, max_distance=128)),
    Example(scores.DenseBias(per_batch=False)),
    Example(scores.Bias(index=("b", "k"))),
    Example(scores.Temperature(index=("h",))),
    Example(scores.Expression(text="s + slope[h] * float(k - q)")),
)
NORMALIZERS = (
    Example(normalizers.Softmax(sink="per_head")),
    Example(normalizers.Sigmoid(bias="minus_log_keys")),
    Example(normalizers.ReLU(power=2, divisor="keys")),
    Example(normalizers.PositiveRatio(weight="softplus", row_scale=(1.0, 0.5))),
    Example(normalizers.Entmax(alpha=1.5)),
    Example(normalizers.LSSAR(power=3, row_scale=(1.0, 0.5))),
)
ROUTING = (
    Example(routing.MixtureOfHeads(shared=2, top_k=4)),
    Example(routing.ReLURouting(shared=1)),
    Example(routing.HeadScale(per_batch=True)),
    Example(routing.HeadMask()),
)
GATES = (Example(gates.Output(activation="silu", granularity="packed")),)
SECTIONS = {"masks": MASKS, "loads": LOADS, "scores": SCORES, "normalizers": NORMALIZERS, "routing": ROUTING, "gates": GATES}
