"""How full each cell of a picture is: a layout's pattern, divided into at most so many cells.

Counted from the lists, in numpy and never by way of a dense matrix, but for layouts that are known
by theirs alone. A pattern of more than `MOST_READ` blocks is read in part, and the picture says so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from sparse_layouts.block_pattern import BlockPattern, tile_table, transpose_pattern
from sparse_layouts.block_values import block_entries, special_blocks
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.grouped_nm_tensor import GroupedNMTensor
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.nm_packing import stored_places, words_per_row
from sparse_layouts.nm_tensor import NMTensor
from sparse_layouts.reordered_tensor import ReorderedTensor
from sparse_layouts.viewing.head_names import head_names

MAX_CELLS = 64
MOST_READ = 2**20
# What a layout without lists may have at most: it is drawn by way of its dense matrix.
MAX_DENSE_ENTRIES = 2**22
CORNER = 32

Pair = tuple[int, int]


class Panel(NamedTuple):
    """One matrix of the picture: what stands above it, and of each of its (rows, columns) cells the
    stored entries and all entries that were looked at.
    """

    label: str
    stored: np.ndarray
    entries: np.ndarray

    @property
    def density(self) -> np.ndarray:
        """float64 (rows, columns): how full each cell is, from 0 to 1."""
        return self.stored / np.maximum(self.entries, 1)


class Cells(NamedTuple):
    """The panels of a picture, a panel a different head; how many are left out; how much of the
    matrix a cell is; what the reader has to know of it.
    """

    panels: list[Panel]
    left_out: int
    size: Pair
    of: str
    note: str = ""

    @property
    def unit(self) -> str:
        """What a cell is, in words."""
        if self.size == (1, 1):
            return f"a cell is {'an' if self.of == 'entry' else 'a'} {self.of}"
        plural = "entries" if self.of == "entry" else self.of + "s"
        return f"a cell is {self.size[0]} x {self.size[1]} {plural}"

    def coarser(self) -> Cells:
        """The same with cells of twice the edge."""
        panels = [p._replace(stored=_paired(p.stored), entries=_paired(p.entries)) for p in self[0]]
        return self._replace(panels=panels, size=(2 * self.size[0], 2 * self.size[1]))


def cells_of(layout: LayoutTensor, max_panels: int, max_cells: int = MAX_CELLS) -> Cells:
    """The cells of a layout's different heads, `max_panels` of them, each of at most `max_cells` x
    `max_cells`. Raises `ValueError` for what cannot be drawn: a layout without lists that is too
    large to be made dense, or one without contents.
    """
    if layout.device.type == "meta":
        raise ValueError(f"a {type(layout).__name__} on the meta device has no pattern to draw")
    if isinstance(layout, BSRTensor):
        return _of_blocks(layout.block_pattern, max_panels, max_cells)
    if isinstance(layout, CompressedTensor):
        return _of_entries(layout, max_cells)
    if isinstance(layout, NMTensor):
        return _of_groups(layout, max_panels, max_cells)
    if isinstance(layout, GroupedNMTensor):
        return _of_grouped_rows(layout, max_cells)
    if isinstance(layout, ReorderedTensor):
        return _of_reordered(layout, max_panels, max_cells)
    return _of_dense(layout, max_panels, max_cells)


def group_of(count: int, max_cells: int) -> int:
    """How many rows share a cell, so that there are at most `max_cells` cells."""
    return max(1, -(-count // max_cells))


def _lengths(total: int, step: int) -> np.ndarray:
    """int64: the lengths of the pieces of `total` cut into steps, the last one shorter."""
    return np.minimum(total - np.arange(0, total, step), step)


def _paired(cells: np.ndarray) -> np.ndarray:
    rows, columns = cells.shape
    padded = np.pad(cells, ((0, rows % 2), (0, columns % 2)))
    return padded.reshape(-(-rows // 2), 2, -(-columns // 2), 2).sum((1, 3))


def _pooled(stored: np.ndarray, cell: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Stored entries and all entries of each cell of a bool matrix (M, N)."""
    (m, n), (a, b) = stored.shape, cell
    padded = np.pad(stored, ((0, -m % a), (0, -n % b)))
    sums = padded.reshape(-(-m // a), a, -(-n // b), b).sum((1, 3))
    return sums, np.outer(_lengths(m, a), _lengths(n, b))


# --- blocks ---------------------------------------------------------------------------------------


def _of_blocks(p: BlockPattern, max_panels: int, max_cells: int) -> Cells:
    which = list(range(p.num_patterns)) if p.head_map is None else p.head_map.tolist()
    different = list(dict.fromkeys(which))
    shown = different[:max_panels]
    names = [head_names([i for i, w in enumerate(which) if w == s], p.lead) for s in shown]
    left_out = len(different) - len(shown)
    if max(p.shape) <= max_cells:
        entries = [_entries(p, each) for each in shown]
        panels = [Panel(n, e, np.ones_like(e)) for n, e in zip(names, entries, strict=True)]
        return Cells(panels, left_out, (1, 1), "entry")
    group = (group_of(p.grid[0], max_cells), group_of(p.grid[1], max_cells))
    crow = p.crow_indices.cpu().numpy()
    blocks = sum(int(crow[each, -1] - crow[each, 0]) for each in shown)
    rows_read = max(1, math.ceil(group[0] * min(1.0, MOST_READ / max(1, blocks))))
    special = block_entries(p, special_blocks(p))
    panels = [
        Panel(name, *_binned(p, crow[each], each, group, rows_read, special))
        for name, each in zip(names, shown, strict=True)
    ]
    note = _read_in_part(rows_read, group[0], "block rows")
    return Cells(panels, left_out, group, "block", note)


def _of_reordered(layout: ReorderedTensor, max_panels: int, max_cells: int) -> Cells:
    p, lines = layout.block_pattern, "rows"
    if layout.axis == -1:
        p, lines = transpose_pattern(p), "columns"
    found = _of_blocks(p, max_panels, max_cells)
    stored = f"{lines} in the order in which they are stored"
    return found._replace(note=f"{stored}; {found.note}" if found.note else stored)


def _read_in_part(rows_read: int, rows: int, what: str) -> str:
    if rows_read >= rows:
        return ""
    return f"drawn from {rows_read} of the {rows} {what} of every cell"


def _rows_of_cells(rows: int, group: int, rows_read: int) -> list[Pair]:
    """The rows start..stop that are read of each cell: `rows_read` in its middle."""
    found = []
    for low in range(0, rows, group):
        high = min(low + group, rows)
        count = min(rows_read, high - low)
        start = low + (high - low - count) // 2
        found.append((start, start + count))
    return found


def _binned(
    p: BlockPattern,
    crow: np.ndarray,
    which: int,
    group: Pair,
    rows_read: int,
    special: tuple[np.ndarray, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Stored and all entries of the cells of `group` blocks of one pattern."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    columns = p.col_indices[int(crow[0]) : int(crow[-1])].cpu().numpy()
    read = _rows_of_cells(mb, group[0], rows_read)
    stored = _counted(crow - crow[0], columns, read, group[1], -(-nb // group[1])) * (bm * bn)
    # the few blocks that are not whole
    rows, block_columns, entries = special
    own = (rows >= which * mb) & (rows < (which + 1) * mb)
    row, column, missing = rows[own] - which * mb, block_columns[own], bm * bn - entries[own]
    place = row // group[0]
    starts, stops = np.array(read, np.int64).reshape(-1, 2).T
    inside = (row >= starts[place]) & (row < stops[place])
    np.subtract.at(stored, (place[inside], column[inside] // group[1]), missing[inside])
    heights = [min(stop * bm, m) - start * bm for start, stop in read]
    return stored, np.outer(heights, _lengths(n, group[1] * bn))


def _counted(
    crow: np.ndarray, columns: np.ndarray, read: list[Pair], group: int, cells: int
) -> np.ndarray:
    """int64 (rows of cells, cells): how many of `columns` the rows that are read have in each."""
    out = np.zeros((len(read), cells), np.int64)
    for place, (start, stop) in enumerate(read):
        piece = columns[crow[start] : crow[stop]]
        out[place] = np.bincount(piece // group if group > 1 else piece, minlength=cells)
    return out


def _entries(p: BlockPattern, which: int) -> np.ndarray:
    """int64 (M, N) of a small matrix: 1 where an entry is stored."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    crow = p.crow_indices[which].cpu().numpy()
    first, last = int(crow[0]), int(crow[-1])
    rows = np.repeat(np.arange(mb), np.diff(crow))
    slots = np.arange(first, last) if p.row_slots is None else _host(p.row_slots)[first:last]
    tile = np.zeros_like(slots) if p.block_tiles is None else _host(p.block_tiles)[slots]
    out = np.zeros((mb, nb, bm, bn), np.int64)
    out[rows, _host(p.col_indices)[first:last]] = tile_table(p).cpu().numpy()[tile]
    return out.transpose(0, 2, 1, 3).reshape(mb * bm, nb * bn)[:m, :n]


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


# --- single entries -------------------------------------------------------------------------------


def _of_entries(layout: CompressedTensor, max_cells: int) -> Cells:
    crow, columns = (_host(each) for each in layout.lists)
    rows, width = layout.compressed_shape
    group = (group_of(rows, max_cells), group_of(width, max_cells))
    rows_read = max(1, math.ceil(group[0] * min(1.0, MOST_READ / max(1, columns.size))))
    read = _rows_of_cells(rows, group[0], rows_read)
    stored = _counted(crow, columns, read, group[1], -(-width // group[1]))
    entries = np.outer([stop - start for start, stop in read], _lengths(width, group[1]))
    what = "rows" if layout.by_rows else "columns"
    note = _read_in_part(rows_read, group[0], what)
    if not layout.by_rows:
        stored, entries, group = stored.T, entries.T, group[::-1]
    return Cells([Panel("", stored, entries)], 0, group, "entry", note)


# --- n of every m ---------------------------------------------------------------------------------


def _of_groups(layout: NMTensor, max_panels: int, max_cells: int) -> Cells:
    """Cells of whole groups are n / m full, whatever is stored: then the corner shows more."""
    n, m, rows, columns = layout.n, layout.m, layout.rows, layout.columns
    group = (group_of(rows, max_cells), group_of(columns, max_cells))
    if group[1] > 1:
        group = (group[0], -(-group[1] // m) * m)
    words = layout.inner_indices[:max_panels]
    patterns = math.prod(layout.lead)
    names = [head_names([i], layout.lead) for i in range(min(patterns, max_panels))]
    if group == (1, 1) or group[1] == 1:
        places = _host(stored_places(words, n, m, columns))
        cells = [_pooled(each, group) for each in places]
    else:
        areas = np.outer(_lengths(rows, group[0]), _lengths(columns, group[1]))
        cells = [(areas * n // m, areas)] * len(names)
    panels = [Panel(name, *each) for name, each in zip(names, cells, strict=True)]
    if layout.axis == -2:
        panels = [p._replace(stored=p.stored.T, entries=p.entries.T) for p in panels]
        group = group[::-1]
    if group != (1, 1) and panels:
        panels.append(_corner_panel(layout))
    return Cells(panels, max(0, patterns - max_panels), group, "entry")


def corner_of(layout: NMTensor | GroupedNMTensor) -> np.ndarray:
    """bool: which entries are stored in the upper left corner of an n:m layout (of its first head),
    at most 32 x 32 of them and no group cut.
    """
    m = layout.m
    across = max(CORNER // m, 1) * m
    if isinstance(layout, GroupedNMTensor):
        corner = _rows_of_grouped(layout, 0, min(layout.rows, across))[:, :CORNER]
        return corner if layout.axis == -2 else corner.T
    wide = min(layout.columns, across)
    words = layout.inner_indices[0, :CORNER, : words_per_row(wide // m * layout.n, m)]
    corner = _host(stored_places(words, layout.n, m, wide))
    return corner if layout.axis == -1 else corner.T


def _corner_panel(layout: NMTensor | GroupedNMTensor) -> Panel:
    stored = corner_of(layout).astype(np.int64)
    rows, columns = stored.shape
    return Panel(f"upper left {rows} x {columns} entries", stored, np.ones_like(stored))


def _of_grouped_rows(layout: GroupedNMTensor, max_cells: int) -> Cells:
    n, m, rows, columns = layout.n, layout.m, layout.rows, layout.cols
    group = (group_of(rows, max_cells), group_of(columns, max_cells))
    if group[0] > 1:
        group = (-(-group[0] // m) * m, group[1])
    whole = rows // m * m  # the rows of whole groups, of which every column keeps n in m
    if group[0] == 1:
        stored, entries = _pooled(_rows_of_grouped(layout, 0, rows), group)
    else:
        entries = np.outer(_lengths(rows, group[0]), _lengths(columns, group[1]))
        heights = _lengths(rows, group[0]) // m * m  # of whole groups
        stored = np.outer(heights, _lengths(columns, group[1])) * n // m
        if stored.size and whole < rows:
            stored[-1] += _pooled(_rows_of_grouped(layout, whole, rows), (m, group[1]))[0][0]
    panels = [Panel("", stored, entries)]
    if layout.axis == -1:
        panels = [p._replace(stored=p.stored.T, entries=p.entries.T) for p in panels]
        group = group[::-1]
    if group != (1, 1) and stored.size:
        panels.append(_corner_panel(layout))
    return Cells(panels, 0, group, "entry")


def _rows_of_grouped(layout: GroupedNMTensor, start: int, stop: int) -> np.ndarray:
    """bool (stop - start, columns): which entries are stored; `start` begins a group of m."""
    m = layout.m
    part = layout.inner_columns[start // m : -(-stop // m)]
    static = {**layout.static(), "rows": stop - start, "axis": -2}
    shape = (stop - start, layout.cols)
    mask = GroupedNMTensor(None, part, shape=shape, dtype=torch.bool, **static)
    return _host(mask.to_dense_entries())


# --- any other layout -----------------------------------------------------------------------------


def _of_dense(layout: LayoutTensor, max_panels: int, max_cells: int) -> Cells:
    if layout.shape.numel() > MAX_DENSE_ENTRIES:
        raise ValueError(
            f"a {type(layout).__name__} is drawn by way of its dense matrix, which may have up to "
            f"{MAX_DENSE_ENTRIES} entries; this one has {layout.shape.numel()}"
        )
    dense = _host(layout.to_dense_entries().detach() != 0)
    lead, (m, n) = tuple(dense.shape[:-2]), dense.shape[-2:]
    cell = (group_of(m, max_cells), group_of(n, max_cells))
    matrices = dense.reshape(math.prod(lead), m, n)
    panels = [
        Panel(head_names([i], lead), *_pooled(each, cell))
        for i, each in enumerate(matrices[:max_panels])
    ]
    return Cells(panels, max(0, len(matrices) - max_panels), cell, "entry")
