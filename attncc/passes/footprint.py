"""Shared memory and shape of a kernel, before it is compiled: which configurations to try, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attncc.ir.graph import Graph, GraphOp
from attncc.targets import Target

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Configuration:
    """Tile rows, warps and stages; `slowness` prices a multiply-add relative to the largest tile."""

    q_rows: int
    k_rows: int
    num_warps: int
    num_stages: int
    slowness: float

    def resized(self, q_rows: int, k_rows: int) -> Configuration:
        """The same with other tile sizes."""
        return replace(self, q_rows=q_rows, k_rows=k_rows)


def widths(body: Graph) -> tuple[int, int]:
    """Padded columns of a key row and of a value row."""
    scores, combine = body.find(GraphOp.SCORES)[0], body.find(GraphOp.COMBINE)[0]
    return padded(int(scores.inputs[1]["shape"][3])), padded(int(combine.inputs[1]["shape"][3]))


def padded(width: int) -> int:
    """Columns rounded up to what matrix units take."""
    return -(-width // 16) * 16


def element_bytes(body: Graph) -> int:
    """Bytes of one element of q, k and v."""
    return BYTES[body.find(GraphOp.SCORES)[0].inputs[0]["dtype"]]


def configurations(body: Graph, target: Target) -> Iterator[Configuration]:
    """Configurations worth pricing, large tiles first."""
    if target.backend == "cpu":
        yield Configuration(128, 128, 1, 1, 1.0)
        return
    for q_rows, k_rows, slowness in (
        (128, 128, 1.0),
        (128, 64, 1.06),
        (64, 64, 1.2),
        (64, 32, 1.5),
        (32, 32, 2.2),
        (16, 16, 5.0),
    ):
        warps = 8 if q_rows * max(widths(body)) >= 128 * 128 else 4
        for stages in (3, 2, 1):
            yield Configuration(q_rows, k_rows, warps, stages, slowness * {3: 1.0, 2: 1.03, 1: 1.4}[stages])


def shared_bytes(body: Graph, c: Configuration, target: Target) -> int:
    """Upper bound of the shared memory of one block, in bytes: the query tile, the key and value tiles in flight, the weights."""
    if target.backend == "cpu":
        return 0
    key_width, value_width = widths(body)
    size = element_bytes(body)
    stream = c.k_rows * (key_width + value_width) * size * max(1, c.num_stages)
    rows = c.q_rows * key_width * size
    weights = c.q_rows * c.k_rows * size
    return stream + rows + weights
