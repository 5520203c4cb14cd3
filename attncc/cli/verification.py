"""Compares a kernel with the dense reference in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attncc.cli.calling import prepared
from attncc.passes.given import Lengths
from attncc.runtime.reference import reference
from attncc.spec.attention import AttentionSpec
from attncc.spec.lower import lower

LIMITS = {torch.float64: 1e-12}
OTHERWISE = 1e-5
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One result against the reference.

    `overall` is |a - b| / |b|; `worst_row` the greatest |a_i - b_i| / |b_i| of a row, where a row shorter than the mean counts as the
    mean (the gradient of a query that sees one key is 0, its rounding errors are not); `dense` the overall error of the dense formula
    in the spec's own type, which no kernel can be asked to beat.
    """

    name: str
    overall: float
    worst_row: float
    dense: float
    ok: bool

    def to_data(self) -> dict[str, Any]:
        """The comparison as JSON data."""
        return asdict(self)


def verified(spec: AttentionSpec, target: str, lengths: Lengths, batch: int, seed: int, say: Callable[[str], Any]) -> list[Comparison]:
    """Errors of outputs and gradients of a compiled kernel on random inputs.

    Args:
        spec: what is computed.
        target: as for `attncc.compile`.
        lengths: tokens of each axis that the spec leaves open.
        batch: batch elements.
        seed: of the random inputs.
        say: told what is being done.

    Raises:
        AttnccError: whatever compiling or calling refuses.
    """
    call, graph = prepared(spec, target, lengths, batch, seed), lower(spec)
    dtype = call.tensors["q"].dtype
    say("running the kernel")
    ours = _results(call.run, call.tensors, seed)
    say("running the reference")
    exact = _results(lambda x: reference(graph, x, call.query, call.key), _wide(call.tensors), seed)
    dense = _results(lambda x: reference(graph, x, call.query, call.key, dtype), call.tensors, seed)
    return [_compared(name, ours[name], exact[name], dense[name], dtype) for name in exact]


def _wide(tensors: Tensors) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def _results(run: Callable[[Tensors], dict[str, Tensor]], tensors: Tensors, seed: int) -> dict[str, Tensor]:
    """Outputs by name and, as `d name`, the gradients of a random scalar in them."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(seed + 1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype).to(x.device) for x in outputs.values()]
    floats = [name for name, x in leaves.items() if x.requires_grad]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        list(outputs.values()), [leaves[name] for name in floats], cotangents, allow_unused=True
    )
    gradients = {f"d {name}": torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(floats, found)}
    return {name: x.detach().double() for name, x in (outputs | gradients).items()}


def _compared(name: str, ours: Tensor, exact: Tensor, dense: Tensor, dtype: torch.dtype) -> Comparison:
    overall, worst = _errors(ours, exact)
    yardstick, yardstick_worst = _errors(dense, exact)
    limit = LIMITS.get(dtype, OTHERWISE)
    # NaN is in no order, so ask for what is right, not for what is wrong.
    ok = overall <= max(limit, 2 * yardstick) and worst <= max(10 * limit, 2 * yardstick_worst)
    return Comparison(name, overall, worst, yardstick, ok)


def _errors(ours: Tensor, exact: Tensor) -> tuple[float, float]:
    """(overall, worst row). Infinite entries, log-sum-exps of rows without a key, must be equal."""
    infinite = torch.isinf(exact)
    if not torch.equal(ours[infinite], exact[infinite]):
        return float("inf"), float("inf")
    ours, exact = (x.masked_fill(infinite, 0.0).reshape(-1, x.shape[-1]) for x in (ours, exact))
    error, size = (ours - exact).norm(dim=1), exact.norm(dim=1)
    total, mean = float(exact.norm()), float(size.mean())
    if total == 0.0:
        return float(error.norm()), float(error.max())
    return float((ours - exact).norm()) / total, float((error / size.clamp(min=mean)).max())
