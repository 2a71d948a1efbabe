"""Rounding to e4m3 with scales in Triton: one pass over the tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention_fp8.quantize import (
    ALIGNED,
    ROWS_PER_SCALE,
    SMALLEST_SCALE,
    empty_data,
)
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature


@triton.jit
def scale_and_inverse(peak_bits):
    """`quantize.scale_of` and one over it, of the bits of fp32 numbers: all of it exact."""
    exponent = (peak_bits >> 23) - 8 + ((peak_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    bits = tl.maximum(exponent, 67) << 23
    inverse = (254 << 23) - bits
    finite = peak_bits < 0x7F800000
    bits = tl.where(finite, bits, 0x7FC00000)
    inverse = tl.where(finite, inverse, 0x7FC00000)
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows", "heads", "num_blocks"])
def quantize_fp8_block(
    x_ptr, shift_ptr, peak_ptr, data_ptr, scale_ptr,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_dh, stride_d,
    heads, num_blocks, num_rows, num_columns,
    ROWS: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head; with `peak_ptr`, the largest magnitude of every column, by column."""
    BY_COLUMN: tl.constexpr = peak_ptr is not None
    pid = tl.program_id(0)
    block = pid % num_blocks
    which = (pid // num_blocks).to(tl.int64)  # sample and head
    batch, head = which // heads, which % heads
    offs_n = block * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, D)
    x_ptrs = x_ptr + batch * stride_xb + head * stride_xh
    x_ptrs += offs_n.to(tl.int64)[:, None] * stride_xn + offs_d.to(tl.int64)[None, :] * stride_xd
    there = (offs_n < num_rows)[:, None] & (offs_d < num_columns)[None, :]
    x = tl.load(x_ptrs, mask=there, other=0.0).to(tl.float32)  # [ROWS, D]
    if shift_ptr is not None:
        shift_ptrs = shift_ptr + which * num_columns + offs_d
        x -= tl.load(shift_ptrs, mask=offs_d < num_columns, other=0.0)[None, :]
        x = tl.where(there, x, 0.0)
    # as integers magnitudes order as numbers do, and NaN is the largest
    if BY_COLUMN:
        peak_ptrs = peak_ptr + which * num_columns + offs_d
        peak = tl.load(peak_ptrs, mask=offs_d < num_columns, other=0.0).to(tl.float32)
        bits = peak.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN may have a sign
        scale, inverse = scale_and_inverse(bits)  # [D]
        first = (offs_d < num_columns) & (block == 0)
        tl.store(scale_ptr + which * num_columns + offs_d, scale, mask=first)
        data_ptrs = data_ptr + which * stride_dh + offs_d.to(tl.int64)[:, None] * stride_d
        data_ptrs += offs_n[None, :]
        inside = offs_n < tl.cdiv(num_rows, ALIGNED) * ALIGNED
        tl.store(
            data_ptrs,
            (x * inverse[None, :]).to(data_ptr.dtype.element_ty).T,
            mask=(offs_d < num_columns)[:, None] & inside[None, :],
        )
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        scale, inverse = scale_and_inverse(tl.max(tl.max(bits, 1), 0))
        tl.store(scale_ptr + which * num_blocks + block, scale)
        data_ptrs = data_ptr + which * stride_dh + offs_n.to(tl.int64)[:, None] * stride_d
        data_ptrs += offs_d[None, :]
        inside = offs_d < tl.cdiv(num_columns, ALIGNED) * ALIGNED
        tl.store(
            data_ptrs,
            (x * inverse).to(data_ptr.dtype.element_ty),
            mask=(offs_n < num_rows)[:, None] & inside[None, :],
        )


def warps_of(padded_columns: int) -> int:
    """So many that a thread holds at most 64 numbers: with 128 they spilled."""
    return max(4, ROWS_PER_SCALE * padded_columns // (64 * 32))


def quantize(x: Tensor, shift: Tensor | None, by_column: bool) -> tuple[Tensor, Tensor]:
    """As `quantize.quantize`, to the last bit; x has any strides."""
    batch, heads, n, d = x.shape
    num_blocks = triton.cdiv(n, ROWS_PER_SCALE)
    data = empty_data(x, by_column)
    shape = (1, d) if by_column else (num_blocks, 1)
    scale = torch.empty(batch, heads, *shape, device=x.device, dtype=torch.float32)
    if data.numel() == 0:
        return data, scale.fill_(SMALLEST_SCALE)
    peak = torch.linalg.vector_norm(x, torch.inf, dim=2) if by_column else None
    lines = data.mT if by_column else data  # contiguous each
    padded = max(ALIGNED, triton.next_power_of_2(d))
    with torch.cuda.device_of(x):
        quantize_fp8_block[(batch * heads * num_blocks,)](
            x,
            None if shift is None else shift.contiguous(),
            None if peak is None else peak.contiguous(),
            data,
            scale,
            *x.stride(),
            *lines.stride()[1:3],
            heads,
            num_blocks,
            n,
            d,
            ROWS=ROWS_PER_SCALE,
            D=padded,
            ALIGNED=ALIGNED,
            num_warps=warps_of(padded),
        )
    return data, scale


def compilations() -> Iterator[Compilation]:
    """Rows, rows less their mean, and columns, of every dtype once."""
    for dtype, d in ((torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 256)):
        for how in ("rows", "shifted", "columns"):
            constexprs = {"ROWS": ROWS_PER_SCALE, "D": d, "ALIGNED": ALIGNED}
            constexprs |= {"shift_ptr": None} if how != "shifted" else {}
            constexprs |= {"peak_ptr": None} if how != "columns" else {}
            kind = f"*{DTYPE_NAMES[dtype]}"
            pointers = {"x_ptr": kind, "peak_ptr": kind, "data_ptr": "*fp8e4nv"}
            pointers |= {"shift_ptr": "*fp32", "scale_ptr": "*fp32"}
            yield Compilation(
                f"quantize_fp8_block-{how}-d{d}-{DTYPE_NAMES[dtype]}",
                quantize_fp8_block,
                kernel_signature(quantize_fp8_block, pointers, constexprs),
                constexprs,
                {"num_warps": warps_of(d)},
                min_capability=89,
            )
