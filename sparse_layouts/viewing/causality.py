"""Whether a mask is causal: no token attends to a later one."""

from __future__ import annotations

import numpy as np

from sparse_layouts.block_pattern import BlockPattern, tile_table
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.entry_lists import entries_of
from sparse_layouts.layout_tensor import LayoutTensor


def is_causal(layout: LayoutTensor) -> bool:
    """Whether every stored entry (i, j) has j <= i, by token, in every head.

    O(block rows) for a block layout whose blocks end at the diagonal, O(stored entries) for others.

    >>> import sparse_layouts as sl
    >>> from sparse_layouts.viewing.causality import is_causal
    >>> is_causal(sl.causal(100, block_size=16)), is_causal(sl.causal(100, block_size=16).mT)
    (True, False)
    """
    if isinstance(layout, BSRTensor):
        return _blocks_are_causal(layout.block_pattern)
    found = entries_of(layout)
    return bool((found.columns <= found.rows % max(1, found.shape[0])).all())


def _blocks_are_causal(p: BlockPattern) -> bool:
    (m, n), (bm, bn), (mb, _) = p.shape, p.block_size, p.grid
    crow, columns = p.crow_indices.cpu().numpy(), p.col_indices.cpu().numpy()
    if not columns.size:
        return True
    # the last blocks of each row: those that may reach over the diagonal lie within this distance
    checked = 1 + -(-bm // bn)
    for back in range(1, checked + 1):
        at = crow[:, 1:] - back
        own = at >= crow[:, :-1]
        row = np.broadcast_to(np.arange(mb), at.shape)[own]
        place = at[own]
        column = columns[place].astype(np.int64)
        first_row, last_column = row * bm, np.minimum((column + 1) * bn, n) - 1
        crossing = last_column > first_row
        row, column, place = row[crossing], column[crossing], place[crossing]
        if not row.size:
            return True  # columns ascend: what lies before is further left
        if (column * bn > np.minimum((row + 1) * bm, m) - 1).any():
            return False
        if not _tiles_are_causal(p, row, column, place):
            return False
    return True


def _tiles_are_causal(
    p: BlockPattern, row: np.ndarray, column: np.ndarray, place: np.ndarray
) -> bool:
    """Whether blocks that the diagonal crosses store nothing above it."""
    (m, n), (bm, bn) = p.shape, p.block_size
    slots = place if p.row_slots is None else p.row_slots.cpu().numpy()[place]
    tile = np.zeros_like(slots) if p.block_tiles is None else p.block_tiles.cpu().numpy()[slots]
    # what a block stores inside the matrix depends on its tile, its distance and where that ends
    height, width = np.minimum(m - row * bm, bm), np.minimum(n - column * bn, bn)
    distance = row * bm - column * bn
    sizes = (p.tiles.shape[0] + 1 if p.tiles is not None else 1, bm + bn + 1, bm + 1, bn + 1)
    parts = (tile, distance - distance.min(), height, width)
    table = tile_table(p).cpu().numpy()
    r, c = np.arange(bm)[:, None], np.arange(bn)
    for kind in np.unique(np.ravel_multi_index(parts, sizes)):
        t, offset, h, w = np.unravel_index(kind, sizes)
        if (table[t][:h, :w] & (c > r + offset + distance.min())[:h, :w]).any():
            return False
    return True
