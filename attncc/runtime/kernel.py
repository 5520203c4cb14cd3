"""`Kernel`: a compiled spec, to be called on tensors."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attncc import pipeline
from attncc.passes.plan import Plan
from attncc.runtime import autocast, cache, ops
from attncc.runtime.inputs import Tokens, checked
from attncc.runtime.program import make_programs
from attncc.runtime.signature import signature
from attncc.spec.attention import AttentionSpec
from attncc.spec.masks.combine import table_names
from attncc.targets import target

SOURCE_TARGET = "sm_90"
"""The target whose file `Kernel.source` shows for kernels that run torch."""


class Kernel:
    """A compiled spec. Call it on tensors; it differentiates, and traces under `torch.compile(fullgraph=True)`.

    Attributes:
        spec: what it computes.
        plan: how, on which target.
    """

    def __init__(self, spec: AttentionSpec, plan: Plan, flexible: bool = False) -> None:
        self.spec, self.plan, self._flexible = spec, plan, flexible
        programs = make_programs(spec, plan, flexible)
        self._signature = signature(plan.graphs, spec.grid.shared)
        self._before = [(str(p.statistic), p.name, p.signature.names) for p in programs[:-1]]
        self._name, self._reads = programs[-1].name, programs[-1].signature.names
        self._lse = "lse" in spec.outputs
        self._order = spec.outputs
        # Tables that come together: a mask may be so plain that it reads but some of them.
        self._unread = table_names(spec.mask) - set(self._signature.names)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: str = "bhsd", tokens: Tokens = None, key_tokens: Tokens = None, **inputs: Tensor
    ) -> Any:
        """The attention of some tensors.

        Args:
            q: queries `[B, Hq, Nq, D]`, tokens flattened row-major, in the spec's dtype (inside `torch.autocast`: cast to it); the last
                axis has stride 1.
            k: keys `[B, Hk, Nk, D]`.
            v: values `[B, Hv, Nk, Dv]`.
            layout: "bhsd" as above, or "bshd" for `[B, N, H, D]` (q, k, v, the gate and the output).
            tokens: the query's grid, needed where the spec leaves more than one of its axes open.
            key_tokens: the same for a key grid of its own.
            **inputs: what the spec names: `gate` `[B, Hq, Nq, Dv]`, `[B, Hq, Nq, 1]` or `[B, 1, Nq, Dv]`; integer tables (int32) such
                as `segments` `[B, Nq]`; float tables (float32) such as `relative_bias` and `alibi_slopes`, which have gradients.

        Returns:
            The output, in the layout and dtype of q; with "lse" among the spec's outputs, a tuple in their order. The log-sum-exp is
            the natural log, `[B, Hq, Nq]` in any layout, float32 (float64 for float64), -inf for a row that sees no key.

        Raises:
            InputError: an argument that does not fit the spec; it names the argument.
        """
        read = {name: x for name, x in inputs.items() if name not in self._unread}
        given = autocast.cast(self._signature, {**read, "q": q, "k": k, "v": v})
        call = checked(self._signature, given, layout, tokens, key_tokens)
        train = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *call.extras))
        known, heads_last = dict(zip(self._signature.names, call.extras)), layout == "bshd"
        for statistic, name, reads in self._before:
            _, known[statistic], _ = ops.forward(
                call.q, call.k, call.k[..., :0], [known[x] for x in reads], name, call.lengths, heads_last, train
            )
        extras = [known[x] for x in self._reads]
        out, lse, _ = ops.forward(call.q, call.k, call.v, extras, self._name, call.lengths, heads_last, train)
        if layout == "bshd":
            out = out.transpose(1, 2)
        if not self._lse:
            return out
        return (out, lse) if self._order[0] == "output" else (lse, out)

    @cached_property
    def source(self) -> str:
        """The generated Triton file. Of a kernel for the cpu, which runs torch: the file that its spec compiles to for sm_90.

        Raises:
            UnsupportedError: the spec has no Triton form.
            CacheError: a cached file that is not what attncc wrote.
        """
        printed = target(self.plan.target).backend != "cpu"
        plan = self.plan if printed else pipeline.plan(self.spec, SOURCE_TARGET)
        return cache.source(plan, self.spec.to_json(indent=None))

    def explain(self) -> str:
        """How the spec became the plan: the graph after every step, what was chosen, and what was rejected and why."""
        from attncc.runtime.explain import explain

        return explain(self.spec, self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.spec.to_json(indent=None), self.plan.to_json(), self._flexible)

    def __repr__(self) -> str:
        kernel = self.plan.kernels[-1]
        return f"Kernel({kernel.name} for {self.plan.target}, tiles {list(kernel.q_tile)} x {list(kernel.k_tile)})"


def _restored(spec: str, plan: str, flexible: bool) -> Kernel:
    return Kernel(AttentionSpec.from_json(spec), Plan.from_json(plan), flexible)
