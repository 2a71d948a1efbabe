"""The way from any layout to any other: its stored entries as lists, and blocks of such lists.

Nothing here makes a matrix dense, but for a layout that knows no other way: a user's own, by its
`to_dense` or by the `to_scipy` that it brings. Time and memory are those of the stored entries, and
8 bytes an entry and list.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_layouts import csr_lists
from sparse_layouts.block_pattern import (
    BlockPattern,
    build_pattern,
    entry_rows,
    expand_heads,
    pack_tiles,
)
from sparse_layouts.block_values import entry_mask
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.grouped_nm_packing import entry_rows as grouped_rows
from sparse_layouts.grouped_nm_tensor import GroupedNMTensor
from sparse_layouts.layout_autograd import values_of, with_values
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import is_scipy
from sparse_layouts.nm_packing import entry_columns
from sparse_layouts.nm_tensor import NMTensor
from sparse_layouts.stored_entries import short

# A table of all blocks costs a few bytes a block and no sorting: up to so many blocks an entry.
CELLS_PER_ENTRY = 16


class Entries(NamedTuple):
    """The stored entries of the matrices (*lead, M, N) of a pattern, row by row.

    field | shape | dtype | invariant
    ---|---|---|---
    `rows` | (S,) | int64 | pattern * M + row; ascending
    `columns` | (S,) | int64 | ascending and unique within a row
    `slots` | (S,) or None | int64 | where in one sample's flattened values; None: 0..S-1

    `shape` is (M, N). There are prod(lead) patterns, or fewer: then `head_map` says which one every
    leading index has.
    """

    rows: Tensor
    columns: Tensor
    slots: Tensor | None
    shape: tuple[int, int]
    lead: tuple[int, ...] = ()
    head_map: Tensor | None = None

    @property
    def patterns(self) -> int:
        """Different patterns along the leading dimensions."""
        return math.prod(self.lead) if self.head_map is None else int(self.head_map.max()) + 1

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
    return _of_any(layout)


def picked(layout: LayoutTensor, entries: Entries) -> Tensor:
    """(*batch, S): the values of a layout at its :func:`entries_of`, differentiable."""
    values = values_of(layout)
    batch = values.shape[: layout.dim() - layout.pattern_dims]
    flat = values.reshape(*batch, math.prod(values.shape[len(batch) :]))
    return flat if entries.slots is None else flat.index_select(-1, entries.slots)


def _in_row_order(rows: Tensor, columns: Tensor, slots: Tensor | None, width: int) -> Any:
    """Three lists sorted by row and column."""
    keys = rows * width + columns
    if keys.device.type == "cpu":  # numpy sorts with the processor's vector instructions
        order = torch.from_numpy(np.argsort(keys.numpy()))
    else:
        order = keys.argsort()
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
    width = p.crow_indices.diff(dim=1).flatten().long()[block_row] * bn
    block = torch.arange(number, device=p.device)
    r = torch.arange(bm, device=p.device)[:, None]
    c = torch.arange(bn, device=p.device)
    # where entry (r, c) of the t-th block comes row by row: after the block rows above, the rows
    # above in its own, and the blocks left of it
    place = (first * area)[:, None, None] + r * width[:, None, None]
    place += ((block - first) * bn)[:, None, None] + c
    order = torch.empty(number * area, dtype=torch.long, device=p.device)
    order[place.flatten()] = torch.arange(number * area, device=p.device)
    block, inside = order.div(area, rounding_mode="floor"), order.remainder_(area)
    row_of, pattern = block_row % mb, block_row.div(mb, rounding_mode="floor")
    rows = (pattern * m + row_of * bm)[block] + inside.div(bn, rounding_mode="floor")
    columns = p.col_indices.long()[block] * bn + inside % bn
    slots = (block if p.row_slots is None else p.row_slots.long()[block]) * area + inside
    found = Entries(rows, columns, slots, (m, n), p.lead, p.head_map)
    mask = entry_mask(p)
    return found if mask is None else found.where(mask.flatten()[slots])


def _of_nm(layout: NMTensor) -> Entries:
    along = entry_columns(layout.inner_indices, layout.n, layout.m, layout.columns)  # (P, M, E)
    patterns, rows, entries = along.shape
    device = along.device
    if layout.axis == -1:
        line = torch.arange(patterns * rows, device=device).repeat_interleave(entries)
        return Entries(line, along.flatten(), None, layout.matrix_shape, layout.lead)
    first = torch.arange(patterns, device=device)[:, None, None] * layout.columns
    across = torch.arange(rows, device=device)[:, None].expand(along.shape)
    found = _in_row_order((along + first).flatten(), across.flatten(), None, max(rows, 1))
    return Entries(*found, layout.matrix_shape, layout.lead)


def _of_grouped_nm(layout: GroupedNMTensor) -> Entries:
    rows = grouped_rows(layout.inner_columns, layout.n, layout.m, layout.g)  # (Mb, S, n)
    columns = layout.columns()[..., None].expand(rows.shape)
    inside = (rows < layout.rows) & (columns < layout.cols)
    slots = inside.flatten().nonzero()[:, 0]
    at = (rows[inside], columns[inside])
    found = _in_row_order(*(at if layout.axis == -2 else at[::-1]), slots, layout.matrix_shape[1])
    return Entries(*found, layout.matrix_shape)


def _of_any(layout: LayoutTensor) -> Entries:
    """Of a layout that this library does not know: numbers from 1 instead of its values say which
    stored value is which entry.
    """
    m, n = layout.matrix_shape
    lead = lead_of(layout)
    values = layout.stored_values
    if values is None:
        where = layout.to_dense_entries().reshape(-1, n).nonzero()
        return Entries(where[:, 0], where[:, 1], None, (m, n), lead)
    number = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
    numbered = layout.like_self(number.view(values.shape))
    numbered.clear_unstored()
    if layout.dim() != 2:
        dense = numbered.to_dense_entries().reshape(-1, n)
        where = dense.nonzero()
        return Entries(where[:, 0], where[:, 1], dense[tuple(where.T)].long() - 1, (m, n), lead)
    matrix = numbered.to_scipy().tocoo()
    kept = matrix.data != 0
    rows, columns, slots = (
        torch.from_numpy(t[kept].astype(np.int64)).to(values.device)
        for t in (matrix.row, matrix.col, matrix.data)
    )
    return Entries(*_in_row_order(rows, columns, slots - 1, max(n, 1)), (m, n))


# --- blocks ---------------------------------------------------------------------------------------


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


def blocked(entries: Entries, block: tuple[int, int]) -> tuple[BlockPattern, Tensor]:
    """The pattern of the blocks that hold an entry, all of them full, and (S,) int64: where every
    entry lies in its values (nnzb, bm, bn), flattened.
    """
    (m, n), (bm, bn) = entries.shape, block
    mb, nb = -(-m // bm), -(-n // bn)
    patterns = entries.patterns
    pattern, row = entries.rows.div(max(m, 1), rounding_mode="floor"), entries.rows % max(m, 1)
    line = pattern * mb + row.div(bm, rounding_mode="floor")
    keys = line * nb + entries.columns.div(bn, rounding_mode="floor")
    cells, which = distinct(keys, patterns * mb * nb)
    lines = cells.div(max(nb, 1), rounding_mode="floor")
    ends = torch.nn.functional.pad(torch.bincount(lines, minlength=patterns * mb).cumsum(0), (1, 0))
    first = torch.arange(patterns, device=ends.device)[:, None] * mb
    made = build_pattern(
        ends[first + torch.arange(mb + 1, device=ends.device)].int(),
        (cells % max(nb, 1)).int(),
        shape=(m, n),
        block_size=block,
        lead=entries.lead,
        head_map=entries.head_map,
    )
    return made, which * (bm * bn) + row % bm * bn + entries.columns % bn


def into_blocks(source: LayoutTensor, block: tuple[int, int]) -> BSRTensor:
    """The blocks of a layout with values that hold a stored entry, differentiable; 0 in a block
    where the layout stores nothing.
    """
    entries = entries_of(source)
    if entries.head_map is not None:
        raise AssertionError("values have a pattern for every head")
    pattern, place = blocked(entries, block)
    values = picked(source, entries)
    size = (pattern.num_blocks, *block)
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
    pattern, place = blocked(entries, block)
    (m, n), (bm, bn), (mb, nb) = pattern.shape, block, pattern.grid
    device, area = place.device, bm * bn
    which, inside = place.div(area, rounding_mode="floor"), place % area
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
