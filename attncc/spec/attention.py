"""`AttentionSpec`: one attention, declared. It validates itself, round-trips through JSON and YAML, and hashes by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from attncc.ir.expr import Expr, Kind, Table, load, var
from attncc.ir.rows import ABSENT, Normalizer, RowClass
from attncc.spec.checks import contradiction, spec_problems
from attncc.spec.gates import Gate
from attncc.spec.loads import LoadSpec
from attncc.spec.masks import Full, Mask
from attncc.spec.model import NO_DROPOUT, Axes, Grid, Part
from attncc.spec.normalizers import NormalizerSpec, Softmax
from attncc.spec.padding import padding_logit
from attncc.spec.routing import Routing
from attncc.spec.scores import Factor, Scale, Score, factor_value

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DType = Literal["float16", "bfloat16", "float32", "float64"]
Positive = Annotated[int, Field(ge=1)]


class AttentionSpec(Part):
    """What one attention computes: `out = gate(route((normalize(mask(scores(scale * q.k))) * factor) @ v) + addend)`.

    q is `[B, heads, N, head_dim]`, k `[B, key_heads, M, head_dim]`, v `[B, value_heads, M, value_dim]`; N and M are the products of
    `tokens` and `key_tokens`, flattened row-major. An axis given as None is known only at run time. Query head h reads key head
    `h // (heads / key_heads)` and value head `h // (heads / value_heads)`.

    Raises:
        pydantic.ValidationError: unknown keys, contradictory sizes, a mask that does not fit the grid; names the field.
    """

    version: Literal[1] = 1
    tokens: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(min_length=1, max_length=3)
    key_tokens: tuple[Annotated[int, Field(ge=1)] | None, ...] | None = Field(default=None, min_length=1, max_length=3)
    heads: Positive
    key_heads: Positive | None = None
    value_heads: Positive | None = None
    head_dim: Positive = Field(le=1024)
    value_dim: Positive | None = Field(default=None, le=1024)
    dtype: DType = "float16"
    loads: tuple[LoadSpec, ...] = ()
    token_scales: tuple[Literal["q", "k", "v"], ...] = Field(
        default=(),
        description="operands whose rows are multiplied, after loads, by the run-time inputs `q_scale` [B, heads, N], `k_scale` "
        "[B, key_heads, M], `v_scale` [B, value_heads, M], float32 with gradients: gates of tokens and heads",
    )
    mask: Mask = Field(default_factory=Full)
    scores: tuple[Score, ...] = ()
    normalizer: NormalizerSpec = Field(default_factory=Softmax)
    factor: Factor | None = Field(
        default=None,
        description="what normalized weights are multiplied by, finite: the table of a score map that would add it, as in "
        '`scores.RelativeBias(extent=(128,), table="urpe")`, or an expression without `s`. Rows no longer add up to 1; lse and sinks stay '
        "as they are. So URPE (Luo et al., arXiv 2205.13401)",
    )
    addend: bool = Field(
        default=False,
        description="adds the run-time input `addend` [B, heads, N, value_dim] before the gate, as LePE does; so rows of several "
        "normalizers add up, as in differential attention (examples/branches.py)",
    )
    gate: Gate | None = None
    routing: Routing | None = None
    outputs: tuple[Literal["output", "lse"], ...] = ("output",)

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        for name in ("dropout", "dropout_p"):
            if isinstance(value, dict) and name in value:
                raise contradiction([f"{name}: {NO_DROPOUT}"])
        return value

    @field_validator("normalizer", mode="before")
    @classmethod
    def _built(cls, value: Any) -> Any:
        absent = ABSENT.get(str(value.get("kind"))) if isinstance(value, dict) else None
        if absent is not None:
            found = f"normalizer: {value['kind']} is not built: its rows keep {absent.keeps}. Nearest supported: {absent.nearest}"
            raise contradiction([found])
        return value

    @field_validator("tokens", "key_tokens", mode="before")
    @classmethod
    def _one_axis(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _consistent(self) -> AttentionSpec:
        if problems := spec_problems(self):
            raise contradiction(problems)
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> AttentionSpec:
        """The spec with fields replaced, validated like any other: nothing that was derived from the old fields is kept."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(update or {}))

    @cached_property
    def predicate(self) -> Expr:
        """The mask's formula over the grid."""
        return self.mask.predicate(self.grid)

    @property
    def grid(self) -> Grid:
        """Query and key token grids."""
        shared = self.key_tokens is None
        return Grid(self.tokens, self.tokens if self.key_tokens is None else self.key_tokens, shared, self.heads)

    @property
    def head_counts(self) -> tuple[int, int, int]:
        """Query, key and value heads."""
        key = self.key_heads or self.heads
        return self.heads, key, self.value_heads or key

    @property
    def head_dims(self) -> tuple[int, int]:
        """Width of q and k, width of v."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def scale_reads(self) -> dict[str, Expr]:
        """The factors of `token_scales` by operand, as reads of their tables."""
        found: dict[str, Expr] = {}
        for side, heads in zip("qkv", self.head_counts):
            if side not in self.token_scales:
                continue
            token, tokens = ("q", "NQ") if side == "q" else ("k", "NK")
            table = Table(f"{side}_scale", Kind.FLOAT, ("B", heads, tokens))
            found[side] = load(table, var("b"), var("h") // (self.heads // heads), self.grid.flat(token))
        return found

    @cached_property
    def weight_factor(self) -> Expr | None:
        """What normalized weights are multiplied by; None where they stay."""
        return None if self.factor is None else factor_value(self.factor, self.grid, self.heads)

    @cached_property
    def record(self) -> Normalizer:
        """The normalizer, with the keys that the mask's edge policy keeps beyond the grid."""
        record, missing = self.normalizer.record(self.grid), self.mask.missing(self.grid)
        if missing is None or record.row_class is RowClass.POINTWISE:
            return record
        return replace(record, sink=padding_logit(self, missing))

    @property
    def sink_tables(self) -> dict[str, Table]:
        """Key and value that a sink with both adds to every row: its own, or those of missing keys."""
        (_, key_heads, value_heads), (width, value_width) = self.head_counts, self.head_dims
        kind = "bias" if self.mask.missing(self.grid) is None else "pad"
        shapes = {f"k_{kind}": (key_heads, width), f"v_{kind}": (value_heads, value_width)}
        return {name: Table(name, Kind.FLOAT, shape) for name, shape in shapes.items()}

    @property
    def scale(self) -> float:
        """Factor of q.k."""
        first = self.scores[0] if self.scores else None
        return first.value if isinstance(first, Scale) else float(self.head_dim**-0.5)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal specs have equal digests, in any process."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_block_mask(
        self,
        batch: int | None = None,
        device: Any = "cpu",
        *,
        lengths: Sequence[int] | int | None = None,
        tables: Mapping[str, Any] | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """The mask as FlexAttention's `BlockMask`, from analysis: no array of all pairs is made.

        Args:
            batch: elements, where the mask differs between them and no table says how many.
            device: where the mask's tensors live.
            lengths: tokens of each axis that the spec leaves open.
            tables: integer tables that the mask reads, by name.
            block_size: tokens of a block, or of a query and of a key block. Blocks are runs of the flattened tokens.

        Returns:
            A mask for `flex_attention(..., block_mask=..)`, with one batch element and one head where it is the same for all.

        Raises:
            InputError: missing lengths or tables, impossible block sizes; names the argument.
        """
        from attncc.integrations.flex import to_block_mask

        return to_block_mask(self, batch, device, lengths, tables, block_size)

    def to_mask_mod(
        self, tables: Mapping[str, Any] | None = None, *, lengths: Sequence[int] | int | None = None, device: Any = "cpu"
    ) -> Callable[..., Any]:
        """The mask as FlexAttention's mask_mod `(b, h, q, k) -> bool` over flattened tokens, for `vmap` and `torch.compile`.

        Args:
            tables: integer tables that the mask reads, by name.
            lengths: tokens of each axis that the spec leaves open.
            device: where tables are put.

        Raises:
            InputError: missing lengths or tables; names the argument.
        """
        from attncc.integrations.flex import to_mask_mod

        return to_mask_mod(self, tables, lengths, device)

    def to_score_mod(
        self, tables: Mapping[str, Any] | None = None, *, lengths: Sequence[int] | int | None = None, device: Any = "cpu"
    ) -> Callable[..., Any]:
        """The score maps as FlexAttention's score_mod `(score, b, h, q, k) -> score`; pass `scale=spec.scale` beside it.

        Routing and gate act on its output: they are the caller's.

        Args:
            tables: tables that the scores read (`relative_bias`, `alibi_slopes`), by name; tensors keep their gradients.
            lengths: tokens of each axis that the spec leaves open.
            device: where tables are put.

        Raises:
            InputError: missing lengths or tables; names the argument.
            UnsupportedError: a normalizer other than softmax.
        """
        from attncc.integrations.flex import to_score_mod

        return to_score_mod(self, tables, lengths, device)

    def to_json(self, indent: int | None = 2) -> str:
        """The spec as JSON text."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str) -> AttentionSpec:
        """The spec that JSON text says.

        Raises:
            pydantic.ValidationError: anything that is not a valid spec.
        """
        return cls.model_validate_json(text)

    def to_yaml(self) -> str:
        """The spec as YAML text (needs pyyaml)."""
        import yaml

        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str) -> AttentionSpec:
        """The spec that YAML text says; only plain data is read (needs pyyaml).

        Raises:
            SpecError: text that is no YAML, or more than plain data.
            pydantic.ValidationError: anything that is not a valid spec.
        """
        from attncc.spec.reading import plain_data

        return cls.model_validate_json(json.dumps(plain_data(text, "yaml")))


__all__ = ["AttentionSpec", "Axes"]
