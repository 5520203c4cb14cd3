"""`SpeedupReport`: what `attncc.simulate` says, as data and as a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from attncc.errors import InputError
from attncc.simulator.predict import Prediction
from attncc.spec.attention import AttentionSpec

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from rich.table import Table

Kind = Literal["mask", "window", "curves", "roofline", "timeline"]
Count = int | float
"""A number of tiles: whole, unless it is a mean over heads or batch elements."""
Bound = Annotated[float, BeforeValidator(lambda x: math.inf if x is None else x)]
"""A factor; infinite where nothing is left to compute, which JSON writes as null."""


class TileCounts(BaseModel):
    """Tiles of one head of one batch element; a mean where the mask differs between them.

    `total` = `query` x `key` counts the dense grid without dilation. `visited` = `full` + `partial`; tiles never cross a residue class of
    a dilated mask, so there may be more of them than a dense grid has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    query: int = Field(description="query tiles of the dense grid")
    key: int = Field(description="key tiles of the dense grid")
    total: int = Field(description="tiles that dense attention visits: query x key")
    visited: Count = Field(description="tiles with at least one allowed pair")
    full: Count = Field(description="visited tiles whose every pair is allowed: they need no mask")
    partial: Count = Field(description="visited tiles that need their mask")


class SpeedupReport(BaseModel):
    """How much faster than its baseline an attention can be, at three levels, each tighter than the one before.

    `flop_bound` counts pairs, `tile_bound` tiles, `predicted_speedup` time. No level is a measurement.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    spec: AttentionSpec
    target: str = Field(description="a name from `attncc.targets`; the bounds themselves do not depend on it, default tiles do")
    baseline: Literal["dense attention, same tiles"] = "dense attention, same tiles"
    tokens: tuple[int, ...] = Field(description="query tokens by axis, open axes filled in")
    key_tokens: tuple[int, ...] = Field(description="key tokens by axis, open axes filled in")
    q_tile: tuple[int, ...]
    k_tile: tuple[int, ...]
    flop_bound: Bound = Field(description="all pairs / allowed pairs; infinite (null in JSON) where no pair is allowed")
    tile_bound: Bound = Field(description="tiles of the dense grid / visited tiles; infinite (null in JSON) where none is visited")
    predicted_speedup: float | None = Field(
        default=None, description="the baseline's time / the kernel's; null where `unpredicted` says why"
    )
    prediction: Prediction | None = Field(default=None, description="the kernel's time")
    baseline_prediction: Prediction | None = Field(default=None, description="the time of what `predicted_speedup` is against")
    unpredicted: str = Field(default="", description="why there are no times, where there are none")
    sparsity: float = Field(description="1 - allowed pairs / all pairs")
    block_sparse: bool = Field(description="whether no visited tile is partial, so that the kernel never evaluates the mask")
    exact: bool = Field(description="whether every tile was decided; if not, undecided ones count as partial and visited")
    tiles: TileCounts

    @property
    def lengths(self) -> list[int]:
        """Lengths of the axes that the spec leaves open, of `tokens`, then of `key_tokens`."""
        pairs = [*zip(self.spec.tokens, self.tokens), *zip(self.spec.key_tokens or (), self.key_tokens)]
        return [known for said, known in pairs if said is None]

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text, the spec included."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str) -> SpeedupReport:
        """The report that JSON text says.

        Raises:
            pydantic.ValidationError: anything that is no report.
        """
        return cls.model_validate_json(text)

    def plot(self, path: str | Path | None = None, kind: Kind = "mask", **options: Any) -> Figure:
        """A picture of the report (needs matplotlib).

        Args:
            path: a .png, .svg or .pdf file to write it to; default: none.
            kind: "mask" (with its block mask), "window" (what one query sees of a grid), "curves" (speedup against length), "roofline"
                (of the device) or "timeline" (which SM runs which blocks when).
            options: `tables` that the mask reads, `head` and `query` that are drawn, `measured` points (`attncc.simulator.measured`).

        Raises:
            UnsupportedError: matplotlib is not installed, or the report has nothing for this picture; says what is missing.
            InputError: missing tables, an unknown kind, a file that cannot be written.
        """
        from attncc.simulator.pictures import plot

        return plot(self, path, kind, **options)

    def end_to_end(self, attention_share: float) -> float:
        """Predicted speedup of a whole model, `attention_share` of whose time with the baseline is this attention (Amdahl's law).

        Raises:
            InputError: a share that is not between 0 and 1; a report without a prediction.
        """
        if not 0 <= attention_share <= 1:
            raise InputError("attention_share", f"must be between 0 and 1, not {attention_share!r}")
        if self.predicted_speedup is None:
            raise InputError("attention_share", f"there is no prediction: {self.unpredicted}")
        rest = 1.0 - attention_share + attention_share / self.predicted_speedup
        return 1.0 / rest if rest else math.inf

    def table(self) -> Table:
        """The report as a rich table: `rich.print(report.table())`, or the report itself."""
        from rich.table import Table

        table = Table(title=self._title(), caption=f"baseline: {self.baseline}", title_justify="left", caption_justify="left", min_width=60)
        table.add_column("level")
        table.add_column("speedup", justify="right")
        table.add_column("what it counts")
        for row in self._rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        """The same in plain lines."""
        lines = [f"{level:<12}{factor:>8}  {what}" for level, factor, what in self._rows()]
        return "\n".join([self._title(), *lines, f"baseline: {self.baseline}"])

    def _title(self) -> str:
        return f"{_grid(self.tokens)} tokens, tiles {_grid(self.q_tile)} by {_grid(self.k_tile)}, {self.target}"

    def _rows(self) -> list[tuple[str, str, str]]:
        tiles = self.tiles
        kinds = (
            "block-sparse: no tile needs its mask" if self.block_sparse else f"{_count(tiles.full)} full, {_count(tiles.partial)} partial"
        )
        undecided = "" if self.exact else ", undecided ones among the partial"
        return [
            ("FLOP bound", _factor(self.flop_bound), f"pairs: {self.sparsity:.2%} are masked"),
            ("tile bound", _factor(self.tile_bound), f"tiles: {_count(tiles.visited)} of {_count(tiles.total)} visited"),
            ("", "", kinds + undecided),
            *self._times(),
        ]

    def _times(self) -> list[tuple[str, str, str]]:
        if self.prediction is None or self.baseline_prediction is None or self.predicted_speedup is None:
            return [("prediction", "-", self.unpredicted)]
        ours, dense = self.prediction, self.baseline_prediction
        return [
            ("prediction", _factor(self.predicted_speedup), f"{_time(ours.milliseconds)}, limited by {ours.limit}"),
            ("", "", f"{dense.kernel}: {_time(dense.milliseconds)}"),
        ]

    def __rich__(self) -> Any:
        return self.table()


def _grid(sides: tuple[int, ...]) -> str:
    return " × ".join(map(str, sides))


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:,.0f} ms"


def _factor(speedup: float) -> str:
    return "∞" if math.isinf(speedup) else f"{speedup:.2f}×"


def _count(n: Count) -> str:
    return f"{n:,}" if isinstance(n, int) else f"{n:,.1f}"
