"""Matrices of any strides copied to contiguous rows: a tile goes through shared memory, so that it
is read along one dimension and written along another, both in whole lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.launching import Launch
from sparse_layouts.kernels.triton_common import kernel_signature

# An entry is moved, not computed with: as an integer of its size.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# (edge of a tile, warps) by the bytes of an entry. An edge has 128 bytes or more, a line of the
# caches, either way; a tile is 8 or 16 KiB, so that many are on their way at once.
CONFIGS = {1: (128, 8), 2: (64, 4), 4: (64, 8), 8: (32, 4)}


# Strides are specialised (1, divisible by 16 or not: the width of an access), sizes are not.
@triton.jit(do_not_specialize=["R", "C", "patterns", "row_tiles", "column_tiles"])
def strided_copy_kernel(
    out_ptr,
    x_ptr,
    R,
    C,
    patterns,
    row_tiles,
    column_tiles,
    stride_x_batch,
    stride_x_pattern,
    stride_x_r,
    stride_x_c,
    stride_out_batch,
    stride_out_pattern,
    stride_out_r,
    TILE: tl.constexpr,
    TURNED: tl.constexpr,
):
    # `TURNED`: x has the shorter steps along its columns, so that these are read in whole lines
    pid = tl.program_id(0)
    first_c = (pid % column_tiles) * TILE
    first_r = (pid // column_tiles % row_tiles) * TILE
    matrix = pid // column_tiles // row_tiles
    batch = (matrix // patterns).to(tl.int64)
    pattern = (matrix % patterns).to(tl.int64)
    x_ptr += batch * stride_x_batch + pattern * stride_x_pattern
    x_ptr += first_r.to(tl.int64) * stride_x_r + first_c.to(tl.int64) * stride_x_c
    out_ptr += batch * stride_out_batch + pattern * stride_out_pattern
    out_ptr += first_r.to(tl.int64) * stride_out_r + first_c

    offs = tl.arange(0, TILE)
    x_r, x_c = offs.to(tl.int64) * stride_x_r, offs.to(tl.int64) * stride_x_c
    if TURNED:
        x = x_ptr + x_c[:, None] + x_r[None, :]  # [TILE (columns), TILE (rows)]
    else:
        x = x_ptr + x_r[:, None] + x_c[None, :]  # [TILE (rows), TILE (columns)]
    out = out_ptr + (offs.to(tl.int64) * stride_out_r)[:, None] + offs[None, :]
    # sizes are not constant arguments: a mask that may end anywhere makes every access narrow
    if (first_r + TILE <= R) & (first_c + TILE <= C):
        tile = tl.load(x)
        if TURNED:
            tile = tl.trans(tile)
        tl.store(out, tile)
    else:
        mask_r, mask_c = first_r + offs < R, first_c + offs < C
        mask = mask_r[:, None] & mask_c[None, :]
        if TURNED:
            tile = tl.trans(tl.load(x, mask=mask_c[:, None] & mask_r[None, :], other=0))
        else:
            tile = tl.load(x, mask=mask, other=0)
        tl.store(out, tile, mask=mask)


def copy_rows(out: Tensor, x: Tensor) -> None:
    """Writes x (B, P, R, C), any strides, to `out` of the same shape and dtype, whose last
    dimension is contiguous. Entries of 1, 2, 4 or 8 bytes.
    """
    if x.numel() == 0:
        return
    integers = INTEGERS[x.element_size()]
    with torch.cuda.device_of(x):
        settled = _launch(out.view(integers), x.view(integers))
        if x.is_cuda:
            settled.run(torch.cuda.current_stream(x.device).cuda_stream)
        else:  # in the interpreter
            strided_copy_kernel[(settled.programs,)](
                **settled.arguments(), **settled.pointed, **settled.options
            )


def _launch(out: Tensor, x: Tensor) -> Launch:
    batch, patterns, rows, columns = x.shape
    constexprs, options = _config(x.element_size(), 0 < x.stride(2) < x.stride(3))
    row_tiles, column_tiles = (triton.cdiv(size, constexprs["TILE"]) for size in (rows, columns))
    numbers = {
        "R": rows,
        "C": columns,
        "patterns": patterns,
        "row_tiles": row_tiles,
        "column_tiles": column_tiles,
        "stride_x_batch": x.stride(0),
        "stride_x_pattern": x.stride(1),
        "stride_x_r": x.stride(2),
        "stride_x_c": x.stride(3),
        "stride_out_batch": out.stride(0),
        "stride_out_pattern": out.stride(1),
        "stride_out_r": out.stride(2),
    }
    return Launch(
        strided_copy_kernel,
        tuple(numbers.values()),
        {},
        {"out_ptr": out, "x_ptr": x},
        lambda: numbers,
        {**constexprs, **options},
        batch * patterns * row_tiles * column_tiles,
    )


def compilations() -> Iterator[Compilation]:
    """Entries of every size, from columns (a transpose) and from rows with gaps."""
    for size in (2, 4, 1, 8):
        yield _compilation(size, turned=True)
        yield _compilation(size, turned=False)


def _config(size: int, turned: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options for entries of `size` bytes."""
    edge, warps = CONFIGS[size]
    return {"TILE": edge, "TURNED": turned}, {"num_warps": warps}


def _compilation(size: int, turned: bool) -> Compilation:
    constexprs, options = _config(size, turned)
    if turned:
        constexprs["stride_x_r"] = 1
    pointers = dict.fromkeys(("out_ptr", "x_ptr"), f"*i{8 * size}")
    return Compilation(
        f"strided_copy[i{8 * size},{'columns' if turned else 'rows'}]",
        strided_copy_kernel,
        kernel_signature(strided_copy_kernel, pointers, constexprs),
        constexprs,
        options,
    )
