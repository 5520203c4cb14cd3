"""The code's shape: sizes, import direction, and what may not be written at all."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attncc"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}

# What each part may import. Modules right under attncc/ are either the surface, which may import anything, or leaves
# (errors, knobs, ...), which import no part and which any part may import.
DOWNWARD = {
    "ir": set[str](),
    "targets": set[str](),
    "spec": {"ir"},
    "passes": {"ir", "spec", "targets"},
    "pipeline": {"ir", "spec", "passes", "targets"},
    "simulator": {"ir", "spec", "passes", "pipeline", "targets"},
    "integrations": {"ir", "spec", "passes"},
    "codegen": {"ir", "spec", "passes", "targets"},
    "runtime": {"ir", "spec", "passes", "pipeline", "targets", "codegen"},
}
SURFACE = {"__init__", "__main__", "api", "cli"}
# A convenience may reach up when it is called, never when its module is imported: spec.to_block_mask() runs a pass.
WHEN_CALLED = {"spec": {"passes", "integrations"}}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(node: ast.AST) -> list[str]:
    """The dotted names that an import statement may load; empty for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):  # the linter has banned relative ones
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Every import as (dotted name, line, only when a function is called)."""
    deferred = {id(node) for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        for name in imported(node):
            yield name, getattr(node, "lineno", 0), id(node) in deferred


def parts_imported(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Imports of attncc's own parts, as (part, line, only when called)."""
    for name, line, deferred in imports(tree):
        if name.startswith("attncc."):
            yield name.split(".")[1], line, deferred


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def misdirected(path: Path, tree: ast.AST) -> Iterator[str]:
    """Imports of `path` that go against the direction, one message each."""
    part = part_of(path)
    if part in SURFACE:
        return
    allowed = DOWNWARD.get(part, set())
    for target, line, deferred in parts_imported(tree):
        late = WHEN_CALLED.get(part, set()) if deferred else set()
        if target != part and (target in DOWNWARD or target in SURFACE) and target not in allowed | late:
            yield f"{where(path, line)}: {part} imports {target}"


def test_functions_are_short() -> None:
    defs = [node for tree in TREES.values() for node in functions(tree)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in defs]
    assert percentile(lengths, 0.5) <= 8
    assert percentile(lengths, 0.95) <= 40


def test_files_are_short() -> None:
    assert percentile([len(path.read_text(encoding="utf-8").splitlines()) for path in FILES], 0.95) <= 500


def test_imports_go_one_way() -> None:
    assert [message for path, tree in TREES.items() for message in misdirected(path, tree)] == []


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("ir/graph.py", "from attncc.spec import AttentionSpec", True),
        ("spec/attention.py", "from attncc.passes import block_mask", True),
        ("spec/attention.py", "def f():\n    from attncc.passes import block_mask", False),
        ("spec/attention.py", "def f():\n    from attncc.codegen import emit", True),
        ("simulator/bounds.py", "import attncc.codegen.printer", True),
        ("targets/table.py", "from attncc import runtime", True),
        ("codegen/printer.py", "from attncc.passes.plan import Plan", False),
        ("runtime/kernel.py", "from attncc.api import compile", True),
        ("errors.py", "from attncc.ir import graph", True),
        ("passes/tiles.py", "from attncc.errors import SpecError", False),
        ("cli/main.py", "from attncc.runtime import Kernel", False),
    ],
)
def test_the_direction_check_bites(file: str, line: str, wrong: bool) -> None:
    assert bool(list(misdirected(PACKAGE / file, ast.parse(line)))) == wrong


def test_the_reference_imports_no_codegen() -> None:
    """The reference is what kernels are judged by, so it may share nothing with what prints them."""
    paths = [path for path in FILES if path.name.startswith("reference")]
    assert [path for path in paths if "codegen" in {part for part, *_ in parts_imported(TREES[path])}] == []


def test_short_names_are_not_imported() -> None:
    """`import ir` finds the link at the root here and nothing, or a stranger, where attncc is installed."""
    found = [(path, name) for path, tree in TREES.items() for name, *_ in imports(tree)]
    assert [where(path, 1) for path, name in found if name.split(".")[0] in {"ir", "passes", "codegen"}] == []


EXECUTING = {"sympify", "parse_expr"}


def executes_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
        return True
    if isinstance(node, ast.Attribute | ast.Name):
        return (node.attr if isinstance(node, ast.Attribute) else node.id) in EXECUTING
    return any(EXECUTING & set(name.split(".")) for name in imported(node))


def test_no_text_is_executed() -> None:
    """Specs come from files, and these would run what a file says."""
    found = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree) if executes_text(node)]
    assert [where(path, getattr(node, "lineno", 0)) for path, node in found] == []


@pytest.mark.parametrize("text", ["eval('1')", "exec(s)", "sympy.sympify(s)", "from sympy import sympify", "sympify(s)"])
def test_the_execution_check_bites(text: str) -> None:
    assert any(executes_text(node) for node in ast.walk(ast.parse(text)))


def test_no_path_of_one_machine() -> None:
    absolute = re.compile(r"(?<![\w.:/])/(?:home|work|root|usr|opt|tmp|mnt|Users)/")
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert [(str(path), match.group()) for path, text in texts.items() for match in absolute.finditer(text)] == []


@pytest.mark.parametrize("name", ["ir", "passes", "codegen"])
def test_root_links_lead_into_the_package(name: str) -> None:
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).resolve() == PACKAGE / name


def test_only_attncc_is_packaged() -> None:
    setuptools = pytest.importorskip("setuptools")
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = set(setuptools.find_packages(str(ROOT), include=settings["packages"]["find"]["include"]))
    assert {name.split(".")[0] for name in packages} == {"attncc"}
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in FILES}
    assert packages == folders, "a folder without __init__.py would be left out of the wheel"
