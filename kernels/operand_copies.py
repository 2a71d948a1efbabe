"""Operands that are copied before a product, because its kernel reads them badly, or not at all, as
they lie: when that pays, and the copies.

A copy reads and writes an operand once, 67 MB for 4096 x 4096 in 16 bits: 16 us at an H200's 4.2
TB/s, 22 by :mod:`.triton_strided_copy` (torch's transposing copy 125, 2026-11-26).
"""

from __future__ import annotations

from torch import Tensor

from sparse_layouts.kernels.products import tma_readable

# Bytes of a stored block's edge up to which a Triton kernel reads an operand that does not lie
# along it in pieces so short that it is copied first: blocks of 16 in 16 bits. With blocks of 32 a
# copy that costs nothing would gain nothing: us as it lies and from the better layout, 4096^3 in
# bf16, one H200, 2026-11-26, 5%, 10% and 25% of the blocks stored: 48, 75, 153 and 50, 79, 163.
SHORT_PIECE_BYTES = 32
# With blocks of 16 the copy takes as long as 7 to 24 reads of the whole operand in short pieces
# take more than they have to. Measured there, 5, 8, 10 and 25% stored (12.8, 20, 26 and 64 reads),
# us as it lies and always copied: F.linear 113, 169, 204, 465 and 123, 141, 162, 319, sddmm 120,
# 171, 206, 435 and 110, 137, 161, 316.
READS_WORTH_A_COPY = 18
# What the copy engine cannot read is copied for the Hopper kernels if each of its entries is
# multiplied so often, by four blocks of 64. W @ x of 4096^3 in bf16, blocks of 64, one H200, us
# with the copy and by the Triton kernel, which takes the product otherwise (2026-11-26): at 266
# uses, x with gaps in its rows 108 and 441, in its columns 108 and 103, rows at any address 56 to
# 58 and 101 to 115; at 1024 uses 154 and 1486, 155 and 268, 102 to 104 and 265 to 343.
USES_WORTH_A_COPY = 256
# Rows of a copy begin at multiples of so many entries: loads may be wide, the copy engine reads it.
PITCH = 16


def reads_well(x: Tensor, uses: int) -> bool:
    """Whether the copy engine reads the matrices of x (*any, M, N), or a copy that
    :func:`engine_readable` makes and that pays, each entry being multiplied `uses` times.
    """
    return tma_readable(x) or (uses >= USES_WORTH_A_COPY and x.numel() > 0)


def uses_of_each(stored: int, lines: int) -> int:
    """How often each entry of an operand is multiplied, in the mean of `lines` rows or columns
    of a pattern's matrices that hold `stored` entries.
    """
    return stored // lines if lines else 0


def engine_readable(x: Tensor, repeating: int = 2) -> Tensor:
    """x (B, P, M, N), which holds something, as the copy engine can read it: itself or a copy,
    along the dimension in which x has the shorter steps. What is expanded in the first `repeating`
    dimensions is copied once.
    """
    if tma_readable(x):
        return x
    return _copied(x, -2 if 0 < x.stride(-2) < x.stride(-1) else -1, repeating)


def relaid(operand: Tensor, dim: int, edge: int, reads: int) -> Tensor:
    """`operand` (B, P, M, N), copied so that `dim` is contiguous, if it is read `reads` times in
    short pieces of `edge` entries along its other matrix dimension, which is the contiguous one.
    What is expanded is copied once.
    """
    other = -3 - dim  # of -1 and -2
    if (
        operand.stride(other) != 1
        or operand.stride(dim) == 1
        or edge * operand.element_size() > SHORT_PIECE_BYTES
        or reads < READS_WORTH_A_COPY
    ):
        return operand
    return _copied(operand, dim, 2)


def _copied(x: Tensor, dim: int, repeating: int) -> Tensor:
    """x (B, P, M, N) with contiguous `dim`, -1 or -2; expanded as x in the first `repeating`
    dimensions.
    """
    once = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride()[:repeating])]
    copy = _rows_copied(once) if dim == -1 else _rows_copied(once.mT).mT
    return copy.expand(x.shape)


def _rows_copied(x: Tensor) -> Tensor:
    columns = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], -(-columns // PITCH) * PITCH)[..., :columns]
    # Of rows with gaps between entries torch's copy is the faster one: x[:, ::2] of 4096 x 4096 in
    # bf16 took 45 us on an H200, ours 76, of which its transpose took 122 and ours 77 (2026-11-26).
    if not x.is_cuda or 1 < x.stride(-1) <= x.stride(-2):
        return out.copy_(x)
    from sparse_layouts.kernels.triton_strided_copy import copy_rows

    copy_rows(out, x)
    return out
