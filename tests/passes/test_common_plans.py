"""Tiles of attentions that models use: an estimate fitted to rare ones must not take them from these unseen."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from attncc import AttentionSpec, gates, loads, masks, pipeline, scores
from tests.conftest import Golden

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WINDOWS = masks.Neighborhood(window=(18, 24, 24), stride=(16, 8, 8))


def specs(head_dim: int) -> Iterator[tuple[str, AttentionSpec]]:
    """By name: layers of language models, attention of video and of pictures."""

    def spec(**fields: Any) -> AttentionSpec:
        sizes = {"tokens": (8192,), "heads": 32, "key_heads": 8, "head_dim": head_dim, "dtype": "bfloat16", "mask": masks.Causal()}
        return AttentionSpec(**{**sizes, **fields})

    capped = (scores.Softcap(cap=50.0),)
    yield "causal", spec()
    yield "causal, softcap", spec(scores=capped)
    yield "causal, ALiBi", spec(scores=(scores.Alibi(),))
    yield "causal, URPE", spec(factor=scores.RelativeBias(extent=(512,), table="urpe"))
    yield "causal, rotary", spec(loads=(loads.Rotary(),))
    yield "causal, normed and rotary", spec(loads=(loads.QKNorm(weights=True), loads.Rotary()))
    yield "causal, gated", spec(gate=gates.Output())
    yield "causal, float32", spec(dtype="float32")
    yield "causal, softcap, float32", spec(dtype="float32", scores=capped)
    yield "documents", spec(mask=masks.Documents(mask=masks.Causal()))
    yield "segments", spec(mask=masks.Causal() & masks.Segments())
    video: dict[str, Any] = {"tokens": (30, 48, 80), "heads": 24, "key_heads": None, "mask": WINDOWS}
    yield "video", spec(**video)
    yield "video, normed and rotary", spec(**video, loads=(loads.QKNorm(weights=True), loads.Rotary(width=head_dim // 6 * 6)))
    near, table = masks.Neighborhood(window=(7, 7)), (scores.RelativeBias(extent=(7, 7)),)
    yield "picture, relative bias", spec(tokens=(64, 64), heads=8, key_heads=None, mask=near, scores=table)


def line(name: str, head_dim: int, spec: AttentionSpec) -> str:
    """Query tile x key tile, warps and stages of every target."""
    kernels = [pipeline.plan(spec, target).kernels[-1] for target in TARGETS]
    tiles = [f"{prod(k.q_tile):>3} x {prod(k.k_tile):<3} {k.num_warps} warps {k.num_stages}" for k in kernels]
    return f"{name + ' ' + str(head_dim):<30}" + "   ".join(tiles)


def test_tiles_of_common_specs(golden: Golden) -> None:
    lines = [line(name, head_dim, spec) for head_dim in (64, 96, 128) for name, spec in specs(head_dim)]
    golden("\n".join([" " * 30 + "".join(f"{target:<23}" for target in TARGETS).rstrip(), *lines, ""]))
