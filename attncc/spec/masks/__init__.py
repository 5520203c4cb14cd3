"""Masks: which keys a query may see. Each is data with one formula; combine them with `&`, `|` and `~`.

The formula speaks of the query's and the key's coordinates (`attncc.spec.model.Grid`); everything else, from block sparsity to the
code in the kernel, follows from it. `Causal`, `SlidingWindow`, `Prefix` and `Sinks` act on the flattened token index.
"""

from __future__ import annotations

from attncc.spec.masks.base import Align, Edge, Pattern, PerAxis
from attncc.spec.masks.combine import And, Concatenation, Documents, Mask, Not, Or, PerHead
from attncc.spec.masks.labels import BlockTable, Segments
from attncc.spec.masks.text import Captured, Predicate
from attncc.spec.masks.tokens import Causal, CausalAxes, Full, GlobalTokens, Prefix, PrefixPerSample, Sinks, SlidingWindow, StridedBlocks
from attncc.spec.masks.windows import Axial, Congruence, Disc, Halo, Neighborhood, Partition, Window, neighborhood_axis

__all__ = [
    "Align",
    "And",
    "Axial",
    "BlockTable",
    "Captured",
    "Causal",
    "CausalAxes",
    "Concatenation",
    "Congruence",
    "Disc",
    "Documents",
    "Edge",
    "Full",
    "GlobalTokens",
    "Halo",
    "Mask",
    "Neighborhood",
    "Not",
    "Or",
    "Partition",
    "Pattern",
    "PerAxis",
    "PerHead",
    "Predicate",
    "Prefix",
    "PrefixPerSample",
    "Segments",
    "Sinks",
    "SlidingWindow",
    "StridedBlocks",
    "Window",
    "neighborhood_axis",
]
