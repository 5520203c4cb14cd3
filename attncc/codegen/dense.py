"""Prints the dense formula in torch: what the generated file checks itself against, and its block mask at the size of the check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from attncc.codegen.expressions import Names, code
from attncc.codegen.facts import Facts
from attncc.codegen.lines import indented
from attncc.codegen.loads import Loads
from attncc.codegen.routing import RoutedRows, unpacked
from attncc.codegen.visit import ROOT, SLOPE_SUM, WEIGHT_SUM, Visit
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Table, tables
from attncc.ir.rows import SCORE
from attncc.passes.canonicalize import mask_predicate

LARGEST_CHECK = 1 << 31
"""Scores of the dense formula in a self-check, at most: 16 GiB in float64."""


@dataclass(frozen=True)
class Dense:
    """The `dense` function and the self-check of one generated file."""

    facts: Facts

    @property
    def loads(self) -> Loads:
        return Loads(self.facts)

    @property
    def routing(self) -> RoutedRows:
        return RoutedRows(Visit(self.facts))

    def names(self) -> Names:
        """Coordinates as broadcastable tensors: b `[B, 1, 1, 1]`, h `[H, 1, 1]`, q `[N, 1]`, k `[M]`."""
        variables = {n: n for n in ("b", "h", "s", "z", "o", "g", *self.facts.open_lengths())}
        variables |= {f"{side}{a}": f"{side}{a}" for side in "qkr" for a in range(3)}
        variables |= {"t": ROOT, "w": WEIGHT_SUM, "d": SLOPE_SUM}
        return Names(variables, self._load, {}, torch=True)

    def _load(self, table: Table, index: list[str]) -> str:
        return f"{table.name}[{', '.join(index)}]"

    def extras(self) -> list[str]:
        """Names of what the formula reads beside q, k and v."""
        return [*self.facts.tables, *self.facts.load_tables, *self.facts.open_lengths()]

    def mask_extras(self) -> list[str]:
        """The same of the mask alone."""
        read = {t.name for t in tables(mask_predicate(self.facts.mask))}
        return [*(name for name in self.facts.tables if name in read), *self.facts.open_lengths()]

    def functions(self) -> list[list[str]]:
        """`allowed`, the mask; `dense`, the whole formula in float64 (quadratic memory); lists of tiles where the kernel reads them."""
        facts = self.facts
        gate = list(facts.gates)
        mask = [
            f"def allowed({', '.join(['q', 'k', *self.mask_extras()])}):",
            '    """The mask as booleans that broadcast to [B, H, Nq, Nk]."""',
            *indented([*self._coordinates(), f"return {self._mask()}"]),
        ]
        dense = [
            f"def dense{facts.suffix}({', '.join([*self._streamed, *gate, *self.extras()])}):",
            f'    """The same {facts.statistic or "attention"} as a dense formula in float64."""',
            *indented(self._formula()),
        ]
        return [HELPERS, *self.loads.functions(), mask, dense, *([self._lists(), COMPRESSED] if facts.lists else [])]

    @property
    def _streamed(self) -> list[str]:
        return ["q", "k", *([] if self.facts.statistic else ["v"])]

    def _formula(self) -> list[str]:
        facts = self.facts
        lines = [
            f"keep = allowed({', '.join(['q', 'k', *self.mask_extras()])})",
            *(self._coordinates() if self._placed else []),
        ]
        lines += [f"{', '.join(self._streamed)} = {', '.join(f'{x}.double()' for x in self._streamed)}", *self.loads.dense()]
        lines += ["v = v * v_scale.double()[..., None]"] if facts.value_scale is not None else []
        for operand, heads in zip("kv", facts.heads[1:]):
            if heads != facts.heads[0] and operand in self._streamed:
                lines.append(f"{operand} = {operand}.repeat_interleave({facts.heads[0] // heads}, 1)")
        lines.append(f"s = q @ k.transpose(2, 3) * {facts.scale!r}")
        lines += [f"s = {self._code(value)}" for value in facts.maps]
        if facts.statistic:
            return [*lines, *(self._root() if facts.rooted else [*self._sum_of_weights(), "return torch.log(l)"])]
        return [*lines, *self._weights(), *self.routing.dense(self.names()), *self._gate(), f"return {'(o, lse)' if facts.lse else 'o'}"]

    @property
    def _placed(self) -> bool:
        """Whether the formula reads positions."""
        facts = self.facts
        by_place = [*facts.maps, *(x for x in (facts.factor, facts.sink, facts.divisor) if x is not None)]
        return bool(by_place or self.routing.reads)

    def _lists(self) -> list[str]:
        """Tiles from the dense mask: fine at the size of a check; `attncc` finds them without one."""
        facts = self.facts
        lines = [f"mask = allowed({', '.join(['q', 'k', *self.mask_extras()])}).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])"]
        for side, sides in (("q", facts.plan.q_tile), ("k", facts.plan.k_tile)):
            lengths = ", ".join(facts.length(side, a) for a in range(facts.rank))
            tiles = f"_tile_of({side}.shape[2], ({lengths},), {sides}, {facts.body.order}, {side == 'q'})"
            lines.append(f"{side}_of, {side}_count = {tiles}")
        lines += [
            "rows = torch.nn.functional.one_hot(q_of, q_count).double().T.to(q.device)",
            "columns = torch.nn.functional.one_hot(k_of, k_count).double().to(q.device)",
            "pairs = rows @ mask.double() @ columns",
            f"full = pairs == rows.sum(1)[:, None] * {facts.k_rows}",
            "full &= pairs > 0",
            "return (*_compressed(full), *_compressed((pairs > 0) & ~full), q.shape[1] * q_count, q_count)",
        ]
        head = f"def lists_of({', '.join(['q', 'k', *self.mask_extras()])}):"
        return [head, '    """Full and partial key tiles of every row, from the dense mask."""', *indented(lines)]

    def _code(self, value: Expr) -> str:
        return code(value, self.names())

    def _coordinates(self) -> list[str]:
        facts = self.facts
        lines = [
            "b = torch.arange(q.shape[0], device=q.device)[:, None, None, None]",
            "h = torch.arange(q.shape[1], device=q.device)[:, None, None]",
        ]
        for side, shape in (("q", "[:, None]"), ("k", "")):
            lengths = ", ".join(facts.length(side, a) for a in range(facts.rank))
            names = ", ".join(f"{side}{a}" for a in range(facts.rank))
            index = f"torch.arange({side}.shape[2], device=q.device)"
            lines.append(f"{names}{',' if facts.rank == 1 else ''} = _unflatten({index}{shape}, ({lengths},))")
        for a, d in enumerate(facts.body.order):
            if d > 1:
                lines += [
                    f"same{a}, r{a} = q{a} % {d} == k{a} % {d}, q{a} % {d}",
                    f"q{a}, k{a} = q{a} // {d}, k{a} // {d}",
                ]
        return lines

    def _mask(self) -> str:
        same = [f"same{a}" for a, d in enumerate(self.facts.body.order) if d > 1]
        mask = self._code(mask_predicate(self.facts.mask))
        return " & ".join([*same, f"({mask})"]) if same else mask

    def _weights(self) -> list[str]:
        if not self.facts.softmax:
            return self._ratio()
        if self.facts.sink is None:
            lse = ["lse = torch.logsumexp(s, 3)"]
        else:
            lse = [*self._sink(), "lse = torch.logaddexp(torch.logsumexp(s, 3), sink_logit[..., 0])"]
        total = "torch.where(lse == -torch.inf, 0.0, lse)[..., None]"
        bias = f" + torch.exp(sink_logit - {total}) * {self._bias('v')}" if self.facts.bias_scale is not None else ""
        return [
            "s = torch.where(keep, s, -torch.inf)",
            *lse,
            f"o = {self._times_factor(f'torch.exp(s - {total})')} @ v{bias}",
        ]

    def _ratio(self) -> list[str]:
        facts, weights = self.facts, self._times_factor("p")
        if facts.row_class == "pointwise":
            divided = "" if facts.divisor is None else f" / {self._code(facts.divisor)}"
            return [self._kept_weights(), f"o = {weights} @ v{divided}"]
        return [*self._sum_of_weights(), "lse = torch.log(l)", f"o = {weights} @ v / torch.where(l == 0, 1, l)[..., None]"]

    def _times_factor(self, weights: str) -> str:
        return weights if self.facts.factor is None else f"({weights} * ({self._code(self.facts.factor)}))"

    def _kept_weights(self) -> str:
        return f"p = torch.where(keep, {self._code(self.facts.weights['weight'])}, 0.0)"

    def _sum_of_weights(self) -> list[str]:
        facts = self.facts
        total = "l = keep.expand(s.shape).sum(3)" if facts.row_class == "mean" else "l = p.sum(3)"
        return [self._kept_weights(), total + ("" if facts.sink is None else f" + math.exp({self._code(facts.sink)})")]

    def _root(self) -> list[str]:
        """The same steps as the kernel's, in float64."""
        found = self.facts.weights
        sums = {WEIGHT_SUM: found["weight"], SLOPE_SUM: derivative(found["weight"], SCORE)}
        start = code(found["start"], replace(self.names(), variables={**self.names().variables, "s": "peak"}))
        return [
            "s = torch.where(keep, s, -torch.inf)",
            "alive = s.amax(3, keepdim=True) > -torch.inf",
            "peak = torch.where(alive, s.amax(3, keepdim=True), 0.0)",
            f"{ROOT} = {start}",
            f"for _ in range({found['sweeps']}):",
            *indented([f"{name} = ({self._code(value)}).sum(3, keepdim=True)" for name, value in sums.items()]),
            *indented([f"{ROOT} = {self._code(found['update'])}"]),
            f"return torch.where(alive, {ROOT}, 0.0)[..., 0]",
        ]

    def _sink(self) -> list[str]:
        """Logits of the sink, [B, H, Nq, 1]."""
        facts = self.facts
        assert facts.sink is not None
        score = [f"z = (q * {self._bias('k')}).sum(3, keepdim=True) * {facts.bias_scale!r}"] if facts.bias_scale is not None else []
        return [*score, f"sink_logit = q.new_zeros(*q.shape[:3], 1) + {self._code(facts.sink)}"]

    def _bias(self, operand: str) -> str:
        """Key or value of the sink, repeated for the query heads."""
        heads = self.facts.heads[1 if operand == "k" else 2]
        return f"{self.facts.sink_names[operand == 'v']}.double().repeat_interleave({self.facts.heads[0] // heads}, 0)[:, None]"

    def _gate(self) -> list[str]:
        lines = []
        for name, gate in self.facts.gates.items():
            lines += [f"g = {name}.double(){unpacked(gate, self.facts.heads[0])}", f"o = {self._code(gate['value'])}"]
        return lines

    # ---- the self-check ------------------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """`check()`: random inputs, the kernel, the dense formula, the relative error."""
        body = self._compared() if self.checkable else [f'raise SystemExit("{self.refusal}")']
        return ["def check():", '    """Compares the kernel with the dense formula on random inputs."""', *indented(body)]

    @property
    def checkable(self) -> bool:
        """Whether a machine holds the dense formula's scores."""
        return self._scores <= LARGEST_CHECK

    @property
    def refusal(self) -> str:
        """Why there is no check."""
        return f"the dense formula needs {self._scores * 8 / 2**30:,.0f} GiB of scores: `attncc verify SPEC.json` compares sampled rows"

    @property
    def _scores(self) -> int:
        return 2 * self.facts.heads[0] * prod(self._sample("q")) * prod(self._sample("k"))

    def _compared(self) -> list[str]:
        facts = self.facts
        tokens = {side: self._sample(side) for side in "qk"}
        counts = {side: prod(lengths) for side, lengths in tokens.items()}
        return [
            'device = "cuda" if torch.cuda.is_available() else "cpu"',
            f"random = lambda *shape: torch.randn(*shape, device=device).to({_dtype(facts.dtype)})",
            f"q, k = random(2, {facts.heads[0]}, {counts['q']}, {facts.width}), random(2, {facts.heads[1]}, {counts['k']}, {facts.width})",
            f"v = random(2, {facts.heads[2]}, {counts['k']}, {facts.value_width})",
            *self._inputs(counts),
            *(f"{name} = {tokens[name[1]][int(name[2])]}" for name in facts.open_lengths()),
            *self._compare(),
        ]

    def _sample(self, side: str) -> tuple[int, ...]:
        known = self.facts.body.query if side == "q" else self.facts.body.key
        nominal = {1: 300, 2: 20, 3: 9}[self.facts.rank]
        return tuple(nominal if n is None else n for n in known)

    def _inputs(self, counts: dict[str, int]) -> list[str]:
        sizes = {"B": 2, "H": self.facts.heads[0], "NQ": counts["q"], "NK": counts["k"]}
        lines = []
        for name, gate in self.facts.gates.items():
            shape = [sizes.get(str(n), n) for n in gate.inputs[1]["shape"]]
            lines.append(f"{name} = random({', '.join(map(str, shape))})")
        for table in (*self.facts.tables.values(), *self.facts.load_tables.values()):
            if table.name in self.facts.given:
                continue
            dims = ", ".join(str(sizes.get(str(n), n)) for n in table.shape)
            if table.values is not None:
                lines.append(f"{table.name} = torch.tensor({list(table.values)}, device=device)")
            elif table.kind.value == "int":
                lines.append(f"{table.name} = torch.randint(0, 3, ({dims},), device=device, dtype=torch.int32)")
            else:
                lines.append(f"{table.name} = torch.randn({dims}, device=device)")
        return lines

    def _compare(self) -> list[str]:
        facts = self.facts
        gate = list(facts.gates)
        lists = [f"lists_of({', '.join(['q', 'k', *self.mask_extras()])})"] if facts.lists else []
        known = [name for name in (*facts.tables, *facts.load_tables) if name not in facts.given]
        forward = ["q", "k", "v", *gate, *known, *lists]
        before = [Dense(Facts(kernel, facts.target)) for kernel in facts.before]
        made = [f"{d.facts.statistic} = dense{d.facts.suffix}({', '.join(['q', 'k', *d.extras()])})" for d in before]
        if facts.rank > 1 and facts.open_lengths():
            forward.append(f"tokens=({', '.join(facts.open_lengths())},)")
        first = "[0]" if facts.lse else ""
        return [
            *made,
            f"want = dense({', '.join(['q', 'k', 'v', *gate, *self.extras()])}){first}",
            f"got = forward({', '.join(forward)}){first}",
            "error = ((got - want).norm() / want.norm()).item()",
            'print(f"relative error {error:.2e}")',
            "return error",
        ]


HELPERS = [
    "def _min(a, b):",
    '    """Smaller of two tensors or numbers."""',
    "    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))",
    "",
    "",
    "def _max(a, b):",
    '    """Greater of two tensors or numbers."""',
    "    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))",
    "",
    "",
    "def _unflatten(index, lengths):",
    '    """Row-major coordinates of flat token indices."""',
    "    coordinates = []",
    "    for length in reversed(lengths):",
    "        coordinates.append(index % length)",
    "        index = index // length",
    "    return coordinates[::-1]",
]
COMPRESSED = [
    "def _tile_of(tokens, lengths, sides, order, classes):",
    '    """Flat tile index of every token, residue classes outermost where `classes`, and the number of tiles."""',
    "    tile, residue, tiles, residues = 0, 0, 1, 1",
    "    for x, length, side, step in zip(_unflatten(torch.arange(tokens), lengths), lengths, sides, order):",
    "        count = -(-(-(-length // step)) // side)",
    "        tile, tiles = tile * count + x // step // side, tiles * count",
    "        residue, residues = residue * step + x % step, residues * step",
    "    return (residue * tiles + tile, residues * tiles) if classes else (tile, tiles)",
    "",
    "",
    "def _compressed(chosen):",
    '    """begin, end and tiles: row i (batch, head, query tile) holds tiles[begin[i] : end[i]]."""',
    "    end = chosen.sum(3).flatten().cumsum(0).to(torch.int32)",
    "    begin = torch.cat([end.new_zeros(1), end[:-1]])",
    "    return begin, end, torch.cat([chosen.nonzero()[:, 3].to(torch.int32), end.new_zeros(1)])",
]


def _dtype(name: str) -> str:
    return f"torch.{name}"
