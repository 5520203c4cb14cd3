"""Prints the loop over key tiles: load, scores, maps, mask, weights, accumulate. Full tiles carry no mask code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from attncc.codegen import grid
from attncc.codegen.expressions import Names, code, hoistable, widened
from attncc.codegen.facts import Chunk, Facts, chunks
from attncc.codegen.lines import call, indented, used
from attncc.codegen.loads import Loads
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Op, Table, const, nodes, tables, variables
from attncc.ir.ops import Interval
from attncc.ir.rows import SCORE
from attncc.passes.canonicalize import class_length

LOG2E = math.log2(math.e)
ROW_NAMES = frozenset({"b", "h", *(f"{p}{a}" for p in ("q", "r", "nq", "nk") for a in range(3))})
KEY_NAMES = frozenset({"b", "h", *(f"{p}{a}" for p in ("k", "r", "nq", "nk") for a in range(3))})

ROOT, WEIGHT_SUM, SLOPE_SUM = "root", "weight_sum", "slope_sum"
"""What the code calls a root and what a sweep adds up for the next."""
FAR = 1 << 30
"""A key behind all others."""
MOST_TOKENS = {1: 1 << 24, 2: 1 << 15, 3: 1 << 10}
"""Of an axis given at run time, by rank: with more, products in a predicate could leave the 32-bit integers unnoticed."""


@dataclass(frozen=True)
class Visit:
    """The `_visit` function of one kernel."""

    facts: Facts

    @cached_property
    def loads(self) -> Loads:
        return Loads(self.facts)

    # ---- names -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def box(self) -> dict[str, Interval]:
        """What is known of coordinates wherever code runs: they have been clamped into the grid."""
        body = self.facts.body
        known: dict[str, Interval] = {}
        for a in range(self.facts.rank):
            for side in "qk":
                known[f"{side}{a}"] = (const(0), class_length(side, a, body) - 1)
                if (body.query if side == "q" else body.key)[a] is None:
                    known[f"n{side}{a}"] = (const(1), const(2**31 - 1))
            known[f"r{a}"] = (const(0), const(max(0, body.order[a] - 1)))
        known["b"] = known["h"] = (const(0), const(2**31 - 1))
        return known

    @cached_property
    def limits(self) -> dict[str, Interval]:
        """The same in numbers; an axis given at run time is taken to have at most `MOST_TOKENS`."""
        body, most = self.facts.body, MOST_TOKENS[self.facts.rank]
        known = {"b": (const(0), const(2**16)), "h": (const(0), const(self.facts.heads[0] - 1))}
        for a in range(self.facts.rank):
            known[f"r{a}"] = (const(0), const(body.order[a] - 1))
            for side, lengths in (("q", body.query), ("k", body.key)):
                length = lengths[a] or most
                known[f"{side}{a}"] = (const(0), const((length - 1) // body.order[a]))
                known[f"n{side}{a}"] = (const(lengths[a] or 1), const(length))
        return known

    def names(self, rows: str, keys: str, nodes: dict[Expr, str] | None = None) -> Names:
        """Names where row and key vectors are indexed by `rows` and `keys` ("" or "[:, None]", "[None, :]")."""
        variables = {n: n for n in ("b", "h", "s", "z", "o", "g", *self.facts.open_lengths())}
        variables |= {f"r{a}": f"r{a}" for a in range(3)}
        variables |= {name: f"{called}{rows}" for name, called in zip("twd", (ROOT, WEIGHT_SUM, SLOPE_SUM))}
        for a in range(self.facts.rank):
            variables |= {f"q{a}": f"q{a}{rows}", f"k{a}": f"k{a}{keys}"}
        return Names(variables, self._load, self.box, self.limits, nodes or {})

    def _load(self, table: Table, index: list[str]) -> str:
        """A table read; tables are contiguous and coordinates lie in the grid, so only the offset is computed."""
        pairs = sum(size in ("NQ", "NK") for size in table.shape) > 1
        offset = f"tl.cast({index[0]}, tl.int64)" if pairs else index[0]
        for size, i in zip(table.shape[1:], index[1:]):
            offset = f"({offset}) * {self._size(size)} + {i}" if not offset.isidentifier() else f"{offset} * {self._size(size)} + {i}"
        return f"tl.load({table.name} + {offset})"

    def _size(self, size: int | str) -> str:
        names = {
            "NQ": grid.tokens(self.facts, "q"),
            "NK": grid.tokens(self.facts, "k"),
            "H": str(self.facts.heads[0]),
        }
        return names.get(str(size), str(size))

    # ---- row values hoisted out of the loop -----------------------------------------------------------------------------------------

    @cached_property
    def pair_expressions(self) -> list[Expr]:
        """Expressions evaluated on pairs."""
        return [*self.facts.maps, *([self.facts.residual] if self.facts.residual is not None else [])]

    @cached_property
    def row_values(self) -> dict[Expr, str]:
        """Table reads that depend on the query alone: loaded once a row, by name."""
        found = [h for e in self.pair_expressions for h in hoistable(e, ROW_NAMES)]
        return {h: f"row_value{i}" for i, h in enumerate(dict.fromkeys(found))}

    @cached_property
    def key_values(self) -> dict[Expr, str]:
        """Table reads that depend on the key alone, by name."""
        found = [h for e in self.pair_expressions for h in hoistable(e, KEY_NAMES) if h not in self.row_values]
        return {h: f"key_value{i}" for i, h in enumerate(dict.fromkeys(found))}

    def row_value_lines(self) -> list[str]:
        """Loads the hoisted row values, in the kernel."""
        return [f"{name} = {code(value, self.names('', ''))}" for value, name in self.row_values.items()]

    # ---- bands -------------------------------------------------------------------------------------------------------------------

    def band_lines(self) -> list[str]:
        """First and last key of each row, by axis, in the kernel."""
        bands = self.facts.mask["bands"]
        reads = [n for n in nodes(*(end for band in bands for end in band)) if n.op is Op.LOAD]
        lines = [f"band_value{i} = {code(n, self.names('', ''))}" for i, n in enumerate(reads)]
        known = {**self.sizes, **{n: f"band_value{i}" for i, n in enumerate(reads)}}
        for a, (low, high) in enumerate(bands):
            lines.append(f"low{a} = {self._end(low, known, f'tl.minimum({{}}, {FAR})')}")
            # A window's end is its start plus a constant: say so instead of saying the start twice.
            shared = {low: f"low{a}"} if low.op not in (Op.CONST, Op.VAR) and not tables(low) else {}
            lines.append(f"high{a} = {self._end(high, {**known, **shared}, 'tl.maximum({}, -1)')}")
        return lines

    def _end(self, end: Expr, known: dict[Expr, str], within: str) -> str:
        """Code of a band's end in 32 bits. What tables hold may lie anywhere: it is moved toward the keys, none of them past it."""
        text = code(end, self.names("", "", known))
        narrow = ".to(tl.int32)" if widened(end, self.limits) else ""
        return f"{within.format(text)}{narrow}" if tables(end) or narrow else text

    @cached_property
    def sizes(self) -> dict[Expr, str]:
        """Class lengths, computed once in the kernel."""
        body = self.facts.body
        return {class_length(s, a, body): f"{s}_size{a}" for s in "qk" for a in range(body.rank) if body.order[a] > 1}

    def is_vector(self, bound: Expr) -> bool:
        """Whether a bound differs from row to row."""
        return any(name.startswith("q") for name in variables(bound))

    def _band_terms(self) -> list[str]:
        """The mask of each axis that needs one."""
        terms = []
        for a, (low, high) in enumerate(self.facts.mask["bands"]):
            keys, tests = f"k{a}[None, :]", []
            if low is not const(0):
                tests.append(f"({keys} >= {self._bound(low, f'low{a}')})")
            last = class_length("k", a, self.facts.body) - 1
            if high is not last or self._crosses(a):
                tests.append(f"({keys} <= {self._bound(high, f'high{a}')})")
            terms += [" & ".join(tests)] if tests else []
        return terms

    def _bound(self, bound: Expr, name: str) -> str:
        return f"{name}[:, None]" if self.is_vector(bound) else name

    def _crosses(self, axis: int) -> bool:
        """Whether some key tile crosses the end of the axis (or of a class), or may."""
        length, classes = self.facts.body.key[axis], self.facts.body.order[axis]
        return length is None or length % (self.facts.plan.k_tile[axis] * classes) != 0

    # ---- the loop --------------------------------------------------------------------------------------------------------------------

    @property
    def key_chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.facts.width, self.facts.widest_chunk)

    @property
    def value_chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.facts.value_width, self.facts.widest_chunk)

    @property
    def state(self) -> list[str]:
        """What a row carries from tile to tile."""
        outputs = [f"acc{i}" for i in range(len(self.value_chunks))]
        kept = {"softmax": ["m", "l"], "ratio": ["l"], "mean": ["l"] * self.facts.counts_keys, "root": ["m", WEIGHT_SUM, SLOPE_SUM]}
        return kept.get(self.facts.row_class, []) + outputs

    def candidates(self) -> list[str]:
        """Every name of the kernel that the loop might read."""
        facts = self.facts
        names = ["b", "h", *(f"r{a}" for a in range(3)), *(f"q{a}" for a in range(3))]
        names += [f"q_part{i}" for i in range(len(self.key_chunks))]
        names += ["k", "v", "k_n", "v_n", *self.box_names("k"), *self.box_names("v"), *facts.tables]
        names += [*self.loads.pointers("k"), "k_turn_b"]
        names += [f"{end}{a}" for a in range(3) for end in ("low", "high")]
        names += [*self.row_values.values(), *facts.open_lengths(), *(f"k_tiles{a}" for a in range(3)), *self.sizes.values()]
        names += [f"{name}{a}" for a in range(3) for name in ("first", "count")]
        return [*names, *([ROOT] if facts.rooted else []), "tiles", "begin", "end", "gap_at", "gap"]

    def box_names(self, operand: str) -> list[str]:
        """Descriptors of an operand, one a chunk."""
        parts = self.key_chunks if operand == "k" else self.value_chunks
        return [f"{operand}_box{i}" for i in range(len(parts))] if self.facts.boxed(operand) else []

    @cached_property
    def arguments(self) -> list[str]:
        """Names the loop reads, in the order they are passed."""
        return used(self.candidates(), self._loop())

    def constants(self) -> list[str]:
        """Compile-time arguments."""
        return used(["BOX", "INDEX", "PARTIAL"], self._loop())

    @property
    def name(self) -> str:
        return f"_visit{self.facts.suffix}"

    def function(self) -> list[str]:
        """The whole function."""
        head = [*self.state, *self.arguments, *(f"{c}: tl.constexpr" for c in self.constants())]
        about = {"softmax": "Online softmax over", "root": "Greatest score, sums of weights and of their slopes at one root, of"}
        about_rows = about.get(self.facts.row_class, "Adds up")
        mask = "only PARTIAL tiles compute the mask." if "PARTIAL" in self.constants() else "no tile needs a mask."
        lines = [*call(f"def {self.name}", head, "):"), f'    """{about_rows} key tiles begin:end; {mask}"""']
        return ["@triton.jit", *lines, *indented(self._loop()), f"    return {', '.join(self.state)}"]

    def call(self, begin: str, end: str, partial: bool, **where: str) -> list[str]:
        """One call of the function."""
        given = {"begin": begin, "end": end, "PARTIAL": str(partial), **where}
        arguments = [given.get(name, name) for name in (*self.state, *self.arguments, *self.constants())]
        return call(f"{', '.join(self.state)} = {self.name}", arguments)

    def _loop(self) -> list[str]:
        return [*self._loop_constants(), "for i in range(begin, end):", *indented(self._body())]

    def _loop_constants(self) -> list[str]:
        return [f"lane = tl.arange(0, {self.facts.k_rows})"]

    def _body(self) -> list[str]:
        return [*self._tile(), *self._load_keys(), *self._scores(), *self._masked(), *self._accumulate()]

    def _tile(self) -> list[str]:
        rank, sides = self.facts.rank, self.facts.plan.k_tile
        lines = self._tile_index()
        axes = [self._in_box(a) if self.facts.box else grid.tile_axis(self.facts, "k", "tile", a) for a in range(rank)]
        lines += [f"at{a} = {grid.scaled(axis, sides[a])}" for a, axis in enumerate(axes)]
        return lines + [f"k{a} = at{a} + {grid.within(sides, 'lane', a)}" for a in range(rank)]

    def _tile_index(self) -> list[str]:
        if self.facts.box:
            return []
        if self.facts.lists:
            return ["tile = tl.load(tiles + i)"]
        return ["tile = tl.where(i < gap_at, i, i + gap) if PARTIAL else i  # steps over the full tiles"]

    def _in_box(self, axis: int) -> str:
        """Tile coordinate on an axis of the i-th tile of a box, row-major."""
        inner = " * ".join(f"count{a}" for a in range(axis + 1, self.facts.rank))
        index = f"i // ({inner})" if "*" in inner else f"i // {inner}" if inner else "i"
        return f"first{axis} + {index}" if axis == 0 else f"first{axis} + {index} % count{axis}"

    def _load_keys(self) -> list[str]:
        return [*self._key_token(), *self._loads("k", self.key_chunks)]

    def _key_token(self) -> list[str]:
        """Token index of every key of the tile; in a partial tile, keys past the grid repeat the last one and are masked."""
        crossing = [a for a in range(self.facts.rank) if self._crosses(a)]
        lines, coordinates = [], []
        for a in range(self.facts.rank):
            clamped = f"tl.minimum(k{a}, {grid.last(grid.class_length(self.facts, 'k', a))})"
            if self.facts.body.order[a] > 1:
                clamped = f"tl.maximum({clamped}, 0)"
            if a in crossing:
                lines.append(f"k{a}_in = {clamped} if PARTIAL else k{a}")
            coordinates.append(grid.grid_coordinate(self.facts, f"k{a}_in" if a in crossing else f"k{a}", a))
        flat = grid.clamped_token(self.facts, "k", grid.flat_token(self.facts, "k", coordinates))
        return [*lines, f"key = {flat if flat.isidentifier() else f'({flat})'}.to(INDEX)"]

    def _loads(self, operand: str, parts: tuple[Chunk, ...]) -> list[str]:
        if operand == "k" and self.loads.keys_at_load:
            return ["at = key[:, None]", *self.loads.rows("k", parts, "k_part")]
        rows = [self._row_load(operand, i, c) for i, c in enumerate(parts)]
        if not self.facts.boxed(operand):
            return rows
        first = [self._box_load(operand, i, c, heads_last=False) for i, c in enumerate(parts)]
        if self.facts.rank < 3:
            return ["if BOX:", *indented(first), "else:", *indented(rows)]
        last = [self._box_load(operand, i, c, heads_last=True) for i, c in enumerate(parts)]
        return ["if BOX == 1:", *indented(first), "elif BOX == 2:", *indented(last), "else:", *indented(rows)]

    def _row_load(self, operand: str, index: int, chunk: Chunk) -> str:
        columns = f"tl.arange(0, {chunk.width})[None, :]"
        offset = f"{columns} + {chunk.start}" if chunk.start else columns
        mask = f", mask={columns} < {chunk.valid}, other=0.0" if chunk.padded else ""
        return f"{operand}_part{index} = tl.load({operand} + key[:, None] * {operand}_n + {offset}{mask})"

    def _box_load(self, operand: str, index: int, chunk: Chunk, heads_last: bool) -> str:
        """A box of the operand: five axes at most, so on rank-3 grids batch and heads, or heads and columns, are one axis."""
        at = [f"at{a}" for a in range(self.facts.rank)]
        head = kv_head(self.facts, operand)
        heads = self.facts.heads[1 if operand == "k" else 2]
        width = self.facts.width if operand == "k" else self.facts.value_width
        if heads_last:
            column = grid.scaled(head, width)
            origin = ["b", *at, f"{column} + {chunk.start}" if chunk.start else column]
        else:
            origin = [*([f"b * {heads} + {head}"] if self.facts.rank == 3 else ["b", head]), *at, str(chunk.start)]
        shape = f"[{self.facts.k_rows}, {chunk.width}]"
        return f"{operand}_part{index} = tl.reshape({operand}_box{index}.load([{', '.join(origin)}]), {shape})"

    def _scores(self) -> list[str]:
        precision = dot_precision(self.facts)
        lines = []
        for i in range(len(self.key_chunks)):
            into = ", s" if i else ""
            lines.append(f"s = tl.dot(q_part{i}, tl.trans(k_part{i}){into}{precision})")
        facts = self.facts
        if facts.softmax and not facts.maps:
            return lines if self.fused_scale else [*lines, f"s *= {facts.scale * LOG2E!r}  # scale * log2(e)"]
        lines.append(f"s *= {facts.scale!r}")
        lines += self._key_value_lines()
        lines += [f"s = {self._pair(value)}" for value in facts.maps]
        return [*lines, f"s *= {LOG2E!r}  # log2(e): softmax in base 2"] if facts.softmax else lines

    def _key_value_lines(self) -> list[str]:
        names = self._inside(self.names("", ""), "")
        return [f"{name} = {code(value, names)}" for value, name in self.key_values.items()]

    def _inside(self, names: Names, keys: str) -> Names:
        """Names with key coordinates clamped into the grid, so that no table is read beyond its end."""
        inside = {f"k{a}": f"k{a}_in{keys}" for a in range(self.facts.rank) if self._crosses(a)}
        return replace(names, variables={**names.variables, **inside})

    def _pair(self, value: Expr, known: Mapping[Expr, str] | None = None) -> str:
        """Code of an expression on [rows, keys]; `known` are nodes computed before."""
        nodes = {e: f"{n}[:, None]" if self.is_vector(e) else n for e, n in self.row_values.items()}
        nodes |= {e: f"{n}[None, :]" for e, n in self.key_values.items()} | dict(known or {})
        return code(value, self._inside(self.names("[:, None]", "[None, :]", nodes), "[None, :]"))

    def _masked(self) -> list[str]:
        """The mask of a partial tile, on scores (softmax, roots) or weights (pointwise)."""
        terms = self._band_terms()
        residual = self.facts.residual
        lines = [] if self.facts.maps or residual is None else self._key_value_lines()
        if residual is not None:
            terms.append(self._pair(residual))
        if not terms:
            return []
        masked = [*lines, f"allowed = {terms[0]}", *(f"allowed &= {term}" for term in terms[1:])]
        if self.facts.softmax or self.facts.rooted:
            masked.append('s = tl.where(allowed, s, float("-inf"))')
        return ["if PARTIAL:", *indented(masked)]

    def _accumulate(self) -> list[str]:
        if self.facts.rooted:
            return self._root_sums()
        values = self._loads("v", self.value_chunks)
        weights = self._softmax() if self.facts.softmax else self._pointwise()
        factors = {"factor": self.facts.factor, "token_scales": self.facts.value_scale}
        lines = [f"p *= {self._pair(value)}  # spec: {field}" for field, value in factors.items() if value is not None]
        return [*weights, *lines, *values, *self._sums()]

    def _root_sums(self) -> list[str]:
        """What a sweep adds up; a masked score weighs nothing."""
        weight: Expr = self.facts.weights["weight"]
        slope, lines, known = derivative(weight, SCORE), ["m = tl.maximum(m, tl.max(s, 1))"], dict[Expr, str]()
        both = set(nodes(slope)) - {weight}
        for n in (n for n in nodes(weight) if n in both and {"s", "t"} <= variables(n)):
            lines.append(f"x{len(known)} = {self._pair(n, known)}")
            known[n] = f"x{len(known)}"
        sums = {WEIGHT_SUM: weight, SLOPE_SUM: slope}
        return [*lines, *(f"{name} += tl.sum({self._pair(value, known)}, 1)" for name, value in sums.items())]

    @property
    def fused_scale(self) -> bool:
        """Whether the scale may move into the exponent, one multiply-add a score: only a positive one keeps the maximum's place."""
        return not self.facts.maps and self.facts.scale > 0

    def _softmax(self) -> list[str]:
        masked = bool(self._masked())
        scale = f" * {self.facts.scale * LOG2E!r}" if self.fused_scale else ""
        pivot = 'tl.where(m_new == float("-inf"), 0.0, m_new)'
        if not self.facts.signed_infinity:
            pivot = f"{pivot} if PARTIAL else m_new" if masked else "m_new"
        return [
            f"m_new = tl.maximum(m, tl.max(s, 1){scale}){'  # scale * log2(e): softmax in base 2' if scale else ''}",
            f"pivot = {pivot}",
            f"p = tl.exp2(s{scale} - pivot[:, None])",
            "rescale = tl.exp2(m - pivot)",
            "l = l * rescale + tl.sum(p, 1)",
            "m = m_new",
        ]

    def _pointwise(self) -> list[str]:
        lines = [f"p = {self._pair(self.facts.weights['weight'])}"]
        if self._masked():
            lines += ["if PARTIAL:", "    p = tl.where(allowed, p, 0.0)"]
        return [*lines, *self._totals()]

    def _totals(self) -> list[str]:
        """Adds to what rows divide by: the sum of their weights, or the number of their keys."""
        if self.facts.row_class == "pointwise" or (self.facts.row_class == "mean" and not self.facts.counts_keys):
            return []
        if self.facts.row_class == "ratio":
            rounded = "p = p.to(v.dtype.element_ty)  # before they are added up: the weights that meet the values are those of a mean"
            exact = self.facts.dtype == "float32" or self.facts.statistic
            return [*([] if exact else [rounded]), "l += tl.sum(p.to(tl.float32), 1)"]
        every = f"l += {float(self.facts.k_rows)}"
        if not self._masked():
            return [every]
        ones = f"tl.full([{self.facts.q_rows}, {self.facts.k_rows}], 1.0, tl.float32)"
        return ["if PARTIAL:", f"    l += tl.sum(tl.where(allowed, {ones}, 0.0), 1)", "else:", f"    {every}"]

    def _sums(self) -> list[str]:
        precision = dot_precision(self.facts)
        into = "acc{0} * rescale[:, None]" if self.facts.softmax else "acc{0}"
        return [f"acc{i} = tl.dot(p.to(v_part{i}.dtype), v_part{i}, {into.format(i)}{precision})" for i in range(len(self.value_chunks))]


def kv_head(facts: Facts, operand: str) -> str:
    """Key or value head of the query head."""
    group = facts.heads[0] // facts.heads[1 if operand == "k" else 2]
    return "h" if group == 1 else f"h // {group}"


def dot_precision(facts: Facts) -> str:
    """float32 products keep float32's precision on the matrix unit."""
    return f', input_precision="{facts.target.fp32_precision}"' if facts.dtype == "float32" else ""
