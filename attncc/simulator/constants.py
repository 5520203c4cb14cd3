"""The few constants of the time model that no data sheet gives, each fitted or measured, with its source. Facts; no formulas."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attncc.errors import InputError


class Pipeline(BaseModel):
    """How a kind of kernel overlaps its units.

    Of two phases that could run at once, such as matrix products and softmax, the share `overlap` of the shorter one is hidden behind the
    longer one; the rest is paid. It may be below zero: then the phases hinder each other. `block_cycles` are paid once for each block of
    rows: its first loads, its epilogue.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    overlap: float = Field(ge=-1.0, le=1.0)
    block_cycles: float = Field(ge=0.0)
    source: str


class Power(BaseModel):
    """What the power limit leaves of the clock.

    A matrix unit that is busy all the time at the device's highest clock would draw `tensor_power` times the board's limit. Power grows
    with the cube of the clock, and the limit is reached within about `settle_seconds`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    tensor_power: float = Field(gt=0.0)
    settle_seconds: float = Field(gt=0.0)
    source: str


class Constants(BaseModel):
    """All of them. `power` is by device; a device without measurements keeps the clock of its data sheet."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pipelines: dict[str, Pipeline]
    power: dict[str, Power]

    def pipeline(self, name: str) -> Pipeline:
        """A kind of kernel.

        Raises:
            InputError: an unknown one; lists the known ones.
        """
        if name not in self.pipelines:
            raise InputError("pipeline", f"{name!r} is unknown; known are {', '.join(self.pipelines)}")
        return self.pipelines[name]


@cache
def shipped() -> Constants:
    """The constants that attncc comes with; `python -m benchmarks.calibrate` fits them."""
    return Constants.model_validate_json((resources.files("attncc.simulator") / "data" / "constants.json").read_text(encoding="utf-8"))


def read(path: str | Path) -> Constants:
    """Constants fitted on a device of one's own.

    Raises:
        InputError: a file that cannot be read, or says something else; names it.
    """
    try:
        return Constants.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise InputError("constants", f"{path}: {error}") from error
