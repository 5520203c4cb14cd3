"""The factors that ahead-of-time evidence covers in pairs, and the spec and the launch that a row of their values means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attncc.codegen.facts import Facts
from attncc.codegen.kernel import Kernel
from attncc.codegen.signature import Specialization, default_specialization
from attncc.spec import gates, loads, masks, normalizers, routing, scores
from attncc.spec.attention import AttentionSpec
from benchmarks.covering import Row, covering_array

GRIDS = {"1": (5000,), "2": (60, 72), "3": (14, 20, 24)}
"""Lengths that no tile divides."""
WINDOWS = {"1": (513,), "2": (17, 24), "3": (6, 8, 9)}
HEADS = {"1:1": (4, 4, 4), "4:2": (4, 2, 2), "4:1": (4, 1, 1), "4:2:1": (4, 2, 1)}
"""Query, key and value heads."""


def _neighborhood(rank: str, **changed: Any) -> masks.Mask:
    return masks.Neighborhood(window=WINDOWS[rank], **changed)


def _strided_blocks() -> masks.Mask:
    return masks.StridedBlocks(block=64, local=8, stride=6, group=2)


MASKS = {
    "full": lambda rank: masks.Full(),
    "causal": lambda rank: masks.Causal(),
    "window": lambda rank: masks.SlidingWindow(left=700, right=300),
    "neighborhood": lambda rank: _neighborhood(rank),
    "strided causal neighborhood": lambda rank: _neighborhood(rank, stride=4, causal=(True, *[False] * (int(rank) - 1))),
    "dilated neighborhood": lambda rank: _neighborhood(rank, dilation=2),
    "segments": lambda rank: masks.Segments(),
    "causal & segments": lambda rank: masks.Causal() & masks.Segments(),
    "predicate": lambda rank: masks.Predicate(text="abs(q0 - k0) % 3 != 1 or 2 * k < q or blocks[h, k] == b"),
    "prefix | causal": lambda rank: masks.Prefix(length=900) | masks.Causal(),
    "shifted cells": lambda rank: masks.Partition(size=WINDOWS[rank], shift=WINDOWS[rank][-1] // 2),
    "disc": lambda rank: masks.Disc(radius=8),
    "masks by head": lambda rank: masks.PerHead(masks=(masks.Axial() | masks.GlobalTokens(labels="marks"), _strided_blocks())),
    "documents": lambda rank: masks.Documents(mask=masks.Causal() & masks.Partition(size=512)),
    "concatenation": lambda rank: masks.Concatenation(
        queries=((77,), (4923,)), rules=((masks.Full(), None), (masks.Full(), masks.Neighborhood(window=513)))
    ),
    "block table": lambda rank: masks.BlockTable(q_block=WINDOWS[rank], k_block=WINDOWS[rank], per_batch=False),
}
PADDED = {
    "padded halo": lambda rank: masks.Halo(block=WINDOWS[rank], halo=3, edge="zero_pad"),
    "padded cells": lambda rank: masks.Partition(size=WINDOWS[rank], shift=WINDOWS[rank][-1] // 2, edge="pad_token"),
}
"""Masks with keys beyond the grid, beside which not everything has a meaning."""
BESIDE_PADDED = {
    "normalizer": ("softmax", "softmax, lse"),
    "scores": ("none", "negative scale", "softcap", "temperature, bias by row"),
    "loads": ("none",),
    "scales": ("none", "queries"),
}
SCORES = {
    "none": lambda rank: (),
    "negative scale": lambda rank: (scores.Scale(value=-0.3),),
    "softcap": lambda rank: (scores.Softcap(cap=20.0),),
    "alibi": lambda rank: (scores.Alibi(),),
    "relative bias": lambda rank: (scores.RelativeBias(extent=WINDOWS[rank]),),
    "temperature, bias by row": lambda rank: (scores.Temperature(), scores.Bias(index=("b", "q"))),
    "dense bias": lambda rank: (scores.DenseBias(per_batch=False),),
    "t5 bias": lambda rank: (scores.T5Bias(),),
    "expression": lambda rank: (
        scores.Expression(
            text="select(k < open[h, q], s, -inf) + exp(-s * s) * weight[near[h, (q - k) % 64]]",
            integers=("open",),
            tables=(masks.Captured(name="near", shape=(4, 64)), masks.Captured(name="weight", shape=(9,), kind="float")),
        ),
    ),
    "scale, softcap, bias": lambda rank: (
        scores.Scale(value=0.1),
        scores.Softcap(cap=20.0),
        scores.RelativeBias(extent=WINDOWS[rank]),
    ),
}
WEIGHT_FACTORS = {
    "weights times a table": lambda rank: scores.RelativeBias(extent=WINDOWS[rank], table="urpe"),
}
"""In place of score maps: what weights are multiplied by."""
NORMALIZERS = {
    "softmax": (normalizers.Softmax(), ("output",)),
    "softmax, lse": (normalizers.Softmax(), ("output", "lse")),
    "sigmoid by head": (normalizers.Sigmoid(bias="per_head"), ("output",)),
    "relu": (normalizers.ReLU(), ("output",)),
    "softmax, sink by query, lse": (normalizers.Softmax(sink="per_batch_query"), ("output", "lse")),
    "softmax, key and value": (normalizers.Softmax(sink="key_value"), ("output", "lse")),
    "squared relu over allowed": (normalizers.ReLU(power=2, divisor="allowed"), ("output",)),
    "entmax": (normalizers.Entmax(), ("output",)),
    "entmax of any power": (normalizers.Entmax(alpha=1.3), ("output",)),
    "sparsemax": (normalizers.Entmax(alpha=2), ("output",)),
    "re-weighted softplus, lse": (normalizers.LSSAR(power=3, row_scale=(0.5, 1.0)), ("output", "lse")),
    "softplus ratio, lse": (normalizers.PositiveRatio(row_scale="per_query"), ("output", "lse")),
}
LOADS = {
    "none": lambda rank: (),
    "norm, rotary": lambda rank: (loads.QKNorm(weights=True), loads.Rotary(width=12)),
    "rotary pairs, l2": lambda rank: (loads.Rotary(pairs="interleaved", width=12, align="bottom_right"), loads.QKNorm(norm="l2")),
}
GATES = {
    "none": None,
    "sigmoid, elementwise": gates.Output(),
    "silu, headwise": gates.Output(activation="silu", granularity="headwise"),
    "tanh, packed": gates.Output(activation="tanh", granularity="packed"),
    "added, shared": gates.Output(mode="add", granularity="shared"),
}
SCALES = {"none": (), "queries": ("q",), "keys, values": ("k", "v")}
"""Operands whose rows are scaled."""
ROUTINGS = {
    "none": None,
    "mixture of heads": routing.MixtureOfHeads(shared=1, top_k=2),
    "head mask": routing.HeadMask(per_batch=True),
    "head scale": routing.HeadScale(),
}
RANGED = ("full", "causal", "window")
"""Masks whose key tiles the kernel computes itself: only these go with routing by token."""
FACTORS = {
    "mask": [*MASKS, *PADDED],
    "normalizer": list(NORMALIZERS),
    "loads": list(LOADS),
    "scales": list(SCALES),
    "scores": [*SCORES, *WEIGHT_FACTORS],
    "head_dim": ["16", "32", "64", "72", "80", "96", "128"],
    "heads": list(HEADS),
    "layout": ["bhsd", "bshd", "unaligned"],
    "dtype": ["float16", "bfloat16", "float32"],
    "gate": list(GATES),
    "routing": list(ROUTINGS),
    "rank": list(GRIDS),
    "lengths": ["fixed", "open"],
}
LATER: tuple[tuple[str, tuple[str, ...]], ...] = (("mask", tuple(PADDED)), ("scores", tuple(WEIGHT_FACTORS)))
"""Values that joined their factors after a whole run, in order: the rows of the runs before stay what they were."""
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")


def legal(row: Mapping[str, str]) -> bool:
    """Alibi, T5's buckets, documents and concatenations are defined on one axis, concatenations and tables of blocks on known lengths.

    Routing by token needs masks of ranges, padding a plain softmax; the rest goes with everything.
    """
    on_a_line = row.get("rank", "1") == "1"
    ranged = on_a_line and row.get("mask", "full") in RANGED
    if row.get("routing") == "mixture of heads" and not ranged:
        return False
    if row.get("mask") in PADDED and not all(row.get(factor, values[0]) in values for factor, values in BESIDE_PADDED.items()):
        return False
    if row.get("mask") in ("block table", "concatenation") and row.get("lengths") == "open":
        return False
    return on_a_line or (row.get("scores") not in ("alibi", "t5 bias") and row.get("mask") not in ("documents", "concatenation"))


def array() -> list[Row]:
    """Rows in which every legal pair of values occurs; what joined later adds rows at the end, so the others keep their figures."""
    rows: list[Row] = []
    for joined in range(len(LATER) + 1):
        absent = {(name, value) for name, values in LATER[joined:] for value in values}
        known = {name: [value for value in values if (name, value) not in absent] for name, values in FACTORS.items()}
        rows = covering_array(known, legal, begun=rows)
    return rows


def spec_of(row: Row) -> AttentionSpec:
    """The spec that a row means."""
    rank = row["rank"]
    heads, key_heads, value_heads = HEADS[row["heads"]]
    normalizer, outputs = NORMALIZERS[row["normalizer"]]
    fields = {
        "tokens": GRIDS[rank] if row["lengths"] == "fixed" else (None,) * int(rank),
        "heads": heads,
        "key_heads": key_heads,
        "value_heads": value_heads,
        "head_dim": int(row["head_dim"]),
        "dtype": row["dtype"],
        "mask": (MASKS | PADDED)[row["mask"]](rank),
        "loads": LOADS[row["loads"]](rank),
        "token_scales": SCALES[row["scales"]],
        "scores": SCORES[row["scores"]](rank) if row["scores"] in SCORES else (),
        "factor": WEIGHT_FACTORS[row["scores"]](rank) if row["scores"] in WEIGHT_FACTORS else None,
        "normalizer": normalizer,
        "gate": GATES[row["gate"]],
        "routing": ROUTINGS[row["routing"]],
        "outputs": outputs,
    }
    return AttentionSpec.model_validate(fields)


def specialization(facts: Facts, layout: str) -> Specialization:
    """What the launcher specialises on for contiguous tensors of a layout, or for tensors of no alignment."""
    default = default_specialization(facts)
    if layout == "bhsd" or (layout == "bshd" and facts.rank < 3):
        return default
    if layout == "bshd" and facts.boxes and not _padded(facts):
        return replace(default, constants={**default.constants, "BOX": 2})
    found = _without_boxes(default) if facts.boxes else default
    if layout == "bshd":
        return found
    return replace(found, constants={**found.constants, "ALIGNED": 0}, aligned=())


def _padded(facts: Facts) -> bool:
    visit = Kernel(facts).visit
    return any(chunk.padded for chunk in (*visit.key_chunks, *visit.value_chunks))


def _without_boxes(special: Specialization) -> Specialization:
    """Rows by pointer: descriptors are None, which Triton takes for a compile-time value."""
    boxes = [name for name, kind in special.types.items() if kind.startswith("tensordesc")]
    constants = {**special.constants, "BOX": 0, **dict.fromkeys(boxes)}
    return replace(special, types={**special.types, **dict.fromkeys(boxes, "constexpr")}, constants=constants)
