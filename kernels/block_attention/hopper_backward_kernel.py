"""block_attention backward on Hopper, in Gluon: five products, each gradient summed in one order.

By column, for dk and dv: an item is two units of 64 keys, a warpgroup each, over the stream of
queries that either attends to. The gradient of the scores, which dq needs too, goes once through
global memory, in the operands' dtype. By row, for dq: it is read again, times the keys. One launch
works on the columns of one share of the heads and on the rows of the share before, so that the
workspace is bounded and the reading hides behind the arithmetic.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.hopper_backward_load import (
    BY_COLUMN,
    CLOSES,
    KEYS,
    KIND,
    NUM_UNITS,
    OPENS,
    PLACE,
    produce,
)
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    HEAD,
    ITEM,
    LOG2E,
    dropout_keep,
    pass_over,
    select,
    store_rows,
    store_tile,
    stored_words,
    tile_counts,
)
from sparse_layouts.kernels.hopper_common import ROWS_LAYOUT, field, wait_full

START, TILES = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.TILES)
UNITS, DEAD = gl.constexpr(unit_schedule.UNITS), gl.constexpr(unit_schedule.DEAD)
BEGIN, END = gl.constexpr(unit_schedule.RUN_BEGIN), gl.constexpr(unit_schedule.RUN_END)
TERMS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
INTEGERS = ["heads", "group", "column_groups", "first_column", "column_samples", "bundle"]
INTEGERS += ["row_groups", "stride_rows", "first_group", "first_row", "row_samples"]
INTEGERS += ["row_programs", "stride_map", "column_slot", "row_slot", "places", "units"]
INTEGERS += ["row_offset", "num_queries", "num_keys", "num_rows", "threshold"]


@gluon.jit
def _sum_row(
    u: gl.constexpr, k_s, v_s, row_full, row_free, row_flags_ptr, first, tiles, begin, end, turn,
    D: gl.constexpr,
):  # fmt: skip
    """dq of 64 rows, without the scale: the scores' gradients, stored key by query, times keys."""
    WIDE: gl.constexpr = v_s.shape[4]
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    for t in range(turn, turn + begin):
        wait_full(row_full, t, 4)
        mbarrier.arrive(row_free.index(t % 4), count=1)
    acc = gl.zeros([64, D], gl.float32, OL)
    for j in range(begin, end):
        t = turn + j
        flag = (gl.load(row_flags_ptr + first + j) >> (2 * u)) & 3
        wait_full(row_full, t, 4)
        if flag != DEAD:
            ds = v_s.index(t % 4).reshape([64, WIDE]).slice(u * 64, 64, dim=1)
            acc = warpgroup_mma(ds.permute((1, 0)), k_s.index(t % 4).reshape([64, D]), acc)
        mbarrier.arrive(row_free.index(t % 4), count=1)
    for t in range(turn + end, turn + tiles):
        wait_full(row_full, t, 4)
        mbarrier.arrive(row_free.index(t % 4), count=1)
    return acc


@gluon.jit
def _consume(
    u: gl.constexpr, dq_desc, dk_desc, dv_desc, ds_desc, dq_ptr, shared, columns_ptr, flags_ptr,
    block_tiles_ptr, log_counts_ptr, row_flags_ptr, tiles_ptr, seed_ptr, group, row_offset,
    num_queries, num_keys, num_rows, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup u: 64 keys of an item by column, 64 queries of one by row.

    By column it holds the scores of a tile, keys by queries, when its turn begins, and multiplies
    those of the next beside the last of the tile's own products.
    """
    (
        q_s, dout_s, k_s, v_s, terms_s, ds_s, items, ready, read, q_full, q_free, dout_full,
        dout_free, kv_full, kv_free, row_full, row_free,
    ) = shared  # fmt: skip
    WIDE: gl.constexpr = v_s.shape[4]
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    KL: gl.constexpr = gl.DotOperandLayout(0, SL, 2)
    # whether keys and values are held in registers: products that read both operands from shared
    # memory are bound by it
    HELD: gl.constexpr = D == 64
    ROWS: gl.constexpr = gl.SliceLayout(1, SL)
    dtype: gl.constexpr = dq_desc.dtype
    scale2 = scale * LOG2E
    zero = gl.zeros([64, 64], gl.float32, SL)
    offs = gl.arange(0, 64, layout=ROWS)
    sub_row = u + offs * 0
    seed = 0
    if seed_ptr is not None:
        seed = gl.load(seed_ptr)
    turn = 0
    tile_turn = 0
    kv_turn = 0
    row_turn = 0
    dk = gl.zeros([64, D], gl.float32, OL)
    dv = gl.zeros([64, D], gl.float32, OL)
    if HELD:
        k = gl.zeros([64, D], dtype, KL)
        v = gl.zeros([64, D], dtype, KL)
    stage_s = ds_s.index(u).reshape([64, D])
    wait_full(ready, 0, 2)
    item = field(items, 0, ITEM)
    while item >= 0:
        own = turn % 2
        first = field(items, own, START)
        tiles = field(items, own, TILES)
        unit = field(items, own, UNITS + u)
        begin = field(items, own, BEGIN + u)
        end = field(items, own, END + u)
        if field(items, own, KIND) == BY_COLUMN:
            keys = unit * 64 + offs
            pass_over(q_full, q_free, dout_full, dout_free, tile_turn, tile_turn + begin, STAGES)
            wait_full(kv_full, kv_turn, 2)
            buffer = (kv_turn % 2) * NUM_UNITS + u
            place = (field(items, own, PLACE) + begin * NUM_UNITS + u) * 64
            if field(items, own, OPENS) != 0:
                dk = gl.zeros([64, D], gl.float32, OL)
                dv = gl.zeros([64, D], gl.float32, OL)
                if HELD:
                    k = k_s.index(buffer).reshape([64, D]).load(KL)
                    v = v_s.index(buffer).reshape([64, WIDE]).slice(0, D, dim=1).load(KL)
                    fence_async_shared()
            if not HELD:
                k = k_s.index(buffer).reshape([64, D])
            ragged = (unit + 1) * 64 > num_keys
            wait_full(q_full, tile_turn + begin, STAGES)
            s = warpgroup_mma(
                k,
                q_s.index((tile_turn + begin) % STAGES).reshape([64, D]).permute((1, 0)),
                zero, use_acc=False,
            )  # fmt: skip
            for j in range(begin, end):
                t = tile_turn + j
                stage = t % STAGES
                tile = first + j
                flag = (gl.load(flags_ptr + tile) >> (2 * u)) & 3
                if ragged:
                    flag = flag | 4
                q = q_s.index(stage).reshape([64, D])
                dout = dout_s.index(stage).reshape([64, D])
                if not HELD:
                    # read anew: kept over the loop, the descriptors of both operands would spill
                    buffer = field(items, own, KEYS) * NUM_UNITS + u
                    k = k_s.index(buffer).reshape([64, D])
                    v = v_s.index(buffer).reshape([64, WIDE]).slice(0, D, dim=1)
                wait_full(dout_full, t, STAGES)
                dp_token = warpgroup_mma(
                    v, dout.permute((1, 0)), zero, use_acc=False, is_async=True
                )
                w0, w1, w2, w3 = stored_words(
                    columns_ptr, block_tiles_ptr, tiles_ptr, tile, flag, sub_row, keys % BN,
                    num_rows, BN, BM, 64, 64, NUM_UNITS, ROWS,
                )  # fmt: skip
                x = s * scale2 - terms_s.index(stage).slice(0, 64, dim=1).load(SL)
                if flag != 0:
                    if log_counts_ptr is not None:
                        x += tile_counts(log_counts_ptr, tile, sub_row, 64, 64, NUM_UNITS, SL)
                    w0 = gl.where(keys < num_keys, w0, 0)
                    w1 = gl.where(keys < num_keys, w1, 0)
                p = gl.exp2(x)
                if flag != 0:
                    # what is not stored may have overflowed
                    p = select(p, w0, w1, w2, w3, 0.0)
                kept = p
                if seed_ptr is not None:
                    head = field(items, own, HEAD)
                    rows = gl.load(columns_ptr + tile) * 64
                    rows += gl.arange(0, 64, layout=gl.SliceLayout(0, SL))
                    keep = dropout_keep(
                        seed, threshold, field(items, own, BATCH), head, rows[None, :],
                        keys[:, None],
                    )  # fmt: skip
                    kept = gl.where(keep, p * keep_scale, 0.0)
                p16 = gl.convert_layout(kept.to(dtype), PL)
                dv_token = warpgroup_mma(p16, dout, dv, is_async=True)
                delta = terms_s.index(stage).slice(64, 64, dim=1).load(SL)
                dp = warpgroup_mma_wait(1, deps=(dp_token,))
                if seed_ptr is not None:
                    dp = gl.where(keep, dp * keep_scale, 0.0)
                ds = p * (dp - delta)
                if flag != 0:
                    ds = select(ds, w0, w1, w2, w3, 0.0)
                ds = ds.to(dtype)
                ds16 = gl.convert_layout(ds, PL)
                dk_token = warpgroup_mma(ds16, q, dk, is_async=True)
                dv, p16 = warpgroup_mma_wait(1, deps=(dv_token, p16))
                mbarrier.arrive(dout_free.index(stage), count=1)
                # after the last tile its own scores once more, for nothing
                more = j + 1 < end
                wait_full(q_full, t + 1, STAGES, more)
                ahead = gl.where(more, t + 1, t) % STAGES
                s_token = warpgroup_mma(
                    k, q_s.index(ahead).reshape([64, D]).permute((1, 0)), zero,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                tma.store_wait(0)
                stage_s.slice(0, 64, dim=1).store(ds)
                fence_async_shared()
                tma.async_copy_shared_to_global(
                    ds_desc, [0, 0, place, 0], ds_s.index(u).slice(0, 64, dim=3)
                )
                place += NUM_UNITS * 64
                if j == begin:
                    # what the item before this one stored has left its buffers of keys by now
                    fresh = (field(items, own, OPENS) != 0) & (kv_turn > 0)
                    mbarrier.arrive(kv_free.index((kv_turn + 1) % 2), count=1, pred=fresh)
                s, dk, ds16 = warpgroup_mma_wait(0, deps=(s_token, dk_token, ds16))
                mbarrier.arrive(q_free.index(stage), count=1)
            pass_over(
                q_full, q_free, dout_full, dout_free, tile_turn + end, tile_turn + tiles, STAGES
            )
            tile_turn += tiles
            if field(items, own, CLOSES) != 0:
                batch = field(items, own, BATCH)
                kv_head = field(items, own, HEAD) // group
                buffer = (kv_turn % 2) * NUM_UNITS + u
                v_s.index(buffer).reshape([64, WIDE]).slice(0, D, dim=1).store(dv.to(dtype))
                k_s.index(buffer).reshape([64, D]).store((dk * scale).to(dtype))
                fence_async_shared()
                if unit >= 0:
                    store_tile(dv_desc, v_s.index(buffer), batch, kv_head, unit * 64, D)
                    store_tile(dk_desc, k_s.index(buffer), batch, kv_head, unit * 64, D)
                kv_turn += 1
        else:
            # what was stored before has left the buffers: those of keys are for tiles now
            tma.store_wait(0)
            released = (row_turn == 0) & (kv_turn > 0)
            mbarrier.arrive(kv_free.index((kv_turn + 1) % 2), count=1, pred=released)
            acc = _sum_row(
                u, k_s, v_s, row_full, row_free, row_flags_ptr, first, tiles, begin, end, row_turn,
                D,
            )  # fmt: skip
            row_turn += tiles
            acc = (acc * scale).to(dtype)
            batch = field(items, own, BATCH)
            head = field(items, own, HEAD)
            row = unit * 64 - row_offset
            if (unit >= 0) & (row > -64) & (row < num_queries):
                if row >= 0:
                    stage_s.store(acc)
                    fence_async_shared()
                    store_tile(dq_desc, ds_s.index(u), batch, head, row, D)
                else:
                    store_rows(dq_desc, dq_ptr, acc, batch, head, row, 0, num_queries, D)
        mbarrier.arrive(read.index(own), count=1)
        turn += 1
        wait_full(ready, turn, 2)
        item = field(items, turn % 2, ITEM)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_attention_backward(
    q_desc, k_desc, v_desc, dout_desc, terms_desc, ds_desc, dq_desc, dk_desc, dv_desc, dq_ptr,
    counter_ptr, head_map_ptr, column_rows_ptr, column_columns_ptr, column_flags_ptr,
    column_tiles_ptr, column_counts_ptr, row_rows_ptr, row_columns_ptr, row_flags_ptr, places_ptr,
    tiles_ptr, seed_ptr, heads, group, column_groups, first_column, column_samples, bundle,
    row_groups, stride_rows, first_group, first_row, row_samples, row_programs, stride_map,
    column_slot, row_slot, places, units, row_offset, num_queries, num_keys, num_rows, scale,
    threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of key heads `first_column` .. + `column_samples` - 1 (of the batch), and dq of
    query heads `first_row` .. + `row_samples` - 1, whose part of the workspace is written. The
    first `row_programs` programs work by row alone.
    """
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_desc.dtype
    # a pass by row keeps two units' gradients of scores where values were
    WIDE: gl.constexpr = D if D > 128 else 128
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, D], ROWS_LAYOUT)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, D], ROWS_LAYOUT)
    k_s = gl.allocate_shared_memory(dtype, [2 * NUM_UNITS, 1, 1, 64, D], ROWS_LAYOUT)
    v_s = gl.allocate_shared_memory(dtype, [2 * NUM_UNITS, 1, 1, 64, WIDE], ROWS_LAYOUT)
    ds_s = gl.allocate_shared_memory(dtype, [NUM_UNITS, 1, 1, 64, D], ROWS_LAYOUT)
    terms_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], TERMS_LAYOUT)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    items = gl.allocate_shared_memory(gl.int32, [2, 32], plain)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    read = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    kv_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    row_full = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    row_free = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(read.index(i), count=NUM_UNITS)
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=NUM_UNITS)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=NUM_UNITS)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(dout_free.index(i), count=NUM_UNITS)
    for i in gl.static_range(4):
        mbarrier.init(row_full.index(i), count=1)
        mbarrier.init(row_free.index(i), count=NUM_UNITS)
    shared = (
        q_s, dout_s, k_s, v_s, terms_s, ds_s, items, ready, read, q_full, q_free, dout_full,
        dout_free, kv_full, kv_free, row_full, row_free,
    )  # fmt: skip
    gl.warp_specialize([
        (_consume, (
            0, dq_desc, dk_desc, dv_desc, ds_desc, dq_ptr, shared, column_columns_ptr,
            column_flags_ptr, column_tiles_ptr, column_counts_ptr, row_flags_ptr, tiles_ptr,
            seed_ptr, group, row_offset, num_queries, num_keys, num_rows, scale, threshold,
            keep_scale, BM, BN, D, STAGES,
        )),
        (_consume, (
            1, dq_desc, dk_desc, dv_desc, ds_desc, dq_ptr, shared, column_columns_ptr,
            column_flags_ptr, column_tiles_ptr, column_counts_ptr, row_flags_ptr, tiles_ptr,
            seed_ptr, group, row_offset, num_queries, num_keys, num_rows, scale, threshold,
            keep_scale, BM, BN, D, STAGES,
        )),
        (produce, (
            q_desc, k_desc, v_desc, dout_desc, terms_desc, ds_desc, shared, counter_ptr,
            head_map_ptr, column_rows_ptr, column_columns_ptr, row_rows_ptr, row_columns_ptr,
            places_ptr, heads, group, column_groups, first_column, column_samples, bundle,
            row_groups, stride_rows, first_group, first_row, row_samples, row_programs, stride_map,
            column_slot, row_slot, places, units, row_offset, D, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
