"""Everything about a case up to the launch, on a machine without a GPU: plans, source, machine code, formulas, bounds, rivals' masks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc import AttentionSpec, pipeline
from attncc.codegen.aot import Job, compile_ahead
from attncc.codegen.facts import Facts
from attncc.codegen.module import emit
from attncc.codegen.signature import default_specialization
from attncc.passes.plan import Plan
from attncc.passes.tiles import Shape
from attncc.runtime.kernel import Kernel
from attncc.targets import target as target_record
from benchmarks.gpu.cases import Case, flex_mask, flex_score
from benchmarks.gpu.checks import AGREE, BATCH, error, formulas, inputs_of, rows_by_formula
from benchmarks.gpu.timing import bounds, counts, unmasked
from benchmarks.inputs import Tensors

Record = dict[str, Any]


def rehearse(case: Case, target: str) -> Record:
    """What can be known of a case before it runs; `ok` where nothing stands in its way."""
    full = pipeline.plan(case.spec, target)
    pipeline.plan(unmasked(case.spec), target)
    small = Kernel(case.small, pipeline.plan(case.small, target))
    differences = formula_differences(small, case)
    found = {**compiled(full, case.spec), **differences, **bounds(counts(case, Kernel(case.spec, full)))}
    found["ok"] = not found["problems"] and max(differences.values()) <= AGREE
    return found


def compiled(plan: Plan, spec: AttentionSpec) -> Record:
    """Figures of the machine code for the plan's target."""
    kernel, record = plan.kernels[-1], target_record(plan.target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kernel.name}.py"
        path.write_text(emit(plan, spec.to_json(indent=None)), encoding="utf-8")
        facts = Facts(kernel, record)
        made = compile_ahead(Job(path, kernel.name, default_specialization(facts), record, facts.options))
    return {
        "q_tile": kernel.q_tile,
        "k_tile": kernel.k_tile,
        "registers": made.resources.registers,
        "shared_bytes": made.shared_bytes,
        "problems": made.problems(record),
    }


def formula_differences(kernel: Kernel, case: Case) -> dict[str, float]:
    """Between the reference and the printed formula, the formula for sampled rows, and FlexAttention's mask and score functions."""
    tokens = case.small_tokens
    tensors = inputs_of(kernel, tokens, BATCH, "cpu", 3)
    right, printed, _ = formulas(kernel, tensors, tokens)
    out = right["output"]
    found = {"printed_formula": error(printed["output"], out)}
    if case.plain:
        rows = torch.randint(out.shape[2], (16,), generator=torch.Generator().manual_seed(0))
        found["sampled_rows"] = error(rows_by_formula(kernel.spec, tensors, tokens, 1, 2, rows), out[1, 2, rows])
    if case.has_flex:
        found["flex_functions"] = error(by_flex_functions(kernel.spec, tensors, tokens), out)
    return found


def by_flex_functions(spec: AttentionSpec, tensors: Tensors, tokens: Shape) -> Tensor:
    """What the functions given to FlexAttention mean, densely and in float64."""
    q, k, v = (tensors[name].double() for name in "qkv")
    k, v = (x.repeat_interleave(spec.heads // x.shape[1], 1) for x in (k, v))
    b, h = torch.arange(len(q))[:, None, None, None], torch.arange(spec.heads)[:, None, None]
    at = b, h, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    s = q @ k.mT * spec.head_dim**-0.5
    score = flex_score(spec, tokens, tensors)
    s = s if score is None else score(s, *at)
    out = torch.softmax(s.masked_fill(~flex_mask(spec, tokens, tensors)(*at), -torch.inf), 3) @ v
    return out if spec.gate is None else out * torch.sigmoid(tensors["gate"].double())
