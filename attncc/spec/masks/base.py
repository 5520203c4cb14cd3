"""What every mask shares: combination by `&`, `|` and `~`, fields given once or for each axis, and the words for edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from attncc.ir.expr import Expr, all_of, const, maximum, minimum
from attncc.spec.model import Grid, Part

if TYPE_CHECKING:
    from attncc.spec.masks.combine import And, Mask, Not, Or

Align = Literal["top_left", "bottom_right"]
Edge = Literal["shift", "truncate", "zero_pad", "pad_token", "must_divide"]
"""What happens where a window or a cell crosses the grid's end; it changes the softmax's denominator, so it is spelled.

`shift` moves the window inward; `truncate` drops the missing keys; `zero_pad` keeps them with k = v = 0; `pad_token` keeps them with
one learned key and value, what the projection makes of a padded token; `must_divide` refuses a grid that has such a place.
"""
PADDING: tuple[Edge, ...] = ("zero_pad", "pad_token")
"""Policies that keep keys beyond the grid."""
PerAxis = int | tuple[int, ...]
Size = Annotated[int, Field(ge=1)]
Reach = Annotated[int, Field(ge=0)]
Sizes = Size | Annotated[tuple[Size, ...], Field(min_length=1, max_length=3)]
Reaches = Reach | Annotated[tuple[Reach, ...], Field(min_length=1, max_length=3)]
TABLE_NAME = r"^[a-z][a-z0-9_]*$"

_ELSEWHERE = {
    "shift": "only a neighborhood shifts its window",
    "truncate": "missing keys cannot be dropped here",
    "zero_pad": "the keys it has beyond the grid are no product of lengths; pad k and v by zeros and widen the grid",
    "pad_token": "the keys it has beyond the grid are no product of lengths; pad the tokens before their projection and widen the grid",
    "must_divide": "nothing has to divide",
}


@dataclass(frozen=True)
class Missing:
    """Keys beyond the grid that a row keeps: the policy, and their number `count`, an expression of the query and the head."""

    edge: Edge
    count: Expr


class Pattern(Part):
    """A mask. `flat` says that it acts on the flattened token index only, `bounded` that some lengths do not fit it."""

    flat: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def __and__(self, other: Mask) -> And:
        from attncc.spec.masks.combine import And

        return And(masks=(*_terms(self, And), *_terms(other, And)))

    def __or__(self, other: Mask) -> Or:
        from attncc.spec.masks.combine import Or

        return Or(masks=(*_terms(self, Or), *_terms(other, Or)))

    def __invert__(self) -> Not:
        from attncc.spec.masks.combine import Not

        return Not(mask=self)  # type: ignore[arg-type]

    @property
    def parts(self) -> tuple[Any, ...]:
        """The masks that it is made of."""
        return ()

    def problems(self, grid: Grid) -> list[str]:
        """What contradicts the grid, one sentence each."""
        return []

    def predicate(self, grid: Grid) -> Expr:
        """True where the query sees the key."""
        raise NotImplementedError

    def missing(self, grid: Grid) -> Missing | None:
        """Keys beyond the grid that the mask's edge policy keeps; None where it keeps none."""
        return None


def _terms(mask: Any, kind: type[Any]) -> tuple[Any, ...]:
    return tuple(mask.masks) if isinstance(mask, kind) else (mask,)


def any_of(terms: Sequence[Expr]) -> Expr:
    """Disjunction of any number of masks; False for none."""
    return ~all_of([~term for term in terms])


def by_axis(value: Any, rank: int) -> tuple[Any, ...]:
    """One value for each axis, of a field that gives one for all or a tuple."""
    return value if isinstance(value, tuple) else (value,) * rank


def axis_problems(mask: Part, names: Sequence[str], grid: Grid) -> list[str]:
    """Fields that have another number of axes than the grid."""
    values = ((name, getattr(mask, name)) for name in names)
    return [f"{n} has {len(v)} axes, tokens have {grid.rank}" for n, v in values if isinstance(v, tuple) and len(v) != grid.rank]


def edge_problems(edge: Edge, supported: Sequence[Edge]) -> list[str]:
    """An edge policy that a mask does not have, and what to do instead."""
    return [] if edge in supported else [f"edge {edge!r} is not supported, use {' or '.join(supported)}: {_ELSEWHERE[edge]}"]


def beyond(edge: Edge, grid: Grid, boxes: Sequence[tuple[Expr, int]]) -> Missing | None:
    """What a window of (first key, keys) on each axis has beyond the grid: all of it less what is inside."""
    if edge not in PADDING:
        return None
    inside: Expr = const(1)
    for axis, (start, size) in enumerate(boxes):
        inside = inside * maximum(minimum(start + size, grid.length("k", axis)) - maximum(start, 0), 0)
    return Missing(edge, prod(size for _, size in boxes) - inside)


def diagonal(grid: Grid, align: Align) -> Expr:
    """The flattened key index that stands opposite the query."""
    query = grid.flat("q")
    return query + grid.offset if align == "bottom_right" else query


def too_long(name: str, size: int, grid: Grid) -> list[str]:
    """The problem of a size that exceeds the key tokens, where these are known."""
    total = known_tokens(grid)
    return [f"{name} {size} exceeds the {total} key tokens"] if total is not None and size > total else []


def known_tokens(grid: Grid) -> int | None:
    """Key tokens, where all axes are known."""
    total = 1
    for length in grid.key:
        if length is None:
            return None
        total *= length
    return total
