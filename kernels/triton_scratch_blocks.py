"""Stored blocks on their way to and from a dense matrix in scratch memory: of any edges, strides
and dtype, as integers of the entries' size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.scratch_products import INTEGERS, Piece, pieces, row_pitch
from sparse_layouts.kernels.triton_common import kernel_signature, stored_bits

# Entries of a tile, its most rows and its most columns: those of a block side by side with its
# neighbours in the list, so that blocks of one row or of one column fill a tile too.
TILE_ENTRIES = 2048
TILE_ROWS = 32
TILE_COLUMNS = 1024
WARPS = 4


# Strides are specialised (divisible by 16 or not: the width of a load), sizes are not.
@triton.jit(
    do_not_specialize=["M", "N", "patterns", "block_rows", "first_row", "piece_rows", "splits"]
)
def move_blocks_kernel(
    values_ptr,
    dense_ptr,
    crow_ptr,
    col_ptr,
    slots_ptr,
    block_tiles_ptr,
    tiles_ptr,
    M,
    N,
    patterns,
    block_rows,
    first_row,
    piece_rows,
    splits,
    stride_values_batch,
    stride_values_slot,
    stride_values_m,
    stride_values_n,
    stride_dense_matrix,
    stride_dense_m,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    GATHER: tl.constexpr,
):
    SLICES: tl.constexpr = (BM + TILE_M - 1) // TILE_M
    pid = tl.program_id(0)
    split = pid % splits
    offs_m = (pid // splits) % SLICES * TILE_M + tl.arange(0, TILE_M)  # rows within the block
    row = (pid // splits // SLICES) % piece_rows
    matrix = (pid // splits // SLICES // piece_rows).to(tl.int64)
    block_row = first_row + row
    crow_ptr += matrix % patterns * (block_rows + 1) + block_row
    start = tl.load(crow_ptr)
    stored = (tl.load(crow_ptr + 1) - start) * BN  # columns of the row's blocks, side by side

    mask_m = offs_m < BM
    inside_m = mask_m & (block_row * BM + offs_m < M)
    values_ptr += matrix // patterns * stride_values_batch
    values_rows = offs_m.to(tl.int64) * stride_values_m
    dense_ptr += matrix * stride_dense_matrix
    dense_rows = (row * BM + offs_m).to(tl.int64) * stride_dense_m
    for first in range(split * TILE_N, stored, splits * TILE_N):
        offs_n = first + tl.arange(0, TILE_N)
        mask_n = offs_n < stored
        position = start + offs_n // BN
        offs_in_block = offs_n % BN
        slot = position
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + position, mask=mask_n, other=0)
        columns = tl.load(col_ptr + position, mask=mask_n, other=0) * BN + offs_in_block
        inside = inside_m[:, None] & (mask_n & (columns < N))[None, :]
        values_columns = slot.to(tl.int64) * stride_values_slot
        values_columns += offs_in_block.to(tl.int64) * stride_values_n
        values = values_ptr + values_rows[:, None] + values_columns[None, :]  # [TILE_M, TILE_N]
        dense = dense_ptr + dense_rows[:, None] + columns[None, :]
        if GATHER:
            # what lies over the edge, and what a bit tile leaves out, is stored as 0
            if block_tiles_ptr is not None:
                tile = tl.load(block_tiles_ptr + slot, mask=mask_n, other=0)[None, :]
                rows_in_tile = tl.where(mask_m, offs_m, 0)
                inside = inside & stored_bits(
                    tiles_ptr, tile, rows_in_tile[:, None], offs_in_block[None, :], BM, BN
                )
            found = tl.load(dense, mask=inside, other=0)
            tl.store(values, found, mask=mask_m[:, None] & mask_n[None, :])
        else:
            tl.store(dense, tl.load(values, mask=inside, other=0), mask=inside)


def block_row_pieces(
    pattern: BlockPattern, batch: int, dtype: torch.dtype
) -> Iterator[tuple[Piece, slice]]:
    """Pieces of (batch, patterns) dense matrices, whose parts are block rows, and the rows that
    these are; none over the scratch memory unless a single block row is.
    """
    (m, n), bm = pattern.shape, pattern.block_size[0]
    row_bytes = row_pitch(n, dtype) * dtype.itemsize
    for piece in pieces(batch, pattern.num_patterns, pattern.grid[0], bm * row_bytes):
        yield piece, slice(piece.part.start * bm, min(m, piece.part.stop * bm))


def scatter_blocks(dense: Tensor, values: Tensor, pattern: BlockPattern, piece: Piece) -> None:
    """Writes the stored blocks of a piece over zeros: values (B, S, bm, bn), any strides, to dense
    (B, P, rows, N) from `ScratchMatrices`, P and rows the piece's.
    """
    _move(dense.zero_(), values, pattern, piece, gather=False)


def gather_blocks(values: Tensor, dense: Tensor, pattern: BlockPattern, piece: Piece) -> None:
    """Writes the blocks of a piece's dense product to their slots, 0 at what is not stored; shapes
    as of `scatter_blocks`.
    """
    _move(dense, values, pattern, piece, gather=True)


def _move(
    dense: Tensor, values: Tensor, pattern: BlockPattern, piece: Piece, *, gather: bool
) -> None:
    p, size = pattern, values.element_size()
    partial = gather and p.block_tiles is not None
    constexprs, options = _config(p.block_size, gather)
    batch, patterns = dense.shape[:2]
    piece_rows = piece.part.stop - piece.part.start
    mean = p.num_blocks * p.block_size[1] // (p.num_patterns * p.grid[0])
    splits = max(1, triton.cdiv(mean, constexprs["TILE_N"]))
    slices = triton.cdiv(p.block_size[0], constexprs["TILE_M"])
    with torch.cuda.device_of(dense):
        move_blocks_kernel[(splits * slices * piece_rows * patterns * batch,)](
            values.view(INTEGERS[size]),
            dense.view(INTEGERS[size]),
            p.crow_indices[piece.patterns],
            p.col_indices,
            p.row_slots,
            p.block_tiles if partial else None,
            p.tiles if partial else None,
            *p.shape,
            patterns,
            p.grid[0],
            piece.part.start,
            piece_rows,
            splits,
            *values.stride(),
            *dense.stride()[1:3],
            **constexprs,
            **options,
        )


def compilations() -> Iterator[Compilation]:
    """Both ways: blocks of one row, of one column, of odd edges; sizes of an entry; transposes, bit
    tiles.
    """
    for gather in (False, True):
        for block_size in ((1, 32), (32, 1), (5, 5), (16, 16), (24, 24), (64, 64)):
            yield _compilation(block_size, 2, gather)
        for size in (4, 8):
            yield _compilation((1, 32), size, gather)
        yield _compilation((24, 24), 2, gather, transposed=True)
    yield _compilation((5, 48), 4, True, partial=True)


def _config(block_size: tuple[int, int], gather: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    rows = min(TILE_ROWS, triton.next_power_of_2(block_size[0]))
    constexprs = {
        "BM": block_size[0],
        "BN": block_size[1],
        "TILE_M": rows,
        "TILE_N": min(TILE_COLUMNS, TILE_ENTRIES // rows),
        "GATHER": gather,
    }
    return constexprs, {"num_warps": WARPS}


def _compilation(
    block_size: tuple[int, int],
    size: int,
    gather: bool,
    *,
    transposed: bool = False,
    partial: bool = False,
) -> Compilation:
    constexprs, options = _config(block_size, gather)
    constexprs["stride_values_m" if transposed else "stride_values_n"] = 1
    if not transposed:
        constexprs["slots_ptr"] = None
    if not partial:
        constexprs["block_tiles_ptr"] = constexprs["tiles_ptr"] = None
    pointers = dict.fromkeys(("values_ptr", "dense_ptr"), f"*i{8 * size}")
    parts = ["gather" if gather else "scatter", "x".join(map(str, block_size)), f"i{8 * size}"]
    parts += ["transposed" * transposed, "partial" * partial]
    return Compilation(
        f"move_blocks[{','.join(part for part in parts if part)}]",
        move_blocks_kernel,
        kernel_signature(move_blocks_kernel, pointers, constexprs),
        constexprs,
        options,
    )
