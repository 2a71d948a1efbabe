"""Layouts of blocks from any other layout and from sparse matrices, in time and memory of what is
stored.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import (
    BlockPattern,
    build_pattern,
    entry_rows,
    line_offsets,
    pack_tiles,
)
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.entry_lists import Entries, entries_of, picked
from sparse_layouts.layout_autograd import with_values
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import is_scipy
from sparse_layouts.stored_entries import short

# A table of all blocks costs 9 bytes a block and no sorting: up to so many blocks an entry.
CELLS_PER_ENTRY = 4


def distinct(keys: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The distinct values of int64 keys in 0..cells - 1, ascending, and which of them each key is.

    >>> import torch
    >>> distinct(torch.tensor([7, 2, 7]), 10)
    (tensor([2, 7]), tensor([1, 0, 1]))
    """
    if cells > CELLS_PER_ENTRY * keys.shape[0]:
        return torch.unique(keys, return_inverse=True)
    found = torch.zeros(cells, dtype=torch.bool, device=keys.device)
    found[keys] = True
    number = found.cumsum(0) - 1
    return found.nonzero()[:, 0], number[keys]


def blocked(entries: Entries, block: tuple[int, int]) -> tuple[BlockPattern, Tensor, Tensor]:
    """The pattern of the blocks that hold an entry, all of them full, and of every entry, int64
    (S,): which block, and where in the block's bm * bn entries.
    """
    (m, n), (bm, bn) = entries.shape, block
    mb, nb = -(-m // bm), -(-n // bn)
    patterns = entries.patterns
    # divisions are slow: one for every row and column, and the entries look them up
    device = entries.rows.device
    row, column = torch.arange(m, device=device), torch.arange(n, device=device)
    line = torch.arange(patterns, device=device)[:, None] * mb + row.div(bm, rounding_mode="floor")
    keys = (line * nb).flatten()[entries.rows]
    keys += column.div(bn, rounding_mode="floor")[entries.columns]
    inside = (row % bm * bn).repeat(patterns)[entries.rows]
    inside += (column % bn)[entries.columns]
    cells, which = distinct(keys, patterns * mb * nb)
    lines = cells.div(max(nb, 1), rounding_mode="floor")
    counts = torch.bincount(lines, minlength=patterns * mb).view(patterns, mb)
    made = build_pattern(
        line_offsets(counts),
        (cells % max(nb, 1)).int(),
        shape=(m, n),
        block_size=block,
        lead=entries.lead,
        head_map=entries.head_map,
    )
    return made, which, inside


def into_blocks(source: LayoutTensor, block: tuple[int, int]) -> BSRTensor:
    """The blocks of a layout with values that hold a stored entry, differentiable; 0 in a block
    where the layout stores nothing.
    """
    entries = entries_of(source)
    pattern, which, inside = blocked(entries, block)
    values = picked(source, entries)
    size = (pattern.num_blocks, *block)
    place = which.mul_(math.prod(block)).add_(inside)
    room = values.new_zeros(*values.shape[:-1], math.prod(size))
    filled = room.index_copy(-1, place, values).view(*values.shape[:-1], *size)
    return with_values(BSRTensor.on_pattern(None, pattern), filled)  # type: ignore[return-value]


def check_no_counts(source: LayoutTensor, what: str) -> None:
    """Raises for a mask whose blocks are counted: a layout that cannot count would not mean the
    same in a softmax.
    """
    counted = isinstance(source, BSRTensor) and source.is_mask
    if counted and source.block_pattern.block_counts is not None:  # type: ignore[attr-defined]
        raise ValueError(
            f"{what}: {short(source)} counts blocks, which the result could not; drop the counts: "
            "sl.without_counts(mask)"
        )


def mask_of(source: Any, block: tuple[int, int], what: str) -> BSRTensor:
    """The block mask of a mask layout, a scipy matrix or a torch.sparse tensor of bool.

    Raises `TypeError` for what has values.
    """
    if isinstance(source, BSRTensor) and source.is_mask and source.block_size == block:
        return source
    if isinstance(source, LayoutTensor):
        entries = _of_mask(source, what)
    elif is_scipy(source):
        entries = _of_scipy_mask(source, what)
    else:
        entries = _of_torch_mask(source, what)
    return BSRTensor.on_pattern(None, _tiled(entries, block))


def _of_mask(source: LayoutTensor, what: str) -> Entries:
    if source.dtype != torch.bool:
        raise TypeError(
            f"{what}: expected a mask, got {short(source)}, which has values; w.pattern is the "
            "mask of its stored entries"
        )
    check_no_counts(source, what)
    entries = entries_of(source)
    if source.stored_values is None:
        return entries
    return entries.where(picked(source, entries))  # a user's own layout, its values bool


def _of_scipy_mask(source: Any, what: str) -> Entries:
    if source.dtype != np.dtype(bool):
        raise TypeError(
            f"{what}: expected a bool matrix, got scipy's {source.dtype}; a mask of its non-zeros "
            f"is {what}(x.astype(bool), ...), of its stored entries {what}(sl.csr(x).pattern, ...)"
        )
    if source.ndim != 2:
        raise ValueError(f"{what}: expected a matrix, got shape {tuple(source.shape)}")
    matrix = source.tocsr(copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    columns = matrix.indices.astype(np.int64)
    m, n = (int(size) for size in matrix.shape)
    return Entries(torch.from_numpy(rows), torch.from_numpy(columns), None, (m, n))


def _of_torch_mask(source: Tensor, what: str) -> Entries:
    if source.dtype != torch.bool:
        raise TypeError(
            f"{what}: expected a bool tensor, got {source.dtype} of {source.layout}; a mask of its "
            f"stored entries is {what}(sl.csr(x).pattern, ...)"
        )
    if source.dim() != 2 or source.dense_dim():
        raise ValueError(
            f"{what}: expected a sparse matrix, got shape {tuple(source.shape)} with "
            f"{source.dense_dim()} dense dimensions; convert each sample for itself"
        )
    listed = source if source.layout == torch.sparse_coo else source.to_sparse()
    listed = listed.coalesce()
    rows, columns = listed.indices()[:, listed.values()]
    return Entries(rows, columns, None, (source.shape[0], source.shape[1]))


def _tiled(entries: Entries, block: tuple[int, int]) -> BlockPattern:
    """The mask pattern of these entries: blocks that hold one, with bit tiles for partial ones."""
    pattern, which, inside = blocked(entries, block)
    (m, n), (bm, bn), (mb, nb) = pattern.shape, block, pattern.grid
    device, area = which.device, bm * bn
    # what lies over the edge is never read: a block of the edge is full without it
    rows = entry_rows(pattern.crow_indices, pattern.num_blocks) % max(mb, 1)
    edge = (rows == mb - 1).long() * 2 + (pattern.col_indices == nb - 1).long()
    beyond = torch.zeros(4, bm, bn, dtype=torch.bool, device=device)
    beyond[2:, m - (mb - 1) * bm :] = True
    beyond[1::2, :, n - (nb - 1) * bn :] = True
    held = torch.bincount(which, minlength=pattern.num_blocks)
    partial = held < (area - beyond.sum((1, 2)))[edge]
    number = partial.cumsum(0) - 1
    total = int(number[-1]) + 1 if number.numel() else 0
    if not total:
        return pattern
    width = -(-bn // 32)
    counted = partial[which]
    row, column = inside[counted].div(bn, rounding_mode="floor"), inside[counted] % bn
    at = (number[which[counted]] * bm + row) * width + column.div(32, rounding_mode="floor")
    bit = torch.ones((), dtype=torch.int32, device=device) << (column % 32).int()
    # every bit is written once, so that adding is setting
    words = torch.zeros(total * bm * width, dtype=torch.int32, device=device)
    words = words.index_add_(0, at, bit).view(total, bm, width)
    words |= pack_tiles(beyond)[edge[partial]]
    tiles, kind = torch.unique(words, dim=0, return_inverse=True)
    ids = torch.zeros(pattern.num_blocks, dtype=torch.int32, device=device)
    ids[partial] = kind.int() + 1
    return pattern._replace(block_tiles=ids, tiles=tiles)
