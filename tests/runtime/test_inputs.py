"""A call that does not fit its spec gets one error that names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attncc
from attncc import AttentionSpec, gates, masks, scores
from attncc.errors import InputError


@pytest.fixture(scope="module")
def kernel() -> attncc.Kernel:
    spec = AttentionSpec(
        tokens=(4, 6),
        heads=4,
        key_heads=2,
        head_dim=8,
        value_dim=5,
        dtype="float32",
        mask=masks.Segments(),
        scores=(scores.RelativeBias(extent=(2, 3)),),
        gate=gates.Output(granularity="headwise"),
    )
    return attncc.compile(spec, "cpu")


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that fits, then changed; None leaves an argument out."""
    fitting: dict[str, Any] = {
        "q": torch.randn(3, 4, 24, 8),
        "k": torch.randn(3, 2, 24, 8),
        "v": torch.randn(3, 2, 24, 5),
        "gate": torch.randn(3, 4, 24, 1),
        "segments": torch.zeros(3, 24, dtype=torch.int32),
        "relative_bias": torch.randn(4, 3, 5),
    }
    return {name: value for name, value in (fitting | changes).items() if value is not None}


def test_the_call_that_is_then_changed_fits(kernel: attncc.Kernel) -> None:
    assert kernel(**arguments()).shape == (3, 4, 24, 5)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tensor": ({"k": np.zeros((3, 2, 24, 8))}, r"^k: must be a tensor, not ndarray"),
    "rank": ({"q": torch.randn(4, 24, 8)}, r"^q: has 3 axes, must be \[B, 4, NQ, 8\]"),
    "heads": ({"q": torch.randn(3, 2, 24, 8)}, r"^q: has shape \[3, 2, 24, 8\], must be \[B=3, 4, NQ=24, 8\]"),
    "key heads": ({"k": torch.randn(3, 4, 24, 8)}, r"^k: has shape \[3, 4, 24, 8\], must be \[B=3, 2, NK=24, 8\]"),
    "width": ({"v": torch.randn(3, 2, 24, 8)}, r"^v: has shape .* must be \[B=3, 2, NK=24, 5\]"),
    "batch": ({"v": torch.randn(1, 2, 24, 5)}, r"^v: has shape \[1, 2, 24, 5\], must be \[B=3,"),
    "tokens": ({"q": torch.randn(3, 4, 23, 8)}, r"^q: has 23 tokens, the grid 4 x 6 has another number"),
    "key tokens": ({"k": torch.randn(3, 2, 23, 8)}, r"^k: has 23 tokens, q has 24: .* no key_tokens"),
    "value tokens": ({"v": torch.randn(3, 2, 23, 5)}, r"^v: has shape .*, must be \[B=3, 2, NK=24, 5\]"),
    "layout": ({"layout": "sbhd"}, r"^layout: 'sbhd' is unknown; use bhsd .* or bshd"),
    "wrong layout": ({"layout": "bshd"}, r"^k: has 2 tokens, q has 4|^q: has 4 tokens, the grid 4 x 6"),
    "dtype": ({"k": torch.randn(3, 2, 24, 8, dtype=torch.float16)}, r"^k: has dtype float16, must be float32"),
    "gate dtype": ({"gate": torch.randn(3, 4, 24, 1, dtype=torch.bfloat16)}, r"^gate: has dtype bfloat16, must be float32"),
    "table dtype": ({"segments": torch.zeros(3, 24, dtype=torch.int64)}, r"^segments: has dtype int64, must be int32"),
    "bias dtype": ({"relative_bias": torch.randn(4, 3, 5).double()}, r"^relative_bias: has dtype float64, must be float32"),
    "device": ({"v": torch.randn(3, 2, 24, 5, device="meta")}, r"^v: is on meta, q is on cpu"),
    "missing gate": ({"gate": None}, r"^gate: is missing; it is \[B, 4, NQ, 1\] of float32"),
    "missing table": ({"segments": None}, r"^segments: is missing; it is \[B, NQ\] of int32"),
    "unknown input": ({"gates": torch.zeros(1)}, r"^gates: is no input of this spec; it takes q, k, v, gate, "),
    "gate shape": ({"gate": torch.randn(3, 4, 24, 5)}, r"^gate: has shape \[3, 4, 24, 5\], must be \[B=3, 4, NQ=24, 1\]"),
    "table shape": ({"segments": torch.zeros(1, 24, dtype=torch.int32)}, r"^segments: has shape \[1, 24\], must be \[B=3, NQ=24\]"),
    "bias shape": ({"relative_bias": torch.randn(4, 5, 3)}, r"^relative_bias: has shape \[4, 5, 3\], must be \[4, 3, 5\]"),
    "stride": ({"k": torch.randn(3, 2, 8, 24).transpose(2, 3)}, r"^k: its last axis has stride 24, must have 1; call .contiguous\(\)"),
    "broadcast rows": ({"q": torch.randn(3, 4, 24, 1).expand(3, 4, 24, 8)}, r"^q: its last axis has stride 0"),
    "sparse": ({"q": torch.randn(3, 4, 24, 8).to_sparse()}, r"^q: must be a plain strided tensor"),
    "grid": ({"tokens": (6, 4)}, r"^tokens: 6 x 4 contradicts the spec's grid 4 x 6"),
    "grid rank": ({"tokens": 24}, r"^tokens: 24 has 1 axes, the spec's grid 4 x 6 has 2"),
    "key grid": ({"key_tokens": (4, 6)}, r"^key_tokens: this spec has no key_tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name: str, kernel: attncc.Kernel) -> None:
    changes, text = BAD[name]
    with pytest.raises(InputError, match=text) as caught:
        kernel(**arguments(**changes))
    assert "\n" not in str(caught.value) and caught.value.argument == str(caught.value).partition(":")[0]


OPEN = AttentionSpec(tokens=(None, None), key_tokens=(None, 5), heads=1, head_dim=8, dtype="float32", mask=masks.Full())


@pytest.mark.parametrize(
    ("grids", "text"),
    [
        ({}, r"^tokens: is needed: 2 axes of the spec's grid \? x \? are open, so pass tokens=\(\.\.\)"),
        ({"tokens": (3, 5)}, r"^q: has 12 tokens, the grid 3 x 5 has another number"),
        ({"tokens": (3, 4), "key_tokens": (2, 4)}, r"^key_tokens: 2 x 4 contradicts the spec's grid \? x 5"),
        ({"tokens": (-3, -4)}, r"^tokens: -3 x -4 contradicts"),
    ],
)
def test_open_grids(grids: dict[str, Any], text: str) -> None:
    q, k = torch.randn(1, 1, 12, 8), torch.randn(1, 1, 10, 8)
    with pytest.raises(InputError, match=text):
        attncc.compile(OPEN, "cpu")(q, k, k, **grids)


def test_the_one_open_axis_follows_from_the_tensors() -> None:
    q, k = torch.randn(1, 1, 12, 8), torch.randn(1, 1, 10, 8)
    kernel = attncc.compile(OPEN, "cpu")
    assert torch.equal(kernel(q, k, k, tokens=(3, 4)), kernel(q, k, k, tokens=[3, 4], key_tokens=[2, 5]))
    with pytest.raises(InputError, match=r"^k: has 11 tokens, the grid \? x 5 has another number"):
        kernel(q, torch.randn(1, 1, 11, 8), k, tokens=(3, 4))


def test_a_neighborhood_larger_than_its_axis() -> None:
    mask = masks.Neighborhood(window=5) | masks.Causal()
    kernel = attncc.compile(AttentionSpec(tokens=(None,), heads=1, head_dim=8, dtype="float32", mask=mask), "cpu")
    kernel(*[torch.randn(1, 1, 5, 8)] * 3)
    with pytest.raises(InputError, match=r"^tokens: \[4\] do not fit the spec's mask: window 5 .* exceeds the 4 tokens of axis 0"):
        kernel(*[torch.randn(1, 1, 4, 8)] * 3)


def test_a_window_longer_than_the_sequence_holds_all_of_it() -> None:
    mask = masks.SlidingWindow(left=512, right=512)
    kernel = attncc.compile(AttentionSpec(tokens=(None,), heads=1, head_dim=8, dtype="float32", mask=mask), "cpu")
    q = torch.randn(1, 1, 7, 8)
    torch.testing.assert_close(kernel(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_no_tokens() -> None:
    spec = AttentionSpec(tokens=(None,), heads=1, head_dim=8, dtype="float32")
    with pytest.raises(InputError, match=r"^q: has 0 tokens"):
        attncc.compile(spec, "cpu")(*[torch.randn(1, 1, 0, 8)] * 3)


def test_a_kernel_for_a_gpu_refuses_cpu_tensors() -> None:
    spec = AttentionSpec(tokens=(None,), heads=1, head_dim=16, dtype="float32")
    with pytest.raises(InputError, match=r"^q: is on cpu, and the kernel is for sm_90: .*target='cpu'.*TRITON_INTERPRET=1"):
        attncc.compile(spec, "sm_90")(*[torch.randn(1, 1, 4, 16)] * 3)


@pytest.mark.parametrize("name", ["q", "b", "h", "k0", "gate", "out", "tokens", "lists", "for", "nk"])
def test_table_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"mask: no run-time input may be called '{name}'"):
        AttentionSpec(tokens=(64,), heads=2, head_dim=16, mask=masks.Segments(ids=name))


@pytest.mark.parametrize("name", ["row", "tl", "acc0", "range", "forward", "math"])
def test_table_names_of_the_generated_code_are_refused(name: str) -> None:
    spec = AttentionSpec(tokens=(64,), heads=2, head_dim=16, mask=masks.Segments(ids=name))
    with pytest.raises(attncc.errors.UnsupportedError, match=f"a table called '{name}'.*{name}_table"):
        attncc.compile(spec, "sm_90")


def test_one_name_for_two_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="mask: 'x' is read as two different tables"):
        AttentionSpec(tokens=(64,), heads=2, head_dim=16, mask=masks.Segments(ids="x") & masks.Predicate(text="x[q] < 5"))
