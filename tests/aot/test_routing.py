"""Kernels that gather the rows of routed heads, compiled for GPUs that are not here: nothing spills, keys still come by bulk copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from attncc import AttentionSpec, gates, masks, pipeline, routing
from attncc.codegen.aot import Job, compile_in_subprocess
from attncc.codegen.facts import Facts
from attncc.codegen.module import emit
from attncc.codegen.signature import default_specialization
from attncc.targets import target

KINDS = {
    "mixture": routing.MixtureOfHeads(shared=2, top_k=4),
    "relu": routing.ReLURouting(shared=1),
    "scale": routing.HeadScale(per_batch=True),
    "mask": routing.HeadMask(),
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_nothing_spills(name: str, head_dim: int, tmp_path: Path) -> None:
    record, jobs = target(name), []
    for kind, part in KINDS.items():
        given: Any = {"key_heads": 4, "value_heads": 2, "gate": gates.Output(), "outputs": ("output", "lse"), "routing": part}
        spec = AttentionSpec(tokens=(None,), heads=8, head_dim=head_dim, dtype="bfloat16", mask=masks.Causal(), **given)
        plan = pipeline.plan(spec, name)
        path = tmp_path / f"{kind}.py"
        path.write_text(emit(plan, spec.to_json(indent=None)))
        facts = Facts(plan.kernels[0], record)
        jobs.append(Job(path, plan.kernels[0].name, default_specialization(facts), record, facts.options))
    for kind, made in zip(KINDS, compile_in_subprocess(jobs)):
        assert made.problems(record) == [], kind
        assert made.resources.spills == 0, kind
        if name == "sm_90":
            assert any("UTMALDG" in op for op in made.resources.instructions), kind
