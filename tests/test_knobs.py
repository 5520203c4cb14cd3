"""Settings: environment, scopes, and imports that load nothing they need not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import attncc
from attncc import knobs


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path))
    assert knobs.current().cache_dir == tmp_path
    monkeypatch.delenv("ATTNCC_CACHE_DIR")
    assert "attncc" in str(knobs.current().cache_dir)


def test_scopes_nest_and_end(tmp_path: Path) -> None:
    before = knobs.current()
    with knobs.scope(cache_dir=tmp_path):
        with knobs.scope(interpret=True) as inner:
            assert inner.cache_dir == tmp_path and inner.interpret
        assert not knobs.current().interpret or before.interpret
    assert knobs.current() == before


def test_an_unknown_knob_is_refused() -> None:
    with pytest.raises(TypeError, match=r"unknown knobs cache_dri; known are cache_dir"), knobs.scope(cache_dri=1):
        pass


@pytest.mark.parametrize(
    "code",
    [
        "import attncc",
        "from attncc import AttentionSpec, gates, masks, normalizers, scores; AttentionSpec(tokens=8, heads=1, head_dim=8)",
        "import attncc; attncc.Plan; attncc.errors; attncc.knobs",
        "import attncc; attncc.simulate(attncc.AttentionSpec(tokens=256, heads=1, head_dim=64), 'h100')",
    ],
)
def test_specs_load_neither_torch_nor_triton(code: str) -> None:
    check = f"import sys; {code}; sys.exit(' '.join({{'torch', 'triton', 'sympy'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in attncc.__all__:
        assert getattr(attncc, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'compiel'"):
        attncc.compiel  # noqa: B018


def test_the_version_is_the_project_s() -> None:
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["project"]["version"] == attncc.__version__
