"""block_softmax in Triton: one program a few rows of a block row, two passes over their entries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.triton_common import (
    DTYPE_NAMES,
    FEW_BLOCK_SIZES,
    kernel_signature,
    stored_bits,
)

# A tile is so many rows of so many stored columns, for every block size. 256 columns of a 16-bit
# dtype are 8 a thread of one warp: a row is reduced without shared memory. H200, 2026-11-20, bf16,
# 32 matrices of 4096^2, block 64, a quarter stored: 219 us forward, 254 us backward, 2.4 and
# 3.2 TB/s of input and output.
CONFIG = {"TILE_M": 8, "TILE_N": 256}
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def row_slice(crow_ptr, patterns, block_rows, M, BM: tl.constexpr, TILE_M: tl.constexpr):
    """Where this program works: batch, its part of the lists, rows within the block, their mask."""
    SLICES: tl.constexpr = BM // TILE_M
    pid = tl.program_id(0)
    row = pid // SLICES
    block_row = row % block_rows
    pattern = (row // block_rows) % patterns
    batch = (row // block_rows // patterns).to(tl.int64)
    first = pattern.to(tl.int64) * (block_rows + 1) + block_row
    offs_m = (pid % SLICES) * TILE_M + tl.arange(0, TILE_M)
    mask_m = block_row * BM + offs_m < M
    return batch, tl.load(crow_ptr + first), tl.load(crow_ptr + first + 1), offs_m, mask_m


@triton.jit
def stored_columns(
    j,
    start,
    end,
    offs_m,
    mask_m,
    N,
    col_ptr,
    slots_ptr,
    block_tiles_ptr,
    tiles_ptr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The j-th column and the next of the row's stored blocks, laid side by side.

    Returns the slot [TILE_N] of each, the column within its block, whether it is in the list, and
    [TILE_M, TILE_N] what is stored.
    """
    offs = j + tl.arange(0, TILE_N)
    position = start + offs // BN
    offs_n = offs % BN
    mask_t = position < end
    slot = position
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + position, mask=mask_t, other=0)
    column = tl.load(col_ptr + position, mask=mask_t, other=0) * BN + offs_n
    stored = mask_m[:, None] & (mask_t & (column < N))[None, :]
    if block_tiles_ptr is not None:
        tile = tl.load(block_tiles_ptr + slot, mask=mask_t, other=0)[None, :]
        stored = stored & stored_bits(tiles_ptr, tile, offs_m[:, None], offs_n[None, :], BM, BN)
    return slot.to(tl.int64), offs_n.to(tl.int64), mask_t, stored


# Strides are specialised (divisible by 16 or not: the width of a load), sizes are not.
@triton.jit(do_not_specialize=["M", "N", "patterns", "block_rows", "num_blocks"])
def block_softmax_kernel(
    out_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    slots_ptr,
    block_tiles_ptr,
    tiles_ptr,
    block_counts_ptr,
    M,
    N,
    patterns,
    block_rows,
    num_blocks,
    stride_values_batch,
    stride_values_slot,
    stride_values_m,
    stride_values_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    LOG: tl.constexpr,
):
    batch, start, end, offs_m, mask_m = row_slice(crow_ptr, patterns, block_rows, M, BM, TILE_M)
    columns = (end - start) * BN
    acc_type = tl.float64 if values_ptr.dtype.element_ty == tl.float64 else tl.float32
    x_rows = values_ptr + batch * stride_values_batch
    x_rows += (offs_m.to(tl.int64) * stride_values_m)[:, None]
    largest = tl.full((TILE_M,), float("-inf"), dtype=acc_type)
    total = tl.zeros((TILE_M,), dtype=acc_type)
    for j in range(0, columns, TILE_N):
        slot, offs_n, mask_t, stored = stored_columns(
            j,
            start,
            end,
            offs_m,
            mask_m,
            N,
            col_ptr,
            slots_ptr,
            block_tiles_ptr,
            tiles_ptr,
            BM,
            BN,
            TILE_N,
        )
        x = x_rows + (slot * stride_values_slot + offs_n * stride_values_n)[None, :]
        x = tl.load(x, mask=mask_t[None, :], other=0.0).to(acc_type)  # [TILE_M, TILE_N]
        x = tl.where(stored, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # nothing yet: -inf - -inf is NaN
        e = tl.exp(x - shift[:, None])
        if block_counts_ptr is not None:
            e *= tl.load(block_counts_ptr + slot, mask=mask_t, other=1).to(acc_type)[None, :]
        total = total * tl.exp(largest - shift) + tl.sum(e, 1)
        largest = larger

    # Rounded least this way round: what is near the largest loses nothing in the difference.
    inverse, log_total = 1.0 / total, tl.log(total)
    out_rows = out_ptr + batch * num_blocks * (BM * BN) + (offs_m * BN)[:, None]
    for j in range(0, columns, TILE_N):
        slot, offs_n, mask_t, stored = stored_columns(
            j,
            start,
            end,
            offs_m,
            mask_m,
            N,
            col_ptr,
            slots_ptr,
            block_tiles_ptr,
            tiles_ptr,
            BM,
            BN,
            TILE_N,
        )
        x = x_rows + (slot * stride_values_slot + offs_n * stride_values_n)[None, :]
        x = tl.load(x, mask=mask_t[None, :], other=0.0).to(acc_type) - largest[:, None]
        if LOG:
            y = x - log_total[:, None]
        else:
            y = tl.exp(x) * inverse[:, None]
        if block_counts_ptr is not None:
            count = tl.load(block_counts_ptr + slot, mask=mask_t, other=1).to(acc_type)[None, :]
            y = y + tl.log(count) if LOG else y * count
        y = tl.where(stored, y, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + (slot * (BM * BN) + offs_n)[None, :], y, mask=mask_t[None, :])


@triton.jit(do_not_specialize=["M", "N", "patterns", "block_rows", "num_blocks"])
def block_softmax_backward_kernel(
    dx_ptr,
    grad_ptr,
    out_ptr,
    crow_ptr,
    col_ptr,
    slots_ptr,
    block_tiles_ptr,
    tiles_ptr,
    M,
    N,
    patterns,
    block_rows,
    num_blocks,
    stride_grad_batch,
    stride_grad_slot,
    stride_grad_m,
    stride_grad_n,
    stride_out_batch,
    stride_out_slot,
    stride_out_m,
    stride_out_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    LOG: tl.constexpr,
):
    batch, start, end, offs_m, mask_m = row_slice(crow_ptr, patterns, block_rows, M, BM, TILE_M)
    columns = (end - start) * BN
    acc_type = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    grad_rows = grad_ptr + batch * stride_grad_batch
    grad_rows += (offs_m.to(tl.int64) * stride_grad_m)[:, None]
    out_rows = out_ptr + batch * stride_out_batch
    out_rows += (offs_m.to(tl.int64) * stride_out_m)[:, None]
    total = tl.zeros((TILE_M, TILE_N), dtype=acc_type)
    for j in range(0, columns, TILE_N):
        slot, offs_n, mask_t, stored = stored_columns(
            j,
            start,
            end,
            offs_m,
            mask_m,
            N,
            col_ptr,
            slots_ptr,
            block_tiles_ptr,
            tiles_ptr,
            BM,
            BN,
            TILE_N,
        )
        grad = grad_rows + (slot * stride_grad_slot + offs_n * stride_grad_n)[None, :]
        grad = tl.load(grad, mask=mask_t[None, :], other=0.0).to(acc_type)  # [TILE_M, TILE_N]
        if not LOG:
            out = out_rows + (slot * stride_out_slot + offs_n * stride_out_n)[None, :]
            grad *= tl.load(out, mask=mask_t[None, :], other=0.0).to(acc_type)
        total += tl.where(stored, grad, 0.0)
    total = tl.sum(total, 1)[:, None]

    dx_rows = dx_ptr + batch * num_blocks * (BM * BN) + (offs_m * BN)[:, None]
    for j in range(0, columns, TILE_N):
        slot, offs_n, mask_t, stored = stored_columns(
            j,
            start,
            end,
            offs_m,
            mask_m,
            N,
            col_ptr,
            slots_ptr,
            block_tiles_ptr,
            tiles_ptr,
            BM,
            BN,
            TILE_N,
        )
        grad = grad_rows + (slot * stride_grad_slot + offs_n * stride_grad_n)[None, :]
        grad = tl.load(grad, mask=mask_t[None, :], other=0.0).to(acc_type)
        out = out_rows + (slot * stride_out_slot + offs_n * stride_out_n)[None, :]
        out = tl.load(out, mask=mask_t[None, :], other=0.0).to(acc_type)
        dx = grad - tl.exp(out) * total if LOG else out * (grad - total)
        dx = tl.where(stored, dx, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_rows + (slot * (BM * BN) + offs_n)[None, :], dx, mask=mask_t[None, :])


def block_softmax(values: Tensor, pattern: BlockPattern, *, log: bool = False) -> Tensor:
    """`values` (B, S, bm, bn) -> softmax (or log_softmax) over each row's stored entries.

    Same shape and slots; any strides in, contiguous out. An entry whose block counts c times gets
    c exp(x) / sum. What is not stored stays 0. bfloat16, float16, float32, float64; computed in
    float32 (float64 for float64).
    """
    p = pattern
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(values):
        block_softmax_kernel[_grid(p, values.shape[0])](
            out,
            values,
            p.crow_indices,
            p.col_indices,
            p.row_slots,
            p.block_tiles,
            p.tiles,
            p.block_counts,
            *p.shape,
            p.num_patterns,
            p.grid[0],
            p.num_blocks,
            *values.stride(),
            *p.block_size,
            **CONFIG,
            LOG=log,
            **OPTIONS,
        )
    return out


def block_softmax_backward(
    grad: Tensor, out: Tensor, pattern: BlockPattern, *, log: bool = False
) -> Tensor:
    """The gradient to `values`, (B, S, bm, bn) contiguous, from that to `out` and `out` itself.

    softmax: `out * (grad - sum(grad * out))`; log_softmax: `grad - exp(out) * sum(grad)`.
    """
    p = pattern
    dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if dx.numel() == 0:
        return dx
    with torch.cuda.device_of(grad):
        block_softmax_backward_kernel[_grid(p, grad.shape[0])](
            dx,
            grad,
            out,
            p.crow_indices,
            p.col_indices,
            p.row_slots,
            p.block_tiles,
            p.tiles,
            *p.shape,
            p.num_patterns,
            p.grid[0],
            p.num_blocks,
            *grad.stride(),
            *out.stride(),
            *p.block_size,
            **CONFIG,
            LOG=log,
            **OPTIONS,
        )
    return dx


def compilations() -> Iterator[Compilation]:
    """Every configuration: forward, backward, log, dtypes, block sizes; slots, tiles, counts."""
    for kernel in (block_softmax_kernel, block_softmax_backward_kernel):
        for log in (False, True):
            for dtype in DTYPE_NAMES:
                for block_size in (
                    FEW_BLOCK_SIZES if dtype != torch.float64 else FEW_BLOCK_SIZES[:1]
                ):
                    yield _compilation(kernel, dtype, block_size, log)
                yield _compilation(kernel, dtype, (16, 16), log, partial=True)
                yield _compilation(kernel, dtype, (64, 64), log, partial=True)


def _grid(pattern: BlockPattern, batch: int) -> tuple[int]:
    slices = pattern.block_size[0] // CONFIG["TILE_M"]
    return (pattern.num_patterns * pattern.grid[0] * slices * batch,)


def _compilation(
    kernel: Any,
    dtype: torch.dtype,
    block_size: tuple[int, int],
    log: bool,
    *,
    partial: bool = False,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    backward = kernel is block_softmax_backward_kernel
    constexprs = {"BM": block_size[0], "BN": block_size[1], **CONFIG, "LOG": log}
    data = ("dx", "grad", "out") if backward else ("out", "values")
    unit = ("grad", "out") if backward else ("values",)
    constexprs |= {f"stride_{operand}_n": 1 for operand in unit}
    if not partial:
        absent = ["slots_ptr", "block_tiles_ptr", "tiles_ptr"]
        absent += [] if backward else ["block_counts_ptr"]
        constexprs |= dict.fromkeys(absent)
    pointers = dict.fromkeys((f"{operand}_ptr" for operand in data), f"*{name}")
    parts = ["x".join(map(str, block_size)), name, "log" * log, "partial" * partial]
    return Compilation(
        f"block_softmax{'_backward' * backward}[{','.join(part for part in parts if part)}]",
        kernel,
        kernel_signature(kernel, pointers, constexprs),
        constexprs,
        OPTIONS,
    )
