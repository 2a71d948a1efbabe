"""block_matmul by cuBLAS: W written out densely, in scratch memory of bounded size, and multiplied
there.

No arithmetic is spared. It is for blocks whose edges tensor cores cannot take, and for small blocks
that are many enough for a dense product to be the faster one: see `requirements.dense_matmul`.

A dense product multiplies what is not stored by 0, which makes NaN of the NaN and infinities of x.
Such entries of the result give themselves away, since 0 times anything else is 0: what is not
finite is computed again from stored blocks alone, so that here too NaN in x reaches only the rows
that read it. Looking for them is a pass over the result, which a bias and an activation need as
well.
"""

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
from sparse_layouts.kernels.scratch_products import ScratchMatrices, multiply_into
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, finished, kernel_signature
from sparse_layouts.kernels.triton_scratch_blocks import block_row_pieces, scatter_blocks

TILE_M, TILE_N, WARPS = 32, 64, 4


# Strides are specialised (divisible by 16 or not: the width of a load), sizes are not.
@triton.jit(do_not_specialize=["M", "N", "K", "patterns", "block_rows", "row_tiles"])
def finish_product_kernel(
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
    row_tiles,
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
    ACTIVATION: tl.constexpr,
):
    pid = tl.program_id(0)
    rows = pid % row_tiles * TILE_M + tl.arange(0, TILE_M)
    offs_n = pid // row_tiles % column_tiles * TILE_N + tl.arange(0, TILE_N)
    matrix = (pid // row_tiles // column_tiles).to(tl.int64)
    mask_m, mask_n = rows < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    out = out_ptr + matrix * stride_out_matrix
    out += (rows.to(tl.int64) * stride_out_m)[:, None] + (offs_n.to(tl.int64) * stride_out_n)[None]
    acc_type = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.load(out, mask=mask, other=0.0).to(acc_type)  # [TILE_M, TILE_N]
    unfit = ~(tl.abs(acc) < float("inf"))
    if tl.sum(unfit.to(tl.int32)) > 0:
        # Every row of the tile goes through its own list: rows need not share a block.
        batch, pattern = matrix // patterns, matrix % patterns
        crow = crow_ptr + pattern * (block_rows + 1) + rows // BM
        start = tl.load(crow, mask=mask_m, other=0)
        end = tl.load(crow + 1, mask=mask_m, other=0)
        w_rows = values_ptr + batch * stride_values_batch
        w_rows += (rows % BM).to(tl.int64) * stride_values_m
        x_columns = x_ptr + batch * stride_x_batch + pattern * stride_x_pattern
        x_columns += offs_n.to(tl.int64) * stride_x_n
        again = tl.zeros((TILE_M, TILE_N), dtype=acc_type)
        for i in range(0, tl.max(end - start, 0) * BK):
            position = start + i // BK
            exists = position < end
            slot = position
            if slots_ptr is not None:
                slot = tl.load(slots_ptr + position, mask=exists, other=0)
            column = tl.load(col_ptr + position, mask=exists, other=0).to(tl.int64) * BK + i % BK
            inside = exists & (column < K)
            w = w_rows + slot.to(tl.int64) * stride_values_slot + i % BK * stride_values_k
            # Triton 3.6 cannot give a vector's load the layout of a column: it is loaded as one
            w = tl.load(w[:, None], mask=inside[:, None], other=0.0)  # [TILE_M, 1]
            x = tl.load(
                x_columns[None, :] + (column * stride_x_k)[:, None],
                mask=inside[:, None] & mask_n[None, :],
                other=0.0,
            )  # [TILE_M, TILE_N]
            again += w.to(acc_type) * x.to(acc_type)
        acc = tl.where(unfit, again, acc)
    if bias_ptr is None and ACTIVATION is None:
        mask = mask & unfit
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=mask_m, other=0.0)[:, None]
    acc = finished(acc, bias, ACTIVATION)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


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

    Shapes: `values` (B or 1, S, bm, bn), x (B or 1, P, K, N), any strides (0 where expanded),
    blocks of any edges; bias (M,); out (B, P, M, N), with `transposed_output` in the storage of a
    contiguous (B, P, N, M). bfloat16, float16, float32, float64. The product is torch's own, in its
    precision, rounded to the dtype before the bias is added and, once more, after the activation.
    Scratch memory: W, or some of its block rows, at most 64 MiB at a time.
    """
    p = pattern
    (m, k), n = p.shape, x.shape[3]
    batch = x.shape[0] if values.shape[0] == 1 else values.shape[0]
    if transposed_output:
        out = x.new_empty(batch, p.num_patterns, n, m).mT
    else:
        out = x.new_empty(batch, p.num_patterns, m, n)
    if out.numel() == 0 or p.num_blocks == 0:
        return finish_nothing(out, bias, activation)
    shared, scratch = values.shape[0], ScratchMatrices(values)
    for piece, rows in block_row_pieces(p, shared, values.dtype):
        batches, own, _ = piece
        stored = values[batches]
        w = scratch.take(stored.shape[0], own.stop - own.start, rows.stop - rows.start, k)
        scatter_blocks(w, stored, p, piece)
        samples = slice(None) if shared == 1 else batches
        dense = x[samples, own] if x.shape[0] > 1 else x[:, own]
        multiply_into(out[samples, own, rows], w, dense)
    _finish(out, values, p, x, bias, activation)
    return out


def _finish(
    out: Tensor,
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    """Computes again what is not finite in out, `W @ x` by a dense W; adds the bias, activates."""
    p, (batch, patterns, m, n) = pattern, out.shape
    constexprs, options = _config(p.block_size)
    row_tiles, column_tiles = triton.cdiv(m, TILE_M), triton.cdiv(n, TILE_N)
    with torch.cuda.device_of(out):
        finish_product_kernel[(row_tiles * column_tiles * batch * patterns,)](
            out,
            values,
            x,
            bias,
            p.crow_indices,
            p.col_indices,
            p.row_slots,
            m,
            n,
            p.shape[1],
            patterns,
            p.grid[0],
            row_tiles,
            column_tiles,
            values.stride(0) if values.shape[0] > 1 else 0,
            *values.stride()[1:],
            x.stride(0) if x.shape[0] > 1 else 0,
            *x.stride()[1:],
            m * n,
            *out.stride()[2:],
            ACTIVATION=activation,
            **constexprs,
            **options,
        )


def compilations() -> Iterator[Compilation]:
    """Dtypes, blocks of every kind of edge, transposes, a bias and activations."""
    for block_size in ((1, 32), (32, 1), (5, 5), (24, 24), (16, 16)):
        yield _compilation(torch.bfloat16, block_size)
    for dtype in DTYPE_NAMES:
        yield _compilation(dtype, (1, 32), transposed=True)
    for activation in (None, *ACTIVATIONS):
        yield _compilation(torch.bfloat16, (24, 24), bias=True, activation=activation)
    yield _compilation(torch.float64, (5, 5), bias=True, activation="gelu")


def _config(block_size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    constexprs = {"BM": block_size[0], "BK": block_size[1], "TILE_M": TILE_M, "TILE_N": TILE_N}
    return constexprs, {"num_warps": WARPS, "num_stages": 1}


def _compilation(
    dtype: torch.dtype,
    block_size: tuple[int, int],
    *,
    transposed: bool = False,
    bias: bool = False,
    activation: str | None = None,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs, options = _config(block_size)
    constexprs["ACTIVATION"] = activation
    constexprs["stride_values_m" if transposed else "stride_values_k"] = 1
    constexprs["stride_x_k" if transposed else "stride_x_n"] = 1
    constexprs["stride_out_m" if transposed else "stride_out_n"] = 1
    if not transposed:
        constexprs["slots_ptr"] = None
    if not bias:
        constexprs["bias_ptr"] = None
    pointers = dict.fromkeys(("out_ptr", "values_ptr", "x_ptr", "bias_ptr"), f"*{name}")
    parts = ["x".join(map(str, block_size)), name, "transposed" * transposed, "bias" * bias]
    parts.append(activation or "")
    return Compilation(
        f"finish_product[{','.join(part for part in parts if part)}]",
        finish_product_kernel,
        kernel_signature(finish_product_kernel, pointers, constexprs),
        constexprs,
        options,
    )
