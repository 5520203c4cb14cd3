"""Masks over the order of tokens: `Causal`, `SlidingWindow`, `Prefix`, .. act on the flattened index, `CausalAxes` on each axis."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Table, all_of, const, load, var
from attncc.spec.masks.base import TABLE_NAME, Align, Pattern, Reach, Size, axis_problems, by_axis, diagonal, known_tokens, too_long
from attncc.spec.model import Grid


class Full(Pattern):
    """Every query sees every key."""

    flat: ClassVar[bool] = True
    kind: Literal["full"] = "full"

    def predicate(self, grid: Grid) -> Expr:
        return const(True)


class Causal(Pattern):
    """Keys up to the query: k <= q (`top_left`, as PyTorch's SDPA), or k <= q + Nk - Nq (`bottom_right`, as FlashAttention)."""

    flat: ClassVar[bool] = True
    kind: Literal["causal"] = "causal"
    align: Align = "top_left"

    def predicate(self, grid: Grid) -> Expr:
        return grid.flat("k") <= diagonal(grid, self.align)


class SlidingWindow(Pattern):
    """Keys from `left` before the query to `right` after it, both ends inclusive; None leaves a side open."""

    flat: ClassVar[bool] = True
    kind: Literal["sliding_window"] = "sliding_window"
    left: Annotated[int, Field(ge=0)] | None = None
    right: Annotated[int, Field(ge=0)] | None = None
    align: Align = "top_left"

    def predicate(self, grid: Grid) -> Expr:
        key, opposite = grid.flat("k"), diagonal(grid, self.align)
        sides = [] if self.left is None else [opposite - self.left <= key]
        return all_of(sides if self.right is None else [*sides, key <= opposite + self.right])

    def problems(self, grid: Grid) -> list[str]:
        total = known_tokens(grid)
        sides = (("left", self.left), ("right", self.right))
        return [f"{name}={size} reaches past {total} tokens" for name, size in sides if total and size is not None and size > total]


class Prefix(Pattern):
    """Every query sees the first `length` keys; `Causal() | Prefix(length=n)` is the prefix language model's mask."""

    flat: ClassVar[bool] = True
    kind: Literal["prefix"] = "prefix"
    length: int = Field(ge=0)

    def predicate(self, grid: Grid) -> Expr:
        return grid.flat("k") < self.length

    def problems(self, grid: Grid) -> list[str]:
        return too_long("length", self.length, grid)


class Sinks(Pattern):
    """Every query sees the first `count` keys: attention sinks, to be joined to a window by `|` (StreamingLLM, arXiv 2309.17453)."""

    flat: ClassVar[bool] = True
    kind: Literal["sinks"] = "sinks"
    count: int = Field(ge=0)

    def predicate(self, grid: Grid) -> Expr:
        return grid.flat("k") < self.count

    def problems(self, grid: Grid) -> list[str]:
        return too_long("count", self.count, grid)


class CausalAxes(Pattern):
    """Causal on each axis whose `axes` is true: k_a <= q_a; `bottom_right` lets the axis's last query see its last key.

    One truth value for all axes or one for each; an axis that is false is left open, such as the rows and columns of causal video.
    """

    kind: Literal["causal_axes"] = "causal_axes"
    axes: bool | tuple[bool, ...] = True
    align: Align = "top_left"

    def problems(self, grid: Grid) -> list[str]:
        return axis_problems(self, ["axes"], grid)

    def predicate(self, grid: Grid) -> Expr:
        return all_of([self._axis(grid, a) for a, causal in enumerate(by_axis(self.axes, grid.rank)) if causal])

    def _axis(self, grid: Grid, axis: int) -> Expr:
        query = grid.coordinate("q", axis)
        if self.align == "bottom_right":
            query = query + (grid.length("k", axis) - grid.length("q", axis))
        return grid.coordinate("k", axis) <= query


class PrefixPerSample(Pattern):
    """Every query of batch element b sees its first `lengths[b]` keys; `lengths` names a run-time integer table `[B]`.

    `Causal() | PrefixPerSample()` is the prefix language model's mask where prefixes differ (UniLM, arXiv 1905.03197).
    """

    flat: ClassVar[bool] = True
    kind: Literal["prefix_per_sample"] = "prefix_per_sample"
    lengths: str = Field(default="prefix_lengths", pattern=TABLE_NAME)

    def predicate(self, grid: Grid) -> Expr:
        return grid.flat("k") < load(Table(self.lengths, Kind.INT, ("B",)), var("b"))


class GlobalTokens(Pattern):
    """Tokens that see all and are seen by all, to be joined to a window by `|` (Longformer, arXiv 2004.05150; BigBird's).

    Either the first `count` tokens, or those where the run-time integer table named by `labels` `[B, Nq]` is not zero; `key_labels`
    names one `[B, Nk]` for keys with a grid of their own.
    """

    flat: ClassVar[bool] = True
    kind: Literal["global_tokens"] = "global_tokens"
    count: Reach | None = None
    labels: str | None = Field(default=None, pattern=TABLE_NAME)
    key_labels: str | None = Field(default=None, pattern=TABLE_NAME)

    def problems(self, grid: Grid) -> list[str]:
        if (self.count is None) == (self.labels is None):
            return ["count or labels: give one of them"]
        if self.labels is None:
            unused = ["key_labels: stands beside labels only"] if self.key_labels else []
            return [*unused, *too_long("count", self.count or 0, grid)]
        return [] if self.key_labels or grid.shared else ["key_labels is needed where keys have a grid of their own (key_tokens)"]

    def predicate(self, grid: Grid) -> Expr:
        query, key = grid.flat("q"), grid.flat("k")
        if self.labels is None:
            return (query < (self.count or 0)) | (key < (self.count or 0))
        queries = Table(self.labels, Kind.INT, ("B", "NQ"))
        keys = Table(self.key_labels, Kind.INT, ("B", "NK")) if self.key_labels else queries
        marked = [load(t, var("b"), token) for t, token in ((queries, query), (keys, key))]
        return ~(marked[0].equals(0) & marked[1].equals(0))


class StridedBlocks(Pattern):
    """S2-Attention: causal, blocks of `block` tokens, the last `local` of them, and every `stride`-th, which ones by head.

    With group g = h // group: k <= q and (q // block - k // block < local or (k // block + g * head_step + offset) % stride == 0).

    Source: Lin et al., arXiv 2407.17678, the causal form of their kernels (`group` is query heads for each key head).
    """

    flat: ClassVar[bool] = True
    kind: Literal["strided_blocks"] = "strided_blocks"
    block: Size
    local: Size
    stride: Size
    head_step: Reach = 1
    offset: Reach = 0
    group: Size = 1

    def predicate(self, grid: Grid) -> Expr:
        query, key = grid.flat("q"), grid.flat("k")
        near = query // self.block - key // self.block < self.local
        shard = key // self.block + var("h") // self.group * self.head_step + self.offset
        return (key <= query) & (near | (shard % self.stride).equals(0))
