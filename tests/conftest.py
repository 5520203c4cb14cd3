"""Shared by every test: hypothesis profiles and seed, the two Triton modes, golden files, poisoned memory."""

from __future__ import annotations

import difflib
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

TESTS = Path(__file__).parent

# No test may fail because a machine is slow.
UNTIMED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("dev", UNTIMED)
hypothesis.settings.register_profile("ci", UNTIMED, print_blob=True)
CI_SEED = "20261121"
# For `tests.faults`: the same examples every time, and no time spent on making a failure small.
NO_SHRINKING = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("faults", UNTIMED, derandomize=True, database=None, phases=NO_SHRINKING)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed here, so that it can be printed: workers inherit it with the other options."""
    # Hypothesis also draws numbers it reads in the modules loaded so far: the same seed would give each worker other examples.
    pytest.MonkeyPatch().setattr("hypothesis.internal.conjecture.providers.is_local_module_file", lambda path: False, raising=False)
    chosen = config.getoption("hypothesis_seed", None) is not None
    if not chosen and os.environ.get("HYPOTHESIS_PROFILE") != "faults":
        # A change is judged on the same examples as the one before it; everyone else draws new ones every time.
        ci = os.environ.get("HYPOTHESIS_PROFILE") == "ci"
        config.option.hypothesis_seed = CI_SEED if ci else str(random.randrange(2**32))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if seed := config.getoption("hypothesis_seed", None):
        terminalreporter.write_line(f"repeat with --hypothesis-seed={seed}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the mode of this process cannot run: Triton reads TRITON_INTERPRET once, when it is imported."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    other = TESTS / ("aot" if interpreting else "interpreter")
    reason = "must not see TRITON_INTERPRET" if interpreting else "needs TRITON_INTERPRET=1"
    for item in items:
        if item.path.is_relative_to(other):
            item.add_marker(pytest.mark.skip(reason=f"{reason}; see `make help`"))


class Golden:
    """Compares text with tests/golden/<module>/<test>.txt, or writes that file under --update-golden."""

    def __init__(self, node: pytest.Item, update: bool) -> None:
        module = node.path.relative_to(TESTS).with_suffix("")
        self.stem = TESTS / "golden" / module / re.sub(r"[^\w.=,-]+", "_", node.name).strip("_")
        self.update = update

    def __call__(self, text: str, part: str = "") -> None:
        """Fail with a diff unless `text` is what the file says; `part` names one of several texts of one test."""
        path = self.stem.with_name(self.stem.name + (f".{part}" if part else "") + ".txt")
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists():
            pytest.fail(f"{path} is missing; --update-golden writes it", pytrace=False)
        elif (expected := path.read_text(encoding="utf-8")) != text:
            lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), path.name, "now", lineterm="")
            pytest.fail("\n".join([*lines, "(--update-golden accepts this)"]), pytrace=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(text)` compares with this test's file; `golden(text, "plan")` with its file for that part."""
    return Golden(request.node, request.config.getoption("--update-golden"))


@pytest.fixture(scope="session", autouse=True)
def graphs_read_back() -> Iterator[None]:
    """Every graph that passes the verifier in any test, bodies of kernels included, is what its text says."""
    from attncc.ir import verify
    from attncc.ir.graph import Graph
    from attncc.ir.graph_text import parse_graph

    verified, seen = verify._verify, set[Graph]()

    def checked(graph: Graph, legal: Any) -> None:
        verified(graph, legal)
        if graph not in seen:
            assert parse_graph(str(graph)) == graph
            seen.add(graph)

    verify._verify = checked
    yield
    verify._verify = verified


def _poisoning(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, its fresh memory filled with what no right answer contains: NaN, or the least integer."""
    import torch

    def made(*args: Any, **kwargs: Any) -> Any:
        out = make(*args, **kwargs)
        if out.dtype is torch.bool or out.is_meta:
            return out
        inexact = out.is_floating_point() or out.is_complex()
        with torch.no_grad():
            return out.fill_(float("nan") if inexact else torch.iinfo(out.dtype).min)

    return made


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch allocates without a value is poison in this test, so a read of unwritten memory shows."""
    import torch

    functions = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    methods = [(torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]
    for owner, name in functions + methods:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))
