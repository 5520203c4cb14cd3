"""Prints head routing: rows compacted by the launcher, gathered by the kernel, weighted in its epilogue.

Which rows a head keeps is decided per token, so that no tile is free of a head. The launcher puts each head's kept rows together on the
device (prefix sum and scatter, room for all, no wait for counts); a program takes a tile of these and finds its keys by their bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from attncc.codegen import grid
from attncc.codegen.expressions import Names, code, hoistable
from attncc.codegen.visit import ROW_NAMES, Visit
from attncc.ir.expr import Expr, Op, Table, const
from attncc.ir.graph import GraphOp, Node, gathers, logit_share

ROUTED = ["routed", "counts"]
"""Arguments of a kernel that gathers: tokens of the kept rows `[B, H, Nq + 1]`, ascending, and their number `[B, H]`, int32."""


@dataclass(frozen=True)
class RoutedRows:
    """The routing of one kernel, for its printer and its launcher's."""

    visit: Visit

    @cached_property
    def rows(self) -> Expr:
        """Which rows are kept."""
        found = self.visit.facts.body.find(GraphOp.ROUTE)
        return found[0]["rows"] if found else const(True)

    @cached_property
    def weigh(self) -> Expr | None:
        """Kept rows, weighted."""
        found = self.visit.facts.body.find(GraphOp.WEIGH)
        return found[0]["value"] if found else None

    @property
    def routes(self) -> bool:
        """Whether some rows are not computed."""
        return self.rows is not const(True)

    @property
    def gathers(self) -> bool:
        """Whether the rows of a tile are gathered: they are kept one by one, not head by head."""
        return gathers(self.visit.facts.body)

    @property
    def reads(self) -> bool:
        """Whether any formula is there."""
        return self.routes or self.weigh is not None

    @property
    def arguments(self) -> list[str]:
        """Arrays that the launcher makes."""
        return ROUTED if self.gathers else []

    # ---- the kernel ----------------------------------------------------------------------------------------------------------------

    def program(self, descending: bool) -> list[str]:
        """Which tile a program takes; it ends where there is none."""
        first = "row = tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first" if descending else "row = tl.program_id(0)"
        ids = ["h = tl.program_id(1)", "b = tl.program_id(2)"]
        if self.gathers:
            return [*ids, *self._gathered_program(descending)]
        off = [f"if {code(~self.rows, self.visit.names('', ''))}:  # spec: routing", "    return"] if self.routes else []
        return [first, *ids, *off]

    def _gathered_program(self, descending: bool) -> list[str]:
        facts = self.visit.facts
        tiles = f"tl.cdiv(count, {facts.q_rows})"
        return [
            f"count = tl.load(counts + b * {facts.heads[0]} + h)  # spec: routing, rows that this head keeps",
            f"row = {tiles} - 1 - tl.program_id(0)  # long rows first" if descending else "row = tl.program_id(0)",
            "if row < 0:" if descending else f"if row >= {tiles}:",
            "    return",
        ]

    def gathered_rows(self) -> list[str]:
        """Tokens of a tile of kept rows; rows past the last repeat it."""
        facts = self.visit.facts
        start = f"(b * {facts.heads[0]} + h).to(tl.int64) * ({grid.tokens(facts, 'q')} + 1)"
        return [
            f"slot = row * {facts.q_rows} + tl.arange(0, {facts.q_rows})",
            "inside = slot < count",
            f"token = tl.load(routed + {start} + tl.minimum(slot, count - 1))",
            *self._coordinates(),
        ]

    def _coordinates(self) -> list[str]:
        """Coordinates of tokens, row-major."""
        lengths = [self.visit.facts.length("q", a) for a in range(self.visit.facts.rank)]
        lines = []
        for a in range(len(lengths)):
            inner = grid.product(lengths[a + 1 :])
            index = "token" if inner == "1" else f"token // {inner}"
            lines.append(f"q{a} = {index}" if a == 0 else f"q{a} = {index} % {lengths[a]}")
        return lines

    @cached_property
    def _values(self) -> dict[Expr, str]:
        """Reads of tables in the weight, by name."""
        return {} if self.weigh is None else {h: f"row_weight{i}" for i, h in enumerate(hoistable(self.weigh, ROW_NAMES))}

    def weights(self) -> list[str]:
        """Loads the weights of the tile's rows."""
        names = self.visit.names("", "")
        return [f"{name} = {code(value, names)}  # spec: routing" for value, name in self._values.items()]

    def weighed(self) -> list[str]:
        """Weighs `o`, some columns of the rows."""
        if self.weigh is None:
            return []
        nodes = {e: f"{name}[:, None]" if self.visit.is_vector(e) else name for e, name in self._values.items()}
        return [f"o = {code(self.weigh, self.visit.names('[:, None]', '', nodes))}"]

    # ---- the launcher --------------------------------------------------------------------------------------------------------------

    def launch(self) -> list[str]:
        """Results of rows that no program computes, and the tokens of those that one does."""
        if not self.routes:
            return []
        facts = self.visit.facts
        if facts.statistic:
            return ["# Rows that are not routed: nothing reads theirs (spec: routing)", f"{facts.statistic}.zero_()", *self._compacted()]
        lse = ['lse.fill_(float("-inf"))'] if facts.lse else []
        return ["# Rows that are not routed: 0 before the gate (spec: routing)", *self._unrouted(), *lse, *self._compacted()]

    def _unrouted(self) -> list[str]:
        gates, heads = self.visit.facts.gates, self.visit.facts.heads[0]
        if all(gate["value"].op is Op.MUL for gate in gates.values()):
            return ["out.zero_()"]
        lines, names = ["o = 0.0"], _torch({"o": "o", "g": "g"})
        for name, gate in gates.items():
            # What all heads share has been expanded to them.
            own = f"{name}[:, :1]" if gate.inputs[1]["shape"][1] == 1 else name
            lines += [f"g = {own}.float(){unpacked(gate, heads)}", f"o = {code(gate['value'], names)}"]
        return [*lines, "out.copy_(o)"]

    def _compacted(self) -> list[str]:
        if not self.gathers:
            return []
        facts, heads = self.visit.facts, self.visit.facts.heads[0]
        tokens = grid.tokens(facts, "q")
        names = _torch({n: n for n in ("b", "h", *(f"q{a}" for a in range(facts.rank)), *facts.open_lengths())})
        return [
            f"token = torch.arange({tokens}, device=q.device)",
            *self._coordinates(),
            f"h = torch.arange({heads}, device=q.device)[:, None]",
            "b = torch.arange(batch, device=q.device)[:, None, None]",
            f"kept = ({code(self.rows, names)}).expand(batch, {heads}, {tokens})",
            "counts = kept.sum(2, dtype=torch.int32)",
            f"slots = torch.where(kept, kept.cumsum(2) - 1, {tokens})  # what is not kept is written behind the end",
            f"routed = torch.empty(batch, {heads}, {tokens} + 1, dtype=torch.int32, device=q.device)",
            "routed.scatter_(2, slots, token.to(torch.int32).expand(slots.shape))",
        ]

    # ---- the dense formula ---------------------------------------------------------------------------------------------------------

    def dense(self, names: Names) -> list[str]:
        """Erases and weighs the rows of the dense formula."""
        lines = []
        if self.routes:
            lines = [f"kept = torch.as_tensor({code(self.rows, names)}).expand(*q.shape[:3], 1)", "o = torch.where(kept, o, 0.0)"]
            lines += ["lse = torch.where(kept[..., 0], lse, -torch.inf)"] if self.visit.facts.lse else []
        return lines if self.weigh is None else [*lines, f"o = {code(self.weigh, names)}"]


def unpacked(gate: Node, heads: int) -> str:
    """Torch code behind a gate's logits that gives every query head its own; those that all share broadcast."""
    share, _ = logit_share(gate, heads)
    if gate.get("packed"):
        return f".unflatten(3, ({share}, -1)).transpose(2, 3).flatten(1, 2)"
    return f".repeat_interleave({share}, 1)" if 1 < share < heads else ""


def _torch(variables: dict[str, str]) -> Names:
    return Names(variables, _read, {}, torch=True)


def _read(table: Table, index: list[str]) -> str:
    return f"{table.name}[{', '.join(index)}]"
