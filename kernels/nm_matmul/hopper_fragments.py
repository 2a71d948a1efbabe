"""nm_matmul for few columns of x from entries that lie by fragments: how the Gluon kernel of
`hopper_fragments_kernel.py` is tuned and launched.

What limits such a product is the reading of the matrix: each entry is read once, in the order in
which it lies, and goes to the tensor cores with nothing but registers in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.launching import Launch
from sparse_layouts.kernels.nm_matmul.cpu import empty_result
from sparse_layouts.kernels.nm_matmul.hopper_fragments_kernel import (
    HIGH,
    WORDS,
    X_WORDS,
    nm_fragments_kernel,
)
from sparse_layouts.kernels.nm_matmul.triton_few_columns import processors
from sparse_layouts.kernels.requirements import FRAGMENT_COLUMNS
from sparse_layouts.kernels.triton_common import DTYPE_NAMES, kernel_signature
from sparse_layouts.nm_fragments import FRAGMENTS, LANES, TILE_ROWS, unit_columns


class Tuning(NamedTuple):
    """Tiles of 16 rows a program, the warps that multiply them, phases that are on their way, parts
    of x, how many times 64 columns such a part has, programs that a multiprocessor is to hold, and
    programs that share the columns of the result.
    """

    tiles: int
    warps: int
    stages: int
    x_stages: int
    x_each: int
    programs: int = 2
    parts: int = 1


# By n:m and eights of columns, the most tiles first: what a program shares of x grows with its
# tiles, and fewer programs than multiprocessors read more slowly. Of m = 8 more columns than 32 are
# several programs', since registers do not hold more sums.
#
# Beside the first ones: microseconds on an H200, 8192 x 8192, bf16, 8, 16, 32 and 64 columns, in a
# CUDA graph in which weights take turns (2026-11-26); cuBLAS's dense product takes 36.2, 36.5, 37.3
# and 39.8. The others are for fewer rows.
TUNINGS = {
    (2, 4): {
        1: [Tuning(2, 8, 3, 4, 1), Tuning(1, 8, 7, 4, 1)],  # 21.8
        2: [Tuning(2, 8, 3, 3, 1), Tuning(1, 8, 6, 3, 1)],  # 22.6
        4: [Tuning(2, 4, 4, 3, 1), Tuning(2, 8, 5, 2, 1, 1)],  # 24.5; (4, 8, 3, 2, 1, 1): 25.6
        8: [Tuning(4, 8, 2, 2, 1, 1), Tuning(2, 8, 4, 2, 1, 1)],  # 29.8
    },
    (1, 4): {
        1: [Tuning(2, 8, 3, 3, 2), Tuning(1, 8, 5, 3, 2)],  # 12.2
        2: [Tuning(2, 4, 5, 3, 2), Tuning(1, 8, 6, 3, 1)],  # 14.3
        4: [Tuning(4, 8, 2, 2, 2, 1), Tuning(2, 8, 5, 2, 1, 1)],  # 17.8; (4, 8, 3, 2, 1, 1): 19.9
        8: [Tuning(4, 8, 2, 2, 1, 1), Tuning(2, 8, 4, 2, 1, 1)],  # 27.4
    },
    (2, 8): {
        1: [Tuning(2, 8, 3, 3, 2), Tuning(1, 8, 5, 3, 2)],  # 13.7
        2: [Tuning(2, 8, 2, 2, 2), Tuning(1, 8, 5, 3, 2, 1)],  # 17.5; (2, 8, 4, 3, 2, 1): 23.9
        4: [Tuning(4, 8, 2, 2, 2, 1), Tuning(2, 4, 4, 2, 2)],  # 26.9; (4, 4, 2, 2, 2): 38.9
        8: [Tuning(4, 4, 2, 2, 2, 2, 2), Tuning(2, 4, 4, 2, 2, 2, 2)],  # 43.6
    },
    (1, 8): {
        1: [Tuning(2, 4, 4, 3, 4), Tuning(1, 8, 5, 3, 2)],  # 8.7; (2, 8, 3, 3, 2): 9.9
        2: [Tuning(2, 8, 2, 2, 2), Tuning(1, 8, 5, 3, 2, 1)],  # 12.2; (2, 8, 4, 3, 2, 1): 16.6
        4: [Tuning(4, 8, 2, 2, 2, 1), Tuning(2, 4, 4, 2, 2)],  # 15.8; (4, 4, 2, 2, 2): 21.0
        8: [Tuning(4, 4, 2, 2, 2, 2, 2), Tuning(2, 4, 4, 2, 2, 2, 2)],  # 24.7
    },
}
# Programs that are enough, of multiprocessors.
ENOUGH = 0.75
# 32-bit registers of a multiprocessor.
REGISTERS = 2**16
# Whether a launch may begin while the kernel before it ends.
EARLY = True


def nm_matmul(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
    order: str = FRAGMENTS,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]` as the reference's `nm_matmul` defines it, without
    `transposed`, in bf16 or fp16; values and indices lie by fragments, indices (P, M / 16, W).

    NaN and infinity of x need not reach the rows of W that store nothing in their column: a dense
    product multiplies them by 0, which makes NaN, sparse tensor cores leave them out.
    """
    assert not transposed, "the table chooses another kernel"
    assert order == FRAGMENTS, "the table chooses another kernel"
    patterns, rows, entries = values.shape[1:]
    shared, samples, columns = values.shape[0] == 1, x.shape[0], x.shape[3]
    batch = samples if shared else values.shape[0]
    out = empty_result(x, batch, rows, transposed_output)
    if out.numel() == 0 or entries == 0:
        return out.zero_()
    with torch.cuda.device_of(x):
        for p in range(patterns):
            if shared and patterns == 1 and transposed_output:  # all samples as one matrix
                rows_of_x = x[:, 0].mT.reshape(samples * columns, x.shape[2])
                wide = out[:, 0].mT.view(samples * columns, rows).mT
                _columns_by_columns(wide, values[0, 0], indices[0], rows_of_x, n, m)
                continue
            for b in range(batch):
                own = values[0 if shared else b, p]
                sample = x[b if samples > 1 else 0, p].mT
                _columns_by_columns(out[b, p], own, indices[p], sample, n, m)
    return out


def _columns_by_columns(
    out: Tensor, values: Tensor, indices: Tensor, x: Tensor, n: int, m: int
) -> None:
    """Writes `W @ x.mT` to out (M, N), any strides; x (N, K)."""
    values, indices, x = _aligned(values), _aligned(indices), _rows(x)
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    for first in range(0, x.shape[0], FRAGMENT_COLUMNS):
        at = slice(first, first + FRAGMENT_COLUMNS)
        launch(out[:, at], values, indices, x[at], n, m).run(stream)


def _aligned(t: Tensor) -> Tensor:
    """Contiguous memory from a multiple of 16 bytes on."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _rows(x: Tensor) -> Tensor:
    """x (N, K) as the copy engine reads it: rows without gaps from multiples of 16 bytes on."""
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0:
        if x.shape[0] == 1:
            return x[0][None]  # whatever the step to a row that is not there was
        if x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0:
            return x
    return x.clone(memory_format=torch.contiguous_format)


def launch(out: Tensor, values: Tensor, indices: Tensor, x: Tensor, n: int, m: int) -> Launch:
    """The launch that writes `W @ x.mT` to out (M, N), any strides, of at most 64 columns; indices
    (M / 16, W), x (N, K) as the copy engine reads it.
    """
    rows, (columns, width) = values.shape[0], x.shape
    tiles, units = rows // TILE_ROWS, width // unit_columns(n, m)
    words = indices.shape[1]
    eights = triton.next_power_of_2(triton.cdiv(columns, 8))
    tuning = _tuning(TUNINGS[n, m][eights], tiles, x.device)
    warps, height = tuning.warps, tuning.tiles
    described = {"values_desc": values, "words_desc": indices, "x_desc": x}
    if m == 8:
        described["high_desc"] = indices.view(-1)[units * LANES :]

    def arguments() -> dict[str, Any]:
        own, x_words = values.view(torch.int32), x.view(torch.int32)
        high, chunks = None, unit_columns(n, m) // 64
        if m == 8:
            rest = [tiles, units, 16], [words, 16, 1], [height, warps, 16]
            high = _described(described["high_desc"], *rest, HIGH)
        row = x_words.stride(0) if columns > 1 else width // 2
        x_block, x_steps = [warps, 1, 8, 32], [32 * chunks, 32, row, 1]
        return {
            "values_desc": _described(
                own, [tiles, 8 * units, 32], [256 * units, 32, 1], [height, 8 * warps, 32], WORDS
            ),
            "words_desc": _described(
                indices, [tiles, units, 32], [words, 32, 1], [height, warps, 32], WORDS
            ),
            "high_desc": high,
            "x_desc": _described(x_words, [units, chunks, columns, 32], x_steps, x_block, X_WORDS),
            "M": rows,
            "N": columns,
            "units": units,
            "phases": triton.cdiv(units, warps),
            "parts": tuning.parts,
            "stride_words_tile": words,
            "stride_out_m": out.stride(0),
            "stride_out_n": out.stride(1),
        }

    constexprs, options = _constants(tuning, n, m, eights)
    return Launch(
        nm_fragments_kernel,
        (out.stride(), columns),
        described,
        {"out_ptr": out, "values_ptr": values, "words_ptr": indices},
        arguments,
        constexprs | options,
        triton.cdiv(tiles, height) * tuning.parts,
    )


def _tuning(tunings: list[Tuning], tiles: int, device: torch.device) -> Tuning:
    enough = ENOUGH * processors(device)
    return next((t for t in tunings if tiles >= enough * t.tiles), tunings[-1])


def _described(
    base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any
) -> TensorDescriptor:
    return TensorDescriptor(base, shape, strides, block, layout.value)


def _constants(
    tuning: Tuning, n: int, m: int, eights: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    constexprs = {
        "STORED": n,
        "OF": m,
        "TILES": tuning.tiles,
        "WARPS": tuning.warps,
        "STAGES": tuning.stages,
        "X_STAGES": tuning.x_stages,
        "X_EACH": tuning.x_each,
        "NT": eights // tuning.parts,
        "EARLY": EARLY,
    }
    # of the warps that bring there are four, two of which do nothing
    threads = 32 * (tuning.warps + 4) * tuning.programs
    registers = min(248, REGISTERS // threads // 8 * 8)
    return constexprs, {"num_warps": tuning.warps, "maxnreg": registers, "launch_pdl": EARLY}


def compilations() -> Iterator[Compilation]:
    """Every tuning of every n:m, and fp16."""
    for (n, m), by_eights in TUNINGS.items():
        for eights, tunings in by_eights.items():
            for tuning in tunings:
                yield _compilation(torch.bfloat16, n, m, eights, tuning)
        yield _compilation(torch.float16, n, m, 1, by_eights[1][0])


def _compilation(dtype: torch.dtype, n: int, m: int, eights: int, tuning: Tuning) -> Compilation:
    constexprs, options = _constants(tuning, n, m, eights)
    height, warps = tuning.tiles, tuning.warps

    def described(block: list[int], layout: Any) -> str:
        return f"tensordesc<i32{block},{layout.value!r}>"

    given = {
        "values_desc": described([height, 8 * warps, 32], WORDS),
        "words_desc": described([height, warps, 32], WORDS),
        "high_desc": described([height, warps, 16], HIGH),
        "x_desc": described([warps, 1, 8, 32], X_WORDS),
        "out_ptr": f"*{DTYPE_NAMES[dtype]}",
        "values_ptr": f"*{DTYPE_NAMES[dtype]}",
    }
    if m == 4:
        del given["high_desc"]
        constexprs["high_desc"] = None
    return Compilation(
        f"nm_fragments[{n}:{m},{DTYPE_NAMES[dtype]},{8 * eights},{height}x{warps}]",
        nm_fragments_kernel,
        kernel_signature(nm_fragments_kernel, given, constexprs),
        constexprs,
        options,
        90,
        90,
    )
