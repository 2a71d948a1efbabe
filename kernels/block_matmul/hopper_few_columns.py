"""block_matmul on Hopper for a few columns of x, as in decoding: how the Gluon kernel of
`hopper_few_columns_kernel.py` is tuned and launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.activations import ACTIVATIONS, finish_nothing
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_matmul.even_cuts import (
    STRETCH_FIELDS,
    columns_of_all,
    steps_of,
    stretches,
)
from sparse_layouts.kernels.block_matmul.hopper_few_columns_kernel import hopper_few_columns
from sparse_layouts.kernels.block_matmul.row_cuts import row_counters
from sparse_layouts.kernels.hopper_common import (
    broadcasts,
    multiprocessors,
    rows_descriptor,
    rows_descriptor_type,
)
from sparse_layouts.kernels.launching import Launch
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature


class Tuning(NamedTuple):
    """Steps that are on their way, and those that the L2 is asked for before the kernel that comes
    before is done.
    """

    stages: int
    early: int


# By rows of a block, then columns of a tile. A step of so many rows takes 8, 16 or 32 KiB, and
# 128 bytes a column: as many as 220 KiB hold.
TUNINGS = {
    64: {8: Tuning(20, 20), 16: Tuning(20, 20), 32: Tuning(18, 18), 64: Tuning(13, 13)},
    128: {8: Tuning(12, 12), 16: Tuning(12, 12), 32: Tuning(11, 11), 64: Tuning(9, 9)},
    256: {8: Tuning(6, 6), 16: Tuning(6, 6), 32: Tuning(6, 6), 64: Tuning(5, 5)},
}
# Entries of sums of pieces that are read at once: more do not fit into registers.
TOGETHER = 16384
MAX_REGISTERS = 128


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
    fp16, for up to 64 columns. Deterministic: sums of pieces are added up in one order.
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
        stream = torch.cuda.current_stream(x.device).cuda_stream
        launch(values, p, x, out, bias, activation).run(stream)
    return out


def launch(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Launch:
    """The launch that writes out (B, P, M, N), any strides."""
    p, (batch, _, m, n) = pattern, out.shape
    values_batch = int(values.shape[0] > 1 and values.stride(0) != 0)
    values = values if values_batch else values[:1]
    x, x_batch, x_pattern = broadcasts(x)
    values_t, x_t = values.stride(3) != 1, x.stride(3) != 1
    constants, options = _constants(p.block_size, n, values_t, x_t, activation, p.num_patterns > 1)
    # in the order of the list, without gaps
    is_one_run = p.row_slots is None and values.is_contiguous()
    values, x = (t.mT if is_t else t for t, is_t in ((values, values_t), (x, x_t)))
    programs = max(1, min(multiprocessors(x.device) // batch, steps_of(p)))
    places = batch * 2 * programs
    each, more = divmod(steps_of(p), programs)

    def arguments() -> dict[str, Any]:
        return {
            "values_desc": rows_descriptor(values, 64 if values_t else p.block_size[0]),
            "x_desc": _x_descriptor(x, constants["TN"], x_t),
            "M": m,
            "N": n,
            "block_rows": p.grid[0],
            "block_columns": p.grid[1],
            "blocks": p.num_blocks,
            "programs": programs,
            "each": each,
            "more": more,
            "values_batch": values_batch,
            "x_batch": x_batch,
            "x_pattern": x_pattern,
            "stride_out_batch": out.stride(0),
            "stride_out_pattern": out.stride(1),
            "stride_out_m": out.stride(2),
            "stride_out_n": out.stride(3),
        }

    return Launch(
        hopper_few_columns,
        (p.shape, out.shape, out.stride(), programs, values_batch, x_batch, x_pattern),
        {"values_desc": values, "x_desc": x},
        {
            "values_ptr": values if is_one_run else None,
            "slots_ptr": p.row_slots,
            "columns_ptr": columns_of_all(p),
            "cuts_ptr": stretches(p, programs),
            "sums_ptr": _sums(places, constants, x.device),
            "counters_ptr": row_counters(p, places),
            "bias_ptr": None if bias is None else bias.contiguous(),
            "out_ptr": out,
        },
        arguments,
        constants | options,
        batch * programs,
    )


def _sums(places: int, constants: dict[str, Any], device: torch.device) -> Tensor:
    """Room for the sums of pieces."""
    size = places * constants["BM"] * constants["TN"]
    return torch.empty(size, dtype=torch.float32, device=device)


class Prepared:
    """Calls on operands like these: all but addresses is settled."""

    def __init__(
        self, values: Tensor, pattern: BlockPattern, x: Tensor, out: Tensor, bias: Tensor | None
    ) -> None:
        settled = launch(values, pattern, x, out, bias, None)
        self._programs, self._pattern = settled.programs, pattern
        sums, counters = settled.pointed["sums_ptr"], settled.pointed["counters_ptr"]
        assert sums is not None
        assert counters is not None
        self._sums, self._device = sums.shape[0], sums.device
        self._counters = counters.shape[0]
        self._names_values = settled.pointed["values_ptr"] is not None
        moving = ("out_ptr", "values_ptr", "bias_ptr", "sums_ptr", "counters_ptr")
        self._packed = settled.pack(moving)

    def __call__(self, values: int, x: int, out: int, bias: Tensor | None, stream: int) -> None:
        """Writes to the address `out`."""
        packed = self._packed
        with packed.lock:
            packed.describe("values_desc", values)
            packed.describe("x_desc", x)
            packed.point("out_ptr", out)
            if self._names_values:
                packed.point("values_ptr", values)
            if bias is not None:
                packed.point("bias_ptr", bias.data_ptr())
            sums = torch.empty(self._sums, dtype=torch.float32, device=self._device)
            packed.point("sums_ptr", sums.data_ptr())
            counters = row_counters(self._pattern, self._counters)
            packed.point("counters_ptr", counters.data_ptr())
            packed.launch(self._programs, stream)


def prepared(
    values: Tensor, pattern: BlockPattern, x: Tensor, out: Tensor, bias: Tensor | None
) -> Prepared:
    """What launches `out = W @ x + bias` again."""
    return Prepared(values, pattern, x, out, bias)


def _x_layout(tile_columns: int, x_t: bool) -> gl.NVMMASharedLayout:
    """Of x by columns, 64 entries of K lie together; by rows a tile's columns do."""
    together = 64 if x_t else tile_columns
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * together, element_bitwidth=16, rank=4)


def _x_box(tile_columns: int, x_t: bool) -> list[int]:
    return [1, 1, tile_columns, 64] if x_t else [1, 1, 64, tile_columns]


def _x_descriptor(x: Tensor, tile_columns: int, x_t: bool) -> TensorDescriptor:
    rows = rows_descriptor(x, 64)
    box, layout = _x_box(tile_columns, x_t), _x_layout(tile_columns, x_t)
    return TensorDescriptor(x, rows.shape, rows.strides, box, layout)


def _constants(
    block_size: tuple[int, int],
    n: int,
    values_t: bool,
    x_t: bool,
    activation: str | None,
    several: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    least = 8 if x_t else 16  # columns of the narrowest box that is swizzled
    columns = min(c for c in TUNINGS[block_size[0]] if c >= max(n, least))
    tuning = TUNINGS[block_size[0]][columns]
    constants = {
        "BM": block_size[0],
        "BK": block_size[1],
        "TN": columns,
        "FIELDS": STRETCH_FIELDS,
        "TOGETHER": min(4, max(1, TOGETHER // (block_size[0] * columns))),
        "PATTERNS": several,
        "VALUES_T": values_t,
        "X_T": x_t,
        "ACTIVATION": activation,
        "STAGES": tuning.stages,
        "EARLY": tuning.early,
    }
    return constants, {"num_warps": 4, "maxnreg": MAX_REGISTERS, "launch_pdl": True}


def compilations() -> Iterator[Compilation]:
    """Every tuning, and every orientation of operands, epilogues, several patterns, fp16."""
    bf16, as_linear = torch.bfloat16, (False, True)
    for rows, by_columns in TUNINGS.items():
        for columns in by_columns:
            yield _compilation((rows, rows), bf16, columns, as_linear)
    for rows in TUNINGS:
        for columns in (16, 32, 64):
            yield _compilation((rows, 64), bf16, columns, (False, False))
        for x_t in (False, True):
            yield _compilation((rows, 128), bf16, 16, (True, x_t))
    yield _compilation((64, 64), torch.float16, 8, as_linear)
    yield _compilation((64, 256), bf16, 8, as_linear, several=True)
    for activation in ACTIVATIONS:
        yield _compilation((64, 64), bf16, 16, as_linear, activation)
    yield _compilation((256, 64), bf16, 64, as_linear, "gelu_tanh")


def _compilation(
    block_size: tuple[int, int],
    dtype: torch.dtype,
    columns: int,
    turned: tuple[bool, bool],
    activation: str | None = None,
    several: bool = False,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    values_t, x_t = turned
    constants, options = _constants(block_size, columns, *turned, activation, several)
    tile_columns = constants["TN"]
    x_type = f"{name}{_x_box(tile_columns, x_t)},{_x_layout(tile_columns, x_t)!r}"
    given = {
        "values_desc": rows_descriptor_type(dtype, 64 if values_t else block_size[0]),
        "x_desc": f"tensordesc<{x_type}>",
        "values_ptr": f"*{name}",
        "sums_ptr": "*fp32",
        "bias_ptr": f"*{name}",
        "out_ptr": f"*{name}",
    }
    absent = ["values_ptr" if values_t else "slots_ptr"]
    if activation is None:
        absent.append("bias_ptr")
    constexprs = constants | dict.fromkeys(absent)
    parts = ["x".join(map(str, block_size)), name, str(tile_columns), activation or ""]
    parts += [what * on for what, on in zip(("values_t", "x_t"), turned, strict=True)]
    parts.append("patterns" * several)
    return Compilation(
        f"block_matmul_few_columns[{','.join(part for part in parts if part)}]",
        hopper_few_columns,
        kernel_signature(hopper_few_columns, given, constexprs),
        constexprs,
        options,
        90,
        90,
    )
