"""block_matmul on Hopper for a few columns of x, as in decoding: how the Gluon kernel of
`hopper_few_columns_kernel.py` is tuned and launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.activations import ACTIVATIONS, finish_nothing
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_matmul.even_cuts import (
    STRETCH_FIELDS,
    columns_of_all,
    most_programs,
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
from sparse_layouts.kernels.operand_copies import engine_readable
from sparse_layouts.kernels.products import tma_readable
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature


class Tuning(NamedTuple):
    """Steps that are on their way, and those that the L2 is asked for before the kernel that comes
    before is done.
    """

    stages: int
    early: int


# By rows of a block. A step of so many rows takes 8, 16 or 32 KiB, and its columns of x 8: as many
# as 220 KiB hold.
#
# 8192 x 8192 in bf16, a quarter of the blocks stored, one of four weights after the other in a CUDA
# graph, one H200, microseconds (2026-11-26). 64 columns, blocks of 64: 18.7 (triton_few_columns
# 21.8, cuBLAS 37.9; one of 16 weights after the other 16.0, cuBLAS 38.8), of 128: 22.8 (22.1 and,
# hopper, 23.1). Tiles of 8, 16 and 32 columns took 16.9, 17.2 and 17.7, Triton 13.0, 12.8 and 17.6
# in that run: up to 32 columns are left to it. A ring of half the size took 15.5 with 16 columns,
# so less that is on its way might be more here too; the L2 asked for nothing beforehand, or for
# twice as much, 17.1 and 17.8.
TUNINGS = {64: Tuning(13, 13), 128: Tuning(9, 9), 256: Tuning(5, 5)}
TILE_COLUMNS = 64
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
        x = engine_readable(x)
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
    constants, options = _constants(p.block_size, values_t, x_t, activation, p.num_patterns > 1)
    # in the order of the list, without gaps
    is_one_run = p.row_slots is None and values.is_contiguous()
    values, x = (t.mT if is_t else t for t, is_t in ((values, values_t), (x, x_t)))
    programs = max(1, min(multiprocessors(x.device) // batch, steps_of(p), most_programs(p)))
    places = batch * 2 * programs if programs > 1 else 1  # one program cuts no row
    each, more = divmod(steps_of(p), programs)

    def arguments() -> dict[str, Any]:
        return {
            "values_desc": rows_descriptor(values, 64 if values_t else p.block_size[0]),
            "x_desc": rows_descriptor(x, 64),
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
) -> Prepared | None:
    """What launches `out = W @ x + bias` again; None where x is copied first."""
    return Prepared(values, pattern, x, out, bias) if tma_readable(x) else None


def _constants(
    block_size: tuple[int, int],
    values_t: bool,
    x_t: bool,
    activation: str | None,
    several: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    tuning = TUNINGS[block_size[0]]
    constants = {
        "BM": block_size[0],
        "BK": block_size[1],
        "TN": TILE_COLUMNS,
        "FIELDS": STRETCH_FIELDS,
        "TOGETHER": TOGETHER // (block_size[0] * TILE_COLUMNS),
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
    for rows in TUNINGS:
        yield _compilation((rows, rows), bf16, as_linear)
        yield _compilation((rows, 64), bf16, (False, False))
        for x_t in (False, True):
            yield _compilation((rows, 128), bf16, (True, x_t))
    yield _compilation((64, 64), torch.float16, as_linear)
    yield _compilation((64, 256), bf16, as_linear, several=True)
    for activation in ACTIVATIONS:
        yield _compilation((64, 64), bf16, as_linear, activation)
    yield _compilation((256, 64), bf16, as_linear, "gelu_tanh")


def _compilation(
    block_size: tuple[int, int],
    dtype: torch.dtype,
    turned: tuple[bool, bool],
    activation: str | None = None,
    several: bool = False,
) -> Compilation:
    name = DTYPE_NAMES[dtype]
    values_t, x_t = turned
    constants, options = _constants(block_size, *turned, activation, several)
    given = {
        "values_desc": rows_descriptor_type(dtype, 64 if values_t else block_size[0]),
        "x_desc": rows_descriptor_type(dtype, 64),
        "values_ptr": f"*{name}",
        "sums_ptr": "*fp32",
        "bias_ptr": f"*{name}",
        "out_ptr": f"*{name}",
    }
    absent = ["values_ptr" if values_t else "slots_ptr"]
    if activation is None:
        absent.append("bias_ptr")
    constexprs = constants | dict.fromkeys(absent)
    parts = ["x".join(map(str, block_size)), name, activation or ""]
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
