"""block_matmul in Triton: one program a tile of the output, over the row list of one block row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.activations import ACTIVATIONS, finish_nothing
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.operand_copies import relaid
from sparse_layouts.kernels.triton_common import (
    BLOCK_SIZES,
    DTYPE_NAMES,
    FEW_BLOCK_SIZES,
    finished,
    fitting_stages,
    input_precision,
    kernel_signature,
)

# (columns of a tile, entries of K a step, warps, stages) by the rows of a tile, for 16-bit dtypes.
# A tile has the rows of a block, or 128 of them. Chosen on an H200, 2026-11-20, bf16, 4096^3, a
# quarter of the blocks stored: 288, 162, 108, 85 us for w @ x (dense 176 us). The tiles of x that
# are read from L2 come to 7.5, 6.6, 5 and 3.2 TB/s: L2 bounds the small blocks.
CONFIGS_16_BIT = {
    16: (256, 32, 4, 5),
    32: (256, 32, 4, 4),
    64: (256, 64, 8, 4),
    128: (128, 64, 4, 5),
}
# float32 as tf32, float32 in full (no tensor cores: registers are the limit), float64
CONFIGS_TF32 = {16: (128, 32, 4, 3), 32: (128, 32, 4, 3), 64: (128, 32, 4, 3), 128: (128, 32, 8, 3)}
CONFIGS_FP32 = {16: (128, 32, 4, 2), 32: (128, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2)}
CONFIGS_FP64 = {16: (64, 16, 4, 2), 32: (64, 16, 4, 2), 64: (64, 16, 4, 2), 128: (64, 16, 8, 2)}
# Up to so many columns of x a tile has no more: a wider one would multiply mostly padding.
NARROW = 32
# From so many on, x is worth copying where blocks would read it in short pieces.
MANY = 512


# N and the strides are specialised (divisible by 16 or not: the width of a load), other sizes not.
@triton.jit(do_not_specialize=["M", "K", "patterns", "block_rows", "column_tiles"])
def block_matmul_kernel(
    out_ptr,
    values_ptr,
    x_ptr,
    bias_ptr,
    crow_ptr,
    col_ptr,
    slots_ptr,
    M,
    N,
    K,
    patterns,
    block_rows,
    column_tiles,
    stride_values_batch,
    stride_values_slot,
    stride_values_m,
    stride_values_k,
    stride_x_batch,
    stride_x_pattern,
    stride_x_k,
    stride_x_n,
    stride_out_matrix,
    stride_out_m,
    stride_out_n,
    BM: tl.constexpr,
    BK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    WHOLE: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    # Row tiles are the fastest index: programs that run together read the same columns of x.
    pid = tl.program_id(0)
    SLICES: tl.constexpr = BM // TILE_M
    row_tiles = block_rows * SLICES
    block_row = (pid % row_tiles) // SLICES
    column_tile = (pid // row_tiles) % column_tiles
    matrix = pid // row_tiles // column_tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    start = tl.load(crow_ptr + pattern * (block_rows + 1) + block_row)
    end = tl.load(crow_ptr + pattern * (block_rows + 1) + block_row + 1)

    offs_m = (pid % SLICES) * TILE_M + tl.arange(0, TILE_M)  # rows within the block
    offs_n = column_tile * TILE_N + tl.arange(0, TILE_N)
    mask_n = offs_n < N
    values_ptr += batch * stride_values_batch
    x_ptr += batch * stride_x_batch + pattern * stride_x_pattern
    w_rows = offs_m.to(tl.int64) * stride_values_m
    x_columns = offs_n.to(tl.int64) * stride_x_n
    acc_type = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    if SWAP:
        acc = tl.zeros((TILE_N, TILE_M), dtype=acc_type)
    else:
        acc = tl.zeros((TILE_M, TILE_N), dtype=acc_type)

    # The stored blocks of a row, side by side, are a dense matrix; a step takes TILE_K of its
    # columns, which are part of a block or several blocks.
    stored = (end - start) * BK
    for k in range(0, stored, TILE_K):
        offs_k = k + tl.arange(0, TILE_K)
        mask_k = offs_k < stored
        position = start + offs_k // BK
        offs_in_block = offs_k % BK
        slot = position
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + position, mask=mask_k, other=0)
        w_columns = (
            slot.to(tl.int64) * stride_values_slot + offs_in_block.to(tl.int64) * stride_values_k
        )
        w = tl.load(
            values_ptr + w_rows[:, None] + w_columns[None, :], mask=mask_k[None, :], other=0.0
        )  # [TILE_M, TILE_K]
        column = tl.load(col_ptr + position, mask=mask_k, other=0)
        x_rows = column.to(tl.int64) * BK + offs_in_block
        mask_x = mask_k if WHOLE else mask_k & (x_rows < K)
        x = tl.load(
            x_ptr + (x_rows * stride_x_k)[:, None] + x_columns[None, :],
            mask=mask_x[:, None] & mask_n[None, :],
            other=0.0,
        )  # [TILE_K, TILE_N]
        if SWAP:
            acc = tl.dot(tl.trans(x), tl.trans(w), acc, PRECISION, out_dtype=acc.dtype)
        else:
            acc = tl.dot(w, x, acc, PRECISION, out_dtype=acc.dtype)
    if SWAP:
        acc = tl.trans(acc)

    rows = block_row * BM + offs_m
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=rows < M, other=0.0)[:, None]
    acc = finished(acc, bias, ACTIVATION)
    mask_out = mask_n[None, :] if WHOLE else (rows < M)[:, None] & mask_n[None, :]
    out_ptr += matrix.to(tl.int64) * stride_out_matrix
    out = out_ptr + (rows.to(tl.int64) * stride_out_m)[:, None]
    out += (offs_n.to(tl.int64) * stride_out_n)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_out)


def block_matmul(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    *,
    transposed_output: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`out[b, p] = activation(W[b, p] @ x[b, p] + bias)`, W the matrix of `values` on the p-th
    pattern.

    Shapes: `values` (B or 1, S, bm, bn), x (B or 1, P, K, N), any strides (0 where expanded); bias
    (M,); out (B, P, M, N), with `transposed_output` in the storage of a contiguous (B, P, N, M).
    bfloat16, float16, float32, float64; accumulates, adds and activates in float32 (float64 for
    float64). float32 is read as tf32 where `torch.backends.cuda.matmul.fp32_precision` says so. An
    x by columns is copied where small blocks would read it in short pieces (`relaid`).
    """
    p = pattern
    (m, k), (bm, bk), n = p.shape, p.block_size, x.shape[3]
    batch = x.shape[0] if values.shape[0] == 1 else values.shape[0]
    if transposed_output:
        out = x.new_empty(batch, p.num_patterns, n, m).mT
    else:
        out = x.new_empty(batch, p.num_patterns, m, n)
    if out.numel() == 0 or p.num_blocks == 0:
        return finish_nothing(out, bias, activation)
    if n >= MANY:
        x = relaid(x, -1, bk, p.num_blocks // (p.num_patterns * p.grid[1]))
    precision = input_precision(x.dtype)
    constexprs, options = _config(x.dtype, p.block_size, n, precision)
    buffer_bytes = constexprs["TILE_K"] * (constexprs["TILE_M"] + constexprs["TILE_N"])
    buffer_bytes *= x.element_size()
    # the pipeliner fetches indices one step ahead of values, so a buffer takes two stages
    options["num_stages"] = fitting_stages(options["num_stages"], 2, buffer_bytes, x.device)
    block_rows, column_tiles = p.grid[0], triton.cdiv(n, constexprs["TILE_N"])
    programs = block_rows * (bm // constexprs["TILE_M"]) * column_tiles
    with torch.cuda.device_of(x):
        block_matmul_kernel[(programs * batch * p.num_patterns,)](
            out,
            values,
            x,
            bias,
            p.crow_indices,
            p.col_indices,
            p.row_slots,
            m,
            n,
            k,
            p.num_patterns,
            block_rows,
            column_tiles,
            values.stride(0) if values.shape[0] > 1 else 0,
            *values.stride()[1:],
            x.stride(0) if x.shape[0] > 1 else 0,
            *x.stride()[1:],
            m * n,
            *out.stride()[2:],
            WHOLE=m % bm == 0 and k % bk == 0,
            ACTIVATION=activation,
            **constexprs,
            **options,
        )
    return out


def compilations() -> Iterator[Compilation]:
    """Every configuration: dtypes, block sizes, few columns; transposed operands, ragged sizes, a
    bias and activations.
    """
    dtypes = [(d, "ieee") for d in DTYPE_NAMES] + [(torch.float32, "tf32")]
    for dtype, precision in dtypes:
        common = dtype.itemsize == 2 or (dtype, precision) == (torch.float32, "ieee")
        for block_size in BLOCK_SIZES if common else FEW_BLOCK_SIZES:
            for n in (4096, NARROW):
                yield _compilation(dtype, block_size, n, precision)
    for dtype, precision in dtypes:
        for block_size in ((16, 16), (64, 64)):
            yield _compilation(dtype, block_size, 4096, precision, transposed=True)
            yield _compilation(dtype, block_size, 4096, precision, whole=False)
    for activation in (None, *ACTIVATIONS):
        yield _compilation(torch.bfloat16, (64, 64), 4096, "ieee", bias=True, activation=activation)
    for dtype in (torch.float32, torch.float64):
        yield _compilation(dtype, (64, 64), 4096, "ieee", bias=True, activation="gelu")


def _config(
    dtype: torch.dtype, block_size: tuple[int, int], n: int, precision: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options for one dtype and block size."""
    tile_m = min(block_size[0], 128)
    table = {torch.float32: CONFIGS_FP32, torch.float64: CONFIGS_FP64}.get(dtype, CONFIGS_16_BIT)
    tile_n, tile_k, warps, stages = (CONFIGS_TF32 if precision == "tf32" else table)[tile_m]
    constexprs = {
        "BM": block_size[0],
        "BK": block_size[1],
        "TILE_M": tile_m,
        "TILE_N": NARROW if n <= NARROW else tile_n,
        "TILE_K": tile_k,
        # Hopper's wgmma multiplies 64 rows at a time: a smaller tile is its right-hand operand
        "SWAP": dtype.itemsize == 2 and tile_m < 64 and n > NARROW,
        "PRECISION": precision,
    }
    return constexprs, {"num_warps": warps, "num_stages": stages}


def _compilation(
    dtype: torch.dtype,
    block_size: tuple[int, int],
    n: int,
    precision: str,
    *,
    transposed: bool = False,
    whole: bool = True,
    bias: bool = False,
    activation: str | None = None,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs, options = _config(dtype, block_size, n, precision)
    constexprs["WHOLE"] = whole
    constexprs["ACTIVATION"] = activation
    constexprs["stride_values_m" if transposed else "stride_values_k"] = 1
    constexprs["stride_x_k" if transposed else "stride_x_n"] = 1
    constexprs["stride_out_m" if transposed else "stride_out_n"] = 1
    if not transposed:
        constexprs["slots_ptr"] = None
    if not bias:
        constexprs["bias_ptr"] = None
    pointers = dict.fromkeys(("out_ptr", "values_ptr", "x_ptr", "bias_ptr"), f"*{name}")
    parts = ["x".join(map(str, block_size)), name, precision if dtype == torch.float32 else ""]
    parts += ["narrow" * (n <= NARROW), "transposed" * transposed, "ragged" * (not whole)]
    parts += ["bias" * bias, activation]
    return Compilation(
        f"block_matmul[{','.join(part for part in parts if part)}]",
        block_matmul_kernel,
        kernel_signature(block_matmul_kernel, pointers, constexprs),
        constexprs,
        options,
    )
