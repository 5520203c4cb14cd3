"""Plans of two kernels, one of which keeps a number of each row for the other, compiled for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from attncc import AttentionSpec, normalizers, pipeline
from attncc.codegen.aot import Job, compile_in_subprocess
from attncc.codegen.facts import Facts
from attncc.codegen.module import emit
from attncc.codegen.signature import default_specialization
from attncc.targets import target

PARTS: dict[str, normalizers.NormalizerSpec] = {
    "entmax": normalizers.Entmax(),
    "sparsemax": normalizers.Entmax(alpha=2),
    "re-weighted": normalizers.LSSAR(power=3, row_scale=(0.5, 1.0)),
}


@pytest.mark.parametrize(
    ("part", "name"),
    [*((part, "sm_90") for part in PARTS), ("entmax", "sm_100"), ("entmax", "gfx942"), ("sparsemax", "sm_80"), ("re-weighted", "sm_80")],
)
def test_both_kernels_compile_and_nothing_spills(part: str, name: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"tokens": (None,), "heads": 4, "key_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    spec, record = AttentionSpec(**fields, normalizer=PARTS[part]), target(name)
    plan = pipeline.plan(spec, name)
    path = tmp_path / "kernels.py"
    path.write_text(emit(plan, spec.to_json(indent=None)))
    every = [Facts(kernel, record) for kernel in plan.kernels]
    assert len(every) == 2
    made = compile_in_subprocess([Job(path, f.plan.name, default_specialization(f), record, f.options) for f in every])
    assert [each.problems(record) for each in made] == [[], []]
    assert [each.resources.spills for each in made] == [0, 0]
