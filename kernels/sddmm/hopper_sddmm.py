"""sddmm on Hopper: how the Gluon kernel is tuned and launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.derived import derived
from sparse_layouts.kernels.ahead_of_time import Compilation
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
from sparse_layouts.kernels.sddmm.hopper_sddmm_kernel import hopper_sddmm
from sparse_layouts.kernels.sddmm.tile_schedule import tile_schedule
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature

# Stored columns of a tile: one warpgroup's accumulator for 64 rows of 256, the two halves of it for
# tiles of one block row of 64.
TILE_COLUMNS = 256
STAGES = 4
MAX_REGISTERS = 168


def sddmm(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """`values[n, s]` = the block of `a[n, p] @ b[n, p]` at slot s of the pattern, as
    `reference.sddmm` defines it, in bf16 or fp16, for whole blocks. Operands that the copy
    engine cannot read are copied first.
    """
    values = a.new_empty(a.shape[0], pattern.num_blocks, *pattern.block_size)
    if values.numel() == 0 or a.shape[3] == 0:
        return values.zero_()
    with torch.cuda.device_of(a):
        a, b = engine_readable(a), engine_readable(b)
        stream = torch.cuda.current_stream(a.device).cuda_stream
        launch(a, b, pattern, values, stream).run(stream)
    return values


def launch(a: Tensor, b: Tensor, pattern: BlockPattern, values: Tensor, stream: int) -> Launch:
    """The launch that writes values (B, S, bm, bn)."""
    p, batch, k = pattern, a.shape[0], a.shape[3]
    a, a_batch, a_pattern = broadcasts(a)
    b, b_batch, b_pattern = broadcasts(b)
    turned = [t.stride(3) != 1 for t in (a, b)]
    a, b = (t.mT if is_turned else t for t, is_turned in zip((a, b), turned, strict=True))
    constants = _constants(p.block_size, *turned)
    tile_rows, tile_starts = fullest_first(p, TILE_COLUMNS)
    tiles = tile_rows.shape[0]
    items = tiles * (p.block_size[0] // constants["TM"]) * batch

    def arguments() -> dict[str, Any]:
        return {
            "a_desc": rows_descriptor(a, 64),
            "b_desc": rows_descriptor(b, 64),
            "values_desc": rows_descriptor(values, 64),
            "block_rows": p.grid[0],
            "num_rows": p.num_patterns * p.grid[0],
            "batch_size": batch,
            "tiles": tiles,
            "steps": -(-k // 64),
            "a_batch": a_batch,
            "a_pattern": a_pattern,
            "b_batch": b_batch,
            "b_pattern": b_pattern,
        }

    return Launch(
        hopper_sddmm,
        (p.shape, p.num_patterns, tiles, batch, a_batch, a_pattern, b_batch, b_pattern),
        {"a_desc": a, "b_desc": b, "values_desc": values},
        {
            "counter_ptr": work_counter(a.device, stream),
            "tile_rows_ptr": tile_rows,
            "tile_starts_ptr": tile_starts,
            "crow_ptr": p.crow_indices,
            "col_ptr": p.col_indices,
            "slots_ptr": p.row_slots,
        },
        arguments,
        {**constants, "num_warps": 4, "maxnreg": MAX_REGISTERS},
        min(items, multiprocessors(a.device)),
    )


class Prepared:
    """Calls on operands like these: all but addresses is settled."""

    def __init__(self, a: Tensor, b: Tensor, pattern: BlockPattern, values: Tensor) -> None:
        stream = torch.cuda.current_stream(a.device).cuda_stream
        settled = launch(a, b, pattern, values, stream)
        self._programs, self._device = settled.programs, a.device
        self._packed = settled.pack(("counter_ptr",))

    def __call__(self, a: int, b: int, values: int, stream: int) -> None:
        """Writes to the address `values`."""
        packed = self._packed
        with packed.lock:
            packed.describe("a_desc", a)
            packed.describe("b_desc", b)
            packed.describe("values_desc", values)
            packed.point("counter_ptr", work_counter(self._device, stream).data_ptr())
            packed.launch(self._programs, stream)


def prepared(a: Tensor, b: Tensor, pattern: BlockPattern, values: Tensor) -> Prepared | None:
    """What launches it again on operands like these; None where one is copied first."""
    readable = tma_readable(a) and tma_readable(b)
    return Prepared(a, b, pattern, values) if readable else None


def fullest_first(pattern: BlockPattern, tile_columns: int) -> tuple[Tensor, Tensor]:
    """:func:`tile_schedule`, the tiles with the most stored columns first, those too many last."""

    def build() -> tuple[Tensor, Tensor]:
        rows, starts = tile_schedule(pattern, tile_columns)
        counts = pattern.crow_indices.diff(dim=-1).flatten() * pattern.block_size[1]
        counts = torch.nn.functional.pad(counts, (0, 1))
        columns = (counts[rows.long()] - starts * tile_columns).clamp(max=tile_columns)
        order = torch.sort(columns, descending=True, stable=True).indices
        return rows[order].contiguous(), starts[order].contiguous()

    return derived(pattern, ("sddmm_fullest_first", tile_columns), build)


def _constants(block_size: tuple[int, int], a_t: bool, b_t: bool) -> dict[str, Any]:
    return {
        "BM": block_size[0],
        "BN": block_size[1],
        "TM": min(block_size[0], 128),
        "TN": TILE_COLUMNS,
        "A_T": a_t,
        "B_T": b_t,
        "STAGES": STAGES,
    }


def compilations() -> Iterator[Compilation]:
    """Both tiles in every orientation of the operands, dtypes, slots."""
    bf16 = torch.bfloat16
    for block in (64, 128):
        for turned in ((True, False), (False, True), (False, False), (True, True)):
            yield _compilation((block, block), bf16, turned)
    yield _compilation((256, 64), torch.float16, (True, False), slots=True)
    yield _compilation((64, 128), torch.float16, (True, False))


def _compilation(
    block_size: tuple[int, int],
    dtype: torch.dtype,
    turned: tuple[bool, bool],
    *,
    slots: bool = False,
) -> Compilation:
    constexprs = _constants(block_size, *turned)
    given = dict.fromkeys(("a_desc", "b_desc", "values_desc"), rows_descriptor_type(dtype, 64))
    if not slots:
        constexprs["slots_ptr"] = None
    parts = ["x".join(map(str, block_size)), DTYPE_NAMES[dtype], "slots" * slots]
    parts += [what * on for what, on in zip(("a_t", "b_t"), turned, strict=True)]
    return Compilation(
        f"sddmm[{','.join(part for part in parts if part)}]",
        hopper_sddmm,
        kernel_signature(hopper_sddmm, given, constexprs),
        constexprs,
        {"num_warps": 4, "maxnreg": MAX_REGISTERS},
        90,
        90,
    )
