"""csr_softmax in Triton: one program a few rows, two passes over their entries.

A program takes its rows side by side, in steps as wide as the mean row is long; those that are much
longer it takes afterwards, one by one and in wide steps. Every row's entries are added up in one
order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature

# Rows of a tile by the entries of a step: the widest step of which the mean row fills half. Tiles
# of 256 entries in all and of 1024, one H200, 4096 x 4096 in bf16, 2026-11-21: 39.7 and 64.0 us at
# density 0.01, 14.0 and 21.8 at 0.1, 124.5 and 196.5 for a power law, before long rows had steps
# of their own.
TILES = {1024: 1, 256: 1, 64: 4, 16: 16}
# Rows of more than so many steps are taken one by one.
MOST_STEPS = 4
WIDE_STEP = 1024
OPTIONS = {"num_warps": 4}


@triton.jit
def row_ends(crow_ptr, first, M, TILE_M: tl.constexpr):
    """The first entries of the TILE_M rows from `first`, and those past the last [TILE_M]; rows
    that do not exist have none.
    """
    row = first + tl.arange(0, TILE_M)
    mask_m = row < M
    start = tl.load(crow_ptr + row, mask=mask_m, other=0).to(tl.int64)
    return start, tl.load(crow_ptr + row + 1, mask=mask_m, other=0).to(tl.int64)


@triton.jit
def softmax_of_rows(
    out_ptr,
    values_ptr,
    stride_values_s,
    start,
    end,
    TILE_M: tl.constexpr,
    TILE_E: tl.constexpr,
    LOG: tl.constexpr,
):
    """Rows of the entries start .. end [TILE_M], side by side, TILE_E entries of each a step."""
    longest = tl.max(end - start, 0)
    acc_type = tl.float64 if values_ptr.dtype.element_ty == tl.float64 else tl.float32
    largest = tl.full((TILE_M,), float("-inf"), dtype=acc_type)
    total = tl.zeros((TILE_M,), dtype=acc_type)
    for e in range(0, longest, TILE_E):
        entry = start[:, None] + (e + tl.arange(0, TILE_E))[None, :]
        mask = entry < end[:, None]
        x = tl.load(values_ptr + entry * stride_values_s, mask=mask, other=float("-inf"))
        x = x.to(acc_type)  # [TILE_M, TILE_E]
        larger = tl.maximum(largest, tl.max(x, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # nothing yet: -inf - -inf is NaN
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        largest = larger

    # A row that attends to nothing gives 0, its logarithm -inf. Rounded least this way round: what
    # is near the largest loses nothing in the difference.
    shift = tl.where(largest == float("-inf"), 0.0, largest)[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    inverse, log_total = 1.0 / total, tl.log(total)
    for e in range(0, longest, TILE_E):
        entry = start[:, None] + (e + tl.arange(0, TILE_E))[None, :]
        mask = entry < end[:, None]
        x = tl.load(values_ptr + entry * stride_values_s, mask=mask, other=0.0)
        x = x.to(acc_type) - shift
        y = x - log_total[:, None] if LOG else tl.exp(x) * inverse[:, None]
        tl.store(out_ptr + entry, y.to(out_ptr.dtype.element_ty), mask=mask)


# Strides are specialised (divisible by 16 or not: the width of a load), sizes are not.
@triton.jit(do_not_specialize=["M", "entries", "row_tiles"])
def csr_softmax_kernel(
    out_ptr,
    values_ptr,
    crow_ptr,
    M,
    entries,
    row_tiles,
    stride_values_batch,
    stride_values_s,
    TILE_M: tl.constexpr,
    TILE_E: tl.constexpr,
    STEP: tl.constexpr,
    MOST: tl.constexpr,
    LOG: tl.constexpr,
):
    pid = tl.program_id(0)
    batch = (pid // row_tiles).to(tl.int64)
    first = (pid % row_tiles).to(tl.int64) * TILE_M
    values_ptr += batch * stride_values_batch
    out_ptr += batch * entries
    start, end = row_ends(crow_ptr, first, M, TILE_M)
    longest = tl.max(end - start, 0)
    if TILE_E < STEP:
        end = tl.where(end - start > MOST, start, end)
    softmax_of_rows(out_ptr, values_ptr, stride_values_s, start, end, TILE_M, TILE_E, LOG)
    if TILE_E < STEP and longest > MOST:
        for row in range(0, TILE_M):
            row_start, row_end = row_ends(crow_ptr, first + row, M, 1)
            row_end = tl.where(row_end - row_start > MOST, row_end, row_start)
            softmax_of_rows(out_ptr, values_ptr, stride_values_s, row_start, row_end, 1, STEP, LOG)


@triton.jit
def softmax_backward_of_rows(
    dx_ptr,
    grad_ptr,
    out_ptr,
    stride_grad_s,
    stride_out_s,
    start,
    end,
    TILE_M: tl.constexpr,
    TILE_E: tl.constexpr,
    LOG: tl.constexpr,
):
    """Rows of the entries start .. end [TILE_M], side by side, TILE_E entries of each a step."""
    longest = tl.max(end - start, 0)
    acc_type = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((TILE_M, TILE_E), dtype=acc_type)
    for e in range(0, longest, TILE_E):
        entry = start[:, None] + (e + tl.arange(0, TILE_E))[None, :]
        mask = entry < end[:, None]
        grad = tl.load(grad_ptr + entry * stride_grad_s, mask=mask, other=0.0).to(acc_type)
        if not LOG:
            grad *= tl.load(out_ptr + entry * stride_out_s, mask=mask, other=0.0).to(acc_type)
        total += grad
    total = tl.sum(total, 1)[:, None]

    for e in range(0, longest, TILE_E):
        entry = start[:, None] + (e + tl.arange(0, TILE_E))[None, :]
        mask = entry < end[:, None]
        grad = tl.load(grad_ptr + entry * stride_grad_s, mask=mask, other=0.0).to(acc_type)
        out = tl.load(out_ptr + entry * stride_out_s, mask=mask, other=0.0).to(acc_type)
        dx = grad - tl.exp(out) * total if LOG else out * (grad - total)
        tl.store(dx_ptr + entry, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "entries", "row_tiles"])
def csr_softmax_backward_kernel(
    dx_ptr,
    grad_ptr,
    out_ptr,
    crow_ptr,
    M,
    entries,
    row_tiles,
    stride_grad_batch,
    stride_grad_s,
    stride_out_batch,
    stride_out_s,
    TILE_M: tl.constexpr,
    TILE_E: tl.constexpr,
    STEP: tl.constexpr,
    MOST: tl.constexpr,
    LOG: tl.constexpr,
):
    pid = tl.program_id(0)
    batch = (pid // row_tiles).to(tl.int64)
    first = (pid % row_tiles).to(tl.int64) * TILE_M
    grad_ptr += batch * stride_grad_batch
    out_ptr += batch * stride_out_batch
    dx_ptr += batch * entries
    start, end = row_ends(crow_ptr, first, M, TILE_M)
    longest = tl.max(end - start, 0)
    if TILE_E < STEP:
        end = tl.where(end - start > MOST, start, end)
    softmax_backward_of_rows(
        dx_ptr, grad_ptr, out_ptr, stride_grad_s, stride_out_s, start, end, TILE_M, TILE_E, LOG
    )
    if TILE_E < STEP and longest > MOST:
        for row in range(0, TILE_M):
            row_start, row_end = row_ends(crow_ptr, first + row, M, 1)
            row_end = tl.where(row_end - row_start > MOST, row_end, row_start)
            softmax_backward_of_rows(
                dx_ptr,
                grad_ptr,
                out_ptr,
                stride_grad_s,
                stride_out_s,
                row_start,
                row_end,
                1,
                STEP,
                LOG,
            )


def csr_softmax(values: Tensor, crow: Tensor, *, log: bool = False) -> Tensor:
    """`values` (B, S) -> softmax (or log_softmax) over each row's entries, (B, S) contiguous.

    crow (M + 1,) int32 or int64; any strides in. bfloat16, float16, float32, float64; computed in
    float32 (float64 for float64). A row whose scores are all -inf gives 0 (the logarithm -inf).
    """
    batch, entries = values.shape
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    constexprs, row_tiles = _tile(crow.shape[0] - 1, entries)
    with torch.cuda.device_of(values):
        csr_softmax_kernel[(row_tiles * batch,)](
            out,
            values,
            crow,
            crow.shape[0] - 1,
            entries,
            row_tiles,
            *values.stride(),
            **constexprs,
            LOG=log,
            **OPTIONS,
        )
    return out


def csr_softmax_backward(grad: Tensor, out: Tensor, crow: Tensor, *, log: bool = False) -> Tensor:
    """The gradient to `values`, (B, S) contiguous, from that to `out` and `out` itself.

    softmax: `out * (grad - sum(grad * out))`; log_softmax: `grad - exp(out) * sum(grad)`.
    """
    batch, entries = grad.shape
    dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if dx.numel() == 0:
        return dx
    constexprs, row_tiles = _tile(crow.shape[0] - 1, entries)
    with torch.cuda.device_of(grad):
        csr_softmax_backward_kernel[(row_tiles * batch,)](
            dx,
            grad,
            out,
            crow,
            crow.shape[0] - 1,
            entries,
            row_tiles,
            *grad.stride(),
            *out.stride(),
            **constexprs,
            LOG=log,
            **OPTIONS,
        )
    return dx


def compilations() -> Iterator[Compilation]:
    """Every configuration: forward, backward, dtypes, lengths of rows; the logarithm, int64."""
    for kernel in (csr_softmax_kernel, csr_softmax_backward_kernel):
        for dtype in DTYPE_NAMES:
            for size in TILES:
                yield _compilation(kernel, dtype, size, False, "i32")
            yield _compilation(kernel, dtype, 64, True, "i32")
        yield _compilation(kernel, torch.float32, 64, False, "i64")


def _tile(rows: int, entries: int) -> tuple[dict[str, int], int]:
    """The constant arguments, and the number of row tiles; from sizes that the host knows."""
    mean = entries / rows
    return _config(next((size for size in TILES if mean > size / 2), min(TILES)), rows)


def _config(tile_e: int, rows: int) -> tuple[dict[str, int], int]:
    tile_m = TILES[tile_e]
    constexprs = {"TILE_M": tile_m, "TILE_E": tile_e, "STEP": WIDE_STEP}
    return constexprs | {"MOST": MOST_STEPS * tile_e}, triton.cdiv(rows, tile_m)


def _compilation(kernel: Any, dtype: torch.dtype, size: int, log: bool, index: str) -> Compilation:
    name = DTYPE_NAMES[dtype]
    backward = kernel is csr_softmax_backward_kernel
    constexprs: dict[str, Any] = {**_config(size, 1)[0], "LOG": log}
    operands = ("grad", "out") if backward else ("values",)
    constexprs |= {f"stride_{operand}_s": 1 for operand in operands}
    data = ("dx", "grad", "out") if backward else ("out", "values")
    pointers = dict.fromkeys((f"{operand}_ptr" for operand in data), f"*{name}")
    pointers["crow_ptr"] = f"*{index}"
    parts = [name, str(size), index, "log" * log]
    return Compilation(
        f"csr_softmax{'_backward' * backward}[{','.join(part for part in parts if part)}]",
        kernel,
        kernel_signature(kernel, pointers, constexprs),
        constexprs,
        OPTIONS,
    )
