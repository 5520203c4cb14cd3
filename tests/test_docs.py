"""docs/spec.md is what the models say, and names every kind there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from attncc import gates, loads, masks, normalizers, routing, scores
from docs.vocabulary.examples import MASKS, SECTIONS
from docs.vocabulary.page import code, page, picture_name, plain

ROOT = Path(__file__).parents[1]


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "spec.md").read_text(encoding="utf-8") == page(), "run `make docs`"
    named = {picture_name(e) for e in MASKS}
    assert {p.name for p in (ROOT / "docs" / "pictures").glob("*.png")} == named


UNIONS = {
    "masks": masks.Mask,
    "loads": loads.LoadSpec,
    "scores": scores.Score,
    "normalizers": normalizers.NormalizerSpec,
    "routing": routing.Routing,
    "gates": gates.Gate,
}


def _kinds(union: Any) -> set[str]:
    """Classes of a discriminated union, or of one class."""
    members = get_args(get_args(union)[0]) if get_args(union) else (union,)
    return {m.__name__ for m in members}


@pytest.mark.parametrize("section", sorted(UNIONS))
def test_every_kind_has_an_example(section: str) -> None:
    assert {type(e.part).__name__ for e in SECTIONS[section]} == _kinds(UNIONS[section])


@pytest.mark.parametrize(("section", "example"), [(s, e) for s, examples in SECTIONS.items() for e in examples], ids=lambda x: str(x)[:40])
def test_the_line_of_python_makes_the_part(section: str, example: Any) -> None:
    names = {"masks": masks, "scores": scores, "normalizers": normalizers, "routing": routing, "gates": gates, "loads": loads}
    assert eval(code(section, example.part), names) == example.part  # noqa: S307 (text of our own)
    assert type(example.part).model_validate_json(json.dumps(plain(example.part))) == example.part
    assert (type(example.part).__doc__ or "").strip(), "what it means is not said"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """A picture drawn now has the size of the one beside the page."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    from docs.vocabulary.pictures import draw_mask

    for example in MASKS[1:4]:
        draw_mask(example, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as new, Image.open(ROOT / "docs" / "pictures" / picture_name(example)) as old:
            assert new.size == old.size and new.getextrema() == old.getextrema()
