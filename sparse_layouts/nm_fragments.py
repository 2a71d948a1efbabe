"""The order in which sparse tensor cores want an n:m layout: entries and positions by fragments.

A *fragment tile* is 16 rows, a *unit* 32 stored entries of each of them: 512 entries, 1 KiB in 16
bits. A unit is what a warp loads: 8 words of two entries for each of its 32 lanes, so that lane
`4 g + t` gets entries of the rows g and g + 8 that it multiplies, with nothing to move.

Entries of a tile lie by (unit, q, g, t, i, r, h): row `8 r + g`; h is the half of a word, i, r and
q say which of the 8 words. Which of the unit's 32 entries of a row that is, `AXES` says.

All are multiplied by sparse tensor cores, which store two of every four columns (PTX ISA,
"Matrix multiply-accumulate operation using mma.sp instruction with sparse matrix A"). 2:4 is that.
Of the others, the halves of a word are entries of two groups, and those are multiplied by twos of
their columns: one of the four columns is one of such two of the first group or of the second. A
word is therefore the operand of m / 2 products, in all but one of which an entry is masked out;
which of the two columns it is, the lowest bit of its position says, in all of them.

Positions lie in int32 words, of every tile one for each (unit, lane) and, where they take 3 bits,
after those half a word for their lowest bit. For 2:4 a word is the metadata that `mma.sp` takes;
for the others the lowest bits of positions lie where its metadata has them, and the higher ones
where `prmt` finds the sign of a byte, from which it makes a mask of a half.

2:4, 1:4, 2:8 and 1:8 have this order, of matrices whose rows 16 and whose columns `unit_columns`
divides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.derived import derived
from sparse_layouts.nm_packing import pack_positions, unpack_positions, words_per_row

# the orders of an NMTensor's entries
ROWS, FRAGMENTS = ORDERS = ("rows", "fragments")
TILE_ROWS = 16
UNIT_ENTRIES = 32
LANES = 32

_SIZES = {"q": 2, "g": 8, "T": 2, "t": 2, "i": 2, "r": 2, "h": 2}
# An entry's number in its row's 32, from the slowest axis to the fastest; T and t: the bits of a
# lane's t. The halves of a word are, of 2:4, a group's two entries; of the others, entries of two
# groups. A lane multiplies what 16 neighbouring columns of x have in two reads of 16 bytes.
AXES = {(2, 4): "qiTth", (1, 4): "qthiT", (2, 8): "ithTq", (1, 8): "qithT"}
_IN_MEMORY = "qgTtirh"


def unit_columns(n: int, m: int) -> int:
    """Columns of the matrix that a unit spans.

    >>> [unit_columns(n, m) for n, m in AXES]
    [64, 128, 128, 256]
    """
    return UNIT_ENTRIES // n * m


def has_fragments(n: int, m: int, rows: int, columns: int) -> bool:
    """Whether matrices (rows, columns) of n:m can lie by fragments."""
    return (n, m) in AXES and rows % TILE_ROWS == 0 and columns % unit_columns(n, m) == 0


def words_per_unit(m: int) -> int:
    """int32 words of positions that a unit takes.

    >>> [words_per_unit(m) for m in (4, 8)]
    [32, 48]
    """
    return LANES if m == 4 else LANES + LANES // 2


def by_fragments(entries: Tensor, n: int, m: int) -> Tensor:
    """(..., M, E) row by row -> (..., M, E), whose memory is by fragments; differentiable."""
    split = _split(entries, n, m)
    # ... tile r g unit a b c d -> ... tile unit q g T t i r h
    names = ["tile", "r", "g", "unit", *AXES[n, m]]
    first = split.dim() - len(names)
    order = [first + names.index(name) for name in ("tile", "unit", *_IN_MEMORY)]
    return split.permute(*range(first), *order).reshape(entries.shape)


def by_rows(entries: Tensor, n: int, m: int) -> Tensor:
    """What :func:`by_fragments` was given."""
    rows, count = entries.shape[-2:]
    sizes = [_SIZES[name] for name in _IN_MEMORY]
    whole = entries.reshape(
        *entries.shape[:-2], rows // TILE_ROWS, count // UNIT_ENTRIES, *sizes
    )  # ... tile unit q g T t i r h
    names = ["tile", "unit", *_IN_MEMORY]
    first = whole.dim() - len(names)
    order = [first + names.index(name) for name in ("tile", "r", "g", "unit", *AXES[n, m])]
    return whole.permute(*range(first), *order).reshape(entries.shape)


def _split(entries: Tensor, n: int, m: int) -> Tensor:
    rows, count = entries.shape[-2:]
    sizes = [_SIZES[name] for name in AXES[n, m]]
    lead = entries.shape[:-2]
    return entries.reshape(*lead, rows // TILE_ROWS, 2, 8, count // UNIT_ENTRIES, *sizes)


def pack_fragments(positions: Tensor, n: int, m: int) -> Tensor:
    """int32 words (P, M / 16, W) of positions (P, M, E) row by row, of any integer dtype, each in
    0..m-1.
    """
    patterns, rows, entries = positions.shape
    tiles, units = rows // TILE_ROWS, entries // UNIT_ENTRIES
    placed = by_fragments(positions, n, m).view(patterns, tiles, units, *_memory_sizes())
    words = positions.new_zeros(patterns, tiles, units * words_per_unit(m), dtype=torch.int32)
    for view, at, plane, width, bit in _bits(words, placed, n, m):
        view |= ((at.int() >> plane) & ((1 << width) - 1)) << bit
    return words


def unpack_fragments(words: Tensor, n: int, m: int, columns: int) -> Tensor:
    """uint8 positions (P, M, E), row by row, of words (P, M / 16, W) of matrices of `columns`
    columns.
    """
    (patterns, tiles, _), entries = words.shape, columns // m * n
    units = entries // UNIT_ENTRIES
    placed = words.new_zeros(patterns, tiles, units, *_memory_sizes(), dtype=torch.uint8)
    for view, at, plane, width, bit in _bits(words, placed, n, m):
        at |= (((view >> bit) & ((1 << width) - 1)) << plane).to(torch.uint8)
    return by_rows(placed.view(patterns, tiles * TILE_ROWS, entries), n, m)


def _memory_sizes() -> tuple[int, ...]:
    return 2, 8, 4, 2, 2, 2  # q g t i r h


def _bits(
    words: Tensor, placed: Tensor, n: int, m: int
) -> Iterator[tuple[Tensor, Tensor, int, int, int]]:
    """Where each bit of a position is: a view of the words, the view of the positions (both of one
    shape), the position's lowest bit that is meant, how many, and the word's lowest bit.
    """
    units = placed.shape[2]
    own = words[..., : units * LANES]
    own_by_lane = own.unflatten(-1, (units, 8, 4))  # unit g t
    by_step = own.unflatten(-1, (units, 8, 2, 2))  # unit g q i
    twos = range(2)
    if (n, m) == (2, 4):
        # lane 4 g + 2 q + i tells of the groups 4 i + t of step q: a nibble each, two rows a word
        for r, t, h in itertools.product(twos, range(4), twos):
            at = placed[..., t, :, r, h].transpose(-3, -2)  # q g i -> g q i
            yield by_step, at, 0, 2, 16 * r + 4 * t + 2 * h
        return
    for q, i, r, h, high in itertools.product(twos, twos, twos, twos, range(1, m // 4 + 1)):
        # of m = 4 one higher bit, beside the lowest ones of other entries
        bit = 8 * (2 * r + h) + 7 - 2 * (2 * q + i) - (high - 1)
        yield own_by_lane, placed[..., q, :, :, i, r, h], high, 1, bit
    for r, t, i, h in itertools.product(twos, range(4), twos, twos):
        at, bit = placed[..., t, i, r, h].transpose(-2, -1), 16 * r + 4 * t + 2 * h  # q g -> g q
        if m == 4:
            yield by_step[..., i], at, 0, 1, bit
        else:  # two lanes a word
            yield words[..., units * LANES :].unflatten(-1, (units, 8, 2)), at, 0, 1, bit + i


def fragment_indices(indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    """int32 (P, M / 16, W') by fragments, of indices (P, M, W) row by row."""
    return _fragment_indices_op(indices, n, m, columns)


def row_indices(words: Tensor, n: int, m: int, columns: int) -> Tensor:
    """int32 (P, M, W) row by row, of words (P, M / 16, W') by fragments: kept with these, so that a
    call does not unpack them again.
    """
    if not opaque.is_eager(words):
        return _row_indices_op(words, n, m, columns)
    key = ("row by row", n, m, columns)
    return derived((words,), key, lambda: _row_indices_op(words, n, m, columns))


def _to_fragments(indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    return pack_fragments(unpack_positions(indices, n, m, columns), n, m)


def _shape_of_fragments(indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    words = columns // unit_columns(n, m) * words_per_unit(m)
    return indices.new_empty(indices.shape[0], indices.shape[1] // TILE_ROWS, words)


def _to_rows(words: Tensor, n: int, m: int, columns: int) -> Tensor:
    return pack_positions(unpack_fragments(words, n, m, columns), m)


def _shape_of_rows(words: Tensor, n: int, m: int, columns: int) -> Tensor:
    patterns, tiles, _ = words.shape
    return words.new_empty(patterns, tiles * TILE_ROWS, words_per_row(columns // m * n, m))


_SIGNATURE = "Tensor indices, int n, int m, int columns"
_fragment_indices_op = opaque.define(
    "nm_fragment_indices", _SIGNATURE, _to_fragments, _shape_of_fragments
)
_row_indices_op = opaque.define("nm_row_indices", _SIGNATURE, _to_rows, _shape_of_rows)
