"""Packed sequences: one attention over the packing is one attention for each document, forward and backward, whatever their lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc import AttentionSpec, masks
from attncc.errors import InputError

HEADS, WIDTH = 2, 8
INSIDE: dict[str, Any] = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "last": masks.Causal(align="bottom_right"),
    "window": masks.SlidingWindow(left=5, right=2),
    "cells": masks.Partition(size=4, shift=1),
    "halo": masks.Halo(block=4, halo=2),
    "dilated": masks.Congruence(step=3),
    "heads": masks.PerHead(masks=(masks.Causal(), masks.Window(left=2, right=2))),
    "sinks": masks.Sinks(count=2) | masks.SlidingWindow(left=3, right=0),
    "blocks": masks.StridedBlocks(block=3, local=1, stride=2),
}
PACKINGS = {
    "even": [0, 20, 40, 60],
    "empty documents": [0, 0, 17, 17, 17, 60, 60],
    "documents of one token": [0, 1, 2, 30, 31, 60],
    "padding": [0, 13, 40],
    "padding alone": [0, 0],
    "one document": [0, 60],
}
TOKENS = 60


def spec_of(mask: Any, **fields: Any) -> AttentionSpec:
    sizes = {"tokens": (None,), "heads": HEADS, "head_dim": WIDTH, "dtype": "float64", "outputs": ("output", "lse")}
    return AttentionSpec(**{**sizes, "mask": mask, **fields})


def random(tokens: int, batch: int, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, tokens, WIDTH, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count)]


def each(spec: AttentionSpec, bounds: list[int], key_bounds: list[int], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Document by document, by a kernel of the mask alone; queries outside documents give 0."""
    kernel = attncc.compile(spec, "cpu")
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    for (a, b), (c, d) in zip(pairwise(bounds), pairwise(key_bounds)):
        if a < b and c < d:
            rows, total = kernel(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d])
            out, lse = out.index_copy(2, torch.arange(a, b), rows), lse.index_copy(2, torch.arange(a, b), total)
    return out, lse


def agree(packed: tuple[Tensor, Tensor], apart: tuple[Tensor, Tensor], leaves: list[Tensor]) -> None:
    for got, want in zip(packed, apart):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    mix = torch.randn(packed[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad(
            (out * mix).sum() + lse[lse > -torch.inf].square().sum() + sum(0.0 * x.sum() for x in leaves), leaves, materialize_grads=True
        )
        for out, lse in (packed, apart)
    )
    for got, want in zip(ours, theirs):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("inside", INSIDE)
def test_a_packing_is_its_documents(inside: str, packing: str) -> None:
    bounds = PACKINGS[packing]
    q, k, v = random(TOKENS, 1, 3, 0)
    tables: Any = attncc.document_tables(torch.tensor(bounds), TOKENS)
    packed = attncc.compile(spec_of(masks.Documents(mask=INSIDE[inside])), "cpu")(q, k, v, **tables)
    agree(packed, each(spec_of(INSIDE[inside]), bounds, bounds, q, k, v), [q, k, v])


def test_a_neighborhood_moves_inward_in_each_document() -> None:
    bounds = [0, 9, 9, 24, 60]
    q, k, v = random(TOKENS, 1, 3, 0)
    near = masks.Neighborhood(window=4, stride=2, dilation=2)
    tables: Any = attncc.document_tables(torch.tensor(bounds), TOKENS)
    packed = attncc.compile(spec_of(masks.Documents(mask=near)), "cpu")(q, k, v, **tables)
    agree(packed, each(spec_of(near), bounds, bounds, q, k, v), [q, k, v])


def test_a_packing_for_each_batch_element() -> None:
    bounds = torch.tensor([[0, 5, 31, 60], [0, 0, 44, 50]], dtype=torch.int32)
    q, k, v = random(TOKENS, 2, 3, 0)
    kernel = attncc.compile(spec_of(masks.Documents(mask=masks.Causal())), "cpu")
    tables: Any = attncc.document_tables(bounds, TOKENS)
    out, lse = kernel(q, k, v, **tables)
    each_one = [
        each(spec_of(masks.Causal()), bounds[b].tolist(), bounds[b].tolist(), q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in range(2)
    ]
    agree((out, lse), (torch.cat([x for x, _ in each_one]), torch.cat([x for _, x in each_one])), [q, k, v])


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_queries_and_keys_packed_apart(align: Any) -> None:
    """A document has as many queries as it has, and as many keys; some have none of either."""
    bounds, key_bounds = [0, 7, 7, 30, 34], [0, 20, 25, 25, 60]
    (q,), (k, v) = random(40, 1, 1, 0), random(TOKENS, 1, 2, 1)
    inside = masks.Causal(align=align)
    mask = masks.Documents(mask=inside, key_starts="key_document_starts", key_ends="key_document_ends")
    spec = spec_of(mask, key_tokens=(None,))
    tables: Any = attncc.document_tables(torch.tensor(bounds), 40, torch.tensor(key_bounds))
    packed = attncc.compile(spec, "cpu")(q, k, v, **tables)
    agree(packed, each(spec_of(inside, key_tokens=(None,)), bounds, key_bounds, q, k, v), [q, k, v])


def test_documents_and_what_stands_beside_them() -> None:
    """Tables by tokens are joined outside: labels of the whole sequence."""
    bounds, labels = [0, 25, 60], (torch.arange(TOKENS) % 3 == 0).int()[None]
    q, k, v = random(TOKENS, 1, 3, 0)
    mask = masks.Documents(mask=masks.Causal()) & masks.Segments()
    tables: Any = attncc.document_tables(torch.tensor(bounds), TOKENS)
    out, _ = attncc.compile(spec_of(mask), "cpu")(q, k, v, segments=labels, **tables)
    at = torch.arange(TOKENS)
    same = (at[:, None] < 25) == (at < 25)
    allowed = same & (at <= at[:, None]) & (labels[0][:, None] == labels[0])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_tables_of_a_packing() -> None:
    tables: Any = attncc.document_tables(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 7)
    assert tables["document_starts"].tolist() == [[0, 0, 2, 2, 2, 7, 7]]
    assert tables["document_ends"].tolist() == [[2, 2, 5, 5, 5, 0, 0]]
    both = attncc.document_tables(torch.tensor([[0, 1, 3]]), 3, torch.tensor([[0, 4, 6]]))
    assert both["key_document_starts"].tolist() == [[0, 4, 4]]
    assert both["key_document_ends"].tolist() == [[4, 6, 6]]
    assert {x.dtype for x in both.values()} == {torch.int32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 4), r"cu_seqlens: has shape \[3\] of torch.float32, must be integers"),
        ((torch.zeros(1, dtype=torch.int32), 4), r"cu_seqlens: has shape \[1\]"),
        ((torch.zeros(2, 2, 2, dtype=torch.int32), 4), r"cu_seqlens: has shape \[2, 2, 2\]"),
        ((torch.tensor([0, 4]), 4, torch.tensor([0, 4, 5])), r"key_cu_seqlens: has shape \[1, 3\], cu_seqlens has \[1, 2\]: as many"),
    ],
)
def test_what_is_no_packing(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attncc.document_tables(*arguments)


def test_tables_of_documents_are_inputs() -> None:
    """And what a plain mask need not read may be given all the same."""
    spec = spec_of(masks.Documents(mask=masks.Full(), key_starts="key_document_starts", key_ends="key_document_ends"), key_tokens=(None,))
    kernel = attncc.compile(spec, "cpu")
    assert set(kernel._signature.names) == {"key_document_starts", "key_document_ends"}
    tables: Any = attncc.document_tables(torch.tensor([0, 3]), 4, torch.tensor([0, 5]))
    x, y = torch.randn(1, HEADS, 4, WIDTH).double(), torch.randn(1, HEADS, 6, WIDTH).double()
    assert kernel(x, y, y, **tables)[1].isfinite().sum() == 3 * HEADS
    with pytest.raises(InputError, match="other: is no input"):
        kernel(x, y, y, **tables, other=x)


def test_what_tables_hold_may_lie_anywhere() -> None:
    """Numbers near the ends of 32 bits are ranges like any other: to before the first key, to behind the last."""
    least, most = -(2**31), 2**31 - 1
    tables: Any = {
        "document_starts": torch.tensor([[least, 0, most, 3, 2]]).int(),
        "document_ends": torch.tensor([[most, least, most, 3, 4]]).int(),
    }
    x = random(5, 1, 3, 0)
    _, lse = attncc.compile(spec_of(masks.Documents(mask=masks.Full())), "cpu")(*x, **tables)
    assert (lse[0, 0] > -torch.inf).tolist() == [True, False, False, False, True]
