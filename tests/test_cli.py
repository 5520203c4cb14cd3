"""The command line: what it prints, where, and with which exit code; bad input gets one line that names the field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from attncc import AttentionSpec
from attncc.cli.app import app
from attncc.cli.environment import warnings_for
from attncc.simulator import SpeedupReport

ROOT = Path(__file__).parents[1]
GRID = {
    "tokens": [30, 48, 80],
    "heads": 24,
    "head_dim": 128,
    "mask": {"kind": "neighborhood", "window": [18, 24, 24], "stride": [16, 8, 8]},
}
SMALL = {
    "tokens": [6, 8], "heads": 4, "key_heads": 2, "head_dim": 16, "dtype": "float32",
    "mask": {"kind": "neighborhood", "window": [3, 5], "dilation": [2, 1]}, "gate": {"kind": "output"},
    "scores": [{"kind": "relative_bias", "extent": [3, 3]}], "outputs": ["output", "lse"],
}  # fmt: skip
LINE = {"tokens": [64], "heads": 4, "head_dim": 16}
OPEN = {"tokens": [None], "heads": 2, "head_dim": 64, "mask": {"kind": "segments"}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run("simulate", spec, *options)`: the result; a dict becomes a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")

    def written(argument: Any) -> str:
        if not isinstance(argument, dict):
            return str(argument)
        (tmp_path / "spec.json").write_text(json.dumps(argument))
        return "spec.json"

    return lambda *arguments, **kwargs: CliRunner().invoke(app, [written(a) for a in arguments], **kwargs)


def only_line(result: Any) -> str:
    """The one line that bad input gets: on standard error, nothing on standard output, exit code 1."""
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert len(lines) == 1, lines
    return str(lines[0])


# ---- what it does --------------------------------------------------------------------------------------------------------------


def test_every_command_has_help(run: Any) -> None:
    for command in ("validate", "schema", "explain", "simulate", "compile", "verify", "bench", "env", "cache"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout or command == "cache"


def test_validate(run: Any) -> None:
    assert run("validate", GRID).stdout.startswith("ok: ")
    data = json.loads(run("validate", GRID, "--json").stdout)
    assert data == {"ok": True, "digest": AttentionSpec.model_validate(GRID).digest, "problems": []}


def test_validate_lists_every_problem(run: Any) -> None:
    wrong = {**LINE, "heads": 0, "mask": {"kind": "sliding_window", "lft": 3}}
    result = run("validate", wrong)
    assert (result.exit_code, result.stdout) == (1, "")
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == ["heads", "mask.lft"]
    as_json = run("validate", wrong, "--json")
    assert as_json.exit_code == 1
    assert [p["field"] for p in json.loads(as_json.stdout)["problems"]] == ["heads", "mask.lft"]


def test_specs_come_as_json_yaml_or_on_standard_input(run: Any, tmp_path: Path) -> None:
    yaml = "tokens: [64]\nheads: 4\nhead_dim: 16\nmask: {kind: causal}\n"
    (tmp_path / "spec.yaml").write_text(yaml)
    digest = AttentionSpec.model_validate({**LINE, "mask": {"kind": "causal"}}).digest
    for arguments, text in ((["spec.yaml"], ""), (["-"], yaml), (["-"], json.dumps({**LINE, "mask": {"kind": "causal"}}))):
        assert json.loads(run("validate", *arguments, "--json", input=text).stdout)["digest"] == digest


def test_schema_is_a_schema_of_the_fields(run: Any) -> None:
    schema = json.loads(run("schema", "--json").stdout)
    assert set(schema["properties"]) == set(AttentionSpec.model_fields)
    assert schema["additionalProperties"] is False


def test_simulate(run: Any) -> None:
    result = run("simulate", GRID, "--target", "h100", "--q-tile", "2,8,8", "--k-tile", "2,8,8", "--json")
    report = SpeedupReport.from_json(result.stdout)
    assert (report.tiles.visited, report.block_sparse) == (72900, True)
    assert "11.11×" in run("simulate", GRID).stdout


def test_simulate_with_lengths_and_tables(run: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "tables.npz", segments=np.repeat(np.arange(4), 64)[None])
    result = run("simulate", OPEN, "--lengths", 256, "--tables", "tables.npz", "--q-tile", 64, "--k-tile", 64, "--json")
    assert json.loads(result.stdout)["tile_bound"] == 4.0
    assert only_line(run("simulate", OPEN, "--lengths", 256)) == (
        "attncc: tables: the mask reads segments [B, NQ]: pass every one by name (command line: --tables FILE.npz)"
    )
    assert "lengths: give one for each of tokens[0]; 0 given" in only_line(run("simulate", OPEN))


STEPS = ["lower", "token order", "canonicalize", "fuse", "tile", "choose views", "schedule"]


def test_explain(run: Any) -> None:
    text = run("explain", SMALL).stdout
    for part in (*STEPS, "= scores(%q, %k) scale=0.25", "rejected: ", "specialisation key", "INDEX", "never: q_b, q_h", "tile bound"):
        assert part in text


def test_explain_json(run: Any) -> None:
    data = json.loads(run("explain", SMALL, "--target", "sm_80", "--json").stdout)
    assert [step["step"] for step in data["steps"]] == STEPS
    assert data["plan"]["target"] == "sm_80"
    assert all(r["reason"] for r in data["plan"]["kernels"][0]["rejected"])
    assert set(data["specialization"][0]["recompiles"]) == {"ALIGNED", "INDEX"}
    assert data["block_mask"]["tiles"]["visited"] > 0


def test_explain_without_lengths_says_what_is_missing(run: Any) -> None:
    data = json.loads(run("explain", {**OPEN, "mask": {"kind": "causal"}}, "--json").stdout)
    assert data["block_mask"] is None
    assert "--lengths" in data["note"]
    assert json.loads(run("explain", {**OPEN, "mask": {"kind": "causal"}}, "--lengths", 500, "--json").stdout)["note"] == ""


@pytest.mark.parametrize(
    ("spec", "options", "kinds"),
    [
        (GRID, ["--query", "0"], {"FULL"}),
        (SMALL, [], {"PARTIAL", "WASTED"}),
        ({**LINE, "mask": {"kind": "predicate", "text": "abs(q - k) <= 9 * h"}}, ["--head", "2"], {"PARTIAL"}),
        ({**LINE, "tokens": [1 << 18], "mask": {"kind": "sliding_window", "left": 4095, "right": 0}}, [], {"PARTIAL", "FULL"}),
        ({**LINE, "tokens": [1000], "mask": {"kind": "neighborhood", "window": 9, "dilation": 7}}, [], {"PARTIAL"}),
    ],
    ids=["volume", "dilated", "heads", "long", "dilated line"],
)
def test_pictures(run: Any, tmp_path: Path, spec: Any, options: list[str], kinds: set[str]) -> None:
    """A picture of the right size, in whose panels the colours of the tile kinds that are there can be found."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from attncc.simulator.pictures import style as picture

    result = run("explain", spec, "--picture", "mask.png", *options, "--json")
    assert json.loads(result.stdout)["picture"] == "mask.png"
    pixels = imread(tmp_path / "mask.png")
    assert pixels.shape[1] > 1500
    panels = pixels[pixels.shape[0] // 5 : pixels.shape[0] * 17 // 20, :, :3]  # without the legend
    for kind in kinds:
        assert (np.abs(panels - to_rgb(getattr(picture, kind))).max(axis=2) < 0.01).any(), kind


def test_compile_source_only(run: Any, tmp_path: Path) -> None:
    result = run("compile", SMALL, "--target", "sm_80", "-o", "out", "--source-only", "--json")
    data = json.loads(result.stdout)
    assert sorted(Path(f).name for f in data["files"]) == ["attention_2d_softmax_forward.py", "plan.json", "spec.json"]
    compile((tmp_path / "out" / "attention_2d_softmax_forward.py").read_text(), "generated", "exec")
    again = run("compile", SMALL, "--target", "sm_80", "-o", "again", "--source-only", "--plan", "out/plan.json")
    assert again.exit_code == 0
    for name in ("attention_2d_softmax_forward.py", "plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_compile_two_kernels(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    spec = {**LINE, "normalizer": {"kind": "entmax", "alpha": 2.0}}
    data = json.loads(run("compile", spec, "--target", "sm_90", "-o", "out", "--json").stdout)
    assert {Path(f).name for f in data["files"]} >= {"attention_1d_relu_ratio_forward.py", "attention_1d_threshold.cubin", "plan.json"}
    assert data["kernel"] == "attention_1d_relu_ratio_forward" and data["problems"] == []
    assert [(each["kernel"], each["problems"]) for each in data["before"]] == [("attention_1d_threshold", [])]
    assert "attention_1d_threshold for sm_90" in run("compile", spec, "--target", "sm_90", "-o", "out").stdout
    shown = run("explain", spec, "--target", "h100").stdout
    assert "plan for h100: attention_1d_threshold" in shown and "plan for h100: attention_1d_relu_ratio_forward" in shown
    assert json.loads(run("verify", spec, "--json").stdout)["ok"]


@pytest.mark.parametrize(("target", "binaries"), [("sm_90", {"ptx", "cubin"}), ("gfx942", {"amdgcn", "hsaco"})])
def test_compile(run: Any, tmp_path: Path, target: str, binaries: set[str]) -> None:
    pytest.importorskip("triton")
    data = json.loads(run("compile", {**LINE, "mask": {"kind": "causal"}}, "--target", target, "-o", "out", "--json").stdout)
    folder = tmp_path / "out"
    assert {p.suffix[1:] for p in folder.iterdir()} == {"py", "json"} | binaries
    assert not list(folder.glob(".*"))
    assert (data["spills"], data["problems"]) == (0, [])
    assert 0 < data["registers"] <= 512
    assert 0 < data["shared_bytes"] <= data["shared_limit"]
    assert sum(data["instructions"].values()) > 100
    assert any(name.startswith(("HMMA", "HGMMA", "v_mfma")) for loop in data["loops"] for name in loop)
    stored = json.loads((folder / "resources.json").read_text())
    assert stored == {name: value for name, value in data.items() if name != "files"}


def test_verify(run: Any) -> None:
    result = run("verify", SMALL, "--batch", 2, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["ok"]
    names = [e["name"] for e in data["errors"]]
    assert names == ["output", "lse", "d q", "d k", "d v", "d gate", "d relative_bias"]
    assert all(0 <= e["overall"] < 1e-5 for e in data["errors"])


def test_verify_refuses_what_the_reference_cannot_hold(run: Any) -> None:
    assert "dense reference of 3.2e+11 pairs is not supported" in only_line(run("verify", GRID))


def test_verify_says_when_a_kernel_is_wrong(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from attncc.cli import verification

    original = verification.__dict__["reference"]
    monkeypatch.setattr(verification, "reference", lambda *a: {name: x * 1.001 for name, x in original(*a).items()})
    result = run("verify", SMALL)
    assert result.exit_code == 3
    assert "errors above their limits" in result.stdout


def test_verify_by_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "spec.json").write_text(json.dumps({**LINE, "dtype": "float32", "mask": {"kind": "causal"}}))
    command = [sys.executable, "-m", "attncc", "verify", str(tmp_path / "spec.json"), "--interpret", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ok"]


def test_bench(run: Any) -> None:
    data = json.loads(run("bench", SMALL, "--seconds", 0, "--backward", "--json").stdout)
    assert data["rounds"] == 1
    assert data["kernel_ms"] > 0
    assert data["tile_bound"] > 0
    assert data["speedup"] == pytest.approx(data["dense_ms"] / data["kernel_ms"])


def test_env(run: Any) -> None:
    data = json.loads(run("env", "--json").stdout)
    assert data["packages"]["torch"]
    assert data["cache"].endswith("cache")
    assert data["warnings"] == warnings_for(data["packages"], data["interpret"])
    assert "torch" in run("env").stdout


@pytest.mark.parametrize(
    ("packages", "interpret", "words"),
    [
        ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.4.1"}, False, ["numpy 2.3"]),
        ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}, False, []),
        ({"torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.1"}, False, []),
        ({"torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.4.1"}, True, ["bfloat16"]),
        ({"torch": None, "triton": None, "numpy": "2.4.1"}, False, ["torch is not installed", "triton is not installed"]),
    ],
)
def test_known_bad_versions(packages: Any, interpret: bool, words: list[str]) -> None:
    found = warnings_for(packages, interpret)
    assert len(found) == len(words)
    assert all(word in warning for word, warning in zip(words, found))


def test_cache(run: Any, tmp_path: Path) -> None:
    from attncc import compile as compile_spec

    assert run("cache", "path").stdout.strip() == str(tmp_path / "cache")
    assert json.loads(run("cache", "info", "--json").stdout)["entries"] == []
    compile_spec(AttentionSpec.model_validate(SMALL), "sm_80")
    info = json.loads(run("cache", "info", "--json").stdout)
    assert [e["file"].partition("-")[0] for e in info["entries"]] == ["attention_2d_softmax_forward"]
    assert info["bytes"] == info["entries"][0]["bytes"] > 1000
    assert json.loads(run("cache", "clear", "--json").stdout)["deleted"] == 1
    assert json.loads(run("cache", "info", "--json").stdout)["bytes"] == 0


# ---- without torch, triton, an install -----------------------------------------------------------------------------------------

WITHOUT = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
sys.argv[:] = ["attncc", *{arguments!r}]
runpy.run_module("attncc", run_name="__main__", alter_sys=True)
"""


def without(blocked: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m attncc` from the checkout, where some packages cannot be imported."""
    code = WITHOUT.format(blocked=blocked, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_torch_and_triton(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({**GRID, "tokens": [256, 256], "mask": {"kind": "neighborhood", "window": [80, 80], "stride": [16, 16]}}))
    done = without(("torch", "triton"), "simulate", str(path), "--target", "h100", "--q-tile", "16,8", "--k-tile", "16,8", "--json")
    assert SpeedupReport.from_json(done.stdout).flop_bound == 10.24
    for command in ("validate", "explain"):
        assert without(("torch", "triton"), command, str(path)).returncode == 0
    compiled = without(("torch", "triton"), "compile", str(path), "--source-only", "-o", str(tmp_path / "out"), "--json")
    assert len(json.loads(compiled.stdout)["files"]) == 3
    assert without(("torch", "triton"), "env").returncode == 0


def test_compile_without_triton(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(SMALL))
    done = without(("triton",), "compile", str(tmp_path / "spec.json"), "-o", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("attncc: machine code without Triton is not supported")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SMALL))
    done = without(("matplotlib",), "explain", str(path), "--picture", str(tmp_path / "mask.png"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("attncc: a picture is not supported: matplotlib is not installed")
    assert not (tmp_path / "mask.png").exists()


# ---- bad input -----------------------------------------------------------------------------------------------------------------

BAD_SPECS = {
    "unknown key": ({**LINE, "maks": {}}, "maks: unknown key; did you mean 'mask'?"),
    "unknown inner key": ({**LINE, "mask": {"kind": "sliding_window", "lft": 3}}, "mask.lft: unknown key; did you mean 'left'?"),
    "unknown kind": ({**LINE, "mask": {"kind": "casual"}}, "mask: kind 'casual' is unknown; known are full, causal,"),
    "no kind": ({**LINE, "mask": {"left": 3}}, "mask: needs a kind"),
    "missing": ({"tokens": [64], "heads": 4}, "head_dim: is missing"),
    "wrong type": ({**LINE, "heads": "many"}, "heads: should be a valid integer, not 'many'"),
    "inner field": ({**LINE, "mask": {"kind": "not", "mask": {"kind": "sinks", "count": -1}}}, "mask.mask.count: should be greater than"),
    "listed field": (
        {**LINE, "mask": {"kind": "and", "masks": [{"kind": "causal"}, {"kind": "prefix"}]}},
        "mask.masks.1.length: is missing",
    ),
    "heads": ({**LINE, "key_heads": 3}, "key_heads: 3 does not divide heads=4"),
    "axes": ({**LINE, "key_tokens": [8, 8]}, "key_tokens: has 2 axes, tokens have 1"),
    "four axes": ({**LINE, "tokens": [2, 2, 2, 2]}, "tokens: "),
    "no tokens": ({**LINE, "tokens": []}, "tokens: needs at least 1 entries, has 0"),
    "no token": ({**LINE, "tokens": [0]}, "tokens.0: should be greater than or equal to 1"),
    "window": ({**LINE, "mask": {"kind": "neighborhood", "window": 65}}, "mask: window 65 x dilation 1 exceeds the 64 tokens of axis 0"),
    "long window": ({**LINE, "mask": {"kind": "sliding_window", "left": 65, "right": 0}}, "mask: left=65 reaches past 64 tokens"),
    "stride": ({**LINE, "mask": {"kind": "neighborhood", "window": 3, "stride": 4}}, "mask: stride 4 exceeds window 3 on axis 0"),
    "rank": ({**LINE, "mask": {"kind": "neighborhood", "window": [3, 3]}}, "mask: window has 2 axes, tokens have 1"),
    "prefix": ({**LINE, "mask": {"kind": "prefix", "length": 65}}, "mask: length 65 exceeds the 64 key tokens"),
    "lse": ({**LINE, "normalizer": {"kind": "relu"}, "outputs": ["output", "lse"]}, "outputs: a relu row has no log-sum-exp"),
    "dtype": ({**LINE, "dtype": "fp16"}, "dtype: should be 'float16', 'bfloat16', 'float32' or 'float64', not 'fp16'"),
    "cap": ({**LINE, "scores": [{"kind": "softcap", "cap": 0}]}, "scores.0.cap: should be greater than 0"),
    "order": ({**LINE, "scores": [{"kind": "alibi"}, {"kind": "scale", "value": 1}]}, "scores.1: scale must stand first and once"),
    **{
        f"score {i}": ({**LINE, "scores": [score]}, f"scores.0.{message}")
        for i, (score, message) in enumerate(
            [
                ({"kind": "dense_bias", "table": "Bias"}, "table: string should match pattern"),
                ({"kind": "dense_bias", "per_batch": "x"}, "per_batch: should be a valid boolean"),
                ({"kind": "dense_bias", "per_head": 7}, "per_head: should be a valid boolean"),
                ({"kind": "bias", "index": []}, "index: needs at least 1 entries, has 0"),
                ({"kind": "bias", "index": ["k", "q"]}, "index: name each of b, h, q and k at most once, in this order"),
                ({"kind": "bias", "table": "1"}, "table: string should match pattern"),
                ({"kind": "temperature", "index": ["d"]}, "index.0: should be 'b', 'h', 'q' or 'k'"),
                ({"kind": "temperature", "index": ["h", "h"]}, "index: name each of b, h, q and k at most once"),
                ({"kind": "temperature", "table": ""}, "table: string should match pattern"),
                ({"kind": "t5_bias", "buckets": 7}, "buckets: must be even and at least 4 where bidirectional"),
                ({"kind": "t5_bias", "buckets": 300}, "buckets: should be less than or equal to 256"),
                ({"kind": "t5_bias", "max_distance": 8}, "max_distance: must exceed 8, half of a side's buckets"),
                ({"kind": "t5_bias", "bidirectional": 2}, "bidirectional: should be a valid boolean"),
                ({"kind": "t5_bias", "table": "T"}, "table: string should match pattern"),
                ({"kind": "expression"}, "text: is missing"),
                ({"kind": "expression", "text": "s + w[1]"}, "text: table 'w' must be indexed by b, h, q and k alone"),
                ({"kind": "expression", "text": "q < k"}, "text: must be a float, this one is bool"),
                ({"kind": "expression", "text": "s", "tables": [{"name": "T", "shape": [2]}]}, "tables.0.name: string should match"),
                ({"kind": "expression", "text": "s", "tables": [{"name": "t", "shape": []}]}, "tables.0.shape: needs at least 1"),
                ({"kind": "expression", "text": "s", "tables": [{"name": "t", "shape": [2], "kind": "x"}]}, "tables.0.kind: should be"),
                (
                    {"kind": "expression", "text": "s + t[q, k]", "tables": [{"name": "t", "shape": [2]}]},
                    "text: table 't' must be indexed by 1 integers",
                ),
                ({"kind": "expression", "text": "s.real"}, "text: Attribute is not allowed"),
                ({"kind": "expression", "text": "s", "integers": ["t"]}, "integers: the text reads no table 't'"),
            ]
        )
    },
    "captured by a mask": (
        {**LINE, "mask": {"kind": "predicate", "text": "t[q + s] < k", "tables": [{"name": "t", "shape": [4]}]}},
        "mask.text: unknown name 's'",
    ),
    "floats in a mask": (
        {**LINE, "mask": {"kind": "predicate", "text": "t[q] < k", "tables": [{"name": "t", "shape": [4], "kind": "float"}]}},
        "mask.text: ",
    ),
    "two axes of buckets": (
        {**LINE, "tokens": [8, 8], "scores": [{"kind": "t5_bias"}]},
        "scores.0.kind: t5_bias is defined on one axis of tokens",
    ),
    "deep score": ({**LINE, "scores": [{"kind": "expression", "text": "s" + " * 2.0 + s" * 160}]}, "scores.0: nested too deeply"),
    "two": ({**LINE, "heads": 0, "dtype": "x"}, "heads: should be greater than or equal to 1, not 0; dtype: should be"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
@pytest.mark.parametrize("command", ["simulate", "compile"])
def test_bad_specs(run: Any, tmp_path: Path, command: str, name: str) -> None:
    spec, message = BAD_SPECS[name]
    assert only_line(run(command, spec, "--json")).startswith(f"attncc: {message}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["spec.json"], "something was half-written"


BAD_PREDICATES = {
    "call": "__import__('os').system('true')",
    "builtin": "eval('k') < q",
    "attribute": "q.__class__ < k",
    "attribute of a literal": "(1).__class__ == k",
    "lambda": "(lambda: k)() < q",
    "comprehension": "[k for k in q] == 1",
    "generator": "min(k for k in q) < 1",
    "walrus": "(z := k) < q",
    "f-string": "f'{k}' == '1'",
    "text": "k < 'q'",
    "bytes": "k < b'q'",
    "starred": "min(*[k, q]) < 1",
    "keyword": "min(k, q, key=abs) < 1",
    "subscript of a call": "abs(k)[0] < 1",
    "slice": "t[b:k] < 1",
    "computed index": "t[k + 1] < 1",
    "indexed variable": "q[k] < 1",
    "conditional": "k if q else b",
    "membership": "k in (q, b)",
    "identity": "k is q",
    "power": "k < 10 ** 10 ** 10",
    "shift": "k < 1 << 99",
    "matrix": "k @ q < 1",
    "dictionary": "{k: q}",
    "await": "await k",
    "statement": "import os",
    "two statements": "k < q; import os",
    "two lines": "k < q\nimport os",
    "null": "k < q\0",
    "nothing": "",
    "spaces": "   ",
    "number": "k",
    "unknown name": "k < quit",
    "reserved word": "None < k",
    "ellipsis": "k < ...",
    "float": "k < 3.5",
    "giant float": "k < 9e999",
    "complex": "k < 1j",
    "infinity": "k < inf",
    "giant": "k < " + "9" * 1500,
    "more than Python reads": "k < " + "9" * 5000,
    "zero": "k % 0 == 1",
    "hidden zero": "k // (q - q) == 1",
    "folded zero": "7 % 0 == 1",
    "long": "k < q and " * 300 + "k < q",
    "parentheses": "(" * 300 + "k < q" + ")" * 300,
    "signs": "k < " + "-" * 1500 + "q",
    "calls": "k < " + "abs(" * 190 + "q" + ")" * 190,
    "sums": "k < " + "+".join(["q % 2", "q % 3"] * 140),
    "conditions": "k < q" + "".join(f" and k != {i}" for i in range(160)),
    "chain": "k" + " < q < h < b" * 160,
}


@pytest.mark.parametrize("name", BAD_PREDICATES)
def test_forbidden_predicates(run: Any, name: str) -> None:
    line = only_line(run("simulate", {**LINE, "mask": {"kind": "predicate", "text": BAD_PREDICATES[name]}}, "--json"))
    assert line.startswith(("attncc: mask.text: ", "attncc: mask: nested too deeply"))
    assert len(line) < 300


BAD_TEXTS = {
    "spec.json": {
        "{": "spec: not JSON: Expecting property name",
        "[1, 2]": "spec: must be an object with fields such as tokens and heads, not [1, 2]",
        "": "spec: not JSON: Expecting value at line 1, column 1",
        '{"tokens": [64], "tokens": [32]}': "tokens: stands twice",
        '{"tokens": NaN}': "spec: not JSON: NaN is no number",
        "[" * 100_000: "spec: nested too deeply",
        '{"mask": ' * 3000 + "1" + "}" * 3000: "spec: nested too deeply",
        '{"tokens": [' + "9" * 5000 + "]}": "spec: not JSON: Exceeds the limit",
        " " * (1 << 21): "spec: longer than 1048576 characters",
        "\ud800": "",
    },
    "spec.yaml": {
        "a: [": "spec: not YAML",
        "a: &x [1]\nb: *x": "spec: YAML aliases (*name) are not read",
        "a: !!python/object/apply:os.system ['true']": "spec: not YAML: could not determine a constructor",
        "tokens: 2020-01-01": "spec: YAML beyond plain data",
    },
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in BAD_TEXTS.items() for text in texts])
def test_bad_texts(run: Any, tmp_path: Path, file: str, text: str) -> None:
    if file.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / file).write_bytes(text.encode(errors="surrogatepass"))
    expected = BAD_TEXTS[file][text] or "spec: spec.json is no UTF-8 text"
    assert only_line(run("simulate", file)).startswith(f"attncc: {expected}")


def test_a_file_that_is_not_there(run: Any) -> None:
    assert only_line(run("simulate", "none.json")) == "attncc: spec: cannot read none.json: No such file or directory"
    assert run("validate", "none.json").exit_code == 1


def test_bad_arguments(run: Any, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "objects.npz", segments=np.array([{}]))
    tables = [OPEN, "--lengths", 64, "--tables"]
    cases: list[tuple[list[Any], str]] = [
        (["simulate", GRID, "--target", "h101"], "target: 'h101' is unknown; known are"),
        (["simulate", GRID, "--q-tile", "16,8"], "q_tile: has 2 sides, tokens have 3 axes"),
        (["simulate", GRID, "--lengths", "7"], "lengths: every axis of the spec is known; 1 given"),
        (["simulate", *tables, "none.npz"], "tables: cannot read none.npz"),
        (["simulate", *tables, "text.npz"], "tables: text.npz is no .npz file"),
        (["simulate", *tables, "objects.npz"], "tables: objects.npz is no .npz file"),
        (["explain", GRID, "--q-tile", "3,5,7"], "q_tile=[3, 5, 7] is not supported"),
        (["explain", GRID, "--picture", "mask.gif"], "picture: mask.gif must end in .png, .svg, .pdf"),
        (["explain", GRID, "--picture", "none/mask.png"], "picture: cannot write none/mask.png"),
        (["explain", GRID, "--picture", "mask.png", "--head", "24"], "head: 24 is none of the 24 heads"),
        (["explain", GRID, "--picture", "mask.png", "--query", "115200"], "query: 115200 is none of the 115200 tokens"),
        (["compile", GRID, "--target", "cpu"], "Triton source for target cpu is not supported"),
        (["compile", {**LINE, "dtype": "float64"}], "dtype float64 on a GPU is not supported"),
        (["compile", LINE, "--source-only", "-o", "text.npz"], "out: cannot write text.npz"),
        (["compile", LINE, "--plan", "text.npz"], "plan: text.npz is no plan"),
        (["verify", {**LINE, "dtype": "bfloat16"}, "--interpret"], "dtype bfloat16 with --interpret is not supported"),
        (["verify", OPEN], "lengths: give one for each of tokens[0]"),
    ]
    for arguments, message in cases:
        assert only_line(run(*arguments)).startswith(f"attncc: {message}"), arguments


def test_usage_errors(run: Any) -> None:
    for arguments in (
        ["simulate"],
        ["simulate", LINE, "--q-tile", "a"],
        ["simulate", LINE, "--nothing"],
        ["nothing"],
        ["verify", LINE, "--batch", "0"],
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr
