"""What a printer needs to know of a kernel, read off its plan once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from attncc.ir.expr import Expr, Table, const, tables
from attncc.ir.graph import (
    ROW_INPUTS,
    Graph,
    GraphOp,
    Node,
    loads_of,
    logit_share,
    reduction,
    row_class,
    sink_names,
    statistic,
    table_of,
    weight_factor,
)
from attncc.ir.intervals import may_be_infinite
from attncc.passes.footprint import comfort, registers_asked
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import the_mask
from attncc.targets import Target


@dataclass(frozen=True)
class Chunk:
    """Columns `start : start + width` of a head, `valid` of them real: matrix units want powers of two of at least 16."""

    start: int
    width: int
    valid: int

    @property
    def padded(self) -> bool:
        return self.valid < self.width


def chunks(width: int, widest: int = 256) -> tuple[Chunk, ...]:
    """A head's columns in descending powers of two, the last padded to 16: 80 = 64 + 16, 72 = 64 + 16 (8 valid), 96 = 128 (32 idle)."""
    found, start = [], 0
    while start < width:
        left = width - start
        size = min(widest, max(16, 1 << (left.bit_length() - 1)))
        # One padded chunk beats several small ones where little is wasted, as 24 = 32 columns with 8 idle.
        if 16 < left != size < widest and left * 4 >= 3 * (size * 2):
            size *= 2
        found.append(Chunk(start, size, min(size, left)))
        start += size
    return tuple(found)


@dataclass(frozen=True)
class Facts:
    """One kernel on one target."""

    plan: KernelPlan
    target: Target
    before: tuple[KernelPlan, ...] = ()
    """Kernels of the same file that run first, each for a statistic that this one reads."""

    @property
    def statistic(self) -> str | None:
        """The number of each row that the kernel is for, by name; None where it combines values."""
        return statistic(self.body)

    @property
    def row_number(self) -> str | None:
        """The number of each row that the kernel writes, if any."""
        return self.statistic or ("lse" if self.lse else None)

    @property
    def given(self) -> set[str]:
        """Tables that kernels before make."""
        return {str(statistic(kernel.graph)) for kernel in self.before}

    @property
    def suffix(self) -> str:
        """Of names that the kernels of one file would share."""
        return f"_{self.statistic}" if self.statistic else ""

    @property
    def launcher(self) -> str:
        """The host function that launches this kernel."""
        return f"find{self.suffix}" if self.statistic else "attend" if self.before else "forward"

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told at launch, beside the arguments."""
        asked = registers_asked(self.body, self.target)
        return {"num_warps": self.plan.num_warps, "num_stages": self.plan.num_stages} | ({} if asked is None else {"maxnreg": asked})

    @cached_property
    def body(self) -> Graph:
        return self.plan.graph

    @property
    def rank(self) -> int:
        return self.body.rank

    @cached_property
    def mask(self) -> Node:
        return the_mask(self.body)

    @property
    def residual(self) -> Expr | None:
        """The part of the mask that is no band; None where there is none."""
        residual: Expr = self.mask["residual"]
        return None if residual is const(True) else residual

    @cached_property
    def maps(self) -> list[Expr]:
        """Score maps in order."""
        return [n["value"] for n in self.body.find(GraphOp.MAP)]

    @cached_property
    def inputs(self) -> dict[str, Node]:
        """Input nodes by name."""
        return {n["name"]: n for n in self.body.find(GraphOp.INPUT)}

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Tables that expressions read, by name."""
        streamed = ("q", "k", "v", *ROW_INPUTS, *self.load_tables)
        return {name: table_of(n) for name, n in self.inputs.items() if name not in streamed}

    @cached_property
    def load_tables(self) -> dict[str, Table]:
        """Tables that the loads of q and k read, by name."""
        ops = (n for side in "qk" for n in loads_of(self.body, side))
        return {i["name"]: table_of(i) for n in ops for i in n.inputs[1:]}

    @cached_property
    def heads(self) -> tuple[int, int, int]:
        """Query, key and value heads."""
        q, k = (int(self.inputs[name]["shape"][1]) for name in "qk")
        return q, k, int(self.inputs["v"]["shape"][1]) if "v" in self.inputs else k

    @cached_property
    def dtype(self) -> str:
        """Element type of q, k, v and the output."""
        return str(self.inputs["q"]["dtype"])

    @cached_property
    def width(self) -> int:
        """Columns of q and k."""
        return int(self.inputs["q"]["shape"][3])

    @cached_property
    def value_width(self) -> int:
        """Columns of v and the output; 0 where no values are read."""
        return int(self.inputs["v"]["shape"][3]) if "v" in self.inputs else 0

    @property
    def widest_chunk(self) -> int:
        """Columns multiplied at once."""
        return comfort(self.body, self.target).columns

    @property
    def row_class(self) -> str:
        """What a row keeps from key to key: `attncc.ir.rows`."""
        return row_class(self.body)

    @property
    def counts_keys(self) -> bool:
        """Whether the loop counts the keys of each row; where the mask is bands, these say how many there are."""
        return self.row_class == "mean" and self.residual is not None

    @property
    def softmax(self) -> bool:
        return self.row_class == "softmax"

    @property
    def sink(self) -> Expr | None:
        """The logit of the key beside those of the mask."""
        found: Expr | None = self.weights.get("sink")
        return found

    @cached_property
    def bias_scale(self) -> float | None:
        """Scale of the score of a sink that is a key with a value; None where there is none."""
        dots = self.body.find(GraphOp.DOT)
        return float(dots[0]["scale"]) if dots else None

    @cached_property
    def sink_names(self) -> tuple[str, str]:
        """Names of the key and the value of a sink that has them."""
        found = sink_names(self.body)
        assert found is not None
        return found

    @cached_property
    def value_scale(self) -> Expr | None:
        """What the value of each key is multiplied by."""
        return next((n.get("value_scale") for n in self.body.find(GraphOp.COMBINE)), None)

    @cached_property
    def factor(self) -> Expr | None:
        """What the weight of each pair is multiplied by."""
        return weight_factor(self.body)

    @property
    def divisor(self) -> Expr | None:
        """What rows are divided by that their keys do not decide."""
        found: Expr | None = self.weights.get("divisor")
        return found

    @cached_property
    def weights(self) -> Node:
        """The op that walks the keys: weights, or a root."""
        return reduction(self.body)

    @property
    def rooted(self) -> bool:
        return self.row_class == "root"

    @cached_property
    def scale(self) -> float:
        return float(self.body.find(GraphOp.SCORES)[0]["scale"])

    @cached_property
    def gates(self) -> dict[str, Node]:
        """Gates in order, by the name of what they read."""
        return {n.inputs[1]["name"]: n for n in self.body.find(GraphOp.GATE)}

    @property
    def narrow_gates(self) -> list[str]:
        """Gates with one logit a row and head: such rows are too short to lie on 16-byte boundaries."""
        return [name for name, n in self.gates.items() if logit_share(n, self.heads[0])[1] == 1 < self.value_width]

    @property
    def lse(self) -> bool:
        return any(name == "lse" for name, _ in self.body.outputs)

    @property
    def q_rows(self) -> int:
        """Rows of a query tile."""
        return prod(self.plan.q_tile)

    @property
    def k_rows(self) -> int:
        """Rows of a key tile."""
        return prod(self.plan.k_tile)

    @property
    def boxes(self) -> bool:
        """Whether keys and values come by bulk copy where the tensors allow it."""
        return any(v.address == "box" for v in self.plan.views)

    def boxed(self, operand: str) -> bool:
        """Whether an operand comes by bulk copy where the tensors allow it."""
        return any(v.operand == operand and v.address == "box" for v in self.plan.views)

    @property
    def keys_prepared(self) -> bool:
        """Whether a launch before does what is done to keys."""
        return any(v.prepared for v in self.plan.views)

    def open_lengths(self) -> list[str]:
        """Names of the lengths given at run time: `nq0`, `nk0`, .. ."""
        axes = (("nq", self.body.query), ("nk", self.body.key))
        return [f"{side}{a}" for side, lengths in axes for a, n in enumerate(lengths) if n is None]

    def length(self, side: str, axis: int) -> str:
        """Code for the length of an axis: a literal, or the name of an argument."""
        known: Any = (self.body.query if side == "q" else self.body.key)[axis]
        return f"n{side}{axis}" if known is None else str(known)

    @property
    def lists(self) -> bool:
        """Whether the kernel is told its key tiles."""
        return self.plan.block_mask == "lists"

    @property
    def box(self) -> bool:
        """Whether the kernel visits all key tiles between the first and the last on each axis, under the mask."""
        return self.plan.block_mask == "box"

    @property
    def signed_infinity(self) -> bool:
        """Whether a score map may give -inf of its own accord: a table of the caller may hold it, or an op make it."""
        return any(t.values is None for t in tables(*self.maps)) or may_be_infinite(*self.maps)
