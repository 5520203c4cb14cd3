"""What torch's functions make of tracers, by the names of torch or Python: `_EACH` element by element, `_WHOLE` of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncc.integrations.tracer import Trace, Traced, array, each, flat, lanes_of, read, refused
from attncc.ir.arrays import torch_arrays
from attncc.ir.expr import Expr, Kind, Op, apply, const, load, select, var, variables
from attncc.ir.values import evaluate


def call(trace: Trace, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a torch function or an operator makes of tracers.

    Raises:
        UnsupportedError: names the function.
    """
    name = _ALIASES.get(name.strip("_"), name.strip("_"))
    if name[:1] == "r" and name[1:] in _REVERSIBLE:
        name, args = name[1:], args[::-1]
    name = _ALIASES.get(name, name)
    kwargs = {key: x for key, x in kwargs.items() if (key, x) not in _DEFAULTS}
    if name in _WHOLE:
        return Traced(trace, array(_WHOLE[name](trace, *args, **kwargs)))
    if name not in _EACH:
        raise refused(name)
    if name in ("clamp", "div") and kwargs:
        args = (*args, *_keywords(name, args, kwargs))
    elif kwargs:
        raise refused(f"{name}({', '.join(kwargs)}=..)")
    arrays = [x if x is None or isinstance(x, str) else lanes_of(trace, x) for x in args]
    try:
        return Traced(trace, each(lambda *operands: _EACH[name](trace, *operands), arrays))
    except TypeError as error:
        raise refused(f"{name} of {len(args)} arguments", str(error)) from None


def _keywords(name: str, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    names = ("min", "max") if name == "clamp" else ("other", "rounding_mode")
    return [kwargs.get(n) for n in names[len(args) - 1 :]]


def number(x: Expr) -> Expr:
    """A boolean as 0 or 1."""
    return select(x, 1, 0) if x.kind is Kind.BOOL else x


def truth(x: Expr) -> Expr:
    """A number as whether it is not 0."""
    return x if x.kind is Kind.BOOL else ~x.equals(0)


def _float(x: Expr) -> Expr:
    return apply(Op.FLOAT, number(x))


def _whole(x: Expr, name: str) -> Expr:
    if x.kind is Kind.FLOAT:
        raise refused(f"{name} of a float", "integers are exact; compute them from indices and integer tensors")
    return number(x)


def _numeric(op: Op) -> Callable[..., Expr]:
    return lambda trace, *args: apply(op, *map(number, args))


def _of_floats(function: Callable[..., Expr]) -> Callable[..., Expr]:
    return lambda trace, *args: function(*map(_float, args))


def _unary(op: Op) -> Callable[..., Expr]:
    return _of_floats(lambda x: apply(op, x))


def _compare(op: Op, swapped: bool = False) -> Callable[..., Expr]:
    return lambda trace, a, b: apply(op, *map(number, (b, a) if swapped else (a, b)))


def _where(trace: Trace, condition: Expr, a: Expr, b: Expr) -> Expr:
    if a.kind is not b.kind:
        floats = Kind.FLOAT in (a.kind, b.kind)
        a, b = (_float(x) if floats else number(x) for x in (a, b))
    return select(truth(condition), a, b)


def _clamp(trace: Trace, x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    x = x if low is None else apply(Op.MAX, number(x), low)
    return x if high is None else apply(Op.MIN, number(x), high)


def _div(trace: Trace, a: Expr, b: Expr, rounding: str | None = None) -> Expr:
    if rounding == "floor":
        return _integer(Op.FLOORDIV, "floor division")(trace, a, b)
    if rounding is not None:
        raise refused(f"division rounded by {rounding}", "it rounds to zero; use rounding_mode='floor'")
    return _float(a) / _float(b)


def _integer(op: Op, name: str) -> Callable[..., Expr]:
    return lambda trace, a, b: apply(op, _whole(a, name), _whole(b, name))


def _pow(trace: Trace, a: Expr, b: Expr) -> Expr:
    if b.op is Op.CONST and b.value in (1, 2, 3, 4):
        return reduce(lambda x, y: x * y, [number(a)] * int(b.value))
    return apply(Op.POW, _float(a), _float(b))


def _bits(name: str, op: Op | None = None) -> Callable[..., Expr]:
    """Logic on booleans; on integers the bits, which the language lacks: a table of all values where one index decides them."""

    def rule(trace: Trace, a: Expr, b: Expr) -> Expr:
        if op is not None and a.kind is b.kind is Kind.BOOL:
            return apply(op, a, b)
        if name == "xor" and a.kind is b.kind is Kind.BOOL:
            return apply(Op.NE, number(a), number(b))
        return _tabulated(trace, name, _whole(a, name), _whole(b, name))

    return rule


def _tabulated(trace: Trace, name: str, a: Expr, b: Expr) -> Expr:
    free = sorted(variables(a) | variables(b))
    if len(free) != 1 or free[0] not in trace.lengths:
        needed = f"give {free[0]}=, how many there are" if len(free) == 1 else "it depends on more than one index"
        raise refused(f"{name} of integers", f"bits are known as tables of one index only, and {needed}")
    env = {free[0]: torch.arange(trace.lengths[free[0]]), **trace.tensors}
    operands = (torch.as_tensor(evaluate(x, env, torch_arrays())) for x in (a, b))
    values = getattr(torch, {"lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift"}.get(name, f"bitwise_{name}"))(*operands)
    return load(trace.table(values.expand(trace.lengths[free[0]]).contiguous()), var(free[0]))


def _cast(name: str) -> Callable[..., Expr]:
    casts: dict[str, Callable[[Expr], Expr]] = {"float": _float, "bool": truth, "int": lambda x: _whole(x, "a cast to integers")}
    return lambda trace, x: casts[name](x)


def _to(trace: Trace, x: Any, dtype: Any = None, **_: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        return x.lanes
    name = "bool" if dtype is torch.bool else "float" if dtype.is_floating_point else "int"
    return each(lambda e: _cast(name)(trace, e), [x.lanes])


def _getitem(trace: Trace, table: Any, key: Any) -> Any:
    keys = key if isinstance(key, tuple) else (key,)
    if isinstance(table, Traced):
        if any(isinstance(x, Traced | Tensor) for x in keys):
            raise refused("an index into a computed array", "only captured tensors are indexed by what differs from pair to pair")
        return table.lanes[keys]
    if len(keys) > table.dim() or any(x is None or isinstance(x, slice) or x is Ellipsis for x in keys):
        raise refused("a slice beside an index", "give every index from the first axis on; slice before the mod is called")
    index = [lanes_of(trace, x) for x in keys]
    rest = tuple(table.shape[len(keys) :])
    lead = np.broadcast_shapes(*(x.shape for x in index))
    found = np.empty((*lead, *rest), object)
    for at in np.ndindex(found.shape):
        own: list[Expr] = [_index(np.broadcast_to(x, lead)[at[: len(lead)]], n) for x, n in zip(index, table.shape)]
        found[at] = read(trace, table, [*own, *map(const, at[len(lead) :])])
    return found


def _index(x: Any, size: int) -> Expr:
    return const(int(x.value) % size) if x.op is Op.CONST else number(x)


def _folded(function: Callable[[Trace, Expr, Expr], Expr]) -> Callable[..., Any]:
    """A reduction over one axis, or all."""

    def rule(trace: Trace, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        lanes = lanes_of(trace, x)
        if dim is None:
            return _balanced(function, trace, list(lanes.reshape(-1)))
        moved = np.moveaxis(lanes, dim, -1)
        found = np.empty(moved.shape[:-1], object)
        for at in np.ndindex(found.shape):
            found[at] = _balanced(function, trace, list(moved[at]))
        return np.expand_dims(found, dim) if keepdim else found

    return rule


def _balanced(function: Callable[[Trace, Expr, Expr], Expr], trace: Trace, terms: list[Expr]) -> Expr:
    """Terms joined as a tree, so that many of them are not nested deeply."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    return function(trace, _balanced(function, trace, terms[:half]), _balanced(function, trace, terms[half:]))


def _dot(trace: Trace, a: Any, b: Any) -> Any:
    return _folded(_numeric(Op.ADD))(trace, call(trace, "mul", (a, b), {}))


def _mean(trace: Trace, x: Any) -> Any:
    total: Expr = _folded(_numeric(Op.ADD))(trace, x)
    return _float(total) * (1.0 / x.lanes.size)


def _reshaped(trace: Trace, x: Any, *shape: Any) -> Any:
    return x.lanes.reshape(tuple(flat(shape)))


def _filled(value: int | None, like: bool = False) -> Callable[..., Any]:
    """New arrays of one number, of a shape given or that of the tracer."""

    def rule(trace: Trace, x: Any, *given: Any, dtype: Any = None, **_: Any) -> Any:
        shape, number = (x.lanes.shape, given) if like else (given[0], given[1:])
        sides = tuple(flat([shape]))
        chosen = dtype if isinstance(dtype, torch.dtype) else x.dtype
        found = torch.full(sides, number[0] if value is None else value, dtype=chosen)
        return lanes_of(trace, found)

    return rule


def _gelu(x: Expr) -> Expr:
    return x * 0.5 * (apply(Op.ERF, x * math.sqrt(0.5)) + 1.0)


def _exp2(x: Expr) -> Expr:
    return apply(Op.EXP, x * math.log(2.0))


_ALIASES = {
    "subtract": "sub", "multiply": "mul", "truediv": "div", "true_divide": "div", "divide": "div", "floordiv": "floor_divide",
    "mod": "remainder", "absolute": "abs", "negative": "neg", "clip": "clamp", "less": "lt", "less_equal": "le", "greater": "gt",
    "greater_equal": "ge", "not_equal": "ne", "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "logical_and": "both",
    "logical_or": "either", "logical_not": "not", "bitwise_not": "not", "invert": "not", "long": "int", "double": "float",
    "bitwise_left_shift": "lshift", "bitwise_right_shift": "rshift", "amax": "amax", "max": "maximum", "min": "minimum",
    "view": "reshape", "type": "to", "expit": "sigmoid",
}  # fmt: skip
_DEFAULTS = (("inplace", False), ("approximate", "none"), ("alpha", 1), ("dim", None))
_REVERSIBLE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "div", "remainder")
_EACH: dict[str, Callable[..., Expr]] = {
    "add": _numeric(Op.ADD), "sub": _numeric(Op.SUB), "mul": _numeric(Op.MUL), "neg": _numeric(Op.NEG), "abs": _numeric(Op.ABS),
    "maximum": _numeric(Op.MAX), "minimum": _numeric(Op.MIN), "clamp_min": _numeric(Op.MAX), "clamp_max": _numeric(Op.MIN),
    "square": lambda trace, x: number(x) * number(x), "div": _div, "pow": _pow, "clamp": _clamp, "where": _where,
    "floor_divide": _integer(Op.FLOORDIV, "//"), "remainder": _integer(Op.MOD, "%"),
    "lt": _compare(Op.LT), "le": _compare(Op.LE), "gt": _compare(Op.LT, True), "ge": _compare(Op.LE, True),
    "eq": _compare(Op.EQ), "ne": _compare(Op.NE),
    "and": _bits("and", Op.AND), "or": _bits("or", Op.OR), "xor": _bits("xor"), "lshift": _bits("lshift"), "rshift": _bits("rshift"),
    "both": lambda trace, a, b: truth(a) & truth(b), "either": lambda trace, a, b: truth(a) | truth(b),
    "not": lambda trace, x: ~truth(x) if x.kind is Kind.BOOL else -_whole(x, "~") - 1,
    "float": _cast("float"), "bool": _cast("bool"), "int": _cast("int"), "exp2": _of_floats(_exp2), "gelu": _of_floats(_gelu),
    "exp": _unary(Op.EXP), "log": _unary(Op.LOG), "sqrt": _unary(Op.SQRT), "tanh": _unary(Op.TANH), "sigmoid": _unary(Op.SIGMOID),
    "softplus": _unary(Op.SOFTPLUS), "erf": _unary(Op.ERF), "relu": _unary(Op.RELU),
    "silu": _of_floats(lambda x: x * apply(Op.SIGMOID, x)), "rsqrt": _of_floats(lambda x: const(1.0) / apply(Op.SQRT, x)),
    "reciprocal": _of_floats(lambda x: const(1.0) / x), "log1p": _of_floats(lambda x: apply(Op.LOG, x + 1.0)),
}  # fmt: skip
"""Functions of one pair's numbers, element by element: `(trace, *operands)`."""
_WHOLE: dict[str, Callable[..., Any]] = {
    "getitem": _getitem, "to": _to, "sum": _folded(_numeric(Op.ADD)), "amax": _folded(_numeric(Op.MAX)), "amin": _folded(_numeric(Op.MIN)),
    "any": _folded(lambda trace, a, b: truth(a) | truth(b)), "all": _folded(lambda trace, a, b: truth(a) & truth(b)),
    "dot": _dot, "mean": _mean, "reshape": _reshaped, "clone": _to, "contiguous": _to,
    **{f"new_{name}": _filled(value) for name, value in (("zeros", 0), ("ones", 1), ("full", None))},
    **{f"{name}_like": _filled(value, like=True) for name, value in (("zeros", 0), ("ones", 1), ("full", None))},
    "unsqueeze": lambda trace, x, dim: np.expand_dims(x.lanes, dim),
    "squeeze": lambda trace, x, dim=None: np.squeeze(x.lanes, dim),
}  # fmt: skip
"""Functions of whole arrays: `(trace, *arguments)`."""
