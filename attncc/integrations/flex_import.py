"""FlexAttention import: a mask_mod or score_mod is called once with tracers, and what it computes becomes text of a spec."""

from __future__ import annotations

from attncc.errors import UnsupportedError
from attncc.integrations.traced_functions import call, number, truth
from attncc.integrations.tracer import Captures, Mod, Trace
from attncc.ir.expr import Expr, Op, apply
from attncc.ir.text import MAX_TEXT, to_text
from attncc.spec.masks.text import Predicate
from attncc.spec.scores import Expression


def from_mask_mod(mod: Mod, lengths: dict[str, int]) -> tuple[Predicate, Captures]:
    """The mask that a mask_mod computes; see `Predicate.from_mask_mod`."""
    trace = Trace(mod, lengths, call)
    value = truth(trace.run("bhqk"))
    return Predicate(tables=trace.declared(value), text=_text(value)), trace.captures(value)


def from_score_mod(mod: Mod, lengths: dict[str, int]) -> tuple[Expression, Captures]:
    """The score map that a score_mod computes; see `Expression.from_score_mod`."""
    trace = Trace(mod, lengths, call)
    value = apply(Op.FLOAT, number(trace.run("sbhqk")))
    return Expression(text=_text(value), tables=trace.declared(value)), trace.captures(value)


def _text(value: Expr) -> str:
    text = to_text(value)
    if len(text) > MAX_TEXT:
        raise UnsupportedError("this mod", f"its formula has {len(text)} characters, {MAX_TEXT} are read", "tables in place of arithmetic")
    return text
