"""What is said of a kernel before it is compiled, held against the compiled one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from attncc import AttentionSpec, loads, masks, pipeline, scores
from attncc.codegen.aot import Job, compile_in_subprocess
from attncc.codegen.facts import Facts
from attncc.codegen.loads import PREPARE
from attncc.codegen.module import emit
from attncc.codegen.signature import default_specialization, prepare_specialization
from attncc.passes.footprint import Configuration, shared_bytes
from attncc.targets import target

PLAIN = {"mask": masks.Causal()}
RICH = {"mask": masks.Causal() & masks.Segments(), "scores": (scores.Softcap(cap=30.0), scores.Alibi())}
CASES = [
    ("sm_80", "bfloat16", 64, PLAIN),
    ("sm_80", "float32", 128, RICH),
    ("sm_90", "bfloat16", 128, PLAIN),
    ("sm_100", "bfloat16", 128, PLAIN),
    ("gfx942", "bfloat16", 64, RICH),
]


@pytest.mark.parametrize(("name", "dtype", "head_dim", "parts"), CASES)
def test_shared_memory_is_bounded_and_nothing_spills(name: str, dtype: Any, head_dim: int, parts: dict, tmp_path: Path) -> None:
    spec = AttentionSpec(tokens=(None,), heads=4, key_heads=2, head_dim=head_dim, dtype=dtype, **parts)
    record, plan = target(name), pipeline.plan(spec, name)
    kernel = plan.kernels[0]
    path = tmp_path / "kernel.py"
    path.write_text(emit(plan, spec.to_json(indent=None)))
    facts = Facts(kernel, record)
    (made,) = compile_in_subprocess([Job(path, kernel.name, default_specialization(facts), record, facts.options)])
    configuration = Configuration(kernel.q_tile[0], kernel.k_tile[0], kernel.num_warps, kernel.num_stages, 1.0)
    assert made.shared_bytes <= shared_bytes(kernel.graph, configuration, record) <= record.shared_bytes
    assert made.resources.spills == 0


@pytest.mark.parametrize(("name", "head_dim"), [("sm_80", 128), ("sm_90", 64), ("gfx942", 256)])
def test_keys_are_made_ready_in_registers(name: str, head_dim: int, tmp_path: Path) -> None:
    loaded = (loads.Rotary(pairs="interleaved"), loads.QKNorm(norm="l2"))
    spec = AttentionSpec(tokens=(None,), heads=4, head_dim=head_dim, dtype="float16", loads=loaded)
    record, plan = target(name), pipeline.plan(spec, name)
    path = tmp_path / "kernel.py"
    path.write_text(emit(plan, spec.to_json(indent=None)))
    special = prepare_specialization(Facts(plan.kernels[0], record))
    (made,) = compile_in_subprocess([Job(path, PREPARE, special, record, {})])
    assert made.problems(record) == []


def test_what_a_mask_computes_takes_registers() -> None:
    """Values of keys beyond two shrink the tile; the second of these masks differs from the first by nothing else."""
    few, many = "s0[b, k] == b or s1[b, k] == q", "s0[b, k] == b or s1[b, k] == q or s2[b, k] == q or s3[b, k] == q"
    specs = [AttentionSpec(tokens=(4096,), heads=4, head_dim=32, mask=masks.Predicate(text=text)) for text in (few, many)]
    tiles = [pipeline.plan(spec, "sm_90").kernels[0].k_tile for spec in specs]
    assert tiles == [(128,), (64,)]
