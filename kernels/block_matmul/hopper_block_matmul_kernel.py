"""block_matmul on Hopper, in Gluon: tiles of the output, each the sum over its block row's list.

One producer warp claims tiles and loads, by TMA, blocks and the rows of x that they meet; two
consumer warpgroups multiply, each half of a tile.
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
from sparse_layouts.kernels.hopper_products import activated, columns_of, multiply_steps

# fields of an item: whether there is one, steps of 64 along K, where its tile lies
ALIVE, STEPS, BATCH, PATTERN, ROW, COLUMN = (gl.constexpr(i) for i in range(6))
INTEGERS = ["patterns", "block_rows", "column_tiles", "items", "values_batch", "x_batch"]
INTEGERS += ["x_pattern", "num_rows"]


@gluon.jit
def _claim(
    counter_ptr, order_ptr, crow_ptr, patterns, block_rows, column_tiles, items,
    BM: gl.constexpr, BK: gl.constexpr, TM: gl.constexpr, TN: gl.constexpr,
):  # fmt: skip
    """The next tile: column tiles one after the other, in each the longest block rows first, so
    that what runs together reads the same columns of x.
    """
    SLICES: gl.constexpr = BM // TM
    item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    at = gl.minimum(item, items - 1)
    tiles = patterns * block_rows * SLICES
    outer = at // tiles
    rank = at - outer * tiles
    batch = outer // column_tiles
    column = (outer - batch * column_tiles) * TN
    line = gl.load(order_ptr + rank // SLICES)
    pattern = line // block_rows
    block_row = line - pattern * block_rows
    crow_ptr += line + pattern
    start = gl.load(crow_ptr)
    steps = (gl.load(crow_ptr + 1) - start) * (BK // 64)
    return item < items, batch, pattern, block_row, rank % SLICES, column, start, steps


@gluon.jit
def _produce(
    values_desc, x_desc, shared, counter_ptr, order_ptr, crow_ptr, col_ptr, slots_ptr, patterns,
    block_rows, column_tiles, items, values_batch, x_batch, x_pattern,
    BM: gl.constexpr, BK: gl.constexpr, TM: gl.constexpr, TN: gl.constexpr, WN: gl.constexpr,
    VALUES_T: gl.constexpr, X_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: claims a tile, hands it on, loads its blocks and what they multiply."""
    w_s, x_s, _, told, ready, read, full, free = shared
    ROWS: gl.constexpr = TM // 64
    PARTS: gl.constexpr = TN // WN
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=W)
    step = 0
    turn = 0
    more, batch, pattern, block_row, part, column, start, steps = _claim(
        counter_ptr, order_ptr, crow_ptr, patterns, block_rows, column_tiles, items, BM, BK, TM, TN
    )
    while more:
        place = turn % 2
        wait_free(read, turn, 2)
        fields = gl.where(lane == ALIVE, 1, gl.where(lane == STEPS, steps, 0))
        fields = gl.where(lane == BATCH, batch, gl.where(lane == PATTERN, pattern, fields))
        row = block_row * BM + part * TM
        fields = gl.where(lane == ROW, row, gl.where(lane == COLUMN, column, fields))
        told.index(place).store(fields)
        mbarrier.arrive(ready.index(place), count=1)
        for j in range(0, steps):
            position = start + j // (BK // 64)
            inner = (j % (BK // 64)) * 64
            slot = position
            if slots_ptr is not None:
                slot = gl.load(slots_ptr + position)
            k = gl.load(col_ptr + position) * BK + inner
            stage = step % STAGES
            wait_free(free, step, STAGES)
            mbarrier.expect(full.index(stage), (TM + TN) * 64 * 2)
            for r in gl.static_range(ROWS):
                if VALUES_T:
                    where = [batch * values_batch, slot, inner, part * TM + r * 64]
                else:
                    where = [batch * values_batch, slot, part * TM + r * 64, inner]
                tma.async_copy_global_to_shared(
                    values_desc, where, full.index(stage), w_s.index(stage * ROWS + r)
                )
            for p in gl.static_range(PARTS):
                buffer = x_s.index(stage * PARTS + p)
                if X_T:
                    tma.async_copy_global_to_shared(
                        x_desc, [batch * x_batch, pattern * x_pattern, column + p * WN, k],
                        full.index(stage), buffer,
                    )  # fmt: skip
                else:
                    for c in gl.static_range(WN // 64):
                        tma.async_copy_global_to_shared(
                            x_desc,
                            [batch * x_batch, pattern * x_pattern, k, column + p * WN + c * 64],
                            full.index(stage), buffer.slice(c * 64, 64, dim=3),
                        )  # fmt: skip
            step += 1
        turn += 1
        more, batch, pattern, block_row, part, column, start, steps = _claim(
            counter_ptr, order_ptr, crow_ptr, patterns, block_rows, column_tiles, items,
            BM, BK, TM, TN,
        )  # fmt: skip
    wait_free(read, turn, 2)
    told.index(turn % 2).store(gl.zeros([32], gl.int32, W))
    mbarrier.arrive(ready.index(turn % 2), count=1)
    finish(counter_ptr)


@gluon.jit
def _consume(
    w: gl.constexpr, out_desc, bias_ptr, shared, num_rows,
    TM: gl.constexpr, TN: gl.constexpr, WN: gl.constexpr, VALUES_T: gl.constexpr,
    X_T: gl.constexpr, OUT_T: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: 64 rows of a tile and all its columns, or all 64 rows and half its columns."""
    w_s, x_s, out_s, told, ready, read, full, free = shared
    ROWS: gl.constexpr = TM // 64
    PARTS: gl.constexpr = TN // WN
    own_row: gl.constexpr = w if ROWS == 2 else 0
    own_part: gl.constexpr = w if PARTS == 2 else 0
    PIECE: gl.constexpr = WN if WN < 128 else 128  # columns that are stored at once
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WN, 16])
    dtype: gl.constexpr = out_desc.dtype
    offs = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    turn = 0
    step = 0
    wait_full(ready, 0, 2)
    alive = field(told, 0, ALIVE)
    while alive != 0:
        place = turn % 2
        steps = field(told, place, STEPS)
        batch = field(told, place, BATCH)
        pattern = field(told, place, PATTERN)
        row = field(told, place, ROW) + own_row * 64
        column = field(told, place, COLUMN) + own_part * WN
        mbarrier.arrive(read.index(place), count=1)
        acc = gl.zeros([64, WN], gl.float32, ACC)
        acc = multiply_steps(
            acc, w_s, x_s, full, free, step, steps, own_row, ROWS, own_part, PARTS,
            VALUES_T, X_T, STAGES,
        )  # fmt: skip
        step += steps
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + row + offs, mask=row + offs < num_rows, other=0.0)
            acc += bias.to(gl.float32)[:, None]
        acc = activated(acc, ACTIVATION)
        buffer = out_s.index(w)
        for h in gl.static_range(WN // PIECE):
            tile = columns_of(acc, h, PIECE).to(dtype)
            tma.store_wait(0)
            if OUT_T:
                buffer.reshape([PIECE, 64]).permute((1, 0)).store(tile)
                fence_async_shared()
                tma.async_copy_shared_to_global(
                    out_desc, [batch, pattern, column + h * PIECE, row], buffer
                )
            else:
                buffer.reshape([64, PIECE]).store(tile)
                fence_async_shared()
                for c in gl.static_range(PIECE // 64):
                    tma.async_copy_shared_to_global(
                        out_desc, [batch, pattern, row, column + h * PIECE + c * 64],
                        buffer.slice(c * 64, 64, dim=3),
                    )  # fmt: skip
        turn += 1
        wait_full(ready, turn, 2)
        alive = field(told, turn % 2, ALIVE)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_block_matmul(
    values_desc, x_desc, out_desc, counter_ptr, order_ptr, crow_ptr, col_ptr, slots_ptr, bias_ptr,
    patterns, block_rows, column_tiles, items, values_batch, x_batch, x_pattern, num_rows,
    BM: gl.constexpr, BK: gl.constexpr, TM: gl.constexpr, TN: gl.constexpr,
    VALUES_T: gl.constexpr, X_T: gl.constexpr, OUT_T: gl.constexpr, ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of TM x TN, in steps of 64 along K through a ring of STAGES buffers."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = out_desc.dtype
    ROWS: gl.constexpr = TM // 64
    PARTS: gl.constexpr = 2 // ROWS
    WN: gl.constexpr = TN // PARTS
    w_s = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, 1, 64, 64], ROWS_LAYOUT)
    if X_T:
        x_s = gl.allocate_shared_memory(dtype, [STAGES * PARTS, 1, 1, WN, 64], ROWS_LAYOUT)
    else:
        x_s = gl.allocate_shared_memory(dtype, [STAGES * PARTS, 1, 1, 64, WN], ROWS_LAYOUT)
    PIECE: gl.constexpr = WN if WN < 128 else 128
    if OUT_T:
        out_s = gl.allocate_shared_memory(dtype, [2, 1, 1, PIECE, 64], ROWS_LAYOUT)
    else:
        out_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, PIECE], ROWS_LAYOUT)
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
    shared = (w_s, x_s, out_s, told, ready, read, full, free)
    gl.warp_specialize([
        (_consume, (
            0, out_desc, bias_ptr, shared, num_rows, TM, TN, WN, VALUES_T, X_T, OUT_T, ACTIVATION,
            STAGES,
        )),
        (_consume, (
            1, out_desc, bias_ptr, shared, num_rows, TM, TN, WN, VALUES_T, X_T, OUT_T, ACTIVATION,
            STAGES,
        )),
        (_produce, (
            values_desc, x_desc, shared, counter_ptr, order_ptr, crow_ptr, col_ptr, slots_ptr,
            patterns, block_rows, column_tiles, items, values_batch, x_batch, x_pattern,
            BM, BK, TM, TN, WN, VALUES_T, X_T, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
