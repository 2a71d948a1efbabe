"""Sequences in the Triton attention kernels: which one a program works on, where it lies, and what
of a schedule it needs.

As `sequences.Sequences` says; every start and length is clamped, so that no program reads or writes
outside the tensors, whatever the arrays hold.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.kernels.block_attention.sequences import Sequences


@triton.jit
def clamped_span(sequence, there, starts_ptr, lens_ptr, num_rows):
    """(start, length) of sequences among the `num_rows` rows of a sample; (0, 0) if not `there`."""
    start = sequence * 0
    if starts_ptr is not None:
        start = tl.load(starts_ptr + sequence, mask=there, other=0)
        start = tl.minimum(tl.maximum(start, 0), num_rows)
    length = tl.load(lens_ptr + sequence, mask=there, other=0)
    return start, tl.minimum(tl.maximum(length, 0), num_rows - start)


@triton.jit
def place_of(
    sequence, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences, num_queries,
    num_keys, mask_rows, mask_columns,
):  # fmt: skip
    """(row_offset, first_row, end_row, k_start, end_column) of one sequence or a vector of them.

    Mask rows [first_row, end_row) have a query, that of row p in row `p - row_offset` of the
    sample; mask columns [0, end_column) have a key, that of column c in row `k_start + c`.
    """
    there = sequence < num_sequences
    q_start, q_len = clamped_span(sequence, there, q_starts_ptr, q_lens_ptr, num_queries)
    k_start, k_len = clamped_span(sequence, there, k_starts_ptr, k_lens_ptr, num_keys)
    first_row = tl.maximum(k_len - q_len, 0)
    end_row = tl.maximum(tl.minimum(k_len, mask_rows), first_row)
    return k_len - q_len - q_start, first_row, end_row, k_start, tl.minimum(k_len, mask_columns)


@triton.jit
def find_tile(
    rank, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences, num_queries,
    num_keys, mask_rows, mask_columns, TILE: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """(sequence, which of its tiles) of the rank-th tile of all; `num_sequences` after the last.

    Tiles are `TILE` mask columns that have keys or, from the tile of its first query on, mask rows.
    """
    LANES: tl.constexpr = 128
    sequence = 0
    before = 0
    total = 0
    for first in range(0, num_sequences, LANES):
        lanes = first + tl.arange(0, LANES)
        _, first_row, end_row, _, end_column = place_of(
            lanes, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences, num_queries,
            num_keys, mask_rows, mask_columns,
        )  # fmt: skip
        if BY_KEY:
            count = (end_column + TILE - 1) // TILE
        else:
            count = (end_row + TILE - 1) // TILE - first_row // TILE
            count = tl.where(end_row > first_row, count, 0)
        ends = total + tl.cumsum(count, 0)
        passed = (ends <= rank) & (lanes < num_sequences)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        total += tl.sum(count, 0)
    return sequence, rank - before


@triton.jit
def chunks_between(
    columns_ptr, start, plain, total, first, end, BLOCK: tl.constexpr, GATHER: tl.constexpr
):
    """Of a group's chunks those that hold positions [first, end): how many of them need no mask,
    how many there are, and what :func:`chunk_at` adds to the number of each kind.

    A pattern is as long as the longest sequence: a short one would else walk over all of it.
    """
    LANES: tl.constexpr = 256
    plain_passed = 0
    plain_end = 0
    rest_passed = 0
    rest_end = 0
    # In both parts of a list the chunks ascend, and one reaches to where the next begins.
    for i in range(0, total, LANES):
        chunk = i + tl.arange(0, LANES)
        there = chunk < total
        begins = tl.load(columns_ptr + start + chunk * GATHER, mask=there, other=0) * BLOCK
        passed = there & (begins <= first)
        needed = there & (begins < end)
        is_plain = chunk < plain
        plain_passed += tl.sum((passed & is_plain).to(tl.int32), 0)
        plain_end += tl.sum((needed & is_plain).to(tl.int32), 0)
        rest_passed += tl.sum((passed & (chunk >= plain)).to(tl.int32), 0)
        rest_end += tl.sum((needed & (chunk >= plain)).to(tl.int32), 0)
    plain_first = tl.maximum(plain_passed - 1, 0)
    rest_first = tl.maximum(rest_passed - 1, 0)
    num_plain = tl.maximum(plain_end - plain_first, 0)
    num_rest = tl.maximum(rest_end - rest_first, 0)
    return num_plain, num_plain + num_rest, plain_first, plain + rest_first - num_plain


@triton.jit
def chunk_at(j, plain, lead, jump, PARTS: tl.constexpr, CUT: tl.constexpr):
    """The chunk of step j; `CUT`: of those that :func:`chunks_between` has left, `plain * PARTS`
    steps without a mask first.
    """
    chunk = j // PARTS
    if CUT:
        chunk += tl.where(j < plain, lead, jump)
    return chunk


class SequenceOperands(NamedTuple):
    """The kernels' arguments of sequences; all None for a plain batch, which they cost nothing."""

    arrays: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    sizes: tuple[int | None, int | None, int | None]  # sequences, mask rows, mask columns


ABSENT = SequenceOperands((None,) * 4, (None,) * 3)
SEQUENCE_NAMES = ("q_starts_ptr", "q_lens_ptr", "k_starts_ptr", "k_lens_ptr")
SEQUENCE_SIZES = ("num_sequences", "mask_rows", "mask_columns")


def sequence_operands(sequences: Sequences | None, mask_shape: tuple[int, int]) -> SequenceOperands:
    """In the order in which every kernel takes them."""
    if sequences is None:
        return ABSENT
    return SequenceOperands(tuple(sequences), (sequences.num_sequences, *mask_shape))


def most_tiles(sequences: Sequences, rows: int, tile: int, mask_length: int, aligned: bool) -> int:
    """The most tiles that sequences can have in a sample of `rows` rows, known without their
    lengths.

    A tile begins at a multiple of `tile` in the mask, of `mask_length`; `aligned`: sequences do
    too, as keys do.
    """
    of_mask = triton.cdiv(mask_length, tile)
    if not sequences.packed:
        own = triton.cdiv(rows, tile) if aligned else (rows + tile - 2) // tile + 1
        return min(own, of_mask)
    count = min(sequences.num_sequences, rows)
    return min(rows // tile + (count if aligned else 2 * count), count * of_mask)
