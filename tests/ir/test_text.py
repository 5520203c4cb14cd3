"""Text and JSON of expressions read back as the same node; text outside the grammar is refused, and nothing is ever executed."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.codegen.module import emit
from attncc.errors import PredicateError
from attncc.ir.expr import Expr, Kind, Op, Table, apply, const, load, var
from attncc.ir.expr_json import from_json, to_json
from attncc.ir.graph_text import VARIABLES
from attncc.ir.intervals import interval
from attncc.ir.text import INTEGER_CALLS, parse, table_loads, to_text
from attncc.pipeline import plan
from attncc.spec.attention import AttentionSpec
from attncc.spec.masks import Predicate
from attncc.spec.model import Grid
from tests.ir.raw import TABLES, booleans, built, integers
from tests.ir.test_derivatives import floats
from tests.strategies import predicates

EXPRESSIONS = (integers() | booleans()).map(built) | floats()


@settings(max_examples=200)
@given(EXPRESSIONS)
def test_text_reads_back(root: Expr) -> None:
    assert parse(to_text(root), VARIABLES, table_loads(TABLES)) is root


@given(EXPRESSIONS)
def test_json_reads_back(root: Expr) -> None:
    assert from_json(json.loads(json.dumps(to_json(root)))) is root


@given(EXPRESSIONS)
def test_pickles_read_back(root: Expr) -> None:
    assert pickle.loads(pickle.dumps(root)) is root


def test_range_reductions_read_back_from_json() -> None:
    table = Table("t", Kind.INT, ("B", "NQ"))
    for end in interval(load(table, var("b"), var("q0")), {"q0": (const(0), const(5))}):
        assert from_json(json.loads(json.dumps(to_json(end)))) is end


def test_constants_read_back() -> None:
    for number in (0, -1, 2**31 - 1, 0.1, -0.0, 1e300, 5e-324, float("inf"), float("-inf"), True, False):
        root = const(number)
        assert parse(to_text(root), {}) is root
        assert from_json(json.loads(json.dumps(to_json(root)))) is root


def test_constant_tables_keep_their_values() -> None:
    root = load(Table("slopes", Kind.FLOAT, (2,), (0.5, 0.25)), var("h"))
    assert from_json(json.loads(json.dumps(to_json(root)))) is root


@pytest.mark.parametrize("data", [None, {}, [], ["nonsense", 1], ["add", 1], [["add"]], {"op": "add"}])
def test_malformed_json_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        from_json(data)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("q0 - (k0 - h)", "q0 - (k0 - h)"),
        ("(q0 - k0) - h", "q0 - k0 - h"),
        ("q0 // (k0 * 2) % 3", "q0 // (k0 * 2) % 3"),
        ("-(q0 * k0)", "-(q0 * k0)"),
        ("not (q0 < k0 and h < 1)", "not (q0 < k0 and h < 1)"),
        ("1 < q0 <= k0 < 9", "1 < q0 and q0 <= k0 and k0 < 9"),
        ("q0 > k0", "k0 < q0"),
        ("min(q0, k0, h)", "min(min(q0, k0), h)"),
        ("q0 - -3", "q0 + 3"),
        ("not q0 == k0", "q0 != k0"),
    ],
)
def test_print(text: str, printed: str) -> None:
    assert to_text(parse(text, VARIABLES)) == printed


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

INJECTIONS = [
    "__import__('os').system('touch pwned')",
    "q.__class__",
    "().__class__.__base__.__subclasses__()",
    "(lambda: q)()",
    "[x for x in (1, 2)]",
    "{q: k}",
    "{q, k}",
    "f'{q}'",
    "'q' < 'k'",
    "b'q' == b'k'",
    "q if k else h",
    "(q := k)",
    "exec('1')",
    "eval('1')",
    "open('file')",
    "print(q)",
    "min(*t[q])",
    "min(q, key=k)",
    "abs(q, k)",
    "min(q)",
    "max()",
    "t[q:k]",
    "t[q][k]",
    "t[q + 1] == 0",
    "t[q0, t[q]] == 0",
    "t[q, q] == 0",
    "__builtins__[q] == 0",
    "Tab[q] == 0",
    "\u00e9[q] == 0",
    "t['a'] == 0",
    "t[...] == 0",
    "q[0] == 1",
    "min[q] == 1 if q else k",
    "q.real",
    "q ** k < 3",
    "q << 2 == k",
    "q & k",
    "~q < 3",
    "+q < 3",
    "q @ k",
    "q is k",
    "q in k",
    "q; k",
    "q = k",
    "import os",
    "q\nk",
    "...",
    "None",
    "1j == q",
    "q < 1.5",
    "q / k < h",
    "q < 1e3",
    "exp(q) < k",
    "float(q) < k",
    "q % 0 == k",
    "q // (k - k) == 1",
    "q < 2147483648",
    "q < 99999999999999999999",
    "q < k <",
    "((q < k)",
    "",
    " ",
    "#",
    "q",
    "q + k",
    "s < 1",
    "r0 == 0",
    "q9 < k",
    "and",
    "q < k\x00",
    "q < \ud800",
    "nan < q",
    "inf == q",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_predicates_outside_the_grammar_are_refused(text: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Predicate(text=text)
    assert str(refused.value)
    assert not list(tmp_path.iterdir())


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text(alphabet="qkbhn01 +-*/%<>=!()[],.'\"\\andort_~&|^@:;{}\n", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """An expression or the one kind of error, never another exception."""
    with contextlib.suppress(PredicateError):
        assert parse(text, VARIABLES, table_loads(TABLES), INTEGER_CALLS) is not None


@given(st.sampled_from([1, 2, 3]).flatmap(lambda rank: predicates(rank, True)))
def test_the_grammar_is_read(mask: Any) -> None:
    assert Predicate.model_validate(mask).text == mask["text"]


DEEP = [
    "(" * 150 + "q" + ")" * 150 + " < k",
    "-" * 900 + "q < k",
    "not " * 400 + "q < k",
    "abs(" * 190 + "q" + ")" * 190 + " < k",
    " + ".join(["q"] * 480) + " < k",
    " and ".join(["q < k"] * 200),
    " and ".join(f"q != {i}" for i in range(150)),
    " and ".join(f"q != {i}" for i in range(147)),
    "abs(" * 145 + "q" + ")" * 145 + " < k",
    " < ".join(["q"] * 480),
    "min(" + ", ".join(["q"] * 600) + ") < k",
    "t[" + ", ".join(["q"] * 600) + "] < k",
    "q // (" * 180 + "2" + ")" * 180 + " < k",
    "q < k" + " " * 3000,
    "9" * 1999,
]


@pytest.mark.parametrize("text", DEEP, ids=map(str, range(len(DEEP))))
def test_long_and_deep_text_is_quickly_read_or_refused(text: str) -> None:
    """What is read is used: no limit of Python's is met later, in another part of the compiler."""
    start = time.perf_counter()
    with contextlib.suppress(ValueError):
        spec = AttentionSpec(tokens=(40, 50, 60), heads=1, head_dim=16, mask=Predicate(text=text))
        made = plan(spec, "sm_80", (1, 1, 16), (1, 1, 16))
        assert ast.parse(emit(made, spec.to_json(None))).body
    assert time.perf_counter() - start < 20


def test_the_column_is_named() -> None:
    with pytest.raises(PredicateError, match="column 7"):
        parse("q0 + (foo)", {"q0": var("q0")})


def test_unknown_names_show_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown name 'kk' \(known: .*k0"):
        Predicate(text="kk < q")


def test_two_ranks_of_names() -> None:
    """q2 has a meaning on a grid of rank 3 only."""
    assert Predicate(text="q2 < k2").problems(Grid((8,), (8,))) != []
    assert Predicate(text="q2 < k2").problems(Grid((2, 2, 2), (2, 2, 2))) == []


def test_floats_round_trip_through_ops() -> None:
    root = apply(Op.POW, var("s", Kind.FLOAT), 1.5)
    assert parse(to_text(root), VARIABLES) is root
