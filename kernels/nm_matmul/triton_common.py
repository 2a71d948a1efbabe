"""What the Triton kernels on n:m layouts share: reading packed entries, and a dense tile of them.

A tile has a power of two of columns for every group, `PLACES`, of which the first m are there: what
does not exist is 0, and so every n:m takes the same road.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.nm_packing import position_bits

# What is compiled ahead of time: one word holds whole groups (2:4, 1:2, 1:16), or does not.
COMPILED_NM = [(2, 4), (1, 4), (2, 6), (3, 8), (1, 2), (8, 16), (1, 16)]


@triton.jit
def load_codes(
    words,
    mask_m,
    first,
    groups,
    GROUPS: tl.constexpr,
    STORED: tl.constexpr,
    BITS: tl.constexpr,
    ONCE: tl.constexpr,
):
    """int32 [BM, GROUPS]: from bit 0 on, the positions of the entries of each group from `first`.

    For n that divides a word's entries. `words` [BM] points to the rows. `ONCE`: a word is loaded
    once and spread over its groups; otherwise by every group, in the layout of all other loads.
    """
    A_WORD: tl.constexpr = 32 // BITS // STORED
    if ONCE:
        offs = first // A_WORD + tl.arange(0, GROUPS // A_WORD)
        mask = mask_m[:, None] & (offs * A_WORD < groups)[None, :]
        codes = tl.load(words[:, None] + offs[None, :], mask=mask, other=0)
        codes = codes[:, :, None] >> (tl.arange(0, A_WORD) * (STORED * BITS))[None, None, :]
        codes = tl.reshape(codes, (mask_m.shape[0], GROUPS))
    else:
        group = first + tl.arange(0, GROUPS)
        mask = mask_m[:, None] & (group < groups)[None, :]
        codes = tl.load(words[:, None] + (group // A_WORD)[None, :], mask=mask, other=0)
        codes = codes >> (group % A_WORD * (STORED * BITS))[None, :]
    return codes


@triton.jit
def load_positions(
    words,
    mask_m,
    first,
    groups,
    GROUPS: tl.constexpr,
    STORED: tl.constexpr,
    BITS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """A tuple of int32 [BM, GROUPS]: where in its group the j-th stored entry lies, for every j.

    `SPREAD`: load a word once where it holds whole groups.
    """
    A_WORD: tl.constexpr = 32 // BITS
    GROUPS_A_WORD: tl.constexpr = A_WORD // STORED
    WHOLE: tl.constexpr = A_WORD % STORED == 0
    # a tile of whole words, as tl.arange can count them
    ONCE: tl.constexpr = (
        SPREAD and WHOLE and GROUPS >= GROUPS_A_WORD and (GROUPS_A_WORD & (GROUPS_A_WORD - 1)) == 0
    )
    positions = ()
    if WHOLE:
        codes = load_codes(words, mask_m, first, groups, GROUPS, STORED, BITS, ONCE)
        for j in tl.static_range(STORED):
            positions = positions + ((codes >> (j * BITS)) & ((1 << BITS) - 1),)
    else:
        group = first + tl.arange(0, GROUPS)
        mask = mask_m[:, None] & (group < groups)[None, :]
        for j in tl.static_range(STORED):
            entry = group * STORED + j
            word = tl.load(words[:, None] + (entry // A_WORD)[None, :], mask=mask, other=0)
            word = word >> (entry % A_WORD * BITS)[None, :]
            positions = positions + (word & ((1 << BITS) - 1),)
    return positions


@triton.jit
def load_values(
    values,
    mask_m,
    first,
    groups,
    stride_e,
    dtype: tl.constexpr,
    GROUPS: tl.constexpr,
    STORED: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """A tuple of [BM, GROUPS]: the j-th stored entry of each group from `first`, for every j.

    `values` [BM] points to the rows; `PAIRED`: to the two entries of a group as one int32.
    """
    group = first + tl.arange(0, GROUPS)
    mask = mask_m[:, None] & (group < groups)[None, :]
    group = group.to(tl.int64)
    entries = ()
    if PAIRED:
        pairs = tl.load(values[:, None] + (group * stride_e)[None, :], mask=mask, other=0)
        low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        entries = (low, (pairs >> 16).to(tl.int16).to(dtype, bitcast=True))
    else:
        for j in tl.static_range(STORED):
            offs = (group * STORED + j) * stride_e
            entries = entries + (tl.load(values[:, None] + offs[None, :], mask=mask, other=0.0),)
    return entries


@triton.jit
def dense_tile(
    values,
    words,
    mask_m,
    first,
    groups,
    stride_e,
    dtype: tl.constexpr,
    GROUPS: tl.constexpr,
    STORED: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    PAIRED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """[BM, GROUPS * PLACES]: groups from `first`, zeros where nothing is stored; `TRANSPOSED`: the
    other way round.
    """
    BM: tl.constexpr = mask_m.shape[0]
    entries = load_values(values, mask_m, first, groups, stride_e, dtype, GROUPS, STORED, PAIRED)
    positions = load_positions(words, mask_m, first, groups, GROUPS, STORED, BITS, True)
    place = tl.arange(0, PLACES)[None, None, :]
    tile = tl.zeros((BM, GROUPS, PLACES), dtype=dtype)
    for j in tl.static_range(STORED):
        tile = tl.where(positions[j][:, :, None] == place, entries[j][:, :, None], tile)
    # Turned before it is flattened: Triton 3.7 cannot compile the other order for tf32 on 10.0.
    if TRANSPOSED:
        tile = tl.reshape(tl.permute(tile, (1, 2, 0)), (GROUPS * PLACES, BM))
    else:
        tile = tl.reshape(tile, (BM, GROUPS * PLACES))
    return tile


@triton.jit
def tile_columns(first, groups, GROUPS: tl.constexpr, OF: tl.constexpr, PLACES: tl.constexpr):
    """Which columns of the matrix a dense tile has [GROUPS * PLACES], and whether each exists."""
    offs = tl.arange(0, GROUPS * PLACES)
    if PLACES == OF:
        columns = first * OF + offs
        exists = columns < groups * OF
    else:
        group = first + offs // PLACES
        columns = group * OF + offs % PLACES
        exists = (group < groups) & (offs % PLACES < OF)
    return columns, exists


@triton.jit
def banded_tile(tile, row_tiles, column_tiles):
    """The row and the column of a tile of the output, in bands of eight rows of tiles: programs
    that run together then read the same rows and columns.
    """
    of_band = 8 * column_tiles
    first = tile // of_band * 8
    rows = tl.minimum(row_tiles - first, 8)
    return first + tile % of_band % rows, tile % of_band // rows


def nm_constants(n: int, m: int) -> dict[str, Any]:
    """The constant arguments that follow from n and m."""
    return {"STORED": n, "OF": m, "PLACES": triton.next_power_of_2(m), "BITS": position_bits(m)}


def paired_values(values: Tensor, n: int) -> Tensor | None:
    """Two 16-bit entries of a group as one int32, (..., E / 2) in the same memory, or None.

    One load instead of two; for n = 2 where every group lies on a boundary of 4 bytes.
    """
    even = all(stride % 2 == 0 for stride in values.stride()[:-1])
    if n != 2 or values.element_size() != 2 or values.stride(-1) != 1:
        return None
    return values.view(torch.int32) if even and values.storage_offset() % 2 == 0 else None
