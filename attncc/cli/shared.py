"""What commands share: their common options, reading a spec, and where things are printed."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncc.errors import InputError, SpecError
from attncc.spec.attention import AttentionSpec
from attncc.spec.reading import Problem, read_spec

if TYPE_CHECKING:
    from rich.console import Console

SpecPath = Annotated[str, typer.Argument(metavar="SPEC", help="a .json or .yaml file, or - for standard input")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, and nothing else, on standard output")]
DEFAULT_TARGET = "h100"
PIPE_WIDTH = 120
TargetName = Annotated[str, typer.Option("--target", "-t", help="h100, sm_90, mi300x, cpu, ..., or a .json file (see: attncc targets)")]


def _sides(text: str) -> tuple[int, ...]:
    try:
        sides = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sides = ()
    if not sides or min(sides) < 1:
        raise typer.BadParameter(f"{text!r} is no list of positive integers such as 16,8")
    return sides


QueryTile = Annotated[
    Any, typer.Option("--q-tile", parser=_sides, metavar="N,..", help="tokens of a query tile by axis; default: the plan's")
]
KeyTile = Annotated[Any, typer.Option("--k-tile", parser=_sides, metavar="N,..", help="tokens of a key tile by axis; default: the plan's")]
LengthsOption = Annotated[
    Any, typer.Option("--lengths", parser=_sides, metavar="N,..", help="tokens of every axis that the spec leaves open")
]
TablesPath = Annotated[Path | None, typer.Option("--tables", metavar="FILE.npz", help="integer tables that the mask reads, by name")]


# ---- input ---------------------------------------------------------------------------------------------------------------------


def spec_problems(path: str) -> tuple[AttentionSpec | None, list[Problem]]:
    """The spec in a file, or what is wrong with it.

    Raises:
        SpecError: a file that cannot be read.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError("spec", f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SpecError("spec", f"{path} is no UTF-8 text") from None
    return read_spec(text, _form(path, text))


def _form(path: str, text: str) -> str:
    if path == "-":
        return "json" if text.lstrip()[:1] in ("{", "[") else "yaml"
    return "yaml" if path.endswith((".yaml", ".yml")) else "json"


def the_spec(path: str) -> AttentionSpec:
    """The spec in a file.

    Raises:
        SpecError: everything that is wrong with it, on one line.
    """
    spec, problems = spec_problems(path)
    if spec is None:
        raise SpecError(problems[0].field, "; ".join([problems[0].problem, *map(str, problems[1:])]))
    return spec


def the_tables(path: Path | None) -> dict[str, Any]:
    """Arrays of an .npz file by name.

    Raises:
        InputError: a file that cannot be read, or that holds objects instead of numbers.
    """
    if path is None:
        return {}
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise InputError("tables", f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, AttributeError, zipfile.BadZipFile, EOFError):
        raise InputError("tables", f"{path} is no .npz file of plain arrays (numpy.savez makes one)") from None


# ---- output --------------------------------------------------------------------------------------------------------------------


def console() -> Console:
    """Standard output, for people."""
    from rich.console import Console

    # A pipe has no width of its own, and 80 columns break most lines.
    sized = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if sized else PIPE_WIDTH, soft_wrap=not sys.stdout.isatty())


def print_json(data: Any) -> None:
    """Standard output, for machines."""
    sys.stdout.write((data if isinstance(data, str) else json.dumps(data, indent=2)) + "\n")


@contextmanager
def working(what: str) -> Iterator[Any]:
    """A spinner on standard error while something takes long; what it yields says what it is at.

    Where there is no terminal: one line, once it has taken a second.
    """
    from rich.console import Console

    err = Console(stderr=True, highlight=False)
    if err.is_terminal:
        with err.status(what) as status:
            yield status.update
        return
    later = threading.Timer(1.0, lambda: err.print(f"{what} ...", soft_wrap=True))
    later.daemon = True
    later.start()
    try:
        yield lambda text: None
    finally:
        later.cancel()


@contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Any]:
    """A progress bar on standard error, where that is a terminal; what it yields is called with the number of things done since."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, advance=done)
