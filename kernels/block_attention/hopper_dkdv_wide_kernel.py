"""dk and dv of block_attention on Hopper for head sizes over 128: two warpgroups share 64 keys.

The sums of 64 keys are all that a warpgroup's registers hold of this width. So one sums dv and the
other dk, over the same stream of queries. The first computes the probabilities, keys by queries,
and hands them through shared memory to the second, which has the gradients of the probabilities by
then: two products of 64 x 64 x 256 a tile each, and the elementwise part of one runs beside the
products of the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    FIRST_KEY,
    HEAD,
    KEYS,
    LOG2E,
    SEQUENCE,
    dropout_keep,
    select,
    tile_columns,
    tile_counts,
)
from sparse_layouts.kernels.block_attention.hopper_dkdv_wide_load import (
    CLOSES,
    CUT,
    ITEMS,
    TESTED,
    TILE,
    TILE_HEAD,
    produce,
)
from sparse_layouts.kernels.hopper_common import ROWS_LAYOUT, field, wait_free, wait_full

UNITS = gl.constexpr(unit_schedule.UNITS)
# Probabilities [64, 64] in the order in which the threads of a warpgroup hold them: 16 bytes of a
# thread, then those of the next, so that neither stores nor loads share a bank. Bits of the place:
# a pair of columns, the row eight further down; the thread; eight columns further on.
P_LAYOUT = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [8, 0]]
        + [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0]]
        + [[0, 8], [0, 16], [0, 32]]
    )
)
INTEGERS = ["heads", "group", "groups", "bundle", "samples", "stride_map", "row_offset"]
INTEGERS += ["num_queries", "num_keys", "num_sequences", "packed", "threshold"]


@gluon.jit
def _cut(buffer, lse_s):
    """Zeros in the rows of a tile that are no queries of the sequence: 0 * NaN is NaN."""
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for i in gl.static_range(4):
        part = buffer.slice(i * 16, 16, dim=0)
        lse = lse_s.slice(i * 16, 16).load(gl.SliceLayout(1, layout))
        x = part.load(layout)
        zero = gl.zeros([16, D], x.dtype, layout)
        part.store(gl.where((lse != float("inf"))[:, None], x, zero))
    fence_async_shared()


@gluon.jit
def _store_keys(desc, ptr, x, items, place):
    """The gradients of an item's 64 keys, as far as these are its sequence's."""
    D: gl.constexpr = x.shape[1]
    layout: gl.constexpr = x.type.layout
    batch = field(items, place, BATCH).to(gl.int64)
    kv_head = field(items, place, HEAD).to(gl.int64)
    keys = field(items, place, UNITS) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    rows = (field(items, place, FIRST_KEY) + keys).to(gl.int64)
    start = ptr + batch * desc.strides[0] + kv_head * desc.strides[1]
    pointers = start + (rows * desc.strides[2])[:, None] + columns[None, :]
    # as TMA wants rows and head sizes, which is not known here of strides
    pointers = gl.multiple_of(pointers, [1, 16])
    mask_n = keys < field(items, place, KEYS)
    mask_d = columns // 8 < desc.shape[3] // 8
    gl.store(pointers, x.to(desc.dtype), mask=mask_n[:, None] & mask_d[None, :])


@gluon.jit
def _sum_values(
    dv_desc, dv_ptr, shared, columns_ptr, log_counts_ptr, sequences_ptr, seed_ptr, scale,
    threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The first warpgroup: probabilities and dv.

    It holds the scores of a tile when its turn begins, and multiplies those of the next, of this
    item or the next one, beside the tile's own product.
    """
    (
        q_s, dout_s, k_s, v_s, p_s, terms_s, words_s, facts_s, items, q_full, q_free, dout_full,
        dout_free, k_full, k_free, v_full, v_free, p_full, p_free,
    ) = shared  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SL)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SL)
    SUB: gl.constexpr = 64 // BN if BN < 64 else 1
    dtype: gl.constexpr = dv_desc.dtype
    scale2 = scale * LOG2E
    offs = gl.arange(0, 64, layout=ROWS)
    sub_row = offs // BN if BN < 64 else offs * 0
    zero = gl.zeros([64, 64], gl.float32, SL)
    seed = 0
    if seed_ptr is not None:
        seed = gl.load(seed_ptr)
    turn = 0
    item_turn = 0
    dv = gl.zeros([64, D], gl.float32, OL)
    k = k_s.index(0).reshape([64, D])
    wait_full(q_full, 0, STAGES)
    tile = field(facts_s, 0, TILE)
    wait_full(k_full, 0, 1, tile >= 0)
    s = warpgroup_mma(
        k, q_s.index(0).reshape([64, D]).permute((1, 0)), zero, use_acc=False
    )  # fmt: skip
    while tile >= 0:
        stage = turn % STAGES
        closes = field(facts_s, stage, CLOSES) != 0
        if closes:
            # the scores were the last product with these keys
            mbarrier.arrive(k_free.index(0), count=1)
        lse = terms_s.index(stage).slice(0, 64).load(COLUMNS)
        x = s * scale2 - lse[None, :]
        tested = field(facts_s, stage, TESTED) != 0
        if log_counts_ptr is not None:
            if tested:
                x += tile_counts(log_counts_ptr, tile, sub_row, PIECE, 64, SUB, SL)
        p = gl.exp2(x)
        if tested:
            # what is not stored may have overflowed, what does not exist may be NaN
            w0 = words_s.index(stage).slice(0, 64).load(ROWS)
            w1 = words_s.index(stage).slice(64, 64).load(ROWS)
            p = select(p, w0, w1, w0, w1, 0.0)
            p = gl.where((lse != float("inf"))[None, :], p, 0.0)
        kept = p
        handed = p
        if seed_ptr is not None:
            place = item_turn % ITEMS
            rows = tile_columns(columns_ptr, tile, PIECE, 64, SL)
            keys = field(items, place, UNITS) * 64 + offs
            keep = dropout_keep(
                seed, threshold, field(items, place, SEQUENCE), field(facts_s, stage, TILE_HEAD),
                rows[None, :], keys[:, None],
            )  # fmt: skip
            kept = gl.where(keep, p, 0.0)
            # the sign tells the other warpgroup what is dropped
            handed = gl.where(keep, p, -p)
        wait_free(p_free, turn, 1)
        p_s.store(handed)
        mbarrier.arrive(p_full.index(0), count=1)
        p16 = gl.convert_layout(kept.to(dtype), PL)
        wait_full(dout_full, turn, STAGES)
        dout = dout_s.index(stage).reshape([64, D])
        if sequences_ptr is not None:
            if field(facts_s, stage, CUT) != 0:
                _cut(dout, terms_s.index(stage).slice(0, 64))
        product = warpgroup_mma(p16, dout, dv, is_async=True)
        turn += 1
        ahead = turn % STAGES
        wait_full(q_full, turn, STAGES)
        tile = field(facts_s, ahead, TILE)
        wait_full(k_full, item_turn + 1, 1, closes & (tile >= 0))
        # behind the last tile of all the scores of something, for nothing
        scores = warpgroup_mma(
            k, q_s.index(ahead).reshape([64, D]).permute((1, 0)), zero, use_acc=False,
            is_async=True,
        )  # fmt: skip
        s, dv, p16 = warpgroup_mma_wait(0, deps=(scores, product, p16))
        mbarrier.arrive(q_free.index(stage), count=1)
        mbarrier.arrive(dout_free.index(stage), count=1)
        if closes:
            _store_keys(dv_desc, dv_ptr, dv * keep_scale, items, item_turn % ITEMS)
            dv = gl.zeros([64, D], gl.float32, OL)
            item_turn += 1


@gluon.jit
def _sum_keys(
    dk_desc, dk_ptr, shared, sequences_ptr, seed_ptr, scale, keep_scale,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The second warpgroup: gradients of probabilities and of scores, and dk, as the first one."""
    (
        q_s, dout_s, k_s, v_s, p_s, terms_s, words_s, facts_s, items, q_full, q_free, dout_full,
        dout_free, k_full, k_free, v_full, v_free, p_full, p_free,
    ) = shared  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SL)
    dtype: gl.constexpr = dk_desc.dtype
    zero = gl.zeros([64, 64], gl.float32, SL)
    turn = 0
    item_turn = 0
    dk = gl.zeros([64, D], gl.float32, OL)
    v = v_s.index(0).reshape([64, D])
    wait_full(q_full, 0, STAGES)
    more = field(facts_s, 0, TILE) >= 0
    wait_full(v_full, 0, 1, more)
    wait_full(dout_full, 0, STAGES, more)
    dp = warpgroup_mma(
        v, dout_s.index(0).reshape([64, D]).permute((1, 0)), zero, use_acc=False
    )  # fmt: skip
    while more:
        stage = turn % STAGES
        closes = field(facts_s, stage, CLOSES) != 0
        if closes:
            mbarrier.arrive(v_free.index(0), count=1)
        mbarrier.arrive(dout_free.index(stage), count=1)
        delta = terms_s.index(stage).slice(64, 64).load(COLUMNS)
        wait_full(p_full, turn, 1)
        handed = p_s.load(SL)
        p = handed
        if seed_ptr is not None:
            dp = gl.where(handed > 0, dp * keep_scale, 0.0)
            p = gl.abs(handed)
        # where the probability is 0 the rest may be NaN: what is not stored or does not exist
        ds = gl.where(p == 0, 0.0, p * (dp - delta[None, :]))
        ds16 = gl.convert_layout(ds.to(dtype), PL)
        q = q_s.index(stage).reshape([64, D])
        if sequences_ptr is not None:
            if field(facts_s, stage, CUT) != 0:
                _cut(q, terms_s.index(stage).slice(0, 64))
        product = warpgroup_mma(ds16, q, dk, is_async=True)
        # not before the product, which has everything that was loaded in it
        mbarrier.arrive(p_free.index(0), count=1)
        turn += 1
        ahead = turn % STAGES
        wait_full(q_full, turn, STAGES)
        more = field(facts_s, ahead, TILE) >= 0
        wait_full(v_full, item_turn + 1, 1, closes & more)
        wait_full(dout_full, turn, STAGES, more)
        # behind the last tile of all the product of something, for nothing
        gradients = warpgroup_mma(
            v, dout_s.index(ahead).reshape([64, D]).permute((1, 0)), zero, use_acc=False,
            is_async=True,
        )  # fmt: skip
        dp, dk, ds16 = warpgroup_mma_wait(0, deps=(gradients, product, ds16))
        mbarrier.arrive(q_free.index(stage), count=1)
        if closes:
            _store_keys(dk_desc, dk_ptr, dk * scale, items, item_turn % ITEMS)
            dk = gl.zeros([64, D], gl.float32, OL)
            item_turn += 1


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_attention_wide_columns(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, terms_ptr, counter_ptr,
    head_map_ptr, rows_ptr, columns_ptr, flags_ptr, block_tiles_ptr, log_counts_ptr, tiles_ptr,
    sequences_ptr, seed_ptr, heads, group, groups, bundle, samples, stride_map, row_offset,
    num_queries, num_keys, num_sequences, packed, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items of 64 keys of a key head; tiles of 64 queries in a ring of STAGES buffers."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, D], ROWS_LAYOUT)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, D], ROWS_LAYOUT)
    k_s = gl.allocate_shared_memory(dtype, [1, 1, 1, 64, D], ROWS_LAYOUT)
    v_s = gl.allocate_shared_memory(dtype, [1, 1, 1, 64, D], ROWS_LAYOUT)
    p_s = gl.allocate_shared_memory(gl.float32, [64, 64], P_LAYOUT)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    terms_s = gl.allocate_shared_memory(gl.float32, [STAGES, 128], plain)
    words_s = gl.allocate_shared_memory(gl.int32, [STAGES, 128], plain)
    facts_s = gl.allocate_shared_memory(gl.int32, [STAGES, 32], plain)
    items = gl.allocate_shared_memory(gl.int32, [ITEMS, 32], plain)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    p_full = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    p_free = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(q_free.index(i), count=2)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(dout_free.index(i), count=2)
    mbarrier.init(p_full.index(0), count=1)
    mbarrier.init(p_free.index(0), count=1)
    mbarrier.init(k_full.index(0), count=1)
    mbarrier.init(k_free.index(0), count=1)
    mbarrier.init(v_full.index(0), count=1)
    mbarrier.init(v_free.index(0), count=1)
    shared = (
        q_s, dout_s, k_s, v_s, p_s, terms_s, words_s, facts_s, items, q_full, q_free, dout_full,
        dout_free, k_full, k_free, v_full, v_free, p_full, p_free,
    )  # fmt: skip
    gl.warp_specialize([
        (_sum_values, (
            dv_desc, dv_ptr, shared, columns_ptr, log_counts_ptr, sequences_ptr, seed_ptr, scale,
            threshold, keep_scale, BM, BN, PIECE, D, STAGES,
        )),
        (_sum_keys, (
            dk_desc, dk_ptr, shared, sequences_ptr, seed_ptr, scale, keep_scale, D, STAGES,
        )),
        (produce, (
            q_desc, k_desc, v_desc, dout_desc, terms_ptr, shared, counter_ptr, head_map_ptr,
            rows_ptr, columns_ptr, flags_ptr, block_tiles_ptr, tiles_ptr, sequences_ptr, heads,
            group, groups, bundle, samples, stride_map, row_offset, num_queries, num_keys,
            num_sequences, packed, BM, BN, PIECE, D, STAGES,
        )),
    ], [4, 1], [REGISTERS, LOAD_REGISTERS])  # fmt: skip
