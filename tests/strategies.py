"""Random specs, in the JSON form that the oracle reads, and tile shapes. Every spec is valid, and shrinks to plain dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from tests.oracle import concrete, dense_mask, random_inputs
from tests.oracle.attention import POSITIVE

Json = dict[str, Any]
Grid = tuple[int, ...]
LONGEST_AXIS = {1: 64, 2: 12, 3: 6}
HEAD_DIMS = (16, 4, 8, 24, 40, 64, 72, 96)
ALIGNMENTS = ("top_left", "bottom_right")


@dataclass(frozen=True)
class Case:
    """A spec, the lengths of its null axes, and what its tensors are drawn from."""

    spec: Json
    lengths: tuple[int, ...] = ()
    batch: int = 1
    seed: int = 0

    @property
    def concrete(self) -> Json:
        """The spec with every length filled in."""
        return concrete(self.spec, self.lengths)

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Lengths of the query and of the key grid."""
        spec = self.concrete
        return tuple(spec["tokens"]), tuple(spec["key_tokens"])

    def inputs(self, dtype: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(q, k, v, inputs) for the spec."""
        return random_inputs(self.spec, self.batch, self.seed, dtype, self.lengths)

    def mask(self, inputs: dict[str, Tensor]) -> Any:
        """The oracle's mask, bool `[B or 1, H or 1, Nq, Nk]`."""
        return dense_mask(self.concrete, inputs, self.batch)


@dataclass(frozen=True)
class Sizes:
    """How large random cases may be."""

    ranks: Sequence[int] = (1, 2, 3)
    tokens: int = 64
    longest: int = 64
    heads: Sequence[int] = (1, 2, 3, 4, 6)
    head_dims: Sequence[int] = HEAD_DIMS
    batches: Sequence[int] = (1, 2)
    routing: bool = True


SMALL = Sizes()


def _maybe(strategy: SearchStrategy[Any], otherwise: Any = None) -> SearchStrategy[Any]:
    return st.just(otherwise) | strategy


def _divisors(n: int) -> list[int]:
    return [d for d in range(n, 0, -1) if n % d == 0]


# ---- grids and tiles ---------------------------------------------------------------------------------------------------------------


@st.composite
def grids(draw: DrawFn, rank: int, sizes: Sizes = SMALL) -> Grid:
    """Axis lengths, 1 included, of at most `sizes.tokens` tokens in all."""
    grid: list[int] = []
    for _ in range(rank):
        most = min(LONGEST_AXIS[rank], sizes.longest, sizes.tokens // math.prod(grid))
        grid.append(draw(st.integers(1, max(1, most))))
    return tuple(grid)


def tiles(rank: int, longest: int = 20) -> SearchStrategy[Grid]:
    """Any positive tile shape: block masks are defined for all of them."""
    return st.tuples(*[st.integers(1, max(2, longest // rank))] * rank)


@st.composite
def matmul_tiles(draw: DrawFn, rank: int, rows: Sequence[int] = (16, 32)) -> Grid:
    """A tile shape that a kernel can have: powers of two with a product among `rows`."""
    left = draw(st.sampled_from(rows)).bit_length() - 1
    exponents = []
    for _ in range(rank - 1):
        exponents.append(draw(st.integers(0, left)))
        left -= exponents[-1]
    return tuple(1 << e for e in (*exponents, left))


@st.composite
def _one_group(draw: DrawFn, groups: list[SearchStrategy[Any]]) -> Any:
    """Equal shares for groups; `one_of` would give each alternative of a group a share of its own."""
    return draw(groups[draw(st.integers(0, len(groups) - 1))])


# ---- masks -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a mask may refer to."""

    query: Grid
    key: Grid
    shared: bool
    heads: int = 1
    is_open: bool = False

    @property
    def rank(self) -> int:
        return len(self.query)

    @property
    def keys(self) -> int:
        return math.prod(self.key)


@lru_cache
def masks(setting: Setting) -> SearchStrategy[Json]:
    """Every kind of mask, composites at most two deep."""
    base = _base_masks(setting)
    return _one_group([base, base, _composites(base, setting), _composites(_composites(base, setting), setting)])


def _composites(inner: SearchStrategy[Json], setting: Setting) -> SearchStrategy[Json]:
    several = st.lists(inner, min_size=1, max_size=3)
    kinds = [
        st.builds(lambda m: {"kind": "and", "masks": m}, several),
        st.builds(lambda m: {"kind": "or", "masks": m}, several),
        st.builds(lambda m: {"kind": "not", "mask": m}, inner),
    ]
    return st.one_of([*kinds, per_head(inner, setting.heads)])


def per_head(inner: SearchStrategy[Json], heads: int) -> SearchStrategy[Json]:
    """A mask for each group: even shares, or heads in any order."""
    counts = st.sampled_from(_divisors(heads)).flatmap(lambda n: st.lists(inner, min_size=n, max_size=n))
    even = counts.map(lambda m: {"kind": "per_head", "masks": m, "groups": None})
    cuts = st.tuples(st.permutations(range(heads)), st.integers(0, heads), inner, inner)
    listed = cuts.map(lambda c: {"kind": "per_head", "masks": [*c[2:]], "groups": [list(c[0][: c[1]]), list(c[0][c[1] :])]})
    return even | listed


def _base_masks(setting: Setting) -> SearchStrategy[Json]:
    width = st.integers(0, setting.keys)
    align = st.sampled_from(ALIGNMENTS)
    simple = [
        st.just({"kind": "full"}),
        st.fixed_dictionaries({"kind": st.just("causal"), "align": align}),
        st.fixed_dictionaries({"kind": st.just("sliding_window"), "left": _maybe(width), "right": _maybe(width), "align": align}),
        st.fixed_dictionaries({"kind": st.just("prefix"), "length": width}),
        st.fixed_dictionaries({"kind": st.just("sinks"), "count": width}),
        _segments(setting),
    ]
    groups = [st.one_of(simple), *([neighborhoods(setting.query)] if setting.shared else []), predicates(setting.rank, setting.shared)]
    groups += [st.one_of(_grid_patterns(setting)), st.one_of(_token_patterns(setting))]
    return _one_group(groups)


def _one_or_each(values: Sequence[SearchStrategy[Any]]) -> SearchStrategy[Any]:
    """One value for all axes, or one for each."""
    return values[0] | st.tuples(*values).map(list)


def _some(low: int, lengths: Grid) -> SearchStrategy[Any]:
    return _one_or_each([st.integers(low, max(low, n + 1)) for n in lengths])


def _grid_patterns(setting: Setting) -> list[SearchStrategy[Json]]:
    """Masks of coordinates, whatever the two grids."""
    lengths, rank = setting.key, setting.rank
    reach, size = _some(0, lengths), _some(1, lengths)
    sides = st.one_of(st.none(), reach, st.tuples(*[_maybe(st.integers(0, 9))] * rank).map(list))
    lines = st.lists(st.integers(0, rank - 1), min_size=1, unique=True)
    causal = _one_or_each([st.booleans()] * rank)
    kinds: list[Any] = [
        {"kind": st.just("window"), "left": sides, "right": sides},
        {"kind": st.just("congruence"), "step": size},
        {"kind": st.just("halo"), "block": size, "halo": reach},
        {"kind": st.just("disc"), "radius": st.integers(1, max(lengths) + 1)},
        {"kind": st.just("axial"), "axes": _maybe(lines)},
        {"kind": st.just("causal_axes"), "axes": causal, "align": st.sampled_from(ALIGNMENTS)},
    ]
    return [*map(st.fixed_dictionaries, kinds), partitions(lengths)]


@st.composite
def partitions(draw: DrawFn, lengths: Grid) -> Json:
    """Cells with any shift less than their size."""
    sizes = [draw(st.integers(1, n + 1)) for n in lengths]
    return {"kind": "partition", "size": sizes, "shift": [draw(st.integers(0, n - 1)) for n in sizes]}


def _token_patterns(setting: Setting) -> list[SearchStrategy[Json]]:
    """Masks of flattened tokens and of run-time tables."""
    width, small = st.integers(0, setting.keys), st.integers(1, 5)
    marked: Json = {"kind": "global_tokens", "labels": "marks", "key_labels": None if setting.shared else "key_marks"}
    kinds: list[Any] = [
        {"kind": st.just("prefix_per_sample")},
        {"kind": st.just("global_tokens"), "count": width},
        {"kind": st.just("strided_blocks"), "block": small, "local": small, "stride": small, "head_step": st.integers(0, 3),
         "offset": st.integers(0, 3), "group": st.integers(1, 2)},
    ]  # fmt: skip
    found = [*map(st.fixed_dictionaries, kinds), st.just(marked)]
    found += [] if setting.is_open else [block_tables(setting)]
    found += [] if setting.is_open or setting.rank > 1 else [concatenations(setting)]
    return [*found, packed(setting.shared)] if setting.rank == 1 else found


@st.composite
def block_tables(draw: DrawFn, setting: Setting) -> Json:
    """Blocks of any size; the table's name says which, for one table has one shape."""
    blocks = [[draw(st.integers(1, n + 1)) for n in lengths] for lengths in (setting.query, setting.key)]
    batch, head = draw(st.booleans()), draw(st.booleans())
    name = "_".join(map(str, ["blocks", *blocks[0], *blocks[1], int(batch), int(head)]))
    return {"kind": "block_table", "q_block": blocks[0], "k_block": blocks[1], "table": name, "per_batch": batch, "per_head": head}


@st.composite
def concatenations(draw: DrawFn, setting: Setting) -> Json:
    """Grids of any rank one after another on both sides, some pairs of which do not see each other."""
    queries = draw(_cut(setting.query[0]))
    keys = queries if setting.shared else draw(_cut(setting.key[0]))
    rules = [[draw(_maybe(_rules(tuple(q), tuple(k)))) for k in keys] for q in queries]
    return {"kind": "concatenation", "queries": queries, "keys": None if setting.shared else keys, "rules": rules}


@st.composite
def _cut(draw: DrawFn, tokens: int) -> list[list[int]]:
    """A number of tokens as one to three grids."""
    cuts = sorted({0, tokens, *draw(st.lists(st.integers(0, tokens), max_size=2))})
    grids = []
    for n in (b - a for a, b in pairwise(cuts)):
        last = draw(st.sampled_from(_divisors(n)))
        middle = draw(st.sampled_from(_divisors(n // last)))
        grids.append(draw(st.sampled_from([[n], [n // last, last], [n // last // middle, middle, last]])))
    return grids


def _rules(query: Grid, key: Grid) -> SearchStrategy[Json]:
    """Masks between two grids, without tables; of different rank they meet as flat tokens, and are never one grid."""
    shared = query == key
    if len(query) != len(key):
        query, key = (math.prod(query),), (math.prod(key),)
    align = st.sampled_from(ALIGNMENTS)
    flat: SearchStrategy[Json] = st.just({"kind": "full"}) | st.fixed_dictionaries({"kind": st.just("causal"), "align": align})
    near = [neighborhoods(query)] if shared else []
    return st.one_of([flat, *near, *_grid_patterns(Setting(query, key, shared))])


def packed(shared: bool) -> SearchStrategy[Json]:
    """Documents whose positions start over, with queries and keys of their own lengths where grids differ."""
    ends = {} if shared else {"key_starts": "key_document_starts", "key_ends": "key_document_ends"}
    return _packed(shared).map(lambda mask: {"kind": "documents", "mask": mask, **ends})


@lru_cache
def _packed(shared: bool) -> SearchStrategy[Json]:
    align = st.sampled_from(ALIGNMENTS)
    inside: list[SearchStrategy[Json]] = [
        st.sampled_from([{"kind": "full"}, {"kind": "congruence", "step": 3}, {"kind": "sinks", "count": 0}]),
        st.builds(lambda a: {"kind": "causal", "align": a}, align),
        st.builds(lambda n, a: {"kind": "sliding_window", "left": n, "right": 1, "align": a}, st.integers(0, 9), align),
        st.just({"kind": "predicate", "text": "k >= nk - 2 or q == 0"}),
        st.builds(lambda mask: {"kind": "not", "mask": mask}, st.just({"kind": "causal"})),
        st.builds(lambda n, m: {"kind": "halo", "block": n, "halo": m}, st.integers(1, 5), st.integers(0, 3)),
        st.builds(lambda n: {"kind": "partition", "size": n + 1, "shift": n}, st.integers(0, 4)),
        st.builds(lambda n: {"kind": "or", "masks": [{"kind": "causal"}, {"kind": "prefix", "length": n}]}, st.integers(0, 4)),
    ]
    near = neighborhoods((9,))
    return st.one_of([*inside, near, near] if shared else inside)


def _segments(setting: Setting) -> SearchStrategy[Json]:
    key_ids = st.sampled_from([None, "key_segments"] if setting.shared else ["key_segments"])
    return st.fixed_dictionaries({"kind": st.just("segments"), "ids": st.just("segments"), "key_ids": key_ids})


@st.composite
def neighborhoods(draw: DrawFn, grid: Grid) -> Json:
    """A window that fits the grid: even ones, dilations that do not divide the axis, strides with a tail, causal axes."""
    rules: list[tuple[int, int, int, bool]] = []
    for length in grid:
        dilation = draw(st.integers(1, min(length, 4)))
        window = draw(st.integers(1, length // dilation))
        rules.append((window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
    columns = zip(("window", "stride", "dilation", "causal"), zip(*rules))
    return {"kind": "neighborhood", **{name: list(column) for name, column in columns}}


# ---- predicate text ----------------------------------------------------------------------------------------------------------------

_DIVISORS = ("2", "3", "5", "7", "1", "(-3)", "(-1)", "nq", "nk")


CAPTURED: list[Json] = [{"name": "captured", "shape": [4, 6], "kind": "int"}]


@lru_cache  # here and below: building a strategy costs more than drawing from it
def predicates(rank: int, shared: bool) -> SearchStrategy[Json]:
    """Predicates over everything that the grammar knows; no divisor is ever 0."""
    return _conditions(rank, shared).map(
        lambda text: {"kind": "predicate", "text": text, "tables": CAPTURED if "captured[" in text else []}
    )


def _conditions(rank: int, shared: bool) -> SearchStrategy[str]:
    numbers = integer_texts(rank, shared)
    comparison = st.builds("{} {} {}".format, numbers, st.sampled_from(["<=", "<", "==", "!=", ">", ">="]), numbers)
    chain = st.builds("{} {} {}".format, comparison, st.sampled_from(["<=", "<", "!="]), numbers)
    congruence = st.builds("({0}) % {2} == ({1}) % {2}".format, numbers, numbers, st.sampled_from(["2", "3", "4"]))
    return st.recursive(
        comparison | chain | congruence,
        lambda inner: st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or"]), inner) | st.builds("not ({})".format, inner),
        max_leaves=3,
    )


@lru_cache
def integer_texts(rank: int, shared: bool = True) -> SearchStrategy[str]:
    """Integer expressions in the predicate grammar, fully parenthesised where it matters."""
    small = st.integers(0, 9).map(str)
    leaf = st.sampled_from(_names(rank)) | small | st.sampled_from(_tables(shared))
    return st.recursive(leaf, _larger, max_leaves=4)


def _names(rank: int) -> list[str]:
    axes = [f"{side}{a}" for a in range(rank) for side in ("q", "k", "nq", "nk")]
    return ["q", "k", *axes, "nq", "nk", "h", "b"]


def _tables(shared: bool) -> list[str]:
    both = ["label[b, q]", "label[b, k]"] if shared else []
    return [
        "captured[q % 5, k // 2 - 1]",
        "captured[h, captured[k % 3, 0]]",
        "alpha[b, q]",
        "beta[b, k]",
        "gamma[h]",
        "delta[h, q]",
        "epsilon[q, k]",
        "zeta[b]",
        *both,
    ]


def _larger(inner: SearchStrategy[str]) -> SearchStrategy[str]:
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*"]), inner),
        st.builds("({} {} {})".format, inner, st.sampled_from(["//", "%"]), st.sampled_from(_DIVISORS)),
        st.builds("({} {} (abs({}) + 1))".format, inner, st.sampled_from(["//", "%"]), inner),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), inner, inner),
        st.builds("abs({})".format, inner),
        st.builds("(-{})".format, inner),
    )


# ---- scores, normalizers, gates ----------------------------------------------------------------------------------------------------


@st.composite
def score_maps(draw: DrawFn, setting: Setting, heads: int) -> list[Json]:
    """An ordered list of score maps, each table read by one map only."""
    found: list[Json] = []
    if draw(st.booleans()):
        found.append({"kind": "scale", "value": draw(st.sampled_from([1.0, 0.25, -0.5]))})
    softcap: SearchStrategy[Json] = st.sampled_from([5.0, 0.5, 30.0]).map(lambda cap: {"kind": "softcap", "cap": cap})
    extents = st.tuples(*(st.integers(1, n + 1) for n in setting.key))
    bias = extents.map(lambda extent: {"kind": "relative_bias", "extent": list(extent)})
    line = [alibis(heads), t5_biases()] if setting.rank == 1 else []
    kinds: list[SearchStrategy[Json]] = [softcap, bias, *indexed(), dense_biases(), st.sampled_from(EXPRESSIONS), *line]
    maps: list[Json] = draw(st.lists(st.one_of(kinds), max_size=3, unique_by=lambda m: str(m["kind"])))
    # What is -inf stands last: autograd, with which results are compared, takes 0 * inf for a gradient of what multiplies it.
    return [*found, *sorted(maps, key=lambda m: "-inf" in m.get("text", ""))]


@st.composite
def factors(draw: DrawFn, setting: Setting) -> Json:
    """What weights are multiplied by, of tables that no score map reads."""
    extent = draw(st.tuples(*(st.integers(1, n + 1) for n in setting.key)))
    line = [t5_biases()] if setting.rank == 1 else []
    text = draw(st.sampled_from(["tanh(slant[h, q]) + 0.25 * float(k % 3)", "select(q < k, slant[b, k], 1.5)", "0.5"]))
    said = st.sampled_from([{"kind": "relative_bias", "extent": list(extent)}, {"kind": "expression", "text": text}])
    found: Json = draw(st.one_of(said, indexed()[0], dense_biases(), *line))
    return found if found["kind"] == "expression" else found | {"table": "factor_table"}


EXPRESSIONS: list[Json] = [
    {
        "kind": "expression",
        "text": text,
        "integers": ["marks_of_keys"] if "marks_of_keys" in text else [],
        "tables": [{"name": "near", "shape": [5, 2], "kind": "float"}, {"name": "codes", "shape": [3], "kind": "int"}]
        if "near" in text
        else [],
    }
    for text in (
        "s * 0.5 + tanh(slope[h]) * float(marks_of_keys[b, k])",
        "select(marks_of_keys[k] < 4, s, s - weight[q] * weight[q])",
        "s * sigmoid(weight[b, q]) - abs(float(q - k)) * 0.125 + 0.0 * float(marks_of_keys[h])",
        "select((q + 2 * k) % 3 == 0, -inf, s) + weight[k]",
        "pow(abs(s) + 0.5, weight[h]) * 0.5 + exp(-s * s)",
        "s + near[(q + 2 * k) % 5, h] * near[codes[k // 2 % 4], 1] * 0.5",
    )
]


def indexed() -> list[SearchStrategy[Json]]:
    """Biases and temperatures of heads, rows and keys."""
    index = st.lists(st.sampled_from("bhqk"), min_size=1, unique=True).map(lambda names: sorted(names, key="bhqk".index))
    kinds = [{"kind": st.just(kind), "index": index, "table": st.just(f"{kind}_table")} for kind in ("bias", "temperature")]
    return [st.fixed_dictionaries(kind) for kind in kinds]


def dense_biases() -> SearchStrategy[Json]:
    """Biases of all pairs, of one or every batch element and head."""
    return st.fixed_dictionaries({"kind": st.just("dense_bias"), "per_batch": st.booleans(), "per_head": st.booleans()})


def t5_biases() -> SearchStrategy[Json]:
    """Buckets on one side or both, few of them, so that short sequences reach the last."""
    buckets = st.sampled_from([8, 4, 12, 32])
    fields = {"buckets": buckets, "max_distance": st.sampled_from([17, 20, 64, 128]), "bidirectional": st.booleans()}
    return st.fixed_dictionaries({"kind": st.just("t5_bias"), **fields})


def alibis(heads: int) -> SearchStrategy[Json]:
    """Standard, given and trainable slopes."""
    given = st.lists(st.sampled_from([0.5, 0.0, 1.0, 0.03]), min_size=heads, max_size=heads)
    slopes = st.sampled_from([(None, False), (None, True)]) | st.tuples(given, st.just(False))
    return slopes.map(lambda s: {"kind": "alibi", "slopes": s[0], "trainable": s[1]})


SINKS = (None, None, 0.0, -3.0, 40.0, "per_head", "per_query", "per_batch_query", "key_value")
RATIOS: SearchStrategy[Json] = st.fixed_dictionaries(
    {
        "kind": st.just("positive_ratio"),
        "weight": st.sampled_from(list(POSITIVE)),
        "row_scale": st.sampled_from([None, "per_query", "per_head_query", [0.5, 1.0]]),
        "epsilon": st.sampled_from([0.0, 1e-8, 0.5]),
    }
)
WHOLE_ROWS: SearchStrategy[Json] = st.fixed_dictionaries(
    {"kind": st.just("entmax"), "alpha": st.sampled_from([1.5, 2.0, 1.25, 1.7]), "sweeps": st.just(10)}
) | (
    st.fixed_dictionaries(
        {
            "kind": st.just("lssar"),
            "power": st.sampled_from([1.0, 2.0, 3.5]),
            "offset": st.sampled_from([0.0, 0.25, 1.0]),
            "count": st.sampled_from(["position", "keys"]),
            "row_scale": st.sampled_from([None, "per_query", "per_head_query", [0.5, 1.0]]),
        }
    )
)
NORMALIZERS: SearchStrategy[Json] = st.one_of(
    RATIOS,
    WHOLE_ROWS,
    st.just({"kind": "softmax"}),
    st.fixed_dictionaries({"kind": st.just("softmax"), "sink": st.sampled_from(SINKS)}),
    st.fixed_dictionaries(
        {"kind": st.just("sigmoid"), "bias": st.sampled_from([0.0, -1.5, "minus_log_keys", "per_head", "per_batch_head"])}
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("relu"),
            "power": st.sampled_from([1.0, 2.0, 1.5, 3.0]),
            "divisor": st.sampled_from([None, "keys", "allowed", "position"]),
        }
    ),
)
GATES: SearchStrategy[Json] = st.fixed_dictionaries(
    {
        "kind": st.just("output"),
        "activation": st.sampled_from(["sigmoid", "silu", "relu", "tanh", "identity"]),
        "granularity": st.sampled_from(["elementwise", "headwise", "shared", "per_key_head", "packed", "packed_headwise"]),
        "mode": st.sampled_from(["multiply", "add"]),
    }
)


@lru_cache
def routings(heads: int) -> SearchStrategy[Json]:
    """Every kind of head routing: shared heads or none, few heads a token or all."""
    shares = [(shared, top) for shared in range(heads) for top in range(1, heads - shared + 1)]
    mixtures = st.sampled_from(shares).map(lambda s: {"kind": "mixture_of_heads", "shared": s[0], "top_k": s[1]})
    relu = st.builds(lambda shared: {"kind": "relu", "shared": shared}, st.integers(0, heads - 1))
    by_head = st.sampled_from([{"kind": kind, "per_batch": own} for kind in ("head_scale", "head_mask") for own in (False, True)])
    return st.one_of(mixtures, relu, by_head)


def loads(setting: Setting, head_dim: int) -> SearchStrategy[list[Json]]:
    """Norms and rotations in either order, one or both."""
    norms = st.fixed_dictionaries(
        {"kind": st.just("qk_norm"), "norm": st.sampled_from(["rms", "l2"]), "eps": st.sampled_from([1e-6, 0.5]), "weights": st.booleans()}
    )
    step = 2 * setting.rank
    widths = st.sampled_from(range(step, head_dim + 1, step))
    given = [{}] if setting.rank > 1 else [{}, {"positions": "places", **({} if setting.shared else {"key_positions": "key_places"})}]
    rotations = st.builds(
        lambda fields, tables: {"kind": "rotary", **fields, **tables},
        st.fixed_dictionaries(
            {"base": st.sampled_from([10000.0, 100.0]), "width": widths, "pairs": st.sampled_from(["half", "interleaved"]),
             "factor": st.sampled_from([1.0, 0.25]), "align": st.sampled_from(["top_left", "bottom_right"])}
        ),
        st.sampled_from(given),
    )  # fmt: skip
    both = st.tuples(norms, rotations).flatmap(lambda pair: st.permutations(list(pair)))
    return st.one_of(norms.map(lambda n: [n]), rotations.map(lambda r: [r]), both) if head_dim >= step else norms.map(lambda n: [n])


# ---- whole specs -------------------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: DrawFn, sizes: Sizes = SMALL, dtypes: Sequence[str] = ("float32",), mask_only: bool = False) -> Case:
    """A valid spec with the lengths of its open axes; `mask_only` leaves everything plain that a block mask does not see."""
    setting = draw(settings_of(sizes))
    tokens, key_tokens, lengths = draw(_spelled(setting))
    heads = draw(st.sampled_from(sizes.heads))
    setting = replace(setting, heads=heads, is_open=bool(lengths))
    spec: Json = {"version": 1, "tokens": tokens, "key_tokens": key_tokens, "heads": heads, "head_dim": 16, "mask": draw(masks(setting))}
    if not mask_only:
        spec |= draw(_extras(setting, heads, sizes, dtypes))
        spec = draw(_padded(spec, setting)) if draw(st.integers(0, 9)) == 9 else spec
    return Case(spec, lengths, draw(st.sampled_from(sizes.batches)), draw(st.integers(0, 2**16)))


@st.composite
def _padded(draw: DrawFn, spec: Json, setting: Setting) -> Json:
    """The spec with windows that keep keys beyond the grid, and without what such keys have no meaning beside."""
    edge = draw(st.sampled_from(["zero_pad", "pad_token"]))
    reach, size = _some(0, setting.key), _some(1, setting.key)
    kinds: list[Json] = [
        {"kind": st.just("window"), "left": reach, "right": reach},
        {"kind": st.just("halo"), "block": size, "halo": reach},
    ]
    windows = (st.one_of(*map(st.fixed_dictionaries, kinds), partitions(setting.key))).map(lambda mask: mask | {"edge": edge})
    kept = edge == "zero_pad" and spec["normalizer"]["kind"] in ("sigmoid", "relu") and spec["normalizer"].get("divisor") != "allowed"
    still = [
        m for m in spec["scores"] if m["kind"] in ("scale", "softcap") or (m["kind"] in ("bias", "temperature") and "k" not in m["index"])
    ]
    changed: Json = {
        "mask": draw(windows | per_head(windows | st.just({"kind": "full"}), setting.heads)),
        "scores": still,
        "factor": None,
        "normalizer": spec["normalizer"] if kept else {"kind": "softmax"},
        "outputs": ["output"] if kept else spec["outputs"],
    }
    if edge == "pad_token":
        changed |= {"loads": [], "token_scales": [side for side in spec["token_scales"] if side == "q"]}
    return spec | changed


@st.composite
def settings_of(draw: DrawFn, sizes: Sizes = SMALL) -> Setting:
    """Query and key grids, mostly the same."""
    rank = draw(st.sampled_from(sizes.ranks))
    query = draw(grids(rank, sizes))
    key = draw(st.one_of(st.none(), st.none(), grids(rank, sizes)))
    return Setting(query, query if key is None else key, key is None)


@st.composite
def _spelled(draw: DrawFn, setting: Setting) -> tuple[list[int | None], list[int | None] | None, tuple[int, ...]]:
    """tokens and key_tokens with some axes null, and the lengths of these."""
    spelled, lengths = [], []
    for grid in (setting.query, *(() if setting.shared else (setting.key,))):
        is_open = [draw(st.sampled_from([False, False, True])) for _ in grid]
        spelled.append([None if o else n for o, n in zip(is_open, grid)])
        lengths += [n for o, n in zip(is_open, grid) if o]
    return spelled[0], None if setting.shared else spelled[1], tuple(lengths)


@st.composite
def _extras(draw: DrawFn, setting: Setting, heads: int, sizes: Sizes, dtypes: Sequence[str]) -> Json:
    normalizer, scores = draw(NORMALIZERS), draw(score_maps(setting, heads))
    if normalizer["kind"] != "softmax":  # elsewhere a weight of -inf need not be 0
        scores = [m for m in scores if "-inf" not in m.get("text", "")]
    divides = normalizer["kind"] in ("softmax", "positive_ratio", "lssar")
    if normalizer["kind"] == "positive_ratio" and any(score["kind"] == "alibi" for score in scores):
        normalizer |= {"epsilon": 1e-8}  # of far keys alone no float32 is left
    head_dim = draw(st.sampled_from(sizes.head_dims))
    return {
        "key_heads": draw(_maybe(st.sampled_from(_divisors(heads)))),
        "value_heads": draw(_maybe(st.sampled_from(_divisors(heads)))),
        "head_dim": head_dim,
        "value_dim": draw(_maybe(st.sampled_from(sizes.head_dims))),
        "dtype": draw(st.sampled_from(dtypes)),
        "loads": draw(st.just([]) | loads(setting, head_dim)),
        "scores": scores,
        "normalizer": normalizer,
        "factor": draw(st.none() | st.none() | factors(setting)),
        "gate": draw(_maybe(GATES)),
        "token_scales": draw(st.sampled_from([[], [], [], ["q"], ["k"], ["v"], ["v", "k", "q"]])),
        "addend": draw(st.sampled_from([False, False, True])),
        "routing": draw(st.none() | st.none() | routings(heads)) if sizes.routing else None,
        "outputs": ["output", "lse"] if divides and draw(st.booleans()) else ["output"],
    }
