"""nm_matmul from entries that lie by fragments, for many columns of x and for the transpose: the
matrix is written out densely, in scratch memory of bounded size, and multiplied there by cuBLAS.

As `triton_expand.py` does from entries row by row; only where an entry and its position are read
differs (`sparse_layouts/nm_fragments.py`).
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
from sparse_layouts.kernels.scratch_products import (
    ScratchMatrices,
    multiply_into,
    pieces,
    row_pitch,
)
from sparse_layouts.kernels.triton_common import kernel_signature
from sparse_layouts.nm_fragments import AXES, FRAGMENTS, TILE_ROWS, unit_columns

# groups of a row in a program, warps
GROUPS = 128
WARPS = 4


@triton.jit(do_not_specialize=["units", "end_unit", "patterns", "tiles", "column_tiles"])
def nm_expand_fragments_kernel(
    out_ptr,
    values_ptr,
    words_ptr,
    first_tile,
    first_unit,
    end_unit,
    units,
    patterns,
    tiles,
    column_tiles,
    stride_values_batch,
    stride_values_pattern,
    stride_words_pattern,
    stride_words_tile,
    stride_out_matrix,
    stride_out_m,
    STORED: tl.constexpr,
    OF: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    T_LOW: tl.constexpr,
    I: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Writes 16 rows and GROUPS groups; Q, T, T_LOW, I and H: which bit of an entry's number in
    its row's 32 is that axis.
    """
    IN_A_UNIT: tl.constexpr = 32 // STORED  # groups of a row
    PAIRED: tl.constexpr = STORED == 2 and OF == 4  # a group's entries are one word
    WORDS: tl.constexpr = OF // 4  # of 64 bits, a group
    pid = tl.program_id(0)
    column_tile = pid % column_tiles
    tile = pid // column_tiles % tiles
    matrix = pid // column_tiles // tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    row = tl.arange(0, 16)[:, None]
    group = (column_tile * GROUPS + tl.arange(0, GROUPS))[None, :]
    unit = first_unit + group // IN_A_UNIT
    exists = unit < end_unit
    whole = (first_tile + tile).to(tl.int64)
    values = values_ptr + batch * stride_values_batch + pattern * stride_values_pattern
    values += whole * units * (256 if PAIRED else 512)
    words = words_ptr + pattern * stride_words_pattern + whole * stride_words_tile
    g, r = row % 8, row // 8
    made = ()
    for _ in tl.static_range(WORDS):
        made = made + (tl.zeros((16, GROUPS), dtype=tl.int64),)
    for j in tl.static_range(STORED):
        number = group % IN_A_UNIT * STORED + j
        q, i, h = number >> Q & 1, number >> I & 1, number >> H & 1
        t = (number >> T & 1) * 2 + (number >> T_LOW & 1)
        at = ((((unit * 2 + q) * 8 + g) * 4 + t) * 2 + i) * 4 + r * 2 + h
        if PAIRED:
            entry = tl.load(values + at // 2, mask=exists, other=0) >> j * 16
        else:
            entry = tl.load(values + at, mask=exists, other=0)
        # the lane whose word has the lowest bits of positions, and where
        lane, bit = g * 4 + q * 2 + i, r * 16 + t * 4 + h * 2
        own = words + unit * 32
        if PAIRED:
            place = tl.load(own + lane, mask=exists, other=0) >> bit & 3
        else:
            mine = tl.load(own + g * 4 + t, mask=exists, other=0)
            high = (r * 2 + h) * 8 + 7 - (q * 2 + i) * 2
            if OF == 4:
                low = tl.load(own + lane, mask=exists, other=0) >> bit
                place = (low & 1) + (mine >> high & 1) * 2
            else:
                low = tl.load(words + units * 32 + unit * 16 + g * 2 + q, mask=exists, other=0)
                place = (low >> bit + i & 1) + (mine >> high & 1) * 2 + (mine >> high - 1 & 1) * 4
        one = (entry.to(tl.int64) & 0xFFFF) << (place % 4 * 16).to(tl.int64)
        together = ()
        for k in tl.static_range(WORDS):
            together = together + (made[k] | tl.where(place // 4 == k, one, 0),)
        made = together
    if WORDS == 1:
        dense = made[0]
    else:
        dense = tl.reshape(tl.join(made[0], made[1]), (16, 2 * GROUPS))
    columns = (column_tile * GROUPS * WORDS + tl.arange(0, GROUPS * WORDS))[None, :]
    inside = columns < (end_unit - first_unit) * (IN_A_UNIT * WORDS)
    rows = (tile * 16 + row).to(tl.int64)
    out = out_ptr + matrix.to(tl.int64) * stride_out_matrix + rows * stride_out_m
    tl.store(out + columns, dense, mask=inside)


def nm_matmul(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
    order: str = FRAGMENTS,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]`, or `W[b, p].mT @ x[b, p]` with `transposed`, in bf16 or
    fp16; values and indices lie by fragments, indices (P, M / 16, W).

    Scratch memory: W, or a piece of it, as `triton_expand.py` has it; with `transposed` a piece is
    of units.
    """
    assert order == FRAGMENTS, "the table chooses another kernel"
    shared, patterns, rows, entries = values.shape
    columns, across = entries // n * m, unit_columns(n, m)
    batch = x.shape[0] if shared == 1 else shared
    out = empty_result(x, batch, columns if transposed else rows, transposed_output)
    if out.numel() == 0 or x.shape[2] == 0:
        return out.zero_()
    values, indices, scratch = values.contiguous(), indices.contiguous(), ScratchMatrices(values)
    length, step = (columns // across, across) if transposed else (rows // TILE_ROWS, TILE_ROWS)
    each = rows * across if transposed else TILE_ROWS * row_pitch(columns, values.dtype)
    for batches, own, part in pieces(shared, patterns, length, each * values.element_size()):
        target = slice(part.start * step, part.stop * step)
        tiles, units = (0, rows // TILE_ROWS), (0, columns // across)
        if transposed:
            units = (part.start, part.stop)
        else:
            tiles = (part.start, part.stop)
        stored = values[batches, own]
        height, width = (tiles[1] - tiles[0]) * TILE_ROWS, (units[1] - units[0]) * across
        w = scratch.take(*stored.shape[:2], height, width)
        expand_into(w, stored, indices[own], tiles, units, n=n, m=m)
        samples = slice(None) if shared == 1 else batches
        dense = x[samples, own] if x.shape[0] > 1 else x[:, own]
        multiply_into(out[samples, own, target], w.mT if transposed else w, dense)
    return out


def expand_into(
    w: Tensor,
    values: Tensor,
    indices: Tensor,
    tiles: tuple[int, int],
    units: tuple[int, int],
    *,
    n: int,
    m: int,
) -> None:
    """Writes tiles [start, stop) and units [start, stop) of matrices densely to w (B, P, rows,
    columns), a part of a contiguous tensor.
    """
    batch, patterns, _, entries = values.shape
    constexprs, options = _config(n, m)
    written, read = w.view(torch.int64), values.view(_integers(n, m))
    column_tiles = triton.cdiv(w.shape[3] // m, GROUPS)
    number = tiles[1] - tiles[0]
    with torch.cuda.device_of(w):
        nm_expand_fragments_kernel[(number * column_tiles * batch * patterns,)](
            written,
            read,
            indices,
            tiles[0],
            units[0],
            units[1],
            entries // 32,
            patterns,
            number,
            column_tiles,
            *read.stride()[:2],
            *indices.stride()[:2],
            *written.stride()[1:3],
            **constexprs,
            **options,
        )


def _config(n: int, m: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    axes = AXES[n, m]
    bits = {name: len(axes) - 1 - axes.index(axis) for name, axis in BITS.items()}
    return {"STORED": n, "OF": m, **bits, "GROUPS": GROUPS}, {"num_warps": WARPS}


def _integers(n: int, m: int) -> torch.dtype:
    """What entries are read as: both of a group of 2:4 as one."""
    return torch.int32 if (n, m) == (2, 4) else torch.int16


# the kernel's names of axes
BITS = {"Q": "q", "T": "T", "T_LOW": "t", "I": "i", "H": "h"}


def compilations() -> Iterator[Compilation]:
    """Every n:m."""
    for n, m in AXES:
        constexprs, options = _config(n, m)
        pointers = {"out_ptr": "*i64", "values_ptr": "*i32" if (n, m) == (2, 4) else "*i16"}
        yield Compilation(
            f"nm_expand_fragments[{n}:{m}]",
            nm_expand_fragments_kernel,
            kernel_signature(nm_expand_fragments_kernel, pointers, constexprs),
            constexprs,
            options,
        )
