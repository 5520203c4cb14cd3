"""Targets: shipped figures against what vendors publish, users' own files, and one clear error for each impossible one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attncc
from attncc import AttentionSpec, masks
from attncc.cli.app import app
from attncc.errors import PlanError, TargetError
from attncc.targets import TARGETS, Performance, Target, load, registry, sheet, target
from attncc.targets.sheets import read_sheet

DATA = Path(registry.__file__).parent / "data"
DEVICES = ("cpu", "a100", "l40s", "rtx4090", "h100", "h100-pcie", "h200", "b200", "rtx5090", "mi300x")
SPEC = AttentionSpec(tokens=(64,), heads=2, head_dim=16, mask=masks.Causal(), dtype="float32")


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that other tests loaded are not known here."""
    monkeypatch.setattr(registry, "_added", {})


def content(device: str, /, **changes: Any) -> dict[str, Any]:
    """A shipped file's content under a name of its own, with figures or words changed by their dotted names (`__` for dots)."""
    data: dict[str, Any] = json.loads((DATA / f"{device}.json").read_text(encoding="utf-8")) | {"name": "mine"}
    for path, value in changes.items():
        put(data, path.replace("__", "."), value)
    return data


def put(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        data = data[parent]
    old = data.get(last)
    if isinstance(old, dict) and "value" in old and not isinstance(value, dict):
        old["value"] = value
    else:
        data[last] = value


def figures(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a file that is no word, by its dotted name; a figure with a source is one leaf."""
    for key, value in data.items():
        if isinstance(value, dict) and "value" not in value:
            yield from figures(value, f"{prefix}{key}.")
        elif not isinstance(value, str | bool):
            yield prefix + key, value


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    """`mine(content)`: the path of a file with it."""

    def write(data: Any, name: str = "mine.json") -> str:
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return write


# ---- what ships ----------------------------------------------------------------------------------------------------------------

# Dense, summed in float32, TFLOP/s; GB/s; watts; SMs. From the vendors' tables, written down apart from the records.
PUBLISHED = {
    "a100": (312, 2039, 400, 108),
    "h100": (989.4, 3352, 700, 132),
    "h100-pcie": (756, 2039, 350, 114),
    "h200": (989.5, 4800, 700, 132),
    "b200": (2250, 7700, 1000, 148),
    "l40s": (362.05, 864, 350, 142),
    "rtx4090": (165.2, 1008, 450, 128),
    "rtx5090": (209.5, 1792, 575, 170),
    "mi300x": (1307.4, 5300, 750, 304),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_the_published_ones(name: str) -> None:
    flops, bandwidth, watts, sms = PUBLISHED[name]
    p = target(name).performance
    assert p is not None
    assert p.peak_flops["float16"] == p.peak_flops["bfloat16"] == pytest.approx(flops * 1e12, rel=0.01)
    assert (p.memory_bytes_per_second, p.board_watts, p.sms) == (bandwidth * 1e9, watts, sms)
    assert 0 < p.launch_seconds < 1e-5 and 8e8 < p.clock_hz <= p.max_clock_hz < 3e9


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_has_a_source(name: str) -> None:
    data = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    found = dict(figures(data))
    assert len(found) >= len(fields(Performance)) + 2
    for path, figure in found.items():
        assert set(figure) == {"value", "source"} or figure == {} == data["performance"]["matrix_flops"], path
        assert figure == {} or (len(figure["source"]) > 10 and "http" not in figure["source"]), path
    assert set(data["peak_flops"]) == set(data["performance"]["matrix_flops"]), "every rate is held to a quoted peak"


def test_every_device_has_figures_and_no_architecture_has() -> None:
    assert {path.stem for path in DATA.iterdir()} == set(DEVICES)
    assert {name for name, t in TARGETS.items() if t.performance} == set(DEVICES)
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "rtx3090"} == set(TARGETS) - set(DEVICES)
    assert [t.name for t in TARGETS.values()] == list(TARGETS)
    assert len(TARGETS) == len(set(TARGETS)) and "h100" in TARGETS and "nope" not in TARGETS


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_the_limits_of_its_architecture(name: str) -> None:
    record = target(name)
    if record.backend != "cpu":
        assert replace(record, name=record.arch, performance=None) == target(record.arch)


def test_the_files_are_packaged() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["attncc"]
    assert {path.stem for pattern in patterns for path in DATA.parents[1].glob(pattern)} >= set(DEVICES)


def test_records_are_frozen_and_can_be_keys() -> None:
    record = target("h100")
    assert record.performance is not None and {record: 1}[target("h100")] == 1
    with pytest.raises(FrozenInstanceError):
        record.warp = 64  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        record.performance.sms = 1  # type: ignore[misc]
    rates = {"float16": 4096.0}
    copied = replace(record.performance, matrix_flops=rates)
    rates["float16"] = 0.0
    assert copied.matrix_flops["float16"] == 4096 and hash(copied) == hash(replace(copied))


@pytest.mark.parametrize("name", TARGETS)
def test_sheets_round_trip(name: str) -> None:
    assert read_sheet(json.dumps(sheet(name).to_data())) == sheet(name)


def test_files_are_read_when_they_are_asked_for() -> None:
    code = "import attncc.targets as t; n = t.registry._shipped.cache_info; a = n().currsize; t.target('a100'); print(a, n().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


# ---- files of users ------------------------------------------------------------------------------------------------------------


def test_a_file_is_a_target_everywhere(mine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    path = mine(content("a100", shared_bytes=64 << 10))
    assert attncc.simulate(SPEC, path).target == "mine"
    kernel = attncc.compile(SPEC, target=path)
    assert kernel.plan.target == "mine" and "def forward(" in kernel.source
    assert [p.name.split("-")[1] for p in (tmp_path / "cache").glob("*.py")] == ["mine"]
    assert attncc.compile(SPEC, target="mine", plan=attncc.Plan.from_json(kernel.plan.to_json())).plan == kernel.plan
    assert "generated by attncc for mine" in kernel.source and "plan for mine" not in kernel.plan.to_json()
    with pytest.raises(PlanError, match="made for target 'mine', not 'a100'"):
        attncc.compile(SPEC, target="a100", plan=kernel.plan)


def test_limits_of_a_file_decide_the_tiles(mine: Any) -> None:
    spec = AttentionSpec(tokens=(4096,), heads=2, head_dim=256)
    small = attncc.simulate(spec, mine(content("a100", name="small", shared_bytes=48 << 10), "small.json"))
    large = attncc.simulate(spec, mine(content("a100", name="large"), "large.json"))
    assert math.prod(small.q_tile) * math.prod(small.k_tile) < math.prod(large.q_tile) * math.prod(large.k_tile)


def test_a_cpu_of_ones_own_runs(mine: Any) -> None:
    kernel = attncc.compile(SPEC, target=mine(content("cpu", performance__sms=64)))
    q, k, v = torch.randn(3, 1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernel(q, k, v), attncc.compile(SPEC, target="cpu")(q, k, v))


def test_a_file_needs_no_figures_of_speed(mine: Any) -> None:
    data = content("h200")
    del data["performance"], data["peak_flops"]
    assert load(mine(data)) == Target("mine", "sm_90", "cuda", 227 << 10, bulk_copy=True, matrix="wgmma")


def test_any_existing_file_will_do(mine: Any) -> None:
    assert target(mine(content("h100", performance__sms=100, peak_flops={}), "figures.txt")).performance.sms == 100  # type: ignore[union-attr]
    assert target("mine").name == "mine"


def test_counts_may_have_exponents(mine: Any) -> None:
    found = load(mine(content("h100", performance__memory_bytes=9.6e10))).performance
    assert found is not None and type(found.memory_bytes) is int and found.memory_bytes == 96_000_000_000


def test_the_name_of_a_file(mine: Any) -> None:
    path = mine(content("h100"))
    load(path)
    assert load(mine(content("h100", performance__launch_seconds=1e-6))) == target("mine"), "what it can do may be corrected"
    with pytest.raises(TargetError, match="name: 'mine' was read before with other limits"):
        load(mine(content("h100", registers=128)))
    with pytest.raises(TargetError, match=r"mine\.json: name: 'h100' is that of a target of attncc's own"):
        load(mine(content("h100", name="h100")))
    assert target("h100") == TARGETS["h100"] and target("mine").registers == 255


def test_limits_are_part_of_what_names_a_generated_file(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = attncc.compile(SPEC, target=mine(content("a100"))).plan
    digests = []
    for changes in ({}, {"performance__launch_seconds": 1e-6}, {"backend": "hip", "arch": "gfx942"}):
        monkeypatch.setattr(registry, "_added", {})
        load(mine(content("a100", **changes)))
        digests.append(attncc.Plan.from_json(made.to_json()).digest)
    assert digests[0] == digests[1] != digests[2]
    monkeypatch.setattr(registry, "_added", {})
    with pytest.raises(TargetError, match="'mine' is unknown"):
        _ = attncc.Plan.from_json(made.to_json()).digest


# ---- the command line ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "spec.json").write_text(SPEC.to_json())
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_list(run: Any) -> None:
    text = run("targets").stdout
    assert all(name in text for name in TARGETS) and "NVIDIA H100 SXM5 80GB" in text and "989.4" in text
    rows = {row["name"]: row for row in json.loads(run("targets", "--json").stdout)}
    assert list(rows) == list(TARGETS)
    assert rows["h100"]["sms"] == 132 and rows["h100"]["peak_flops"]["float16"] == pytest.approx(989.4e12, rel=1e-3)
    assert rows["sm_90"]["sms"] is rows["sm_90"]["peak_flops"] is None


@pytest.mark.parametrize("name", ["h100", "cpu", "sm_90"])
def test_one_target_in_full(run: Any, name: str) -> None:
    text = run("targets", name).stdout
    for path, source in sheet(name).sources.items():
        assert path in text and source.split()[0] in text
    data = json.loads(run("targets", name, "--json").stdout)
    assert read_sheet(json.dumps(data)) == sheet(name)


def test_commands_take_files(run: Any, mine: Any) -> None:
    path = mine(content("a100"))
    assert json.loads(run("simulate", "spec.json", "--target", path, "--json").stdout)["target"] == "mine"
    assert json.loads(run("explain", "spec.json", "-t", path, "--json").stdout)["plan"]["target"] == "mine"
    assert json.loads(run("compile", "spec.json", "-t", path, "--source-only", "--json").stdout)["arch"] == "sm_80"
    assert "132" in run("targets", mine(content("h100", name="other"), "other.json")).stdout
    assert json.loads(run("verify", "spec.json", "-t", mine(content("cpu", name="box"), "box.json"), "--json").stdout)["ok"]


def test_bad_files_get_one_line(run: Any, mine: Any) -> None:
    for arguments in (["targets"], ["simulate", "spec.json", "--target"]):
        result = run(*arguments, mine(content("h100", performance__sms=0)))
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("attncc: target ") and result.stderr.count("\n") == 1
        assert "mine.json: performance.sms: must be positive and finite, not 0" in result.stderr


# ---- impossible ones -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "My GPU"}, "name: 'My GPU' must be small letters"),
    ({"name": 'x"""'}, "name: 'x\"\"\"' must be small letters"),
    ({"name": 3}, "name: must be a line of text, not 3"),
    ({"device": "two\nlines"}, "device: must be a line of text"),
    ({"backend": "metal"}, "backend: 'metal' is unknown; known are cuda, hip, cpu"),
    ({"matrix": "amx"}, "matrix: 'amx' is unknown; known are mma,"),
    ({"arch": "sm_90a"}, "arch: 'sm_90a' is no architecture of backend cuda"),
    ({"arch": "gfx942"}, "arch: 'gfx942' is no architecture of backend cuda"),
    ({"bulk_copy": 1}, "bulk_copy: must be true or false, not 1"),
    ({"shared_bytes": 1024}, "shared_bytes: 1024 is less than the 16384"),
    ({"shared_bytes": 256 << 10}, "shared_bytes: a block's 262144 is more than performance.shared_bytes_per_sm 233472"),
    ({"registers": 1000}, "registers: 1000 is none of the 1 to 512"),
    ({"registers": 25.5}, "registers: must be an integer, not 25.5"),
    ({"warp": 48}, "warp: 48 is impossible; warps have 32 or 64 threads"),
    ({"matrix": "none"}, "performance.matrix_flops: must be empty where matrix is 'none'"),
    ({"performance__matrix_flops": {}, "peak_flops": {}}, "performance.matrix_flops: needs the rates of wgmma"),
    ({"performance__matrix_flops__fp16": {"value": 1, "source": "?"}}, "performance.matrix_flops: 'fp16' is no element type; known are"),
    ({"performance": 3}, "performance: must be a JSON object, not 3"),
    ({"performance__clock_hz": 1830}, "performance.clock_hz: 1830 hertz is outside 1e+08 to 1e+10; is it in another unit"),
    ({"performance__max_clock_hz": 1.7e9}, "performance.clock_hz: 1.83e+09 is above max_clock_hz 1.7e+09"),
    ({"performance__memory_bytes_per_second": 3352}, "performance.memory_bytes_per_second: 3352 bytes a second is outside"),
    ({"performance__memory_bytes_per_second": 1e13}, "performance.l2_bytes_per_second: 9.7e+12 is less than memory_bytes_per_second 1e+13"),
    ({"performance__memory_bytes": 80}, "performance.memory_bytes: 80 bytes is outside"),
    ({"performance__l2_bytes": 1 << 38}, "performance.l2_bytes: 274877906944 is more than memory_bytes 80000000000"),
    ({"performance__launch_seconds": 2.5}, "performance.launch_seconds: 2.5 seconds is outside"),
    ({"performance__exp_per_cycle": 256}, "performance.exp_per_cycle: 256 results a cycle from 128 issued"),
    ({"performance__fma_per_cycle": 256}, "performance.fma_per_cycle: 256 results a cycle from 128 issued"),
    ({"performance__int_per_cycle": 256}, "performance.int_per_cycle: 256 results a cycle from 128 issued"),
    ({"performance__threads_per_sm": 2000}, "performance.threads_per_sm: 2000 is no multiple of warp 32"),
    ({"performance__registers_per_sm": 8000}, "performance.registers_per_sm: 8000 is not enough for a warp of 255 a thread"),
    ({"performance__blocks_per_sm": 4096}, "performance.blocks_per_sm: 4096 is more than threads_per_sm 2048"),
    ({"performance__sms": 144}, "peak_flops.tf32: 4.947e+14 is quoted, but sms x clock_hz x matrix_flops.tf32 is 5.39689e+14"),
    ({"peak_flops__float16": 1979e12}, "peak_flops.float16: 1.979e+15 is quoted, but"),
    ({"peak_flops__float4": {"value": 1, "source": "?"}}, "peak_flops.float4: performance.matrix_flops has no such rate"),
    ({"performance__sms": {"value": 132}}, "performance.sms.source: missing"),
    ({"performance__sms": {"value": 132, "source": " "}}, "performance.sms.source: must be a line of text"),
    ({"performance__sms": {"value": 132, "source": "x", "unit": "1"}}, "performance.sms.unit: unknown; known are value, source"),
    ({"performance__sms": {"value": 10**400, "source": "x"}}, "performance.sms: has too many digits"),
    ({"performance__sm": {"value": 1, "source": "x"}}, "performance.sm: unknown; known are sms, clock_hz"),
    ({"memory": 1}, "memory: unknown; known are name, device"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_impossible_files_are_refused(mine: Any, changes: dict[str, Any], message: str) -> None:
    path = mine(content("h100", **changes))
    with pytest.raises(TargetError) as caught:
        target(path)
    assert str(caught.value).startswith(f"target {path}: {message}") and "\n" not in str(caught.value)


def test_figures_without_sources_are_refused(mine: Any) -> None:
    data = content("h100")
    data["performance"]["sms"] = 132
    with pytest.raises(TargetError, match=r"performance\.sms: must be .* so that its source is known, not 132"):
        load(mine(data))


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "132", True, None, []])
def test_no_figure_may_be_nonsense(value: Any) -> None:
    for path, _ in figures(content("h100")):
        data = content("h100")
        put(data, path, value)
        with pytest.raises(TargetError) as caught:
            read_sheet(json.dumps(data))
        assert str(caught.value).startswith(f"{path}: "), (path, value)


def test_no_key_may_be_missing() -> None:
    paths = [f"performance.{f.name}" for f in fields(Performance)]
    for path in ("name", "device", "backend", "arch", "matrix", "bulk_copy", "shared_bytes", "registers", "warp", *paths):
        data = content("h100")
        part = data["performance"] if "." in path else data
        del part[path.rpartition(".")[2]]
        with pytest.raises(TargetError) as caught:
            read_sheet(json.dumps(data))
        assert str(caught.value) == f"{path}: missing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: Expecting property name"),
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", r"the file: must be a JSON object, not \[\]"),
        ('{"name": "a", "name": "b"}', "name: is there twice"),
    ],
)
def test_what_is_no_file_of_a_target(mine: Any, text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load(mine(text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"target nowhere\.json: cannot be read: No such file"):
        target("nowhere.json")
    with pytest.raises(TargetError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(TargetError, match="is no UTF-8 text"):
        load(tmp_path / "latin.json")
    for name in ("h1000", "", "a\0b", "x" * 5000):
        with pytest.raises(TargetError, match=r"is unknown; known are cpu, .*, mi300x, or a \.json file of your own"):
            target(name)
