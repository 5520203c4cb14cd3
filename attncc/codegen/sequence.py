"""Prints `forward` of a file whose kernels run one after another: those that keep a number of each row, then the one that reads it."""

from __future__ import annotations

from collections.abc import Sequence

from attncc.codegen.launcher import Launcher
from attncc.codegen.lines import call, indented


def sequence(launchers: Sequence[Launcher]) -> list[str]:
    """The host function; all kernels take the same lists, for all have the same tiles."""
    *before, last = launchers
    taken = [*last.streamed, *(name for name in _reads(last) if name not in last.facts.given)]
    arguments = [*taken, *_shared(last), *(["tokens=None"] if last.needs_tokens else []), "out=None"]
    body = [line for each in before for line in call(f"{each.facts.statistic} = {each.facts.launcher}", _passed(each))]
    body += call(f"return {last.facts.launcher}", [*_passed(last), "out=out"])
    made = ", then ".join(str(each.facts.statistic) for each in before)
    about = f'    """{last.about()[:-1]}. Finds {made} [B, {last.facts.heads[0]}, Nq] first."""'
    return [*call("def forward", arguments, "):"), about, *indented(body)]


def _passed(launcher: Launcher) -> list[str]:
    tokens = ["tokens=tokens"] if launcher.needs_tokens else []
    return [*launcher.streamed, *_reads(launcher), *_shared(launcher), *tokens]


def _reads(launcher: Launcher) -> list[str]:
    return [*launcher.facts.gates, *launcher.facts.tables, *launcher.facts.load_tables]


def _shared(launcher: Launcher) -> list[str]:
    return ["lists"] if launcher.facts.lists else []
