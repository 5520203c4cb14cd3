"""Pictures of a report: every kind is written as PNG and SVG, and says why where it cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attncc import AttentionSpec, simulate
from attncc.errors import InputError, UnsupportedError
from attncc.simulator.measured import read_measured

pytest.importorskip("matplotlib")
GRID: dict[str, Any] = {"tokens": [8, 16, 16], "heads": 2, "head_dim": 64, "dtype": "bfloat16"}
WINDOW = {"kind": "neighborhood", "window": [4, 8, 8]}


def report_of(target: str = "h100", **changes: Any) -> Any:
    return simulate(AttentionSpec.model_validate({**GRID, "mask": WINDOW, **changes}), target)


@pytest.mark.parametrize("kind", ["mask", "window", "curves", "roofline", "timeline"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_kind_is_written(tmp_path: Path, kind: Any, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    report_of().plot(path, kind)
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_what_cannot_be_drawn_says_why() -> None:
    with pytest.raises(UnsupportedError, match="architecture"):
        report_of("sm_90").plot(kind="roofline")
    with pytest.raises(InputError, match="kind"):
        report_of().plot(kind="pie")
    with pytest.raises(InputError, match="two or three axes"):
        report_of(tokens=[256], mask={"kind": "causal"}).plot(kind="window")


def test_measured_points_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"kernel_ms": 2.0, "dense_ms": 5.0, "device": "a GPU"}]))
    measured = read_measured(path)
    lines = {line.get_label(): line for line in report_of().plot(kind="curves", measured=measured).axes[0].lines}
    assert list(lines["measured on a GPU"].get_ydata()) == [2.5]
    path.write_text('[{"kernel_ms": 2.0}]')
    with pytest.raises(InputError, match="dense_ms"):
        read_measured(path)
