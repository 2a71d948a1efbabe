"""sddmm on Hopper, in Gluon: a tile is several stored blocks of one block row.

One producer warp claims tiles and loads, by TMA, rows of a and the columns of b that the tile's
blocks stand in; two consumer warpgroups multiply, each half of a tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from sparse_layouts.kernels.hopper_common import (
    ROWS_LAYOUT,
    field,
    finish,
    wait_free,
    wait_full,
)
from sparse_layouts.kernels.hopper_products import columns_of, multiply_steps

# fields of an item: whether there is one, its batch index, its first row within the block, the
# place in the row's list of its first stored column, how many columns it has, in pieces of 64
ALIVE, BATCH, PART, START, OFFSET, PIECES = (gl.constexpr(i) for i in range(6))
INTEGERS = ["block_rows", "batch_size", "tiles", "steps", "a_batch", "a_pattern", "b_batch"]
INTEGERS += ["b_pattern"]


@gluon.jit
def _claim(
    counter_ptr, tile_rows_ptr, tile_starts_ptr, crow_ptr, block_rows, batch_size, tiles, num_rows,
    BM: gl.constexpr, BN: gl.constexpr, TM: gl.constexpr, TN: gl.constexpr,
):  # fmt: skip
    """The next tile. The fullest come first; those that only fill the list up are its end."""
    SLICES: gl.constexpr = BM // TM
    item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    rank = item // batch_size
    batch = item - rank * batch_size
    inside = rank < tiles * SLICES
    tile = gl.minimum(rank // SLICES, tiles - 1)
    row = gl.load(tile_rows_ptr + tile)
    inside = inside & (row < num_rows)
    row = gl.minimum(row, num_rows - 1)
    pattern = row // block_rows
    crow_ptr += row + pattern
    start = gl.load(crow_ptr)
    stored = (gl.load(crow_ptr + 1) - start) * BN
    first = gl.load(tile_starts_ptr + tile) * TN
    pieces = gl.minimum(stored - first, TN) // 64
    return inside, batch, pattern, row - pattern * block_rows, rank % SLICES, start, first, pieces


@gluon.jit
def _produce(
    a_desc, b_desc, shared, counter_ptr, tile_rows_ptr, tile_starts_ptr, crow_ptr, col_ptr,
    block_rows, num_rows, batch_size, tiles, steps, a_batch, a_pattern, b_batch, b_pattern,
    BM: gl.constexpr, BN: gl.constexpr, TM: gl.constexpr, TN: gl.constexpr, WN: gl.constexpr,
    A_T: gl.constexpr, B_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: claims a tile, hands it on, loads what it is the product of."""
    a_s, b_s, _, told, ready, read, full, free = shared
    ROWS: gl.constexpr = TM // 64
    PARTS: gl.constexpr = TN // WN
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=W)
    step = 0
    turn = 0
    more, batch, pattern, block_row, part, start, first, pieces = _claim(
        counter_ptr, tile_rows_ptr, tile_starts_ptr, crow_ptr, block_rows, batch_size, tiles,
        num_rows, BM, BN, TM, TN,
    )  # fmt: skip
    while more:
        place = turn % 2
        wait_free(read, turn, 2)
        fields = gl.where(lane == ALIVE, 1, gl.where(lane == BATCH, batch, 0))
        fields = gl.where(lane == PART, part * TM, gl.where(lane == START, start, fields))
        fields = gl.where(lane == OFFSET, first, gl.where(lane == PIECES, pieces, fields))
        told.index(place).store(fields)
        mbarrier.arrive(ready.index(place), count=1)
        row = block_row * BM + part * TM
        for j in range(0, steps):
            stage = step % STAGES
            wait_free(free, step, STAGES)
            for n in gl.static_range(1, TN // 64 + 1):  # the number has to be a constant
                mbarrier.expect(full.index(stage), (TM + n * 64) * 64 * 2, pred=pieces == n)
            for r in gl.static_range(ROWS):
                if A_T:
                    where = [batch * a_batch, pattern * a_pattern, j * 64, row + r * 64]
                else:
                    where = [batch * a_batch, pattern * a_pattern, row + r * 64, j * 64]
                tma.async_copy_global_to_shared(
                    a_desc, where, full.index(stage), a_s.index(stage * ROWS + r)
                )
            for c in gl.static_range(TN // 64):
                if c < pieces:
                    offset = first + c * 64
                    column = gl.load(col_ptr + start + offset // BN) * BN + offset % BN
                    buffer = b_s.index(stage * PARTS + c // (WN // 64))
                    if B_T:
                        tma.async_copy_global_to_shared(
                            b_desc, [batch * b_batch, pattern * b_pattern, column, j * 64],
                            full.index(stage), buffer.slice(c * 64 % WN, 64, dim=2),
                        )  # fmt: skip
                    else:
                        tma.async_copy_global_to_shared(
                            b_desc, [batch * b_batch, pattern * b_pattern, j * 64, column],
                            full.index(stage), buffer.slice(c * 64 % WN, 64, dim=3),
                        )  # fmt: skip
            step += 1
        turn += 1
        more, batch, pattern, block_row, part, start, first, pieces = _claim(
            counter_ptr, tile_rows_ptr, tile_starts_ptr, crow_ptr, block_rows, batch_size, tiles,
            num_rows, BM, BN, TM, TN,
        )  # fmt: skip
    wait_free(read, turn, 2)
    told.index(turn % 2).store(gl.zeros([32], gl.int32, W))
    mbarrier.arrive(ready.index(turn % 2), count=1)
    finish(counter_ptr)


@gluon.jit
def _consume(
    w: gl.constexpr, values_desc, slots_ptr, shared, steps,
    BN: gl.constexpr, TM: gl.constexpr, TN: gl.constexpr, WN: gl.constexpr, A_T: gl.constexpr,
    B_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: 64 rows of a tile and all its columns, or all 64 rows and half its columns."""
    a_s, b_s, out_s, told, ready, read, full, free = shared
    ROWS: gl.constexpr = TM // 64
    PARTS: gl.constexpr = TN // WN
    own_row: gl.constexpr = w if ROWS == 2 else 0
    own_part: gl.constexpr = w if PARTS == 2 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WN, 16])
    dtype: gl.constexpr = values_desc.dtype
    turn = 0
    step = 0
    wait_full(ready, 0, 2)
    alive = field(told, 0, ALIVE)
    while alive != 0:
        place = turn % 2
        batch = field(told, place, BATCH)
        row = field(told, place, PART) + own_row * 64
        start = field(told, place, START)
        offset = field(told, place, OFFSET) + own_part * WN
        pieces = field(told, place, PIECES) - own_part * (WN // 64)
        mbarrier.arrive(read.index(place), count=1)
        acc = gl.zeros([64, WN], gl.float32, ACC)
        acc = multiply_steps(
            acc, a_s, b_s, full, free, step, steps, own_row, ROWS, own_part, PARTS, A_T, B_T,
            STAGES,
        )  # fmt: skip
        step += steps
        for h in gl.static_range(WN // 128):
            tile = columns_of(acc, h, 128).to(dtype)
            tma.store_wait(0)
            out_s.index(w).reshape([64, 128]).store(tile)
            fence_async_shared()
            for c in gl.static_range(2):
                if h * 2 + c < pieces:
                    column = offset + h * 128 + c * 64
                    slot = start + column // BN
                    if slots_ptr is not None:
                        slot = gl.load(slots_ptr + slot)
                    tma.async_copy_shared_to_global(
                        values_desc, [batch, slot, row, column % BN],
                        out_s.index(w).slice(c * 64, 64, dim=3),
                    )  # fmt: skip
        turn += 1
        wait_full(ready, turn, 2)
        alive = field(told, turn % 2, ALIVE)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_sddmm(
    a_desc, b_desc, values_desc, counter_ptr, tile_rows_ptr, tile_starts_ptr, crow_ptr, col_ptr,
    slots_ptr, block_rows, num_rows, batch_size, tiles, steps, a_batch, a_pattern, b_batch,
    b_pattern,
    BM: gl.constexpr, BN: gl.constexpr, TM: gl.constexpr, TN: gl.constexpr, A_T: gl.constexpr,
    B_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of TM x TN, in steps of 64 along the contracted dimension, a ring of STAGES buffers."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = values_desc.dtype
    ROWS: gl.constexpr = TM // 64
    PARTS: gl.constexpr = 2 // ROWS
    WN: gl.constexpr = TN // PARTS
    a_s = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, 1, 64, 64], ROWS_LAYOUT)
    if B_T:
        b_s = gl.allocate_shared_memory(dtype, [STAGES * PARTS, 1, 1, WN, 64], ROWS_LAYOUT)
    else:
        b_s = gl.allocate_shared_memory(dtype, [STAGES * PARTS, 1, 1, 64, WN], ROWS_LAYOUT)
    out_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, 128], ROWS_LAYOUT)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    told = gl.allocate_shared_memory(gl.int32, [2, 32], plain)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    read = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(read.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    shared = (a_s, b_s, out_s, told, ready, read, full, free)
    gl.warp_specialize([
        (_consume, (
            0, values_desc, slots_ptr, shared, steps, BN, TM, TN, WN, A_T, B_T, STAGES,
        )),
        (_consume, (
            1, values_desc, slots_ptr, shared, steps, BN, TM, TN, WN, A_T, B_T, STAGES,
        )),
        (_produce, (
            a_desc, b_desc, shared, counter_ptr, tile_rows_ptr, tile_starts_ptr, crow_ptr,
            col_ptr, block_rows, num_rows, batch_size, tiles, steps, a_batch, a_pattern, b_batch,
            b_pattern, BM, BN, TM, TN, WN, A_T, B_T, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
