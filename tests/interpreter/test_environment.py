"""The installed Triton's interpreter works with the installed numpy: 3.6.0's does not with numpy 2.4."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def row_maximum(x_ptr, out_ptr, n, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    best = tl.full((), float("-inf"), tl.float32)
    for start in range(0, n, WIDTH):
        at = start + columns
        best = tl.maximum(best, tl.max(tl.load(x_ptr + row * n + at, at < n, float("-inf")), 0))
    tl.store(out_ptr + row, best)


def test_interpreter_runs_a_loop_of_masked_loads() -> None:
    x = torch.randn(3, 37)
    out = torch.full((3,), float("nan"))
    row_maximum[(3,)](x, out, 37, WIDTH=16)
    torch.testing.assert_close(out, x.amax(1), rtol=0, atol=0)
