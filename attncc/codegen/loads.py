"""Prints what is done to rows of q and k as they are loaded: norms and rotations.

Queries are loaded once a tile, so the kernel does it there. Keys are loaded once for every tile that visits them: where these are many, a
kernel of their own does it before, in one pass. All print the same lines.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.codegen.expressions import Names, code
from attncc.codegen.facts import Chunk, Facts, chunks
from attncc.codegen.lines import call, filled, indented
from attncc.ir.expr import Table
from attncc.ir.graph import GraphOp, Node, loads_of

PREPARE = "prepare_keys"
WORDS = 1024
"""Elements that one program of the keys' own kernel prepares: 8 a thread, each beside its partner, a cosine and a sine."""


@dataclass(frozen=True)
class Loads:
    """The loads of one kernel."""

    facts: Facts

    def __bool__(self) -> bool:
        return bool(self.ops("q"))

    def ops(self, side: str) -> tuple[Node, ...]:
        """Norm and rotation of a side, in order."""
        return loads_of(self.facts.body, side)

    @property
    def keys_at_load(self) -> bool:
        """Whether keys are made ready each time a tile of them is loaded."""
        return bool(self) and not self.facts.keys_prepared

    @property
    def in_kernel(self) -> list[str]:
        """Sides whose rows the kernel itself makes ready."""
        return [*(["q"] if self else []), *(["k"] if self.keys_at_load else [])]

    @property
    def rotation(self) -> Node | None:
        """The rotation of queries; keys turn in the same pairs."""
        return next((n for n in self.ops("q") if n.op is GraphOp.ROTATE), None)

    def weight(self, side: str) -> str | None:
        """Name of the table of one factor a column."""
        return next((str(n.inputs[1]["name"]) for n in self.ops(side) if n.op is GraphOp.NORM and len(n.inputs) > 1), None)

    def pointers(self, side: str) -> list[str]:
        """Tensors that the lines of a side read beside its rows."""
        waves = [f"{side}_cos", f"{side}_sin"] if self.rotation else []
        return [*([w] if (w := self.weight(side)) else []), *waves]

    def scalars(self, side: str) -> list[tuple[str, str]]:
        """Run-time numbers of these."""
        return [(f"{side}_turn_b", "tl.int64")] if self.rotation else []

    # ---- a tile of rows ----------------------------------------------------------------------------------------------------------

    def rows(self, side: str, parts: tuple[Chunk, ...], out: str) -> list[str]:
        """Lines that load `out0`, `out1`, .. : the chunks of the rows `at` of a side, prepared, in their own type."""
        lines = [f"x{i} = {self._load(side, _columns(c), c)}.to(tl.float32)" for i, c in enumerate(parts)]
        lines += self._inverse_norm(parts)
        for i, chunk in enumerate(parts):
            lines += self._finished(side, i, chunk, f"{out}{i}")
        return [f"# spec: loads, {' then '.join(n.op.value for n in self.ops(side))}", *lines]

    def _load(self, side: str, columns: str, chunk: Chunk) -> str:
        mask = f", mask={_columns(chunk)} < {self.facts.width}, other=0.0" if chunk.padded else ""
        return f"tl.load({side} + at * {side}_n + {columns}{mask})"

    def _inverse_norm(self, parts: tuple[Chunk, ...]) -> list[str]:
        """The norm of raw rows: a rotation does not change it."""
        norm = next((n for n in self.ops("q") if n.op is GraphOp.NORM), None)
        if norm is None:
            return []
        squares = " + ".join(f"tl.sum(x{i} * x{i}, 1)" for i in range(len(parts)))
        if norm["norm"] == "rms":
            return [f"inverse = tl.rsqrt(({squares}) / {self.facts.width} + {norm['eps']!r})[:, None]"]
        return [f"inverse = (1.0 / tl.maximum(tl.sqrt({squares}), {norm['eps']!r}))[:, None]"]

    def _finished(self, side: str, index: int, chunk: Chunk, name: str) -> list[str]:
        columns, lines = _columns(chunk), []
        for n in self.ops(side):
            if n.op is GraphOp.ROTATE:
                lines += self._turned(side, index, chunk)
            elif weight := self.weight(side):
                lines.append(f"x{index} *= {self._factor(weight, columns, chunk)}")
        scaled = f"x{index} * inverse" if any(n.op is GraphOp.NORM for n in self.ops(side)) else f"x{index}"
        return [*lines, f"{name} = ({scaled}).to({side}.dtype.element_ty)"]

    def _factor(self, weight: str, columns: str, chunk: Chunk) -> str:
        mask = f", mask={_columns(chunk)} < {self.facts.width}, other=0.0" if chunk.padded else ""
        return f"tl.load({weight} + {columns}{mask})"

    def _turned(self, side: str, index: int, chunk: Chunk) -> list[str]:
        """x cos + partner sin: the partner column is loaded too, for it may lie in another chunk."""
        n = self.rotation
        assert n is not None
        pairs, axes = len(n["turns"]), len(n["positions"])
        column, turned = f"column{index}", 2 * pairs * axes
        if n["pairs"] == "half":
            inside = f"({column} % {2 * pairs})" if axes > 1 else column
            partner = f"tl.where({inside} < {pairs}, {column} + {pairs}, {column} - {pairs})"
            pair = f"{column} // {2 * pairs} * {pairs} + {inside} % {pairs}" if axes > 1 else f"{column} % {pairs}"
            first = f"{inside} < {pairs}"
        else:
            partner, pair, first = f"{column} + 1 - {column} % 2 * 2", f"{column} // 2", f"{column} % 2 == 0"
        within = chunk.start + chunk.width <= turned
        mask = "" if within else f", mask={column} < {turned}"
        partners = f"tl.load({side} + at * {side}_n + partner{index}{mask and mask + ', other=0.0'}).to(tl.float32)"
        weighed = self.weight(side) and self.ops(side)[0].op is GraphOp.NORM
        if weighed:
            partners += f" * tl.load({self.weight(side)} + partner{index}{mask and mask + ', other=0.0'})"
        place = f"b * {side}_turn_b + at * {pairs * axes} + {pair}"
        return [
            f"{column} = {_columns(chunk)}",
            # One after the other: a row, its partner, cosines and sines together are more than a thread's registers.
            f"x{index} *= tl.load({side}_cos + {place}{mask and mask + ', other=1.0'})",
            f"partner{index} = {partner}",
            f"y{index} = {partners}",
            f"y{index} *= tl.load({side}_sin + {place}{mask and mask + ', other=0.0'})",
            f"x{index} += tl.where({first}, -y{index}, y{index})",
        ]

    # ---- keys ----------------------------------------------------------------------------------------------------------------------

    @property
    def prepare_rows(self) -> int:
        """Rows that one program of the keys' own kernel prepares."""
        width = sum(chunk.width for chunk in chunks(self.facts.width))
        return max(1, WORDS >> (width - 1).bit_length())

    def prepare_arguments(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Tensors, and run-time numbers with their types, that the keys' own kernel takes."""
        strides = [f"{t}_{axis}" for t in ("k", "out") for axis in "bhn"]
        scalars = [*((name, "tl.int64") for name in strides), *self.scalars("k"), ("tokens", "tl.int32")]
        return ["k", "out", *self.pointers("k")], scalars

    def prepare(self) -> list[str]:
        """The kernel that prepares keys."""
        parts = chunks(self.facts.width)
        pointers, scalars = self.prepare_arguments()
        names = [f'"{name}"' for name, _ in scalars]
        arguments = [*pointers, *(f"{name}: {kind}" for name, kind in scalars)]
        body = [
            "h = tl.program_id(1)",
            "b = tl.program_id(2)",
            f"token = tl.program_id(0) * {self.prepare_rows} + tl.arange(0, {self.prepare_rows})",
            "inside = (token < tokens)[:, None]",
            "at = tl.minimum(token, tokens - 1).to(tl.int64)[:, None]",
            "k += b * k_b + h * k_h",
            "out += b * out_b + h * out_h",
            *self.rows("k", parts, "part"),
            *(self._store(i, c) for i, c in enumerate(parts)),
        ]
        return [
            "@triton.jit(",
            "    do_not_specialize=[",
            *indented(filled(names), 2),
            "    ]",
            ")",
            *call(f"def {PREPARE}", arguments, "):"),
            '    """Keys as their product takes them. Grid (tiles of tokens, key heads, batch)."""',
            *indented(body),
        ]

    def _store(self, index: int, chunk: Chunk) -> str:
        mask = f"inside & ({_columns(chunk)} < {self.facts.width})" if chunk.padded else "inside"
        return f"tl.store(out + at * out_n + {_columns(chunk)}, part{index}, mask={mask})"

    # ---- the host side ---------------------------------------------------------------------------------------------------------------

    def launch(self) -> list[str]:
        """Lines of `forward`: the angles of this call, and keys prepared."""
        lines = []
        if self.rotation:
            lines.append(f"q_cos, q_sin, k_cos, k_sin = (wave.float() for wave in angles({', '.join(self.arguments())}))")
            lines += [f"{side}_turn_b = {side}_cos.stride(0) if {side}_cos.shape[0] > 1 else 0" for side in "qk"]
        if self.keys_at_load:
            return lines
        scalars = [*(name for name, _ in self.scalars("k")), "k.shape[2]"]
        arguments = ["k", "prepared", *self.pointers("k"), "*k.stride()[:3]", "*prepared.stride()[:3]", *scalars]
        return [
            *lines,
            "prepared = torch.empty(k.shape, dtype=k.dtype, device=k.device)",
            *call(f"{PREPARE}[(triton.cdiv(k.shape[2], {self.prepare_rows}), k.shape[1], batch)]", arguments),
            "k = prepared",
        ]

    def arguments(self) -> list[str]:
        """What `angles` takes."""
        read = [t.name for t in self.facts.load_tables.values() if t.name not in (self.weight("q"), self.weight("k"))]
        return ["q", "k", *read, *self.facts.open_lengths()]

    def functions(self) -> list[list[str]]:
        """`angles`, where tokens turn, and what the dense formula does to rows."""
        turned = (
            [["TURNS = (", *indented(filled([repr(t) for t in self.rotation["turns"]])), ")"], self._angles(), WAVES]
            if self.rotation
            else []
        )
        return [*turned, *([self._dense_turn()] if self.rotation else [])]

    def _angles(self) -> list[str]:
        """Printed in torch and float64: float32 has no fraction left of a large position times a turn."""
        lines = (
            ["b = torch.arange(q.shape[0], device=q.device)[:, None]"] if len(self.arguments()) > 2 + len(self.facts.open_lengths()) else []
        )
        waves = []
        for side in "qk":
            rotation = next(n for n in self.ops(side) if n.op is GraphOp.ROTATE)
            axes = range(self.facts.rank)
            lengths = ", ".join(self.facts.length(side, a) for a in axes)
            names = ", ".join(f"{side}{a}" for a in axes)
            lines.append(
                f"{names}{',' if len(axes) == 1 else ''} = _unflatten(torch.arange({side}.shape[2], device={side}.device), ({lengths},))"
            )
            positions = ", ".join(code(p, self._names()) for p in rotation["positions"])
            waves.append(f"*_waves([{positions}])")
        return [
            f"def angles({', '.join(self.arguments())}):",
            '    """Cosines and sines of the turns of every query and key, [B or 1, N, pairs] in float64."""',
            *indented([*lines, f"return {', '.join(waves)}"]),
        ]

    def _names(self) -> Names:
        variables = {n: n for n in ("b", *self.facts.open_lengths())} | {f"{s}{a}": f"{s}{a}" for s in "qk" for a in range(3)}
        return Names(variables, _read, {}, torch=True)

    def _dense_turn(self) -> list[str]:
        n = self.rotation
        assert n is not None
        pairs, axes = len(n["turns"]), len(n["positions"])
        columns = f"torch.arange({2 * pairs * axes})"
        split = f"{columns}.reshape({axes}, 2, {pairs}).transpose(0, 1)" if n["pairs"] == "half" else f"{columns}.reshape(-1, 2).T"
        return [
            "def _turn(x, cos, sin):",
            '    """Pairs of columns turned."""',
            f"    first, second = {split}.reshape(2, -1)",
            "    y, cos, sin = x.clone(), cos[:, None], sin[:, None]",
            "    y[..., first] = x[..., first] * cos - x[..., second] * sin",
            "    y[..., second] = x[..., second] * cos + x[..., first] * sin",
            "    return y",
        ]

    def dense(self) -> list[str]:
        """Lines of the dense formula on q and k in float64."""
        if not self:
            return []
        lines = [f"q_cos, q_sin, k_cos, k_sin = angles({', '.join(self.arguments())})"] if self.rotation else []
        return [*lines, *(line for side in "qk" for n in self.ops(side) for line in self._dense_op(side, n))]

    def _dense_op(self, side: str, n: Node) -> list[str]:
        if n.op is GraphOp.ROTATE:
            return [f"{side} = _turn({side}, {side}_cos, {side}_sin)"]
        square = f"{side}.square().mean(3, keepdim=True) + {n['eps']!r}"
        norm = f"({square}).sqrt()" if n["norm"] == "rms" else f"{side}.norm(dim=3, keepdim=True).clamp_min({n['eps']!r})"
        weight = f" * {self.weight(side)}.double()" if self.weight(side) else ""
        return [f"{side} = {side} / {norm}{weight}"]


def _columns(chunk: Chunk) -> str:
    """Code of a chunk's columns."""
    columns = f"tl.arange(0, {chunk.width})[None, :]"
    return f"({columns} + {chunk.start})" if chunk.start else columns


def _read(table: Table, index: list[str]) -> str:
    return f"{table.name}[{', '.join(index)}]"


WAVES = [
    "def _waves(positions):",
    '    """Cosines and sines of positions times turns, axis after axis."""',
    "    turns = torch.tensor(TURNS, dtype=torch.float64, device=positions[0].device)",
    "    angle = torch.cat([torch.atleast_2d(p)[..., None] * turns for p in positions], -1)",
    "    return angle.cos(), angle.sin()",
]
