"""csr_matmul in Triton: one program a few pieces of rows, and a second pass over long rows.

A row of more entries than a piece takes is cut, and the longest pieces start first, so that a few
long rows among short ones (power laws) keep no program waiting. A piece's sum is stored on its own
and the pieces of a row added up in one order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.csr_lists import transposed_lists
from sparse_layouts.derived import derived
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature

# Measured on one H200, W 4096 x 4096 of uniform density 0.01 and 0.1 and of a power law (0.006),
# 2026-11-21.
# Entries of a piece: where rows have up to SHORT_ROWS entries on average, or more. Power law,
# N = 512, fp32: 74.5 us at 256, 80.0 at 512; at 0.1 all rows fit into 512.
SHORT_ROWS, SHORT_PIECE, LONG_PIECE = 128, 256, 512
# (pieces of a tile, entries of a step, warps) by the columns of a tile: the widest tile that x's
# columns fill, at most so many for an element's bytes, or the narrowest. N = 512 in microseconds at
# 0.01, 0.1 and the power law, with pieces sorted by length: bf16 512 x (1, 8, 2) 31, 206, 27, 256 x
# (1, 8, 1) 37, 208, 36, 128 x (1, 4, 1) 42, 227, 37, 64 x (1, 16, 1) 47, 215, 41; fp32 128 x
# (1, 4, 1) 51, 290, 43, 256 x (1, 4, 1) 65, 264, 52, 64 x (1, 16, 1) 60, 317, 51. fp64, and 16 and
# 4 columns, were not measured.
MOST_COLUMNS = {2: 512, 4: 128, 8: 32}
CONFIGS = {
    512: (1, 8, 2),
    256: (1, 8, 1),
    128: (1, 4, 1),
    64: (1, 16, 1),
    32: (1, 32, 1),
    16: (4, 16, 4),
    4: (8, 32, 4),
    1: (1, 128, 1),
}
# A vector with rows of more than SHORT_ROWS entries: at 0.1 in fp32 11.1 us, (1, 128, 1) 12.2; at
# 0.01 8.4 and 7.8.
LONG_ROWS_VECTOR = (4, 64, 4)
# (slots of a step, columns) of the second pass, the first whose columns x has, or the last.
SECOND_TILES = ((4, 256), (32, 32))


class Pieces(NamedTuple):
    """Rows cut into pieces; made of the lists alone, without a host sync, so that sizes are bounds.

    `rows starts ends slots` (pieces,): a piece's row (the number of rows where there is no piece),
    its entries, and where in the buffer its sum belongs: -1 for the only piece of a row, which
    belongs to the result. `long_rows first_slots counts` (at most S // (piece + 1),): the rows of
    several pieces, likewise padded. The longest pieces come first, by powers of two: among rows of
    about equal length, neighbours stay neighbours.
    """

    rows: Tensor
    starts: Tensor
    ends: Tensor
    slots: Tensor
    num_slots: int
    long_rows: Tensor
    first_slots: Tensor
    counts: Tensor


def row_pieces(crow: Tensor, col: Tensor, piece: int) -> Pieces:
    """The pieces, of at most `piece` entries, of all rows; made once for a pattern and kept."""

    def build() -> Pieces:
        rows, entries = crow.shape[0] - 1, col.shape[0]
        lengths = crow.diff().long()
        pieces = ((lengths + piece - 1) // piece).clamp(min=1)  # an empty row is written, too
        ends = pieces.cumsum(0)
        first = torch.nn.functional.pad(ends - pieces, (0, 1))
        each = torch.arange(rows + entries // piece, device=crow.device)
        row = torch.searchsorted(ends, each, right=True)
        start = crow[row] + (each - first[row]) * piece
        end = torch.minimum(start + piece, crow[(row + 1).clamp(max=rows)])
        start = torch.minimum(start, end)  # no piece: int32 would not hold it
        is_long = torch.nn.functional.pad(pieces > 1, (0, 1))
        of_long = is_long[row]
        slot = torch.where(of_long, of_long.cumsum(0) - 1, -1)

        bound = entries // (piece + 1)
        order = torch.argsort(is_long.to(torch.int8), descending=True, stable=True)[:bound]
        long_rows = torch.where(is_long[order], order, rows)
        at = first[order].clamp(max=max(0, each.shape[0] - 1))
        by_length = torch.frexp((end - start).float()).exponent
        longest_first = torch.argsort(by_length, descending=True, stable=True)
        return Pieces(
            row[longest_first].int(),
            start[longest_first].to(crow.dtype),
            end[longest_first].to(crow.dtype),
            slot[longest_first].int(),
            bound + entries // piece,
            long_rows.int(),
            slot[at].int(),
            torch.nn.functional.pad(pieces, (0, 1))[order].int(),
        )

    return derived((crow, col), ("csr_pieces", piece), build)


@triton.jit
def step_entries(
    values_ptr, col_ptr, permutation_ptr, stride_values_s, start, end, e, TILE_E: tl.constexpr
):
    """The values, columns and presence of entries e .. e + TILE_E of each piece [TILE_P, TILE_E]"""
    entry = start[:, None] + (e + tl.arange(0, TILE_E))[None, :]
    mask_e = entry < end[:, None]
    column = tl.load(col_ptr + entry, mask=mask_e, other=0).to(tl.int64)
    if permutation_ptr is not None:
        entry = tl.load(permutation_ptr + entry, mask=mask_e, other=0).to(tl.int64)
    return tl.load(values_ptr + entry * stride_values_s, mask=mask_e, other=0.0), column, mask_e


@triton.jit(do_not_specialize=["M", "pieces", "piece_tiles", "column_tiles", "num_slots"])
def csr_matmul_kernel(
    out_ptr,
    sums_ptr,
    values_ptr,
    x_ptr,
    col_ptr,
    permutation_ptr,
    piece_rows_ptr,
    piece_starts_ptr,
    piece_ends_ptr,
    piece_slots_ptr,
    M,
    N,
    pieces,
    piece_tiles,
    column_tiles,
    num_slots,
    stride_values_batch,
    stride_values_s,
    stride_x_batch,
    stride_x_k,
    stride_x_n,
    stride_out_batch,
    stride_out_m,
    stride_out_n,
    TILE_P: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_N: tl.constexpr,
):
    # Pieces are the fastest index: programs that run together read the same columns of x.
    pid = tl.program_id(0)
    column_tile = (pid // piece_tiles) % column_tiles
    batch = (pid // piece_tiles // column_tiles).to(tl.int64)
    piece = pid % piece_tiles * TILE_P + tl.arange(0, TILE_P)
    mask_p = piece < pieces
    row = tl.load(piece_rows_ptr + piece, mask=mask_p, other=0).to(tl.int64)
    start = tl.load(piece_starts_ptr + piece, mask=mask_p, other=0).to(tl.int64)
    end = tl.load(piece_ends_ptr + piece, mask=mask_p, other=0).to(tl.int64)
    mask_p = mask_p & (row < M)
    offs_n = column_tile * TILE_N + tl.arange(0, TILE_N)
    mask_n = offs_n < N
    offs_n = offs_n.to(tl.int64)
    values_ptr += batch * stride_values_batch
    x_columns = x_ptr + batch * stride_x_batch + (offs_n * stride_x_n)[None, None, :]

    acc_type = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((TILE_P, TILE_E, TILE_N), dtype=acc_type)
    v, column, mask_e = step_entries(
        values_ptr, col_ptr, permutation_ptr, stride_values_s, start, end, 0, TILE_E
    )
    for e in range(TILE_E, tl.max(end - start, 0) + TILE_E, TILE_E):
        x = tl.load(
            x_columns + (column * stride_x_k)[:, :, None],
            mask=mask_e[:, :, None] & mask_n[None, None, :],
            other=0.0,
        )  # [TILE_P, TILE_E, TILE_N]
        # The next step's entries come while this one's rows of x do: one wait a step, not two.
        next_v, column, mask_e = step_entries(
            values_ptr, col_ptr, permutation_ptr, stride_values_s, start, end, e, TILE_E
        )
        acc += v.to(acc_type)[:, :, None] * x.to(acc_type)
        v = next_v
    total = tl.sum(acc, 1)  # [TILE_P, TILE_N]

    mask = mask_p
    if sums_ptr is not None:
        slot = tl.load(piece_slots_ptr + piece, mask=mask_p, other=-1).to(tl.int64)
        sums = sums_ptr + (batch * num_slots + slot)[:, None] * N + offs_n[None, :]
        tl.store(sums, total, mask=(mask_p & (slot >= 0))[:, None] & mask_n[None, :])
        mask = mask_p & (slot < 0)
    out = out_ptr + batch * stride_out_batch + (row * stride_out_m)[:, None]
    out += (offs_n * stride_out_n)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "num_long_rows", "column_tiles", "num_slots"])
def csr_long_rows_kernel(
    out_ptr,
    sums_ptr,
    long_rows_ptr,
    first_slots_ptr,
    counts_ptr,
    M,
    N,
    num_long_rows,
    column_tiles,
    num_slots,
    stride_out_batch,
    stride_out_m,
    stride_out_n,
    TILE_S: tl.constexpr,
    TILE_N: tl.constexpr,
):
    pid = tl.program_id(0)
    number = pid % num_long_rows
    batch = (pid // num_long_rows // column_tiles).to(tl.int64)
    row = tl.load(long_rows_ptr + number).to(tl.int64)
    if row >= M:
        return  # the list is padded
    first = tl.load(first_slots_ptr + number).to(tl.int64)
    count = tl.load(counts_ptr + number)
    offs_n = (pid // num_long_rows) % column_tiles * TILE_N + tl.arange(0, TILE_N)
    mask_n = offs_n < N
    offs_n = offs_n.to(tl.int64)
    sums = sums_ptr + (batch * num_slots + first) * N + offs_n[None, :]
    acc = tl.zeros((TILE_S, TILE_N), dtype=sums_ptr.dtype.element_ty)
    for s in range(0, count, TILE_S):
        slot = s + tl.arange(0, TILE_S)
        mask = (slot < count)[:, None] & mask_n[None, :]
        acc += tl.load(sums + slot.to(tl.int64)[:, None] * N, mask=mask, other=0.0)
    total = tl.sum(acc, 0)  # [TILE_N]
    out = out_ptr + batch * stride_out_batch + row * stride_out_m + offs_n * stride_out_n
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask_n)


def csr_matmul(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    *,
    shape: tuple[int, int],
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b] = W[b] @ x[b]`, or `W[b].mT @ x[b]` with `transposed`, W (M, K) = `shape`.

    Shapes: values (B or 1, S), crow (M + 1,) and col (S,) int32 or int64, x (B or 1, R, N), any
    strides (0 where expanded); R = K, or M with `transposed`. Returns (B, rows, N), with
    `transposed_output` in the storage of a contiguous (B, N, rows). bfloat16, float16, float32,
    float64; accumulates in float32 (float64 for float64).

    An x whose rows are not contiguous is copied once: the kernel gathers rows. What is derived from
    the lists (the other compression, pieces of rows) is kept with them.
    """
    permutation = None
    if transposed:
        crow, col, permutation = transposed_lists(crow, col, (shape[0], shape[1]))
    rows, columns = crow.shape[0] - 1, x.shape[2]
    batch = x.shape[0] if values.shape[0] == 1 else values.shape[0]
    wanted = (batch, columns, rows) if transposed_output else (batch, rows, columns)
    out = x.new_empty(wanted)
    out = out.mT if transposed_output else out
    if out.numel() == 0 or col.shape[0] == 0:
        return out.zero_()
    if columns > 1:
        x = x[:1] if x.stride(0) == 0 else x
        x = x if x.stride(2) == 1 else x.contiguous()
    # Rows of the result are written whole; the other order is a copy of it.
    made = x.new_empty(batch, rows, columns) if transposed_output and columns > 1 else out
    long_rows = col.shape[0] > SHORT_ROWS * rows
    pieces = row_pieces(crow, col, LONG_PIECE if long_rows else SHORT_PIECE)
    constexprs, options = _config(columns, x.element_size(), long_rows)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    num_long_rows = pieces.long_rows.shape[0]
    sums = None
    if num_long_rows:
        sums = torch.empty(batch, pieces.num_slots, columns, dtype=accumulate, device=x.device)
    piece_tiles = triton.cdiv(pieces.rows.shape[0], constexprs["TILE_P"])
    column_tiles = triton.cdiv(columns, constexprs["TILE_N"])
    with torch.cuda.device_of(x):
        csr_matmul_kernel[(piece_tiles * column_tiles * batch,)](
            made,
            sums,
            values,
            x,
            col,
            permutation,
            pieces.rows,
            pieces.starts,
            pieces.ends,
            pieces.slots,
            rows,
            columns,
            pieces.rows.shape[0],
            piece_tiles,
            column_tiles,
            pieces.num_slots,
            values.stride(0) if values.shape[0] > 1 else 0,
            values.stride(1),
            x.stride(0) if x.shape[0] > 1 else 0,
            *x.stride()[1:],
            *made.stride(),
            **constexprs,
            **options,
        )
        if sums is not None:
            second = _second_config(columns)
            column_tiles = triton.cdiv(columns, second["TILE_N"])
            csr_long_rows_kernel[(num_long_rows * column_tiles * batch,)](
                made,
                sums,
                pieces.long_rows,
                pieces.first_slots,
                pieces.counts,
                rows,
                columns,
                num_long_rows,
                column_tiles,
                pieces.num_slots,
                *made.stride(),
                **second,
                num_warps=1,
            )
    return out if made is out else out.copy_(made)


def compilations() -> Iterator[Compilation]:
    """Every configuration: columns, dtypes, index dtypes, long rows, permuted values."""
    for columns in CONFIGS:
        for dtype in DTYPE_NAMES:
            if columns <= MOST_COLUMNS[dtype.itemsize]:
                yield _compilation(dtype, columns, "i32")
    yield _compilation(torch.bfloat16, 128, "i64")
    yield _compilation(torch.bfloat16, 128, "i32", permuted=True)
    yield _compilation(torch.bfloat16, 128, "i32", short=True)
    yield _compilation(torch.float32, 1, "i64", permuted=True)
    yield _compilation(torch.float32, 1, "i32", long_rows=True)
    for dtype, name in DTYPE_NAMES.items():
        for _, columns in SECOND_TILES:
            constexprs = {**_second_config(columns), "stride_out_n": 1}
            pointers = {"out_ptr": f"*{name}", "sums_ptr": _accumulator(dtype)}
            yield Compilation(
                f"csr_long_rows[{name},{columns}]",
                csr_long_rows_kernel,
                kernel_signature(csr_long_rows_kernel, pointers, constexprs),
                constexprs,
                {"num_warps": 1},
            )


def _config(
    columns: int, element_bytes: int, long_rows: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constant arguments and the launch options."""
    most = min(columns, MOST_COLUMNS[element_bytes])
    tile_n = next((size for size in CONFIGS if size <= most), min(CONFIGS))
    config = LONG_ROWS_VECTOR if long_rows and tile_n == 1 else CONFIGS[tile_n]
    tile_p, tile_e, warps = config
    return {"TILE_P": tile_p, "TILE_E": tile_e, "TILE_N": tile_n}, {"num_warps": warps}


def _second_config(columns: int) -> dict[str, int]:
    """The second pass's constant arguments."""
    fitting = (tile for tile in SECOND_TILES if tile[1] <= columns)
    tile_s, tile_n = next(fitting, SECOND_TILES[-1])
    return {"TILE_S": tile_s, "TILE_N": tile_n}


def _accumulator(dtype: torch.dtype) -> str:
    return "*fp64" if dtype == torch.float64 else "*fp32"


def _compilation(
    dtype: torch.dtype,
    columns: int,
    index: str,
    *,
    permuted: bool = False,
    short: bool = False,
    long_rows: bool = False,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs, options = _config(columns, dtype.itemsize, long_rows)
    constexprs |= {"stride_x_n": 1, "stride_out_n": 1}
    if not permuted:
        constexprs |= {"permutation_ptr": None, "stride_values_s": 1}
    if short:
        constexprs["sums_ptr"] = None
    pointers = dict.fromkeys(("out_ptr", "values_ptr", "x_ptr"), f"*{name}")
    lists = ("col_ptr", "permutation_ptr", "piece_starts_ptr", "piece_ends_ptr")
    pointers |= {"sums_ptr": _accumulator(dtype)} | dict.fromkeys(lists, f"*{index}")
    parts = [name, str(columns), index, "permuted" * permuted, "short" * short, "long" * long_rows]
    return Compilation(
        f"csr_matmul[{','.join(part for part in parts if part)}]",
        csr_matmul_kernel,
        kernel_signature(csr_matmul_kernel, pointers, constexprs),
        constexprs,
        options,
    )
