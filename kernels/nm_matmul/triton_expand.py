"""nm_matmul for many columns of x: the matrix is written out densely, in scratch memory of bounded
size, and multiplied there by cuBLAS.

No sparse arithmetic and no memory saved while it runs: a wide product is limited by arithmetic,
which a tile that is expanded in registers again for every tile of columns only makes slower.
2:4, 4096 x 4096 in bfloat16 at 512 columns took 164 us so, and cuBLAS on a dense matrix 24 us (one
H200, 2026-11-21); to write the dense matrix once moves 50 MB, some 15 us of memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.nm_matmul.cpu import empty_result
from sparse_layouts.kernels.nm_matmul.triton_common import (
    COMPILED_NM,
    load_positions,
    load_values,
    nm_constants,
    paired_values,
    tile_columns,
)
from sparse_layouts.kernels.scratch_products import (
    INTEGERS,
    ScratchMatrices,
    multiply_into,
    pieces,
    row_pitch,
)
from sparse_layouts.kernels.triton_common import kernel_signature

# (rows of a tile, columns, warps): for wide matrices and, second, for those up to NARROW columns
CONFIGS = [(4, 2048, 4), (32, 256, 4)]
NARROW = 1024
WORD_BITS = 64
# Words of 64 bits that a group may have to be put together in them.
MOST_WORDS = 4


# Groups are specialised (divisible by 16 or not: the width of a load), sizes are not.
@triton.jit(do_not_specialize=["M", "patterns", "row_tiles", "column_tiles"])
def nm_expand_kernel(
    out_ptr,
    values_ptr,
    words_ptr,
    M,
    first_group,
    end_group,
    patterns,
    row_tiles,
    column_tiles,
    stride_values_batch,
    stride_values_pattern,
    stride_values_m,
    stride_values_e,
    stride_words_pattern,
    stride_words_m,
    stride_out_matrix,
    stride_out_m,
    STORED: tl.constexpr,
    OF: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    PAIRED: tl.constexpr,
    EACH: tl.constexpr,
    WORDS: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    pid = tl.program_id(0)
    column_tile = pid % column_tiles
    row_tile = pid // column_tiles % row_tiles
    matrix = pid // column_tiles // row_tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    rows = row_tile * TILE_M + tl.arange(0, TILE_M)
    mask_m = rows < M
    rows = rows.to(tl.int64)
    values_ptr += batch * stride_values_batch + pattern * stride_values_pattern
    values = values_ptr + rows * stride_values_m
    words = words_ptr + pattern * stride_words_pattern + rows * stride_words_m
    out = out_ptr + matrix.to(tl.int64) * stride_out_matrix + rows * stride_out_m
    start = column_tile * GROUPS
    first = first_group + start
    kind: tl.constexpr = out_ptr.dtype.element_ty
    # A word is loaded by every group that it describes: pieces may begin in the middle of one.
    entries = load_values(
        values, mask_m, first, end_group, stride_values_e, tl.int16, GROUPS, STORED, PAIRED
    )
    positions = load_positions(words, mask_m, first, end_group, GROUPS, STORED, BITS, False)
    if WORDS:
        # out is of 64-bit words, WORDS a group: each thread puts its groups together
        IN_A_WORD: tl.constexpr = 64 // EACH
        MASK: tl.constexpr = (1 << EACH) - 1
        made = ()
        for k in tl.static_range(WORDS):
            word = tl.zeros((TILE_M, GROUPS), dtype=kind)
            for j in tl.static_range(STORED):
                place = positions[j]
                one = (entries[j].to(kind) & MASK) << (place % IN_A_WORD * EACH).to(kind)
                word |= tl.where(place // IN_A_WORD == k, one, 0)
            made = made + (word,)
        if WORDS == 1:
            tile = made[0]
        elif WORDS == 2:
            tile = tl.reshape(tl.join(made[0], made[1]), (TILE_M, 2 * GROUPS))
        else:
            tile = tl.join(tl.join(made[0], made[2]), tl.join(made[1], made[3]))
            tile = tl.reshape(tile, (TILE_M, 4 * GROUPS))
        columns = start * WORDS + tl.arange(0, GROUPS * WORDS)
        exists = columns < (end_group - first_group) * WORDS
    else:
        place = tl.arange(0, PLACES)[None, None, :]
        tile = tl.zeros((TILE_M, GROUPS, PLACES), dtype=kind)
        for j in tl.static_range(STORED):
            tile = tl.where(positions[j][:, :, None] == place, entries[j][:, :, None], tile)
        tile = tl.reshape(tile, (TILE_M, GROUPS * PLACES))
        columns, exists = tile_columns(start, end_group - first_group, GROUPS, OF, PLACES)
    tl.store(out[:, None] + columns[None, :], tile, mask=mask_m[:, None] & exists[None, :])


def nm_matmul_in_scratch_memory(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]`, or `W[b, p].mT @ x[b, p]` with `transposed`, from W written
    out densely in scratch memory.

    Shapes, dtypes and result as `nm_matmul` of `triton_nm_matmul.py`. The product is torch's own on
    dense operands, in its precision. Scratch memory: W, or a piece of it of at most 64 MiB at a
    time, unless a single row (with `transposed`, a single group of columns) is larger. A piece has
    rows of W, with `transposed` columns: every entry of the result is one piece's, so that nothing
    is added up or rounded twice, and equal inputs give equal bits as far as cuBLAS does.
    """
    shared, patterns, rows, entries = values.shape
    groups = entries // n
    batch = x.shape[0] if shared == 1 else shared
    out = empty_result(x, batch, groups * m if transposed else rows, transposed_output)
    if out.numel() == 0 or x.shape[2] == 0:
        return out.zero_()
    indices, scratch = indices.contiguous(), ScratchMatrices(values)
    each = rows * m if transposed else row_pitch(groups * m, values.dtype)
    length = groups if transposed else rows
    for batches, own, part in pieces(shared, patterns, length, each * values.element_size()):
        stored, words, span, target = values[batches, own], indices[own], (0, groups), part
        if transposed:
            span, target = (part.start, part.stop), slice(part.start * m, part.stop * m)
        else:
            stored, words = stored[:, :, part], words[:, part]
        w = scratch.take(*stored.shape[:3], (span[1] - span[0]) * m)
        expand_into(w, stored, words, span, n=n, m=m)
        samples = slice(None) if shared == 1 else batches
        dense = x[samples, own] if x.shape[0] > 1 else x[:, own]
        multiply_into(out[samples, own, target], w.mT if transposed else w, dense)
    return out


def expand_into(
    w: Tensor, values: Tensor, indices: Tensor, groups: tuple[int, int], *, n: int, m: int
) -> None:
    """Writes groups [start, stop) of matrices (B, P, M, E) densely to w (B, P, M, columns), a part
    of a contiguous tensor.
    """
    batch, patterns, rows, _ = values.shape
    start, stop = groups
    pairs = paired_values(values, n)
    read = values.view(INTEGERS[values.element_size()]) if pairs is None else pairs
    constexprs, options = _config(values.element_size(), n, m, (stop - start) * m)
    integer = torch.int64 if constexprs["WORDS"] else INTEGERS[w.element_size()]
    written = w.view(integer)
    row_tiles = triton.cdiv(rows, constexprs["TILE_M"])
    column_tiles = triton.cdiv(stop - start, constexprs["GROUPS"])
    with torch.cuda.device_of(w):
        nm_expand_kernel[(row_tiles * column_tiles * batch * patterns,)](
            written,
            read,
            indices,
            rows,
            start,
            stop,
            patterns,
            row_tiles,
            column_tiles,
            *read.stride(),
            *indices.stride()[:2],
            *written.stride()[1:3],
            PAIRED=pairs is not None,
            **constexprs,
            **options,
        )


def compilations() -> Iterator[Compilation]:
    """Every configuration: sizes of an entry, n:m, wide and narrow, entries that are not paired."""
    for n, m in COMPILED_NM:
        yield _compilation(2, n, m, 4096)
    for size in INTEGERS:
        for columns in (4096, 256):
            if (size, columns) != (2, 4096):
                yield _compilation(size, 2, 4, columns)
        yield _compilation(size, 2, 4, 4096, strided=True)
    for size, n, m in ((4, 1, 2), (4, 3, 8), (8, 8, 16)):
        yield _compilation(size, n, m, 4096)


def _config(size: int, n: int, m: int, columns: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options; `size`: bytes of an entry."""
    tile_m, width, warps = CONFIGS[columns <= NARROW]
    constexprs = nm_constants(n, m)
    bits = 8 * size * m
    # a word of one entry is no less work than the entry
    as_words = size < 8 and bits % WORD_BITS == 0 and bits // WORD_BITS in (1, 2, MOST_WORDS)
    constexprs |= {
        "EACH": 8 * size,
        "WORDS": bits // WORD_BITS if as_words else 0,
        "TILE_M": tile_m,
        "GROUPS": width // constexprs["PLACES"],
    }
    return constexprs, {"num_warps": warps}


def _compilation(size: int, n: int, m: int, columns: int, *, strided: bool = False) -> Compilation:
    constexprs, options = _config(size, n, m, columns)
    constexprs["PAIRED"] = paired = n == 2 and size == 2 and not strided
    if not strided:
        constexprs["stride_values_e"] = 1
    pointers = {
        "out_ptr": "*i64" if constexprs["WORDS"] else f"*i{8 * size}",
        "values_ptr": "*i32" if paired else f"*i{8 * size}",
    }
    parts = [f"{n}:{m}", f"i{8 * size}", str(columns), "strided" * strided]
    return Compilation(
        f"nm_expand[{','.join(part for part in parts if part)}]",
        nm_expand_kernel,
        kernel_signature(nm_expand_kernel, pointers, constexprs),
        constexprs,
        options,
    )
