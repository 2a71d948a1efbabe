"""The indices of n:m layouts: the position of every stored entry within its group, packed into
int32 words.

A matrix (M, K) has G = K / m groups of m entries a row, and n of each are stored: E = G * n entries
a row, ascending within each group. Entry e lies in word `e // per_word`, at bit `(e % per_word) *
bits`; unused bits are 0.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

WORD_BITS = 32


def position_bits(m: int) -> int:
    """Bits that a position 0..m-1 takes.

    >>> [position_bits(m) for m in (2, 4, 5, 16)]
    [1, 2, 3, 4]
    """
    return max(1, (m - 1).bit_length())


def positions_per_word(m: int) -> int:
    """Positions in an int32 word.

    >>> [positions_per_word(m) for m in (2, 4, 5, 16)]
    [32, 16, 10, 8]
    """
    return WORD_BITS // position_bits(m)


def words_per_row(entries: int, m: int) -> int:
    """Words that a row of `entries` stored entries takes.

    >>> words_per_row(2048, 4)
    128
    """
    return -(-entries // positions_per_word(m))


def pack_positions(positions: Tensor, m: int) -> Tensor:
    """int32 words (..., W) of positions (..., E), of any integer dtype, each in 0..m-1.

    >>> import torch
    >>> pack_positions(torch.tensor([0, 3, 1, 2]), m=4)  # 0 + 3 * 4 + 1 * 16 + 2 * 64
    tensor([156], dtype=torch.int32)
    """
    bits, per_word = position_bits(m), positions_per_word(m)
    entries = positions.shape[-1]
    words = words_per_row(entries, m)
    if words and 8 % bits == 0 and sys.byteorder == "little":  # by bytes: fewer passes
        in_bytes = positions.new_zeros(*positions.shape[:-1], 4 * words, dtype=torch.uint8)
        _or_into(in_bytes, positions, bits, 8 // bits)
        return in_bytes.view(torch.int32)
    packed = positions.new_zeros(*positions.shape[:-1], words, dtype=torch.int32)
    _or_into(packed, positions, bits, per_word)
    return packed


def _or_into(packed: Tensor, positions: Tensor, bits: int, each: int) -> None:
    """Writes `each` positions of `bits` bits into every element of `packed`, which is 0."""
    for k in range(min(each, positions.shape[-1])):
        one = positions[..., k::each].to(packed.dtype, copy=True)
        packed[..., : one.shape[-1]].bitwise_or_(one.bitwise_left_shift_(k * bits))


def unpack_positions(indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    """uint8 positions (..., E) of int32 words (..., W), for a matrix of `columns` columns.

    >>> import torch
    >>> unpack_positions(torch.tensor([156], dtype=torch.int32), 2, 4, columns=8)
    tensor([0, 3, 1, 2], dtype=torch.uint8)
    """
    bits, per_word = position_bits(m), positions_per_word(m)
    entries = columns // m * n
    out = indices.new_empty(*indices.shape[:-1], entries, dtype=torch.uint8)
    for k in range(min(per_word, entries)):
        own = out[..., k::per_word]
        # the sign bit shifts in ones, which the mask drops
        own.copy_((indices[..., : own.shape[-1]] >> (k * bits)).bitwise_and_((1 << bits) - 1))
    return out


def entry_columns(indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    """int64 columns (..., E) of the stored entries, ascending in each row.

    >>> import torch
    >>> entry_columns(torch.tensor([156], dtype=torch.int32), 2, 4, columns=8)
    tensor([0, 3, 5, 6])
    """
    positions = unpack_positions(indices, n, m, columns).long()
    groups = torch.arange(columns // m, device=indices.device).repeat_interleave(n)
    return positions.add_(groups * m)


def stored_places(indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    """bool (..., K): which entries are stored.

    >>> import torch
    >>> stored_places(torch.tensor([12], dtype=torch.int32), 2, 4, columns=4)
    tensor([ True, False, False,  True])
    """
    places = torch.zeros(*indices.shape[:-1], columns, dtype=torch.bool, device=indices.device)
    return places.scatter_(-1, entry_columns(indices, n, m, columns), True)


def scatter_entries(values: Tensor, indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    """The matrices (..., M, K) of values (..., M, E) at indices (*lead, M, W), 0 elsewhere;
    differentiable.

    The leading dimensions of `values` end with those of `indices`.
    """
    where = entry_columns(indices, n, m, columns).expand(values.shape)
    return values.new_zeros(*values.shape[:-1], columns).scatter(-1, where, values)


def gather_entries(dense: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """The stored entries (..., M, E) of matrices (..., M, K); differentiable.

    The leading dimensions of `dense` end with those of `indices` (*lead, M, W).
    """
    where = entry_columns(indices, n, m, dense.shape[-1])
    return dense.gather(-1, where.expand(*dense.shape[:-1], where.shape[-1]))
