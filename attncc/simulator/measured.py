"""Measured times to draw beside bounds and predictions: a file of one's own, or what `attncc bench --json` prints."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from attncc.errors import InputError


class Measured(BaseModel):
    """One measurement: a kernel's time and its baseline's. `tokens` by axis; default: those of the spec. Other keys are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    kernel_ms: float = Field(gt=0.0)
    dense_ms: float = Field(gt=0.0)
    tokens: tuple[int, ...] | None = None
    device: str = "an unnamed device"

    @property
    def speedup(self) -> float:
        """How many times faster than dense attention."""
        return self.dense_ms / self.kernel_ms


_FORM = TypeAdapter(list[Measured])


def read_measured(path: str | Path) -> list[Measured]:
    """Measurements in a JSON file: one, or a list of them.

    Raises:
        InputError: a file that cannot be read, or says something else; names it.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return _FORM.validate_python(data if isinstance(data, list) else [data])
    except OSError as error:
        raise InputError("results", f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError("results", f"{path} holds no measurements with kernel_ms and dense_ms: {where}: {problem['msg']}") from None
    except ValueError as error:
        raise InputError("results", f"{path} is no JSON file: {error}") from None
