"""The page of a spec: self-contained, small, and safe whatever a spec's text holds."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import attncc
from attncc import AttentionSpec, simulate
from attncc.cli.app import app
from attncc.simulator.html import page
from attncc.simulator.pictures.scene import Scene, classes_apart

pytest.importorskip("matplotlib")
GNA: dict[str, Any] = {"kind": "neighborhood", "window": [18, 24, 24], "stride": [16, 8, 8]}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def a_spec(mask: dict[str, Any], tokens: list[int], **fields: Any) -> AttentionSpec:
    return AttentionSpec.model_validate({"tokens": tokens, "heads": 2, "head_dim": 64, "dtype": "bfloat16", "mask": mask, **fields})


class Elements(HTMLParser):
    """Start tags with their attributes, and which elements were left open."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "rect", "use", "stop"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def video() -> str:
    return page(simulate(a_spec(GNA, [30, 48, 80], head_dim=128), "h100", (4, 8, 4), (4, 8, 4)))


def test_the_page_is_whole_and_refers_to_nothing_outside(video: str) -> None:
    elements = Elements(video)
    assert not elements.wrong and not elements.open
    for tag, attributes in elements.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), f"<{tag} {name}={value!r}>"
    urls = {url for url in re.findall(r"https?://[^\s\"'<)]+", video) if "w3.org/" not in url}  # names of SVG's namespaces are no addresses
    assert not urls
    assert "$" not in re.sub(r"<script.*?</script>", "", video, flags=re.DOTALL)
    assert len(video) < 3_000_000


def test_ids_are_unique(video: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(video).tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", video))
    assert used and used <= {str(i) for i in ids}


def test_the_levels_are_the_reports(video: str) -> None:
    report = simulate(a_spec(GNA, [30, 48, 80], head_dim=128), "h100", (4, 8, 4), (4, 8, 4))
    assert report.prediction is not None
    for shown in (f"{report.flop_bound:.2f}×", f"{report.tile_bound:.2f}×", f"{report.predicted_speedup:.2f}×", report.prediction.limit):
        assert shown in video


def _cells(text: str) -> list[np.ndarray[Any, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    data = json.loads(found[1])
    heads = []
    for packed in data["heads"]:
        raw = np.frombuffer(base64.b64decode(packed), np.uint8)
        bits = np.stack([raw >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)
        heads.append(bits[: data["rows"] * data["columns"]].reshape(data["rows"], data["columns"]))
    return heads


def test_cells_are_the_block_mask() -> None:
    """Of every head: the second one sees less."""
    spec = a_spec({"kind": "predicate", "text": "k <= q - 37 * h"}, [150])
    heads = _cells(page(simulate(spec, "h100", (16,), (16,))))
    mask = Scene.of(simulate(spec, "cpu", (16,), (16,))).mask
    assert len(heads) == 2 and heads[0].shape == (10, 10)
    for cells, kinds in zip(heads, mask.to_dense()[0]):
        assert np.array_equal(cells, classes_apart(kinds, mask))
    assert (heads[0] != heads[1]).any()


def test_text_of_a_spec_is_text() -> None:
    """What a spec says by name or in a predicate never becomes markup."""
    spec = a_spec({"kind": "predicate", "text": "(k<=q)and(q<b_script[k]+1000)"}, [150])
    tables = {"b_script": np.zeros(150, np.int64)}
    text = page(simulate(spec, "h100", (16,), (16,), tables=tables), tables=tables)
    elements = Elements(text)
    assert not elements.wrong and not elements.open
    assert "(k&lt;=q)and(q&lt;b_script[k]+1000)" in text and "q<b_script" not in text


def test_a_target_of_ones_own_is_text(tmp_path: Path) -> None:
    record = json.loads((Path(attncc.__file__).parent / "targets" / "data" / "h100.json").read_text(encoding="utf-8"))
    record["name"] = HOSTILE
    file = tmp_path / "own.json"
    file.write_text(json.dumps(record), encoding="utf-8")
    spec = tmp_path / "spec.json"
    spec.write_text(a_spec({"kind": "causal"}, [512]).to_json(), encoding="utf-8")
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"kernel_ms": 2.0, "dense_ms": 5.0, "device": HOSTILE}]), encoding="utf-8")
    out = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(spec), "-o", str(out), "--results", str(results)]).exit_code == 0
    text = out.read_text(encoding="utf-8")
    assert "alert(1)" in text and "<script>alert" not in text and "<img" not in text
    CliRunner().invoke(app, ["report", str(spec), "-o", str(out), "--target", str(file)])
    assert "<script>alert" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("tokens", [[1], [7], [3, 5], [2, 2, 2]])
def test_small_grids(tokens: list[int]) -> None:
    text = page(simulate(a_spec({"kind": "full"}, tokens), "h100"))
    assert not Elements(text).wrong


def test_an_architecture_has_no_times_and_says_so() -> None:
    text = page(simulate(a_spec({"kind": "causal"}, [512]), "sm_90"))
    assert "architecture" in text and not Elements(text).wrong


def test_lengths_at_run_time() -> None:
    spec = AttentionSpec.model_validate({"tokens": [None], "heads": 2, "head_dim": 64, "mask": {"kind": "causal"}})
    assert "1,000" in page(simulate(spec, "h100", lengths=(1000,)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "h1000"], "h1000"),
        (["--q-tile", "8,8"], "tile"),
        (["--results", "missing.json"], "missing.json"),
        (["-o", "missing/folder/page.html"], "missing/folder"),
    ],
)
def test_bad_arguments_name_themselves(tmp_path: Path, arguments: list[str], said: str) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(a_spec({"kind": "causal"}, [512]).to_json(), encoding="utf-8")
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(spec), "-o", str(out), *arguments])
    assert result.exit_code != 0
    assert said in result.stderr.replace("\n", "")
    assert not out.exists()
