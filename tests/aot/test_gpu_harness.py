"""The GPU harness on a machine without a GPU: it says so, and rehearses everything up to the launch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from benchmarks.gpu import cases  # noqa: E402
from benchmarks.gpu.__main__ import main  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """As a user starts it: from the checkout, with nothing installed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU" in done.stderr and "--dry-run" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "target"),
    [("packed documents", "sm_80"), ("HunyuanVideo stride 16x8x8", "sm_90"), ("2-D 13x13 relative bias", "sm_90")],
)
def test_rehearsal(name: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--dry-run", "--case", name, "--target", target, "--workers", "1"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert name in printed and "nothing was launched" in printed


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--case", "nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_cases_are_named_once_and_cover_what_kernels_can_do() -> None:
    found = cases.cases()
    assert len({case.name for case in found}) == len(found) >= 14
    assert {case.spec.normalizer.kind for case in found} == {"softmax", "sigmoid", "relu", "positive_ratio", "entmax", "lssar"}
    assert {score.kind for case in found for score in case.spec.scores} >= {"softcap", "alibi", "relative_bias"}
    assert {case.spec.mask.kind for case in found} >= {"causal", "sliding_window", "and", "neighborhood"}
    assert {case.spec.grid.rank for case in found} == {1, 2, 3}
    for feature in ("gate", "key_heads", "loads", "routing", "token_scales", "addend", "factor"):
        assert any(getattr(case.spec, feature) for case in found)
    assert any(case.lengths for case in found)
    quick = [case for case in found if case.quick]
    assert found[: len(quick)] == quick and 5 <= len(quick) <= 12


@pytest.mark.parametrize("case", cases.cases(), ids=lambda case: case.name)
def test_the_checked_spec_is_the_timed_one_at_another_size(case: cases.Case) -> None:
    full, small = case.spec, case.small
    same = ("dtype", "head_dim", "value_dim", "scores", "normalizer", "gate", "outputs")
    assert all(getattr(full, field) == getattr(small, field) for field in same)
    assert full.mask.kind == small.mask.kind
    ratios = [[spec.heads // n for n in spec.head_counts] for spec in (full, small)]
    assert ratios[0] == ratios[1]
