"""FlexAttention: a spec's mask and score maps as its BlockMask, mask_mod and score_mod, for people who keep PyTorch's own kernels.

The block mask comes from the same analysis as our kernels': no array of all pairs is ever made, so that it takes milliseconds where
`create_block_mask` takes seconds, and works at a million tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attncc.errors import InputError, UnsupportedError
from attncc.integrations.torch_code import torch_function
from attncc.ir.expr import Expr, Kind, Table, substitute, var
from attncc.ir.expr import tables as tables_of
from attncc.ir.graph import GraphOp
from attncc.passes.block_mask import BlockMask as Classified
from attncc.passes.block_mask import block_mask
from attncc.passes.flat_blocks import flat_block_mask
from attncc.passes.given import Lengths, known_grid, known_tables
from attncc.passes.tiles import Shape, filled_in, in_plain_order
from attncc.spec.attention import AttentionSpec
from attncc.spec.lower import lower
from attncc.spec.model import Grid

Device = torch.device | str
Tables = Mapping[str, Any] | None
Ints = npt.NDArray[np.int64]
Entries = tuple[Ints, Ints, Ints]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


# ---- block masks ---------------------------------------------------------------------------------------------------------------


def to_block_mask(
    spec: AttentionSpec,
    batch: int | None = None,
    device: Device = "cpu",
    lengths: Lengths = None,
    tables: Tables = None,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """FlexAttention's block mask of a spec; see `AttentionSpec.to_block_mask`."""
    block = _block(block_size)
    query, key = known_grid(spec, lengths)
    mask = classified(spec, query, key, block, tables, batch)
    found = _Blocks(mask.batch, mask.heads, mask.tiling.rows, prod(mask.tiling.k_tiles), device)
    partial, full = (
        found.entries(mask.lists.partial_offsets, mask.lists.partial_tiles),
        found.entries(mask.lists.full_offsets, mask.lists.full_tiles),
    )
    by_query = (*found.by_query(partial), *found.by_query(full))
    mod, sizes = to_mask_mod(spec, tables, lengths, device), (prod(query), prod(key))
    made = BlockMask.from_kv_blocks(*by_query, BLOCK_SIZE=block, mask_mod=mod, seq_lengths=sizes, compute_q_blocks=False)
    # The other order, for the backward pass: sorting what we have takes milliseconds, sorting rows of all blocks, minutes at a million.
    made.q_num_blocks, made.q_indices = found.by_key(partial)
    made.full_q_num_blocks, made.full_q_indices = found.by_key(full)
    return made


def _block(block_size: Any) -> tuple[int, int]:
    block = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(block) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in block):
        raise InputError("block_size", f"must be a positive integer or two (queries, keys), not {block_size!r}")
    return block[0], block[1]


def classified(
    spec: AttentionSpec, query: Shape, key: Shape, block: tuple[int, int], tables: Tables = None, batch: int | None = None
) -> Classified:
    """Blocks of consecutive tokens, empty, full or partial."""
    sizes = {"H": spec.heads, "NQ": prod(query), "NK": prod(key), **({} if batch is None else {"B": batch})}
    if spec.grid.rank > 1 and not _flat(spec.mask):
        predicate = filled_in(spec.predicate, query, key)
        known, elements = known_tables(predicate, tables, sizes)
        return flat_block_mask(predicate, query, key, block, known, elements, spec.heads)
    flat = (prod(query),), (prod(key),)
    predicate = spec.predicate if spec.grid.rank == 1 else spec.mask.predicate(Grid(*flat, spec.grid.shared, spec.heads))
    mask = in_plain_order(predicate, *flat)
    known, elements = known_tables(mask.predicate, tables, sizes)
    return block_mask(mask, block[:1], block[1:], known, elements, spec.heads)


def _flat(mask: Any) -> bool:
    """Whether a mask speaks of flattened tokens only, so that its grid is a line."""
    return bool(mask.flat) and all(map(_flat, mask.parts))


@dataclass(frozen=True)
class _Blocks:
    """Blocks `[batch, heads, rows, columns]`, as the tensors that FlexAttention keeps of them."""

    batch: int
    heads: int
    rows: int
    columns: int
    device: Device

    def entries(self, offsets: Ints, tiles: Ints) -> Entries:
        """(batch and head, row, column) of every block in compressed lists."""
        flat = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        return flat // self.rows, flat % self.rows, tiles

    def by_query(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Counts `[B, H, rows]` and key blocks `[B, H, rows, columns]`, of which as many count in each row."""
        instance, row, column = entries
        return self._padded(instance * self.rows + row, column, self.rows, self.columns)

    def by_key(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Counts `[B, H, columns]` and query blocks `[B, H, columns, rows]`."""
        instance, row, column = entries
        order = np.lexsort((row, column, instance))
        return self._padded((instance * self.columns + column)[order], row[order], self.columns, self.rows)

    def _padded(self, row: Ints, value: Ints, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Values of ascending rows, each row filled up to `width`."""
        counts = np.bincount(row, minlength=self.batch * self.heads * rows)
        values = np.zeros((len(counts), width), np.int32)
        values[row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)] = value
        shape = (self.batch, self.heads, rows)
        count, padded = torch.from_numpy(counts.astype(np.int32)), torch.from_numpy(values)
        return count.reshape(shape).to(self.device), padded.reshape(*shape, width).to(self.device)


# ---- mods ----------------------------------------------------------------------------------------------------------------------


def to_mask_mod(spec: AttentionSpec, tables: Tables = None, lengths: Lengths = None, device: Device = "cpu") -> MaskMod:
    """FlexAttention's mask_mod of a spec; see `AttentionSpec.to_mask_mod`."""
    query, key = known_grid(spec, lengths)
    predicate = filled_in(_over_tokens(spec.predicate, query, key), query, key)
    sizes = {"H": spec.heads, "NQ": prod(query), "NK": prod(key)}
    known, _ = known_tables(predicate, tables, sizes)
    allowed = torch_function(predicate, ("b", "h", "q", "k"), {name: torch.from_numpy(t).to(device) for name, t in known.items()})

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        value = allowed(b, h, q_idx, kv_idx)
        return value if isinstance(value, Tensor) else (q_idx >= 0) & value

    return mask_mod


def to_score_mod(spec: AttentionSpec, tables: Tables = None, lengths: Lengths = None, device: Device = "cpu") -> ScoreMod:
    """FlexAttention's score_mod of a spec; see `AttentionSpec.to_score_mod`."""
    if spec.normalizer.kind != "softmax":
        raise UnsupportedError(f"normalizer {spec.normalizer.kind} in FlexAttention", "it always takes the softmax of a row", "softmax")
    if spec.loads:
        raise UnsupportedError("loads in FlexAttention", "it takes q and k as they are", "none, and q and k normed and rotated beforehand")
    if spec.factor is not None:
        raise UnsupportedError("factor in FlexAttention", "its weights add up to 1", "none; a score_mod comes before the softmax")
    if spec.token_scales:
        raise UnsupportedError("token_scales in FlexAttention", "it loads q, k and v as they are", "none, and q, k and v scaled beforehand")
    if (missing := spec.mask.missing(spec.grid)) is not None:
        remedy = "edge 'truncate', or q, k and v padded beforehand"
        raise UnsupportedError(f"mask edge {missing.edge!r} in FlexAttention", "its rows are softmaxes of their keys alone", remedy)
    if spec.normalizer.sink is not None:
        remedy = "no sink, and output * sigmoid(lse - sink) of what it returns"
        raise UnsupportedError("normalizer.sink in FlexAttention", "its rows are softmaxes of their keys alone", remedy)
    query, key = known_grid(spec, lengths)
    maps = [filled_in(_over_tokens(n["value"], query, key), query, key) for n in lower(spec).find(GraphOp.MAP)]
    names, functions = ("s", "b", "h", "q", "k"), []
    for value in maps:
        functions.append(torch_function(value, names, _float_tables(value, tables, spec.heads, device), torch.float32))
    steps = tuple(functions)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for step in steps:
            score = step(score, b, h, q_idx, kv_idx)
        return score

    return score_mod


def _over_tokens(root: Expr, query: Shape, key: Shape) -> Expr:
    """The expression over the flattened tokens `q` and `k` in place of coordinates."""
    env: dict[str, Expr] = {}
    for side, grid in (("q", query), ("k", key)):
        token = var(side)
        for a in range(len(grid)):
            inner = token // prod(grid[a + 1 :])
            env[f"{side}{a}"] = inner % grid[a] if a else inner
    return substitute(root, env)


def _float_tables(root: Expr, given: Tables, heads: int, device: Device) -> dict[str, Tensor]:
    """Tables of a score map: the caller's, gradients and all, or the spec's own numbers."""
    return {table.name: _float_table(table, given or {}, heads, device) for table in tables_of(root)}


def _float_table(table: Table, given: Mapping[str, Any], heads: int, device: Device) -> Tensor:
    if table.values is not None:
        return torch.tensor(table.values, dtype=torch.float32, device=device).reshape([int(n) for n in table.shape])
    wanted = [{"H": heads}.get(str(n), n) for n in table.shape]
    if table.name not in given:
        raise InputError("tables", f"the scores read {table.name} {wanted}; pass it by name")
    tensor = torch.as_tensor(given[table.name]).to(device)
    fits = tensor.dim() == len(wanted) and all(m == n or isinstance(n, str) for m, n in zip(tensor.shape, wanted))
    if not fits or tensor.is_floating_point() != (table.kind is Kind.FLOAT):
        raise InputError("tables", f"{table.name} is {tensor.dtype} {list(tensor.shape)}, must be {table.kind.value} {wanted}")
    return tensor
