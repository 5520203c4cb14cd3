"""What fields of a spec contradict each other, said before anything is built from it."""

from __future__ import annotations

import keyword
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from attncc.ir.expr import Table, depth, tables
from attncc.ir.rows import SCORE
from attncc.spec.padding import padding_problems
from attncc.spec.scores import Alibi, Scale, factor_problems

if TYPE_CHECKING:
    from attncc.spec.attention import AttentionSpec

RESERVED = frozenset({
    "b", "h", "q", "k", "v", "s", "z", "o", "g", "inf", "addend", "gate", "out", "lse", "lists", "layout", "tokens", "key_tokens", "self",
    *(f"{name}{axis}" for name in ("q", "k", "r", "nq", "nk") for axis in ("", "0", "1", "2")),
})  # fmt: skip
"""What no run-time table may be called: variables of the language, and arguments of a call."""
DEEPEST = 150
"""Operations inside one another in a mask's formula, at most: printers and solvers walk down into it."""


def contradiction(problems: list[str]) -> PydanticCustomError:
    """The error of a spec that is wrong in these ways: one text, and each apart for whoever reports them."""
    return PydanticCustomError("contradiction", "{text}", {"text": "; ".join(problems), "problems": problems})


def spec_problems(spec: AttentionSpec) -> list[str]:
    """Everything wrong with fields that are each valid, as "field: what"; formulas are built only where sizes and names are right."""
    sizes = [*_head_problems(spec), *_grid_problems(spec), *_load_problems(spec), *_score_problems(spec), *_output_problems(spec)]
    return sizes or padding_problems(spec) or _depth_problems(spec) or _table_problems(spec)


def _head_problems(spec: AttentionSpec) -> list[str]:
    named = (("key_heads", spec.key_heads), ("value_heads", spec.value_heads))
    found = [f"{name}: {n} does not divide heads={spec.heads}" for name, n in named if n and spec.heads % n]
    return found + ([] if spec.routing is None else [f"routing: {p}" for p in spec.routing.problems(spec.heads)])


def _grid_problems(spec: AttentionSpec) -> list[str]:
    if spec.key_tokens is not None and len(spec.key_tokens) != len(spec.tokens):
        return [f"key_tokens: has {len(spec.key_tokens)} axes, tokens have {len(spec.tokens)}"]
    return [f"mask: {p}" for p in spec.mask.problems(spec.grid)]


def _load_problems(spec: AttentionSpec) -> list[str]:
    width = spec.head_dims[0]
    found = [f"loads.{i}.{p}" for i, each in enumerate(spec.loads) for p in each.problems(spec.grid, width)]
    kinds = [each.kind for each in spec.loads]
    return [*found, *(f"loads.{i}: one {kind} is enough" for i, kind in enumerate(kinds) if kind in kinds[:i])]


def _score_problems(spec: AttentionSpec) -> list[str]:
    found, names = [], set()
    for i, score in enumerate(spec.scores):
        if isinstance(score, Scale) and i:
            found.append(f"scores.{i}: scale must stand first and once")
        found += [f"scores.{i}.{p}" for p in score.problems(spec.grid)]
        name = "alibi_slopes" if isinstance(score, Alibi) else getattr(score, "table", None)
        if name is not None and name in names:
            found.append(f"scores.{i}: two scores read the table {name!r}")
        names.add(name)
    if spec.factor is not None:
        found += [f"factor.{p}" for p in factor_problems(spec.factor, spec.grid, spec.heads)]
        if (name := getattr(spec.factor, "table", None)) in names and name is not None:
            found.append(f"factor: a score reads the table {name!r} already")
    return found


def _depth_problems(spec: AttentionSpec) -> list[str]:
    formulas = {"mask": spec.predicate} | {f"scores.{i}": s.apply(SCORE, spec.grid, spec.heads) for i, s in enumerate(spec.scores)}
    if spec.weight_factor is not None:
        formulas["factor"] = spec.weight_factor
    deep = [field for field, formula in formulas.items() if depth(formula) > DEEPEST]
    return [f"{field}: nested too deeply, its formula has more than {DEEPEST} operations inside one another" for field in deep]


def _table_problems(spec: AttentionSpec) -> list[str]:
    """Names of run-time inputs: no word of the language or of a call, and one tensor each."""
    formulas = [score.apply(SCORE, spec.grid, spec.heads) for score in spec.scores]
    statistic = spec.normalizer.record(spec.grid).statistic
    kept = None if statistic is None else statistic.name
    found, known = [], _normalizer_tables(spec) | {read.value.name: read.value for read in spec.scale_reads.values()}
    routed = [] if spec.routing is None else [spec.routing.rows(spec.grid), spec.routing.weigh(spec.grid)]
    scored = ((f"scores.{i}", f) for i, f in enumerate(formulas))
    others = [*(("routing", f) for f in routed), *([] if spec.weight_factor is None else [("factor", spec.weight_factor)])]
    read = [(field, tables(formula)) for field, formula in [("mask", spec.predicate), *scored, *others]]
    for field, found_tables in [*read, *((f"loads.{i}", each.read(spec.grid, spec.head_dims[0])) for i, each in enumerate(spec.loads))]:
        for table in found_tables:
            if table.name in RESERVED or keyword.iskeyword(table.name) or table.name == kept:
                found.append(f"{field}: no run-time input may be called {table.name!r}")
            if known.setdefault(table.name, table) != table:
                found.append(f"{field}: {table.name!r} is read as two different tables")
    return found


def _normalizer_tables(spec: AttentionSpec) -> dict[str, Table]:
    record = spec.record
    kept = record.statistic
    values = (record.shift, record.sink, None if kept is None else kept.shift)
    read = tables(*(value for value in values if value is not None))
    return {table.name: table for table in read} | (spec.sink_tables if record.sink_key else {})


def _output_problems(spec: AttentionSpec) -> list[str]:
    if len(set(spec.token_scales)) != len(spec.token_scales):
        return ["token_scales: names an operand twice"]
    if "output" not in spec.outputs or len(set(spec.outputs)) != len(spec.outputs):
        return ["outputs: must hold output, and nothing twice"]
    if "lse" in spec.outputs and not spec.normalizer.record(spec.grid).has_lse:
        return [f"outputs: a {spec.normalizer.kind} row has no log-sum-exp; ask for softmax or drop lse"]
    return []
