"""csr_sddmm in Triton: one program a few stored entries, of whatever rows, and all of D."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.csr_lists import entry_rows
from sparse_layouts.derived import derived
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature

# (entries of a tile, warps) by the entries of D a step, the widest that D fills or the narrowest.
# One H200, 4096 x 4096, D = 128, 2026-11-21, density 0.01, 0.1 and a power law: 32 x (32, 1) takes
# 10.0, 64.7 and 7.6 us in bf16, 13.4, 93.2 and 9.8 in fp32; 128 x (32, 4) 13.9, 113.5 and 9.5,
# 21.1, 177.5 and 14.2.
CONFIGS = {32: (32, 1), 16: (32, 1)}


@triton.jit(do_not_specialize=["entries", "tiles"])
def csr_sddmm_kernel(
    values_ptr,
    a_ptr,
    b_ptr,
    row_ptr,
    col_ptr,
    D,
    entries,
    tiles,
    stride_a_batch,
    stride_a_m,
    stride_a_d,
    stride_b_batch,
    stride_b_d,
    stride_b_k,
    TILE_E: tl.constexpr,
    TILE_D: tl.constexpr,
):
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    entry = (pid % tiles).to(tl.int64) * TILE_E + tl.arange(0, TILE_E)
    mask_e = entry < entries
    row = tl.load(row_ptr + entry, mask=mask_e, other=0).to(tl.int64)
    column = tl.load(col_ptr + entry, mask=mask_e, other=0).to(tl.int64)
    a_rows = a_ptr + batch * stride_a_batch + (row * stride_a_m)[:, None]
    b_columns = b_ptr + batch * stride_b_batch + (column * stride_b_k)[:, None]
    acc_type = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((TILE_E, TILE_D), dtype=acc_type)
    for d in range(0, D, TILE_D):
        offs_d = d + tl.arange(0, TILE_D)
        mask = mask_e[:, None] & (offs_d < D)[None, :]
        offs_d = offs_d.to(tl.int64)
        a = tl.load(a_rows + (offs_d * stride_a_d)[None, :], mask=mask, other=0.0)
        b = tl.load(b_columns + (offs_d * stride_b_d)[None, :], mask=mask, other=0.0)
        acc += a.to(acc_type) * b.to(acc_type)  # [TILE_E, TILE_D]
    values = tl.sum(acc, 1).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + batch * entries + entry, values, mask=mask_e)


def csr_sddmm(a: Tensor, b: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """`values[s]` = the entries of `a[s] @ b[s]` that the lists store.

    Shapes: a (B, M, D), b (B, D, K), any strides (0 where expanded), (M, K) = `shape`, crow
    (M + 1,) and col (S,) int32 or int64; values (B, S) contiguous. bfloat16, float16, float32,
    float64; accumulates in float32 (float64 for float64).

    An operand that is not contiguous along D is copied once: the kernel gathers along D. The row of
    every entry is kept with the lists.
    """
    batch, _, d = a.shape
    entries = col.shape[0]
    values = a.new_empty(batch, entries)
    if values.numel() == 0 or d == 0:
        return values.zero_()
    a, b = _along_d(a), _along_d(b.mT).mT
    row = derived((crow, col), ("entry_rows",), lambda: entry_rows(crow, entries).to(col.dtype))
    constexprs, options = _config(d)
    tiles = triton.cdiv(entries, constexprs["TILE_E"])
    with torch.cuda.device_of(a):
        csr_sddmm_kernel[(tiles * batch,)](
            values,
            a,
            b,
            row,
            col,
            d,
            entries,
            tiles,
            a.stride(0) if a.shape[0] > 1 else 0,
            *a.stride()[1:],
            b.stride(0) if b.shape[0] > 1 else 0,
            *b.stride()[1:],
            **constexprs,
            **options,
        )
    return values


def _along_d(t: Tensor) -> Tensor:
    """t (B, rows, D), or (1, rows, D) where all are one matrix, contiguous along D."""
    t = t[:1] if t.stride(0) == 0 else t
    return t if t.stride(2) == 1 else t.contiguous()


def compilations() -> Iterator[Compilation]:
    """Every configuration: dtypes, D, index dtypes."""
    for d in CONFIGS:
        for dtype in DTYPE_NAMES:
            yield _compilation(dtype, d, "i32")
    yield _compilation(torch.float32, max(CONFIGS), "i64")


def _config(d: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    tile_d = next((size for size in CONFIGS if size <= d), min(CONFIGS))
    tile_e, warps = CONFIGS[tile_d]
    return {"TILE_E": tile_e, "TILE_D": tile_d}, {"num_warps": warps}


def _compilation(dtype: torch.dtype, d: int, index: str) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs, options = _config(d)
    constexprs |= {"stride_a_d": 1, "stride_b_d": 1}
    pointers = dict.fromkeys(("values_ptr", "a_ptr", "b_ptr"), f"*{name}")
    pointers |= dict.fromkeys(("row_ptr", "col_ptr"), f"*{index}")
    return Compilation(
        f"csr_sddmm[{name},{d},{index}]",
        csr_sddmm_kernel,
        kernel_signature(csr_sddmm_kernel, pointers, constexprs),
        constexprs,
        options,
    )
