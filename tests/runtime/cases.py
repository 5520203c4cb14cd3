"""Specs of every kind, small, in the JSON form that the oracle reads too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import attncc
from attncc import AttentionSpec
from tests.oracle import attention, concrete, random_inputs

Json = dict[str, Any]


def spec(tokens: list[int | None], **fields: Any) -> Json:
    """A spec with defaults for the sizes."""
    sizes: Json = {"heads": 2, "head_dim": 8, "dtype": "float64", "scores": [], "normalizer": {"kind": "softmax"}}
    return {**sizes, "tokens": tokens, "mask": {"kind": "full"}, **fields}


def neighborhood(window: list[int], stride: list[int], dilation: list[int], causal: list[bool]) -> Json:
    return {"kind": "neighborhood", "window": window, "stride": stride, "dilation": dilation, "causal": causal}


CAUSAL: Json = {"kind": "causal", "align": "top_left"}
SEGMENTS: Json = {"kind": "segments", "ids": "segments", "key_ids": None}
GATE: Json = {"kind": "output", "activation": "sigmoid", "granularity": "elementwise", "mode": "multiply"}
WITH_LSE = ["output", "lse"]
RAISED = "s + pow(0.5 + w[h] * w[h], u[q]) * float(marks[k]) * 0.1"
CASES: dict[str, tuple[Json, list[int]]] = {
    "full": (spec([40], outputs=WITH_LSE), []),
    "one token": (spec([None], mask=CAUSAL), [1]),
    "causal": (spec([None], mask=CAUSAL, outputs=WITH_LSE), [150]),
    "causal, fewer queries": (spec([37], key_tokens=[150], mask={"kind": "causal", "align": "bottom_right"}), []),
    "causal, rows without a key": (spec([150], key_tokens=[37], mask={"kind": "causal", "align": "bottom_right"}, outputs=WITH_LSE), []),
    "window": (spec([300], mask={"kind": "sliding_window", "left": 20, "right": 3, "align": "top_left"}, heads=6, key_heads=3), []),
    "value heads": (spec([50], mask=CAUSAL, heads=6, key_heads=3, value_heads=2, value_dim=5), []),
    "neighborhood": (spec([9, 10], mask=neighborhood([3, 5], [2, 1], [1, 1], [False, True])), []),
    "dilated": (spec([11, 13], mask=neighborhood([3, 5], [1, 2], [3, 2], [False, False]), outputs=WITH_LSE), []),
    "three axes": (spec([5, 6, 7], mask=neighborhood([3, 2, 4], [1, 2, 1], [1, 2, 1], [True, False, False])), []),
    "open grid": (spec([None, None], mask=neighborhood([3, 3], [1, 1], [1, 1], [False, False])), [6, 9]),
    "segments": (spec([None], mask={"kind": "and", "masks": [SEGMENTS, CAUSAL]}, outputs=WITH_LSE), [130]),
    "two tables": (spec([20], key_tokens=[30], mask={"kind": "segments", "ids": "a", "key_ids": "c"}), []),
    "prefix": (spec([60], mask={"kind": "or", "masks": [CAUSAL, {"kind": "prefix", "length": 9}]}), []),
    "disc": (spec([9, 10], mask={"kind": "disc", "radius": 4}, outputs=WITH_LSE), []),
    "halo": (spec([None, 9], mask={"kind": "halo", "block": [4, 3], "halo": [1, 2]}), [10]),
    "a window padded by zeros": (
        spec([None, 9], mask={"kind": "window", "left": [3, 1], "right": 2, "edge": "zero_pad"}, outputs=WITH_LSE, token_scales=["q", "k"],
             scores=[{"kind": "softcap", "cap": 2.0}, {"kind": "bias", "index": ["b", "q"], "table": "shift"}]),
        [10],
    ),
    "blocks padded by a token": (
        spec([10, 9], heads=4, key_heads=2, value_heads=1, mask={"kind": "halo", "block": [4, 3], "halo": [1, 2], "edge": "pad_token"},
             outputs=WITH_LSE, token_scales=["q"], scores=[{"kind": "temperature", "index": ["h"], "table": "heat"}]),
        [],
    ),
    "cells padded by head": (
        spec([23], key_tokens=[19], heads=4, key_heads=2, outputs=WITH_LSE, mask={"kind": "per_head", "masks": [
            {"kind": "partition", "size": 8, "shift": 3, "edge": "pad_token"}, {"kind": "causal", "align": "bottom_right"}
        ]}),
        [],
    ),
    "padded, pointwise": (
        spec([20], mask={"kind": "window", "left": 3, "right": 2, "edge": "zero_pad"}, normalizer={"kind": "sigmoid", "bias": -1.0}), [],
    ),
    "masks by head": (spec([70], heads=4, mask={"kind": "per_head", "masks": [CAUSAL, {"kind": "congruence", "step": 3}]}), []),
    "documents": (spec([None], mask={"kind": "documents", "mask": CAUSAL}, outputs=WITH_LSE), [130]),
    "block table": (spec([60], key_tokens=[45], mask={"kind": "block_table", "q_block": 16, "k_block": 7}, outputs=WITH_LSE), []),
    "text, picture": (
        spec([97], mask={
            "kind": "concatenation", "queries": [[17], [8, 10]], "rules": [[CAUSAL, None], [CAUSAL, {"kind": "disc", "radius": 4}]]
        }),
        [],
    ),
    "text, picture with a neighborhood": (
        spec([31], mask={
            "kind": "concatenation", "queries": [[7], [4, 6]],
            "rules": [[CAUSAL, None], [CAUSAL, {"kind": "neighborhood", "window": [3, 5]}]],
        }),
        [],
    ),
    "predicate": (spec([8, 9], mask={"kind": "predicate", "text": "(q0 - k1) // 2 % 3 != 1 and t[b, h, k] > 1"}), []),
    "rows alone, over their keys": (
        spec([64], mask={"kind": "predicate", "text": "q * q % 5 != 1"}, normalizer={"kind": "relu", "divisor": "allowed"}),
        [],
    ),
    "nothing allowed": (spec([20], mask={"kind": "predicate", "text": "k < q - 100"}, outputs=WITH_LSE, gate={**GATE, "mode": "add"}), []),
    "softcap": (spec([40], scores=[{"kind": "scale", "value": -0.7}, {"kind": "softcap", "cap": 3.0}], mask=CAUSAL), []),
    "alibi": (spec([None], scores=[{"kind": "alibi", "slopes": None, "trainable": False}], heads=3, mask=CAUSAL), [40]),
    "trained slopes": (spec([30], key_tokens=[40], scores=[{"kind": "alibi", "slopes": None, "trainable": True}]), []),
    "bias": (
        spec([7, 8], scores=[{"kind": "softcap", "cap": 4.0}, {"kind": "relative_bias", "extent": [3, 8], "table": "relative_bias"}],
             gate={**GATE, "granularity": "headwise"}),
        [],
    ),
    "dense bias": (spec([9, 7], scores=[{"kind": "dense_bias", "per_head": False}], mask=CAUSAL, outputs=WITH_LSE), []),
    "bias by key": (spec([None], scores=[{"kind": "bias", "table": "bias", "index": ["b", "k"]}], mask=CAUSAL), [50]),
    "temperature": (
        spec([40], scores=[{"kind": "temperature", "table": "heat", "index": ["h", "q"]}, {"kind": "softcap", "cap": 4.0}], mask=CAUSAL),
        [],
    ),
    "buckets": (spec([70], key_tokens=[90], scores=[{"kind": "t5_bias", "buckets": 8, "max_distance": 40}], heads=3), []),
    "buckets of one side": (spec([90], scores=[{"kind": "t5_bias", "bidirectional": False, "max_distance": 60}]), []),
    "expression": (spec([60], scores=[{"kind": "expression", "text": RAISED, "integers": ["marks"]}], mask=CAUSAL), []),
    "sigmoid": (spec([140], normalizer={"kind": "sigmoid", "bias": -1.5}, mask=CAUSAL, scores=[{"kind": "softcap", "cap": 5.0}]), []),
    "relu": (spec([60], normalizer={"kind": "relu"}, mask=CAUSAL, gate={**GATE, "activation": "silu"}), []),
    "sink of zero": (spec([40], normalizer={"kind": "softmax", "sink": 0.0}, mask=CAUSAL, outputs=WITH_LSE), []),
    "sink by head": (
        spec([150], key_tokens=[37], mask={"kind": "causal", "align": "bottom_right"}, normalizer={"kind": "softmax", "sink": "per_head"},
             outputs=WITH_LSE, scores=[{"kind": "scale", "value": -0.4}]),
        [],
    ),
    "sink by query": (spec([None, 7], normalizer={"kind": "softmax", "sink": "per_query"}, mask=SEGMENTS, outputs=WITH_LSE), [6]),
    "sink by batch": (
        spec([11, 13], mask=neighborhood([3, 5], [1, 2], [3, 2], [False, False]), heads=4, key_heads=2,
             normalizer={"kind": "softmax", "sink": "per_batch_query"}, scores=[{"kind": "softcap", "cap": 0.1}]),
        [],
    ),
    "key and value bias": (
        spec([30], key_tokens=[12], mask={"kind": "causal", "align": "bottom_right"}, heads=6, key_heads=3, value_heads=2, value_dim=5,
             normalizer={"kind": "softmax", "sink": "key_value"}, outputs=WITH_LSE, gate=GATE),
        [],
    ),
    "sigmoid by length": (spec([None], normalizer={"kind": "sigmoid", "bias": "minus_log_keys"}, mask=CAUSAL), [60]),
    "sigmoid by head": (spec([60], normalizer={"kind": "sigmoid", "bias": "per_head"}, mask=CAUSAL, heads=4), []),
    "sigmoid by batch": (
        spec([9, 7], normalizer={"kind": "sigmoid", "bias": "per_batch_head"}, scores=[{"kind": "softcap", "cap": 2.0}]), [],
    ),
    "squared relu": (spec([None], normalizer={"kind": "relu", "power": 2.0, "divisor": "keys"}, mask=CAUSAL), [50]),
    "relu over its keys": (
        spec([11, 13], mask=neighborhood([3, 5], [1, 2], [3, 2], [False, True]), gate=GATE,
             normalizer={"kind": "relu", "power": 1.5, "divisor": "allowed"}),
        [],
    ),
    "relu over keys of a predicate": (
        spec([20], mask={"kind": "predicate", "text": "(q + k) % 5 > q // 5"}, normalizer={"kind": "relu", "divisor": "allowed"}), [],
    ),
    "relu over its place": (
        spec([None], key_tokens=[None], mask={"kind": "causal", "align": "bottom_right"},
             normalizer={"kind": "relu", "divisor": "position"}),
        [30, 20],
    ),
    "softplus ratio": (
        spec([150], key_tokens=[37], mask={"kind": "causal", "align": "bottom_right"}, outputs=WITH_LSE,
             normalizer={"kind": "positive_ratio", "weight": "softplus", "row_scale": [0.5, 1.0]}, gate=GATE),
        [],
    ),
    "sigmoid ratio": (
        spec([None, 7], normalizer={"kind": "positive_ratio", "weight": "sigmoid", "row_scale": "per_head_query", "epsilon": 0.25},
             mask=SEGMENTS, outputs=WITH_LSE, heads=4, key_heads=2, scores=[{"kind": "scale", "value": -0.5}]),
        [6],
    ),
    "elu ratio": (
        spec([11, 13], mask=neighborhood([3, 5], [1, 2], [3, 2], [False, True]), scores=[{"kind": "softcap", "cap": 0.2}],
             normalizer={"kind": "positive_ratio", "weight": "elu_plus_one", "row_scale": "per_query"}),
        [],
    ),
    "entmax": (
        spec([150], key_tokens=[37], mask={"kind": "causal", "align": "bottom_right"}, normalizer={"kind": "entmax"}, gate=GATE,
             scores=[{"kind": "alibi", "trainable": True}]),
        [],
    ),
    "sparsemax": (
        spec([None, 4], normalizer={"kind": "entmax", "alpha": 2.0, "sweeps": 8}, mask=SEGMENTS, heads=4, key_heads=2,
             scores=[{"kind": "scale", "value": -2.5}, {"kind": "relative_bias", "extent": [2, 3]}]),
        [6],
    ),
    "entmax in residue classes": (
        spec([11, 13], mask=neighborhood([3, 5], [1, 2], [3, 2], [False, True]), normalizer={"kind": "entmax", "alpha": 1.2}, value_dim=5,
             heads=4, routing={"kind": "relu", "shared": 1}),
        [],
    ),
    "re-weighted softplus": (
        spec([None], mask=CAUSAL, normalizer={"kind": "lssar", "power": 3.0, "row_scale": [0.5, 1.0]}, outputs=WITH_LSE, heads=4,
             key_heads=1),
        [90],
    ),
    "re-weighted softplus over keys": (
        spec([9, 10], mask={"kind": "disc", "radius": 4}, outputs=WITH_LSE, token_scales=["q", "v"],
             normalizer={"kind": "lssar", "power": 1.5, "offset": 0.25, "count": "keys", "row_scale": "per_head_query"}),
        [],
    ),
    "a ratio of one's own": (
        spec([60], mask={"kind": "predicate", "text": "(q + k) % 5 > q // 8"}, outputs=WITH_LSE,
             normalizer={"kind": "positive_ratio", "weight": "select(s > 1, sqrt(abs(s) + 2), abs(tanh(s)))"}),
        [],
    ),
    "gate": (spec([140], gate=GATE, mask=CAUSAL, outputs=WITH_LSE), []),
    "gate by head": (spec([30], gate={**GATE, "granularity": "headwise", "activation": "silu"}), []),
    "mixture of heads": (
        spec([None], heads=4, mask=CAUSAL, outputs=WITH_LSE, gate=GATE, routing={"kind": "mixture_of_heads", "shared": 1, "top_k": 2}),
        [140],
    ),
    "routed, all heads differ": (
        spec([9, 10], mask=neighborhood([3, 5], [2, 1], [1, 2], [False, True]), heads=12, key_heads=4, value_heads=6, value_dim=5,
             scores=[{"kind": "relative_bias", "extent": [3, 8], "table": "relative_bias"}], outputs=WITH_LSE,
             routing={"kind": "mixture_of_heads", "shared": 0, "top_k": 3}),
        [],
    ),
    "routed documents": (
        spec([150], mask={"kind": "and", "masks": [SEGMENTS, CAUSAL]}, heads=3, key_heads=1, routing={"kind": "relu", "shared": 1}), [],
    ),
    "routed, pointwise": (
        spec([70], normalizer={"kind": "sigmoid", "bias": -1.5}, mask=CAUSAL, heads=4, gate={**GATE, "mode": "add"},
             scores=[{"kind": "alibi", "slopes": None, "trainable": True}], routing={"kind": "relu", "shared": 0}),
        [],
    ),
    "routed, over its keys": (
        spec([70], normalizer={"kind": "relu", "divisor": "allowed"}, mask=CAUSAL, heads=4, routing={"kind": "relu", "shared": 1}), [],
    ),
    "head scale": (spec([40], mask=CAUSAL, heads=4, gate=GATE, routing={"kind": "head_scale", "per_batch": True}), []),
    "head mask": (spec([40], mask=CAUSAL, heads=4, outputs=WITH_LSE, routing={"kind": "head_mask", "per_batch": False}), []),
    "weights times a relative table": (
        spec([150], mask=CAUSAL, heads=6, key_heads=3, value_heads=2, factor={"kind": "relative_bias", "extent": [40], "table": "urpe"},
             scores=[{"kind": "alibi", "slopes": None, "trainable": True}], outputs=WITH_LSE, token_scales=["v"],
             normalizer={"kind": "softmax", "sink": "key_value"}),
        [],
    ),
    "weights times buckets, of documents": (
        spec([None], mask={"kind": "and", "masks": [SEGMENTS, CAUSAL]}, factor={"kind": "t5_bias", "buckets": 8, "max_distance": 20}),
        [130],
    ),
    "a ratio times a dense factor": (
        spec([11, 13], mask={"kind": "disc", "radius": 4}, heads=4, value_heads=2, outputs=WITH_LSE,
             normalizer={"kind": "positive_ratio", "weight": "elu_plus_one", "epsilon": 0.25},
             factor={"kind": "dense_bias", "table": "share", "per_batch": False}),
        [],
    ),
    "means times a factor": (
        spec([70], mask={"kind": "window", "left": 9, "right": 30}, normalizer={"kind": "relu", "divisor": "allowed"}, heads=4,
             factor={"kind": "bias", "index": ["b", "h", "k"], "table": "share"}, routing={"kind": "relu", "shared": 1}),
        [],
    ),
    "dilated, sigmoid weights times a formula": (
        spec([11, 13], mask=neighborhood([3, 5], [1, 2], [3, 2], [False, True]), normalizer={"kind": "sigmoid"},
             factor={"kind": "expression", "text": "tanh(slant[h, q]) + 0.25 * float((q + 2 * k) % 5)"}),
        [],
    ),
    "token scales": (
        spec([None], heads=6, key_heads=3, value_heads=2, mask=CAUSAL, token_scales=["q", "k", "v"], outputs=WITH_LSE,
             normalizer={"kind": "softmax", "sink": "key_value"}),
        [30],
    ),
    "a scale of values": (
        spec([11, 13], mask=neighborhood([3, 5], [1, 2], [3, 2], [False, True]), heads=4, value_heads=2, token_scales=["v"],
             normalizer={"kind": "positive_ratio", "weight": "elu_plus_one"}, outputs=WITH_LSE),
        [],
    ),
    "gate by key head": (
        spec([30], heads=6, key_heads=3, gate={**GATE, "granularity": "per_key_head", "activation": "tanh"}, addend=True), [],
    ),
    "packed gate": (
        spec([None, 5], heads=6, key_heads=2, value_dim=5, mask=CAUSAL, gate={**GATE, "granularity": "packed", "activation": "relu"},
             outputs=WITH_LSE, addend=True),
        [6],
    ),
    "packed gate by head": (
        spec([20], heads=4, key_heads=2, gate={**GATE, "granularity": "packed_headwise", "activation": "identity", "mode": "add"}), [],
    ),
    "only something added": (
        spec([30], key_tokens=[12], mask={"kind": "causal", "align": "bottom_right"}, addend=True, normalizer={"kind": "relu"}), [],
    ),
    "shared gate": (spec([30], gate={**GATE, "granularity": "shared", "mode": "add"}), []),
}  # fmt: skip


class Case:
    """Tensors for a spec, the oracle's results, and the kernel's."""

    def __init__(self, name: str, dtype: torch.dtype, seed: int = 0, batch: int = 2) -> None:
        json, self.lengths = CASES[name]
        self.json = {**json, "dtype": str(dtype).removeprefix("torch.")}
        self.spec = AttentionSpec.model_validate(self.json)
        self.q, self.k, self.v, self.inputs = random_inputs(self.json, batch, seed, dtype, self.lengths)

    @property
    def grid(self) -> dict[str, tuple[int, ...]]:
        """What a call needs to know of open axes."""
        if self.spec.grid.rank == 1 or None not in self.spec.tokens:
            return {}
        return {"tokens": tuple(concrete(self.json, self.lengths)["tokens"])}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that has a gradient."""
        named = {"q": self.q, "k": self.k, "v": self.v, **self.inputs}
        return {name: x.requires_grad_() for name, x in named.items() if x.is_floating_point()}

    def kernel(self, target: str = "cpu") -> attncc.Kernel:
        return attncc.compile(self.spec, target)

    def run(self, target: str = "cpu", layout: str = "bhsd") -> dict[str, Tensor]:
        """The kernel's results, heads first whatever the layout of the call."""
        swap = (lambda x: x.transpose(1, 2)) if layout == "bshd" else (lambda x: x)
        inputs: Json = {name: swap(x) if name in ("gate", "addend") else x for name, x in self.inputs.items()} | self.grid
        out = self.kernel(target)(swap(self.q), swap(self.k), swap(self.v), layout=layout, **inputs)
        results = dict(zip(self.spec.outputs, out if isinstance(out, tuple) else (out,)))
        return {**results, "output": swap(results["output"])}

    def oracle(self) -> dict[str, Tensor]:
        found = attention(concrete(self.json, self.lengths), self.q, self.k, self.v, self.inputs)
        return {name: found[name] for name in self.spec.outputs}


def gradients(results: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one fixed mix of the results."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(results):
        x = results[name].masked_fill(results[name] == -math.inf, 0.0).double()
        total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))
