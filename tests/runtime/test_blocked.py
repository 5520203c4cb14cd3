"""The blocked engine: numbers that are none, nothing to attend to, threads, devices that the host must not wait for."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attncc
from attncc import AttentionSpec, masks, normalizers, scores
from attncc.ir.expr import Expr, Kind, Op, Table, apply, clamp, load, var
from attncc.passes.block_mask import BlockMask, block_mask
from attncc.runtime.blocked import attention, listed, run_backward, run_forward
from attncc.runtime.blocked.bands import AxisBand, BandPlan, plan_bands
from attncc.runtime.blocked.formulas import _steady
from attncc.runtime.blocked.problem import problem
from attncc.runtime.blocked.rules import Rules
from attncc.runtime.blocked.strips import head_chunks
from attncc.runtime.blocked.workers import run_tasks
from attncc.runtime.operands import Operands
from attncc.runtime.program import make_programs
from tests.oracle import concrete
from tests.runtime.cases import CASES, Case, gradients

WINDOW = masks.SlidingWindow(left=40, right=7)
LISTED = masks.Predicate(text="k <= q and (q - k < 40 or k % 16 == 0)")


def kernel(mask: masks.Mask, tokens: int = 300, **fields: Any) -> attncc.Kernel:
    return attncc.compile(AttentionSpec(tokens=(tokens,), heads=2, head_dim=8, dtype="float32", mask=mask, **fields), "cpu")


def tensors(tokens: int = 300, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, tokens, 8, generator=generator) for _ in range(3)]


# ---- NaN and infinity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [WINDOW, LISTED], ids=["bands", "tiles"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("maps", [(), (scores.Softcap(cap=5.0),), (scores.Alibi(),)], ids=["plain", "softcap", "alibi"])
def test_what_is_no_number_stays_in_the_rows_that_see_it(mask: masks.Mask, value: float, maps: tuple[Any, ...]) -> None:
    run = kernel(mask, scores=maps)
    q, k, v = tensors()
    clean = run(q, k, v)
    q[0, 1, 123, 3] = value
    k[0, 0, 77] = value
    out = run(q, k, v)
    q_at, k_at = torch.arange(300)[:, None], torch.arange(300)
    near = (k_at <= q_at) & ((q_at - k_at < 40) | (k_at % 16 == 0)) if mask is LISTED else (k_at - q_at <= 7) & (q_at - k_at <= 40)
    sees = near[:, 77]
    if not maps:
        assert torch.equal(out[0, 1].isfinite().all(1), torch.arange(300) != 123)
    torch.testing.assert_close(out[0, 0][~sees], clean[0, 0][~sees])
    if math.isnan(value):
        assert out[0, 0][sees].isnan().all()
        assert out[0, 1, 123].isnan().all()


def test_a_bias_of_minus_infinity_hides_a_key() -> None:
    run = kernel(masks.Full(), 40, scores=(scores.RelativeBias(extent=(40,)),))
    q, k, v = tensors(40)
    table = torch.zeros(2, 79)
    table[:, 40:] = -math.inf
    torch.testing.assert_close(run(q, k, v, relative_bias=table), kernel(masks.Causal(), 40)(q, k, v))


def test_scores_beyond_the_bound_take_the_running_maximum() -> None:
    q, k, v = tensors()
    want = torch.nn.functional.scaled_dot_product_attention(q.double() * 100, k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(kernel(masks.Causal())(q * 100, k, v).double(), want, rtol=0, atol=1e-4)


Q, K = var("q0"), var("k0")


@pytest.mark.parametrize(
    ("value", "steady"),
    [
        (apply(Op.ABS, Q + 3 - K), True),
        (clamp(K - Q + 4, 0, 8) * var("h"), True),
        (load(Table("t", Kind.FLOAT, ("H", 9)), var("h"), K - Q), True),
        (var("q1") + var("k1"), True),
        (Q + K, False),
        (Q * 2 - K * 2, False),  # so it is, but nobody proves it
        (K % 4, False),
        (load(Table("t", Kind.FLOAT, ("NQ",)), Q), False),
    ],
)
def test_what_only_depends_on_the_distance_along_axis_0(value: Expr, steady: bool) -> None:
    assert _steady(value) == steady


# ---- nothing to attend to ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [WINDOW, LISTED, masks.Segments()], ids=["bands", "tiles", "labels"])
@pytest.mark.parametrize("normalizer", [normalizers.Softmax(), normalizers.ReLU()])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty_tensors(mask: masks.Mask, normalizer: Any, batch: int, queries: int, keys: int) -> None:
    run = kernel(mask, normalizer=normalizer)
    q, k, v = (torch.randn(batch, 2, n, 8) for n in (queries, keys, keys))
    tables = {"segments": torch.zeros(batch, 5, dtype=torch.int32)}
    operands = Operands(q, k, v, tables, (queries,), (keys,))
    empty = problem(run.plan.kernels[0], operands)
    out, lse = attention.forward(empty, q, k, v)
    assert out.shape == q.shape and not out.any()
    assert (lse is None) == (normalizer.kind == "relu")
    assert lse is None or bool((lse == -math.inf).all())
    found = attention.backward(empty, q, k, v, out, lse, torch.ones_like(out))
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(found[:3], (q, k, v)))


# ---- threads -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["window", "value heads", "segments", "predicate", "trained slopes", "bias", "sigmoid", "dilated"])
def test_threads_change_nothing(name: str, threads: None) -> None:
    case = Case(name, torch.float64)
    leaves, want = case.leaves, case.oracle()
    runs = [case.run() for _ in range(3)]
    found = [gradients(run, leaves) for run in runs]
    theirs = gradients(want, leaves)
    for run, grads in zip(runs, found):
        torch.testing.assert_close(run["output"], want["output"], rtol=0, atol=1e-12)
        for leaf in leaves:
            torch.testing.assert_close(grads[leaf], theirs[leaf], rtol=0, atol=1e-9)
            assert torch.equal(grads[leaf], found[0][leaf])


def test_workers_start_no_threads_of_their_own(threads: None) -> None:
    torch.set_num_threads(3)
    together, seen = threading.Barrier(3), []

    def task() -> None:
        together.wait(60)
        torch.ones(1 << 16).sum()
        seen.append(torch.get_num_threads())

    run_tasks([task] * 3, 3)
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 3


def test_tasks_that_share_a_key_or_a_value_head_take_turns() -> None:
    """With 6 query, 3 key and 2 value heads, head 2 shares a key head with 3 and a value head with 0."""
    run = attncc.compile(AttentionSpec(tokens=(8192,), heads=6, key_heads=3, value_heads=2, head_dim=8, mask=masks.Causal()), "cpu")
    q, k, v = (torch.empty(1, n, 8192, 8) for n in (6, 3, 2))
    found = problem(run.plan.kernels[0], Operands(q, k, v, {}, (8192,), (8192,)))
    tasks = found.tasks(8)
    assert len(tasks) > 1
    turns = attention._turns(found, tasks, False)
    assert [turn._previous for turn in turns] == [None, *turns[:-1]]
    assert head_chunks(range(6), (6, 3, 2), 4) == [range(i, i + 1) for i in range(6)]


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Predicate(text="(q - k) * (q - k) < 90000 or k % 7 == 0")], ids=["bands", "lists"])
def test_the_most_work_comes_first(mask: masks.Mask) -> None:
    run = attncc.compile(AttentionSpec(tokens=(3000,), heads=2, head_dim=8, mask=mask), "cpu")
    q, k, v = (torch.empty(1, 2, 3000, 8) for _ in range(3))
    found = problem(run.plan.kernels[0], Operands(q, k, v, {}, (3000,), (3000,)))
    pairs = [task.pairs for task in found.tasks(4)]
    ((_, plan),) = found.plans
    visited = plan.pairs() if isinstance(plan, BandPlan) else sum(len(e.tiles) for e in (plan.full, plan.partial)) * math.prod(plan.size)
    assert len(pairs) > 2
    assert pairs == sorted(pairs, reverse=True)
    assert pairs[0] > pairs[-1]
    assert 0.97 * 2 * visited <= sum(pairs) <= 2 * visited  # the last tile may have fewer rows


def test_heads_computed_apart_keep_biases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added at one distance is kept for the blocks that follow, but of the same heads."""
    monkeypatch.setattr("attncc.runtime.blocked.strips.BLOCK_SCORES", 500)
    case = Case("alibi", torch.float64)
    found = problem(case.kernel().plan.kernels[0], Operands(case.q, case.k, case.v, {"alibi_slopes": torch.ones(3)}, (40,), (40,)))
    assert all(len(task.heads) == 1 for task in found.tasks(1))
    torch.testing.assert_close(case.run()["output"], case.oracle()["output"], rtol=0, atol=1e-12)


def test_rows_that_a_mask_of_rows_hides_count_no_key() -> None:
    """Its formula reads no key; a row that it hides is without every key, not without one."""
    case = Case("rows alone, over their keys", torch.float64)
    plan = case.kernel().plan.kernels[0]
    _, log = run_forward(plan, Operands(case.q, case.k, case.v, {}, (64,), (64,)))
    seen = torch.arange(64).square() % 5 != 1
    want = (seen.double() * 64).log().expand(case.q.shape[:3])
    torch.testing.assert_close(log, want, rtol=0, atol=1e-12)


def test_a_block_mask_is_made_once_for_what_tables_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tensors with the same labels share it; labels changed in place are other labels, and hurt no one who had them before."""
    made: list[Any] = []

    def counted(*given: Any) -> BlockMask:
        made.append(given)
        return block_mask(*given)

    monkeypatch.setattr(listed, "block_mask", counted)
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 2, 300, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    spec = AttentionSpec(tokens=(300,), heads=2, head_dim=8, dtype="float64", mask=masks.Segments())
    compiled, given = attncc.compile(spec, "cpu"), torch.randint(0, 7, (2, 300), generator=draw).int()

    def held(labels: torch.Tensor) -> bool:
        allowed = (labels[:, :, None] == labels[:, None])[:, None]
        want = (q @ k.mT / 8**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
        return torch.allclose(compiled(q, k, v, segments=labels), want, rtol=0, atol=1e-12)

    assert held(given) and held(given.clone()) and len(made) == 1
    before = given.clone()
    given += torch.arange(300).int() % 2
    assert held(given) and len(made) == 2
    assert held(before) and len(made) == 2


@pytest.mark.parametrize("bounded", [True, False])
def test_routed_rows_far_from_the_first_key(bounded: bool) -> None:
    """Their edges are numbers between keys, which float32 cannot tell apart at 30 million."""
    draw = torch.Generator().manual_seed(3)
    first = 30_000_000 + torch.randint(0, 9, (700,), generator=draw).cumsum(0)
    last = first + torch.randint(-1, 400, (700,), generator=draw)  # some see no key
    tokens = torch.randperm(700, generator=draw)[:333].sort().values
    plan = replace(plan_bands([AxisBand(1 << 25, torch.stack([first, last])).rows(tokens)], (128,)), tokens=tokens)
    rules = Rules(1.0, None, None, bounded=bounded, finite=True, like=torch.empty(0))
    for tile in plan.axes[0]:
        allowed = torch.ones(len(tile.q), len(tile.k), dtype=torch.bool)
        for part in plan.parts((tile,), rules):
            # What is left of a weight is 0, or as it was: scores of up to 60 are 87 in base 2.
            scores = torch.tensor([-87.0, 87.0])[:, None, None].expand(2, *part.ceiling.shape)
            left = torch.minimum(scores, part.ceiling).exp2()
            assert torch.equal(left, scores.exp2() * ~part.hidden)
            assert bounded or part.ceiling.isinf().all()
            allowed[:, part.start : part.stop] &= ~part.hidden
        mine, k = tokens[tile.q.start : tile.q.stop, None], torch.tensor(tile.k)
        assert torch.equal(allowed, (k >= first[mine]) & (k <= last[mine]))
    assert sum(len(tile.q) for tile in plan.axes[0]) == len(tokens)


# ---- types and modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["predicate", "bias", "sigmoid", "dilated", "two tables"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    leaves, got, want = case.leaves, case.run(), case.oracle()
    limit = 1e-3 if dtype is torch.float16 else 1e-2
    assert (got["output"].double() - want["output"]).norm() <= limit * want["output"].norm()
    ours, theirs = gradients(got, leaves), gradients(want, leaves)
    for leaf, x in leaves.items():
        assert ours[leaf].dtype == x.dtype
        assert (ours[leaf].double() - theirs[leaf].double()).norm() <= 2 * limit * theirs[leaf].double().norm() + 1e-30


@pytest.mark.parametrize("name", ["window", "predicate", "bias"])
def test_what_inference_mode_made_serves_training(name: str) -> None:
    case = Case(name, torch.float64)
    case.kernel()
    with torch.inference_mode():
        case.run()
    leaves, want = case.leaves, case.oracle()
    found, theirs = gradients(case.run(), leaves), gradients(want, leaves)
    for leaf in leaves:
        torch.testing.assert_close(found[leaf], theirs[leaf], rtol=0, atol=1e-9)


# ---- devices -----------------------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device, or copy to it: neither can be captured in a CUDA graph."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "lift_fresh")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        assert name not in self.WAITS and (name != "_to_copy" or (kwargs or {}).get("device") is None), name
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attention", "banded", "listed", "roots", "routed"):
        monkeypatch.setattr(f"attncc.runtime.blocked.{module}.host_reads", lambda device: False)


@pytest.mark.parametrize("name", CASES)
def test_on_a_device_the_host_never_waits(name: str, as_on_a_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name, torch.float64)
    leaves, got, want = case.leaves, case.run(), case.oracle()
    torch.testing.assert_close(got["output"], want["output"], rtol=0, atol=1e-12)
    ours, theirs = gradients(got, leaves), gradients(want, leaves)
    for leaf in leaves:
        torch.testing.assert_close(ours[leaf], theirs[leaf], rtol=0, atol=1e-9)
    kernel, shape, known = case.kernel(), concrete(case.json, case.lengths), dict(case.inputs)
    monkeypatch.setattr("attncc.runtime.blocked.rules.capturing", lambda device: True)
    for program in make_programs(kernel.spec, kernel.plan, False):
        tables = program.tables([known[name].detach() for name in program.signature.names], case.q.device)
        trained = frozenset(name for name in leaves if name in tables) | {"threshold", "row_log"} & set(tables)
        q, k, v = (x.detach() for x in (case.q, case.k, case.k[..., :0] if program.statistic else case.v))
        operands = Operands(q, k, v, tables, tuple(shape["tokens"]), tuple(shape["key_tokens"]), trained)
        with NoWaiting():
            rows, lse = run_forward(program.kernel, operands)
            run_backward(program.kernel, operands, rows, lse, torch.ones_like(rows), lse)
        known |= {} if program.statistic is None or lse is None else {program.statistic: lse}
