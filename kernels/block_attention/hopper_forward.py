"""block_attention forward on Hopper, in Gluon: a TMA warp feeds warpgroups of 64 rows each.

Programs stay, one or two a multiprocessor, and claim items of work from a counter: a group of units
of one head, the one with most tiles first, head by head as far as the L2 holds their keys. The
scores of a tile are multiplied beside the product of the tile before with its values, across items
too, and the softmax of one warpgroup runs beside the products of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.heads import shared_lists
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    HEAD,
    ITEM,
    LN2,
    LOG2E,
    ROWS_LAYOUT,
    bundle_size,
    dropout_keep,
    field,
    finish,
    load_rows,
    multiprocessors,
    rows_descriptor,
    rows_descriptor_type,
    select,
    sequence_tiles,
    store_rows,
    store_tile,
    stored_words,
    tile_columns,
    tile_counts,
    wait_free,
    wait_full,
    work_counter,
)
from sparse_layouts.kernels.block_attention.reference import dropout_threshold
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.triton_common import kept_scale, padded_head_dim

START, TILES = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.TILES)
UNITS = gl.constexpr(unit_schedule.UNITS)
BEGIN, END = gl.constexpr(unit_schedule.RUN_BEGIN), gl.constexpr(unit_schedule.RUN_END)
# fields of an item: what to add to a row of the mask for its query, the rows and keys there are
SHIFT, FIRST_ROW, LAST_ROW = gl.constexpr(18), gl.constexpr(19), gl.constexpr(20)
KEYS, FIRST_KEY, SEQUENCE = gl.constexpr(21), gl.constexpr(22), gl.constexpr(23)
INTEGERS = ["heads", "group", "groups", "bundle", "samples", "stride_map", "stride_rows"]
INTEGERS += ["first_group", "row_offset", "num_queries", "num_keys", "num_sequences", "threshold"]
INTEGERS += ["packed", "stride_lse"]


@gluon.jit
def _find(item, sequences_ptr, num_sequences, heads):
    """(sequence, head, group of rows) of an item: sequence by sequence, head by head, last rows
    first, which in a causal mask are the longest.
    """
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=W)
    passed = gl.zeros([32], gl.int32, W)
    for b in range(0, num_sequences, 32):
        mask = b + lane < num_sequences
        before = gl.load(sequences_ptr + (b + lane + 1) * 8, mask=mask, other=2147483647 // heads)
        passed += (before * heads <= item).to(gl.int32)
    sequence = gl.minimum(gl.sum(passed, 0), num_sequences - 1)
    row = sequences_ptr + sequence * 8
    before = gl.load(row)
    count = gl.maximum(gl.load(row + 8) - before, 1)
    rest = item - before * heads
    head = rest // count
    return sequence, head, gl.load(row + 1) + count - 1 - (rest - head * count)


@gluon.jit
def _claim(
    counter_ptr, rows_ptr, head_map_ptr, sequences_ptr, heads, groups, bundle, samples, stride_map,
    stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences, packed,
    HEADS_EACH: gl.constexpr,
):  # fmt: skip
    """The next item: whether there is one, its numbers, a lane each, and its row of the schedule.

    Within a bundle of samples (a head of the batch, or HEADS_EACH) the longest rows of all come
    first.
    """
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=W)
    item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if sequences_ptr is None:
        total = samples * groups
        at = gl.minimum(item, total - 1)
        size = bundle * groups
        b = at // size
        rest = at - b * size
        members = gl.minimum(bundle, samples - b * bundle)
        rank = rest // members
        sample = (b * bundle + rest - rank * members) * HEADS_EACH
        batch = sample // heads
        head = sample - batch * heads
        which = gl.load(head_map_ptr + batch * stride_map + head)
        row = which * stride_rows + first_group + rank
    else:
        total = gl.load(sequences_ptr + num_sequences * 8) * heads
        at = gl.maximum(gl.minimum(item, total - 1), 0)
        batch, head, place = _find(at, sequences_ptr, num_sequences, heads)
        which = gl.load(head_map_ptr + batch * stride_map + head)
        row = which * stride_rows + gl.minimum(place, stride_rows - 1)
    x = gl.load(rows_ptr + row * 16 + lane, mask=lane < 16, other=0)
    x = gl.where(lane == HEAD, head, x)
    if sequences_ptr is None:
        x = gl.where(lane == BATCH, batch, x)
        x = gl.where(lane == SEQUENCE, batch, x)
        x = gl.where(lane == SHIFT, -row_offset, x)
        x = gl.where(lane == FIRST_ROW, row_offset, x)
        x = gl.where(lane == LAST_ROW, row_offset + num_queries, x)
        x = gl.where(lane == KEYS, num_keys, x)
    else:
        own = sequences_ptr + batch * 8
        x = gl.where(lane == BATCH, gl.where(packed != 0, 0, batch), x)
        x = gl.where(lane == SEQUENCE, batch, x)
        x = gl.where(lane == SHIFT, gl.load(own + 2), x)
        x = gl.where(lane == FIRST_ROW, gl.load(own + 3), x)
        x = gl.where(lane == LAST_ROW, gl.load(own + 4), x)
        x = gl.where(lane == FIRST_KEY, gl.load(own + 5), x)
        x = gl.where(lane == KEYS, gl.load(own + 6), x)
    more = item < total
    return more, gl.where(lane == ITEM, gl.where(more, item, -1), x), row


@gluon.jit
def _pick(x, which: gl.constexpr):
    """A lane's number, to the producer itself."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    return gl.sum(gl.where(lane == which, x, 0), 0)


@gluon.jit
def _load_tiles(
    k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, begin, end, turn,
    batch, kv_head, first_key,
    PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of tiles `first + begin` .. `first + end - 1`."""
    SLOTS: gl.constexpr = TN // PIECE
    for j in range(begin, end):
        stage = (turn + j) % STAGES
        slot = (first + j) * SLOTS
        wait_free(k_free, turn + j, STAGES)
        mbarrier.expect(k_full.index(stage), TN * D * 2)
        for i in gl.static_range(SLOTS):
            row = first_key + gl.load(columns_ptr + slot + i) * PIECE
            load_rows(
                k_desc, k_s.index(stage), k_full.index(stage), batch, kv_head, row,
                PIECE, i * PIECE, D,
            )  # fmt: skip
        wait_free(v_free, turn + j, STAGES)
        mbarrier.expect(v_full.index(stage), TN * D * 2)
        for i in gl.static_range(SLOTS):
            row = first_key + gl.load(columns_ptr + slot + i) * PIECE
            load_rows(
                v_desc, v_s.index(stage), v_full.index(stage), batch, kv_head, row,
                PIECE, i * PIECE, D,
            )  # fmt: skip


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, items, ready, q_full, q_free, k_full, k_free, v_full,
    v_free, counter_ptr, head_map_ptr, rows_ptr, columns_ptr, sequences_ptr, heads, group, groups,
    bundle, samples, stride_map, stride_rows, first_group, row_offset, num_queries, num_keys,
    num_sequences, packed,
    PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr, NUM_UNITS: gl.constexpr,
    STAGES: gl.constexpr, QUERIES: gl.constexpr, HEADS_EACH: gl.constexpr,
):  # fmt: skip
    """The producer: claims an item ahead, hands it on, loads its queries and its tiles."""
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tile_turn = 0
    turn = 0
    more, x, row = _claim(
        counter_ptr, rows_ptr, head_map_ptr, sequences_ptr, heads, groups, bundle, samples,
        stride_map, stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences,
        packed, HEADS_EACH,
    )  # fmt: skip
    while more:
        batch = _pick(x, BATCH)
        head = _pick(x, HEAD)
        shift = _pick(x, SHIFT)
        first_key = _pick(x, FIRST_KEY)
        first = _pick(x, START)
        tiles = _pick(x, TILES)
        kv_head = head // group
        place = turn % QUERIES
        wait_free(q_free, turn, QUERIES)
        items.index(place).store(x)
        mbarrier.arrive(ready.index(place), count=1)
        mbarrier.expect(q_full.index(place), NUM_UNITS * 64 * D * 2)
        for u in gl.static_range(NUM_UNITS):
            if HEADS_EACH == 1:
                unit = gl.load(rows_ptr + row * 16 + UNITS + u)
                own_head = head
            else:
                unit = gl.load(rows_ptr + row * 16 + UNITS)
                own_head = head + u
            load_rows(
                q_desc, q_s.index(place * NUM_UNITS + u), q_full.index(place), batch, own_head,
                unit * 64 + shift, 64, 0, D,
            )  # fmt: skip
        some = gl.minimum(tiles, STAGES)
        _load_tiles(
            k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, 0, some,
            tile_turn, batch, kv_head, first_key, PIECE, TN, D, STAGES,
        )  # fmt: skip
        # the next item is claimed while the consumers are still busy with what is loaded
        more, next_x, row = _claim(
            counter_ptr, rows_ptr, head_map_ptr, sequences_ptr, heads, groups, bundle, samples,
            stride_map, stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences,
            packed, HEADS_EACH,
        )  # fmt: skip
        _load_tiles(
            k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, some,
            tiles, tile_turn, batch, kv_head, first_key, PIECE, TN, D, STAGES,
        )  # fmt: skip
        tile_turn += tiles
        turn += 1
        x = next_x
    wait_free(q_free, turn, QUERIES)
    items.index(turn % QUERIES).store(gl.full([32], -1, gl.int32, W))
    mbarrier.arrive(ready.index(turn % QUERIES), count=1)
    finish(counter_ptr)


@gluon.jit
def _pass_over(k_full, k_free, v_full, v_free, begin, end, STAGES: gl.constexpr):
    """Releases tiles that are for another warpgroup."""
    for turn in range(begin, end):
        wait_full(k_full, turn, STAGES)
        mbarrier.arrive(k_free.index(turn % STAGES), count=1)
        wait_full(v_full, turn, STAGES)
        mbarrier.arrive(v_free.index(turn % STAGES), count=1)


@gluon.jit
def _scores(
    s, w0, w1, w2, w3, flag, tile, sub_row, scale2, log_counts_ptr,
    PIECE: gl.constexpr, WIDTH: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Scores with -inf where nothing is stored, and the counts; scaled only if SCALED."""
    TN: gl.constexpr = s.shape[1]
    LAYOUT: gl.constexpr = s.type.layout
    if SCALED:
        s = s * scale2
    if flag != 0:
        if log_counts_ptr is not None:
            counts = tile_counts(log_counts_ptr, tile, sub_row, PIECE, TN, WIDTH, LAYOUT)
            if SCALED:
                s += counts
            else:
                s += counts / scale2
        s = select(s, w0, w1, w2, w3, -float("inf"))
    return s


@gluon.jit
def _softmax(s, peak, norm, rate):
    """Probabilities of a tile, up to the norm; the peak and the norm so far; what older ones are
    multiplied by.
    """
    new_peak = gl.maximum(peak, gl.max(s, 1) * rate)
    # a row that has met nothing yet keeps -inf, and must not subtract it from itself
    shift = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    p = gl.exp2(s * rate - shift[:, None])
    decay = gl.exp2(peak - shift)
    return p, new_peak, norm * decay + gl.sum(p, 1), decay


@gluon.jit
def _reaches(columns_ptr, tile, num_keys, pred, PIECE: gl.constexpr, TN: gl.constexpr):
    """4, as a flag, where a tile reaches over the keys of its sequence, else 0."""
    SLOTS: gl.constexpr = TN // PIECE
    over = num_keys < num_keys
    for i in gl.static_range(SLOTS):
        column = gl.load(columns_ptr + tile * SLOTS + i, mask=pred, other=-1)
        over = over | ((column + 1) * PIECE > num_keys)
    return over.to(gl.int32) * 4


@gluon.jit
def _cut_values(buffer, columns_ptr, tile, num_keys, PIECE: gl.constexpr):
    """Zeros in the rows of a tile of values that are no keys of the sequence: 0 * NaN is NaN."""
    TN: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, TN, layout=gl.SliceLayout(1, layout))
    keys = gl.load(columns_ptr + tile * (TN // PIECE) + rows // PIECE) * PIECE + rows % PIECE
    v = buffer.load(layout)
    buffer.store(gl.where((keys < num_keys)[:, None], v, gl.zeros([TN, D], v.dtype, layout)))
    fence_async_shared()


@gluon.jit
def _read(items, place, OWN: gl.constexpr):
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
def _flag(
    flags_ptr, columns_ptr, sequences_ptr, tile, num_keys, pred,
    OWN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr,
):  # fmt: skip
    """0 where a warpgroup needs no mask for a tile."""
    flag = (gl.load(flags_ptr + tile, mask=pred, other=0) >> (2 * OWN)) & 3
    if sequences_ptr is not None:
        flag = flag | _reaches(columns_ptr, tile, num_keys, pred, PIECE, TN)
    return flag


@gluon.jit
def _consume(
    u: gl.constexpr, out_desc, out_ptr, lse_ptr, q_s, k_s, v_s, items, ready, q_full, q_free,
    k_full, k_free, v_full, v_free, columns_ptr, flags_ptr, block_tiles_ptr, log_counts_ptr,
    tiles_ptr, sequences_ptr, seed_ptr, heads, stride_lse, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr,
    NUM_UNITS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, SCALED: gl.constexpr,
    HEADS_EACH: gl.constexpr,
):  # fmt: skip
    """Warpgroup u: 64 rows an item. It holds the scores of a tile when its turn begins, and
    multiplies those of the next, of this item or the next one, beside the tile's own product.
    """
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
    dtype: gl.constexpr = out_desc.dtype
    scale2 = scale * LOG2E
    rate = scale2
    if SCALED:
        rate = 1.0
    zero = gl.zeros([64, TN], gl.float32, SL)
    offs = gl.arange(0, 64, layout=ROWS)
    sub_row = OWN * SUB + offs // BM if BM < 64 else OWN + offs * 0
    seed = 0
    if seed_ptr is not None:
        seed = gl.load(seed_ptr)
    turn = 0
    base = 0
    wait_full(ready, 0, QUERIES)
    item, first, unit, begin, num_keys = _read(items, 0, OWN)
    s = zero
    flag = 0
    w0 = gl.full([64], -1, gl.int32, ROWS)
    w1 = w0
    w2 = w0
    w3 = w0
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
            _pass_over(k_full, k_free, v_full, v_free, base, start, STAGES)
            flag = _flag(flags_ptr, columns_ptr, sequences_ptr, tile, num_keys, True, OWN, PIECE, TN)
            w0, w1, w2, w3 = stored_words(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, flag, sub_row,
                (first_row + offs) % BM, num_keys, BM, BN, PIECE, TN, WIDTH, ROWS,
            )  # fmt: skip
            wait_full(q_full, turn, QUERIES)
            wait_full(k_full, start, STAGES)
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
            s = _scores(
                s, w0, w1, w2, w3, flag, tile, sub_row, scale2, log_counts_ptr,
                PIECE, WIDTH, SCALED,
            )  # fmt: skip
            p, peak, norm, decay = _softmax(s, peak, norm, rate)
            if seed_ptr is not None:
                keep = dropout_keep(
                    seed, threshold, field(items, place, SEQUENCE),
                    field(items, place, HEAD) + (u - OWN), (first_row + offs)[:, None],
                    tile_columns(columns_ptr, tile, PIECE, TN, SL)[None, :],
                )  # fmt: skip
                p = gl.where(keep, p, 0.0)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OL))[:, None]
            p16 = gl.convert_layout(p.to(dtype), PL)
            if (not LATE) & (c == start):
                # the output of the item before this one has left its buffer by now
                tma.store_wait(0)
                mbarrier.arrive(q_free.index((turn + 1) % QUERIES), count=1, pred=turn > 0)
            wait_full(v_full, c, STAGES)
            values = v_s.index(c % STAGES).reshape([TN, D])
            if sequences_ptr is not None:
                if _reaches(columns_ptr, tile, num_keys, True, PIECE, TN) != 0:
                    _cut_values(values, columns_ptr, tile, num_keys, PIECE)
            product = warpgroup_mma(p16, values, acc, is_async=True)
            ahead = c + 1
            tile += 1
            held = c < last
            more = c < last
            if c == last:
                held = end == last + 1
                if last + 1 < end:
                    # passed over before the next item is waited for, which comes behind them
                    warpgroup_mma_wait(0, deps=(product, p16))
                    mbarrier.arrive(v_free.index(last % STAGES), count=1)
                    _pass_over(k_full, k_free, v_full, v_free, last + 1, end, STAGES)
                if LATE:
                    # once more the scores of a tile that is there, for nothing
                    ahead = last
                else:
                    wait_full(ready, turn + 1, QUERIES)
                    next_place = (turn + 1) % QUERIES
                    next_q = next_place * NUM_UNITS + u
                    item, first, unit, begin, num_keys = _read(items, next_place, OWN)
                    more = item >= 0
                    ahead = end + begin
                    tile = first + begin
                    if begin > 0:
                        warpgroup_mma_wait(0, deps=(product, p16))
                        mbarrier.arrive(v_free.index(last % STAGES), count=1, pred=held)
                        held = False
                        _pass_over(k_full, k_free, v_full, v_free, end, ahead, STAGES)
                    wait_full(q_full, turn + 1, QUERIES, more)
            flag = _flag(flags_ptr, columns_ptr, sequences_ptr, tile, num_keys, more, OWN, PIECE, TN)
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
            # Both at once: ptxas moves a wait up to the last branch before it, so that one for the
            # product alone, behind the softmax, would stand in front of it anyway.
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
        if lse_ptr is not None:
            rows = first_row + offs
            lse = gl.where(empty, -float("inf"), (peak + gl.log2(norm)) * LN2)
            own = lse_ptr + (batch * heads + head).to(gl.int64) * stride_lse + shift
            gl.store(own + rows, lse, mask=(rows >= row_begin) & (rows < row_end))
        acc = acc * gl.convert_layout(keep_scale / norm, gl.SliceLayout(1, OL))[:, None]
        row = first_row + shift
        live = (first_row >= 0) & (first_row < row_end) & (first_row + 64 > row_begin)
        # a box may reach over the end of the tensor, but not of a sequence, nor begin before it
        boxed = live & (first_row >= row_begin)
        if sequences_ptr is not None:
            boxed = boxed & (first_row + 64 <= row_end)
        if LATE:
            boxed = boxed & (turn < 0)  # there is no buffer to store from
        elif boxed:
            q_s.index(q_place).reshape([64, D]).store(acc.to(dtype))
            fence_async_shared()
            store_tile(out_desc, q_s.index(q_place), batch, head, row, D)
        if live & (boxed == 0):
            store_rows(
                out_desc, out_ptr, acc.to(dtype), batch, head, row, row_begin + shift,
                row_end + shift, D,
            )  # fmt: skip
        turn += 1
        if LATE:
            mbarrier.arrive(q_free.index(place), count=1)
            wait_full(ready, turn, QUERIES)
            item, first, unit, begin, num_keys = _read(items, turn % QUERIES, OWN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS)
def attention_forward(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, counter_ptr, head_map_ptr, rows_ptr,
    columns_ptr, flags_ptr, block_tiles_ptr, log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr,
    heads, group, groups, bundle, samples, stride_map, stride_rows, first_group, row_offset,
    num_queries, num_keys, num_sequences, packed, stride_lse, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr,
    NUM_UNITS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, SCALED: gl.constexpr,
    HEADS_EACH: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items of NUM_UNITS x 64 rows, tiles of TN keys in rings of STAGES buffers."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [QUERIES * NUM_UNITS, 1, 1, 64, D], ROWS_LAYOUT)
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
    if NUM_UNITS == 1:
        gl.warp_specialize([
            (_consume, (
                0, out_desc, out_ptr, lse_ptr, q_s, k_s, v_s, items, ready, q_full, q_free,
                k_full, k_free, v_full, v_free, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, heads, stride_lse, scale,
                threshold, keep_scale, BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, SCALED,
                HEADS_EACH,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_s, k_s, v_s, items, ready, q_full, q_free, k_full,
                k_free, v_full, v_free, counter_ptr, head_map_ptr, rows_ptr, columns_ptr,
                sequences_ptr, heads, group, groups, bundle, samples, stride_map, stride_rows,
                first_group, row_offset, num_queries, num_keys, num_sequences, packed,
                PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, HEADS_EACH,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                0, out_desc, out_ptr, lse_ptr, q_s, k_s, v_s, items, ready, q_full, q_free,
                k_full, k_free, v_full, v_free, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, heads, stride_lse, scale,
                threshold, keep_scale, BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, SCALED,
                HEADS_EACH,
            )),
            (_consume, (
                1, out_desc, out_ptr, lse_ptr, q_s, k_s, v_s, items, ready, q_full, q_free,
                k_full, k_free, v_full, v_free, columns_ptr, flags_ptr, block_tiles_ptr,
                log_counts_ptr, tiles_ptr, sequences_ptr, seed_ptr, heads, stride_lse, scale,
                threshold, keep_scale, BM, BN, PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, SCALED,
                HEADS_EACH,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_s, k_s, v_s, items, ready, q_full, q_free, k_full,
                k_free, v_full, v_free, counter_ptr, head_map_ptr, rows_ptr, columns_ptr,
                sequences_ptr, heads, group, groups, bundle, samples, stride_map, stride_rows,
                first_group, row_offset, num_queries, num_keys, num_sequences, packed,
                PIECE, TN, D, NUM_UNITS, STAGES, QUERIES, HEADS_EACH,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


class Tuning(NamedTuple):
    """How a head size is worked on: warpgroups a program, keys a tile, buffers of keys and values
    and of queries, programs a multiprocessor, registers a thread at the start and, with two
    warpgroups, of the second one.
    """

    units: int
    keys: int
    stages: int
    queries: int
    programs: int
    max_registers: int
    registers: int = 240


# Padded head size: tuning. Measured on an H200 and an H100, 2026-11-26, in bf16 on local-stride
# masks (B 2, H 32, N 8192, D 128; B 4, H 16, N 4096, D 64), dense causal, BigBird (N 4096, D 64)
# and random blocks of 16 and 32 (N 8192, D 128). Tiles of 64 keys take 1.15 to 1.25 times as long
# at D 128; at D 64 two programs of one warpgroup and 128 keys took 139 us on local-stride and 93 on
# BigBird, three of 64 keys 132 and 106, one of two warpgroups 147 and 107. D 256 is not tuned.
TUNINGS = {
    64: Tuning(1, 128, 2, 2, 2, 128),
    128: Tuning(2, 128, 2, 2, 1, 168),
    256: Tuning(2, 64, 2, 1, 1, 168),
}
# Keys and values of the heads that are worked on together; half of an H200's L2.
L2_BYTES = 32_000_000


def tuning_of(head_dim: int) -> Tuning:
    """The tuning of a head size, which is padded to 64, 128 or 256."""
    return TUNINGS[max(64, padded_head_dim(head_dim))]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as `reference.block_attention` defines them, in bf16 or fp16, without a bias.

    After FlashAttention-3 (Shah et al., arXiv 2407.08608).
    """
    assert bias is None, "its requirement excludes a bias"
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    d = max(64, padded_head_dim(max(head_dim, value_dim)))
    tuning = TUNINGS[d]
    out = torch.empty_like(q) if value_dim == head_dim else q.new_empty(*q.shape[:-1], value_dim)
    lse = torch.empty(batch, heads, nq, device=q.device, dtype=torch.float32)
    if sequences is not None or lse.numel() == 0 or pattern.num_blocks == 0 or value_dim == 0:
        out.zero_()
        lse.fill_(-math.inf)
        if lse.numel() == 0 or pattern.num_blocks == 0 or value_dim == 0:
            return out, lse
    group = heads // kv_heads
    paired = tuning.units == 2 and sequences is None and group % 2 == 0
    paired = paired and shared_lists(pattern, heads, 2)
    units = 1 if paired else tuning.units
    schedule = unit_schedule.unit_schedule(pattern, units, tuning.keys)
    groups = schedule.rows.shape[1]
    first = 0 if sequences is not None else (m - nq) // (units * 64)
    piece = min(bn, tuning.keys)
    head_map = head_map.contiguous()
    dropout = seed is not None and dropout_p > 0
    samples = batch * heads // (2 if paired else 1)
    table, num_sequences, packed = None, 0, 0
    items = samples * (groups - first)
    if sequences is not None:
        num_sequences, packed = sequences.num_sequences, int(sequences.packed)
        table = torch.empty(num_sequences + 1, 8, device=q.device, dtype=torch.int32)
        sequence_tiles[(1,)](
            sequences.q_starts,
            sequences.q_lens,
            sequences.k_starts,
            sequences.k_lens,
            table,
            num_sequences,
            nq,
            nk,
            m,
            TILE=units * 64,
            BLOCK=128,
            num_warps=4,
        )
        tiles = nq // (units * 64) + 2
        items = heads * (tiles * batch if not packed else tiles + 2 * num_sequences)
    programs = min(multiprocessors(q.device) * tuning.programs, items)
    attention_forward[(programs,)](
        rows_descriptor(q, 64),
        rows_descriptor(k, piece),
        rows_descriptor(v, piece),
        rows_descriptor(out, 64),
        out,
        lse,
        work_counter(q.device),
        head_map,
        schedule.heaviest_first if first == 0 and sequences is None else schedule.rows,
        schedule.columns,
        schedule.flags,
        schedule.block_tiles,
        schedule.log_counts,
        pattern.tiles,
        table,
        seed if dropout else None,
        heads,
        group,
        groups - first,
        bundle_size(samples, 2 * nk * d * q.element_size() // group, L2_BYTES),
        samples,
        0 if head_map.shape[0] == 1 else head_map.stride(0),
        groups,
        first,
        m - nq,
        nq,
        nk,
        num_sequences,
        packed,
        nq,
        scale,
        dropout_threshold(dropout_p),
        kept_scale(dropout_p) if dropout else 1.0,
        BM=bm,
        BN=bn,
        PIECE=piece,
        TN=tuning.keys,
        D=d,
        NUM_UNITS=tuning.units,
        STAGES=tuning.stages,
        QUERIES=tuning.queries,
        SCALED=scale <= 0,
        HEADS_EACH=2 if paired else 1,
        REGISTERS=tuning.registers,
        num_warps=4,
        maxnreg=tuning.max_registers,
    )
    return out, lse
