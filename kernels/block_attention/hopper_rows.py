"""What consumers of Hopper's attention passes by row share, the forward and dq: items of 64 rows a
warpgroup, over tiles of keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.hopper_common import ITEM, KEYS
from sparse_layouts.kernels.hopper_common import field

START, UNITS = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.UNITS)
BEGIN = gl.constexpr(unit_schedule.RUN_BEGIN)


@gluon.jit
def reaches(columns_ptr, tile, num_keys, pred, PIECE: gl.constexpr, TN: gl.constexpr):
    """4, as a flag, where a tile has other keys than those of its sequence, else 0."""
    SLOTS: gl.constexpr = TN // PIECE
    over = num_keys < num_keys
    for i in gl.static_range(SLOTS):
        column = gl.load(columns_ptr + tile * SLOTS + i, mask=pred, other=0)
        over = over | (column < 0) | ((column + 1) * PIECE > num_keys)
    return (over & pred).to(gl.int32) * 4


@gluon.jit
def cut_keys(buffer, columns_ptr, tile, num_keys, PIECE: gl.constexpr):
    """Zeros in the rows of a tile that are no keys of the sequence: 0 * NaN is NaN.

    Warpgroups that share the tile all do it, and write the same.
    """
    TN: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, TN, layout=gl.SliceLayout(1, layout))
    keys = gl.load(columns_ptr + tile * (TN // PIECE) + rows // PIECE) * PIECE + rows % PIECE
    x = buffer.load(layout)
    own = (keys >= 0) & (keys < num_keys)
    buffer.store(gl.where(own[:, None], x, gl.zeros([TN, D], x.dtype, layout)))
    fence_async_shared()


@gluon.jit
def read_item(items, place, OWN: gl.constexpr):
    """Of an item its number (-1: none), its first tile, the unit, the first tile that it needs,
    the keys there are.
    """
    begin = gl.maximum(field(items, place, BEGIN + OWN), 0)
    return (
        field(items, place, ITEM),
        field(items, place, START),
        field(items, place, UNITS + OWN),
        begin,
        field(items, place, KEYS),
    )


@gluon.jit
def tile_flag(
    flags_ptr, columns_ptr, sequences_ptr, tile, num_keys, pred,
    OWN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr,
):  # fmt: skip
    """0 where a warpgroup needs no mask for a tile."""
    flag = (gl.load(flags_ptr + tile, mask=pred, other=0) >> (2 * OWN)) & 3
    if sequences_ptr is not None:
        flag = flag | reaches(columns_ptr, tile, num_keys, pred, PIECE, TN)
    return flag
