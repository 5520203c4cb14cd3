"""What is run: a spec at full size to be timed, and the same at a size where the dense formula fits, to be checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from attncc import AttentionSpec, gates, loads, masks, normalizers, routing, scores
from attncc.passes.tiles import Shape
from attncc.spec.scores import standard_slopes
from benchmarks import rivals
from benchmarks.inputs import Tensors

CHECK_HEADS = 4
FLUX, HUNYUAN = (256, 256), (30, 48, 80)
"""Latent grids of FLUX at 4096 x 4096 pixels and of HunyuanVideo at 720p."""


@dataclass(frozen=True)
class Case:
    """One attention. `tokens` and `small_tokens` are the lengths it runs at; `lengths` those that must share one compile.

    Where it is `plain`, FlexAttention can compute it if its rows are softmax rows, and single rows have a formula of their own.
    """

    name: str
    spec: AttentionSpec
    small: AttentionSpec
    tokens: Shape
    small_tokens: Shape
    quick: bool = False
    lengths: tuple[int, ...] = ()
    plain: bool = True

    @property
    def has_flex(self) -> bool:
        """Whether FlexAttention computes this."""
        return self.plain and isinstance(self.spec.normalizer, normalizers.Softmax)


def cases() -> list[Case]:
    """Every case; the quick ones first."""
    found = [*_spatial(), *_plain(), *_masked(), *_mapped(), *map(_broad, _vocabulary())]
    return sorted(found, key=lambda case: not case.quick)


def by_name(name: str) -> Case:
    """The case of a name."""
    return next(case for case in cases() if case.name == name)


def _plain() -> list[Case]:
    causal: dict[str, Any] = {"mask": masks.Causal(), "small_tokens": (1000,)}
    opened: dict[str, Any] = {"mask": masks.Causal(), "small_tokens": (777,), "lengths": (1, 17, 4096, 4097, 65536)}
    return [
        _case("causal d64", (16384,), 16, head_dim=64, **causal),
        _case("causal d128", (16384,), 16, quick=True, **causal),
        _case("causal GQA, lse", (16384,), 32, key_heads=8, outputs=("output", "lse"), **causal),
        _case("causal float32", (4096,), 16, head_dim=64, dtype="float32", **causal),
        _case("open lengths", (16384,), 16, quick=True, open_lengths=True, **opened),
    ]


def _masked() -> list[Case]:
    near, nearer = masks.SlidingWindow(left=4095, right=0), masks.SlidingWindow(left=200, right=0)
    labels = masks.Segments() & masks.Causal()
    return [
        _case("window 4096", (32768,), 16, near, (1000,), nearer, quick=True),
        _case("packed documents", (32768,), 16, labels, (1000,), quick=True),
    ]


def _mapped() -> list[Case]:
    causal: dict[str, Any] = {"mask": masks.Causal(), "small_tokens": (1000,)}
    near, nearer = masks.SlidingWindow(left=1023, right=1024), masks.SlidingWindow(left=150, right=150)
    bias: dict[str, Any] = {"scores": (scores.RelativeBias(extent=(13, 13)),), "head_dim": 64}
    return [
        _case("causal sigmoid", (8192,), 16, normalizer=normalizers.Sigmoid(bias=-math.log(8192)), **causal),
        _case("window relu", (16384,), 16, near, (1000,), nearer, normalizer=normalizers.ReLU()),
        _case("causal gated", (16384,), 16, gate=gates.Output(), quick=True, **causal),
        _case("causal softcap alibi", (8192,), 16, scores=(scores.Softcap(cap=30.0), scores.Alibi()), **causal),
        _case("2-D 13x13 relative bias", (128, 128), 12, masks.Neighborhood(window=13), (25, 30), **bias),
        _case("2-D 13x13 dilated 4", (128, 128), 12, masks.Neighborhood(window=13, dilation=4), (54, 53)),
    ]


def _broad(case: Case) -> Case:
    return replace(case, plain=False)


def _vocabulary() -> list[Case]:
    """What else a spec may say, a case for each part that a kernel prints code for."""
    line: dict[str, Any] = {"tokens": (8192,), "heads": 8, "small_tokens": (1000,)}
    causal: dict[str, Any] = {**line, "mask": masks.Causal()}
    by_head, fewer = (masks.PerHead(masks=tuple(masks.SlidingWindow(left=n, right=0) for n in left)) for left in ((511, 2047), (60, 250)))
    blocks = masks.BlockTable(q_block=(128,), k_block=(128,), per_batch=False)
    routed: dict[str, Any] = {"routing": routing.MixtureOfHeads(top_k=4)}
    packed: dict[str, Any] = {"token_scales": ("q", "k", "v"), "addend": True, "key_heads": 4, "gate": gates.Output(granularity="packed")}
    return [
        _case("causal sinks", **causal, normalizer=normalizers.Softmax(sink="per_head"), outputs=("output", "lse")),
        _case("causal key and value sink", **causal, normalizer=normalizers.Softmax(sink="key_value")),
        _case("causal softplus", **causal, normalizer=normalizers.PositiveRatio(row_scale=(0.5, 1.0))),
        _case("causal entmax", **causal, normalizer=normalizers.Entmax()),
        _case("causal LSSAR", **causal, normalizer=normalizers.LSSAR(power=2.0)),
        _case("causal relu mean", **causal, normalizer=normalizers.ReLU(power=2.0, divisor="allowed")),
        _case("causal rotary, QK-norm", **causal, loads=(loads.QKNorm(weights=True), loads.Rotary()), quick=True),
        _case("2-D rotary neighborhood", (64, 64), 8, masks.Neighborhood(window=13), (25, 30), loads=(loads.Rotary(),)),
        _case("documents by bounds", **line, mask=masks.Documents(mask=masks.Causal()), quick=True),
        _case("windows by head", **line, mask=by_head, small_mask=fewer),
        _case("block table", **line, mask=blocks),
        _case("disc", (96, 96), 8, masks.Disc(radius=9), (25, 30)),
        _case("half of the heads", **causal, **routed, quick=True),
        _case("half of the heads, 2-D", (96, 96), 8, masks.Neighborhood(window=13), (25, 30), **routed),
        _case("dense bias", (4096,), 8, masks.Full(), (500,), scores=(scores.DenseBias(per_batch=False),)),
        _case("T5 buckets", **causal, scores=(scores.T5Bias(),)),
        _case("weights times a table", **causal, factor=scores.RelativeBias(extent=(512,), table="urpe")),
        _case("packed gate, scales, addend", **causal, **packed),
    ]


def _spatial() -> list[Case]:
    video, small = (18, 24, 24), (6, 8, 9)
    return [
        _case("FLUX 80x80", FLUX, 24, masks.Neighborhood(window=80), (40, 44), masks.Neighborhood(window=18)),
        _case(
            "FLUX 80x80 stride 16",
            FLUX,
            24,
            masks.Neighborhood(window=80, stride=16),
            (40, 44),
            masks.Neighborhood(window=18, stride=8),
            quick=True,
        ),
        _case("HunyuanVideo 18x24x24", HUNYUAN, 24, masks.Neighborhood(window=video), (10, 12, 14), masks.Neighborhood(window=small)),
        _case(
            "HunyuanVideo stride 16x8x8",
            HUNYUAN,
            24,
            masks.Neighborhood(window=video, stride=(16, 8, 8)),
            (10, 12, 14),
            masks.Neighborhood(window=small, stride=(5, 4, 4)),
            quick=True,
        ),
    ]


def _case(
    name: str,
    tokens: Shape,
    heads: int,
    mask: Any,
    small_tokens: Shape,
    small_mask: Any = None,
    quick: bool = False,
    open_lengths: bool = False,
    lengths: tuple[int, ...] = (),
    **fields: Any,
) -> Case:
    """A case in bfloat16 with heads of 128, unless `fields` say else; the small spec has the same ratio of heads."""
    common: dict[str, Any] = {"head_dim": 128, "dtype": "bfloat16", **fields}
    fewer: dict[str, Any] = {f: CHECK_HEADS * common[f] // heads for f in ("key_heads", "value_heads") if f in common}
    grids = [(None,) * len(tokens)] * 2 if open_lengths else [tokens, small_tokens]
    full: dict[str, Any] = {**common, "tokens": grids[0], "heads": heads, "mask": mask}
    small: dict[str, Any] = {**full, "tokens": grids[1], "heads": CHECK_HEADS, "mask": small_mask or mask, **fewer}
    return Case(name, AttentionSpec.model_validate(full), AttentionSpec.model_validate(small), tokens, small_tokens, quick, lengths)


# ---- the same for FlexAttention ------------------------------------------------------------------------------------------------------


def flex_mask(spec: AttentionSpec, tokens: Shape, inputs: Tensors) -> rivals.Mod:
    """The mask as FlexAttention takes it.

    Raises:
        ValueError: a mask that no case has, so that nobody wrote it down here.
    """
    match spec.mask:
        case masks.Causal(align="top_left"):
            return rivals.causal
        case masks.SlidingWindow(left=int(left), right=int(right), align="top_left"):
            return rivals.window(left, right)
        case masks.And(masks=(masks.Segments(), masks.Causal())):
            return rivals.documents(inputs["segments"], and_causal=True)
        case masks.Neighborhood(causal=False):
            window, stride, dilation, _ = zip(*spec.mask.axes(len(tokens)))
            return rivals.neighborhood(tokens, window, stride, dilation)
    raise ValueError(f"no FlexAttention form of {spec.mask}")


def flex_score(spec: AttentionSpec, tokens: Shape, inputs: Tensors) -> rivals.Mod | None:
    """The score maps as FlexAttention takes them."""
    match spec.scores:
        case ():
            return None
        case (scores.Softcap(cap=cap), scores.Alibi()):
            return rivals.softcap_alibi(cap, inputs["q"].new_tensor(standard_slopes(spec.heads)).float())
        case (scores.RelativeBias(table=name),):
            return rivals.relative_bias(inputs[name], tokens)
    raise ValueError(f"no FlexAttention form of {spec.scores}")


def names(given: Sequence[str], quick: bool) -> list[str]:
    """Names of the cases to run.

    Raises:
        ValueError: a name that no case has.
    """
    known = {case.name: case for case in cases()}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"no case is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return list(given) or [name for name, case in known.items() if case.quick or not quick]
