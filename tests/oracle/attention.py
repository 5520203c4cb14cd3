"""Dense attention from the JSON form of a spec: float64 for truth, the tensors' own dtype for error levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracle.loads import loaded
from tests.oracle.masks import Indices, Inputs, Spec, concrete, dense_mask, indices
from tests.oracle.padding import columns, policy
from tests.oracle.rows import entmax, lssar


def attention(spec: Spec, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """Attention in float64, differentiable in q, k, v and every floating-point run-time input.

    q ``[B, Hq, Nq, D]``, k ``[B, Hk, Nk, D]``, v ``[B, Hv, Nk, Dv]``; ``inputs`` holds gate, relative_bias,
    alibi_slopes and the mask's tables, as the spec needs. Returns output ``[B, Hq, Nq, Dv]`` and lse ``[B, Hq, Nq]``
    (natural log; absent for a pointwise normalizer). A row with no key has output 0 before the gate, lse -inf and zero
    gradients. Gradients arrive in the dtype of the leaf: pass float64 leaves for float64 gradients. A null axis is
    inferred from the tensors where each grid has at most one; otherwise pass `concrete(spec, lengths)`.
    """
    return _dense(spec, q, k, v, inputs, torch.float64)


def dense_in_dtype(spec: Spec, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """The same formula with every intermediate in the dtype of q: the error a plain dense implementation makes."""
    return _dense(spec, q, k, v, inputs, q.dtype)


def _dense(spec: Spec, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    spec = _with_lengths(spec, q.shape[2], k.shape[2])
    q, k = (loaded(spec, x.to(dtype), side, inputs) for x, side in ((q, "q"), (k, "k")))
    q, k, v = (_per_query_head(x.to(dtype), spec["heads"]) for x in (q, k, v))
    allowed = torch.from_numpy(dense_mask(spec, inputs, len(q))).to(q.device)
    q, k, v = (x * _token_scale(spec, side, inputs, x) for side, x in zip("qkv", (q, k, v)))
    normalizer, scores = spec.get("normalizer", {"kind": "softmax"}), _scores(spec, q, k, inputs)
    if normalizer.get("sink") is not None:
        # A sink is one more key, which every query may see, and one more value.
        column, value = _sink(spec, normalizer["sink"], q, inputs)
        scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)
        v = torch.cat([v, value.expand(*v.shape[:2], 1, v.shape[3])], dim=2)
        allowed = torch.cat([allowed, torch.ones_like(allowed[..., :1])], dim=-1)
    if normalizer["kind"] == "softmax" and (edge := policy(spec.get("mask", {"kind": "full"}))) is not None:
        # Elsewhere only keys of zeros may be missing, whose values add nothing.
        seen = torch.from_numpy(columns(spec["mask"], indices(spec, len(q)))).to(q.device)
        key, value = _padded(spec, edge, q, v, inputs)
        beside = _scores(spec, q, key.expand(-1, -1, seen.shape[3], -1), inputs)
        scores = torch.cat([scores, beside.expand(*scores.shape[:3], -1)], dim=-1)
        v = torch.cat([v, value.expand(*v.shape[:2], seen.shape[3], -1)], dim=2)
        shape = (max(len(allowed), len(seen)), max(allowed.shape[1], seen.shape[1]), seen.shape[2], -1)
        allowed = torch.cat([allowed.expand(shape), seen.expand(shape)], dim=-1)
    weights, lse = _normalize(normalizer, scores, allowed, indices(spec, len(q)), inputs)
    if (factor := spec.get("factor")) is not None:
        # Of a sink, which stands behind the keys, nothing is said.
        by_pair = torch.as_tensor(_mapped(spec, factor, scores.new_zeros(()), indices(spec, len(q)), inputs), dtype=scores.dtype)
        by_pair = by_pair.expand(*scores.shape[:3], k.shape[2])
        weights = torch.cat([weights[..., : k.shape[2]] * by_pair, weights[..., k.shape[2] :]], dim=-1)
    output, lse = _route(spec.get("routing"), weights @ v, lse, inputs)
    if spec.get("addend"):
        output = output + inputs["addend"].to(output.dtype)
    return {"output": _gate(spec.get("gate"), output, inputs)} | lse


def _with_lengths(spec: Spec, nq: int, nk: int) -> Spec:
    lengths = []
    for axes, size in ((spec["tokens"], nq), (spec.get("key_tokens") or [], nk)):
        if None in axes:
            lengths.append(size // math.prod(n for n in axes if n is not None))
    return concrete(spec, lengths)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """Head j of ``x`` serves the query heads h with h // (heads / x's heads) == j."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _scores(spec: Spec, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
    steps = [step for step in spec.get("scores", []) if step["kind"] != "scale"]
    s = q @ k.mT * _scale(spec)
    at = indices(spec, len(q))
    for step in steps:
        s = _mapped(spec, step, s, at, inputs)
    return s


def _mapped(spec: Spec, step: Spec, s: Tensor, at: Indices, inputs: Inputs) -> Tensor:
    match step["kind"]:
        case "softcap":
            return step["cap"] * torch.tanh(s / step["cap"])
        case "alibi":
            return s - _alibi(step, spec["heads"], at, inputs, s.device).to(s.dtype)
        case "relative_bias":
            return s + _relative_bias(step, at, inputs, s.device).to(s.dtype)
        case "temperature":
            return s * _indexed(step["table"], step["index"], at, inputs).to(s.dtype)
        case "bias":
            return s + _indexed(step["table"], step["index"], at, inputs).to(s.dtype)
        case "dense_bias":
            return s + inputs[step.get("table", "bias")].to(s.dtype)
        case "t5_bias":
            buckets = t5_buckets(step, int(at["nq"]), int(at["nk"]))
            return s + inputs[step.get("table", "t5_bias")][:, torch.from_numpy(buckets).to(s.device)].to(s.dtype)
        case "expression":
            return _expression(step, s, at, inputs)
    raise ValueError(f"score map {step['kind']!r} is unknown, or not in its place")


def _token_scale(spec: Spec, side: str, inputs: Inputs, x: Tensor) -> Tensor:
    """What a row of an operand is multiplied by, ``[B, H, N, 1]``."""
    if side not in spec.get("token_scales", ()):
        return x.new_ones(())
    return _per_query_head(inputs[f"{side}_scale"], spec["heads"]).to(x.dtype)[..., None]


def _scale(spec: Spec) -> float:
    first = (spec.get("scores") or [{}])[0]
    return first["value"] if first.get("kind") == "scale" else spec["head_dim"] ** -0.5


def _alibi(step: Spec, heads: int, at: Indices, inputs: Inputs, device: torch.device) -> Tensor:
    """slope * distance, ``[H, Nq, Nk]``; the last query stands on the last key."""
    distance = np.abs(at["q"] + at["nk"] - at["nq"] - at["k"])[0]
    slopes = inputs["alibi_slopes"] if step.get("trainable") else step.get("slopes") or alibi_slopes(heads)
    return torch.as_tensor(slopes, dtype=torch.float64, device=device).view(-1, 1, 1) * torch.from_numpy(distance).to(device)


def alibi_slopes(heads: int) -> list[float]:
    """The standard slopes: geometric for a power of two, else completed by every other slope of twice that power."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[0::2][: heads - power]


def _indexed(name: str, index: Sequence[str], at: Indices, inputs: Inputs) -> Tensor:
    table = inputs[name]
    places = torch.broadcast_tensors(*[torch.from_numpy(at[i]) for i in index])
    found: Tensor = table[tuple(place.to(table.device) for place in places)]
    return found


def t5_buckets(step: Spec, nq: int, nk: int) -> np.ndarray:
    """T5's bucket of every pair, int64 ``[Nq, Nk]``: distances in fractions, so that a limit is never missed by rounding."""
    both = step.get("bidirectional", True)
    half = step.get("buckets", 32) // (2 if both else 1)
    exact, farthest = half // 2, step.get("max_distance", 128)

    def one_side(n: int) -> int:
        if n < exact:
            return n
        larger = 0  # the greatest j with (farthest / exact) ** j <= (n / exact) ** (half - exact)
        while larger < half - exact and Fraction(farthest, exact) ** (larger + 1) <= Fraction(n, exact) ** (half - exact):
            larger += 1
        return min(exact + larger, half - 1)

    def bucket(ahead: int) -> int:
        if both:
            return (half if ahead > 0 else 0) + one_side(abs(ahead))
        return one_side(max(-ahead, 0))

    return np.array([[bucket(k - q) for k in range(nk)] for q in range(nq)], dtype=np.int64)


def _expression(step: Spec, s: Tensor, at: Indices, inputs: Inputs) -> Tensor:
    """Python's own reading of the text, which is safe for texts of our own tests only."""

    class Reads:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, index: Any) -> Tensor:
            places = torch.broadcast_tensors(*map(torch.as_tensor, index if isinstance(index, tuple) else (index,)))
            table = inputs[self.name]
            found = table[tuple(place.clamp(0, n - 1) for place, n in zip(places, table.shape, strict=True))]
            return found.to(s.dtype) if found.is_floating_point() else found.long()

    functions = {
        "tanh": torch.tanh,
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
        "select": torch.where,
        "pow": torch.pow,
        "inf": math.inf,
        "float": lambda x: x.to(s.dtype),
    }
    places = {name: torch.from_numpy(np.asarray(x)) for name, x in at.items()}
    names = {**functions, **places, "s": s, "abs": torch.abs, **{name: Reads(name) for name in inputs}}
    found: Tensor = eval(step["text"], {"__builtins__": {}}, names)  # noqa: S307 (text of our own)
    return found


def _relative_bias(step: Spec, at: Indices, inputs: Inputs, device: torch.device) -> Tensor:
    """table[h, k - q per axis, clipped to the extent], ``[H, Nq, Nk]``."""
    table = inputs[step.get("table", "relative_bias")]
    offsets = [(e - 1, at[f"k{axis}"] - at[f"q{axis}"]) for axis, e in enumerate(step["extent"])]
    index = [torch.from_numpy(np.clip(offset, -far, far)[0, 0] + far).to(device) for far, offset in offsets]
    return table[(slice(None), *index)]


def _padded(spec: Spec, edge: str, q: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Key and value, ``[1, H or 1, 1, width]``, of a token beyond the grid."""
    if edge == "zero_pad":
        return q.new_zeros(1, q.shape[1], 1, q.shape[3]), v.new_zeros(1, 1, 1, v.shape[3])
    key, value = (_per_query_head(inputs[name].to(q.dtype)[None, :, None], spec["heads"]) for name in ("k_pad", "v_pad"))
    return key, value


def _sink(spec: Spec, sink: Any, q: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Score ``[B or 1, H, Nq or 1, 1]`` and value ``[1, H or 1, 1, Dv or 1]`` of the key beside all others."""
    zero = q.new_zeros(1, 1, 1, 1)
    match sink:
        case "per_head":
            return inputs["sink"].to(q.dtype)[None, :, None, None], zero
        case "per_query":
            return inputs["sink"].to(q.dtype)[None, :, :, None], zero
        case "per_batch_query":
            return inputs["sink"].to(q.dtype)[..., None], zero
        case "key_value":
            key, value = (_per_query_head(inputs[name].to(q.dtype)[None, :, None], spec["heads"]) for name in ("k_bias", "v_bias"))
            return q @ key.mT * _scale(spec), value
    return zero + float(sink), zero


def _normalize(normalizer: Spec, s: Tensor, allowed: Tensor, at: Indices, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights, 0 where not allowed, and as ``lse`` the log of the denominator."""
    match normalizer["kind"]:
        case "sigmoid":
            bias = normalizer.get("bias", 0.0)
            match bias:
                case "minus_log_keys":
                    bias = -math.log(s.shape[-1])
                case "per_head":
                    bias = inputs["sigmoid_bias"].to(s.dtype)[None, :, None, None]
                case "per_batch_head":
                    bias = inputs["sigmoid_bias"].to(s.dtype)[:, :, None, None]
            return torch.sigmoid(s + bias).masked_fill(~allowed, 0.0), {}
        case "relu":
            weights = torch.relu(s).masked_fill(~allowed, 0.0) ** normalizer.get("power", 1.0)
            return weights / _divisor(normalizer.get("divisor"), s, allowed, at), {}
        case "positive_ratio":
            weights = POSITIVE[normalizer.get("weight", "softplus")](s * _row_scale(normalizer.get("row_scale"), at, inputs).to(s))
            weights = weights.masked_fill(~allowed, 0.0)
            total = weights.sum(dim=-1) + normalizer.get("epsilon", 0.0)
            return weights / torch.where(total == 0, 1.0, total)[..., None], {"lse": total.log()}
        case "entmax":
            return entmax(float(normalizer.get("alpha", 1.5)), s, allowed), {}
        case "lssar":
            scaled = s * _row_scale(normalizer.get("row_scale"), at, inputs).to(s)
            place = torch.from_numpy(at["q"] + at["nk"] - at["nq"] + 1)
            weights, lse = lssar(normalizer, scaled, allowed, place)
            return weights, {"lse": lse}
        case "softmax":
            # A score of -inf masks its pair. The softmax of -inf alone is NaN, so an empty row has scores of 0 and is
            # erased afterwards; that stops its gradients too.
            allowed = allowed & (s != -torch.inf)
            empty = ~allowed.any(dim=-1, keepdim=True)
            s = s.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
            weights = torch.softmax(s, dim=-1).masked_fill(~allowed, 0.0)
            return weights, {"lse": torch.logsumexp(s, dim=-1).masked_fill(empty[..., 0], -torch.inf)}
    raise ValueError(f"normalizer {normalizer['kind']!r} is unknown")


def _route(routing: Spec | None, output: Tensor, lse: dict[str, Tensor], inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Every head's row times its factor; a row that no router chose is erased, and its lse is that of a row without keys."""
    if routing is None:
        return output, lse
    if routing["kind"] == "head_scale":
        factor = inputs["head_scale"].to(output.dtype)
        return output * (factor[:, :, None, None] if factor.dim() == 2 else factor[:, None, None]), lse
    chosen, factor = _chosen(routing, output, inputs)
    return torch.where(chosen[..., None], output, 0.0) * factor[..., None], {
        name: x.masked_fill(~chosen, -torch.inf) for name, x in lse.items()
    }


def _chosen(routing: Spec, output: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Chosen rows and their factors, each ``[B, H, Nq]``."""
    rows = output.shape[:3]
    if routing["kind"] == "head_mask":
        on = inputs["head_mask"].bool()
        return (on if on.dim() == 2 else on[None])[..., None].expand(rows), output.new_ones(rows)
    weights, shared = inputs["routing"].to(output.dtype), routing.get("shared", 0)
    chosen, factor = weights != 0, weights
    if routing["kind"] == "relu":
        chosen, factor = weights > 0, torch.cat([weights[:, :shared], torch.relu(weights[:, shared:])], dim=1)
    always = torch.zeros_like(chosen)
    always[:, :shared] = True
    return chosen | always, factor


POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": lambda s: torch.logaddexp(s, torch.zeros_like(s)),
    "sigmoid": torch.sigmoid,
    "elu_plus_one": lambda s: torch.where(s > 0, s + 1, torch.exp(s.clamp(max=0))),  # elu is rounded to what is left beside -1
    "exp(min(s, 3.0)) + 0.25": lambda s: torch.exp(s.clamp(max=3.0)) + 0.25,
    "select(s > 1, sqrt(abs(s) + 2), abs(tanh(s)))": lambda s: torch.where(s > 1, (s.abs() + 2).sqrt(), torch.tanh(s).abs()),
    "pow(abs(s) + 1, 1.5)": lambda s: (s.abs() + 1) ** 1.5,
}
"""Weights of a positive ratio; for those given as formulas, what the formula means."""


def _row_scale(scale: Any, at: Indices, inputs: Inputs) -> Tensor:
    """What scores of a row are multiplied by, ``[.., Nq, 1]``."""
    if scale is None:
        return torch.ones(())
    if isinstance(scale, str):
        return inputs["row_scale"][..., None]
    return torch.from_numpy(scale[0] * np.log(np.maximum(at["q"] + at["nk"] - at["nq"] + 1, 1)) + scale[1])


def _divisor(kind: str | None, s: Tensor, allowed: Tensor, at: Indices) -> Tensor:
    """What a row of a pointwise normalizer is divided by, ``[.., Nq, 1]``."""
    match kind:
        case "keys":
            return s.new_tensor(s.shape[-1])
        case "allowed":
            return allowed.sum(dim=-1, keepdim=True).clamp(min=1).to(s.dtype)
        case "position":
            place = at["q"] + at["nk"] - at["nq"] + 1
            return torch.from_numpy(np.maximum(place, 1)).to(s)
    return s.new_ones(())


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "identity": lambda g: g,
}


def _gate(gate: Spec | None, output: Tensor, inputs: Inputs) -> Tensor:
    if gate is None:
        return output
    g, heads = inputs["gate"].to(output.dtype), output.shape[1]
    if gate["granularity"].startswith("packed"):
        # Query head h: key head h // group, and of its row the part h % group.
        group = heads // g.shape[1]
        parts = [g[:, h // group].chunk(group, dim=-1)[h % group] for h in range(heads)]
        g = torch.stack(parts, dim=1)
    elif gate["granularity"] == "per_key_head":
        g = _per_query_head(g, heads)
    activated = GATES[gate["activation"]](g)
    return {"multiply": output * activated, "add": output + activated}[gate["mode"]]
