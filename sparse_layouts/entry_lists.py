"""Where the stored entries of any layout lie, row by row: what every conversion goes through.

Nothing here makes a matrix dense, but for a layout that knows no other way: a user's own, by its
`to_dense` or by the `to_scipy` that it brings. Time and memory are those of the stored entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_layouts import csr_lists
from sparse_layouts.block_pattern import entry_rows, expand_heads
from sparse_layouts.block_values import entry_mask
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.grouped_nm_packing import entry_rows as grouped_rows
from sparse_layouts.grouped_nm_tensor import GroupedNMTensor
from sparse_layouts.layout_autograd import values_of
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.nm_packing import entry_columns
from sparse_layouts.nm_tensor import NMTensor
from sparse_layouts.reordered_tensor import ReorderedTensor


class Entries(NamedTuple):
    """The stored entries of the matrices (*lead, M, N) of a pattern, row by row.

    field | shape | dtype | invariant
    ---|---|---|---
    `rows` | (S,) | int64 | pattern * M + row; ascending
    `columns` | (S,) | int64 | ascending and unique within a row
    `slots` | (S,) or None | int64 | where in one sample's flattened values; None: 0..S-1

    `shape` is (M, N). There are `patterns` of them, one for every leading index, or fewer: then
    `head_map` says which one each has.
    """

    rows: Tensor
    columns: Tensor
    slots: Tensor | None
    shape: tuple[int, int]
    lead: tuple[int, ...] = ()
    patterns: int = 1
    head_map: Tensor | None = None

    def where(self, kept: Tensor) -> Entries:
        """Those of the entries for which `kept`, bool (S,), is True."""
        slots = kept.nonzero()[:, 0] if self.slots is None else self.slots[kept]
        return self._replace(rows=self.rows[kept], columns=self.columns[kept], slots=slots)


def lead_of(layout: LayoutTensor) -> tuple[int, ...]:
    """The leading sizes of a layout that have a pattern each."""
    return tuple(layout.shape[layout.dim() - layout.pattern_dims : -2])


def entries_of(layout: LayoutTensor) -> Entries:
    """Where the stored entries of any layout lie; of a batch, those of one sample.

    Explicit zeros are stored. What lies in a block's room but is not stored (bit tiles, over the
    edge) is not.
    """
    if isinstance(layout, CompressedTensor):
        return _of_lists(layout)
    if isinstance(layout, BSRTensor):
        return _of_blocks(layout)
    if isinstance(layout, NMTensor):
        return _of_nm(layout)
    if isinstance(layout, GroupedNMTensor):
        return _of_grouped_nm(layout)
    if isinstance(layout, ReorderedTensor):
        return _of_reordered(layout)
    return _of_any(layout)


def picked(layout: LayoutTensor, entries: Entries) -> Tensor:
    """(*batch, S): the values of a layout at its :func:`entries_of`, differentiable."""
    values = layout.values() if isinstance(layout, NMTensor) else values_of(layout)
    batch = values.shape[: layout.dim() - layout.pattern_dims]
    flat = values.reshape(*batch, math.prod(values.shape[len(batch) :]))
    return flat if entries.slots is None else flat.index_select(-1, entries.slots)


def _in_row_order(
    rows: Tensor, columns: Tensor, slots: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Three lists sorted by row and column; `shape` bounds rows and columns."""
    if rows.device.type == "cpu" and rows.shape[0]:
        import scipy.sparse  # 100 ms, so not when the library is imported

        # scipy's counting sort: several times faster than sorting keys
        number = np.arange(rows.shape[0])
        listed = scipy.sparse.coo_array((number, (rows.numpy(), columns.numpy())), shape).tocsr()
        order = torch.from_numpy(listed.data)
        lengths = torch.from_numpy(listed.indptr).long().diff()
        rows = torch.arange(shape[0]).repeat_interleave(lengths)
        columns = torch.from_numpy(listed.indices).long()
        return rows, columns, order if slots is None else slots[order]
    order = (rows * shape[1] + columns).argsort()
    return rows[order], columns[order], order if slots is None else slots[order]


def _of_lists(layout: CompressedTensor) -> Entries:
    compressed, indices = layout.lists
    slots = None
    if not layout.by_rows:
        found = csr_lists.transposed_lists(compressed, indices, layout.compressed_shape)
        compressed, indices, slots = found[0], found[1], found[2].long()
    rows = csr_lists.entry_rows(compressed, indices.shape[0])
    return Entries(rows, indices.long(), slots, layout.matrix_shape)


def _of_blocks(layout: BSRTensor) -> Entries:
    p = layout.block_pattern
    p = p if layout.is_mask else expand_heads(p)
    (m, n), (bm, bn), mb = p.shape, p.block_size, max(p.grid[0], 1)
    number, area = p.num_blocks, bm * bn
    block_row = entry_rows(p.crow_indices, number)  # (nnzb,), of all patterns
    first = p.crow_indices[:, :-1].flatten().long()[block_row]
    width = p.crow_indices.diff(dim=1).flatten().long()[block_row]
    block = torch.arange(number, device=p.device)
    r, c = torch.arange(bm, device=p.device), torch.arange(bn, device=p.device)
    # where row r of the t-th block comes row by row: after the block rows above, the rows above in
    # its own, and the blocks left of it
    place = (first * bm + block - first)[:, None] + r * width[:, None]
    order = torch.empty(number * bm, dtype=torch.long, device=p.device)
    order[place.flatten()] = torch.arange(number * bm, device=p.device)
    block, inside = order.div(bm, rounding_mode="floor"), order % bm
    row_of, pattern = block_row % mb, block_row.div(mb, rounding_mode="floor")
    rows = (pattern * m + row_of * bm)[block] + inside
    columns = p.col_indices.long()[block] * bn
    slots = (block if p.row_slots is None else p.row_slots.long()[block]) * area + inside * bn
    rows, columns, slots = (  # the bn entries of each row of a block
        rows[:, None].expand(-1, bn).flatten(),
        (columns[:, None] + c).flatten(),
        (slots[:, None] + c).flatten(),
    )
    found = Entries(rows, columns, slots, (m, n), p.lead, p.num_patterns, p.head_map)
    mask = entry_mask(p)
    return found if mask is None else found.where(mask.flatten()[slots])


def _of_nm(layout: NMTensor) -> Entries:
    along = entry_columns(layout.row_indices(), layout.n, layout.m, layout.columns)  # (P, M, E)
    patterns, rows, entries = along.shape
    device = along.device
    if layout.axis == -1:
        line = torch.arange(patterns * rows, device=device).repeat_interleave(entries)
        return Entries(line, along.flatten(), None, layout.matrix_shape, layout.lead, patterns)
    first = torch.arange(patterns, device=device)[:, None, None] * layout.columns
    across = torch.arange(rows, device=device)[:, None].expand(along.shape)
    size = (patterns * layout.columns, rows)
    found = _in_row_order((along + first).flatten(), across.flatten(), None, size)
    return Entries(*found, layout.matrix_shape, layout.lead, patterns)


def _of_grouped_nm(layout: GroupedNMTensor) -> Entries:
    rows = grouped_rows(layout.inner_columns, layout.n, layout.m, layout.g)  # (Mb, S, n)
    columns = layout.columns()[..., None].expand(rows.shape)
    inside = (rows < layout.rows) & (columns < layout.cols)
    slots = inside.flatten().nonzero()[:, 0]
    down, across = rows[inside], columns[inside]
    if layout.axis == -1:
        down, across = across, down
    found = _in_row_order(down, across, slots, layout.matrix_shape)
    return Entries(*found, layout.matrix_shape)


def _of_reordered(layout: ReorderedTensor) -> Entries:
    stored = _of_blocks(BSRTensor.on_pattern(None, layout.block_pattern))
    down, across = layout.inner_row_order.long()[stored.rows], stored.columns
    if layout.axis == -1:
        down, across = across, down
    return Entries(
        *_in_row_order(down, across, stored.slots, layout.matrix_shape), layout.matrix_shape
    )


def _of_any(layout: LayoutTensor) -> Entries:
    """Of a layout that this library does not know: numbers from 1 instead of its values say which
    stored value is which entry.
    """
    m, n = layout.matrix_shape
    lead = lead_of(layout)
    values = layout.stored_values
    if values is None:
        where = layout.to_dense_entries().flatten(0, -2).nonzero()
        return Entries(where[:, 0], where[:, 1], None, (m, n), lead, math.prod(lead))
    number = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
    numbered = layout.like_self(number.view(values.shape))
    numbered.clear_unstored()
    if layout.dim() != 2:
        dense = numbered.to_dense_entries().flatten(0, -2)
        where = dense.nonzero()
        slots = dense[tuple(where.T)].long() - 1
        return Entries(where[:, 0], where[:, 1], slots, (m, n), lead, math.prod(lead))
    matrix = numbered.to_scipy().tocoo()
    kept = matrix.data != 0
    rows, columns, slots = (
        torch.from_numpy(t[kept].astype(np.int64)).to(values.device)
        for t in (matrix.row, matrix.col, matrix.data)
    )
    return Entries(*_in_row_order(rows, columns, slots - 1, (m, n)), (m, n))
