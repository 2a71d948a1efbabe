"""dq of block_attention on Hopper, in Gluon: by row, the scores computed once more.

Laid out as the forward: programs stay and claim items, units of 64 rows of one head, or one of two
heads; a warp loads, a warpgroup multiplies for each unit. Of a tile of keys S = Q K^T, P = exp2(S -
lse), dP = dO V^T and dS = P (dP - delta); dq is the sum of dS K. The scores of a tile are
multiplied beside the product of the tile before with its keys, across items too.
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
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    FIRST_ROW,
    HEAD,
    LAST_ROW,
    LOG2E,
    SEQUENCE,
    SHIFT,
    dropout_keep,
    pass_over,
    select,
    store_rows,
    store_tile,
    stored_words,
    tile_columns,
    tile_counts,
)
from sparse_layouts.kernels.block_attention.hopper_dq_load import produce
from sparse_layouts.kernels.block_attention.hopper_rows import cut_keys, read_item, tile_flag
from sparse_layouts.kernels.hopper_common import ROWS_LAYOUT, field, wait_full

TILES, END = gl.constexpr(unit_schedule.TILES), gl.constexpr(unit_schedule.RUN_END)
# of a flag: the tile reaches beyond the keys of its sequence
REACHES = gl.constexpr(4)
INTEGERS = ["heads", "group", "groups", "bundle", "samples", "stride_map", "stride_rows"]
INTEGERS += ["first_group", "row_offset", "num_queries", "num_keys", "num_sequences", "threshold"]
INTEGERS += ["packed"]


@gluon.jit
def _row_terms(
    terms_ptr, items, place, u: gl.constexpr, OWN: gl.constexpr, heads, num_queries, unit, offs,
    pred,
):  # fmt: skip
    """The logsumexp in base 2 and delta of a unit's rows; +inf and 0 for those that are not there,
    or where there is no item.
    """
    head = field(items, place, BATCH) * heads + field(items, place, HEAD) + (u - OWN)
    rows = unit * 64 + offs
    mask = (rows >= field(items, place, FIRST_ROW)) & (rows < field(items, place, LAST_ROW))
    start = head.to(gl.int64) * num_queries + field(items, place, SHIFT)
    pair = terms_ptr + (start + rows) * 2
    lse = gl.load(pair, mask=mask & pred, other=float("inf"))
    delta = gl.load(pair + 1, mask=mask & pred, other=0.0)
    return lse, delta


@gluon.jit
def _consume(
    u: gl.constexpr, dq_desc, dq_ptr, terms_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
    log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, heads, num_queries, scale, threshold,
    keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr,
    NUM_UNITS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, HEADS_EACH: gl.constexpr,
):  # fmt: skip
    """Warpgroup u: 64 rows an item. It holds the scores of a tile when its turn begins, and
    multiplies those of the next, of this item or the next one, beside the tile's own product.
    """
    (
        q_s, dout_s, k_s, v_s, items, ready, q_full, q_free, k_full, k_free, v_full, v_free
    ) = shared  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TN, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SL)
    SUB: gl.constexpr = 64 // BM if BM < 64 else 1
    # which of the schedule's units this is: warpgroups with a head each share one
    OWN: gl.constexpr = u if HEADS_EACH == 1 else 0
    WIDTH: gl.constexpr = (NUM_UNITS if HEADS_EACH == 1 else 1) * SUB
    # with one buffer for queries the next item's scores have to wait until this one is stored
    LATE: gl.constexpr = QUERIES == 1
    dtype: gl.constexpr = dq_desc.dtype
    scale2 = scale * LOG2E
    zero = gl.zeros([64, TN], gl.float32, SL)
    offs = gl.arange(0, 64, layout=ROWS)
    sub_row = OWN * SUB + offs // BM if BM < 64 else OWN + offs * 0
    seed = 0
    if seed_ptr is not None:
        seed = gl.load(seed_ptr)
    turn = 0
    base = 0
    wait_full(ready, 0, QUERIES)
    item, first, unit, begin, num_keys = read_item(items, 0, OWN)
    s = zero
    flag = 0
    w0 = gl.full([64], -1, gl.int32, ROWS)
    w1 = w0
    w2 = w0
    w3 = w0
    lse = gl.full([64], float("inf"), gl.float32, ROWS)
    delta = gl.zeros([64], gl.float32, ROWS)
    while item >= 0:
        place = turn % QUERIES
        q_place = place * NUM_UNITS + u
        start = base + begin
        end = base + field(items, place, TILES)
        last = base + field(items, place, END + OWN) - 1
        first_row = unit * 64
        tile = first + begin
        if LATE | (turn == 0):
            # scores that no product of an item before could run beside
            pass_over(k_full, k_free, v_full, v_free, base, start, STAGES)
            flag = tile_flag(
                flags_ptr, columns_ptr, sequences_ptr, tile, num_keys, True, OWN, PIECE, TN
            )
            w0, w1, w2, w3 = stored_words(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, flag, sub_row,
                (first_row + offs) % BM, num_keys, BM, BN, PIECE, TN, WIDTH, ROWS,
            )  # fmt: skip
            lse, delta = _row_terms(
                terms_ptr, items, place, u, OWN, heads, num_queries, unit, offs, True
            )
            wait_full(q_full, turn, QUERIES)
            wait_full(k_full, start, STAGES)
            s = warpgroup_mma(
                q_s.index(q_place).reshape([64, D]),
                k_s.index(start % STAGES).reshape([TN, D]).permute((1, 0)),
                zero, use_acc=False,
            )  # fmt: skip
        acc = gl.zeros([64, D], gl.float32, OL)
        next_q = q_place
        next_lse = lse
        next_delta = delta
        for c in range(start, last + 1):
            wait_full(v_full, c, STAGES)
            dp_token = warpgroup_mma(
                dout_s.index(q_place).reshape([64, D]),
                v_s.index(c % STAGES).reshape([TN, D]).permute((1, 0)),
                zero, use_acc=False, is_async=True,
            )  # fmt: skip
            x = s * scale2 - lse[:, None]
            if log_counts_ptr is not None:
                if flag != 0:
                    x += tile_counts(log_counts_ptr, tile, sub_row, PIECE, TN, WIDTH, SL)
            p = gl.exp2(x)
            if flag != 0:
                # not for its own sake, since the gradients are masked too: exponentials that a
                # branch needs stay in front of the wait, beside the product
                p = select(p, w0, w1, w2, w3, 0.0)
            if seed_ptr is not None:
                keep = dropout_keep(
                    seed, threshold, field(items, place, SEQUENCE),
                    field(items, place, HEAD) + (u - OWN), (first_row + offs)[:, None],
                    tile_columns(columns_ptr, tile, PIECE, TN, SL)[None, :],
                )  # fmt: skip
            if (not LATE) & (c == start):
                # the output of the item before this one has left its buffer by now
                tma.store_wait(0)
                mbarrier.arrive(q_free.index((turn + 1) % QUERIES), count=1, pred=turn > 0)
            dp = warpgroup_mma_wait(0, deps=(dp_token,))
            mbarrier.arrive(v_free.index(c % STAGES), count=1)
            if seed_ptr is not None:
                dp = gl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if flag != 0:
                # what is not stored may have overflowed, or be no number
                ds = select(ds, w0, w1, w2, w3, 0.0)
            ds16 = gl.convert_layout(ds.to(dtype), PL)
            keys = k_s.index(c % STAGES).reshape([TN, D])
            if sequences_ptr is not None:
                if (flag & REACHES) != 0:
                    cut_keys(keys, columns_ptr, tile, num_keys, PIECE)
            product = warpgroup_mma(ds16, keys, acc, is_async=True)
            ahead = c + 1
            tile += 1
            held = True
            more = c < last
            if c == last:
                if last + 1 < end:
                    # passed over before the next item is waited for, which comes behind them
                    warpgroup_mma_wait(0, deps=(product, ds16))
                    mbarrier.arrive(k_free.index(last % STAGES), count=1)
                    held = False
                    pass_over(k_full, k_free, v_full, v_free, last + 1, end, STAGES)
                if LATE:
                    # once more the scores of a tile that is there, for nothing
                    ahead = last
                else:
                    wait_full(ready, turn + 1, QUERIES)
                    next_place = (turn + 1) % QUERIES
                    next_q = next_place * NUM_UNITS + u
                    item, first, unit, begin, num_keys = read_item(items, next_place, OWN)
                    more = item >= 0
                    next_lse, next_delta = _row_terms(
                        terms_ptr, items, next_place, u, OWN, heads, num_queries, unit, offs, more
                    )
                    ahead = end + begin
                    tile = first + begin
                    if begin > 0:
                        warpgroup_mma_wait(0, deps=(product, ds16))
                        mbarrier.arrive(k_free.index(last % STAGES), count=1, pred=held)
                        held = False
                        pass_over(k_full, k_free, v_full, v_free, end, ahead, STAGES)
                    wait_full(q_full, turn + 1, QUERIES, more)
            flag = tile_flag(
                flags_ptr, columns_ptr, sequences_ptr, tile, num_keys, more, OWN, PIECE, TN
            )
            wait_full(k_full, ahead, STAGES, more)
            scores = warpgroup_mma(
                q_s.index(next_q).reshape([64, D]),
                k_s.index(ahead % STAGES).reshape([TN, D]).permute((1, 0)),
                zero, use_acc=False, is_async=True,
            )  # fmt: skip
            w0, w1, w2, w3 = stored_words(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, flag, sub_row,
                (unit * 64 + offs) % BM, num_keys, BM, BN, PIECE, TN, WIDTH, ROWS,
            )  # fmt: skip
            s, acc, ds16 = warpgroup_mma_wait(0, deps=(scores, product, ds16))
            mbarrier.arrive(k_free.index(c % STAGES), count=1, pred=held)
        base = end
        lse = next_lse
        delta = next_delta
        acc = (acc * scale).to(dtype)
        batch = field(items, place, BATCH)
        head = field(items, place, HEAD) + (u - OWN)
        shift = field(items, place, SHIFT)
        row_begin = field(items, place, FIRST_ROW)
        row_end = field(items, place, LAST_ROW)
        row = first_row + shift
        live = (first_row >= 0) & (first_row < row_end) & (first_row + 64 > row_begin)
        # a box may reach over the end of the tensor, but not of a sequence, nor begin before it
        boxed = live & (first_row >= row_begin)
        if sequences_ptr is not None:
            boxed = boxed & (first_row + 64 <= row_end)
        if boxed:
            q_s.index(q_place).reshape([64, D]).store(acc)
            fence_async_shared()
            store_tile(dq_desc, q_s.index(q_place), batch, head, row, D)
        if live & (boxed == 0):
            store_rows(
                dq_desc, dq_ptr, acc, batch, head, row, row_begin + shift, row_end + shift, D
            )
        turn += 1
        if LATE:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(place), count=1)
            wait_full(ready, turn, QUERIES)
            item, first, unit, begin, num_keys = read_item(items, turn % QUERIES, OWN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_attention_dq(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, dq_ptr, terms_ptr, counter_ptr, head_map_ptr,
    rows_ptr, columns_ptr, flags_ptr, block_tiles_ptr, log_counts_ptr, tiles_ptr, sequences_ptr,
    seed_ptr, heads, group, groups, bundle, samples, stride_map, stride_rows, first_group,
    row_offset, num_queries, num_keys, num_sequences, packed, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr,
    NUM_UNITS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, HEADS_EACH: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items of NUM_UNITS x 64 rows, tiles of TN keys in rings of STAGES buffers.

    `terms` (B, H, Nq, 2): of every query its logsumexp in base 2, and rowsum(dout * out) less the
    gradient of the logsumexp.
    """
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [QUERIES * NUM_UNITS, 1, 1, 64, D], ROWS_LAYOUT)
    dout_s = gl.allocate_shared_memory(dtype, [QUERIES * NUM_UNITS, 1, 1, 64, D], ROWS_LAYOUT)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TN, D], ROWS_LAYOUT)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TN, D], ROWS_LAYOUT)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    items = gl.allocate_shared_memory(gl.int32, [QUERIES, 32], plain)
    ready = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(QUERIES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=NUM_UNITS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=NUM_UNITS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=NUM_UNITS)
    shared = (
        q_s, dout_s, k_s, v_s, items, ready, q_full, q_free, k_full, k_free, v_full, v_free
    )  # fmt: skip
    if NUM_UNITS == 1:
        gl.warp_specialize([
            (_consume, (
                0, dq_desc, dq_ptr, terms_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, heads, num_queries, scale,
                threshold, keep_scale, BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES,
                HEADS_EACH,
            )),
            (produce, (
                q_desc, k_desc, v_desc, dout_desc, shared, counter_ptr, head_map_ptr, rows_ptr,
                columns_ptr, sequences_ptr, heads, group, groups, bundle, samples, stride_map,
                stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences, packed,
                PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, HEADS_EACH,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                0, dq_desc, dq_ptr, terms_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, heads, num_queries, scale,
                threshold, keep_scale, BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES,
                HEADS_EACH,
            )),
            (_consume, (
                1, dq_desc, dq_ptr, terms_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, heads, num_queries, scale,
                threshold, keep_scale, BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES,
                HEADS_EACH,
            )),
            (produce, (
                q_desc, k_desc, v_desc, dout_desc, shared, counter_ptr, head_map_ptr, rows_ptr,
                columns_ptr, sequences_ptr, heads, group, groups, bundle, samples, stride_map,
                stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences, packed,
                PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, HEADS_EACH,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
