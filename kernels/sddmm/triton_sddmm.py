"""sddmm in Triton: one program a group of stored blocks of one block row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.operand_copies import relaid
from sparse_layouts.kernels.sddmm.tile_schedule import tile_schedule
from sparse_layouts.kernels.triton_common import (
    BLOCK_SIZES,
    DTYPE_NAMES,
    FEW_BLOCK_SIZES,
    fitting_stages,
    input_precision,
    kernel_signature,
    stored_bits,
)

# (columns of a tile, entries of K a step, warps, stages) by the rows of a tile, for 16-bit dtypes.
# A tile has the rows of a block, or 128 of them; its columns are of several blocks, or part of one.
# Chosen on an H200, 2026-11-20, bf16, 4096^3, a quarter of the blocks stored: 287, 155, 95, 75 us
# for y @ x.mT (dense 176 us).
CONFIGS_16_BIT = {
    16: (128, 64, 4, 4),
    32: (128, 64, 4, 3),
    64: (128, 64, 4, 3),
    128: (128, 64, 8, 4),
}
# float32 as tf32, float32 in full (no tensor cores: registers are the limit), float64
CONFIGS_TF32 = {16: (128, 32, 4, 3), 32: (128, 32, 4, 3), 64: (128, 32, 4, 3), 128: (128, 32, 8, 3)}
CONFIGS_FP32 = {16: (128, 32, 4, 2), 32: (128, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2)}
# From so many contracted entries on, b is worth copying where blocks would read it in short pieces.
# (Of a, as many rows as a block has are read for 128 columns of b: an eighth of the traffic.)
MANY = 512
CONFIGS_FP64 = {16: (64, 16, 4, 2), 32: (64, 16, 4, 2), 64: (64, 16, 4, 2), 128: (64, 16, 8, 2)}


@triton.jit
def multiply_add(
    acc, a, b, mask_a, mask_b, MASKED: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr
):
    """`acc` plus the product of what `a` [TILE_M, TILE_K] and `b` [TILE_K, TILE_N] point to."""
    if MASKED:
        a = tl.load(a, mask=mask_a, other=0.0)
        b = tl.load(b, mask=mask_b, other=0.0)
    else:
        a = tl.load(a)
        b = tl.load(b)
    if SWAP:
        acc = tl.dot(tl.trans(b), tl.trans(a), acc, PRECISION, out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b, acc, PRECISION, out_dtype=acc.dtype)
    return acc


# Strides are specialised (divisible by 16 or not: the width of a load), sizes are not.
@triton.jit(do_not_specialize=["M", "N", "K", "patterns", "block_rows", "tiles_num", "num_blocks"])
def sddmm_kernel(
    values_ptr,
    a_ptr,
    b_ptr,
    crow_ptr,
    col_ptr,
    slots_ptr,
    tile_rows_ptr,
    tile_starts_ptr,
    block_tiles_ptr,
    tiles_ptr,
    M,
    N,
    K,
    patterns,
    block_rows,
    tiles_num,
    num_blocks,
    stride_a_batch,
    stride_a_pattern,
    stride_a_m,
    stride_a_k,
    stride_b_batch,
    stride_b_pattern,
    stride_b_k,
    stride_b_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    WHOLE: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SLICES: tl.constexpr = BM // TILE_M
    pid = tl.program_id(0)
    tile = (pid // SLICES) % tiles_num
    batch = (pid // SLICES // tiles_num).to(tl.int64)
    row = tl.load(tile_rows_ptr + tile)
    if row >= patterns * block_rows:
        return  # the schedule is padded
    pattern = (row // block_rows).to(tl.int64)
    block_row = row % block_rows
    start = tl.load(crow_ptr + pattern * (block_rows + 1) + block_row)
    end = tl.load(crow_ptr + pattern * (block_rows + 1) + block_row + 1)

    # Columns of the tile are counted over the stored blocks of the row, side by side. Past the last
    # one, block column 0 is read and nothing written, so that whole blocks need no mask.
    offs_m = (pid % SLICES) * TILE_M + tl.arange(0, TILE_M)  # rows within the block
    offs_n = tl.load(tile_starts_ptr + tile) * TILE_N + tl.arange(0, TILE_N)
    position = start + offs_n // BN
    mask_t = position < end
    offs_in_block = offs_n % BN
    rows = block_row * BM + offs_m
    columns = tl.load(col_ptr + position, mask=mask_t, other=0) * BN + offs_in_block
    mask_a = (rows < M)[:, None]
    mask_b = (mask_t & (columns < N))[None, :]

    offs_k = tl.arange(0, TILE_K)
    a_ptr += batch * stride_a_batch + pattern * stride_a_pattern
    b_ptr += batch * stride_b_batch + pattern * stride_b_pattern
    a = (rows.to(tl.int64) * stride_a_m)[:, None] + (offs_k.to(tl.int64) * stride_a_k)[None, :]
    b = (offs_k.to(tl.int64) * stride_b_k)[:, None] + (columns.to(tl.int64) * stride_b_n)[None, :]
    a += a_ptr  # [TILE_M, TILE_K]
    b += b_ptr  # [TILE_K, TILE_N]
    acc_type = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    if SWAP:
        acc = tl.zeros((TILE_N, TILE_M), dtype=acc_type)
    else:
        acc = tl.zeros((TILE_M, TILE_N), dtype=acc_type)
    step = tl.full((), TILE_K, tl.int64)
    for _ in range(0, K // TILE_K):
        acc = multiply_add(acc, a, b, mask_a, mask_b, not WHOLE, SWAP, PRECISION)
        a += step * stride_a_k
        b += step * stride_b_k
    # K's edge is not a constant argument: a mask in the loop would make every load narrow
    if K % TILE_K != 0:
        mask_k = offs_k < K % TILE_K
        mask_a_k, mask_b_k = mask_a & mask_k[None, :], mask_b & mask_k[:, None]
        acc = multiply_add(acc, a, b, mask_a_k, mask_b_k, True, SWAP, PRECISION)
    if SWAP:
        acc = tl.trans(acc)

    slot = position
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + position, mask=mask_t, other=0)
    stored = mask_a & mask_b
    if block_tiles_ptr is not None:
        bits = tl.load(block_tiles_ptr + slot, mask=mask_t, other=0)[None, :]
        in_block = stored_bits(tiles_ptr, bits, offs_m[:, None], offs_in_block[None, :], BM, BN)
        stored = stored & in_block
    acc = tl.where(stored, acc, 0.0)
    values_ptr += batch * num_blocks * (BM * BN)
    out = slot.to(tl.int64) * (BM * BN) + offs_in_block
    out = values_ptr + (offs_m * BN)[:, None] + out[None, :]
    tl.store(out, acc.to(values_ptr.dtype.element_ty), mask=mask_t[None, :])


def sddmm(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """`values[n, s]` = the block of `a[n, p] @ b[n, p]` at slot s of the pattern, in slot order.

    Shapes: a (B, P, M, K), b (B, P, K, N), any strides; values (B, S, bm, bn) contiguous, 0 where
    the pattern stores nothing. bfloat16, float16, float32, float64; accumulates in float32 (float64
    for float64). float32 is read as tf32 where `torch.backends.cuda.matmul.fp32_precision` says so.
    A b by rows is copied where small blocks would read it in short pieces (`relaid`).
    """
    p = pattern
    (m, n), (bm, bn), batch, k = p.shape, p.block_size, a.shape[0], a.shape[3]
    values = a.new_empty(batch, p.num_blocks, bm, bn)
    if values.numel() == 0 or k == 0:
        return values.zero_()
    if k >= MANY:
        b = relaid(b, -2, bn, p.num_blocks // (p.num_patterns * p.grid[1]))
    constexprs, options = _config(a.dtype, p.block_size, input_precision(a.dtype))
    buffer_bytes = constexprs["TILE_K"] * (constexprs["TILE_M"] + constexprs["TILE_N"])
    buffer_bytes *= a.element_size()
    options["num_stages"] = fitting_stages(options["num_stages"], 1, buffer_bytes, a.device)
    tile_rows, tile_starts = tile_schedule(p, constexprs["TILE_N"])
    tiles_num = tile_rows.shape[0]
    with torch.cuda.device_of(a):
        sddmm_kernel[(tiles_num * (bm // constexprs["TILE_M"]) * batch,)](
            values,
            a,
            b,
            p.crow_indices,
            p.col_indices,
            p.row_slots,
            tile_rows,
            tile_starts,
            p.block_tiles,
            p.tiles,
            m,
            n,
            k,
            p.num_patterns,
            p.grid[0],
            tiles_num,
            p.num_blocks,
            *a.stride(),
            *b.stride(),
            WHOLE=m % bm == 0 and n % bn == 0,
            **constexprs,
            **options,
        )
    return values


def compilations() -> Iterator[Compilation]:
    """Every configuration: dtypes and block sizes; transposed operands, bit tiles."""
    dtypes = [(d, "ieee") for d in DTYPE_NAMES] + [(torch.float32, "tf32")]
    for dtype, precision in dtypes:
        common = dtype.itemsize == 2 or (dtype, precision) == (torch.float32, "ieee")
        for block_size in BLOCK_SIZES if common else FEW_BLOCK_SIZES:
            yield _compilation(dtype, block_size, precision)
    for dtype, precision in dtypes:
        for block_size in ((16, 16), (64, 64)):
            yield _compilation(dtype, block_size, precision, transposed=True)
            yield _compilation(dtype, block_size, precision, partial=True)


def _config(
    dtype: torch.dtype, block_size: tuple[int, int], precision: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options for one dtype and block size."""
    tile_m = min(block_size[0], 128)
    table = {torch.float32: CONFIGS_FP32, torch.float64: CONFIGS_FP64}.get(dtype, CONFIGS_16_BIT)
    tile_n, tile_k, warps, stages = (CONFIGS_TF32 if precision == "tf32" else table)[tile_m]
    constexprs = {
        "BM": block_size[0],
        "BN": block_size[1],
        "TILE_M": tile_m,
        "TILE_N": tile_n,
        "TILE_K": tile_k,
        # Hopper's wgmma multiplies 64 rows at a time: a smaller tile is its right-hand operand
        "SWAP": dtype.itemsize == 2 and tile_m < 64,
        "PRECISION": precision,
    }
    return constexprs, {"num_warps": warps, "num_stages": stages}


def _compilation(
    dtype: torch.dtype,
    block_size: tuple[int, int],
    precision: str,
    *,
    transposed: bool = False,
    partial: bool = False,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs, options = _config(dtype, block_size, precision)
    constexprs["WHOLE"] = not partial
    constexprs["stride_a_m" if transposed else "stride_a_k"] = 1
    constexprs["stride_b_k" if transposed else "stride_b_n"] = 1
    if not transposed:
        constexprs["slots_ptr"] = None
    if not partial:
        constexprs["block_tiles_ptr"] = constexprs["tiles_ptr"] = None
    pointers = dict.fromkeys(("values_ptr", "a_ptr", "b_ptr"), f"*{name}")
    parts = ["x".join(map(str, block_size)), name, precision if dtype == torch.float32 else ""]
    parts += ["transposed" * transposed, "partial" * partial]
    return Compilation(
        f"sddmm[{','.join(part for part in parts if part)}]",
        sddmm_kernel,
        kernel_signature(sddmm_kernel, pointers, constexprs),
        constexprs,
        options,
    )
