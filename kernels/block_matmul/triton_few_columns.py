"""block_matmul in Triton for a few columns of x, as in decoding: the values are read once, at the
speed of memory. Also for more columns where a result has few block rows, and these are long.

One program an item of `row_cuts.py`, which is a part of a block row, or a slice of its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.activations import ACTIVATIONS, finish_nothing
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_matmul.row_cuts import ITEM_FIELDS, cut_rows, row_counters
from sparse_layouts.kernels.launching import Launch
from sparse_layouts.kernels.triton_common import (
    BLOCK_SIZES,
    DTYPE_NAMES,
    FEW_BLOCK_SIZES,
    finished,
    fitting_stages,
    input_precision,
    kernel_signature,
)


class Config(NamedTuple):
    """Rows of a tile, entries of K a step, warps, stages, and programs a processor gets."""

    tile_m: int
    tile_k: int
    warps: int
    stages: int
    programs: int


# By (rows of a block, columns of a tile), for 16-bit dtypes. 8192 x 8192 in bf16, a quarter of the
# blocks stored, one of four weights after the other in a CUDA graph (2026-11-26). Microseconds on
# an H200 (8.0 is the floor of the bytes, cuBLAS takes 34 to 35) with 1, 8, 16 and 32 columns:
# blocks of 64 by the first row's configuration 13.0, 13.1, 14.1 and 19.8, by that of 16 columns
# 13.0, 14.5, 14.6 and 15.3; of 16 by that of 8 columns 21.9, 26.3, 33.6 and 36.4, by that of 16
# columns 24.4, 29.5, 28.8 and 42.5. Within 4% or worse: 4 to 10 stages, 3 to 6 programs a
# processor, 8 warps. What gained nothing: a launch that begins while the one before ends (-3 to
# 12%), and items in an order that gives processors equally many blocks (32 at most instead of 40):
# the fixed part is three loads that wait for each other and the sum of the last piece. On an H100
# (copies at 2.97 TB/s, cuBLAS 48 to 49, floor 11.3): blocks of 64 16.4 and 17.9 with 1 and 16
# columns by the latter. Not tuned: 32 and 128.
CONFIGS_16_BIT = {
    (16, 8): Config(16, 512, 4, 3, 3),
    (16, 16): Config(16, 256, 4, 4, 4),
    (16, 32): Config(16, 512, 4, 3, 3),
    (16, 64): Config(16, 128, 4, 3, 4),
    (32, 8): Config(32, 128, 4, 4, 4),
    (32, 16): Config(32, 128, 4, 4, 4),
    (32, 32): Config(32, 128, 4, 4, 4),
    (32, 64): Config(32, 128, 4, 3, 4),
    (64, 8): Config(32, 64, 2, 6, 6),
    (64, 16): Config(64, 64, 4, 5, 2),
    (64, 32): Config(64, 64, 4, 5, 4),
    (64, 64): Config(64, 64, 4, 4, 4),
}
# by the bytes of an entry, for whatever block: float32 (as tf32 or in full), float64
CONFIGS_WIDE = {4: Config(32, 32, 4, 4, 4), 8: Config(16, 32, 4, 4, 4)}
TILE_COLUMNS = (8, 16, 32, 64)
# An item reads so much at least: its start and its end take as long as this.
LEAST_ITEM_BYTES = 8192
# sums of pieces that are read at once
TOGETHER = 4


# N and the strides are specialised (divisible by 16 or not: the width of a load), other sizes not.
@triton.jit(do_not_specialize=["M", "K", "patterns", "block_rows", "items", "column_tiles"])
def few_columns_kernel(
    out_ptr,
    values_ptr,
    x_ptr,
    bias_ptr,
    items_ptr,
    col_ptr,
    slots_ptr,
    sums_ptr,
    counters_ptr,
    M,
    N,
    K,
    patterns,
    block_rows,
    items,
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
    FIELDS: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    SLICES: tl.constexpr = BM // TILE_M
    TILE: tl.constexpr = TILE_M * TILE_N
    pid = tl.program_id(0)
    row_slice = pid % SLICES
    item = pid // SLICES % items
    column_tile = pid // SLICES // items % column_tiles
    batch = (pid // SLICES // items // column_tiles).to(tl.int64)
    row = tl.load(items_ptr + item * FIELDS)
    start = tl.load(items_ptr + item * FIELDS + 1)
    end = tl.load(items_ptr + item * FIELDS + 2)
    first_item = tl.load(items_ptr + item * FIELDS + 3)
    pieces = tl.load(items_ptr + item * FIELDS + 4)
    if row >= patterns * block_rows:
        return  # there are items too many
    pattern = (row // block_rows).to(tl.int64)
    block_row = row % block_rows

    offs_m = row_slice * TILE_M + tl.arange(0, TILE_M)  # rows within the block
    offs_n = column_tile * TILE_N + tl.arange(0, TILE_N)
    offs_k = tl.arange(0, TILE_K)
    mask_n = offs_n < N
    values_ptr += batch * stride_values_batch
    x_ptr += batch * stride_x_batch + pattern * stride_x_pattern
    w_rows = (offs_m.to(tl.int64) * stride_values_m)[:, None]
    x_columns = (offs_n.to(tl.int64) * stride_x_n)[None, :]
    acc_type = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((TILE_M, TILE_N), dtype=acc_type)

    # A step's indices come from the step before: found within it, they would be one more level of
    # loads to wait for, and the pipeliner would fetch values half as far ahead.
    if TILE_K <= BK:
        PARTS: tl.constexpr = BK // TILE_K  # steps of a block
        w_offs = w_rows + (offs_k.to(tl.int64) * stride_values_k)[None, :]
        x_offs = (offs_k.to(tl.int64) * stride_x_k)[:, None] + x_columns
        column = tl.load(col_ptr + start, mask=start < end, other=0)
        slot = start
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + start, mask=start < end, other=0)
        for step in range(start * PARTS, end * PARTS):
            part = step % PARTS * TILE_K
            w_at = slot.to(tl.int64) * stride_values_slot + part.to(tl.int64) * stride_values_k
            w = tl.load(values_ptr + w_at + w_offs)  # [TILE_M, TILE_K]
            x_row = column.to(tl.int64) * BK + part
            mask_x = mask_n[None, :]
            if not WHOLE:
                mask_x = (x_row + offs_k < K)[:, None] & mask_x
            x = tl.load(x_ptr + x_row * stride_x_k + x_offs, mask=mask_x, other=0.0)
            acc = tl.dot(w, x, acc, PRECISION, out_dtype=acc.dtype)
            position = (step + 1) // PARTS
            column = tl.load(col_ptr + position, mask=position < end, other=0)
            slot = position
            if slots_ptr is not None:
                slot = tl.load(slots_ptr + position, mask=position < end, other=0)
    else:
        position = start + offs_k // BK
        offs_in_block = offs_k % BK
        w_offs = w_rows + (offs_in_block.to(tl.int64) * stride_values_k)[None, :]
        column = tl.load(col_ptr + position, mask=position < end, other=0)
        slot = position
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + position, mask=position < end, other=0)
        for _ in range(0, (end - start) * BK, TILE_K):
            mask_k = position < end
            w_at = (slot.to(tl.int64) * stride_values_slot)[None, :]
            w = tl.load(values_ptr + w_at + w_offs, mask=mask_k[None, :], other=0.0)
            x_rows = column.to(tl.int64) * BK + offs_in_block
            mask_x = mask_k if WHOLE else mask_k & (x_rows < K)
            x = tl.load(
                x_ptr + (x_rows * stride_x_k)[:, None] + x_columns,
                mask=mask_x[:, None] & mask_n[None, :],
                other=0.0,
            )  # [TILE_K, TILE_N]
            acc = tl.dot(w, x, acc, PRECISION, out_dtype=acc.dtype)
            position += TILE_K // BK
            column = tl.load(col_ptr + position, mask=position < end, other=0)
            slot = position
            if slots_ptr is not None:
                slot = tl.load(slots_ptr + position, mask=position < end, other=0)

    is_last = pieces == 1
    if sums_ptr is not None:
        if pieces > 1:
            # [batch, item, slice, column tile, TILE_M, TILE_N]
            step = SLICES * column_tiles
            tile = (batch * items + first_item) * step + row_slice * column_tiles + column_tile
            offs = tl.arange(0, TILE_M)[:, None] * TILE_N + tl.arange(0, TILE_N)[None, :]
            sums = sums_ptr + tile * TILE + offs
            jump = tl.full((), step * TILE, tl.int64)
            tl.store(sums + (item - first_item) * jump, acc)
            tl.debug_barrier()  # every thread has stored before one of them counts
            counter = (batch * patterns * block_rows + row) * step
            counter = counters_ptr + counter + row_slice * column_tiles + column_tile
            is_last = tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1
            if is_last:
                tl.debug_barrier()
                tl.store(counter, 0)
                acc = tl.zeros((TILE_M, TILE_N), dtype=acc_type)
                for piece in range(0, pieces, TOGETHER):
                    for i in tl.static_range(TOGETHER):
                        is_there = piece + i < pieces
                        acc += tl.load(
                            sums + (piece + i) * jump,
                            mask=is_there,
                            other=0.0,
                            cache_modifier=".cg",
                        )
    if is_last:
        rows = block_row * BM + offs_m
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + rows, mask=rows < M, other=0.0)[:, None]
        acc = finished(acc, bias, ACTIVATION)
        mask_out = mask_n[None, :] if WHOLE else (rows < M)[:, None] & mask_n[None, :]
        out_ptr += (batch * patterns + pattern) * stride_out_matrix
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
    """`activation(W @ x + bias)` as `triton_block_matmul.py` computes it, for up to 64 columns of x
    (more are cut into tiles of 64). Deterministic: sums of pieces are added up in one order.

    x's columns are read along K: one that lies otherwise is copied first, unless it has rows of
    contiguous entries whose number 16 divides.
    """
    config = _config(x.dtype, pattern.block_size, x.shape[3])
    return product_by_items(values, pattern, x, transposed_output, bias, activation, config)


def product_by_items(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    transposed_output: bool,
    bias: Tensor | None,
    activation: str | None,
    config: Config,
) -> Tensor:
    """:func:`block_matmul` in one configuration."""
    p, m, n = pattern, pattern.shape[0], x.shape[3]
    batch = x.shape[0] if values.shape[0] == 1 else values.shape[0]
    if transposed_output:
        out = x.new_empty(batch, p.num_patterns, n, m).mT
    else:
        out = x.new_empty(batch, p.num_patterns, m, n)
    if out.numel() == 0 or p.num_blocks == 0:
        return finish_nothing(out, bias, activation)
    if not _read_in_place(x):
        x = x.mT.contiguous().mT
    with torch.cuda.device_of(x):
        settled = _launch(values, p, x, out, bias, activation, config)
        if x.is_cuda:
            settled.run(torch.cuda.current_stream(x.device).cuda_stream)
        else:  # in the interpreter
            few_columns_kernel[(settled.programs,)](
                **settled.arguments(), **settled.pointed, **settled.options
            )
    return out


def _read_in_place(x: Tensor) -> bool:
    return x.stride(2) == 1 or (x.stride(3) == 1 and x.shape[3] % 16 == 0)


def _launch(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    activation: str | None,
    config: Config,
) -> Launch:
    """The launch that writes out (B, P, M, N)."""
    p, (batch, _, m, n) = pattern, out.shape
    (bm, bk), k = p.block_size, p.shape[1]
    strides = list(x.stride())
    if n == 1:
        strides[3] = k  # whatever it is: with this one loads may be wide
    constexprs = _constants(p.block_size, n, config)
    buffer_bytes = config.tile_k * (config.tile_m + constexprs["TILE_N"]) * x.element_size()
    stages = fitting_stages(config.stages, 1, buffer_bytes, x.device)
    slices, column_tiles = bm // config.tile_m, triton.cdiv(n, constexprs["TILE_N"])
    limit = _limit(p, batch * slices * column_tiles, config, x)
    items = cut_rows(p, limit)
    tiles = batch * items.shape[0] * slices * column_tiles
    sums = counters = None
    if items.shape[0] > p.num_patterns * p.grid[0]:
        accumulate = torch.promote_types(x.dtype, torch.float32)
        size = tiles * config.tile_m * constexprs["TILE_N"]
        sums = torch.empty(size, dtype=accumulate, device=x.device)
        rows = batch * p.num_patterns * p.grid[0]
        counters = row_counters(p, rows * slices * column_tiles)
    numbers = {
        "M": m,
        "N": n,
        "K": k,
        "patterns": p.num_patterns,
        "block_rows": p.grid[0],
        "items": items.shape[0],
        "column_tiles": column_tiles,
        "stride_values_batch": values.stride(0) if values.shape[0] > 1 else 0,
        "stride_values_slot": values.stride(1),
        "stride_values_m": values.stride(2),
        "stride_values_k": values.stride(3),
        "stride_x_batch": strides[0] if x.shape[0] > 1 else 0,
        "stride_x_pattern": strides[1],
        "stride_x_k": strides[2],
        "stride_x_n": strides[3],
        "stride_out_matrix": m * n,
        "stride_out_m": out.stride(2),
        "stride_out_n": out.stride(3),
    }
    pointed = {
        "out_ptr": out,
        "values_ptr": values,
        "x_ptr": x,
        "bias_ptr": bias,
        "items_ptr": items,
        "col_ptr": p.col_indices,
        "slots_ptr": p.row_slots,
        "sums_ptr": sums,
        "counters_ptr": counters,
    }
    options = {
        "WHOLE": m % bm == 0 and k % bk == 0,
        "PRECISION": input_precision(x.dtype),
        "ACTIVATION": activation,
        **constexprs,
        "num_warps": config.warps,
        "num_stages": stages,
    }
    key = tuple(numbers.values())
    return Launch(few_columns_kernel, key, {}, pointed, lambda: numbers, options, tiles)


class Prepared:
    """Calls on operands like these: all but addresses is settled."""

    def __init__(
        self, values: Tensor, pattern: BlockPattern, x: Tensor, out: Tensor, bias: Tensor | None
    ) -> None:
        config = _config(x.dtype, pattern.block_size, x.shape[3])
        settled = _launch(values, pattern, x, out, bias, None, config)
        self._programs, self._pattern = settled.programs, pattern
        sums, counters = settled.pointed["sums_ptr"], settled.pointed["counters_ptr"]
        self._sums = None if sums is None else (sums.shape[0], sums.dtype, sums.device)
        self._counters = 0 if counters is None else counters.shape[0]
        moving = ("out_ptr", "values_ptr", "x_ptr", "bias_ptr", "sums_ptr", "counters_ptr")
        self._packed = settled.pack(moving)

    def __call__(self, values: int, x: int, out: int, bias: Tensor | None, stream: int) -> None:
        """Writes to the address `out`."""
        packed = self._packed
        with packed.lock:
            packed.point("values_ptr", values)
            packed.point("x_ptr", x)
            packed.point("out_ptr", out)
            if bias is not None:
                packed.point("bias_ptr", bias.data_ptr())
            if self._sums is not None:
                size, dtype, device = self._sums
                sums = torch.empty(size, dtype=dtype, device=device)
                packed.point("sums_ptr", sums.data_ptr())
                counters = row_counters(self._pattern, self._counters)
                packed.point("counters_ptr", counters.data_ptr())
            packed.launch(self._programs, stream)


def prepared(
    values: Tensor, pattern: BlockPattern, x: Tensor, out: Tensor, bias: Tensor | None
) -> Prepared | None:
    """What launches `out = W @ x + bias` again; None where x is copied first."""
    return Prepared(values, pattern, x, out, bias) if _read_in_place(x) else None


def _limit(pattern: BlockPattern, copies: int, config: Config, x: Tensor) -> int:
    """Blocks of an item, so that there are about as many programs as run at once; `copies`
    programs read every item.
    """
    block_bytes = config.tile_m * pattern.block_size[1] * x.element_size()
    programs = processors(x.device) * config.programs
    enough = triton.cdiv(pattern.num_blocks * copies, programs)
    return max(1, enough, LEAST_ITEM_BYTES // block_bytes)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 4 for Triton's interpreter, so that small cases meet cut rows."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _config(dtype: torch.dtype, block_size: tuple[int, int], n: int) -> Config:
    bm = min(block_size[0], 64)
    if dtype.itemsize > 2:
        wide = CONFIGS_WIDE[dtype.itemsize]
        return wide._replace(tile_m=min(bm, wide.tile_m))
    return CONFIGS_16_BIT[bm, _tile_n(n)]


def _tile_n(n: int) -> int:
    return min((size for size in TILE_COLUMNS if size >= n), default=TILE_COLUMNS[-1])


def _constants(block_size: tuple[int, int], n: int, config: Config) -> dict[str, Any]:
    return {
        "BM": block_size[0],
        "BK": block_size[1],
        "TILE_M": config.tile_m,
        "TILE_N": _tile_n(n),
        "TILE_K": config.tile_k,
        "FIELDS": ITEM_FIELDS,
        "TOGETHER": TOGETHER,
    }


def compilations() -> Iterator[Compilation]:
    """Every configuration: dtypes, block sizes, columns; transposed operands, ragged sizes, rows
    that are not cut, a bias and an activation.
    """
    for block_size in BLOCK_SIZES:
        for n in (16, 8, 32, 64):
            yield _compilation(torch.bfloat16, block_size, n)
    yield _compilation(torch.float16, (64, 64), 16)
    for dtype, precision in (
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float64, "ieee"),
    ):
        for block_size in FEW_BLOCK_SIZES:
            for n in (8, 64):
                yield _compilation(dtype, block_size, n, precision)
    for dtype in DTYPE_NAMES:
        for block_size in ((16, 16), (64, 64)):
            yield _compilation(dtype, block_size, 16, transposed=True)
            yield _compilation(dtype, block_size, 16, whole=False, activation="gelu")
    for activation in ACTIVATIONS:
        yield _compilation(torch.bfloat16, (64, 64), 8, cut=False, activation=activation)


def _compilation(
    dtype: torch.dtype,
    block_size: tuple[int, int],
    n: int,
    precision: str = "ieee",
    *,
    transposed: bool = False,
    whole: bool = True,
    cut: bool = True,
    activation: str | None = None,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    config = _config(dtype, block_size, n)
    constexprs = _constants(block_size, n, config)
    constexprs |= {"WHOLE": whole, "PRECISION": precision, "ACTIVATION": activation}
    constexprs["stride_values_m" if transposed else "stride_values_k"] = 1
    constexprs["stride_x_n" if transposed else "stride_x_k"] = 1
    constexprs["stride_out_m" if transposed else "stride_out_n"] = 1
    if not transposed:
        constexprs["slots_ptr"] = None
    if not cut:
        constexprs["sums_ptr"] = constexprs["counters_ptr"] = None
    if activation is None:
        constexprs["bias_ptr"] = None
    pointers = dict.fromkeys(("out_ptr", "values_ptr", "x_ptr", "bias_ptr"), f"*{name}")
    pointers["sums_ptr"] = "*fp64" if dtype == torch.float64 else "*fp32"
    parts = ["x".join(map(str, block_size)), name, precision if dtype == torch.float32 else ""]
    parts += [str(n), "transposed" * transposed, "ragged" * (not whole), "whole rows" * (not cut)]
    parts += [activation or ""]
    return Compilation(
        f"few_columns[{','.join(part for part in parts if part)}]",
        few_columns_kernel,
        kernel_signature(few_columns_kernel, pointers, constexprs),
        constexprs,
        {"num_warps": config.warps, "num_stages": config.stages},
    )
