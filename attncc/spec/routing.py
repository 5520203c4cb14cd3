"""Head routing: which heads a token's query uses, and with which weight. It acts on output rows, after normalisation, before the gate.

A row (token, head) that is not routed is never computed: its output is 0 before the gate, its LSE -inf, its gradients 0, exactly as for
a row that sees no key. Keys and values of a head stay whole, for other tokens use them. Each kind is two formulas: which rows are kept
(`rows`), and what the kept ones are multiplied by (`weigh`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, load, var
from attncc.spec.gates import OUTPUT
from attncc.spec.model import Grid, Part


class HeadRouting(Part):
    """What every kind has; by default all rows are computed, and stay as they are."""

    def problems(self, heads: int) -> list[str]:
        """Why `heads` heads cannot be routed so."""
        return []

    def rows(self, grid: Grid) -> Expr:
        """Which rows are kept, in b, h and the query's coordinates."""
        return const(True)

    def weigh(self, grid: Grid) -> Expr:
        """The row `o`, weighted."""
        return OUTPUT

    def shares(self, heads: int) -> tuple[float, ...]:
        """Share of the rows of each head that are computed, on average, for all that the spec says."""
        return (1.0,) * heads


class MixtureOfHeads(HeadRouting):
    """o * w[b, h, q]; the first `shared` heads are always on, each token uses at most `top_k` of the others (Jin et al., arXiv 2410.11842).

    The run-time input `routing` `[B, H, Nq]` (float32) holds every head's weight after the model's router: shared heads' factors first,
    then the routed heads', exactly 0 where a head is not among the token's chosen ones (`chosen * probabilities`, renormalised or not).
    Weights have gradients; that of an unchosen one is 0, as the router's own mask makes it anyway. Hard routing passes ones and zeros.

    `top_k` is what `attncc.simulate` counts; a token with more non-zero weights costs more and is computed all the same.
    """

    kind: Literal["mixture_of_heads"] = "mixture_of_heads"
    shared: int = Field(default=0, ge=0)
    top_k: int = Field(ge=1)

    def problems(self, heads: int) -> list[str]:
        total = self.shared + self.top_k
        return [f"shared + top_k = {total} heads for a token, of heads={heads}"] if total > heads else []

    def rows(self, grid: Grid) -> Expr:
        return _or_shared(self.shared, apply(Op.NE, _weights(grid), const(0.0)))

    def weigh(self, grid: Grid) -> Expr:
        return OUTPUT * _weights(grid)

    def shares(self, heads: int) -> tuple[float, ...]:
        routed = heads - self.shared
        return (1.0,) * self.shared + (self.top_k / routed,) * routed


class ReLURouting(HeadRouting):
    """o * max(w[b, h, q], 0): any number of heads a token, those with a positive weight (ReMoE, Wang et al., arXiv 2412.14711).

    The run-time input `routing` `[B, H, Nq]` (float32) holds the router's logits, or weights that are >= 0 already; its gradient is
    that of the ReLU. The first `shared` heads are always on, with their weights as they are.
    """

    kind: Literal["relu"] = "relu"
    shared: int = Field(default=0, ge=0)

    def problems(self, heads: int) -> list[str]:
        return [f"shared = {self.shared} leaves none of heads={heads} to route"] if self.shared >= heads else []

    def rows(self, grid: Grid) -> Expr:
        return _or_shared(self.shared, _weights(grid) > 0.0)

    def weigh(self, grid: Grid) -> Expr:
        weight = apply(Op.RELU, _weights(grid))
        return OUTPUT * (apply(Op.SELECT, var("h") < self.shared, _weights(grid), weight) if self.shared else weight)


class HeadScale(HeadRouting):
    """o * s[h]: one factor a head, the run-time input `head_scale` `[H]`, or `[B, H]` with `per_batch` (float32, with gradient).

    Every row is computed, those of a head with factor 0 too: the gradient of the factor needs them.
    """

    kind: Literal["head_scale"] = "head_scale"
    per_batch: bool = False

    def weigh(self, grid: Grid) -> Expr:
        return OUTPUT * _by_head("head_scale", Kind.FLOAT, self.per_batch)


class HeadMask(HeadRouting):
    """Heads that are off give 0 and cost nothing: the run-time input `head_mask` `[H]`, or `[B, H]` with `per_batch` (bool, True = on)."""

    kind: Literal["head_mask"] = "head_mask"
    per_batch: bool = False

    def rows(self, grid: Grid) -> Expr:
        return apply(Op.NE, _by_head("head_mask", Kind.INT, self.per_batch), const(0))


Routing = Annotated[MixtureOfHeads | ReLURouting | HeadScale | HeadMask, Field(discriminator="kind")]


def _weights(grid: Grid) -> Expr:
    return load(Table("routing", Kind.FLOAT, ("B", "H", "NQ")), var("b"), var("h"), grid.flat("q"))


def _by_head(name: str, kind: Kind, per_batch: bool) -> Expr:
    index = [*([var("b")] if per_batch else []), var("h")]
    return load(Table(name, kind, ("B", "H") if per_batch else ("H",)), *index)


def _or_shared(shared: int, kept: Expr) -> Expr:
    return (var("h") < shared) | kept if shared else kept
