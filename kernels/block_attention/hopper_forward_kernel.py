"""block_attention forward on Hopper, in Gluon: a TMA warp feeds warpgroups of 64 rows each.

Programs stay, one or two a multiprocessor, and claim items of work from a counter: a group of units
of one head, the one with most tiles first, head by head as far as the L2 holds their keys. The
scores of a tile are multiplied beside the product of the tile before with its values, across items
too, and the softmax of one warpgroup runs beside the products of another.
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
    LN2,
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
from sparse_layouts.kernels.block_attention.hopper_forward_load import produce
from sparse_layouts.kernels.block_attention.hopper_rows import (
    cut_keys,
    reaches,
    read_item,
    tile_flag,
)
from sparse_layouts.kernels.hopper_common import field, wait_full

TILES, END = gl.constexpr(unit_schedule.TILES), gl.constexpr(unit_schedule.RUN_END)
INTEGERS = ["heads", "group", "groups", "bundle", "samples", "stride_map", "stride_rows"]
INTEGERS += ["first_group", "row_offset", "num_queries", "num_keys", "num_sequences", "threshold"]
INTEGERS += ["packed", "stride_lse", "wants_lse"]


@gluon.jit
def _scores(
    s, w0, w1, w2, w3, flag, tile, sub_row, scale2, log_counts_ptr,
    PIECE: gl.constexpr, WIDTH: gl.constexpr, SCALED: gl.constexpr, EIGHT: gl.constexpr,
):  # fmt: skip
    """Scores with -inf where nothing is stored, and the counts; scaled only if SCALED. In 8 bits
    those of a tile with a mask are scaled already.
    """
    TN: gl.constexpr = s.shape[1]
    LAYOUT: gl.constexpr = s.type.layout
    if SCALED and not EIGHT:
        s = s * scale2
    if flag != 0:
        if log_counts_ptr is not None:
            counts = tile_counts(log_counts_ptr, tile, sub_row, PIECE, TN, WIDTH, LAYOUT)
            if SCALED or EIGHT:
                s += counts
            else:
                s += counts / scale2
        s = select(s, w0, w1, w2, w3, -float("inf"))
    return s


@gluon.jit
def _softmax(s, peak, norm, rate, BITS: gl.constexpr):
    """Probabilities of a tile, up to the norm and times 2 ** BITS; the peak and the norm so far;
    what older ones are multiplied by. `rate` is a number, with BITS one of each row.
    """
    new_peak = gl.maximum(peak, gl.max(s, 1) * rate)
    # a row that has met nothing yet keeps -inf, and must not subtract it from itself
    shift = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    if BITS == 0:
        p = gl.exp2(s * rate - shift[:, None])
    else:
        p = gl.exp2(s * rate[:, None] - (shift - BITS)[:, None])
    decay = gl.exp2(peak - shift)
    return p, new_peak, norm * decay + gl.sum(p, 1), decay


@gluon.jit
def _wait(product, factors, EIGHT: gl.constexpr):
    """Until a product of factors in registers is there."""
    if EIGHT:
        warpgroup_mma_wait(0, deps=(product,))
    else:
        warpgroup_mma_wait(0, deps=(product, factors))


@gluon.jit
def _row_rate(
    q_scale_ptr, items, place, own: gl.constexpr, rows, heads, num_queries, scale2, pred,
    ROWS_PER_SCALE: gl.constexpr,
):  # fmt: skip
    """What scores of rows of the mask are scaled by, but for the keys' part: [64]."""
    query = rows + field(items, place, SHIFT)
    sample = field(items, place, BATCH) * heads + field(items, place, HEAD) + own
    offs = sample * gl.cdiv(num_queries, ROWS_PER_SCALE) + query // ROWS_PER_SCALE
    inside = (query >= 0) & (query < num_queries) & pred
    return gl.load(q_scale_ptr + offs, mask=inside, other=1.0) * scale2


@gluon.jit
def _consume(
    u: gl.constexpr, out_desc, out_ptr, lse_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
    log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, q_scale_ptr, v_scale_ptr, heads, group,
    num_queries, stride_lse, wants_lse, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr,
    NUM_UNITS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, SCALED: gl.constexpr,
    HEADS_EACH: gl.constexpr, ROWS_PER_SCALE: gl.constexpr,
):  # fmt: skip
    """Warpgroup u: 64 rows an item. It holds the scores of a tile when its turn begins, and
    multiplies those of the next, of this item or the next one, beside the tile's own product.
    """
    q_s, k_s, v_s, items, ready, q_full, q_free, k_full, k_free, v_full, v_free = shared[:11]
    # In 8 bits scores have a scale of the row and one of the tile, and the result has its own
    # buffer. Probabilities are at most 1, e4m3 reaches to 448: they are rounded as 2 ** 8 times as
    # much, which their sum is too.
    EIGHT: gl.constexpr = q_scale_ptr is not None
    BITS: gl.constexpr = 8 if EIGHT else 0
    BYTES: gl.constexpr = 1 if EIGHT else 2
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TN, 32 // BYTES])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 // BYTES])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 4 // BYTES)
    ROWS: gl.constexpr = gl.SliceLayout(1, SL)
    SUB: gl.constexpr = 64 // BM if BM < 64 else 1
    # which of the schedule's units this is: warpgroups with a head each share one
    OWN: gl.constexpr = u if HEADS_EACH == 1 else 0
    WIDTH: gl.constexpr = (NUM_UNITS if HEADS_EACH == 1 else 1) * SUB
    # with one buffer for queries the next item's scores have to wait until this one is stored
    LATE: gl.constexpr = QUERIES == 1
    dtype: gl.constexpr = out_desc.dtype
    factor: gl.constexpr = gl.float8e4nv if EIGHT else dtype
    scale2 = scale * LOG2E
    rate = scale2
    if SCALED:
        rate = 1.0
    zero = gl.zeros([64, TN], gl.float32, SL)
    zero_sum = gl.zeros([64, D], gl.float32, OL)
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
    row_rate = gl.full([64], 1.0, gl.float32, ROWS)
    tile_rate = 1.0
    if EIGHT:
        rate = row_rate
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
            wait_full(q_full, turn, QUERIES)
            wait_full(k_full, start, STAGES)
            if EIGHT:
                row_rate = _row_rate(
                    q_scale_ptr, items, place, u - OWN, first_row + offs, heads, num_queries,
                    scale2, True, ROWS_PER_SCALE,
                )  # fmt: skip
                tile_rate = field(shared[11], start % STAGES, 0)
            s = warpgroup_mma(
                q_s.index(q_place).reshape([64, D]),
                k_s.index(start % STAGES).reshape([TN, D]).permute((1, 0)),
                zero, use_acc=False,
            )  # fmt: skip
            mbarrier.arrive(k_free.index(start % STAGES), count=1)
        peak = gl.full([64], -float("inf"), gl.float32, ROWS)
        norm = gl.zeros([64], gl.float32, ROWS)
        acc = gl.zeros([64, D], gl.float32, OL)
        next_q = q_place
        for c in range(start, last + 1):
            if EIGHT:
                rate = row_rate * tile_rate
                scaled = flag != 0
                if SCALED:
                    scaled = flag == flag
                if scaled:
                    # before the mask: what a row does not attend to may have a scale that is NaN
                    s = s * rate[:, None]
                    rate = gl.full([64], 1.0, gl.float32, ROWS)
            s = _scores(
                s, w0, w1, w2, w3, flag, tile, sub_row, scale2, log_counts_ptr, PIECE, WIDTH,
                SCALED, EIGHT,
            )  # fmt: skip
            p, peak, norm, decay = _softmax(s, peak, norm, rate, BITS)
            if seed_ptr is not None:
                keep = dropout_keep(
                    seed, threshold, field(items, place, SEQUENCE),
                    field(items, place, HEAD) + (u - OWN), (first_row + offs)[:, None],
                    tile_columns(columns_ptr, tile, PIECE, TN, SL)[None, :],
                )  # fmt: skip
                p = gl.where(keep, p, 0.0)
            decay = gl.convert_layout(decay, gl.SliceLayout(1, OL))[:, None]
            if not EIGHT:
                acc = acc * decay
            p16 = gl.convert_layout(p.to(factor), PL)
            if (not LATE) & (c == start):
                # the output of the item before this one has left its buffer by now
                tma.store_wait(0)
                mbarrier.arrive(q_free.index((turn + 1) % QUERIES), count=1, pred=turn > 0)
            wait_full(v_full, c, STAGES)
            if EIGHT:
                values = v_s.index(c % STAGES).reshape([D, TN]).permute((1, 0))
            else:
                values = v_s.index(c % STAGES).reshape([TN, D])
            if sequences_ptr is not None:
                if reaches(columns_ptr, tile, num_keys, True, PIECE, TN) != 0:
                    cut_keys(values, columns_ptr, tile, num_keys, PIECE)
            # In 8 bits tensor cores keep some 14 bits of the largest when they add up, which over
            # thousands of keys would show: a tile's sum starts from 0.
            if EIGHT:
                product = warpgroup_mma(p16, values, zero_sum, use_acc=False, is_async=True)
            else:
                product = warpgroup_mma(p16, values, acc, is_async=True)
            ahead = c + 1
            tile += 1
            held = c < last
            more = c < last
            if c == last:
                held = end == last + 1
                if last + 1 < end:
                    # passed over before the next item is waited for, which comes behind them
                    _wait(product, p16, EIGHT)
                    mbarrier.arrive(v_free.index(last % STAGES), count=1)
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
                    ahead = end + begin
                    tile = first + begin
                    if begin > 0:
                        _wait(product, p16, EIGHT)
                        mbarrier.arrive(v_free.index(last % STAGES), count=1, pred=held)
                        held = False
                        pass_over(k_full, k_free, v_full, v_free, end, ahead, STAGES)
                    wait_full(q_full, turn + 1, QUERIES, more)
                    if EIGHT:
                        row_rate = _row_rate(
                            q_scale_ptr, items, next_place, u - OWN, unit * 64 + offs, heads,
                            num_queries, scale2, more, ROWS_PER_SCALE,
                        )  # fmt: skip
            flag = tile_flag(
                flags_ptr, columns_ptr, sequences_ptr, tile, num_keys, more, OWN, PIECE, TN
            )
            wait_full(k_full, ahead, STAGES, more)
            if EIGHT:
                tile_rate = field(shared[11], ahead % STAGES, 0)
            scores = warpgroup_mma(
                q_s.index(next_q).reshape([64, D]),
                k_s.index(ahead % STAGES).reshape([TN, D]).permute((1, 0)),
                zero, use_acc=False, is_async=True,
            )  # fmt: skip
            w0, w1, w2, w3 = stored_words(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, flag, sub_row,
                (unit * 64 + offs) % BM, num_keys, BM, BN, PIECE, TN, WIDTH, ROWS,
            )  # fmt: skip
            # Both at once: ptxas moves a wait up to the last branch before it, so that one for the
            # product alone, behind the softmax, would stand in front of it anyway.
            if EIGHT:
                # Triton knows no factors of 8 bits here; no later instruction writes to theirs
                s, tile_sum = warpgroup_mma_wait(0, deps=(scores, product))
                acc = acc * decay + tile_sum
            else:
                s, acc, p16 = warpgroup_mma_wait(0, deps=(scores, product, p16))
            mbarrier.arrive(v_free.index(c % STAGES), count=1, pred=held)
            mbarrier.arrive(k_free.index(ahead % STAGES), count=1, pred=more)
        base = end
        empty = norm == 0
        norm = gl.where(empty, 1.0, norm)
        batch = field(items, place, BATCH)
        head = field(items, place, HEAD) + (u - OWN)
        shift = field(items, place, SHIFT)
        row_begin = field(items, place, FIRST_ROW)
        row_end = field(items, place, LAST_ROW)
        if wants_lse != 0:
            rows = first_row + offs
            lse = gl.where(empty, -float("inf"), (peak + gl.log2(norm) - BITS) * LN2)
            own = lse_ptr + (batch * heads + head).to(gl.int64) * stride_lse + shift
            gl.store(own + rows, lse, mask=(rows >= row_begin) & (rows < row_end))
        acc = acc * gl.convert_layout(keep_scale / norm, gl.SliceLayout(1, OL))[:, None]
        if EIGHT:
            columns = gl.arange(0, D, layout=gl.SliceLayout(0, OL))
            own = (batch * (heads // group) + head // group) * out_desc.shape[3] + columns
            there = columns < out_desc.shape[3]
            acc = acc * gl.load(v_scale_ptr + own, mask=there, other=0.0)[None, :]
            acc = gl.where(gl.convert_layout(empty, gl.SliceLayout(1, OL))[:, None], 0.0, acc)
        row = first_row + shift
        live = (first_row >= 0) & (first_row < row_end) & (first_row + 64 > row_begin)
        # a box may reach over the end of the tensor, but not of a sequence, nor begin before it
        boxed = live & (first_row >= row_begin)
        if sequences_ptr is not None:
            boxed = boxed & (first_row + 64 <= row_end)
        if LATE:
            boxed = boxed & (turn < 0)  # there is no buffer to store from
        elif boxed:
            if EIGHT:
                room = shared[12].index(u)
            else:
                room = q_s.index(q_place)
            room.reshape([64, D]).store(acc.to(dtype))
            fence_async_shared()
            store_tile(out_desc, room, batch, head, row, D)
        if live & (boxed == 0):
            store_rows(
                out_desc, out_ptr, acc.to(dtype), batch, head, row, row_begin + shift,
                row_end + shift, D,
            )  # fmt: skip
        turn += 1
        if LATE:
            mbarrier.arrive(q_free.index(place), count=1)
            wait_full(ready, turn, QUERIES)
            item, first, unit, begin, num_keys = read_item(items, turn % QUERIES, OWN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_attention_forward(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, counter_ptr, head_map_ptr, rows_ptr,
    columns_ptr, flags_ptr, block_tiles_ptr, log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr,
    q_scale_ptr, k_scale_ptr, v_scale_ptr, heads, group, groups, bundle, samples, stride_map,
    stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences, packed, stride_lse,
    wants_lse, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr,
    NUM_UNITS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, SCALED: gl.constexpr,
    HEADS_EACH: gl.constexpr, REGISTERS: gl.constexpr, ROWS_PER_SCALE: gl.constexpr,
):  # fmt: skip
    """Items of NUM_UNITS x 64 rows, tiles of TN keys in rings of STAGES buffers.

    With scales, q, k and v are of 8 bits, v by column.
    """
    EIGHT: gl.constexpr = q_scale_ptr is not None
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [QUERIES * NUM_UNITS, 1, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TN, D], k_desc.layout)
    if EIGHT:
        v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, D, TN], v_desc.layout)
    else:
        v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TN, D], v_desc.layout)
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
    shared = (q_s, k_s, v_s, items, ready, q_full, q_free, k_full, k_free, v_full, v_free)
    if EIGHT:
        tile_rates = gl.allocate_shared_memory(gl.float32, [STAGES, 32], plain)
        out_s = gl.allocate_shared_memory(out_desc.dtype, [NUM_UNITS, 1, 1, 64, D], out_desc.layout)
        shared = shared + (tile_rates, out_s)
    if NUM_UNITS == 1:
        gl.warp_specialize([
            (_consume, (
                0, out_desc, out_ptr, lse_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, q_scale_ptr, v_scale_ptr, heads,
                group, num_queries, stride_lse, wants_lse, scale, threshold, keep_scale,
                BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, SCALED, HEADS_EACH,
                ROWS_PER_SCALE,
            )),
            (produce, (
                q_desc, k_desc, v_desc, shared, counter_ptr, head_map_ptr, rows_ptr, columns_ptr,
                sequences_ptr, k_scale_ptr, heads, group, groups, bundle, samples, stride_map,
                stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences, packed,
                PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, HEADS_EACH, ROWS_PER_SCALE,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                0, out_desc, out_ptr, lse_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, q_scale_ptr, v_scale_ptr, heads,
                group, num_queries, stride_lse, wants_lse, scale, threshold, keep_scale,
                BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, SCALED, HEADS_EACH,
                ROWS_PER_SCALE,
            )),
            (_consume, (
                1, out_desc, out_ptr, lse_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, q_scale_ptr, v_scale_ptr, heads,
                group, num_queries, stride_lse, wants_lse, scale, threshold, keep_scale,
                BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, SCALED, HEADS_EACH,
                ROWS_PER_SCALE,
            )),
            (produce, (
                q_desc, k_desc, v_desc, shared, counter_ptr, head_map_ptr, rows_ptr, columns_ptr,
                sequences_ptr, k_scale_ptr, heads, group, groups, bundle, samples, stride_map,
                stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences, packed,
                PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, HEADS_EACH, ROWS_PER_SCALE,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
