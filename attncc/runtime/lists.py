"""Tile lists of kernels that read their key tiles from arrays.

Where the mask is known with the lengths, the lists come from the block mask, once for each set of lengths. Where it reads run-time
tables, the bands alone give each row its candidates, once; which of these are full, partial or empty, the device decides from the
tables by intervals, for every call: tables of fixed capacity are filled there, with no wait for the device, so that calls can be
captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attncc.errors import UnsupportedError
from attncc.ir.arrays import torch_arrays
from attncc.ir.expr import Expr, var
from attncc.ir.intervals import interval
from attncc.ir.values import evaluate_all, range_tables
from attncc.passes.block_mask import BlockMask, block_mask
from attncc.passes.plan import KernelPlan
from attncc.passes.tiles import BoundMask, Shape, Tiling, bind, class_lengths, unflatten

Ints = npt.NDArray[np.int64]
MOST_ENTRIES = 2**31 - 1


class Lists(NamedTuple):
    """Key tiles of every row of query tiles, as generated files take them; row i is b * lists_b + h * lists_h + row tile."""

    full_begin: Tensor
    full_end: Tensor
    full_tiles: Tensor
    partial_begin: Tensor
    partial_end: Tensor
    partial_tiles: Tensor
    lists_b: int
    lists_h: int


def known_lists(mask: BlockMask, device: torch.device) -> Lists:
    """Lists of a classified mask."""
    lists, rows = mask.lists, mask.tiling.rows
    full = _ranges(lists.full_offsets, lists.full_tiles, device)
    partial = _ranges(lists.partial_offsets, lists.partial_tiles, device)
    return Lists(*full, *partial, mask.heads * rows if mask.batch > 1 else 0, rows if mask.heads > 1 else 0)


def _ranges(offsets: Ints, tiles: Ints, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # One entry more, never read: an empty tensor has no address.
    arrays = (offsets[:-1], offsets[1:], np.append(tiles, 0))
    begin, end, entries = (torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays)
    return begin, end, entries


@dataclass(frozen=True)
class Candidates:
    """What the bands leave of each row, on a device: `tiles` [rows or 1, capacity], `kinds` [rows, capacity] 0 none, 1 partial, 2 full.

    `ends` holds by name the first and last coordinates of rows [rows, 1] and of candidates, as `tiles`, and the residues of rows.
    """

    tiles: Tensor
    kinds: Tensor
    ends: Mapping[str, Tensor]


def candidates(mask: BoundMask, q_tile: Shape, k_tile: Shape, device: torch.device) -> Candidates:
    """Candidates of every row: tiles that the bands do not rule out."""
    found = block_mask(mask.hull, q_tile, k_tile)
    tiles, kinds = _padded(found)
    ends = _row_ends(found.tiling) | _key_ends(found.tiling, tiles)
    on_device = {name: torch.from_numpy(column).to(device) for name, column in ends.items()}
    return Candidates(torch.from_numpy(tiles).to(device), torch.from_numpy(kinds).to(device), on_device)


def _padded(mask: BlockMask) -> tuple[Ints, npt.NDArray[np.int8]]:
    """Tiles of every row, or one row for all, ascending, and their kinds; rows are filled up to the longest."""
    lists = mask.lists
    parts = ((lists.full_offsets, lists.full_tiles, 2), (lists.partial_offsets, lists.partial_tiles, 1))
    row = np.concatenate([np.repeat(np.arange(mask.tiling.rows), np.diff(offsets)) for offsets, _, _ in parts])
    tile = np.concatenate([entries for _, entries, _ in parts])
    kind = np.concatenate([np.full(len(entries), value, np.int8) for _, entries, value in parts])
    count = np.bincount(row, minlength=mask.tiling.rows)
    width, every = max(1, int(count.max(initial=0))), prod(mask.tiling.k_tiles)
    kinds = np.zeros((mask.tiling.rows, width), np.int8)
    if width == every:  # one row of tiles serves all: what keys alone decide is decided once
        kinds[row, tile] = kind
        return np.arange(every)[None], kinds
    order = np.lexsort((tile, row))
    column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    tiles = np.zeros(kinds.shape, np.int64)
    tiles[row[order], column], kinds[row[order], column] = tile[order], kind[order]
    return tiles, kinds


def _row_ends(tiling: Tiling) -> dict[str, Ints]:
    """Residues of every row, its first and its last query on each axis: `[rows, 1]`."""
    columns: dict[str, list[int]] = {}
    for residue in tiling.residues():
        lengths = class_lengths(tiling.mask.query, tiling.mask.order, residue)
        for flat in range(prod(tiling.q_tiles)):
            at = unflatten(flat, tiling.q_tiles)
            for a, side in enumerate(tiling.q_tile):
                last = min((at[a] + 1) * side, lengths[a]) - 1
                for name, value in ((f"r{a}", residue[a]), (f"q{a}.lo", at[a] * side), (f"q{a}.hi", last)):
                    columns.setdefault(name, []).append(value)
    return {name: np.array(column, dtype=np.int64)[:, None] for name, column in columns.items()}


def _key_ends(tiling: Tiling, tiles: Ints) -> dict[str, Ints]:
    """First and last key of every candidate on each axis. The last may lie past the grid: reads clamp, and its tile is not full."""
    ends, rest = {}, tiles
    for a in reversed(range(tiling.rank)):
        at = rest % tiling.k_tiles[a]
        rest = rest // tiling.k_tiles[a]
        ends[f"k{a}.lo"], ends[f"k{a}.hi"] = at * tiling.k_tile[a], (at + 1) * tiling.k_tile[a] - 1
    return ends


@dataclass(frozen=True)
class Filler:
    """Classifies candidates from run-time tables, on their device. One for each set of lengths."""

    mask: BoundMask
    found: Candidates
    longest: int | None = None
    """Tokens between the first and the last of a tile, at most; None: any number, as on a grid, whose tiles are no runs of tokens."""

    @cached_property
    def bounds(self) -> tuple[Expr, Expr]:
        """(surely, possibly), over a box of coordinates, of what the candidates leave open."""
        rank = len(self.mask.query)
        return interval(self.mask.beyond_hull, {f"{s}{a}": (var(f"{s}{a}.lo"), var(f"{s}{a}.hi")) for s in "qk" for a in range(rank)})

    def __call__(self, tables: Mapping[str, Tensor], batch: int, heads: int) -> Lists:
        """Lists of one call; `tables` are on the candidates' device."""
        batch, heads = (n if self.mask.varies_with(name) else 1 for name, n in (("b", batch), ("h", heads)))
        rows, capacity = self.found.kinds.shape
        if batch * heads * rows * (capacity + 1) > MOST_ENTRIES:
            raise UnsupportedError(
                f"a run-time mask of {batch * heads * rows} rows with up to {capacity} key tiles each",
                "its tile lists pass 2**31 entries",
                "fewer tokens, or a band (sliding_window) beside the run-time part of the mask",
            )
        surely, possibly = self._decided(tables, batch, heads)
        some = possibly & (self.found.kinds > 0)
        full = surely & some & (self.found.kinds == 2)
        lists = (*self._packed(full), *self._packed(some & ~full))
        return Lists(*lists, heads * rows if batch > 1 else 0, rows if heads > 1 else 0)

    def _decided(self, tables: Mapping[str, Tensor], batch: int, heads: int) -> list[Tensor]:
        """The bounds over every candidate, `[batch, heads, rows, capacity]`."""
        device = self.found.tiles.device
        env: dict[str, Any] = {
            "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
            "h": torch.arange(heads, device=device).view(-1, 1, 1),
            **self.found.ends,
        }
        surely, possibly = self.bounds
        xp = torch_arrays()
        ranges = range_tables([surely, possibly], tables, xp, self.longest)
        values = evaluate_all([surely, possibly], {**ranges, **env}, xp)
        shape = (batch, heads, *self.found.kinds.shape)
        # torch.full, for a constant: as_tensor would copy from the host, which no CUDA graph can capture.
        return [(x if isinstance(x, Tensor) else torch.full((), x, device=device)).expand(shape) for x in values]

    def _packed(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """begin, end and tiles, each row with the same room: its chosen tiles come first, in order."""
        capacity = chosen.shape[-1]
        # What is not chosen is written behind the end of its row.
        at = torch.where(chosen, chosen.cumsum(-1) - 1, capacity)
        tiles = torch.empty((*chosen.shape[:-1], capacity + 1), dtype=torch.int32, device=chosen.device)
        tiles.scatter_(-1, at, self.found.tiles.int().expand(chosen.shape))
        rows = chosen.shape[:-1].numel()
        begin = torch.arange(rows, device=chosen.device, dtype=torch.int32) * (capacity + 1)
        return begin, begin + chosen.sum(-1).flatten().int(), tiles


class ListCache:
    """Lists of one kernel by lengths and device; at most `limit` are kept."""

    def __init__(self, kernel: KernelPlan, limit: int = 128) -> None:
        self.kernel, self.limit = kernel, limit
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._pinned: dict[tuple[Any, ...], Any] = {}

    def __call__(self, query: Shape, key: Shape, inputs: Mapping[str, Tensor], batch: int, heads: int, device: torch.device) -> Lists:
        """Lists of a call: for its lengths by axis, its run-time tables by name, its batch and heads, on its device."""
        filler = self._cached((query, key, device), lambda: self._filler(query, key, device))
        if isinstance(filler, Filler):
            return filler({t.name: inputs[t.name] for t in filler.mask.reads}, batch, heads)
        if not filler.varies_with("b"):
            batch = 1
        known: Lists = self._cached((query, key, device, batch), lambda: self._known(filler, batch, heads, device))
        return known

    def _filler(self, query: Shape, key: Shape, device: torch.device) -> Filler | BoundMask:
        """What the lengths decide: how to fill lists from run-time tables, or, where the mask reads none, just the mask."""
        mask = bind(self.kernel.graph, query, key)
        if not mask.reads:
            return mask
        longest = max(*self.kernel.q_tile, *self.kernel.k_tile) * mask.order[0] if len(query) == 1 else None
        return Filler(mask, candidates(mask, self.kernel.q_tile, self.kernel.k_tile, device), longest)

    def _known(self, mask: BoundMask, batch: int, heads: int, device: torch.device) -> Lists:
        return known_lists(block_mask(mask, self.kernel.q_tile, self.kernel.k_tile, None, batch, heads), device)

    def _cached(self, at: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The value kept under `at`; the least recently used goes, but never one that a CUDA graph has captured."""
        value = self._kept.pop(at, None) or make()
        self._kept[at] = value
        if at[2].type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._pinned[at] = value
        while len(self._kept) > self.limit:
            self._kept.pop(next(iter(self._kept)))
        return value
