"""Published speed figures of the systems that attncc grew from, beside what the simulator says of the same configuration.

python -m benchmarks.seeds

`seeds.json` has a record for each figure. Where our number is another than theirs, `why` says what the difference is made of; where
a configuration is not published or not a spec, `gap` says so and nothing is computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from attncc import AttentionSpec, SpeedupReport, simulate
from attncc.passes.tiles import Shape
from benchmarks.report import markdown_table, print_table, tracked

ROOT = Path(__file__).parent
RECORDS = ROOT / "seeds.json"
RESULTS = ROOT / "results" / "seeds.md"
AGREE, COUNTS_AGREE = 0.10, 0.025
"""Largest difference that needs no explanation, relative to the published figure; of counts, which are exact but for rounding."""
COUNTS = ("FLOPs ratio", "sparsity")

Unit = Literal["attention speedup", "FLOPs ratio", "sparsity", "end to end", "none"]


class Seed(BaseModel):
    """One published figure and the configuration it was got with."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    claim: str = Field(min_length=1, description="the figure in the source's terms")
    figure: float | None = Field(gt=0, description="the same as a factor; a share of pairs left out where the unit is sparsity")
    unit: Unit
    spec: AttentionSpec | None = Field(description="null: cannot be computed, `gap` says why")
    baseline: AttentionSpec | None = Field(default=None, description="what the figure is against; null: all pairs of the same grid")
    baseline_instances: int = Field(default=1, ge=1, description="baselines that one call replaces")
    repeats: int = Field(default=1, ge=1, description="calls that one baseline is replaced by")
    target: str = "h100"
    q_tile: tuple[int, ...] | None = None
    k_tile: tuple[int, ...] | None = None
    batch: int = Field(default=1, ge=1)
    attention_share: float | None = Field(default=None, gt=0, le=1, description="of the model's time; null: not stated")
    stand_in: str = Field(default="", description="how the spec differs from the published mask")
    gap: str = ""
    why: str = Field(default="", description="why we differ")

    @model_validator(mode="after")
    def _computed_or_explained(self) -> Seed:
        if (self.spec is None) != bool(self.gap) or (self.spec is None) != (self.figure is None):
            raise ValueError("a record has a spec and a figure, or a gap")
        return self


@dataclass(frozen=True)
class Levels:
    """Gains over the baseline by pairs, by tiles and by predicted time; None where the time model has none."""

    flop: float
    tile: float
    predicted: float | None

    @property
    def best(self) -> float:
        """The level nearest to a measurement."""
        return self.tile if self.predicted is None else self.predicted


@dataclass(frozen=True)
class Row:
    """A record with what we make of it. `ours` is in the claim's unit; None where the attention share is not known."""

    seed: Seed
    levels: Levels
    ours: float | None
    share: float | None

    @property
    def difference(self) -> float | None:
        """Relative to the figure; of a sparsity, of the pairs that are left."""
        if self.ours is None or self.seed.figure is None:
            return None
        ours, theirs = (1 - self.ours, 1 - self.seed.figure) if self.seed.unit == "sparsity" else (self.ours, self.seed.figure)
        return ours / theirs - 1

    @property
    def agrees(self) -> bool:
        return self.difference is not None and abs(self.difference) <= (COUNTS_AGREE if self.seed.unit in COUNTS else AGREE)


def read() -> list[Seed]:
    """All records."""
    return TypeAdapter(list[Seed]).validate_json(RECORDS.read_text(encoding="utf-8"))


def levels(seed: Seed) -> Levels:
    """The three levels against the record's own baseline."""
    assert seed.spec is not None
    ours, scale = _simulate(seed, seed.spec, seed.batch), seed.baseline_instances / seed.repeats
    if seed.baseline is None:
        return Levels(scale * ours.flop_bound, scale * ours.tile_bound, _scaled(ours.predicted_speedup, scale))
    # What one call replaces would run as one batch.
    base = _simulate(seed, seed.baseline, seed.batch * seed.baseline_instances)
    return Levels(
        scale * _pairs(base) / _pairs(ours), scale * base.tiles.visited / ours.tiles.visited, _scaled(_faster(base, ours), 1 / seed.repeats)
    )


def _simulate(seed: Seed, spec: AttentionSpec, batch: int) -> SpeedupReport:
    return _simulated(spec.model_dump_json(), seed.target, seed.q_tile, seed.k_tile, batch)


@cache
def _simulated(text: str, target: str, q_tile: Shape | None, k_tile: Shape | None, batch: int) -> SpeedupReport:
    """Two figures may have one configuration."""
    return simulate(AttentionSpec.model_validate_json(text), target, q_tile, k_tile, batch=batch)


def _pairs(report: SpeedupReport) -> float:
    return prod(report.tokens) * prod(report.key_tokens) / report.flop_bound


def _faster(base: SpeedupReport, ours: SpeedupReport) -> float | None:
    if base.prediction is None or ours.prediction is None:
        return None
    return base.prediction.milliseconds / ours.prediction.milliseconds


def _scaled(factor: float | None, scale: float) -> float | None:
    return None if factor is None else factor * scale


def amdahl(share: float, gain: float) -> float:
    """The whole model's gain where a share of its time gets faster."""
    return 1 / (1 - share + share / gain)


def needed_share(whole: float, gain: float) -> float | None:
    """The share of the model's time that makes `gain` the gain `whole`; None where no share does."""
    return (1 - 1 / whole) / (1 - 1 / gain) if gain >= whole > 1 else None


def row(seed: Seed) -> Row:
    """What the simulator says of a record that has a spec."""
    assert seed.figure is not None
    found = levels(seed)
    if seed.unit == "end to end":
        share = seed.attention_share
        return Row(seed, found, None if share is None else amdahl(share, found.best), share or needed_share(seed.figure, found.best))
    ours = {"FLOPs ratio": found.flop, "sparsity": 1 - 1 / found.flop}.get(seed.unit, found.best)
    return Row(seed, found, ours, None)


COLUMNS = ["figure", "published", "unit", "FLOP bound", "tile bound", "prediction", "ours / theirs"]


def cells(found: Row) -> list[str]:
    """One line of the table; an end-to-end figure has the attention share that it needs in the last column."""
    seed, bounds = found.seed, found.levels
    predicted = "-" if bounds.predicted is None else f"{bounds.predicted:.2f}"
    return [seed.name, f"{seed.figure:g}", seed.unit, f"{bounds.flop:.2f}", f"{bounds.tile:.2f}", predicted, _verdict(found)]


def _verdict(found: Row) -> str:
    if found.difference is not None:
        return f"{found.difference + 1:.2f}" + (" of what is left" if found.seed.unit == "sparsity" else "")
    return "out of reach" if found.share is None else f"needs share {found.share:.0%}"


def document(rows: Sequence[Row], seeds: Sequence[Seed]) -> str:
    """`results/seeds.md`."""
    agreeing = sum(found.agrees for found in rows)
    compared = sum(found.difference is not None for found in rows)
    notes = [[r.seed.name, r.seed.claim, r.seed.source, r.seed.stand_in, r.seed.why] for r in rows]
    gaps = [[seed.name, seed.claim, seed.source, seed.gap] for seed in seeds if seed.spec is None]
    parts = [
        "# Published figures and the simulator",
        f"{len(rows)} figures computed; {compared} can be compared without the attention share of a model, {agreeing} of them agree within "
        f"{AGREE:.0%} ({COUNTS_AGREE:.1%} where the figure is a count). {len(gaps)} cannot be computed.",
        "Levels are gains over the record's baseline: dense attention, or causal where the mask is causal. An attention speedup is held "
        "against the prediction; beside an end-to-end figure stands the share of the model's time that attention must have for it. "
        "No level is a measurement. `make bench-seeds` writes this file.",
        "\n".join(markdown_table(COLUMNS, [cells(r) for r in rows])),
        "## Claims, stand-ins, disagreements",
        "\n".join(markdown_table(["figure", "claim", "source", "how the spec differs from the mask", "why we differ"], notes)),
        "## Figures that cannot be computed",
        "\n".join(markdown_table(["figure", "claim", "source", "why"], gaps)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    seeds = read()
    computed = [seed for seed in seeds if seed.spec is not None]
    rows = [row(seed) for seed in tracked(computed, len(computed), "seeds")]
    print_table(
        "Published figures and the simulator", COLUMNS, [cells(r) for r in rows], f"{len(seeds) - len(rows)} more cannot be computed"
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(document(rows, seeds), encoding="utf-8")
    print(f"claims, sources and reasons: {RESULTS.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    main()
