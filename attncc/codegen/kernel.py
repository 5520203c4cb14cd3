"""Prints the kernel: where a program finds its rows, the calls of the loop, the epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from attncc.codegen import grid
from attncc.codegen.expressions import code
from attncc.codegen.facts import Chunk, Facts
from attncc.codegen.lines import call, filled, indented, used
from attncc.codegen.loads import Loads
from attncc.codegen.routing import RoutedRows
from attncc.codegen.row_state import RowState
from attncc.codegen.visit import Visit
from attncc.ir.expr import const
from attncc.ir.graph import logit_share

LISTS = ["full_begin", "full_end", "full_tiles", "partial_begin", "partial_end", "partial_tiles"]


@dataclass(frozen=True)
class Kernel:
    """One kernel and the arguments it takes, for the kernel's printer and its launcher's."""

    facts: Facts

    @cached_property
    def visit(self) -> Visit:
        return Visit(self.facts)

    @property
    def rows(self) -> RowState:
        return RowState(self.visit)

    @cached_property
    def loads(self) -> Loads:
        return Loads(self.facts)

    @cached_property
    def routing(self) -> RoutedRows:
        return RoutedRows(self.visit)

    # ---- arguments -------------------------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> list[str]:
        """Operands with strides, in the kernel's order."""
        return ["q", "k", *([] if self.facts.statistic else ["v", *self.facts.gates, "out"])]

    @property
    def pointers(self) -> list[str]:
        """Arguments that are tensors or descriptors."""
        boxes = [*self.visit.box_names("k"), *self.visit.box_names("v")]
        lists = LISTS if self.facts.lists else []
        number = [self.facts.row_number] if self.facts.row_number else []
        tables = [*self.facts.tables, *self._loaded, *self.routing.arguments]
        return [*self.tensors, *number, *tables, *boxes, *lists]

    @property
    def _loaded(self) -> list[str]:
        return [name for side in self.loads.in_kernel for name in self.loads.pointers(side)]

    @property
    def scalars(self) -> list[tuple[str, str]]:
        """Run-time numbers with their types; none of them triggers a recompile."""
        strides = [(f"{t}_{axis}", "tl.int64") for t in self.tensors for axis in "bhn"]
        lists = [("lists_b", "tl.int64"), ("lists_h", "tl.int64")] if self.facts.lists else []
        return [
            *strides,
            *lists,
            *(s for side in self.loads.in_kernel for s in self.loads.scalars(side)),
            *((name, "tl.int32") for name in self.facts.open_lengths()),
        ]

    @property
    def constants(self) -> list[str]:
        """Compile-time arguments: with the pointers' types, the specialisation key."""
        return ["ALIGNED", "INDEX", *(["BOX"] if self.facts.boxes else [])]

    # ---- the kernel --------------------------------------------------------------------------------------------------------------

    def function(self) -> list[str]:
        """The whole kernel."""
        arguments = [
            *self.pointers,
            *(f"{name}: {kind}" for name, kind in self.scalars),
            *(f"{name}: tl.constexpr" for name in self.constants),
        ]
        body = self._body()
        return [
            *self._decorator(),
            *call(f"def {self.facts.plan.name}", arguments, "):"),
            f'    """{self._about()}"""',
            *indented(body),
        ]

    def _decorator(self) -> list[str]:
        """Neither a length nor a stride triggers a recompile: unspecialised, and typed where they are declared."""
        names = [f'"{name}"' for name, _ in self.scalars]
        return ["@triton.jit(", "    do_not_specialize=[", *indented(filled(names), 2), "    ]", ")"]

    def _about(self) -> str:
        rows = "query tiles" if self.facts.body.order == (1,) * self.facts.rank else "residue classes x query tiles"
        return f"Grid ({rows}, heads, batch). Strides in elements, rows contiguous."

    def _body(self) -> list[str]:
        return [
            *self._program(),
            *self._rows(),
            "# Bands: the first and last key of each row on each axis (spec: mask)",
            *self._bands(),
            *self._queries(),
            *self.rows.initial(),
            *self._calls(),
            *self._epilogue(),
        ]

    def _program(self) -> list[str]:
        lines = self.routing.program(self.facts.plan.row_order == "descending")
        for tensor in self.tensors:
            by_batch, by_head = (self._step(f"{tensor}_{axis}") for axis in "bh")
            lines.append(f"{tensor} += b * {by_batch} + {self._head_of(tensor)} * {by_head}{self._packed(tensor)}")
        lines += [f"{t}_n = {self._step(f'{t}_n')}.to(INDEX)" for t in self.tensors]
        return [*lines, *grid.tile_count_lines(self.facts, "q"), *grid.tile_count_lines(self.facts, "k")]

    def _step(self, stride: str) -> str:
        return stride if stride.rpartition("_")[0] in self.facts.narrow_gates else f"_step({stride}, ALIGNED)"

    def _head_of(self, tensor: str) -> str:
        """The head of a tensor that the query head reads; the launcher expands what all heads share."""
        if tensor in ("k", "v"):
            return self._head(tensor)
        gate = self.facts.gates.get(tensor)
        share = 1 if gate is None or gate.inputs[1]["shape"][1] == 1 else logit_share(gate, self.facts.heads[0])[0]
        return "h" if share == 1 else f"(h // {share})"

    def _packed(self, tensor: str) -> str:
        """Where the logits of the query head begin in a row that holds those of several."""
        gate = self.facts.gates.get(tensor)
        if gate is None or not gate.get("packed"):
            return ""
        share, width = logit_share(gate, self.facts.heads[0])
        return "" if share == 1 else f" + {grid.scaled(f'(h % {share})', width)}"

    def _head(self, operand: str) -> str:
        group = self.facts.heads[0] // self.facts.heads[1 if operand == "k" else 2]
        return "h" if group == 1 else f"(h // {group})"

    def _rows(self) -> list[str]:
        """Coordinates of this program's queries, clamped into the grid so that rows past its end repeat the last one."""
        if self.routing.gathers:
            return self.routing.gathered_rows()
        facts, sides = self.facts, self.facts.plan.q_tile
        lines = self._residues()
        name = "row" if prod(facts.body.order) == 1 else "tile"
        lines += [f"tile = row % {self._tiles_per_class()}"] if name == "tile" else []
        lane = "lane" if facts.rank > 1 else f"tl.arange(0, {facts.q_rows})"
        lines += [f"lane = tl.arange(0, {facts.q_rows})"] if facts.rank > 1 else []
        for a in range(facts.rank):
            at = grid.scaled(grid.tile_axis(facts, "q", name, a), sides[a])
            inside = grid.within(sides, lane, a)
            lines.append(f"q{a} = {inside}" if at == "0" else f"q{a} = {at} + {inside}")
        lengths = [grid.class_length(facts, "q", a) for a in range(facts.rank)]
        tests = [f"q{a} < {n}" for a, n in enumerate(lengths)]
        lines.append(f"inside = {tests[0] if len(tests) == 1 else ' & '.join(f'({t})' for t in tests)}")
        lines += [self._clamped_row(a, n) for a, n in enumerate(lengths)]
        token = grid.flat_token(facts, "q", [grid.grid_coordinate(facts, f"q{a}", a) for a in range(facts.rank)])
        return [*lines, f"token = {grid.clamped_token(facts, 'q', token)}"]

    def _clamped_row(self, axis: int, length: str) -> str:
        clamped = f"tl.minimum(q{axis}, {grid.last(length)})"
        return f"q{axis} = {clamped if self.facts.body.order[axis] == 1 else f'tl.maximum({clamped}, 0)'}"

    def _residues(self) -> list[str]:
        order = self.facts.body.order
        if prod(order) == 1:
            return []
        lines = [f"residue = row // {self._tiles_per_class()}"]
        for a, d in enumerate(order):
            step = grid.inner(order, a)
            value = f"residue // {step}" if step > 1 else "residue"
            lines += [f"r{a} = {value if prod(order[:a]) == 1 else f'{value} % {d}'}"] if d > 1 else []
        used_sizes = grid.class_length_lines(self.facts, "q") + grid.class_length_lines(self.facts, "k")
        return [*lines, *used_sizes]

    def _tiles_per_class(self) -> str:
        return grid.product([grid.tile_count(self.facts, "q", a) for a in range(self.facts.rank)])

    def _bands(self) -> list[str]:
        lines = [*self.visit.band_lines(), *self.visit.row_value_lines()]
        if self.facts.box:
            return [*lines, "# The box of key tiles that are visited: the first on each axis, and how many", *self._sides()]
        return lines if self.facts.lists else [*lines, *self._range()]

    def _sides(self) -> list[str]:
        """First key tile and number of tiles on each axis, of the box of a program's rows."""
        lines = []
        for a, n in enumerate(self.facts.plan.k_tile):
            (first, _), (last, _) = self._ends(a)
            lines += [f"first{a} = {first} // {n}", f"count{a} = tl.maximum({last} // {n} + 1 - first{a}, 0)"]
        return lines

    def _ends(self, axis: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """Least and greatest first key of the rows, greatest and least last key."""
        low, high = self.facts.mask["bands"][axis]
        first, last = f"low{axis}", f"high{axis}"
        vector = self.visit.is_vector
        return (
            (f"tl.min({first}, 0)", f"tl.max({first}, 0)") if vector(low) else (first, first),
            (f"tl.max({last}, 0)", f"tl.min({last}, 0)") if vector(high) else (last, last),
        )

    def _range(self) -> list[str]:
        least, most = self._ends(0)
        n = self.facts.k_rows
        zero = self.facts.mask["bands"][0][0] is const(0)
        return [
            "# Key tiles first:last are visited, full_first:full_last of them need no mask",
            f"first = {'0' if zero else f'{least[0]} // {n}'}",
            f"last = tl.maximum(({most[0]} + {n}) // {n}, first)",
            f"full_first = {'0' if zero else f'tl.minimum(({least[1]} + {n - 1}) // {n}, last)'}",
            f"full_last = tl.minimum(tl.maximum(({most[1]} + 1) // {n}, full_first), last)",
        ]

    def _queries(self) -> list[str]:
        lines = ["at = token.to(INDEX)[:, None]"]
        if self.loads:
            return lines + self.loads.rows("q", self.visit.key_chunks, "q_part")
        return lines + [self._load("q", f"q_part{i}", c) for i, c in enumerate(self.visit.key_chunks)]

    def _load(self, tensor: str, name: str, chunk: Chunk) -> str:
        offset, mask = _columns(chunk)
        extra = f", mask={mask}, other=0.0" if mask else ""
        return f"{name} = tl.load({tensor} + at * {tensor}_n + {offset}{extra})"

    def _calls(self) -> list[str]:
        every = self.facts.plan.mask_policy == "every tile"
        calls = self._every_tile(every)
        return self.rows.swept(calls) if self.facts.rooted else calls

    def _every_tile(self, every: bool) -> list[str]:
        if self.facts.box:
            return self.visit.call("0", " * ".join(f"count{a}" for a in range(self.facts.rank)), True)
        return self._list_calls(every) if self.facts.lists else self._range_calls(every)

    def _range_calls(self, every: bool) -> list[str]:
        if every:
            return self.visit.call("first", "last", True, gap_at="last", gap="0")
        return [
            *self.visit.call("full_first", "full_last", False, gap_at="0", gap="0"),
            "gap = full_last - full_first",
            *self.visit.call("first", "last - gap", True, gap_at="full_first", gap="gap"),
        ]

    def _list_calls(self, every: bool) -> list[str]:
        lines = ["lists = b * lists_b + h * lists_h + row"]
        for name, partial in (("full", every), ("partial", True)):
            begin, end = (f"tl.load({name}_{side} + lists)" for side in ("begin", "end"))
            lines += self.visit.call(begin, end, partial, tiles=f"{name}_tiles")
        return lines

    # ---- epilogue ------------------------------------------------------------------------------------------------------------------

    def _epilogue(self) -> list[str]:
        lines = [*self.rows.norm(), *self.routing.weights()]
        for i, chunk in enumerate(self.visit.value_chunks):
            lines += self._output(i, chunk, bool(self.rows.norm()))
        return [*lines, *self.rows.number()]

    def _output(self, index: int, chunk: Chunk, divided: bool) -> list[str]:
        offset, columns = _columns(chunk)
        mask = f"inside[:, None] & ({columns})" if columns else "inside[:, None]"
        value = f"acc{index} * norm" if divided else f"acc{index}"
        lines = [f"o = {value}", *self.routing.weighed(), *self._gated(chunk)]
        return [*lines, f"tl.store(out + at * out_n + {offset}, o.to(out.dtype.element_ty), mask={mask})"]

    def _gated(self, chunk: Chunk) -> list[str]:
        lines, names = [], self.visit.names("", "")
        for name, gate in self.facts.gates.items():
            load = f"g = tl.load({name} + at * {name}_n)" if name in self.facts.narrow_gates else self._load(name, "g", chunk)
            lines += [f"{load.rstrip()}.to(tl.float32)  # spec: {name}", f"o = {code(gate['value'], names)}"]
        return lines

    def helpers(self) -> list[list[str]]:
        """Device functions that the kernel's code calls."""
        return [HELPERS[name] for name in used(list(HELPERS), [*self.function(), *self.visit.function()])]


def _columns(chunk: Chunk) -> tuple[str, str]:
    """Code of a chunk's column offsets and, where it is padded, of the mask of its real columns."""
    columns = f"tl.arange(0, {chunk.width})[None, :]"
    offset = f"{columns} + {chunk.start}" if chunk.start else columns
    return offset, f"{columns} < {chunk.valid}" if chunk.padded else ""


HELPERS: dict[str, list[str]] = {
    "_step": [
        "@triton.jit",
        "def _step(stride, ALIGNED: tl.constexpr):",
        '    """A stride; ALIGNED elements are 16 bytes, a factor that makes loads wide where the caller found it (0: it did not)."""',
        "    return stride // ALIGNED * ALIGNED if ALIGNED else stride",
    ],
    "_floordiv": [
        "@triton.jit",
        "def _floordiv(a, b):",
        '    """a // b rounded toward minus infinity (Triton truncates)."""',
        "    q = a // b",
        "    return q - ((a % b != 0) & ((a < 0) != (b < 0))).to(tl.int32)",
    ],
    "_mod": [
        "@triton.jit",
        "def _mod(a, b):",
        '    """a % b with the sign of b (Triton\'s has the sign of a)."""',
        "    r = a % b",
        "    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)",
    ],
    "_tanh": [
        "@triton.jit",
        "def _tanh(x):",
        '    """tanh without overflow, to an absolute error of 1e-7."""',
        f"    e = tl.exp2(tl.abs(x) * {-2.0 * 1.4426950408889634!r})",
        "    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)",
    ],
    "_softplus": [
        "@triton.jit",
        "def _softplus(x):",
        '    """log(1 + exp(x)) without overflow, small values to full precision."""',
        "    e = tl.exp(-tl.abs(x))",
        "    rounded = 1.0 + e",
        "    # log(1 + e) is log(rounded) times e over what was added in fact",
        "    return tl.maximum(x, 0.0) + tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.maximum(rounded - 1.0, e / 2)))",
    ],
    "_pow": [
        "@triton.jit",
        "def _pow(x, p):",
        '    """x ** p for x >= 0."""',
        "    return tl.exp2(p * tl.log2(x))",
    ],
}
"""Device functions a generated file may need; only those it calls are printed."""
