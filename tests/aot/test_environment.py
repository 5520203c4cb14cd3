"""The installed Triton compiles for GPUs that are not here."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@triton.jit
def scale(x_ptr, n, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(x_ptr + at, 2.0 * tl.load(x_ptr + at, at < n), at < n)


@pytest.mark.parametrize(
    ("target", "product"),
    [
        (GPUTarget("cuda", 80, 32), "cubin"),
        (GPUTarget("cuda", 90, 32), "cubin"),
        (GPUTarget("hip", "gfx942", 64), "hsaco"),
    ],
)
def test_compiles_to_machine_code(target: GPUTarget, product: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(scale, {"x_ptr": "*fp32", "n": "i32", "WIDTH": "constexpr"}, {(2,): 128})
    assert triton.compile(source, target=target).asm[product]
