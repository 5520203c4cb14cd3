"""Specs from text: JSON or YAML into plain data, and what is wrong with that data, field by field, in words for the person who wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError

from attncc.errors import SpecError
from attncc.spec import gates, masks, normalizers, scores
from attncc.spec.attention import AttentionSpec

LARGEST = 1 << 20
"""Characters of a spec's text, at most: far above any that people write."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one field; `field` is its path in the data, such as `mask.masks.0.window`."""

    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


def read_spec(text: str, form: str = "json") -> tuple[AttentionSpec | None, list[Problem]]:
    """The spec that a text says, or everything that is wrong with it.

    Args:
        text: JSON or YAML.
        form: "json" or "yaml".
    """
    try:
        data = plain_data(text, form)
        if not isinstance(data, dict):
            raise SpecError("spec", f"must be an object with fields such as tokens and heads, not {_shown(data)}")
        return AttentionSpec.model_validate_json(json.dumps(data)), []
    except ValidationError as error:
        return None, problems(error, data)
    except SpecError as error:
        return None, [Problem(error.field, str(error).removeprefix(f"{error.field}: "))]


# ---- text to data --------------------------------------------------------------------------------------------------------------


def plain_data(text: str, form: str) -> Any:
    """The data that JSON or YAML text says.

    Raises:
        SpecError: text that is no JSON or YAML, a key that stands twice, or YAML that is more than plain data.
    """
    if len(text) > LARGEST:
        raise SpecError("spec", f"longer than {LARGEST} characters")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number) if form == "json" else _yaml_data(text)
    except SpecError:
        raise
    except RecursionError:
        raise SpecError("spec", "nested too deeply") from None
    except json.JSONDecodeError as error:
        raise SpecError("spec", f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number with thousands of digits
        raise SpecError("spec", f"not {form.upper()}: {_first_line(error)}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SpecError(key, "stands twice")
        found[key] = value
    return found


def _no_number(name: str) -> Any:
    raise SpecError("spec", f"not JSON: {name} is no number")


def _yaml_data(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise SpecError("spec", "YAML needs the package pyyaml; install it, or write the spec as JSON") from None
    try:
        # Aliases let a few lines stand for gigabytes, and no spec needs one.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise SpecError("spec", "YAML aliases (*name) are not read: write the value out")
        return json.loads(json.dumps(yaml.safe_load(text), allow_nan=False))
    except yaml.YAMLError as error:
        raise SpecError("spec", f"not YAML: {_first_line(error)}") from None
    except TypeError as error:
        raise SpecError("spec", f"YAML beyond plain data: {error}") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- pydantic's errors in words ------------------------------------------------------------------------------------------------


def problems(error: ValidationError, data: Any) -> list[Problem]:
    """Everything that is wrong with data that pydantic refused; several complaints about one field become one."""
    found: dict[str, dict[str, None]] = {}
    for item in error.errors(include_url=False):
        for problem in _problems(item, data):
            found.setdefault(problem.field, {})[problem.problem] = None
    # A list is also called too short where one of its entries was refused: that is no news.
    inner = [field for field in found if not any(other.startswith(f"{field}.") for other in found)]
    return [Problem(field, ", or ".join(found[field])) for field in inner]


def _problems(item: Mapping[str, Any], data: Any) -> Iterator[Problem]:
    path, parent = _path(item["loc"], data)
    context = item.get("ctx", {})
    if item["type"] == "contradiction":
        for text in context["problems"]:
            field, _, problem = text.partition(": ")
            yield Problem(field, problem)
    else:
        yield Problem(".".join(map(str, path)) or "spec", _words(item, context, path, parent))


def _path(loc: Sequence[int | str], data: Any) -> tuple[list[int | str], Any]:
    """The path of a field in the data, and what holds it; pydantic's location also names the types it tried, which are left out."""
    path: list[int | str] = []
    parent: Any = None
    here = data
    for i, step in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(here, list) and isinstance(step, int) and step < len(here):
            path, parent, here = [*path, step], here, here[step]
        elif isinstance(here, dict) and (step in here or (last and step != here.get("kind"))):
            path, parent, here = [*path, step], here, here.get(step)
    return path, parent


def _words(item: Mapping[str, Any], context: Mapping[str, Any], path: list[int | str], parent: Any) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return _unknown_key(str(path[-1]), parent)
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_invalid":
        return f"kind {_shown(context['tag'])} is unknown; known are {str(context['expected_tags']).replace(chr(39), '')}"
    if kind == "union_tag_not_found":
        return "needs a kind that says which one it is"
    if kind == "json_invalid":  # the text was JSON, so this is its depth
        return "nested too deeply"
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"needs at least {context['min_length']} entries, has {context['actual_length']}"
    message = str(item["msg"]).removeprefix("Input ").partition(", unable")[0]
    return f"{message[:1].lower()}{message[1:]}, not {_shown(item['input'])}"


def _unknown_key(key: str, parent: Any) -> str:
    known = _fields(parent.get("kind")) if isinstance(parent, dict) else []
    close = get_close_matches(key, known, 1)
    return f"unknown key; did you mean {close[0]!r}?" if close else f"unknown key; known are {', '.join(known)}"


def _fields(kind: Any) -> list[str]:
    """Fields of the part of a given kind; of the spec itself where there is none."""
    unions = (masks.Mask, scores.Score, normalizers.NormalizerSpec)
    parts = [gates.Output, *(part for union in unions for part in get_args(get_args(union)[0]))]
    for part in parts:
        if kind is not None and part.model_fields["kind"].default == kind:
            return list(part.model_fields)
    return list(AttentionSpec.model_fields)


def _shown(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
