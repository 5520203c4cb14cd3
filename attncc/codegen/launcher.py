"""Prints the host side of a generated file: `forward`, which allocates, picks the specialisation and launches."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from attncc.codegen import grid
from attncc.codegen.facts import Facts
from attncc.codegen.kernel import LISTS, Kernel
from attncc.codegen.lines import call, indented
from attncc.codegen.visit import Visit

TORCH_DTYPES = {"float16": "torch.float16", "bfloat16": "torch.bfloat16", "float32": "torch.float32"}


@dataclass(frozen=True)
class Launcher:
    """The launcher of one kernel."""

    kernel: Kernel

    @property
    def facts(self) -> Facts:
        return self.kernel.facts

    @property
    def visit(self) -> Visit:
        return self.kernel.visit

    @property
    def streamed(self) -> list[str]:
        """Operands that the kernel streams or walks over."""
        return ["q", "k", *([] if self.facts.statistic else ["v"])]

    def function(self) -> list[str]:
        """The whole of `forward`, or of the function that stands for this kernel in it."""
        optional = [*self.facts.gates, *self.facts.tables, *self.facts.load_tables]
        arguments = [*self.streamed, *optional, *(["lists"] if self.facts.lists else [])]
        arguments += ["tokens=None"] if self.needs_tokens else []
        arguments += [] if self.facts.statistic else ["out=None"]
        return [
            *call(f"def {self.facts.launcher}", arguments, "):"),
            f'    """{self.about()}"""',
            *indented(self._body()),
        ]

    @property
    def needs_tokens(self) -> bool:
        """Whether open lengths cannot be read off the tensors' shapes."""
        return self.facts.rank > 1 and bool(self.facts.open_lengths())

    def about(self) -> str:
        """What the function takes and gives, for its docstring."""
        heads, key_heads, value_heads = self.facts.heads
        shapes = f"q [B, {heads}, Nq, {self.facts.width}], k [B, {key_heads}, Nk, {self.facts.width}]"
        if self.facts.statistic:
            return f"{shapes}, any strides with contiguous rows; returns [B, {heads}, Nq] in float32."
        result = "(out, lse)" if self.facts.lse else "out"
        return f"{shapes}, v [B, {value_heads}, Nk, {self.facts.value_width}], any strides with contiguous rows; returns {result}."

    def _body(self) -> list[str]:
        facts = self.facts
        lines = [
            "batch = q.shape[0]",
            *self._lengths(),
            *(self.kernel.loads.launch() if self.kernel.loads else []),
        ]
        if not facts.statistic:
            lines += ["if out is None:", f"    out = q.new_empty(batch, {facts.heads[0]}, q.shape[2], {facts.value_width})"]
        if facts.row_number:
            lines.append(f"{facts.row_number} = torch.empty(batch, {facts.heads[0]}, q.shape[2], dtype=torch.float32, device=q.device)")
        shared = [name for name, gate in facts.gates.items() if gate.inputs[1]["shape"][1] == 1]
        lines += [f"{gate} = {gate}.expand(-1, {facts.heads[0]}, -1, -1)" for gate in shared]
        lines += [f"operands = ({', '.join(self.kernel.tensors)})", f"aligned = _alignment({self._wide_operands()})"]
        return [
            *lines,
            *self._boxes(),
            *self._lists(),
            *self.kernel.routing.launch(),
            *self._launch(),
            f"return {facts.statistic or ('(out, lse)' if facts.lse else 'out')}",
        ]

    def _wide_operands(self) -> str:
        """Operands that are loaded 16 bytes at a time where all of them allow it."""
        if not self.facts.narrow_gates:
            return "operands"
        return f"({', '.join(t for t in self.kernel.tensors if t not in self.facts.narrow_gates)})"

    def _lengths(self) -> list[str]:
        if self.needs_tokens:
            return [f"{', '.join(self.facts.open_lengths())}{',' if len(self.facts.open_lengths()) == 1 else ''} = tokens"]
        return [f"{name} = {'q' if name[1] == 'q' else 'k'}.shape[2]" for name in self.facts.open_lengths()]

    def _boxes(self) -> list[str]:
        """Descriptors where tensors allow them: aligned, and mergeable where a box would have more than five axes."""
        if not self.facts.boxes:
            return []
        lengths = ", ".join(self.facts.length("k", a) for a in range(self.facts.rank))
        sides = ", ".join(map(str, self.facts.plan.k_tile))
        every = {"k": self.visit.key_chunks, "v": self.visit.value_chunks}
        columns = {operand: parts for operand, parts in every.items() if self.facts.boxed(operand)}
        padded = any(c.padded for parts in columns.values() for c in parts)
        lines = [f"box = _box_kind(({', '.join(columns)},), aligned, {self.facts.rank}, {padded})"]
        for operand, parts in columns.items():
            for name, chunk in zip(self.visit.box_names(operand), parts):
                lines.append(f"{name} = _box({operand}, box, ({lengths},), ({sides},), {chunk.width})")
        return lines

    def _lists(self) -> list[str]:
        if not self.facts.lists:
            return []
        return [f"{', '.join(LISTS)}, lists_b, lists_h = lists"]

    def _launch(self) -> list[str]:
        facts = self.facts
        strides = ["*(s for t in operands for s in t.stride()[:3])"]
        scalars = [name for name, _ in self.kernel.scalars if name.rpartition("_")[0] not in self.kernel.tensors]
        constants = ["ALIGNED=aligned", "INDEX=_index_type(operands)", *(["BOX=box"] if facts.boxes else [])]
        options = [f"{name}={value}" for name, value in facts.options.items()]
        arguments = [*self.kernel.pointers, *strides, *scalars, *constants, *options]
        return [f"grid = ({self.rows()}, {facts.heads[0]}, batch)", *call(f"{facts.plan.name}[grid]", arguments)]

    def rows(self) -> str:
        """Rows of query tiles, residue classes included; of gathered rows, as many as all tokens fill."""
        facts = self.facts
        if self.kernel.routing.gathers:
            return f"triton.cdiv({grid.tokens(facts, 'q')}, {facts.q_rows})"
        parts = []
        for a in range(facts.rank):
            known, step = facts.body.query[a], facts.plan.q_tile[a] * facts.body.order[a]
            parts.append(f"triton.cdiv(nq{a}, {step})" if known is None else grid.tile_count(facts, "q", a))
        classes = prod(facts.body.order)
        return " * ".join([*([str(classes)] if classes > 1 else []), *parts])

    def helpers(self) -> list[list[str]]:
        """Host functions that `forward` calls."""
        return [HOST, *([BOXES] if self.facts.boxes else [])]


HOST = [
    "def _alignment(tensors):",
    '    """Elements in 16 bytes if every row of every tensor starts on such a boundary, else 0."""',
    "    size = tensors[0].element_size()",
    "    starts = [t.data_ptr() for t in tensors] + [s * size for t in tensors for s in t.stride()[:3]]",
    "    return 0 if any(start % 16 for start in starts) else 16 // size",
    "",
    "",
    "def _index_type(tensors):",
    '    """32-bit offsets within a head where they suffice."""',
    "    return tl.int32 if max(t.shape[2] * t.stride(2) for t in tensors) < 2**31 else tl.int64",
]
BOXES = [
    "def _box_kind(operands, aligned, rank, padded):",
    '    """1: heads-first boxes, 2: heads and columns merged, 0: neither fits and rows are addressed by pointer."""',
    "    if not aligned or any(0 in t.stride() for t in operands):  # a box steps; expanded tensors do not",
    "        return 0",
    "    if rank < 3 or all(t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1) for t in operands):",
    "        return 1",
    "    return 2 if not padded and all(t.stride(1) == t.shape[3] for t in operands) else 0",
    "",
    "",
    "def _box(t, kind, lengths, sides, width):",
    '    """Descriptor of `t` whose box is one key tile of `width` columns."""',
    "    if not kind:",
    "        return None",
    "    b, heads, _, columns = t.shape",
    "    sb, sh, sn, _ = t.stride()",
    "    steps = [sn * math.prod(lengths[a + 1 :]) for a in range(len(lengths))]",
    "    if len(lengths) < 3:",
    "        shape, strides, box = [b, heads, *lengths, columns], [sb, sh, *steps, 1], [1, 1, *sides, width]",
    "    elif kind == 1:",
    "        shape, strides, box = [b * heads, *lengths, columns], [sh, *steps, 1], [1, *sides, width]",
    "    else:",
    "        shape, strides, box = [b, *lengths, heads * columns], [sb, *steps, 1], [1, *sides, width]",
    "    return TensorDescriptor(t, shape, strides, box)",
]
