"""nm_sddmm in Triton: dense tiles of the product, of which the stored entries are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.nm_matmul.triton_common import (
    COMPILED_NM,
    banded_tile,
    load_positions,
    nm_constants,
    tile_columns,
)
from sparse_layouts.kernels.triton_common import (
    DTYPE_NAMES,
    fitting_stages,
    input_precision,
    kernel_signature,
)

# (rows of a tile, columns, entries of D a step, warps, stages): 16-bit dtypes; float32 as tf32,
# float32 in full (no tensor cores: registers are the limit), float64
CONFIG_16_BIT = (128, 128, 64, 8, 3)
CONFIG_TF32 = (128, 128, 32, 8, 3)
CONFIG_FP32 = (64, 128, 32, 8, 2)
CONFIG_FP64 = (64, 64, 16, 4, 2)


# Strides are specialised (divisible by 16 or not: the width of a load), sizes are not.
@triton.jit(do_not_specialize=["M", "groups", "patterns", "row_tiles", "column_tiles"])
def nm_sddmm_kernel(
    values_ptr,
    a_ptr,
    b_ptr,
    words_ptr,
    M,
    D,
    groups,
    patterns,
    row_tiles,
    column_tiles,
    stride_a_batch,
    stride_a_pattern,
    stride_a_m,
    stride_a_d,
    stride_b_batch,
    stride_b_pattern,
    stride_b_d,
    stride_b_k,
    stride_words_pattern,
    stride_words_m,
    STORED: tl.constexpr,
    OF: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    GROUPS: tl.constexpr = TILE_K // PLACES
    tiles = row_tiles * column_tiles
    pid = tl.program_id(0)
    row_tile, column_tile = banded_tile(pid % tiles, row_tiles, column_tiles)
    matrix = pid // tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    rows = row_tile * TILE_M + tl.arange(0, TILE_M)
    mask_m = rows < M
    first = column_tile * GROUPS
    columns, mask_k = tile_columns(first, groups, GROUPS, OF, PLACES)

    # What does not exist is read from row or column 0, and not written: so that the loads need no
    # mask but that of D's edge.
    a_rows = tl.where(mask_m, rows, 0).to(tl.int64) * stride_a_m
    b_columns = tl.where(mask_k, columns, 0).to(tl.int64) * stride_b_k
    offs_d = tl.arange(0, TILE_D)
    wide_d = offs_d.to(tl.int64)
    a = a_ptr + batch * stride_a_batch + pattern * stride_a_pattern
    b = b_ptr + batch * stride_b_batch + pattern * stride_b_pattern
    a = a + a_rows[:, None] + (wide_d * stride_a_d)[None, :]  # [TILE_M, TILE_D]
    b = b + (wide_d * stride_b_d)[:, None] + b_columns[None, :]  # [TILE_D, TILE_K]
    acc_type = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((TILE_M, TILE_K), dtype=acc_type)
    step = tl.full((), TILE_D, tl.int64)
    for _ in range(0, D // TILE_D):
        acc = tl.dot(tl.load(a), tl.load(b), acc, PRECISION, out_dtype=acc.dtype)
        a += step * stride_a_d
        b += step * stride_b_d
    if D % TILE_D != 0:
        mask_d = offs_d < D % TILE_D
        left = tl.load(a, mask=mask_d[None, :], other=0.0)
        right = tl.load(b, mask=mask_d[:, None], other=0.0)
        acc = tl.dot(left, right, acc, PRECISION, out_dtype=acc.dtype)

    wide_rows = rows.to(tl.int64)
    words = words_ptr + pattern * stride_words_pattern + wide_rows * stride_words_m
    positions = load_positions(words, mask_m, first, groups, GROUPS, STORED, BITS, False)
    places = tl.arange(0, PLACES)[None, None, :]
    acc = tl.reshape(acc, (TILE_M, GROUPS, PLACES))
    entries = groups.to(tl.int64) * STORED
    values = values_ptr + (matrix.to(tl.int64) * M + wide_rows)[:, None] * entries
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    kept = ()
    for j in tl.static_range(STORED):
        # one place is kept: the sum adds zeros to it
        one = tl.where(positions[j][:, :, None] == places, acc, 0.0)
        kept = kept + (tl.sum(one, 2).to(dtype),)  # [TILE_M, GROUPS]
    if STORED == 2:
        both = tl.reshape(tl.join(kept[0], kept[1]), (TILE_M, 2 * GROUPS))
        offs_e = 2 * first + tl.arange(0, 2 * GROUPS)
        mask = mask_m[:, None] & (offs_e < entries)[None, :]
        tl.store(values + offs_e[None, :], both, mask=mask)
    else:
        offs_e = (first + tl.arange(0, GROUPS)) * STORED
        mask = mask_m[:, None] & (offs_e < entries)[None, :]
        for j in tl.static_range(STORED):
            tl.store(values + (offs_e + j)[None, :], kept[j], mask=mask)


def nm_sddmm(a: Tensor, b: Tensor, indices: Tensor, *, n: int, m: int) -> Tensor:
    """`values[s, p]` = the entries of `a[s, p] @ b[s, p]` that the n:m matrix p stores.

    Shapes: a (B, P, M, D), b (B, P, D, K), any strides (0 where expanded), indices int32 (P, M, W);
    values (B, P, M, E) contiguous. bfloat16, float16, float32, float64; accumulates in float32
    (float64 for float64). float32 is read as tf32 where
    `torch.backends.cuda.matmul.fp32_precision` says so.
    """
    batch, patterns, rows, d = a.shape
    groups = b.shape[3] // m
    values = a.new_empty(batch, patterns, rows, groups * n)
    if values.numel() == 0 or d == 0:
        return values.zero_()
    indices = indices.contiguous()
    constexprs, options = _config(a.dtype, n, m, input_precision(a.dtype))
    tile_m, tile_k = constexprs["TILE_M"], constexprs["TILE_K"]
    buffer_bytes = constexprs["TILE_D"] * (tile_m + tile_k) * a.element_size()
    options["num_stages"] = fitting_stages(options["num_stages"], 1, buffer_bytes, a.device)
    row_tiles = triton.cdiv(rows, tile_m)
    column_tiles = triton.cdiv(groups, tile_k // constexprs["PLACES"])
    with torch.cuda.device_of(a):
        nm_sddmm_kernel[(row_tiles * column_tiles * batch * patterns,)](
            values,
            a,
            b,
            indices,
            rows,
            d,
            groups,
            patterns,
            row_tiles,
            column_tiles,
            *a.stride(),
            *b.stride(),
            *indices.stride()[:2],
            **constexprs,
            **options,
        )
    return values


def compilations() -> Iterator[Compilation]:
    """Every configuration: dtypes, n:m, operands contiguous along D and across it."""
    dtypes = [(d, "ieee") for d in DTYPE_NAMES] + [(torch.float32, "tf32")]
    for dtype, precision in dtypes:
        for along_d in (True, False):
            yield _compilation(dtype, 2, 4, precision, along_d)
    for n, m in COMPILED_NM[1:]:
        yield _compilation(torch.bfloat16, n, m, "ieee", True)


def _config(
    dtype: torch.dtype, n: int, m: int, precision: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    table = {torch.float32: CONFIG_FP32, torch.float64: CONFIG_FP64}
    config = CONFIG_TF32 if precision == "tf32" else table.get(dtype, CONFIG_16_BIT)
    tile_m, tile_k, tile_d, warps, stages = config
    constexprs = nm_constants(n, m) | {
        "TILE_M": tile_m,
        "TILE_K": tile_k,
        "TILE_D": tile_d,
        "PRECISION": precision,
    }
    return constexprs, {"num_warps": warps, "num_stages": stages}


def _compilation(dtype: torch.dtype, n: int, m: int, precision: str, along_d: bool) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs, options = _config(dtype, n, m, precision)
    unit = ("stride_a_d", "stride_b_d") if along_d else ("stride_a_m", "stride_b_k")
    constexprs |= dict.fromkeys(unit, 1)
    pointers = dict.fromkeys(("values_ptr", "a_ptr", "b_ptr"), f"*{name}")
    parts = [f"{n}:{m}", name, precision if dtype == torch.float32 else ""]
    parts += ["" if along_d else "across"]
    return Compilation(
        f"nm_sddmm[{','.join(part for part in parts if part)}]",
        nm_sddmm_kernel,
        kernel_signature(nm_sddmm_kernel, pointers, constexprs),
        constexprs,
        options,
    )
