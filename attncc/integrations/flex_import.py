"""FlexAttention import: a mask_mod or score_mod is called once with tracers, and what it computes becomes text of a spec.

A tracer stands for one number, or for a small array of them, each an expression. Torch hands every function of a tracer to
`Traced.__torch_function__`, so any Python that computes with tensors is read; what decides on their values cannot be.
"""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncc.errors import UnsupportedError
from attncc.ir.arrays import torch_arrays
from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, load, select, tables, var, variables
from attncc.ir.text import MAX_TEXT, to_text
from attncc.ir.values import evaluate
from attncc.spec.checks import RESERVED
from attncc.spec.masks.text import Captured, Predicate
from attncc.spec.scores import Expression

LANES = 4096
"""Elements of the largest array that a mod may make of one pair."""
Mod = Callable[..., Any]
Captures = dict[str, Tensor]


def from_mask_mod(mod: Mod, lengths: dict[str, int]) -> tuple[Predicate, Captures]:
    """The mask that a mask_mod computes; see `Predicate.from_mask_mod`."""
    trace = Trace(mod, lengths)
    value = _truth(trace.run("bhqk"))
    return Predicate(tables=trace.declared(value), text=_text(value)), trace.captures(value)


def from_score_mod(mod: Mod, lengths: dict[str, int]) -> tuple[Expression, Captures]:
    """The score map that a score_mod computes; see `Expression.from_score_mod`."""
    trace = Trace(mod, lengths)
    value = apply(Op.FLOAT, _number(trace.run("sbhqk")))
    return Expression(text=_text(value), tables=trace.declared(value)), trace.captures(value)


def _text(value: Expr) -> str:
    text = to_text(value)
    if len(text) > MAX_TEXT:
        raise UnsupportedError("this mod", f"its formula has {len(text)} characters, {MAX_TEXT} are read", "tables in place of arithmetic")
    return text


def refused(name: str, why: str = "the language of specs has no such operation") -> UnsupportedError:
    """The one error of what cannot be imported."""
    return UnsupportedError(f"{name} in a mod", why, "arithmetic, comparisons, where, clamp and reads of captured tensors")


class Trace:
    """One call of a mod: the tensors that it reads, by name. `lengths` are those of "b", "h", "q" and "k" that are known."""

    def __init__(self, mod: Mod, lengths: dict[str, int]) -> None:
        self.mod, self.lengths, self.tensors = mod, lengths, Captures()
        self._tables: dict[int, tuple[Tensor, Table]] = {}
        self._names = {id(x): name for name, x in _captured(mod)}

    def run(self, names: str) -> Expr:
        """What the mod makes of one pair."""
        given = [Traced(self, _array(var(n, Kind.FLOAT if n == "s" else Kind.INT))) for n in names]
        lanes = _lanes(self, self.mod(*given))
        if lanes.size != 1:
            raise refused(f"a result of shape {list(lanes.shape)}", "a mod gives one number a pair")
        value: Expr = lanes.reshape(-1)[0]
        return value

    def declared(self, value: Expr) -> tuple[Captured, ...]:
        """The tables that a result reads, as a spec declares them."""
        return tuple(Captured.model_validate({"name": t.name, "shape": t.shape, "kind": t.kind.value}) for t in tables(value))

    def captures(self, value: Expr) -> Captures:
        """The tensors that a result reads, by name."""
        return {t.name: self.tensors[t.name] for t in tables(value)}

    def table(self, tensor: Tensor) -> Table:
        """The run-time table that a captured tensor is."""
        if id(tensor) not in self._tables:
            floats, name = tensor.is_floating_point(), self._name(tensor)
            table = Table(name, Kind.FLOAT if floats else Kind.INT, tuple(tensor.shape) or (1,))
            self.tensors[name] = tensor.reshape(tuple(tensor.shape) or (1,)).to(torch.float32 if floats else torch.int32)
            self._tables[id(tensor)] = tensor, table
        return self._tables[id(tensor)][1]

    def _name(self, tensor: Tensor) -> str:
        name = re.sub(r"[^a-z0-9_]", "_", self._names.get(id(tensor), "captured").lower()).lstrip("_0123456789") or "captured"
        name = f"{name}_table" if name in RESERVED or name in _WORDS or keyword.iskeyword(name) else name
        return name if name not in self.tensors else f"{name}_{len(self.tensors)}"


_WORDS = {op.value for op in Op}


def _captured(mod: Any, deep: int = 3) -> Iterator[tuple[str, Any]]:
    """Names and values that a function closes over or reads as globals, and those that functions among them do."""
    if deep and inspect.isfunction(mod):
        found = inspect.getclosurevars(mod)
        for name, value in [*found.globals.items(), *found.nonlocals.items()]:
            yield name, value
            yield from _captured(value, deep - 1)


def _operator(name: str) -> Callable[..., Any]:
    return lambda *args: call(name, args, {})


class Traced:
    """What a mod computes of one pair: an array of expressions, most often a single one."""

    __add__, __radd__ = _operator("add"), _operator("radd")
    __sub__, __rsub__ = _operator("sub"), _operator("rsub")
    __mul__, __rmul__ = _operator("mul"), _operator("rmul")
    __truediv__, __rtruediv__ = _operator("truediv"), _operator("rtruediv")
    __floordiv__, __rfloordiv__ = _operator("floordiv"), _operator("rfloordiv")
    __mod__, __rmod__ = _operator("mod"), _operator("rmod")
    __pow__, __rpow__ = _operator("pow"), _operator("rpow")
    __and__, __rand__ = _operator("and"), _operator("rand")
    __or__, __ror__ = _operator("or"), _operator("ror")
    __xor__, __rxor__ = _operator("xor"), _operator("rxor")
    __lshift__, __rlshift__ = _operator("lshift"), _operator("rlshift")
    __rshift__, __rrshift__ = _operator("rshift"), _operator("rrshift")
    __lt__ = _operator("lt")
    __le__ = _operator("le")
    __gt__ = _operator("gt")
    __ge__ = _operator("ge")
    __eq__ = _operator("eq")
    __ne__ = _operator("ne")
    __neg__ = _operator("neg")
    __abs__ = _operator("abs")
    __invert__ = _operator("invert")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: Trace, lanes: Any) -> None:
        self.trace, self.lanes = trace, lanes

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(getattr(function, "__name__", str(function)), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: call(name, (self, *args), kwargs)

    def __getitem__(self, key: Any) -> Any:
        return call("getitem", (self, key), {})

    def __bool__(self) -> bool:
        raise refused("a branch on a value", "a mod is read once, for all pairs; use torch.where")

    def __index__(self) -> int:
        raise refused("a value used as a Python number", "it differs from pair to pair")

    @property
    def shape(self) -> torch.Size:
        """Of the numbers of one pair."""
        return torch.Size(self.lanes.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type torch would give these numbers."""
        kind = self.lanes.reshape(-1)[0].kind
        return {Kind.INT: torch.int64, Kind.FLOAT: torch.float32, Kind.BOOL: torch.bool}[kind]

    @property
    def device(self) -> torch.device:
        """Nowhere: no number is computed."""
        return torch.device("cpu")


# ---- calls -----------------------------------------------------------------------------------------------------------------------


def call(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a torch function or an operator makes of tracers.

    Raises:
        UnsupportedError: names the function.
    """
    name = _ALIASES.get(name.strip("_"), name.strip("_"))
    if name[:1] == "r" and name[1:] in _REVERSIBLE:
        name, args = name[1:], args[::-1]
    name = _ALIASES.get(name, name)
    trace = next(x.trace for x in _flat([*args, *kwargs.values()]) if isinstance(x, Traced))
    kwargs = {key: x for key, x in kwargs.items() if (key, x) not in _DEFAULTS}
    if name in _WHOLE:
        return Traced(trace, _array(_WHOLE[name](trace, *args, **kwargs)))
    if name not in _EACH:
        raise refused(name)
    if name in ("clamp", "div") and kwargs:
        args = (*args, *_keywords(name, args, kwargs))
    elif kwargs:
        raise refused(f"{name}({', '.join(kwargs)}=..)")
    arrays = [x if x is None or isinstance(x, str) else _lanes(trace, x) for x in args]
    try:
        return Traced(trace, _each(lambda *operands: _EACH[name](trace, *operands), arrays))
    except TypeError as error:
        raise refused(f"{name} of {len(args)} arguments", str(error)) from None


def _keywords(name: str, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    names = ("min", "max") if name == "clamp" else ("other", "rounding_mode")
    return [kwargs.get(n) for n in names[len(args) - 1 :]]


def _flat(values: Any) -> Iterator[Any]:
    for x in values:
        if isinstance(x, tuple | list):
            yield from _flat(x)
        else:
            yield x


def _array(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x
    found = np.empty((), object)
    found[()] = x
    return found


def _each(function: Callable[..., Expr], arrays: list[Any]) -> Any:
    """A function of every element of arrays that broadcast; None and text are the same for all."""
    shaped = [x for x in arrays if isinstance(x, np.ndarray)]
    found = np.empty(np.broadcast_shapes(*(x.shape for x in shaped)), object)
    if found.size > LANES:
        raise refused(f"an array of shape {list(found.shape)}", f"at most {LANES} numbers a pair")
    spread = [np.broadcast_to(x, found.shape) if isinstance(x, np.ndarray) else x for x in arrays]
    for at in np.ndindex(found.shape):
        found[at] = function(*(x[at] if isinstance(x, np.ndarray) else x for x in spread))
    return found


def _lanes(trace: Trace, x: Any) -> Any:
    """Expressions of a tracer, a number, or a captured tensor; one that is trained is read, a number of integers is a constant."""
    if isinstance(x, Traced):
        return x.lanes
    if isinstance(x, bool | int | float):
        return _array(const(x))
    if not isinstance(x, Tensor) or x.numel() > LANES:
        raise refused(f"an operand of {type(x).__name__}", "it takes numbers, captured tensors and what is made of them")
    found = np.empty(tuple(x.shape), object)
    for at in np.ndindex(found.shape):
        found[at] = _read(trace, x, [const(i) for i in at or (0,)]) if x.requires_grad else const(x[at].item())
    return found


def _read(trace: Trace, tensor: Tensor, index: list[Expr]) -> Expr:
    value = load(trace.table(tensor), *index)
    return ~value.equals(0) if tensor.dtype is torch.bool else value


def _getitem(trace: Trace, table: Any, key: Any) -> Any:
    keys = key if isinstance(key, tuple) else (key,)
    if isinstance(table, Traced):
        if any(isinstance(x, Traced | Tensor) for x in keys):
            raise refused("an index into a computed array", "only captured tensors are indexed by what differs from pair to pair")
        return table.lanes[keys]
    if len(keys) > table.dim() or any(x is None or isinstance(x, slice) or x is Ellipsis for x in keys):
        raise refused("a slice beside an index", "give every index from the first axis on; slice before the mod is called")
    index = [_lanes(trace, x) for x in keys]
    rest = tuple(table.shape[len(keys) :])
    lead = np.broadcast_shapes(*(x.shape for x in index))
    found = np.empty((*lead, *rest), object)
    for at in np.ndindex(found.shape):
        own: list[Expr] = [_index(np.broadcast_to(x, lead)[at[: len(lead)]], n) for x, n in zip(index, table.shape)]
        found[at] = _read(trace, table, [*own, *map(const, at[len(lead) :])])
    return found


def _index(x: Any, size: int) -> Expr:
    return const(int(x.value) % size) if x.op is Op.CONST else _number(x)


# ---- elements --------------------------------------------------------------------------------------------------------------------


def _number(x: Expr) -> Expr:
    return select(x, 1, 0) if x.kind is Kind.BOOL else x


def _truth(x: Expr) -> Expr:
    return x if x.kind is Kind.BOOL else ~x.equals(0)


def _float(x: Expr) -> Expr:
    return apply(Op.FLOAT, _number(x))


def _whole(x: Expr, name: str) -> Expr:
    if x.kind is Kind.FLOAT:
        raise refused(f"{name} of a float", "integers are exact; compute them from indices and integer tensors")
    return _number(x)


def _numeric(op: Op) -> Callable[..., Expr]:
    return lambda trace, *args: apply(op, *map(_number, args))


def _of_floats(function: Callable[..., Expr]) -> Callable[..., Expr]:
    return lambda trace, *args: function(*map(_float, args))


def _unary(op: Op) -> Callable[..., Expr]:
    return _of_floats(lambda x: apply(op, x))


def _compare(op: Op, swapped: bool = False) -> Callable[..., Expr]:
    return lambda trace, a, b: apply(op, *map(_number, (b, a) if swapped else (a, b)))


def _where(trace: Trace, condition: Expr, a: Expr, b: Expr) -> Expr:
    if a.kind is not b.kind:
        floats = Kind.FLOAT in (a.kind, b.kind)
        a, b = (_float(x) if floats else _number(x) for x in (a, b))
    return select(_truth(condition), a, b)


def _clamp(trace: Trace, x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    x = x if low is None else apply(Op.MAX, _number(x), low)
    return x if high is None else apply(Op.MIN, _number(x), high)


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
        return reduce(lambda x, y: x * y, [_number(a)] * int(b.value))
    return apply(Op.POW, _float(a), _float(b))


def _bits(name: str, op: Op | None = None) -> Callable[..., Expr]:
    """Logic on booleans; on integers the bits, which the language lacks: a table of all values where one index decides them."""

    def rule(trace: Trace, a: Expr, b: Expr) -> Expr:
        if op is not None and a.kind is b.kind is Kind.BOOL:
            return apply(op, a, b)
        if name == "xor" and a.kind is b.kind is Kind.BOOL:
            return apply(Op.NE, _number(a), _number(b))
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
    casts: dict[str, Callable[[Expr], Expr]] = {"float": _float, "bool": _truth, "int": lambda x: _whole(x, "a cast to integers")}
    return lambda trace, x: casts[name](x)


def _to(trace: Trace, x: Any, dtype: Any = None, **_: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        return x.lanes
    name = "bool" if dtype is torch.bool else "float" if dtype.is_floating_point else "int"
    return _each(lambda e: _cast(name)(trace, e), [x.lanes])


def _folded(function: Callable[[Trace, Expr, Expr], Expr]) -> Callable[..., Any]:
    """A reduction over one axis, or all."""

    def rule(trace: Trace, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        lanes = _lanes(trace, x)
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
    return _folded(_numeric(Op.ADD))(trace, call("mul", (a, b), {}))


def _mean(trace: Trace, x: Any) -> Any:
    total: Expr = _folded(_numeric(Op.ADD))(trace, x)
    return _float(total) * (1.0 / x.lanes.size)


def _reshaped(trace: Trace, x: Any, *shape: Any) -> Any:
    return x.lanes.reshape(tuple(_flat(shape)))


def _filled(value: int | None, like: bool = False) -> Callable[..., Any]:
    """New arrays of one number, of a shape given or that of the tracer."""

    def rule(trace: Trace, x: Any, *given: Any, dtype: Any = None, **_: Any) -> Any:
        shape, number = (x.lanes.shape, given) if like else (given[0], given[1:])
        sides = tuple(_flat([shape]))
        chosen = dtype if isinstance(dtype, torch.dtype) else x.dtype
        found = torch.full(sides, number[0] if value is None else value, dtype=chosen)
        return _lanes(trace, found)

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
    "square": lambda trace, x: _number(x) * _number(x), "div": _div, "pow": _pow, "clamp": _clamp, "where": _where,
    "floor_divide": _integer(Op.FLOORDIV, "//"), "remainder": _integer(Op.MOD, "%"),
    "lt": _compare(Op.LT), "le": _compare(Op.LE), "gt": _compare(Op.LT, True), "ge": _compare(Op.LE, True),
    "eq": _compare(Op.EQ), "ne": _compare(Op.NE),
    "and": _bits("and", Op.AND), "or": _bits("or", Op.OR), "xor": _bits("xor"), "lshift": _bits("lshift"), "rshift": _bits("rshift"),
    "both": lambda trace, a, b: _truth(a) & _truth(b), "either": lambda trace, a, b: _truth(a) | _truth(b),
    "not": lambda trace, x: ~_truth(x) if x.kind is Kind.BOOL else -_whole(x, "~") - 1,
    "float": _cast("float"), "bool": _cast("bool"), "int": _cast("int"), "exp2": _of_floats(_exp2), "gelu": _of_floats(_gelu),
    "exp": _unary(Op.EXP), "log": _unary(Op.LOG), "sqrt": _unary(Op.SQRT), "tanh": _unary(Op.TANH), "sigmoid": _unary(Op.SIGMOID),
    "softplus": _unary(Op.SOFTPLUS), "erf": _unary(Op.ERF), "relu": _unary(Op.RELU),
    "silu": _of_floats(lambda x: x * apply(Op.SIGMOID, x)), "rsqrt": _of_floats(lambda x: const(1.0) / apply(Op.SQRT, x)),
    "reciprocal": _of_floats(lambda x: const(1.0) / x), "log1p": _of_floats(lambda x: apply(Op.LOG, x + 1.0)),
}  # fmt: skip
"""Functions of one pair's numbers, element by element: `(trace, *operands)`."""
_WHOLE: dict[str, Callable[..., Any]] = {
    "getitem": _getitem, "to": _to, "sum": _folded(_numeric(Op.ADD)), "amax": _folded(_numeric(Op.MAX)), "amin": _folded(_numeric(Op.MIN)),
    "any": _folded(lambda trace, a, b: _truth(a) | _truth(b)), "all": _folded(lambda trace, a, b: _truth(a) & _truth(b)),
    "dot": _dot, "mean": _mean, "reshape": _reshaped, "clone": _to, "contiguous": _to,
    **{f"new_{name}": _filled(value) for name, value in (("zeros", 0), ("ones", 1), ("full", None))},
    **{f"{name}_like": _filled(value, like=True) for name, value in (("zeros", 0), ("ones", 1), ("full", None))},
    "unsqueeze": lambda trace, x, dim: np.expand_dims(x.lanes, dim),
    "squeeze": lambda trace, x, dim=None: np.squeeze(x.lanes, dim),
}  # fmt: skip
"""Functions of whole arrays: `(trace, *arguments)`."""
