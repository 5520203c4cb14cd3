"""Tracers of one pair of tokens: what a FlexAttention mod is called with in place of numbers.

A tracer stands for one number, or for a small array of them, each an expression. Torch hands every function of a tracer to
`Traced.__torch_function__`, so any Python that computes with tensors is read; what decides on their values cannot be.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncc.errors import UnsupportedError
from attncc.ir.expr import Expr, Kind, Op, Table, const, load, tables, var
from attncc.spec.checks import RESERVED
from attncc.spec.masks.text import Captured

LANES = 4096
"""Elements of the largest array that a mod may make of one pair."""
Mod = Callable[..., Any]
Captures = dict[str, Tensor]


def refused(name: str, why: str = "the language of specs has no such operation") -> UnsupportedError:
    """The one error of what cannot be imported."""
    return UnsupportedError(f"{name} in a mod", why, "arithmetic, comparisons, where, clamp and reads of captured tensors")


class Trace:
    """One call of a mod: the tensors that it reads, by name.

    `lengths` are those of "b", "h", "q" and "k" that are known; `call(trace, name, args, kwargs)` is what a function makes of tracers.
    """

    def __init__(self, mod: Mod, lengths: dict[str, int], call: Callable[..., Any]) -> None:
        self.mod, self.lengths, self.call, self.tensors = mod, lengths, call, Captures()
        self._tables: dict[int, tuple[Tensor, Table]] = {}
        self._names = {id(x): name for name, x in _captured(mod)}

    def run(self, names: str) -> Expr:
        """What the mod makes of one pair."""
        given = [Traced(self, array(var(n, Kind.FLOAT if n == "s" else Kind.INT))) for n in names]
        lanes = lanes_of(self, self.mod(*given))
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
    return lambda *args: _called(name, args, {})


def _called(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    trace = next(x.trace for x in flat([*args, *kwargs.values()]) if isinstance(x, Traced))
    return trace.call(trace, name, args, kwargs)


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
        return _called(getattr(function, "__name__", str(function)), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _called(name, (self, *args), kwargs)

    def __getitem__(self, key: Any) -> Any:
        return _called("getitem", (self, key), {})

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


def flat(values: Any) -> Iterator[Any]:
    """What nested lists and tuples hold."""
    for x in values:
        if isinstance(x, tuple | list):
            yield from flat(x)
        else:
            yield x


def array(x: Any) -> Any:
    """An array of one element, unless it is one."""
    if isinstance(x, np.ndarray):
        return x
    found = np.empty((), object)
    found[()] = x
    return found


def each(function: Callable[..., Expr], arrays: list[Any]) -> Any:
    """A function of every element of arrays that broadcast; None and text are the same for all."""
    shaped = [x for x in arrays if isinstance(x, np.ndarray)]
    found = np.empty(np.broadcast_shapes(*(x.shape for x in shaped)), object)
    if found.size > LANES:
        raise refused(f"an array of shape {list(found.shape)}", f"at most {LANES} numbers a pair")
    spread = [np.broadcast_to(x, found.shape) if isinstance(x, np.ndarray) else x for x in arrays]
    for at in np.ndindex(found.shape):
        found[at] = function(*(x[at] if isinstance(x, np.ndarray) else x for x in spread))
    return found


def lanes_of(trace: Trace, x: Any) -> Any:
    """Expressions of a tracer, a number, or a captured tensor; one that is trained is read, a number of integers is a constant."""
    if isinstance(x, Traced):
        return x.lanes
    if isinstance(x, bool | int | float):
        return array(const(x))
    if not isinstance(x, Tensor) or x.numel() > LANES:
        raise refused(f"an operand of {type(x).__name__}", "it takes numbers, captured tensors and what is made of them")
    found = np.empty(tuple(x.shape), object)
    for at in np.ndindex(found.shape):
        found[at] = read(trace, x, [const(i) for i in at or (0,)]) if x.requires_grad else const(x[at].item())
    return found


def read(trace: Trace, tensor: Tensor, index: list[Expr]) -> Expr:
    """An element of a captured tensor, as a run-time table."""
    value = load(trace.table(tensor), *index)
    return ~value.equals(0) if tensor.dtype is torch.bool else value
