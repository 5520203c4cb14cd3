"""Derivatives agree with sympy's and with central differences, and stay finite wherever the true derivative is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from attncc.ir.arrays import torch_arrays
from attncc.ir.derivatives import derivative
from attncc.ir.expr import Expr, Kind, Op, Table, apply, clamp, const, load, maximum, minimum, nodes, select, var
from attncc.ir.ops import TABLE
from attncc.ir.values import evaluate
from attncc.spec import gates, normalizers, scores
from attncc.spec.model import Grid

S = var("s", Kind.FLOAT)


def call(op: Op, *args: Expr | float) -> Expr:
    return apply(op, *args)


# Arguments are kept where the function is smooth and of moderate size: roots and logarithms of 1 + x * x, exp of a tanh.
SMOOTH: dict[str, Callable[[Expr], Expr]] = {
    "exp": lambda x: call(Op.EXP, call(Op.TANH, x)),
    "log": lambda x: call(Op.LOG, x * x + 1.0),
    "sqrt": lambda x: call(Op.SQRT, x * x + 0.5),
    "tanh": lambda x: call(Op.TANH, x),
    "sigmoid": lambda x: call(Op.SIGMOID, x),
    "softplus": lambda x: call(Op.SOFTPLUS, x),
    "erf": lambda x: call(Op.ERF, x),
    "pow": lambda x: call(Op.POW, x * x + 0.5, 1.5),
    "negative pow": lambda x: call(Op.POW, x * x + 0.5, -0.75),
    "minus": lambda x: -x,
}
KINKED: dict[str, Callable[[Expr], Expr]] = {
    "relu": lambda x: call(Op.RELU, x),
    "abs": lambda x: call(Op.ABS, x),
    "clamp": lambda x: clamp(x, -0.7, 0.9),
}
TWO: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b * b + 1.0),
    "min": minimum,
    "max": maximum,
    "select": lambda a, b: select(a < b, a * 2.0, b - 1.0),
    "pow": lambda a, b: call(Op.POW, a * a + 0.5, call(Op.TANH, b)),
}


def floats() -> SearchStrategy[Expr]:
    """Expressions of one float variable."""
    leaf = st.just(S) | st.sampled_from([0.5, -1.25, 2.0]).map(const)
    return st.recursive(leaf, _larger, max_leaves=4)


def _larger(inner: SearchStrategy[Expr]) -> SearchStrategy[Expr]:
    one = st.sampled_from(sorted({**SMOOTH, **KINKED}))
    two = st.sampled_from(sorted(TWO))
    return st.builds(lambda name, x: {**SMOOTH, **KINKED}[name](x), one, inner) | st.builds(
        lambda name, a, b: TWO[name](a, b), two, inner, inner
    )


_SYMPY: dict[Op, Callable[..., Any]] = {
    Op.ADD: lambda a, b: a + b, Op.SUB: lambda a, b: a - b, Op.MUL: lambda a, b: a * b, Op.DIV: lambda a, b: a / b, Op.NEG: lambda a: -a,
    Op.MIN: sympy.Min, Op.MAX: sympy.Max, Op.ABS: sympy.Abs, Op.EXP: sympy.exp, Op.LOG: sympy.log, Op.SQRT: sympy.sqrt,
    Op.TANH: sympy.tanh, Op.SIGMOID: lambda a: 1 / (1 + sympy.exp(-a)), Op.SOFTPLUS: lambda a: sympy.log(1 + sympy.exp(a)),
    Op.ERF: sympy.erf, Op.RELU: lambda a: sympy.Max(a, 0), Op.POW: lambda a, b: a**b,
    Op.LT: lambda a, b: a < b, Op.SELECT: lambda c, a, b: sympy.Piecewise((a, c), (b, True)),
}  # fmt: skip


def to_sympy(root: Expr) -> Any:
    """The same function in sympy, built node by node."""
    done: dict[Expr, Any] = {}
    for n in nodes(root):
        if n.op is Op.CONST:
            done[n] = sympy.Rational(n.value)
        else:
            done[n] = sympy.Symbol("s", real=True) if n.op is Op.VAR else _SYMPY[n.op](*(done[a] for a in n.args))
    return done[root]


POINTS = st.floats(-3, 3).map(lambda x: x + 0.0123456789)  # off the kinks, which lie at round numbers


@settings(max_examples=100)
@given(floats(), POINTS)
def test_sympy_agrees(root: Expr, at: float) -> None:
    symbol = sympy.Symbol("s", real=True)
    wanted = complex(sympy.diff(to_sympy(root), symbol).subs(symbol, sympy.Float(at, 30)).evalf(20))
    got = float(evaluate(derivative(root, S), {"s": at}))
    assert got == pytest.approx(wanted.real, rel=1e-9, abs=1e-12) or _near_a_kink(root, at)


def _near_a_kink(root: Expr, at: float) -> bool:
    """One-sided differences disagree: the derivative may be either."""
    left, right = (abs(_difference(root, at, h)) for h in (1e-7, -1e-7))
    return abs(left - right) > 1e-3


def _difference(root: Expr, at: float, h: float) -> float:
    return (float(evaluate(root, {"s": at + h})) - float(evaluate(root, {"s": at}))) / h


@settings(max_examples=150)
@given(floats(), POINTS)
def test_central_differences_agree(root: Expr, at: float) -> None:
    h = 1e-5
    coarse, fine = ((float(evaluate(root, {"s": at + d})) - float(evaluate(root, {"s": at - d}))) / (2 * d) for d in (2 * h, h))
    if math.isclose(coarse, fine, rel_tol=1e-4, abs_tol=1e-6):  # else a kink or a sharp bend lies between
        assert float(evaluate(derivative(root, S), {"s": at})) == pytest.approx(fine, rel=1e-4, abs=1e-5)


def test_derivative_of_a_table_read() -> None:
    """A bias in two places of an expression gets both parts of its gradient."""
    bias = load(Table("bias", Kind.FLOAT, ("H",)), var("h"))
    root = (S + bias) * call(Op.TANH, bias)
    env = {"s": 0.7, "h": 1, "bias": np.array([9.0, 0.4])}
    assert float(evaluate(derivative(root, bias), env)) == pytest.approx(math.tanh(0.4) + 1.1 * (1 - math.tanh(0.4) ** 2))


LINE = Grid((8,), (8,))
FORMULAS: dict[str, Expr] = {
    "softcap": scores.Softcap(cap=20.0).apply(S, LINE, 2),
    "sigmoid": normalizers.Sigmoid(bias=-2.0).record(LINE).weight,
    "sigmoid by length": normalizers.Sigmoid(bias="minus_log_keys").record(LINE).weight,
    "relu": normalizers.ReLU().record(LINE).weight,
    "squared relu": normalizers.ReLU(power=2).record(LINE).weight,
    "relu to the power 1.5": normalizers.ReLU(power=1.5).record(LINE).weight,
    **normalizers.WEIGHTS,
    "silu": gates.Output(activation="silu").expression(),
    **{name: make(S) for name, make in {**SMOOTH, **KINKED}.items()},
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_are_finite(name: str, dtype: torch.dtype) -> None:
    """Naive forms are NaN in float32 from |s| = 90 on: exp(100) / (1 + exp(100)) ** 2."""
    root, leaf = FORMULAS[name], var("g", Kind.FLOAT) if name == "silu" else S
    s = torch.tensor([0.0, *(sign * x for x in (1e-30, 1e-3, 1.0, 20.0, 100.0, 800.0, 1e4) for sign in (1, -1))], dtype=dtype)
    slope = torch.as_tensor(evaluate(derivative(root, leaf), {leaf.value: s, "o": torch.ones_like(s)}, torch_arrays(dtype)))
    assert slope.isfinite().all(), slope


@pytest.mark.parametrize("name", FORMULAS)
def test_autograd_agrees(name: str) -> None:
    root, leaf = FORMULAS[name], var("g", Kind.FLOAT) if name == "silu" else S
    random.seed(0)
    s = torch.tensor([random.uniform(-4, 4) for _ in range(50)], dtype=torch.float64, requires_grad=True)
    env = {leaf.value: s, "o": torch.full_like(s, 0.3)}
    (wanted,) = torch.autograd.grad(evaluate(root, env, torch_arrays()).sum(), s)
    got = evaluate(derivative(root, leaf), {k: v.detach() for k, v in env.items()}, torch_arrays())
    got = got if isinstance(got, torch.Tensor) else torch.tensor(got, dtype=torch.float64)
    torch.testing.assert_close(got.expand(50), wanted, rtol=1e-10, atol=1e-12)


def test_what_is_not_picked_may_be_infinite() -> None:
    """1 / s has no derivative at 0, where select and min do not take it."""
    for root in (select(S < 0.0, const(1.0) / S, S * 3.0), minimum(const(1.0) / S, S * 3.0)):
        assert float(evaluate(derivative(root, S), {"s": torch.tensor(0.0)}, torch_arrays())) == 3.0


@pytest.mark.parametrize("op", [n for n in Op if n in TABLE and TABLE[n].kinds in "nfs"])
def test_every_op_that_gives_floats_has_a_derivative(op: Op) -> None:
    """So the gradient of no float table is ever missing."""
    assert TABLE[op].derivative is not None
