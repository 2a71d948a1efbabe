"""A dense tensor read in chunks of rows: magnitudes, block norms, in bounded memory.

What sparsifiers and factories read a dense tensor through, so that one that is memory-mapped, or
that fills the memory, is never copied as a whole.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.dispatch import Layout

# Chunks that stay in a CPU's second-level cache with what is computed from them; on a GPU few
# launches count for more.
CHUNK_BYTES = 1 << 19
CHUNK_BYTES_GPU = 1 << 28


def dense_source(source: Any, what: str) -> Any:
    """A numpy array (a memory map among them) as a tensor on the same memory; others as they are.

    Nothing in this library writes to it, so a read-only array is taken without torch's warning.
    Raises `TypeError` for arrays of what torch has no dtype for.
    """
    if not isinstance(source, np.ndarray):
        return source
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        try:
            return torch.from_numpy(source)
        except TypeError as error:
            raise TypeError(
                f"{what}: expected an array of numbers, got numpy's {source.dtype}; "
                "convert it with x.astype(numpy.float32)"
            ) from error
        except ValueError as error:  # negative strides, foreign byte order
            raise ValueError(f"{what}: {error} Copy it: numpy.ascontiguousarray(x)") from error


def check_dense(dense: Any, what: str) -> Tensor:
    """`dense` as a plain strided tensor of numbers, without its gradient."""
    if isinstance(dense, Layout):
        raise TypeError(
            f"{what}: expected a dense tensor, got {dense.one_line()}; pass w.to_dense()"
        )
    if not isinstance(dense, Tensor):
        raise TypeError(
            f"{what}: expected a dense tensor, got {type(dense).__name__}; a numpy array goes "
            "through torch.from_numpy"
        )
    if dense.layout != torch.strided:
        raise TypeError(
            f"{what}: expected a dense tensor, got one of {dense.layout}; pass x.to_dense()"
        )
    if dense.dtype == torch.bool:
        raise TypeError(f"{what}: expected numbers, got a bool tensor; a bool mask has chosen")
    return dense.detach()


def magnitudes(dense: Tensor) -> Tensor:
    """Absolute values, in a dtype that orders them: that of floats (8-bit ones as float32), float64
    for integers, the real one for complex numbers.
    """
    if dense.dtype.is_complex:
        return (dense.to(torch.complex64) if dense.dtype == torch.complex32 else dense).abs()
    if not dense.dtype.is_floating_point:
        return dense.double().abs_()
    return dense.float().abs_() if dense.dtype.itemsize == 1 else dense.abs()


def magnitude_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of :func:`magnitudes`."""
    return magnitudes(torch.zeros((), dtype=dtype)).dtype


def refuse_nan(found: Tensor, what: str) -> None:
    """Raises where a magnitude or norm is NaN, which has no place in an order. One host sync."""
    if found.numel() and bool(found.amax().isnan()):
        at = tuple(found.isnan().nonzero()[0].tolist())
        number = int(found.isnan().sum())
        raise ValueError(
            f"{what}: expected numbers to compare, got {number} NaN (the first at {at} of a chunk "
            f"of shape {tuple(found.shape)}); replace them with torch.nan_to_num, or keep a "
            "pattern that does not depend on values: sl.SamePattern, sl.Random, sl.KeepAll"
        )


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, N) of a tensor seen as rows: all dimensions but the last together; a vector is one."""
    if not shape:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


def chunk_rows(row_bytes: int, device: torch.device, chunk_bytes: int | None = None) -> int:
    """How many rows of `row_bytes` a chunk has: at least one."""
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_GPU
    return max(1, chunk_bytes // max(1, row_bytes))


def row_chunks(
    dense: Tensor, *, rows: int | None = None, multiple: int = 1, chunk_bytes: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first row, view (r, N)) over the flat rows of `dense` (*lead, M, N), in order.

    `rows` a chunk, by default as many as `chunk_bytes` hold, a multiple of `multiple`. No chunk is
    copied; where the strides of the leading dimensions cannot be joined, chunks end with a matrix.
    """
    total, width = flat_shape(tuple(dense.shape))
    if rows is None:
        rows = chunk_rows(width * dense.itemsize, dense.device, chunk_bytes)
    rows = max(multiple, rows // multiple * multiple)
    if total * width == 0:
        if total:
            yield 0, dense.reshape(total, width)
        return
    for base, matrix in _matrices(dense, total, width):
        for first in range(0, matrix.shape[0], rows):
            yield base + first, matrix[first : first + rows]


def _matrices(dense: Tensor, total: int, width: int) -> Iterator[tuple[int, Tensor]]:
    """(first flat row, view (r, N)): one view where the strides allow it, else a matrix each."""
    if dense.dim() <= 2:
        yield 0, dense.view(total, width)
        return
    try:
        yield 0, dense.view(total, width)
        return
    except RuntimeError:  # no such view
        pass
    each = dense.shape[-2]
    for i, index in enumerate(itertools.product(*map(range, dense.shape[:-2]))):
        yield i * each, dense[index]


def check_divides(shape: tuple[int, ...], block: tuple[int, int], what: str) -> None:
    """Raises where blocks do not divide the matrices, or there is no matrix."""
    if len(shape) < 2:
        raise ValueError(f"{what}: expected (*lead, M, N), got shape {shape}")
    (m, n), (bm, bn) = shape[-2:], block
    if m % bm or n % bn:
        raise ValueError(
            f"{what}: the block {block} does not divide the matrix {(m, n)}; pad it to "
            f"{(-(-m // bm) * bm, -(-n // bn) * bn)} "
            f"with torch.nn.functional.pad(x, (0, {-n % bn}, 0, {-m % bm}))"
        )


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """What norms of entries of this dtype are computed in: float32 at least."""
    return torch.promote_types(magnitude_dtype(dtype), torch.float32)


def block_norms(
    dense: Tensor, block: tuple[int, int], norm: float = 2, chunk_bytes: int | None = None
) -> Tensor:
    """The norms (*lead, M / bm, N / bn) of the blocks of `dense` (*lead, M, N), which they divide.

    By chunks of block rows: extra memory is that of a chunk and of the result.
    """
    (bm, bn), (m, n) = block, dense.shape[-2:]
    grid = (*dense.shape[:-2], m // bm, n // bn)
    out = torch.zeros(
        math.prod(grid[:-1]), grid[-1], dtype=norm_dtype(dense.dtype), device=dense.device
    )
    if out.numel():
        for first, rows in row_chunks(dense, multiple=bm, chunk_bytes=chunk_bytes):
            at = first // bm
            out[at : at + rows.shape[0] // bm] = _chunk_norms(rows, block, norm)
    return out.view(grid)


def _chunk_norms(rows: Tensor, block: tuple[int, int], norm: float) -> Tensor:
    """The norms of the blocks of a chunk (r, N)."""
    wide = norm_dtype(rows.dtype)
    blocks = rows.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    if not rows.dtype.is_floating_point or rows.dtype.itemsize < 4:
        blocks = magnitudes(blocks).to(wide)
    norms = torch.linalg.vector_norm(blocks, norm, dim=(1, 3))
    if norm in (0, math.inf):
        return norms
    limits = torch.finfo(norms.dtype)
    lost = (norms < limits.tiny ** (1 / norm) / limits.eps) | norms.isinf()
    # Powers over- or underflowed, or a block is all zero: once more, scaled, some at a time.
    some = chunk_rows(block[0] * block[1] * wide.itemsize, rows.device)
    for row, column in (at.unbind(1) for at in lost.nonzero().split(some)):
        each = blocks[row, :, column].to(wide).abs_()  # (blocks, bm, bn)
        largest = each.amax((1, 2))
        scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
        each.div_(scale[:, None, None])
        norms[row, column] = torch.linalg.vector_norm(each, norm, dim=(1, 2)).mul_(scale)
    return norms


def nonzero_blocks(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """bool (*lead, M / bm, N / bn): which blocks hold a non-zero (NaN is one)."""
    (bm, bn), (m, n) = block, dense.shape[-2:]
    grid = (*dense.shape[:-2], m // bm, n // bn)
    out = torch.zeros(math.prod(grid[:-1]), grid[-1], dtype=torch.bool, device=dense.device)
    if out.numel():
        for first, rows in row_chunks(dense, multiple=bm):
            found = (rows != 0).view(-1, bm, grid[-1], bn).any(3).any(1)
            out[first // bm : first // bm + found.shape[0]] = found
    return out.view(grid)
