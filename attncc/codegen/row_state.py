"""Prints what a row keeps around the loop: the state it starts from, what it is divided by, its log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attncc.codegen import grid
from attncc.codegen.expressions import code
from attncc.codegen.facts import Chunk
from attncc.codegen.lines import indented
from attncc.codegen.visit import LOG2E, ROOT, Visit, kv_head
from attncc.ir.expr import Op, apply
from attncc.ir.intervals import may_be_infinite

LN2 = 0.6931471805599453
TINY = 1.1754943508222875e-38
"""Least normal float32: of a smaller sum of weights nothing is left."""


@dataclass(frozen=True)
class RowState:
    """Lines of the kernel before and after its loop."""

    visit: Visit

    def initial(self) -> list[str]:
        """The state of no keys; with a sink, the state of that key alone."""
        facts, rows = self.visit.facts, self.visit.facts.q_rows
        zeros = f"tl.zeros([{rows}], tl.float32)"
        if facts.rooted:
            return [f'm = tl.full([{rows}], float("-inf"), tl.float32)', f'{ROOT} = tl.full([{rows}], float("inf"), tl.float32)']
        if facts.sink is not None and not facts.softmax:
            total = code(apply(Op.EXP, facts.sink), self.visit.names("", ""))
            state = {"l": f"{zeros} + {total}  # spec: normalizer.epsilon"}
        elif facts.sink is None:
            state = {"m": f'tl.full([{rows}], float("-inf"), tl.float32)', "l": zeros}
        else:
            logit = code(facts.sink * LOG2E, self.visit.names("", ""))
            # Keys beyond the grid are no key at all for rows that have none.
            counted = 'tl.where(m == float("-inf"), 0.0, 1.0)' if may_be_infinite(facts.sink) else f"tl.full([{rows}], 1.0, tl.float32)"
            state = {"m": f"{zeros} + {logit}  # spec: normalizer.sink or mask.edge, * log2(e)", "l": counted}
        lines = [f"{name} = {state[name]}" for name in self.visit.state if name in state]
        sums = [line for i, chunk in enumerate(self.visit.value_chunks) for line in self._sum(i, chunk)]
        return [*self._bias_score(), *lines, *sums]

    def _bias_score(self) -> list[str]:
        """z, the score of the sink's key."""
        facts = self.visit.facts
        if facts.bias_scale is None:
            return []
        lines = []
        for i, chunk in enumerate(self.visit.key_chunks):
            lines.append(f"x = {_bias(facts.sink_names[0], kv_head(facts, 'k'), facts.width, chunk)}")
            lines.append(f"z {'+' if i else ''}= tl.sum(q_part{i}.to(tl.float32) * x, 1)")
        return [*lines, f"z *= {facts.bias_scale!r}"]

    def _sum(self, index: int, chunk: Chunk) -> list[str]:
        facts = self.visit.facts
        lines = [f"acc{index} = tl.zeros([{facts.q_rows}, {chunk.width}], tl.float32)"]
        if facts.bias_scale is not None and facts.sink is not None:
            value = _bias(facts.sink_names[1], kv_head(facts, "v"), facts.value_width, chunk)
            lines.append(f"acc{index} += {f'l[:, None] * {value}' if may_be_infinite(facts.sink) else value}")
        return lines

    def swept(self, calls: list[str]) -> list[str]:
        """The calls of the loop, time and again: the first sweep weighs nothing and finds the greatest score, where the root starts."""
        found, names = self.visit.facts.weights, self.visit.names("", "")
        peak = replace(names, variables={**names.variables, "s": "peak"})
        zeros = [f"{name} = tl.zeros([{self.visit.facts.q_rows}], tl.float32)" for name in self.visit.state if name != "m"]
        after = [
            'peak = tl.where(m == float("-inf"), 0.0, m)',
            f"{ROOT} = tl.where(sweep == 0, {code(found['start'], peak)}, {code(found['update'], names)})",
        ]
        return [f"for sweep in range({found['sweeps'] + 1}):  # spec: normalizer.sweeps", *indented([*zeros, *calls, *after])]

    def norm(self) -> list[str]:
        """The factor `norm` of output rows."""
        facts = self.visit.facts
        if facts.statistic:
            return []
        if facts.row_class == "pointwise":
            if facts.divisor is None:
                return []
            index = "[:, None]" if self.visit.is_vector(facts.divisor) else ""
            return [f"norm = (1.0 / {code(facts.divisor, self.visit.names('', ''))}){index}"]
        least = {"softmax": "tl.where(l == 0.0, 1.0, l)", "mean": "tl.maximum(l, 1.0)", "ratio": f"tl.maximum(l, {TINY!r})"}
        known = self._keys() if facts.row_class == "mean" and not facts.counts_keys else []
        return [*known, f"norm = (1.0 / {least[facts.row_class]})[:, None]  # a row without a key gives 0"]

    def _keys(self) -> list[str]:
        """How many keys each row sees, by the bands."""
        facts = self.visit.facts
        axes = [f"tl.maximum(tl.zeros([{facts.q_rows}], tl.int32) + high{a} - low{a} + 1, 0).to(tl.float32)" for a in range(facts.rank)]
        return [f"l {'*' if a else ''}= {keys}" for a, keys in enumerate(axes)]

    def number(self) -> list[str]:
        """Writes the number of each row: a root, or the natural log of what rows divide by."""
        facts = self.visit.facts
        if facts.row_number is None:
            return []
        store = f"{facts.row_number} + (b * {facts.heads[0]} + h).to(tl.int64) * {grid.tokens(facts, 'q')} + token"
        if facts.rooted:
            return [f'tl.store({store}, tl.where(m == float("-inf"), 0.0, {ROOT}), mask=inside)  # without a key: 0']
        log = f"(m + tl.log2(l)) * {LN2}" if facts.softmax else "tl.log(l)"
        return [
            f'natural = tl.where(l == 0.0, float("-inf"), {log})',
            f"tl.store({store}, natural, mask=inside)",
        ]


def _bias(name: str, head: str, width: int, chunk: Chunk) -> str:
    """Columns of a head of the key or value of a sink, as a row."""
    columns = f"tl.arange(0, {chunk.width})[None, :]"
    at = f"{name} + {grid.scaled(head, width)}{f' + {chunk.start}' if chunk.start else ''} + {columns}"
    return f"tl.load({at}, mask={columns} < {chunk.valid}, other=0.0)" if chunk.padded else f"tl.load({at})"
