"""attncc compiles a declarative attention spec into Triton kernels and bounds their speedup before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attncc.version import VERSION as __version__

if TYPE_CHECKING:
    from attncc import errors, knobs
    from attncc.api import compile
    from attncc.passes.plan import Plan
    from attncc.runtime.documents import document_tables
    from attncc.runtime.kernel import Kernel
    from attncc.simulator import Candidate, SpeedupReport, simulate, simulate_many
    from attncc.spec import gates, loads, masks, normalizers, routing, scores
    from attncc.spec.attention import AttentionSpec

_HOMES = {
    "AttentionSpec": "attncc.spec.attention",
    "Candidate": "attncc.simulator",
    "Kernel": "attncc.runtime.kernel",
    "Plan": "attncc.passes.plan",
    "SpeedupReport": "attncc.simulator",
    "compile": "attncc.api",
    "document_tables": "attncc.runtime.documents",
    "simulate": "attncc.simulator",
    "simulate_many": "attncc.simulator",
    "errors": "attncc",
    "knobs": "attncc",
    "gates": "attncc.spec",
    "loads": "attncc.spec",
    "masks": "attncc.spec",
    "normalizers": "attncc.spec",
    "routing": "attncc.spec",
    "scores": "attncc.spec",
}
"""Where each public name lives; it is imported when first asked for, so that specs and simulation never load torch."""

__all__ = [
    "AttentionSpec",
    "Candidate",
    "Kernel",
    "Plan",
    "SpeedupReport",
    "__version__",
    "compile",
    "document_tables",
    "errors",
    "gates",
    "knobs",
    "loads",
    "masks",
    "normalizers",
    "routing",
    "scores",
    "simulate",
    "simulate_many",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attncc' has no attribute {name!r}")
    from importlib import import_module

    home = _HOMES[name]
    if home in ("attncc", "attncc.spec"):
        return import_module(f"{home}.{name}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
