"""nm_matmul in Triton for a few columns of x: no tensor cores, the packed matrix read once.

What limits such a product is the reading of the matrix, and a step of `tl.dot` would wait for it:
here every thread multiplies the groups that it has loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.nm_matmul.triton_common import (
    COMPILED_NM,
    load_positions,
    load_values,
    nm_constants,
    paired_values,
)
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature

# (rows of a tile, groups of a step, warps), the most rows first. Every thread has one group of all
# the tile's rows, so that an entry of x is loaded once for them. One H200, 2:4 in bfloat16,
# 2026-11-21, microseconds: 4 columns, 4096 x 4096: 23.2 with 8 rows, 34.3 with 4; 8192 x 8192:
# 83.0 and 100.8.
CONFIGS = [(8, 128, 4), (4, 128, 4)]
# For one column and a row of at least this many groups; the same GPU and day: 4096 x 4096: 15.1,
# with (8, 128, 4) 17.2; 8192 x 8192: 49.7, with (8, 128, 4) 51.0, with (16, 128, 4) 76.8.
CONFIG_OF_ONE = (4, 512, 4)
# Sums that a thread keeps, one for every row and column: past so many they leave the registers.
MOST_SUMS = 32
# Past so many columns the multiplications take longer than the tensor cores'.
MOST_COLUMNS = 8
# An entry is compared with each place of its group: past so many comparisons likewise.
MOST_COMPARISONS = 32


# The stride of an entry is not specialised: every load then gets one element a thread, all of them
# the same layout, and nothing moves between threads.
@triton.jit(do_not_specialize=["M", "N", "groups", "patterns", "row_tiles", "stride_values_e"])
def nm_few_columns_kernel(
    out_ptr,
    values_ptr,
    words_ptr,
    x_ptr,
    M,
    N,
    groups,
    patterns,
    row_tiles,
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
    stride_out_matrix,
    stride_out_m,
    stride_out_n,
    STORED: tl.constexpr,
    OF: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    PAIRED: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    matrix = pid // row_tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    rows = pid % row_tiles * TILE_M + tl.arange(0, TILE_M)
    mask_m = rows < M
    rows = rows.to(tl.int64)
    values_ptr += batch * stride_values_batch + pattern * stride_values_pattern
    words_ptr += pattern * stride_words_pattern
    x_ptr += batch * stride_x_batch + pattern * stride_x_pattern
    values = values_ptr + rows * stride_values_m
    words = words_ptr + rows * stride_words_m
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc_type = tl.float64 if dtype == tl.float64 else tl.float32
    sums = ()  # one [TILE_M, GROUPS] a column
    for _ in tl.static_range(COLUMNS):
        sums = sums + (tl.zeros((TILE_M, GROUPS), dtype=acc_type),)

    for g in range(0, groups, GROUPS):
        group = g + tl.arange(0, GROUPS)
        mask_g = group < groups
        entries = load_values(
            values, mask_m, g, groups, stride_values_e, dtype, GROUPS, STORED, PAIRED
        )
        positions = load_positions(words, mask_m, g, groups, GROUPS, STORED, BITS, False)
        for place in tl.static_range(OF):
            w = tl.zeros((TILE_M, GROUPS), dtype=acc_type)
            for j in tl.static_range(STORED):
                w = tl.where(positions[j] == place, entries[j].to(acc_type), w)
            x_rows = x_ptr + (group * OF + place).to(tl.int64) * stride_x_k
            added = ()
            for c in tl.static_range(COLUMNS):
                x = x_rows + tl.full((), c, tl.int64) * stride_x_n
                x = tl.load(x, mask=mask_g & (c < N), other=0.0)  # [GROUPS]
                added = added + (sums[c] + w * x.to(acc_type)[None, :],)
            sums = added

    out_ptr += matrix.to(tl.int64) * stride_out_matrix + rows * stride_out_m
    for c in tl.static_range(COLUMNS):
        out = tl.sum(sums[c], 1).to(out_ptr.dtype.element_ty)
        offs = tl.full((), c, tl.int64) * stride_out_n
        tl.store(out_ptr + offs, out, mask=mask_m & (c < N))


def takes(columns: int, n: int, m: int) -> bool:
    """Whether these products are faster here than with tensor cores."""
    return columns <= MOST_COLUMNS and n * m <= MOST_COMPARISONS


def nm_few_columns(
    out: Tensor, values: Tensor, indices: Tensor, x: Tensor, *, n: int, m: int
) -> Tensor:
    """Writes `W[b, p] @ x[b, p]` to out (B, P, M, N), N at most 8; see `nm_matmul` for the rest."""
    batch, patterns, rows, columns = out.shape
    pairs = paired_values(values, n)
    read = values if pairs is None else pairs
    width = triton.next_power_of_2(columns)
    fitting = [c for c in CONFIGS if c[0] * width <= MOST_SUMS] or CONFIGS[-1:]
    if columns == 1 and values.shape[3] // n >= CONFIG_OF_ONE[1]:
        fitting = [CONFIG_OF_ONE]
    enough = 2 * processors(x.device)
    tile_m, groups_a_step, warps = next(
        (c for c in fitting if batch * patterns * triton.cdiv(rows, c[0]) >= enough), fitting[-1]
    )
    row_tiles = triton.cdiv(rows, tile_m)
    with torch.cuda.device_of(x):
        nm_few_columns_kernel[(row_tiles * batch * patterns,)](
            out,
            read,
            indices,
            x,
            rows,
            columns,
            values.shape[3] // n,
            patterns,
            row_tiles,
            read.stride(0) if values.shape[0] > 1 else 0,
            *read.stride()[1:],
            *indices.stride()[:2],
            x.stride(0) if x.shape[0] > 1 else 0,
            *x.stride()[1:],
            rows * columns,
            *out.stride()[2:],
            **nm_constants(n, m),
            PAIRED=pairs is not None,
            TILE_M=tile_m,
            GROUPS=groups_a_step,
            COLUMNS=width,
            num_warps=warps,
        )
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 4 for Triton's interpreter, so that small cases meet splits."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def compilations() -> Iterator[Compilation]:
    """Every configuration: rows, columns, dtypes, n:m, entries that are not paired."""
    yield _compilation(torch.bfloat16, 2, 4, CONFIG_OF_ONE, 1)
    for config in CONFIGS:
        for columns in (1, 2, 4, 8):
            if config[0] * columns > MOST_SUMS:
                continue
            yield _compilation(torch.bfloat16, 2, 4, config, columns)
    for dtype in DTYPE_NAMES:
        if dtype != torch.bfloat16:
            yield _compilation(dtype, 2, 4, CONFIG_OF_ONE, 1)
        yield _compilation(dtype, 2, 4, CONFIGS[0], 2, paired=False)
    for n, m in COMPILED_NM[1:]:
        if takes(1, n, m):
            yield _compilation(torch.bfloat16, n, m, CONFIGS[0], 1)


def _compilation(
    dtype: torch.dtype,
    n: int,
    m: int,
    config: tuple[int, int, int],
    columns: int,
    *,
    paired: bool = True,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    paired = paired and n == 2 and dtype.itemsize == 2
    constexprs: dict[str, Any] = nm_constants(n, m) | {
        "PAIRED": paired,
        "TILE_M": config[0],
        "GROUPS": config[1],
        "COLUMNS": columns,
    }
    pointers = dict.fromkeys(("out_ptr", "values_ptr", "x_ptr"), f"*{name}")
    if paired:
        pointers["values_ptr"] = "*i32"
    parts = [f"{n}:{m}", name, f"{config[0]}x{config[1]}", str(columns), "paired" * paired]
    return Compilation(
        f"nm_few_columns[{','.join(part for part in parts if part)}]",
        nm_few_columns_kernel,
        kernel_signature(nm_few_columns_kernel, pointers, constexprs),
        constexprs,
        {"num_warps": config[2]},
    )
