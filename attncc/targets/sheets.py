"""Target files: one JSON object a device, every figure beside its source. What ships with attncc and what users write are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Any

from attncc.errors import TargetError
from attncc.targets.performance import Performance
from attncc.targets.records import Target

WORDS = ("name", "device", "backend", "arch", "matrix")
LIMITS = ("shared_bytes", "registers", "warp")
REQUIRED = (*WORDS, "bulk_copy", *LIMITS)
OPTIONAL = ("performance", "peak_flops")
FIGURE = ("value", "source")
CLOSE = 0.03
"""How far a peak that the vendor quotes may be from SMs x clock x rate; vendors round."""


@dataclass(frozen=True)
class Sheet:
    """A target with where its figures come from.

    `device` is the product's name, `sources` what each figure is from, by its dotted name in the file, `quoted` the vendor's peak FLOP/s.
    """

    target: Target
    device: str
    sources: Mapping[str, str]
    quoted: Mapping[str, float]

    def to_data(self) -> dict[str, Any]:
        """The file's content: saved as JSON, it is read again as the same sheet."""
        t, p = self.target, self.target.performance
        data: dict[str, Any] = {"name": t.name, "device": self.device, "backend": t.backend, "arch": t.arch, "matrix": t.matrix}
        data |= {"bulk_copy": t.bulk_copy} | {name: self._figure(name, getattr(t, name)) for name in LIMITS}
        if p is not None:
            data["performance"] = {f.name: self._figures(f"performance.{f.name}", getattr(p, f.name)) for f in fields(p)}
            data["peak_flops"] = self._figures("peak_flops", self.quoted)
        return data

    def _figures(self, name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {key: self._figure(f"{name}.{key}", inner) for key, inner in value.items()}
        return self._figure(name, value)

    def _figure(self, name: str, value: float) -> dict[str, Any]:
        return {"value": value, "source": self.sources[name]}


def read_sheet(text: str) -> Sheet:
    """The sheet that a file's text says.

    Raises:
        TargetError: no JSON, unknown or missing keys, or a figure that is impossible; names the field and the reason.
    """
    data, sources = _object("the file", _decoded(text)), dict[str, str]()
    _check_keys("", data, REQUIRED, OPTIONAL)
    words = {name: _line(name, data[name]) for name in WORDS}
    if not isinstance(data["bulk_copy"], bool):
        raise TargetError(f"bulk_copy: must be true or false, not {data['bulk_copy']!r}")
    limits = {name: _whole(name, _figure(name, data[name], sources)) for name in LIMITS}
    performance = _performance(data["performance"], sources) if "performance" in data else None
    quoted = _figures("peak_flops", data.get("peak_flops", {}), sources)
    device = words.pop("device")
    made: Any = {**words, **limits}  # Target checks the words itself
    target = Target(**made, bulk_copy=data["bulk_copy"], performance=performance)
    _check_peaks(performance.peak_flops if performance else {}, quoted)
    return Sheet(target, device, sources, quoted)


def _performance(data: Any, sources: dict[str, str]) -> Performance:
    names = [f.name for f in fields(Performance)]
    _check_keys("performance.", _object("performance", data), names)
    found: dict[str, Any] = {}
    for f in fields(Performance):
        path = f"performance.{f.name}"
        if f.name == "matrix_flops":
            found[f.name] = _figures(path, data[f.name], sources)
        else:
            value = _figure(path, data[f.name], sources)
            found[f.name] = _whole(path, value) if f.type == "int" else value
    try:
        return Performance(**found)
    except TargetError as error:
        raise TargetError(f"performance.{error}") from None


def _check_peaks(derived: Mapping[str, float], quoted: Mapping[str, float]) -> None:
    for element, peak in quoted.items():
        if not 0 < peak < inf:
            raise TargetError(f"peak_flops.{element}: must be positive and finite, not {peak!r}")
        if element not in derived:
            raise TargetError(f"peak_flops.{element}: performance.matrix_flops has no such rate")
        if abs(derived[element] - peak) > CLOSE * peak:
            raise TargetError(
                f"peak_flops.{element}: {peak:g} is quoted, but sms x clock_hz x matrix_flops.{element} is {derived[element]:g}; "
                f"they may differ by {CLOSE:.0%} (is one of them sparse, or at another clock?)"
            )


# ---- JSON ----------------------------------------------------------------------------------------------------------------------


def _decoded(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, TargetError) else TargetError(f"is no JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key in found:
        if sum(name == key for name, _ in pairs) > 1:
            raise TargetError(f"{key}: is there twice")
    return found


def _object(path: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TargetError(f"{path}: must be a JSON object, not {json.dumps(data)[:40]}")
    return data


def _check_keys(prefix: str, data: Mapping[str, Any], required: Iterable[str], optional: Iterable[str] = ()) -> None:
    required = tuple(required)
    unknown = [prefix + key for key in data if key not in (*required, *optional)]
    missing = [prefix + key for key in required if key not in data]
    if unknown:
        raise TargetError(f"{', '.join(unknown)}: unknown; known are {', '.join((*required, *optional))}")
    if missing:
        raise TargetError(f"{', '.join(missing)}: missing")


def _figures(path: str, data: Any, sources: dict[str, str]) -> dict[str, float]:
    return {key: _figure(f"{path}.{key}", value, sources) for key, value in _object(path, data).items()}


def _figure(path: str, data: Any, sources: dict[str, str]) -> float:
    """The value of `{"value": 132, "source": "..."}`; puts its source among the others."""
    if not isinstance(data, dict):
        raise TargetError(f'{path}: must be {{"value": .., "source": ".."}}, so that its source is known, not {json.dumps(data)[:40]}')
    _check_keys(f"{path}.", data, FIGURE)
    value = data["value"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TargetError(f"{path}: must be a number, not {json.dumps(value)[:40]}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise TargetError(f"{path}: has too many digits")
    sources[path] = _line(f"{path}.source", data["source"])
    return value


def _whole(path: str, value: float) -> int:
    """Counts may be written as 8e10."""
    if not isfinite(value) or value != int(value):
        raise TargetError(f"{path}: must be an integer, not {value!r}")
    return int(value)


def _line(path: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip() or not text.isprintable():
        raise TargetError(f"{path}: must be a line of text, not {json.dumps(text)[:40]}")
    return text


Reader = Callable[[], str]


def sheet_from(where: str, read: Reader) -> Sheet:
    """The sheet of a file; every error says which file.

    Raises:
        TargetError: a file that cannot be read, or whose content is refused.
    """
    try:
        return read_sheet(read())
    except OSError as error:
        raise TargetError(f"target {where}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TargetError(f"target {where}: is no UTF-8 text") from None
    except TargetError as error:
        raise TargetError(f"target {where}: {error}") from None
