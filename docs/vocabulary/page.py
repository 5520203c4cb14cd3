"""The page's text. All of it comes from the models: names, defaults, docstrings, and the examples' own `repr`."""

from __future__ import annotations

import inspect
import json
from typing import Any

from pydantic import BaseModel

from attncc import AttentionSpec
from docs.vocabulary.examples import SECTIONS, Example

TITLES = {
    "masks": "Masks",
    "loads": "Loads of q and k",
    "scores": "Score maps",
    "normalizers": "Normalizers",
    "gates": "Gates",
    "routing": "Head routing",
}
INTRO = """# The spec

Everything an `AttentionSpec` may say, kind by kind. This page is written from the models (`make docs`); `attncc schema` prints them as a
JSON schema, `attncc validate SPEC` checks a file.

Scores are `s = scale * q.k`, q and k after the `loads`; the score maps act on them in order, then mask, normalizer, factor, routing, gate.
Tokens of a grid are flattened row-major. A row that no key is allowed for gives 0 before the gate, never NaN.
"""


def page() -> str:
    """docs/spec.md."""
    parts = [INTRO, _fields(AttentionSpec, "AttentionSpec")]
    for section, examples in SECTIONS.items():
        parts.append(f"## {TITLES[section]}\n")
        parts += [entry(section, e) for e in examples]
    return "\n".join(parts)


def entry(section: str, example: Example) -> str:
    """One kind: signature, what its docstring says, the example as Python and JSON, and the picture of a mask."""
    name = type(example.part).__name__
    picture = f"![{name}](pictures/{picture_name(example)})\n" if section == "masks" else ""
    data = json.dumps(plain(example.part))
    return (
        f"### {name}\n\n`{signature(type(example.part))}`\n\n{inspect.cleandoc(type(example.part).__doc__ or '')}\n\n"
        f"```python\n{code(section, example.part)}\n```\n```json\n{data}\n```\n{picture}"
    )


def plain(value: Any) -> Any:
    """A part as JSON data: its kind, and the fields that it was given."""
    if isinstance(value, BaseModel):
        names = [name for name in type(value).model_fields if name in value.model_fields_set and name != "kind"]
        return {"kind": value.kind} | {name: plain(getattr(value, name)) for name in names}  # type: ignore[attr-defined]
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def picture_name(example: Example) -> str:
    """File of a mask's picture."""
    return f"{example.part.kind}.png"


def signature(model: type[BaseModel]) -> str:
    """`Neighborhood(window, stride=1, dilation=1, causal=False)`."""
    fields = ((name, f) for name, f in model.model_fields.items() if name not in ("kind", "version"))
    return f"{model.__name__}({', '.join(name if f.is_required() else f'{name}={_default(f)}' for name, f in fields)})"


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return f"{value!r}" if not isinstance(value, BaseModel) else code("", value)


def code(section: str, part: Any) -> str:
    """The part as Python: fields that have another value than their default."""
    if section == "masks" and part.kind in ("and", "or", "not"):
        parts = [code(section, m) for m in part.parts]
        return f"~{parts[0]}" if part.kind == "not" else {"and": " & ", "or": " | "}[part.kind].join(parts)
    given = ((name, getattr(part, name)) for name in type(part).model_fields if name in part.model_fields_set)
    inner = ", ".join(f"{name}={_value(section, value)}" for name, value in given)
    return f"{section + '.' if section else ''}{type(part).__name__}({inner})"


def _value(section: str, value: Any) -> str:
    if isinstance(value, BaseModel):
        return code(section, value)
    if isinstance(value, tuple):
        return f"({', '.join(_value(section, v) for v in value)}{',' if len(value) == 1 else ''})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _fields(model: type[BaseModel], name: str) -> str:
    """A model's signature, its docstring, and the fields that say something of their own."""
    described = "".join(f"- `{field}`: {f.description}.\n" for field, f in model.model_fields.items() if f.description)
    return f"## {name}\n\n`{signature(model)}`\n\n{inspect.cleandoc(model.__doc__ or '')}\n\n{described}"
