"""The columns pass of block_attention's backward on Hopper, in Gluon: dk and dv of 64 keys a
warpgroup, over the queries that attend to them.

It computes the scores itself, so that nothing comes from a pass by row and there is no workspace:
any blocks from 16 on, and sequences of several lengths. Each gradient is summed by one program in
one order.
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

from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    FIRST_KEY,
    FIRST_ROW,
    HEAD,
    ITEM,
    KEYS,
    LAST_ROW,
    LOG2E,
    SEQUENCE,
    dropout_keep,
    pass_over,
    select,
    store_rows,
    store_tile,
    stored_words,
    tile_columns,
    tile_counts,
)
from sparse_layouts.kernels.block_attention.hopper_dkdv_load import (
    BEGIN,
    BUFFER,
    CLOSES,
    CUT,
    END,
    NUM_UNITS,
    OPENS,
    START,
    TILE,
    TILES,
    UNITS,
    produce,
)
from sparse_layouts.kernels.hopper_common import ROWS_LAYOUT, field, wait_full

INTEGERS = ["heads", "group", "groups", "bundle", "samples", "stride_map", "row_offset"]
INTEGERS += ["num_queries", "num_keys", "num_rows", "num_sequences", "packed", "threshold"]


@gluon.jit
def cut_rows(buffer, columns_ptr, tile, first_row, last_row, PIECE: gl.constexpr):
    """Zeros in the rows of a tile that are not the sequence's: 0 * NaN is NaN.

    Warpgroups that share the tile all do it, and write the same. The caller fences.
    """
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    offs = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    rows = gl.load(columns_ptr + tile * (64 // PIECE) + offs // PIECE) * PIECE + offs % PIECE
    x = buffer.load(layout)
    own = (rows >= first_row) & (rows < last_row)
    buffer.store(gl.where(own[:, None], x, gl.zeros([64, D], x.dtype, layout)))


@gluon.jit
def _consume(
    u: gl.constexpr, dk_desc, dv_desc, dk_ptr, dv_ptr, shared, columns_ptr, flags_ptr,
    block_tiles_ptr, log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, group, num_rows, scale,
    threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup u: 64 keys of an item.

    It holds the scores of a tile, keys by queries, when its turn begins, and multiplies those of
    the next beside the last of the tile's own products.
    """
    (
        q_s, dout_s, k_s, v_s, terms_s, facts_s, items, ready, read, q_full, q_free, dout_full,
        dout_free, kv_full, kv_free,
    ) = shared  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    KL: gl.constexpr = gl.DotOperandLayout(0, SL, 2)
    # whether keys and values are held in registers: products that read both operands from shared
    # memory are bound by it
    HELD: gl.constexpr = D == 64
    ROWS: gl.constexpr = gl.SliceLayout(1, SL)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SL)
    SUB: gl.constexpr = 64 // BN if BN < 64 else 1
    WIDTH: gl.constexpr = NUM_UNITS * SUB
    dtype: gl.constexpr = dk_desc.dtype
    scale2 = scale * LOG2E
    zero = gl.zeros([64, 64], gl.float32, SL)
    offs = gl.arange(0, 64, layout=ROWS)
    sub_row = u * SUB + offs // BN if BN < 64 else u + offs * 0
    seed = 0
    if seed_ptr is not None:
        seed = gl.load(seed_ptr)
    turn = 0
    tile_turn = 0
    kv_turn = 0
    dk = gl.zeros([64, D], gl.float32, OL)
    dv = gl.zeros([64, D], gl.float32, OL)
    if HELD:
        k = gl.zeros([64, D], dtype, KL)
        v = gl.zeros([64, D], dtype, KL)
    wait_full(ready, 0, 2)
    item = field(items, 0, ITEM)
    while item >= 0:
        own = turn % 2
        first = field(items, own, START)
        unit = field(items, own, UNITS + u)
        begin = field(items, own, BEGIN + u)
        end = field(items, own, END + u)
        num_keys = field(items, own, KEYS)
        keys = unit * 64 + offs
        ragged = (unit + 1) * 64 > num_keys
        opens = field(items, own, OPENS) != 0
        pass_over(q_full, q_free, dout_full, dout_free, tile_turn, tile_turn + begin, STAGES)
        wait_full(kv_full, kv_turn, 2)
        buffer = (kv_turn % 2) * NUM_UNITS + u
        if opens:
            dk = gl.zeros([64, D], gl.float32, OL)
            dv = gl.zeros([64, D], gl.float32, OL)
            if HELD:
                k = k_s.index(buffer).reshape([64, D]).load(KL)
                v = v_s.index(buffer).reshape([64, D]).load(KL)
                fence_async_shared()
        if not HELD:
            k = k_s.index(buffer).reshape([64, D])
        # without a tile, which a sequence may leave, a product of anything, for nothing
        wait_full(q_full, tile_turn + begin, STAGES, begin < end)
        s = warpgroup_mma(
            k,
            q_s.index((tile_turn + begin) % STAGES).reshape([64, D]).permute((1, 0)),
            zero, use_acc=False,
        )  # fmt: skip
        # what the item before this one stored has left its buffers of keys by now
        tma.store_wait(0)
        mbarrier.arrive(kv_free.index((kv_turn + 1) % 2), count=1, pred=opens & (kv_turn > 0))
        for j in range(begin, end):
            t = tile_turn + j
            stage = t % STAGES
            q = q_s.index(stage).reshape([64, D])
            dout = dout_s.index(stage).reshape([64, D])
            if not HELD:
                # read anew: kept over the loop, the descriptors of both operands would spill
                buffer = field(items, own, BUFFER) * NUM_UNITS + u
                k = k_s.index(buffer).reshape([64, D])
                v = v_s.index(buffer).reshape([64, D])
            tile = first + j
            if sequences_ptr is not None:
                tile = field(facts_s, stage, TILE)
            flag = (gl.load(flags_ptr + tile) >> (2 * u)) & 3
            if ragged:
                flag = flag | 4
            wait_full(dout_full, t, STAGES)
            if sequences_ptr is not None:
                if field(facts_s, stage, CUT) != 0:
                    flag = flag | 8
                    first_row = field(items, own, FIRST_ROW)
                    last_row = field(items, own, LAST_ROW)
                    cut_rows(q, columns_ptr, tile, first_row, last_row, PIECE)
                    cut_rows(dout, columns_ptr, tile, first_row, last_row, PIECE)
                    fence_async_shared()
            dp_token = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
            w0, w1, w2, w3 = stored_words(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, flag, sub_row, keys % BN, num_rows,
                BN, BM, PIECE, 64, WIDTH, ROWS,
            )  # fmt: skip
            lse = terms_s.index(stage).slice(0, 64).load(COLUMNS)[None, :]
            x = s * scale2 - lse
            if flag != 0:
                if sequences_ptr is not None:
                    # the scores were multiplied before their rows were cut
                    x = gl.where(lse == float("inf"), -float("inf"), x)
                if log_counts_ptr is not None:
                    x += tile_counts(log_counts_ptr, tile, sub_row, PIECE, 64, WIDTH, SL)
                w0 = gl.where(keys < num_keys, w0, 0)
                w1 = gl.where(keys < num_keys, w1, 0)
            p = gl.exp2(x)
            if flag != 0:
                # what is not stored may have overflowed
                p = select(p, w0, w1, w2, w3, 0.0)
            kept = p
            if seed_ptr is not None:
                keep = dropout_keep(
                    seed, threshold, field(items, own, SEQUENCE), field(items, own, HEAD),
                    tile_columns(columns_ptr, tile, PIECE, 64, SL)[None, :], keys[:, None],
                )  # fmt: skip
                kept = gl.where(keep, p * keep_scale, 0.0)
            p16 = gl.convert_layout(kept.to(dtype), PL)
            dv_token = warpgroup_mma(p16, dout, dv, is_async=True)
            delta = terms_s.index(stage).slice(64, 64).load(COLUMNS)
            dp = warpgroup_mma_wait(1, deps=(dp_token,))
            if seed_ptr is not None:
                dp = gl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[None, :])
            if flag != 0:
                ds = select(ds, w0, w1, w2, w3, 0.0)
            ds16 = gl.convert_layout(ds.to(dtype), PL)
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
            s, dk, ds16 = warpgroup_mma_wait(0, deps=(s_token, dk_token, ds16))
            mbarrier.arrive(q_free.index(stage), count=1)
        tiles = field(items, own, TILES)
        pass_over(q_full, q_free, dout_full, dout_free, tile_turn + end, tile_turn + tiles, STAGES)
        tile_turn += tiles
        if field(items, own, CLOSES) != 0:
            batch = field(items, own, BATCH)
            kv_head = field(items, own, HEAD) // group
            buffer = (kv_turn % 2) * NUM_UNITS + u
            live = unit >= 0
            boxed = live
            if sequences_ptr is not None:
                # a box may reach over the end of the tensor, but not of a sequence
                live = live & (unit * 64 < num_keys)
                boxed = live & ((unit + 1) * 64 <= num_keys)
            if boxed:
                key = field(items, own, FIRST_KEY) + unit * 64
                v_s.index(buffer).reshape([64, D]).store(dv.to(dtype))
                k_s.index(buffer).reshape([64, D]).store((dk * scale).to(dtype))
                fence_async_shared()
                store_tile(dv_desc, v_s.index(buffer), batch, kv_head, key, D)
                store_tile(dk_desc, k_s.index(buffer), batch, kv_head, key, D)
            if sequences_ptr is not None:
                if live & (boxed == 0):
                    begin_key = field(items, own, FIRST_KEY)
                    key = begin_key + unit * 64
                    store_rows(
                        dv_desc, dv_ptr, dv.to(dtype), batch, kv_head, key, begin_key,
                        begin_key + num_keys, D,
                    )  # fmt: skip
                    store_rows(
                        dk_desc, dk_ptr, (dk * scale).to(dtype), batch, kv_head, key, begin_key,
                        begin_key + num_keys, D,
                    )  # fmt: skip
            kv_turn += 1
        mbarrier.arrive(read.index(own), count=1)
        turn += 1
        wait_full(ready, turn, 2)
        item = field(items, turn % 2, ITEM)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_attention_dkdv(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, terms_ptr, counter_ptr,
    head_map_ptr, rows_ptr, columns_ptr, flags_ptr, block_tiles_ptr, log_counts_ptr, tiles_ptr,
    sequences_ptr, seed_ptr, heads, group, groups, bundle, samples, stride_map, row_offset,
    num_queries, num_keys, num_rows, num_sequences, packed, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv: items of NUM_UNITS x 64 keys, tiles of 64 queries in rings of STAGES buffers."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, D], ROWS_LAYOUT)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, D], ROWS_LAYOUT)
    k_s = gl.allocate_shared_memory(dtype, [2 * NUM_UNITS, 1, 1, 64, D], ROWS_LAYOUT)
    v_s = gl.allocate_shared_memory(dtype, [2 * NUM_UNITS, 1, 1, 64, D], ROWS_LAYOUT)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    terms_s = gl.allocate_shared_memory(gl.float32, [STAGES, 128], plain)
    facts_s = gl.allocate_shared_memory(gl.int32, [STAGES, 32], plain)
    items = gl.allocate_shared_memory(gl.int32, [2, 32], plain)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    read = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    kv_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(read.index(i), count=NUM_UNITS)
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=NUM_UNITS)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)  # terms and rows
        mbarrier.init(q_free.index(i), count=NUM_UNITS)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(dout_free.index(i), count=NUM_UNITS)
    shared = (
        q_s, dout_s, k_s, v_s, terms_s, facts_s, items, ready, read, q_full, q_free, dout_full,
        dout_free, kv_full, kv_free,
    )  # fmt: skip
    gl.warp_specialize([
        (_consume, (
            0, dk_desc, dv_desc, dk_ptr, dv_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
            log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, group, num_rows, scale, threshold,
            keep_scale, BM, BN, PIECE, D, STAGES,
        )),
        (_consume, (
            1, dk_desc, dv_desc, dk_ptr, dv_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
            log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, group, num_rows, scale, threshold,
            keep_scale, BM, BN, PIECE, D, STAGES,
        )),
        (produce, (
            q_desc, k_desc, v_desc, dout_desc, terms_ptr, shared, counter_ptr, head_map_ptr,
            rows_ptr, columns_ptr, sequences_ptr, heads, group, groups, bundle, samples,
            stride_map, row_offset, num_queries, num_keys, num_sequences, packed, PIECE, D, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
