"""A compiled spec with random tensors to call it on: what `verify` and `bench` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncc import api
from attncc.passes.given import Lengths, known_grid
from attncc.passes.tiles import Shape
from attncc.runtime.kernel import Kernel
from attncc.runtime.sample import sample
from attncc.runtime.signature import signature
from attncc.spec.attention import AttentionSpec
from attncc.spec.routing import MixtureOfHeads
from attncc.targets import target as target_record


@dataclass(frozen=True)
class Call:
    """A kernel and tensors for it by name, on the device that it runs on; `query` and `key` are tokens by axis."""

    kernel: Kernel
    tensors: dict[str, Tensor]
    query: Shape
    key: Shape

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.tensors["q"].device

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Results of the kernel by name."""
        spec = self.kernel.spec
        arguments: dict[str, Any] = {**tensors, "tokens": self.query}
        if not spec.grid.shared:
            arguments["key_tokens"] = self.key
        results = self.kernel(**arguments)
        return dict(zip(spec.outputs, results if isinstance(results, tuple) else (results,)))


def prepared(spec: AttentionSpec, target: str, lengths: Lengths, batch: int, seed: int) -> Call:
    """A spec compiled, and random tensors for it.

    Args:
        spec: what is computed.
        target: as for `attncc.compile`.
        lengths: tokens of each axis that the spec leaves open.
        batch: batch elements.
        seed: of the tensors.

    Raises:
        AttnccError: whatever compiling refuses, or missing lengths.
    """
    query, key = known_grid(spec, lengths)
    kernel = api.compile(spec, target)
    device = torch.device("cuda" if torch.cuda.is_available() and target_record(kernel.plan.target).backend != "cpu" else "cpu")
    tensors = sample(signature(kernel.plan.graphs, spec.grid.shared), query, key, batch, seed, device)
    if isinstance(spec.routing, MixtureOfHeads):
        tensors["routing"] = _routed(spec.routing, tensors["routing"])
    return Call(kernel, tensors, query, key)


def _routed(mixture: MixtureOfHeads, weights: Tensor) -> Tensor:
    """Weights `[B, H, N]` of which each token keeps as many as the spec says."""
    shared, others = weights[:, : mixture.shared], weights[:, mixture.shared :]
    chosen = others.argsort(1).argsort(1) < mixture.top_k
    return torch.cat([shared, others * chosen], dim=1)
