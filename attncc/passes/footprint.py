"""Shared memory and registers of a kernel before it is compiled: which configurations to try, and which of them fit a target.

Both figures are checked against compiled kernels (`tests/aot/test_footprint.py`). The query tile and the key and value tiles in flight
stand in shared memory; scores, weights and accumulators in registers, the query tile too where matrix units read it from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attncc.ir.expr import Expr, Kind, Op, const, nodes, variables
from attncc.ir.graph import Graph, GraphOp, gathers, loads_of, reduction, row_class, source, weight_factor
from attncc.targets import Target

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SIZES = (
    (128, 128, 1.0),
    (128, 64, 1.05),
    (64, 128, 1.15),
    (64, 64, 1.2),
    (128, 32, 1.3),
    (64, 32, 1.5),
    (32, 32, 2.2),
    (32, 16, 3.0),
    (16, 16, 5.0),
)
"""Query rows, key rows, and the price of a multiply-add relative to the largest tile: small tiles reuse less and wait more."""
DESCRIPTORS = 4
"""Registers of a thread for those of tensors, where the units of earlier targets, which know none, multiply."""
BARRIERS = 2048
"""Bytes for what pipelines and reductions keep beside tiles."""


@dataclass(frozen=True)
class Comfort:
    """What a matrix unit leaves a thread: tiles may take `registers` of it, score maps and long weights cost `maps` registers a score.

    `keys` weighs values of keys and what a mask beside its bands computes, `coordinates` those of keys in grids of more than one axis,
    `reads` the indices by which maps read tables pair by pair, `factors` what weights are multiplied by beside maps. In registers, for
    addresses: `chunks` of each part of a row beyond its first power of two of columns, `loads` of queries that are normed or turned on
    their way, `dense` of a table with an entry a pair, `packed` of a gate whose logits lie head by head in a row, `gathered` of rows that
    are routed one by one, beside a root. `turned` bounds the columns that a thread may norm and turn where that is hard. `key_words` and
    `query_words` bound the elements of a key and of a query tile, `columns` those multiplied at once. Pipelines have at most
    `most_stages`, of rows routed one by one `gathered_stages`, of a table's tiles beside a root `root_stages`.
    `registers_asked` is demanded of the assembler, which left alone keeps a few on the stack around the loops to let a second block in.
    """

    registers: int
    maps: float = 0.5
    keys: float = 0.0
    reads: float = 1.0
    factors: float = 0.0
    coordinates: float = 0.0
    chunks: int = 0
    loads: int = 0
    dense: int = 0
    packed: int = 0
    gathered: int = 0
    turned: int = 1 << 30
    warps: tuple[int, ...] = (4, 8)
    key_words: int = 1 << 30
    query_words: int = 1 << 30
    columns: int = 256
    most_stages: int = 3
    gathered_stages: int = 3
    root_stages: int = 3
    registers_asked: int | None = None


COMFORT = {
    ("mma", 2): Comfort(160, keys=0.8, coordinates=1.0, chunks=14, loads=12, packed=24, turned=48, registers_asked=255),
    ("wgmma", 2): Comfort(160, maps=0.75, keys=1.3, gathered=44, turned=48, registers_asked=255),
    # Accumulators pass through registers whole.
    ("tcgen05", 2): Comfort(140, maps=1.0, keys=1.0, dense=40, packed=24, turned=40, root_stages=2, registers_asked=255),
    # Eight warps halve the registers of a thread.
    ("mfma", 2): Comfort(144, maps=1.0, keys=1.5, reads=1.75, factors=1.75, coordinates=2.0, chunks=8, loads=16, warps=(4,)),
    # A float32 product on NVIDIA keeps both halves of its operands in registers: small tiles, few columns at once.
    ("mma", 4): Comfort(
        80,
        maps=0.0,
        keys=0.25,
        chunks=5,
        loads=8,
        dense=13,
        warps=(4,),
        key_words=2048,
        columns=64,
        most_stages=2,
        gathered_stages=1,
        registers_asked=255,
    ),
    ("wgmma", 4): Comfort(104, keys=0.25, chunks=5, dense=13, columns=64, most_stages=2, registers_asked=255),
    ("tcgen05", 4): Comfort(
        50, maps=0.0, chunks=5, loads=8, warps=(4,), key_words=2048, query_words=3072, columns=32, most_stages=1, registers_asked=255
    ),
    ("mfma", 4): Comfort(80, maps=0.0, reads=1.5, warps=(4,), columns=64),
}
"""By matrix unit and element size; fitted to the compiled kernels of the covering array (`benchmarks.evidence`)."""


@dataclass(frozen=True)
class Configuration:
    """Tile rows, warps and stages; `slowness` prices a multiply-add relative to the best configuration."""

    q_rows: int
    k_rows: int
    num_warps: int
    num_stages: int
    slowness: float


def widths(body: Graph) -> tuple[int, int]:
    """Padded columns of a key row and of a value row; 0 where no values are read."""
    scores, values = body.find(GraphOp.SCORES)[0], [int(n.inputs[1]["shape"][3]) for n in body.find(GraphOp.COMBINE)]
    return padded(int(source(scores.inputs[1])["shape"][3])), padded(sum(values))


def padded(width: int) -> int:
    """Columns rounded up to what matrix units take."""
    return (width + 15) // 16 * 16


def element_bytes(body: Graph) -> int:
    """Bytes of one element of q, k and v."""
    return BYTES[source(body.find(GraphOp.SCORES)[0])["dtype"]]


def comfort(body: Graph, target: Target) -> Comfort:
    """What the target's matrix unit leaves a thread, for the kernel's element type."""
    return COMFORT.get((target.matrix, element_bytes(body)), Comfort(255))


def registers_asked(body: Graph, target: Target) -> int | None:
    """Registers of a thread to demand of the assembler.

    Plain kernels of warp groups spill nothing when left alone, and leave room for another block.
    """
    masked = any(n["residual"] is not const(True) for n in body.find(GraphOp.MASK))
    plain = not (masked or body.find(GraphOp.MAP) or loads_of(body, "q"))
    return None if plain and target.matrix == "wgmma" else comfort(body, target).registers_asked


def _multiplying(c: Configuration, target: Target) -> Target:
    """The target whose units multiply: tiles of fewer rows than a warp group takes go to those of earlier ones."""
    return replace(target, matrix="mma") if target.matrix == "wgmma" and c.q_rows < 64 else target


def _hard_to_turn(body: Graph, c: Configuration) -> bool:
    """Whether queries are normed and turned by few threads, or in pairs whose number is no power of two."""
    loads = loads_of(body, "q")
    pairs = [len(n["turns"]) for n in loads if n.op is GraphOp.ROTATE and len(n["positions"]) > 1]
    return len(loads) > 1 and (c.num_warps == 4 or any(n & (n - 1) for n in pairs))


def configurations(body: Graph, target: Target, q_rows: int | None = None, k_rows: int | None = None) -> Iterator[Configuration]:
    """Configurations worth pricing, large tiles first; only those of the demanded sizes where there are any."""
    if target.backend == "cpu":
        yield Configuration(q_rows or 128, k_rows or 128, 1, 1, 1.0)
        return
    price = {(q, k): p for q, k, p in SIZES}
    for q, k in dict.fromkeys((q_rows or q, k_rows or k) for q, k, _ in SIZES):
        for warps in comfort(body, target).warps:
            for stages in range(comfort(body, target).most_stages, 0, -1):
                depth = {3: 1.0, 2: 1.03, 1: 1.4}[stages]
                # More warps than the accumulator fills only share the same work; too few leave latencies bare.
                yield Configuration(q, k, warps, stages, price.get((q, k), 1.5) * depth * (1.02 if warps == 8 else 1.0))


def unfit(body: Graph, c: Configuration, target: Target, demanded: bool = False) -> str:
    """Why a configuration does not fit a target; empty where it does. Of demanded sizes only shared memory is held against them."""
    if target.backend == "cpu":
        return ""
    over = shared_bytes(body, c, target) - target.shared_bytes
    if over > 0:
        return f"{over} bytes over the {target.shared_bytes} of shared memory that a block may have"
    if demanded:
        return ""
    if c.q_rows < 16 * c.num_warps and c.num_warps > 4:
        return f"{c.num_warps} warps for {c.q_rows} rows: matrix units take 16 rows a warp"
    return _crowded(body, c, target)


def _crowded(body: Graph, c: Configuration, target: Target) -> str:
    units = _multiplying(c, target)
    limit = comfort(body, units)
    if _hard_to_turn(body, c) and c.q_rows * widths(body)[0] >= limit.turned * c.num_warps * target.warp:
        return f"{c.q_rows * widths(body)[0]} elements to norm and turn in {c.num_warps} warps spill"
    if gathers(body) and c.num_stages > limit.gathered_stages:
        return "a pipeline spills beside rows that are routed one by one"
    if body.find(GraphOp.ROOT) and pair_tables(body) and c.num_stages > limit.root_stages:
        return f"stage {c.num_stages} of a table's tiles spills beside a root"
    if c.k_rows * max(widths(body)) > limit.key_words and c.k_rows > 16:
        return f"a key tile of {c.k_rows * max(widths(body))} elements spills, {limit.key_words} do not"
    if c.q_rows * max(widths(body)) > limit.query_words and c.q_rows > 16:
        return f"a query tile of {c.q_rows * max(widths(body))} elements spills, {limit.query_words} do not"
    needed = thread_registers(body, c, target)
    smallest = c.q_rows * c.k_rows <= 16 * 16
    return f"{needed} registers a thread for tiles alone, {limit.registers} are safe" if needed > limit.registers and not smallest else ""


def shared_bytes(body: Graph, c: Configuration, target: Target) -> int:
    """Upper bound of the shared memory of one block, in bytes: keys and values in flight, the query tile or the weights."""
    key_width, value_width = widths(body)
    size = element_bytes(body)
    stream = c.k_rows * (key_width + value_width) * size * c.num_stages
    split = 2 if size == 4 and target.backend == "cuda" else 1  # float32 operands in two halves for their tf32 products
    # Triton copies a tile of a table ahead of its use, as it does keys and values.
    ahead = c.num_stages - 1 if target.backend == "cuda" else 0
    tables = pair_tables(body) * c.q_rows * c.k_rows * 4 * ahead
    return stream + tables + max(c.q_rows * key_width * size * split, c.q_rows * c.k_rows * size) + BARRIERS


def pair_tables(body: Graph) -> int:
    """Reads of tables that differ from pair to pair: biases by relative position, masks given as arrays."""
    return sum(_sides(read) == "kq" for read in _reads(body))


def _dense_tables(body: Graph) -> int:
    """Reads of tables with an entry for each pair, whose offsets have 64 bits."""
    return sum({"NQ", "NK"} <= set(read.value.shape) for read in _reads(body))


def _reads(body: Graph) -> set[Expr]:
    return {n for value in _values(body) for n in nodes(value) if n.op is Op.LOAD}


def _values(body: Graph) -> list[Expr]:
    return [*(n["value"] for n in body.find(GraphOp.MAP)), *(n["residual"] for n in body.find(GraphOp.MASK)), *_factor(body)]


def _factor(body: Graph) -> list[Expr]:
    factor = weight_factor(body)
    return [] if factor is None else [factor]


def _index_registers(body: Graph) -> float:
    """Registers a score for indices that are computed long before they are used: of reads that index reads, of sums of comparisons."""
    compared = {n for m in body.find(GraphOp.MAP) for n in nodes(m["value"]) if n.kind is Kind.BOOL and _sides(n) == "kq"}
    return 1.75 * max(0, pair_tables(body) - 1) + 0.25 * len(compared)


def _key_registers(body: Graph, c: Configuration, target: Target) -> float:
    """Registers of one thread for values of keys: what scales values, and what a mask beside its bands computes.

    Matrix units give a thread a quarter of a tile's columns, so a value of each key costs it a quarter of their number; the first two
    that a mask needs have their room. Values of queries are few a thread. Numbers of pairs live beside the scores; booleans hardly do.
    """
    scaled = c.k_rows / 4 * any(n.get("value_scale") is not None for n in body.find(GraphOp.COMBINE))
    residuals = [n["residual"] for n in body.find(GraphOp.MASK) if n["residual"] is not const(True)]
    if not residuals:
        return scaled
    keys = {value for root in _values(body) for value in _of_keys(root)}
    numbers = any(n.kind is not Kind.BOOL and _sides(n) == "kq" for residual in residuals for n in nodes(residual))
    pairs = c.q_rows * c.k_rows / (c.num_warps * target.warp) if numbers else 0.0
    return scaled + max(0, len(keys) - 2) * c.k_rows / 4 + pairs


def _coordinate_registers(body: Graph, c: Configuration) -> float:
    """Registers of one thread for coordinates of keys that pairs are compared by; of a single axis they are a number apart."""
    compared = pair_tables(body) or any(n["residual"] is not const(True) for n in body.find(GraphOp.MASK))
    return (body.rank - 1) * c.k_rows / 4 if compared else 0.0


def _of_keys(root: Expr) -> set[Expr]:
    """The largest parts of an expression that depend on keys and not on queries."""
    if _sides(root) == "k":
        return {root}
    return {value for part in root.args for value in _of_keys(part)} if _sides(root) == "kq" else set()


def _sides(value: Expr) -> str:
    """Whose coordinates an expression reads: "", "k", "q" or "kq"."""
    return "".join(side for side in "kq" if any(name.startswith(side) for name in variables(value)))


def _weight_steps(body: Graph) -> int:
    """How often the formula of a weight keeps more than a score on the way, as every score map does."""
    weights = reduction(body)
    if weights.op is GraphOp.ROOT:
        return 2 + any(n.op is Op.POW for n in nodes(weights["weight"]))  # and its derivative
    if row_class(body) == "softmax":
        return 0
    counting = row_class(body) == "mean" and any(n["residual"] is not const(True) for n in body.find(GraphOp.MASK))
    return counting + any(n.op in (Op.SOFTPLUS, Op.POW, Op.SELECT, Op.EXP, Op.TANH) for n in nodes(weights["weight"]))


def thread_registers(body: Graph, c: Configuration, target: Target) -> int:
    """32-bit registers of one thread that tiles take: scores, weights, accumulators, and queries where they stand in registers."""
    units = _multiplying(c, target)
    limit = comfort(body, units)
    key_width, value_width = widths(body)
    size = element_bytes(body)
    scores = c.q_rows * c.k_rows
    steps = bool(body.find(GraphOp.MAP)) + _weight_steps(body) + len(_factor(body))
    words = scores + scores * size // 4 + c.q_rows * value_width + int(scores * limit.maps * steps)
    words += scores * _dense_tables(body)
    if _dense_tables(body) and any(n["residual"] is not const(True) for n in body.find(GraphOp.MASK)):
        words += scores  # what a partial tile's mask computes lives beside the table's offsets
    words += int(scores * (limit.reads * _index_registers(body) + limit.factors * bool(_factor(body) and body.find(GraphOp.MAP))))
    words += c.q_rows * key_width * size // 4 if units.matrix in ("mma", "mfma") else 0
    parts = sum(width.bit_count() - 1 for width in (key_width, value_width) if width)
    addresses = limit.chunks * parts + limit.loads * bool(loads_of(body, "q")) + limit.dense * _dense_tables(body)
    addresses += DESCRIPTORS * (units is not target)
    addresses += limit.packed * any(n.get("packed") for n in body.find(GraphOp.GATE))
    addresses += limit.gathered * (gathers(body) and bool(body.find(GraphOp.ROOT)))
    keys = int(limit.keys * _key_registers(body, c, target) + limit.coordinates * _coordinate_registers(body, c))
    return words // (c.num_warps * target.warp) + keys + addresses
