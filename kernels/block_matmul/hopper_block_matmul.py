"""block_matmul on Hopper: how the Gluon kernel is tuned and launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.derived import derived
from sparse_layouts.kernels.activations import finish_nothing
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_matmul.hopper_block_matmul_kernel import hopper_block_matmul
from sparse_layouts.kernels.hopper_common import (
    broadcasts,
    multiprocessors,
    rows_descriptor,
    rows_descriptor_type,
    work_counter,
)
from sparse_layouts.kernels.launching import Launch
from sparse_layouts.kernels.operand_copies import engine_readable
from sparse_layouts.kernels.products import tma_readable
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature

# Columns of a tile, whose halves (its rows from 128 on, else its columns) are a warpgroup's each;
# half as many where that leaves a quarter of the multiprocessors idle, or x has no more (64 columns
# of 8192 x 8192, blocks of 64: 44.8 us by whole tiles, 25.7 by half ones). A quarter of the blocks
# stored, us with whole and half tiles (Triton, cuBLAS): 4096 x 4096 and 512 columns, blocks of 64,
# 16.7 and 18.1 (23.9, 23.5), of 128 22.0 and 15.8 (17.7, 23.2); 8192 x 8192 and 256 columns, blocks
# of 64, 26.8 and 29.5 (42.8, 45.0); 4096 x 4096 and 128 columns - and 11.3 (19.0, 14.1).
TILE_COLUMNS, FEWER_COLUMNS = 256, 128
STAGES = 4
MAX_REGISTERS = 168
# Measured on an H200, 2026-11-26, bf16, 4096^3, in CUDA graphs, us (cuBLAS 160): a quarter of the
# blocks stored 78 with blocks of 64 and 61 with 128, a tenth 39 and 35, half 139 and 106; F.linear
# and x @ W the same. What bounds it is the L2: tiles of 64 rows read 52 FLOP a byte, at 444 TFLOP/s
# 8.5 TB/s; of 128 rows 87, at 540 6.2, and a tile's store, which nothing of the same program hides.


def block_matmul(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    *,
    transposed_output: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`activation(W[b, p] @ x[b, p] + bias)` as `reference.block_matmul` defines it, in bf16 or
    fp16. Operands that the copy engine cannot read are copied first.
    """
    p, m, n = pattern, pattern.shape[0], x.shape[3]
    batch = x.shape[0] if values.shape[0] == 1 else values.shape[0]
    if transposed_output:
        out = x.new_empty(batch, p.num_patterns, n, m).mT
    else:
        out = x.new_empty(batch, p.num_patterns, m, n)
    if out.numel() == 0 or p.num_blocks == 0:
        return finish_nothing(out, bias, activation)
    with torch.cuda.device_of(x):
        values, x = engine_readable(values, 1), engine_readable(x)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        launch(values, p, x, out, bias, activation, stream).run(stream)
    return out


def launch(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    activation: str | None,
    stream: int,
) -> Launch:
    """The launch that writes out (B, P, M, N), by rows or by columns."""
    p, (batch, _, m, n) = pattern, out.shape
    values_batch = int(values.shape[0] > 1 and values.stride(0) != 0)
    values = values if values_batch else values[:1]
    x, x_batch, x_pattern = broadcasts(x)
    turned = [t.stride(3) != 1 for t in (values, x, out)]
    values, x, out = (
        t.mT if is_turned else t for t, is_turned in zip((values, x, out), turned, strict=True)
    )
    row_tiles = batch * p.num_patterns * p.grid[0] * (p.block_size[0] // _tile_rows(p.block_size))
    most = multiprocessors(x.device)
    columns = tile_columns(n, row_tiles, most)
    constants = _constants(p.block_size, *turned, activation, columns)
    column_tiles = -(-n // columns)
    items = row_tiles * column_tiles

    def arguments() -> dict[str, Any]:
        return {
            "values_desc": rows_descriptor(values, 64),
            "x_desc": rows_descriptor(x, _x_rows(constants)),
            "out_desc": rows_descriptor(out, _out_rows(constants)),
            "patterns": p.num_patterns,
            "block_rows": p.grid[0],
            "column_tiles": column_tiles,
            "items": items,
            "values_batch": values_batch,
            "x_batch": x_batch,
            "x_pattern": x_pattern,
            "num_rows": m,
        }

    return Launch(
        hopper_block_matmul,
        (p.shape, p.block_size, p.num_patterns, values_batch, x_batch, x_pattern),
        {"values_desc": values, "x_desc": x, "out_desc": out},
        {
            "counter_ptr": work_counter(x.device, stream),
            "order_ptr": rows_by_length(p),
            "crow_ptr": p.crow_indices,
            "col_ptr": p.col_indices,
            "slots_ptr": p.row_slots,
            "bias_ptr": None if bias is None else bias.contiguous(),
        },
        arguments,
        {**constants, "num_warps": 4, "maxnreg": MAX_REGISTERS},
        min(items, most),
    )


def tile_columns(columns: int, row_tiles: int, processors: int) -> int:
    """Columns of a tile of a product with so many columns and tiles of rows."""
    busy = 4 * row_tiles * -(-columns // TILE_COLUMNS) >= 3 * processors
    return TILE_COLUMNS if busy and columns > FEWER_COLUMNS else FEWER_COLUMNS


class Prepared:
    """Calls on operands like these: all but addresses is settled."""

    def __init__(
        self, values: Tensor, pattern: BlockPattern, x: Tensor, out: Tensor, bias: Tensor | None
    ) -> None:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        settled = launch(values, pattern, x, out, bias, None, stream)
        self._programs, self._device = settled.programs, x.device
        self._packed = settled.pack(("counter_ptr", "bias_ptr"))

    def __call__(self, values: int, x: int, out: int, bias: Tensor | None, stream: int) -> None:
        """Writes to the address `out`."""
        packed = self._packed
        with packed.lock:
            packed.describe("values_desc", values)
            packed.describe("x_desc", x)
            packed.describe("out_desc", out)
            if bias is not None:
                packed.point("bias_ptr", bias.data_ptr())
            packed.point("counter_ptr", work_counter(self._device, stream).data_ptr())
            packed.launch(self._programs, stream)


def prepared(
    values: Tensor, pattern: BlockPattern, x: Tensor, out: Tensor, bias: Tensor | None
) -> Prepared | None:
    """What launches `out = W @ x + bias` again; None where an operand is copied first."""
    readable = tma_readable(values) and tma_readable(x)
    return Prepared(values, pattern, x, out, bias) if readable else None


def rows_by_length(pattern: BlockPattern) -> Tensor:
    """All block rows (pattern * Mb + row), those with the most blocks first; int32, made once for a
    pattern.
    """

    def build() -> Tensor:
        counts = pattern.crow_indices.diff(dim=-1).flatten()
        return torch.sort(counts, descending=True, stable=True).indices.int()

    return derived(pattern, "rows_by_length", build)


def _constants(
    block_size: tuple[int, int],
    values_t: bool,
    x_t: bool,
    out_t: bool,
    activation: str | None,
    columns: int = TILE_COLUMNS,
) -> dict[str, Any]:
    return {
        "BM": block_size[0],
        "BK": block_size[1],
        "TM": _tile_rows(block_size),
        "TN": columns,
        "VALUES_T": values_t,
        "X_T": x_t,
        "OUT_T": out_t,
        "ACTIVATION": activation,
        "STAGES": STAGES,
    }


def _tile_rows(block_size: tuple[int, int]) -> int:
    return min(block_size[0], 128)


def _part_columns(constants: dict[str, Any]) -> int:
    """Columns of a tile that are one warpgroup's."""
    return constants["TN"] * constants["TM"] // 128


def _x_rows(constants: dict[str, Any]) -> int:
    """Rows of a box of x: 64 along K, or, of its transpose, what a warpgroup multiplies by."""
    return _part_columns(constants) if constants["X_T"] else 64


def _out_rows(constants: dict[str, Any]) -> int:
    """Rows of a box of out: 64, or, of its transpose, the columns that are stored at once."""
    return min(_part_columns(constants), 128) if constants["OUT_T"] else 64


def compilations() -> Iterator[Compilation]:
    """Both tiles in every orientation that a layout's products take, epilogues, dtypes."""
    bf16 = torch.bfloat16
    for block in (64, 128):
        for turned in (
            (False, False, False),  # w @ x
            (False, True, True),  # F.linear
            (True, True, True),  # its gradient to x, and x @ w
            (True, False, False),  # w.mT @ x
        ):
            for columns in (TILE_COLUMNS, FEWER_COLUMNS):
                yield _compilation((block, block), bf16, turned, columns=columns)
    yield _compilation((256, 64), torch.float16, (False, False, False))
    yield _compilation((64, 128), torch.float16, (True, True, True))
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        yield _compilation((64, 64), bf16, (False, True, True), activation)
    yield _compilation((128, 128), bf16, (False, True, True), "gelu")


def _compilation(
    block_size: tuple[int, int],
    dtype: torch.dtype,
    turned: tuple[bool, bool, bool],
    activation: str | None = None,
    columns: int = TILE_COLUMNS,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    constexprs = _constants(block_size, *turned, activation, columns)
    given = {
        "values_desc": rows_descriptor_type(dtype, 64),
        "x_desc": rows_descriptor_type(dtype, _x_rows(constexprs)),
        "out_desc": rows_descriptor_type(dtype, _out_rows(constexprs)),
        "bias_ptr": f"*{name}",
    }
    if activation is None:
        constexprs["bias_ptr"] = None
    if not turned[0]:
        constexprs["slots_ptr"] = None
    parts = ["x".join(map(str, block_size)), name, activation or ""]
    parts.append("few_tiles" * (columns == FEWER_COLUMNS))
    parts += [what * on for what, on in zip(("values_t", "x_t", "out_t"), turned, strict=True)]
    return Compilation(
        f"block_matmul[{','.join(part for part in parts if part)}]",
        hopper_block_matmul,
        kernel_signature(hopper_block_matmul, given, constexprs),
        constexprs,
        {"num_warps": 4, "maxnreg": MAX_REGISTERS},
        90,
        90,
    )
