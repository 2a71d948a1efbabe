"""Blocks of values on a pattern: gathered from a dense matrix, scattered into one, cleared where
nothing is stored.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, entry_rows, tile_table
from sparse_layouts.derived import derived

PIECE = 2**16  # blocks that are looked at at a time


def slots_in_row_order(pattern: BlockPattern) -> Tensor:
    """int64 (nnzb,): the slot of the t-th block of the row lists."""
    if pattern.row_slots is None:
        return torch.arange(pattern.num_blocks, device=pattern.device)
    return pattern.row_slots.long()


def cells(pattern: BlockPattern) -> Tensor:
    """int64 (nnzb,), by position in the row lists: (pattern * Mb + block row) * Nb + column."""
    return (
        entry_rows(pattern.crow_indices, pattern.num_blocks) * pattern.grid[1] + pattern.col_indices
    )


def densify(values: Tensor, pattern: BlockPattern) -> Tensor:
    """The matrices (B, P, M, N) of `values` (B, S, bm, bn) on a pattern without a head map;
    differentiable.
    """
    p = pattern
    assert p.head_map is None, "values need lists of their own for every head: expand_heads"
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    if p.row_slots is not None:
        values = values[:, p.row_slots.long()]
    out = values.new_zeros(values.shape[0], p.num_patterns * mb * nb, bm, bn)
    out = out.index_copy(1, cells(p), values)
    out = out.view(values.shape[0], p.num_patterns, mb, nb, bm, bn).transpose(3, 4)
    return out.reshape(values.shape[0], p.num_patterns, mb * bm, nb * bn)[..., :m, :n]


def gather(dense: Tensor, pattern: BlockPattern) -> Tensor:
    """The stored entries (B, S, bm, bn) of `dense` (B, P, M, N), in slot order, 0 at what is not
    stored; differentiable.
    """
    p = pattern
    assert p.head_map is None, "values need lists of their own for every head: expand_heads"
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    if (m, n) != (mb * bm, nb * bn):
        dense = torch.nn.functional.pad(dense, (0, nb * bn - n, 0, mb * bm - m))
    blocks = dense.reshape(dense.shape[0], p.num_patterns, mb, bm, nb, bn)
    where = cells(p)
    if p.row_slots is not None:
        where = torch.empty_like(where).index_copy(0, p.row_slots.long(), where)
    row, column = where.div(max(nb, 1), rounding_mode="floor"), where % max(nb, 1)
    pattern_of, row = row.div(max(mb, 1), rounding_mode="floor"), row % max(mb, 1)
    values = blocks[:, pattern_of, row, :, column]  # the indexed dimension comes first
    values, mask = values.transpose(0, 1).contiguous(), entry_mask(p)
    return values if mask is None else values.masked_fill(~mask, 0)


def entry_mask(pattern: BlockPattern) -> Tensor | None:
    """bool (S, bm, bn) by slot: which entries of the blocks are stored; None where all are."""
    p = pattern
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    ragged = (m, n) != (mb * bm, nb * bn)
    if p.block_tiles is None and not ragged:
        return None
    ids = torch.zeros(p.num_blocks, dtype=torch.long, device=p.device)
    mask = tile_table(p)[ids if p.block_tiles is None else p.block_tiles.long()]
    if ragged:
        row, column = rows_and_columns(p)
        rows = row[:, None] * bm + torch.arange(bm, device=p.device)
        columns = column[:, None] * bn + torch.arange(bn, device=p.device)
        mask = mask & (rows < m)[:, :, None] & (columns < n)[:, None, :]
    return mask


def unstored_entries(pattern: BlockPattern) -> tuple[Tensor, Tensor] | None:
    """The slots (int64) of the blocks that are stored in part, and bool (slots, bm, bn): what of
    each is not stored. None where every block is whole. One host sync, once a pattern.
    """

    def build() -> tuple[Tensor, Tensor] | None:
        mask = entry_mask(pattern)
        if mask is None:
            return None
        slots = (~mask.flatten(1).all(1)).nonzero()[:, 0]
        return (slots, ~mask[slots]) if slots.numel() else None

    return derived(pattern, "unstored_entries", build)


def rows_and_columns(pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    """int64 (S,), by slot: block row and block column within the block's own pattern."""
    p = pattern
    row = entry_rows(p.crow_indices, p.num_blocks) % max(p.grid[0], 1)
    column = p.col_indices.long()
    if p.row_slots is not None:
        slots = p.row_slots.long()
        row = torch.empty_like(row).index_copy(0, slots, row)
        column = torch.empty_like(column).index_copy(0, slots, column)
    return row, column


def entries_per_pattern(pattern: BlockPattern) -> Tensor:
    """int64 (P,): stored entries of each pattern, by token, counted without unpacking a block;
    once a pattern.
    """

    def build() -> Tensor:
        p = pattern
        (bm, bn), mb = p.block_size, p.grid[0]
        counts = (p.crow_indices[:, -1] - p.crow_indices[:, 0]).cpu().numpy().astype(np.int64)
        counts *= bm * bn
        row, _, entries = block_entries(p, special_blocks(p))
        np.add.at(counts, row // max(mb, 1), entries - bm * bn)
        return torch.from_numpy(counts).to(p.device)

    return derived(pattern, "entries_per_pattern", build)


def special_blocks(pattern: BlockPattern) -> np.ndarray:
    """int64 (n,): the positions in the row lists of the blocks that are partial or reach over the
    edge; all others store bm * bn entries. On the host, where the reader is.

    In numpy: torch divides such work among threads, which costs more than the work itself.
    """
    p = pattern
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    columns = p.col_indices.cpu().numpy()
    tiles = None if p.block_tiles is None else p.block_tiles.cpu().numpy()
    if tiles is not None and p.row_slots is not None:
        tiles = tiles[p.row_slots.cpu().numpy()]
    found = [np.zeros(0, np.int64)]
    for start in range(0, p.num_blocks, PIECE):  # piece by piece, which stays in the cache
        here = slice(start, start + PIECE)
        if tiles is not None:
            found.append(np.flatnonzero(tiles[here] != 0) + start)
        if n != nb * bn:
            found.append(np.flatnonzero(columns[here] == nb - 1) + start)
    if m != mb * bm:
        found += [np.arange(each[-2], each[-1]) for each in p.crow_indices.cpu().numpy()]
    every = np.concatenate(found)
    return every if m == mb * bm and n == nb * bn else np.unique(every)


def block_entries(pattern: BlockPattern, at: np.ndarray) -> tuple[np.ndarray, ...]:
    """int64 (n,) each, of the blocks at positions `at` of the row lists: pattern * Mb + block row,
    block column, stored entries.
    """
    p = pattern
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    slots = at if p.row_slots is None else p.row_slots.cpu().numpy()[at]
    tile = np.zeros_like(slots) if p.block_tiles is None else p.block_tiles.cpu().numpy()[slots]
    column = p.col_indices.cpu().numpy()[at].astype(np.int64)
    place = np.searchsorted(p.crow_indices.flatten().cpu().numpy(), at, "right") - 1
    row = place % (mb + 1)
    table = tile_table(p).cpu().numpy()  # (T + 1, bm, bn)
    last_m, last_n = max(m - (mb - 1) * bm, 0), max(n - (nb - 1) * bn, 0)
    # a block over the edge stores what its tile has inside: (last row?, last column?, tile)
    sizes = np.array([[table[:, :h, :w].sum((1, 2)) for w in (bn, last_n)] for h in (bm, last_m)])
    entries = sizes[(row == mb - 1).astype(np.intp), (column == nb - 1).astype(np.intp), tile]
    return place // (mb + 1) * mb + row, column, entries


def num_entries(pattern: BlockPattern) -> int:
    """Stored entries over all leading indices (one host sync, once a pattern)."""

    def build() -> int:
        each = entries_per_pattern(pattern)
        if pattern.head_map is not None:
            each = each[pattern.head_map.long()]
        return int(each.sum())

    return derived(pattern, "num_entries", build)
