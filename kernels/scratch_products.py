"""What the kernels that go through dense scratch memory share: the pieces in which they work, and
torch's product of the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scratch memory of a call. A piece's product should fill the device: 64 MiB is a whole matrix of
# 4096 x 8192 in 16 bits.
SCRATCH_BYTES = 2**26
# The rows of the scratch matrix begin at multiples of this, as cuBLAS wants them.
ROW_BYTES = 16
# An entry on its way to or from scratch memory is moved, not computed with: as an integer of its
# size.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Pieces of a matrix begin at multiples of so many rows or groups: addresses stay aligned.
ALIGNED = 16


class Piece(NamedTuple):
    """What is dense at a time: all of some matrices, or a part (rows, or groups of columns) of
    one.
    """

    batch: slice
    patterns: slice
    part: slice


def pieces(batch: int, patterns: int, size: int, bytes_of_each: int) -> Iterator[Piece]:
    """The pieces of (batch, patterns) matrices of `size` rows (or groups of columns) of
    `bytes_of_each` bytes, none over SCRATCH_BYTES unless a single row is.
    """
    whole = SCRATCH_BYTES // (size * bytes_of_each)
    several = max(1, min(patterns, whole))
    samples = max(1, min(batch, whole // patterns))
    most = max(1, SCRATCH_BYTES // bytes_of_each)
    step = size if whole else _even_step(size, most)
    for b in range(0, batch, samples):
        for p in range(0, patterns, several):
            for start in range(0, size, step):
                yield Piece(
                    slice(b, min(batch, b + samples)),
                    slice(p, min(patterns, p + several)),
                    slice(start, min(size, start + step)),
                )


def _even_step(size: int, most: int) -> int:
    """Steps of about equal length, at most `most`, aligned where that leaves any."""
    number = -(-size // most)
    step = -(-size // number)
    aligned = -(-step // ALIGNED) * ALIGNED
    return aligned if aligned <= most else max(1, most // ALIGNED * ALIGNED or most)


class ScratchMatrices:
    """One buffer that the pieces of a call write to in turn."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffer = like.new_empty(0)

    def take(self, batch: int, patterns: int, rows: int, columns: int) -> Tensor:
        """(batch, patterns, rows, columns), rows aligned; it holds anything."""
        pitch = row_pitch(columns, self.like.dtype)
        shape = (batch, patterns, rows, pitch)
        if self.buffer.numel() < math.prod(shape):
            self.buffer = self.like.new_empty(math.prod(shape))
        return self.buffer[: math.prod(shape)].view(shape)[..., :columns]


def row_pitch(columns: int, dtype: torch.dtype) -> int:
    """Entries from one row of a scratch matrix to the next."""
    multiple = ROW_BYTES // dtype.itemsize
    return -(-columns // multiple) * multiple


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out = a @ b` by torch, in its precision: a (B or 1, P, R, C), b (B or 1, P, C, N), out
    (B, P, R, N), any strides; batches of one are not copied.
    """
    batch, patterns = out.shape[:2]
    if batch == patterns == 1:
        torch.mm(a[0, 0], b[0, 0], out=out[0, 0])
    elif batch <= patterns:
        for sample in range(batch):
            left, right = a[sample % a.shape[0]], b[sample % b.shape[0]]
            torch.bmm(left, right, out=out[sample])
    else:
        for p in range(patterns):
            left, right = (t[:, p].expand(batch, -1, -1) for t in (a, b))
            torch.bmm(left, right, out=out[:, p])
