"""`attncc validate` and `attncc schema`: what a spec may say, and whether one says it."""

from __future__ import annotations

import sys
from dataclasses import asdict

import typer

from attncc.cli.shared import Json, SpecPath, console, print_json, spec_problems
from attncc.errors import SpecError
from attncc.spec.reading import Problem


def validate(spec: SpecPath, as_json: Json = False) -> None:
    """Says whether a spec is valid, or lists what is wrong with it, field by field (exit code 1)."""
    try:
        found, problems = spec_problems(spec)
    except SpecError as error:
        found, problems = None, [Problem(error.field, str(error).removeprefix(f"{error.field}: "))]
    if as_json:
        print_json({"ok": found is not None, "digest": found.digest if found else None, "problems": [asdict(p) for p in problems]})
    elif found is not None:
        console().print(f"ok: {found.digest[:12]}", soft_wrap=True)
    for problem in [] if as_json else problems:
        print(f"attncc: {problem}", file=sys.stderr)
    if found is None:
        raise typer.Exit(1)


def schema(as_json: Json = False) -> None:
    """Prints the JSON schema of specs, for editors and validators; with or without --json it is JSON."""
    from attncc.spec.attention import AttentionSpec

    data = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "AttentionSpec", **AttentionSpec.model_json_schema()}
    print_json(data)
