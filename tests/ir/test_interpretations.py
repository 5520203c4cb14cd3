"""The interpretations of an expression agree: Python's integers, numpy, torch, intervals, and the code that is printed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.codegen.dense import HELPERS as TORCH_HELPERS
from attncc.codegen.expressions import Names, code
from attncc.codegen.kernel import HELPERS
from attncc.ir.arrays import numpy_arrays, torch_arrays
from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, intern, load, nodes, var
from attncc.ir.intervals import interval
from attncc.ir.values import evaluate, evaluate_all, range_tables
from tests.ir.raw import INTEGERS, VALUES, Box, Tree, booleans, boxes, built, entry, integers, points, value

TREES = integers() | booleans()


def columns(box: Box) -> dict[str, Any]:
    """Every point of a box, a column for each variable, and the tables."""
    found = points(box)
    return {**{name: np.array([p[name] for p in found]) for name in INTEGERS}, **VALUES}


def as_torch(env: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.asarray(x)) for name, x in env.items()}


@settings(max_examples=200)
@given(TREES, boxes())
def test_values_are_pythons(tree: Tree, box: Box) -> None:
    """numpy and torch compute what Python's unbounded integers do, after all that construction simplifies."""
    wanted = [value(tree, point) for point in points(box)]
    env = columns(box)
    for got in (evaluate(built(tree), env), evaluate(built(tree), as_torch(env), torch_arrays())):
        np.testing.assert_array_equal(np.broadcast_to(got, len(wanted)), wanted)


@settings(max_examples=300)
@given(TREES, boxes())
def test_intervals_are_sound(tree: Tree, box: Box) -> None:
    """No value of a box lies outside the interval over it; a mask surely true is true, one not possibly true is false."""
    for low, high in bounds(built(tree), box):
        for point in points(box):
            assert low <= value(tree, point) <= high


def bounds(root: Expr, box: Box) -> list[tuple[Any, Any]]:
    """The interval of an expression over a box, by numpy and by torch."""
    ends = {name: (var(f"{name}.lo"), var(f"{name}.hi")) for name in box}
    low_high = list(interval(root, ends))
    env: dict[str, Any] = {**VALUES}
    for name, (low, high) in box.items():
        env |= {f"{name}.lo": np.array([low]), f"{name}.hi": np.array([high])}
    found = []
    for arrays, given_ in ((numpy_arrays(), env), (torch_arrays(), as_torch(env))):
        low, high = evaluate_all(low_high, range_tables(low_high, given_, arrays), arrays)
        found.append((int(np.asarray(low).item()), int(np.asarray(high).item())))
    return found


@given(TREES, boxes(0))
def test_the_interval_of_a_point_is_its_value(tree: Tree, box: Box) -> None:
    """Where nothing varies nothing is lost; but for reads of several indices and remainders by what is no constant."""
    root, point = built(tree), points(box)[0]
    if all(n.args[-1].op is Op.CONST or n.op not in (Op.LOAD, Op.MOD) for n in nodes(root) if len(n.args) > 1):
        low, high = bounds(root, box)[0]
        assert low == high == value(tree, point)


def test_floors_across_zero() -> None:
    assert interval(var("q0") // const(4), {"q0": (const(-7), const(4))}) == (const(-2), const(1))


@pytest.mark.parametrize(("low", "high", "divisor", "wanted"), [
    (0, 3, 4, (0, 3)), (5, 7, 4, (1, 3)), (3, 4, 4, (0, 3)), (-3, -1, 4, (1, 3)), (-1, 0, 4, (0, 3)), (-2, -1, -4, (-2, -1)),
])  # fmt: skip
def test_remainders_within_one_period_are_tight(low: int, high: int, divisor: int, wanted: tuple[int, int]) -> None:
    found = interval(var("q0") % const(divisor), {"q0": (const(low), const(high))})
    assert found == tuple(map(const, wanted))


def test_a_range_of_a_table_is_exact() -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(-50, 50, (3, 37))
    table = Table("data", Kind.INT, ("B", "NQ"))
    low_high = interval(load(table, var("b"), var("q0")), {"q0": (var("lo"), var("hi"))})
    lo, hi = np.triu_indices(37)
    b = rng.integers(0, 3, len(lo))
    env = range_tables(low_high, {"data": data})
    low, high = evaluate_all(list(low_high), {**env, "b": b, "lo": lo, "hi": hi})
    np.testing.assert_array_equal(low, [data[i, x : y + 1].min() for i, x, y in zip(b, lo, hi)])
    np.testing.assert_array_equal(high, [data[i, x : y + 1].max() for i, x, y in zip(b, lo, hi)])


# ---- code --------------------------------------------------------------------------------------------------------------------------


class C(int):
    """An integer of Triton's: it has 32 bits or 64, wraps, and divides toward zero."""

    bits: int

    def __new__(cls, value: int, *operands: int) -> C:
        bits = max([32, *(x.bits for x in operands if isinstance(x, C))])
        self = super().__new__(cls, (int(value) + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1))
        self.bits = bits
        return self

    def to(self, bits: int) -> C:
        made = C(self)
        made.bits = bits
        return made

    def __floordiv__(self, other: int) -> C:
        quotient = abs(int(self)) // abs(int(other))
        return C(quotient if (int(self) < 0) == (int(other) < 0) else -quotient, self, other)

    def __mod__(self, other: int) -> C:
        return C(int(self) - int(self // other) * int(other), self, other)

    def __rfloordiv__(self, other: int) -> C:
        return C(other) // self

    def __rmod__(self, other: int) -> C:
        return C(other) % self

    def __add__(self, other: int) -> C:
        return C(int(self) + int(other), self, other)

    __radd__ = __add__

    def __sub__(self, other: int) -> C:
        return C(int(self) - int(other), self, other)

    def __rsub__(self, other: int) -> C:
        return C(int(other) - int(self), self, other)

    def __mul__(self, other: int) -> C:
        return C(int(self) * int(other), self, other)

    __rmul__ = __mul__

    def __neg__(self) -> C:
        return C(-int(self), self)

    def __lt__(self, other: int) -> Any:
        return np.bool_(int(self) < int(other))

    def __le__(self, other: int) -> Any:
        return np.bool_(int(self) <= int(other))

    def __gt__(self, other: int) -> Any:
        return np.bool_(int(self) > int(other))

    def __ge__(self, other: int) -> Any:
        return np.bool_(int(self) >= int(other))

    def __eq__(self, other: object) -> Any:
        return np.bool_(int(self) == other)

    def __ne__(self, other: object) -> Any:
        return np.bool_(int(self) != other)

    __hash__ = int.__hash__


class Language:
    """The few functions of `triton.language` that integer expressions call, on single numbers."""

    int32, int64 = 32, 64
    minimum = staticmethod(lambda a, b: C(min(int(a), int(b)), a, b))
    maximum = staticmethod(lambda a, b: C(max(int(a), int(b)), a, b))
    abs = staticmethod(lambda a: C(abs(int(a)), a))
    where = staticmethod(lambda c, a, b: C(a, a, b) if c else C(b, a, b))


class Triton:
    jit = staticmethod(lambda function: function)


def helpers() -> dict[str, Any]:
    """The floor forms as the generated file has them; a truth value has no `.to`, so that is left out."""
    space: dict[str, Any] = {"tl": Language, "triton": Triton}
    for name in ("_floordiv", "_mod"):
        exec("\n".join(HELPERS[name]).replace(".to(tl.int32)", " * 1"), space)  # noqa: S102
    return space


def names_over(box: Box, torch_code: bool) -> Names:
    known = {name: (const(low), const(high)) for name, (low, high) in box.items()}
    return Names({n: n for n in INTEGERS}, lambda table, index: f"entry_{table.name}({', '.join(index)})", known, known, torch=torch_code)


@settings(max_examples=200)
@given(TREES, boxes() | boxes(farthest=70_000))
def test_triton_code_is_the_value(tree: Tree, box: Box) -> None:
    """Printed code has the value of its expression on a machine whose // and % truncate and whose integers have 32 bits."""
    text = code(built(tree), names_over(box, torch_code=False))
    space = helpers() | {f"entry_{t}": lambda *i, t=t: C(entry(t, *i)) for t in VALUES}
    compiled = compile(text, "<code>", "eval")
    for point in points(box)[::7]:
        wanted = value(tree, point)
        if abs(wanted) < 2**63:
            assert eval(compiled, {**space, **{n: C(x) for n, x in point.items()}}) == wanted, text  # noqa: S307


def test_products_of_tokens_need_64_bits() -> None:
    """70000 * 70000 leaves the 32-bit integers, 40000 * 40000 does not; one cast is enough for what follows."""
    for n, cast in ((70_000, True), (40_000, False)):
        text = code((var("q0") * var("k0") + var("h")) % 7, names_over({"q0": (0, n), "k0": (0, n), "h": (0, 5)}, torch_code=False))
        assert text == ("(q0.to(tl.int64) * k0 + h) % 7" if cast else "(q0 * k0 + h) % 7")


@given(TREES, boxes())
def test_torch_code_is_the_value(tree: Tree, box: Box) -> None:
    text = code(built(tree), names_over(box, torch_code=True))
    wanted = [value(tree, point) for point in points(box)]
    space: dict[str, Any] = {"torch": torch}
    exec("\n".join(TORCH_HELPERS), space)  # noqa: S102

    def read(t: str) -> Any:
        return lambda *index: torch.tensor(VALUES[t])[tuple(torch.as_tensor(i).clamp(0, n - 1) for i, n in zip(index, VALUES[t].shape))]

    space |= {f"entry_{t}": read(t) for t in VALUES}
    got = eval(text, {**space, **as_torch({n: columns(box)[n] for n in INTEGERS})})  # noqa: S307
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(got), len(wanted)), wanted)


# ---- floats ------------------------------------------------------------------------------------------------------------------------

UNARY = (Op.EXP, Op.TANH, Op.SIGMOID, Op.SOFTPLUS, Op.ERF, Op.RELU, Op.ABS, Op.NEG)


@pytest.mark.parametrize("op", [*UNARY, Op.LOG, Op.SQRT])
def test_floats_agree_between_libraries(op: Op) -> None:
    root = apply(op, var("s", Kind.FLOAT))
    s = np.linspace(0.01 if op in (Op.LOG, Op.SQRT) else -30, 30, 101)
    np.testing.assert_allclose(
        evaluate(root, {"s": torch.from_numpy(s)}, torch_arrays()), evaluate(root, {"s": s}), rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("op", [*UNARY, Op.LOG, Op.SQRT])
@given(st.floats(0.01, 20), st.floats(0, 5))
def test_intervals_of_floats_are_sound(op: Op, low: float, width: float) -> None:
    s = var("s", Kind.FLOAT)
    shift = 0.0 if op in (Op.LOG, Op.SQRT) else 10.0
    root = apply(op, s - shift)
    least, greatest = (float(evaluate(x, {})) for x in interval(root, {"s": (const(low), const(low + width))}))
    for at in np.linspace(low, low + width, 7):
        assert least - 1e-12 * abs(least) <= float(evaluate(root, {"s": at})) <= greatest + 1e-12 * abs(greatest)


def test_softplus_and_sigmoid_do_not_overflow() -> None:
    s = np.array([-1e4, -800.0, 0.0, 800.0, 1e4])
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_allclose(evaluate(apply(Op.SOFTPLUS, var("s", Kind.FLOAT)), {"s": s}), [0, 0, np.log(2), 800, 1e4], atol=1e-300)
        np.testing.assert_allclose(evaluate(apply(Op.SIGMOID, var("s", Kind.FLOAT)), {"s": s}), [0, 0, 0.5, 1, 1], atol=1e-300)


# ---- construction ------------------------------------------------------------------------------------------------------------------


@given(TREES)
def test_equal_trees_are_one_node(tree: Tree) -> None:
    assert built(tree) is built(tree)


def test_kinds_stay_apart() -> None:
    assert len({const(1), const(1.0), const(True), const(-0.0), const(0.0), const(0)}) == 6


def test_wrong_types_are_refused() -> None:
    q, s, mask = var("q0"), var("s", Kind.FLOAT), var("q0") < 1
    calls: list[tuple[Op, Any]] = [
        (Op.AND, (q, q)), (Op.ADD, (mask, 1)), (Op.FLOORDIV, (s, 2)), (Op.SELECT, (q, 1, 2)), (Op.LT, (mask, mask)), (Op.FLOAT, (mask,)),
    ]  # fmt: skip
    for op, operands in calls:
        with pytest.raises(TypeError, match=f"{op.value} does not take"):
            apply(op, *operands)
    with pytest.raises(TypeError, match="no truth value"):
        bool(mask)


def test_nan_is_no_constant() -> None:
    with pytest.raises(ValueError, match="NaN"):
        const(float("nan"))
    with np.errstate(invalid="ignore"):
        assert apply(Op.LOG, const(-1.0)).op is Op.LOG


def test_loads_need_every_index() -> None:
    with pytest.raises(ValueError, match="2 axes, 1 indices"):
        load(Table("t", Kind.INT, ("B", "NQ")), 0)


def test_a_range_reduction_has_no_interval() -> None:
    table = Table("t", Kind.INT, (4,))
    reduction = intern(Op.RANGE_MIN, Kind.INT, (const(0), var("q0")), (table, 0))
    with pytest.raises(ValueError, match="no interval"):
        interval(reduction, {"q0": (const(0), const(3))})
