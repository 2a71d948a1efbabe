"""nm_sddmm by cuBLAS: the dense product in scratch memory of bounded size, and its stored entries.

No arithmetic is spared, as none is by tiles of the product whose entries are kept (an n:m pattern
stores some of every tile), and cuBLAS computes it faster: 2:4, 4096 x 4096 in bfloat16 at D = 512
took 413 us in such tiles, the dense product 32 us (one H200, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.nm_matmul.triton_common import COMPILED_NM
from sparse_layouts.kernels.scratch_products import (
    INTEGERS,
    ScratchMatrices,
    multiply_into,
    pieces,
    row_pitch,
)
from sparse_layouts.kernels.triton_common import kernel_signature
from sparse_layouts.nm_packing import position_bits

# (rows of a tile, entries, warps): for wide matrices and, second, for those up to NARROW entries
CONFIGS = [(4, 1024, 4), (32, 128, 4)]
NARROW = 512


# Entries are specialised (divisible by 16 or not: the width of a store), sizes are not.
@triton.jit(do_not_specialize=["M", "patterns", "row_tiles", "entry_tiles"])
def nm_gather_kernel(
    values_ptr,
    dense_ptr,
    words_ptr,
    M,
    entries,
    patterns,
    row_tiles,
    entry_tiles,
    stride_values_batch,
    stride_values_pattern,
    stride_values_m,
    stride_words_pattern,
    stride_words_m,
    stride_dense_matrix,
    stride_dense_m,
    STORED: tl.constexpr,
    OF: tl.constexpr,
    BITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_E: tl.constexpr,
):
    A_WORD: tl.constexpr = 32 // BITS
    pid = tl.program_id(0)
    entry_tile = pid % entry_tiles
    row_tile = pid // entry_tiles % row_tiles
    matrix = pid // entry_tiles // row_tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    rows = row_tile * TILE_M + tl.arange(0, TILE_M)
    mask_m = rows < M
    rows = rows.to(tl.int64)
    words = words_ptr + pattern * stride_words_pattern + rows * stride_words_m
    dense = dense_ptr + matrix.to(tl.int64) * stride_dense_matrix + rows * stride_dense_m
    values = values_ptr + batch * stride_values_batch + pattern * stride_values_pattern
    values += rows * stride_values_m

    entry = entry_tile * TILE_E + tl.arange(0, TILE_E)
    mask = mask_m[:, None] & (entry < entries)[None, :]
    word = tl.load(words[:, None] + (entry // A_WORD)[None, :], mask=mask, other=0)
    place = (word >> (entry % A_WORD * BITS)[None, :]) & ((1 << BITS) - 1)
    columns = (entry // STORED * OF)[None, :] + place  # [TILE_M, TILE_E]
    found = tl.load(dense[:, None] + columns, mask=mask, other=0)
    tl.store(values[:, None] + entry[None, :], found, mask=mask)


def nm_sddmm_in_scratch_memory(a: Tensor, b: Tensor, indices: Tensor, *, n: int, m: int) -> Tensor:
    """`values[s, p]` = the entries of `a[s, p] @ b[s, p]` that the n:m matrix p stores, from a
    dense product in scratch memory.

    Shapes, dtypes and result as `nm_sddmm` of `triton_nm_sddmm.py`. The product is torch's own, in
    its precision, rounded once to the dtype. Scratch memory: the product, or some of its rows, at
    most 64 MiB at a time.
    """
    batch, patterns, rows, d = a.shape
    columns = b.shape[3]
    values = a.new_empty(batch, patterns, rows, columns // m * n)
    if values.numel() == 0 or d == 0:
        return values.zero_()
    indices, scratch = indices.contiguous(), ScratchMatrices(a)
    row_bytes = row_pitch(columns, a.dtype) * a.element_size()
    for batches, own, part in pieces(batch, patterns, rows, row_bytes):
        left, right = a[batches, own, part], b[batches, own]
        dense = scratch.take(*left.shape[:3], columns)
        multiply_into(dense, left, right)
        gather_into(values[batches, own, part], dense, indices[own, part], n=n, m=m)
    return values


def gather_into(values: Tensor, dense: Tensor, indices: Tensor, *, n: int, m: int) -> None:
    """Writes the stored entries of dense (B, P, M, K), a part of a contiguous tensor, to values
    (B, P, M, E).
    """
    batch, patterns, rows, entries = values.shape
    integer = INTEGERS[values.element_size()]
    constexprs, options = _config(n, m, entries)
    row_tiles = triton.cdiv(rows, constexprs["TILE_M"])
    entry_tiles = triton.cdiv(entries, constexprs["TILE_E"])
    with torch.cuda.device_of(values):
        nm_gather_kernel[(row_tiles * entry_tiles * batch * patterns,)](
            values.view(integer),
            dense.view(integer),
            indices,
            rows,
            entries,
            patterns,
            row_tiles,
            entry_tiles,
            *values.stride()[:3],
            *indices.stride()[:2],
            *dense.stride()[1:3],
            **constexprs,
            **options,
        )


def compilations() -> Iterator[Compilation]:
    """Every configuration: sizes of an entry, n:m, wide and narrow."""
    for n, m in COMPILED_NM:
        yield _compilation(2, n, m, 2048)
    for size in (4, 8):
        yield _compilation(size, 2, 4, 2048)
    for size in INTEGERS:
        yield _compilation(size, 2, 4, 64)


def _config(n: int, m: int, entries: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    tile_m, tile_e, warps = CONFIGS[entries <= NARROW]
    constexprs = {
        "STORED": n,
        "OF": m,
        "BITS": position_bits(m),
        "TILE_M": tile_m,
        "TILE_E": tile_e,
    }
    return constexprs, {"num_warps": warps}


def _compilation(size: int, n: int, m: int, entries: int) -> Compilation:
    constexprs, options = _config(n, m, entries)
    pointers = dict.fromkeys(("values_ptr", "dense_ptr"), f"*i{8 * size}")
    return Compilation(
        f"nm_gather[{n}:{m},i{8 * size},{entries}]",
        nm_gather_kernel,
        kernel_signature(nm_gather_kernel, pointers, constexprs),
        constexprs,
        options,
    )
