"""nm_matmul in Triton: tiles of the matrix are expanded in registers and multiplied as dense ones.

A few columns of x go to `triton_few_columns.py`; many to `triton_expand.py`, another row of the
table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.nm_matmul import triton_few_columns
from sparse_layouts.kernels.nm_matmul.triton_common import (
    COMPILED_NM,
    banded_tile,
    dense_tile,
    nm_constants,
    paired_values,
    tile_columns,
)
from sparse_layouts.kernels.triton_common import (
    DTYPE_NAMES,
    fitting_stages,
    input_precision,
    kernel_signature,
)

# (rows of the output's tile, entries of the contracted dimension a step, warps, stages) by the
# columns of a tile
CONFIGS_16_BIT = {
    128: (128, 64, 8, 3),
    64: (128, 64, 4, 3),
    # One H200, 2:4 in bfloat16, 16 columns, 2026-11-21: 4096 x 4096 30.5 us, with (64, 128, 4, 4)
    # 51.2; 8192 x 8192 92.2 and 155.2; the transpose of 4096 x 4096 26.9 and 29.1.
    16: (64, 64, 4, 5),
}
# float32 as tf32, float32 in full (no tensor cores: registers are the limit), float64
CONFIGS_TF32 = {128: (128, 32, 8, 3), 64: (128, 32, 4, 3), 16: (64, 64, 4, 3)}
CONFIGS_FP32 = {128: (64, 32, 8, 2), 64: (64, 32, 4, 2), 16: (64, 32, 4, 2)}
CONFIGS_FP64 = {128: (64, 16, 8, 2), 64: (64, 16, 4, 2), 16: (64, 16, 4, 2)}
MOST_SPLITS = 16


@triton.jit(do_not_specialize=["M", "patterns", "row_tiles", "column_tiles", "per_split"])
def nm_matmul_kernel(
    out_ptr,
    values_ptr,
    words_ptr,
    x_ptr,
    M,
    N,
    groups,
    patterns,
    row_tiles,
    column_tiles,
    per_split,
    stride_values_batch,
    stride_values_pattern,
    stride_values_m,
    stride_values_e,
    stride_words_pattern,
    stride_words_m,
    stride_x_batch,
    stride_x_pattern,
    stride_x_k,
    stride_x_n,
    stride_out_split,
    stride_out_matrix,
    stride_out_m,
    stride_out_n,
    STORED: tl.constexpr,
    OF: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    PAIRED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = row_tiles * column_tiles
    pid = tl.program_id(0)
    split = tl.program_id(1)
    row_tile, column_tile = banded_tile(pid % tiles, row_tiles, column_tiles)
    matrix = pid // tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    values_ptr += batch * stride_values_batch + pattern * stride_values_pattern
    words_ptr += pattern * stride_words_pattern
    x_ptr += batch * stride_x_batch + pattern * stride_x_pattern

    offs_n = column_tile * TILE_N + tl.arange(0, TILE_N)
    mask_n = offs_n < N
    x_columns = (offs_n.to(tl.int64) * stride_x_n)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc_type = tl.float64 if dtype == tl.float64 else tl.float32
    acc = tl.zeros((TILE_M, TILE_N), dtype=acc_type)
    start = split * per_split
    if TRANSPOSED:
        # the output's rows are columns of W; the rows of W are contracted
        GROUPS: tl.constexpr = TILE_M // PLACES
        first = row_tile * GROUPS
        rows, mask_rows = tile_columns(first, groups, GROUPS, OF, PLACES)
        for m in range(start, tl.minimum(M, start + per_split), TILE_K):
            offs_m = m + tl.arange(0, TILE_K)
            mask_m = offs_m < M
            wide_m = offs_m.to(tl.int64)
            x = tl.load(
                x_ptr + (wide_m * stride_x_k)[:, None] + x_columns,
                mask=mask_m[:, None] & mask_n[None, :],
                other=0.0,
            )  # [TILE_K, TILE_N]
            w = dense_tile(
                values_ptr + wide_m * stride_values_m,
                words_ptr + wide_m * stride_words_m,
                mask_m,
                first,
                groups,
                stride_values_e,
                dtype,
                GROUPS,
                STORED,
                PLACES,
                BITS,
                PAIRED,
                True,
            )  # [TILE_M, TILE_K]
            acc = tl.dot(w, x, acc, PRECISION, out_dtype=acc.dtype)
    else:
        GROUPS: tl.constexpr = TILE_K // PLACES
        rows = row_tile * TILE_M + tl.arange(0, TILE_M)
        mask_rows = rows < M
        wide_rows = rows.to(tl.int64)
        for g in range(start, tl.minimum(groups, start + per_split), GROUPS):
            columns, mask_k = tile_columns(g, groups, GROUPS, OF, PLACES)
            x = tl.load(
                x_ptr + (columns.to(tl.int64) * stride_x_k)[:, None] + x_columns,
                mask=mask_k[:, None] & mask_n[None, :],
                other=0.0,
            )  # [TILE_K, TILE_N]
            w = dense_tile(
                values_ptr + wide_rows * stride_values_m,
                words_ptr + wide_rows * stride_words_m,
                mask_rows,
                g,
                groups,
                stride_values_e,
                dtype,
                GROUPS,
                STORED,
                PLACES,
                BITS,
                PAIRED,
                False,
            )  # [TILE_M, TILE_K]
            acc = tl.dot(w, x, acc, PRECISION, out_dtype=acc.dtype)

    out_ptr += matrix.to(tl.int64) * stride_out_matrix + split.to(tl.int64) * stride_out_split
    out = out_ptr + (rows.to(tl.int64) * stride_out_m)[:, None]
    out += (offs_n.to(tl.int64) * stride_out_n)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_rows[:, None] & mask_n[None, :])


def nm_matmul(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]`, or `W[b, p].mT @ x[b, p]` with `transposed`.

    Shapes: values (B or 1, P, M, E), any strides, indices int32 (P, M, W), x (B or 1, P, R, N), any
    strides (0 where expanded); R = K, or M with `transposed`. Returns (B, P, rows, N), rows = M, or
    K with `transposed`, with `transposed_output` in the storage of a contiguous (B, P, N, rows).
    bfloat16, float16, float32, float64; accumulates in float32 (float64 for float64). float32 is
    read as tf32 where `torch.backends.cuda.matmul.fp32_precision` says so.

    An entry that is not stored counts as 0 and is multiplied: x's NaN is seen as by a dense W.
    """
    patterns, rows_of_w, entries = values.shape[1:]
    groups, columns = entries // n, x.shape[3]
    batch = x.shape[0] if values.shape[0] == 1 else values.shape[0]
    rows = groups * m if transposed else rows_of_w
    if transposed_output:
        out = x.new_empty(batch, patterns, columns, rows).mT
    else:
        out = x.new_empty(batch, patterns, rows, columns)
    if out.numel() == 0 or x.shape[2] == 0:
        return out.zero_()
    indices = indices.contiguous()
    if not transposed and triton_few_columns.takes(columns, n, m):
        return triton_few_columns.nm_few_columns(out, values, indices, x, n=n, m=m)

    pairs = paired_values(values, n)
    read = values if pairs is None else pairs
    constexprs, options = _config(x.dtype, n, m, columns, transposed, input_precision(x.dtype))
    tile_m, tile_k, tile_n = (constexprs[name] for name in ("TILE_M", "TILE_K", "TILE_N"))
    # One buffer's bytes are kept for the expanded tile.
    buffer_bytes = tile_k * (tile_m + tile_n) * x.element_size()
    wanted = options["num_stages"] + 1
    options["num_stages"] = max(1, fitting_stages(wanted, 1, buffer_bytes, x.device) - 1)
    row_tiles = _row_tiles(rows_of_w, groups, constexprs)
    column_tiles = triton.cdiv(columns, tile_n)
    programs = row_tiles * column_tiles * batch * patterns
    step = tile_k if transposed else tile_k // constexprs["PLACES"]
    steps = triton.cdiv(rows_of_w if transposed else groups, step)
    splits = _splits(programs, steps, x.device)
    per_split = triton.cdiv(steps, splits) * step
    splits = triton.cdiv(steps * step, per_split)
    made = out
    if splits > 1:
        accumulate = torch.promote_types(x.dtype, torch.float32)
        made = torch.empty((splits, *out.shape), dtype=accumulate, device=x.device)
    with torch.cuda.device_of(x):
        nm_matmul_kernel[(programs, splits)](
            made,
            read,
            indices,
            x,
            rows_of_w,
            columns,
            groups,
            patterns,
            row_tiles,
            column_tiles,
            per_split,
            read.stride(0) if values.shape[0] > 1 else 0,
            *read.stride()[1:],
            *indices.stride()[:2],
            x.stride(0) if x.shape[0] > 1 else 0,
            *x.stride()[1:],
            made.stride(0) if splits > 1 else 0,
            rows * columns,
            *made.stride()[-2:],
            PAIRED=pairs is not None,
            **constexprs,
            **options,
        )
    return out if splits == 1 else out.copy_(made.sum(0))


def _row_tiles(rows_of_w: int, groups: int, constexprs: dict[str, Any]) -> int:
    if constexprs["TRANSPOSED"]:
        return triton.cdiv(groups, constexprs["TILE_M"] // constexprs["PLACES"])
    return triton.cdiv(rows_of_w, constexprs["TILE_M"])


def _splits(programs: int, steps: int, device: torch.device) -> int:
    """Into how many parts the contracted dimension is cut, added up in a second pass, so that few
    tiles fill the device: always the same for the same shapes.
    """
    processors = triton_few_columns.processors(device)
    if programs >= processors:
        return 1
    return max(1, min(2 * processors // programs, steps // 2, MOST_SPLITS))


def compilations() -> Iterator[Compilation]:
    """Every configuration: dtypes, n:m, few columns, transposed matrices, strided operands."""
    dtypes = [(d, "ieee") for d in DTYPE_NAMES] + [(torch.float32, "tf32")]
    for dtype, precision in dtypes:
        for columns in CONFIGS_16_BIT:
            for transposed in (False, True):
                yield _compilation(dtype, 2, 4, columns, transposed, precision)
    for n, m in COMPILED_NM[1:]:
        for transposed in (False, True):
            yield _compilation(torch.bfloat16, n, m, 128, transposed, "ieee")
    for transposed in (False, True):
        yield _compilation(torch.bfloat16, 2, 4, 128, transposed, "ieee", strided=True)


def _config(
    dtype: torch.dtype, n: int, m: int, columns: int, transposed: bool, precision: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    table = {torch.float32: CONFIGS_FP32, torch.float64: CONFIGS_FP64}.get(dtype, CONFIGS_16_BIT)
    table = CONFIGS_TF32 if precision == "tf32" else table
    tile_n = min((size for size in table if size >= columns), default=max(table))
    tile_m, tile_k, warps, stages = table[tile_n]
    constexprs = nm_constants(n, m) | {
        "TRANSPOSED": transposed,
        "TILE_M": tile_m,
        "TILE_K": tile_k,
        "TILE_N": tile_n,
        "PRECISION": precision,
    }
    return constexprs, {"num_warps": warps, "num_stages": stages}


def _compilation(
    dtype: torch.dtype,
    n: int,
    m: int,
    columns: int,
    transposed: bool,
    precision: str,
    *,
    strided: bool = False,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs, options = _config(dtype, n, m, columns, transposed, precision)
    constexprs["PAIRED"] = paired = n == 2 and dtype.itemsize == 2 and not strided
    if not strided:
        constexprs |= {"stride_values_e": 1, "stride_x_n": 1, "stride_out_n": 1}
    pointers = dict.fromkeys(("out_ptr", "values_ptr", "x_ptr"), f"*{name}")
    if paired:
        pointers["values_ptr"] = "*i32"
    parts = [f"{n}:{m}", name, precision if dtype == torch.float32 else "", str(columns)]
    parts += ["transposed" * transposed, "strided" * strided]
    return Compilation(
        f"nm_matmul[{','.join(part for part in parts if part)}]",
        nm_matmul_kernel,
        kernel_signature(nm_matmul_kernel, pointers, constexprs),
        constexprs,
        options,
    )
