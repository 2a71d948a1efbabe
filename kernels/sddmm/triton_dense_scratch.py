"""sddmm by cuBLAS: the dense product in scratch memory of bounded size, and its stored blocks.

No arithmetic is spared. It is for blocks whose edges tensor cores cannot take, and for small blocks
that are many enough for a dense product to be the faster one: see `requirements.dense_sddmm`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels import triton_scratch_blocks
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.scratch_products import ScratchMatrices, multiply_into
from sparse_layouts.kernels.triton_scratch_blocks import block_row_pieces, gather_blocks


def sddmm(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """`values[n, s]` = the block of `a[n, p] @ b[n, p]` at slot s of the pattern, in slot order.

    Shapes: a (B, P, M, K), b (B, P, K, N), any strides; values (B, S, bm, bn) contiguous, 0 where
    the pattern stores nothing; blocks of any edges. bfloat16, float16, float32, float64. The
    product is torch's own, in its precision, rounded once to the dtype. Scratch memory: the
    product, or some of its block rows, at most 64 MiB at a time. NaN in a row of a or a column of b
    is seen by the entries that read it and by no other.
    """
    values = a.new_empty(a.shape[0], pattern.num_blocks, *pattern.block_size)
    if values.numel() == 0 or a.shape[3] == 0:
        return values.zero_()
    scratch = ScratchMatrices(a)
    for piece, rows in block_row_pieces(pattern, a.shape[0], a.dtype):
        batches, own, _ = piece
        left, right = a[batches, own, rows], b[batches, own]
        dense = scratch.take(*left.shape[:3], pattern.shape[1])
        multiply_into(dense, left, right)
        gather_blocks(values[batches], dense, pattern, piece)
    return values


def compilations() -> Iterator[Compilation]:
    """Those of what it launches."""
    yield from triton_scratch_blocks.compilations()
