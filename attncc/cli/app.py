"""The commands together, and what becomes of errors: one line on standard error, exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from attncc.cli import bench, cache, compile, environment, explain, report, search, simulate, specs, targets, verify
from attncc.errors import AttnccError


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command; errors that attncc raises on purpose become one line and exit code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AttnccError as error:
            print(f"attncc: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(1) from None

    return run


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compiles a declarative attention spec into Triton kernels and bounds their speedup before anything runs.",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "validate": specs.validate,
    "schema": specs.schema,
    "explain": explain.explain,
    "simulate": simulate.simulate,
    "report": report.report,
    "compile": compile.compile,
    "verify": verify.verify,
    "bench": bench.bench,
    "targets": targets.targets,
    "env": environment.environment,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(guarded(_command))

_cache = typer.Typer(no_args_is_help=True, help="Shows, names or empties the folder of generated files.")
for _name, _command in {"info": cache.info, "path": cache.path, "clear": cache.clear}.items():
    _cache.command(_name)(guarded(_command))
app.add_typer(_cache, name="cache")

_search = typer.Typer(no_args_is_help=True, help="Compares strides, tiles, windows, masks or lengths by simulation.")
_SEARCHES: dict[str, Callable[..., None]] = {
    "stride": search.stride,
    "tiles": search.tiles,
    "front": search.front,
    "masks": search.masks,
    "lengths": search.lengths,
}
for _name, _command in _SEARCHES.items():
    _search.command(_name)(guarded(_command))
app.add_typer(_search, name="search")
