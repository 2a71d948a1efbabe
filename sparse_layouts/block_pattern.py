"""Which blocks of a matrix are stored, without their values: row lists, column lists, bit tiles and
counts.

A :class:`BlockPattern` is a tuple of plain tensors, so that it can be an inner tensor of a layout,
an argument of an opaque operator and a key of a cache. Everything that is built here costs O(stored
blocks); a matrix of blocks is never made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.derived import derived

WORD_BITS = 32


class BlockPattern(NamedTuple):
    """The stored blocks of a (*lead, M, N) matrix, by row and by column.

    field | shape | dtype | invariant
    ---|---|---|---
    `crow_indices` | (P, Mb+1) | int32 | offsets into `col_indices`, a row of them a pattern
    `col_indices` | (nnzb,) | int32 | block columns, strictly ascending within a block row
    `row_slots` | (nnzb,) or None | int32 | slot in `values` of row-list block t; None: t
    `ccol_indices` | (P, Nb+1) | int32 | offsets into `row_indices`
    `row_indices` | (nnzb,) | int32 | block rows, strictly ascending within a block column
    `col_slots` | (nnzb,) or None | int32 | slot of column-list block t; None: t
    `head_map` | (prod(lead),) or None | int32 | the pattern of each leading index; None: its own
    `block_tiles` | (nnzb,) or None | int32 | by slot: 0 full, t > 0 partial: `tiles[t - 1]`
    `tiles` | (T, bm, ceil(bn/32)) or None | int32 | bit c % 32 of word c // 32: column c
    `block_counts` | (nnzb,) or None | int32 | by slot: times in a softmax, at least 1

    `shape` is (M, N) in entries, `block_size` (bm, bn), `lead` the leading dimensions. M and N need
    not be multiples of the block: the last block row and column reach over the edge, and what lies
    outside is never stored, whatever the bits of a tile say there.
    """

    crow_indices: Tensor
    col_indices: Tensor
    row_slots: Tensor | None
    ccol_indices: Tensor
    row_indices: Tensor
    col_slots: Tensor | None
    head_map: Tensor | None
    block_tiles: Tensor | None
    tiles: Tensor | None
    block_counts: Tensor | None
    shape: tuple[int, int]
    block_size: tuple[int, int]
    lead: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks that the lists hold (each pattern once)."""
        return self.col_indices.shape[0]

    @property
    def num_patterns(self) -> int:
        """Different patterns along the leading dimensions."""
        return self.crow_indices.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns, the last ones possibly cut by the edge."""
        (m, n), (bm, bn) = self.shape, self.block_size
        return -(-m // bm), -(-n // bn)

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.col_indices.device


TENSOR_FIELDS = BlockPattern._fields[:10]


def entry_rows(crow_indices: Tensor, num_blocks: int) -> Tensor:
    """The global block row (pattern * Mb + row) of every entry of the row lists, int64, without a
    host sync.
    """
    return entry_lines(crow_indices, num_blocks).long()


def entry_lines(offsets: Tensor, num_entries: int) -> Tensor:
    """The global line (pattern * lines + line) of every entry of row or column lists, in the dtype
    of `offsets` (P, lines + 1), without a host sync.
    """
    return torch.repeat_interleave(offsets.diff(dim=-1).flatten(), output_size=num_entries)


def line_offsets(counts: Tensor) -> Tensor:
    """int32 (P, lines + 1), from counts (P, lines): where the lines of each pattern begin in one
    list of all, and where its last one ends.
    """
    patterns, lines = counts.shape
    ends = torch.nn.functional.pad(counts.flatten(), (1, 0)).cumsum(0, dtype=torch.int32)
    return ends.as_strided((patterns, lines + 1), (lines, 1)).contiguous()


def column_lists(
    crow_indices: Tensor, col_indices: Tensor, num_block_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Column lists `(ccol_indices, row_indices, position in the row lists)` of row lists; no host
    sync on a GPU.
    """
    patterns = crow_indices.shape[0]
    on_cpu = type(col_indices) is Tensor and col_indices.device.type == "cpu"
    if on_cpu and col_indices.shape[0]:
        # scipy's counting sort, a pattern at a time: 12x faster than torch.sort here
        parts = [
            _columns_of_one(crow_indices[p].numpy(), col_indices.numpy(), num_block_columns)
            for p in range(patterns)
        ]
        starts, row_indices, position = (
            torch.from_numpy(np.concatenate(part) if patterns > 1 else part[0])
            for part in zip(*parts, strict=True)
        )
        return starts.view(patterns, -1), row_indices, position
    return _columns_by_sorting(crow_indices, col_indices, num_block_columns)


def _columns_by_sorting(
    crow_indices: Tensor, col_indices: Tensor, num_block_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`column_lists` by a stable sort."""
    patterns, mb = crow_indices.shape[0], crow_indices.shape[1] - 1
    nnzb, device = col_indices.shape[0], col_indices.device
    columns = patterns * num_block_columns
    dtype = torch.int32 if columns < 2**31 else torch.int64  # the narrower sorts faster
    rows, keys = entry_lines(crow_indices, nnzb), col_indices.to(dtype)
    if patterns > 1:
        pattern = rows.div(max(mb, 1), rounding_mode="floor")
        rows = rows.sub_(pattern, alpha=mb)
        keys = pattern.to(dtype).mul_(num_block_columns).add_(keys)
    keys, position = keys.sort(stable=True)
    edges = torch.arange(columns + 1, dtype=dtype, device=device)
    starts = torch.searchsorted(keys, edges, out_int32=True)
    starts = starts.as_strided((patterns, num_block_columns + 1), (num_block_columns, 1))
    return starts.contiguous(), rows.index_select(0, position).int(), position.int()


def _columns_of_one(
    crow: np.ndarray, columns: np.ndarray, num_block_columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ccol + the pattern's first entry, rows, positions) of one pattern, int32."""
    import scipy.sparse  # 100 ms, so not when the library is imported

    first, last = int(crow[0]), int(crow[-1])
    positions = np.arange(first, last, dtype=np.int32)
    matrix = scipy.sparse.csr_matrix(
        (positions, columns[first:last], crow - crow[0]), shape=(crow.size - 1, num_block_columns)
    ).tocsc()
    starts = matrix.indptr.astype(np.int32, copy=False) + np.int32(first)
    return starts, matrix.indices.astype(np.int32, copy=False), matrix.data


def build_pattern(
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    shape: tuple[int, int],
    block_size: tuple[int, int],
    lead: tuple[int, ...] = (),
    head_map: Tensor | None = None,
    block_tiles: Tensor | None = None,
    tiles: Tensor | None = None,
    block_counts: Tensor | None = None,
) -> BlockPattern:
    """A pattern from its row lists `crow_indices` (P, Mb+1) and `col_indices` (nnzb,); adds the
    column lists.
    """
    ccol, row, position = column_lists(crow_indices, col_indices, -(-shape[1] // block_size[1]))
    return BlockPattern(
        crow_indices.int(),
        col_indices.int(),
        None,
        ccol,
        row,
        position,
        head_map,
        block_tiles,
        tiles,
        block_counts,
        (int(shape[0]), int(shape[1])),
        (int(block_size[0]), int(block_size[1])),
        tuple(int(d) for d in lead),
    )


def transpose_pattern(pattern: BlockPattern) -> BlockPattern:
    """The pattern of the transposed matrix: the two lists change places, slots stay."""
    p = pattern
    tiles = p.tiles
    if tiles is not None:
        tiles = derived(p, "transposed_tiles", lambda: pack_tiles(unpack_tiles(p).mT))
    return p._replace(
        crow_indices=p.ccol_indices,
        col_indices=p.row_indices,
        row_slots=p.col_slots,
        ccol_indices=p.crow_indices,
        row_indices=p.col_indices,
        col_slots=p.row_slots,
        tiles=tiles,
        shape=(p.shape[1], p.shape[0]),
        block_size=(p.block_size[1], p.block_size[0]),
    )


def expand_heads(pattern: BlockPattern) -> BlockPattern:
    """The same pattern with its own lists for every leading index (`head_map` None).

    Layouts with values need it: heads that share a pattern do not share values.
    """
    if pattern.head_map is None:
        return pattern
    return derived(pattern, "expand_heads", lambda: _expand_heads(pattern))


def _expand_heads(p: BlockPattern) -> BlockPattern:
    lead = math.prod(p.lead)
    head_map = torch.arange(lead, device=p.device) if p.head_map is None else p.head_map.long()
    starts, ends = p.crow_indices[head_map, 0], p.crow_indices[head_map, -1]
    lengths = (ends - starts).long()
    bases = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    if type(p.col_indices) is not Tensor:
        raise NotImplementedError(
            "heads that share a pattern must be given lists of their own before torch.compile "
            "traces values onto them: "
            "mask = mask.own_heads()"
        )
    total = int(bases[-1])  # one host sync, once a pattern
    crow = (p.crow_indices[head_map] - starts[:, None] + bases[:-1, None]).int()
    head = torch.arange(lead, device=p.device).repeat_interleave(lengths, output_size=total)
    source = torch.arange(total, device=p.device) - bases[head] + starts[head]
    slots = source if p.row_slots is None else p.row_slots[source].long()
    return build_pattern(
        crow,
        p.col_indices[source],
        shape=p.shape,
        block_size=p.block_size,
        lead=p.lead,
        block_tiles=None if p.block_tiles is None else p.block_tiles[slots],
        tiles=p.tiles,
        block_counts=None if p.block_counts is None else p.block_counts[slots],
    )


def pack_tiles(tiles: Tensor) -> Tensor:
    """Packs bool tiles (T, bm, bn) into int32 words (T, bm, ceil(bn/32)), a bit a column."""
    count, bm, bn = tiles.shape
    words = -(-bn // WORD_BITS)
    padded = torch.nn.functional.pad(tiles, (0, words * WORD_BITS - bn))
    weights = torch.ones((), dtype=torch.int64, device=tiles.device) << torch.arange(
        WORD_BITS, device=tiles.device
    )
    packed = (padded.view(count, bm, words, WORD_BITS).long() * weights).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def unpack_tiles(pattern: BlockPattern) -> Tensor:
    """The bit tiles as bool (T, bm, bn)."""
    assert pattern.tiles is not None
    shifts = torch.arange(WORD_BITS, device=pattern.device, dtype=torch.int32)
    bits = (pattern.tiles[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., : pattern.block_size[1]].bool()


def tile_table(pattern: BlockPattern) -> Tensor:
    """bool (T + 1, bm, bn): entry 0 all True, then the bit tiles; `tile_table(p)[p.block_tiles]` is
    every block.
    """

    def build() -> Tensor:
        full = torch.ones(1, *pattern.block_size, dtype=torch.bool, device=pattern.device)
        return full if pattern.tiles is None else torch.cat([full, unpack_tiles(pattern)])

    return derived(pattern, "tile_table", build)


def dense_counts(pattern: BlockPattern) -> Tensor:
    """int32 (*lead, M, N): how often each entry counts, 0 where nothing is stored. Dense: for
    references and tests.
    """
    p = pattern
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    nnzb = p.num_blocks
    slots = torch.arange(nnzb, device=p.device) if p.row_slots is None else p.row_slots.long()
    tile = torch.zeros(nnzb, dtype=torch.long, device=p.device)
    if p.block_tiles is not None:
        tile = p.block_tiles[slots].long()
    blocks = tile_table(p)[tile].int()
    if p.block_counts is not None:
        blocks = blocks * p.block_counts[slots].int()[:, None, None]
    rows = entry_rows(p.crow_indices, nnzb)
    out = torch.zeros(p.num_patterns * mb, nb, bm, bn, dtype=torch.int32, device=p.device)
    out[rows, p.col_indices.long()] = blocks
    out = out.view(p.num_patterns, mb, nb, bm, bn).transpose(2, 3)
    out = out.reshape(p.num_patterns, mb * bm, nb * bn)[:, :m, :n]
    if p.head_map is not None:
        out = out[p.head_map.long()]
    return out.reshape(*p.lead, m, n)


def interval_tiles(starts: np.ndarray, stops: np.ndarray, columns: int) -> np.ndarray:
    """Packed tiles (T, bm, ceil(columns/32)) on the host: row r of tile t is True from column
    `starts[t, r]` to before `stops[t, r]`, both from 0 to `columns`.
    """
    words = -(-columns // WORD_BITS)
    right = np.arange(words * WORD_BITS) >= np.arange(columns + 1)[:, None]
    from_column = np.packbits(right, axis=1, bitorder="little").view("<i4")  # (columns + 1, words)
    return from_column[starts] & ~from_column[stops]


def send_together(arrays: Sequence[np.ndarray | None], device: torch.device) -> list[Any]:
    """int32 tensors on `device` of small arrays of the host, views of one buffer; None stays.

    One copy, on a GPU from pinned memory, so that nobody waits for it.
    """
    sizes = [0 if array is None else array.size for array in arrays]
    pinned = device.type == "cuda"
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=pinned)
    host = buffer.numpy()
    end = 0
    for array, size in zip(arrays, sizes, strict=True):
        if array is not None:
            host[end : end + size] = array.reshape(-1)
            end += size
    moved = buffer.to(device, non_blocking=True).split(sizes)
    return [
        None if array is None else part.view(array.shape)
        for array, part in zip(arrays, moved, strict=True)
    ]
