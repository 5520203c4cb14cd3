"""Constants from a results file of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attncc.simulator import constants
from benchmarks import calibrate
from benchmarks.gpu.cases import by_name, cases


def plain() -> list[str]:
    """Names of the cases that a fit can use."""
    return [case.name for case in cases() if list(calibrate._row(case, {"attncc": {"ms": 1.0}}))]


def test_fits_to_results_of_ones_own(tmp_path: Path) -> None:
    """Times that the model itself predicts for an overlap are fitted by that overlap."""
    pipeline = constants.Pipeline(overlap=0.3, block_cycles=2000.0, source="")
    made = constants.Constants(pipelines={"triton": pipeline}, power=constants.shipped().power)
    found = {}
    for name in plain():
        (row,) = calibrate._row(by_name(name), {"attncc": {"ms": 1.0}})
        found[name] = {"times": {"attncc": {"ms": calibrate.predicted_seconds(row, made, "triton") * 1e3}}}
    path, output = tmp_path / "results.json", tmp_path / "mine.json"
    path.write_text(json.dumps({"cases": found}))
    assert calibrate.main(["--results", str(path), "-o", str(output)]) == 0
    fitted = constants.read(output).pipelines["triton"]
    assert fitted.overlap == pytest.approx(0.3, abs=0.021)


def test_results_without_a_plain_case_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"cases": {}}))
    with pytest.raises(ValueError, match="no case of 16-bit dense or causal"):
        calibrate.from_results(path)
