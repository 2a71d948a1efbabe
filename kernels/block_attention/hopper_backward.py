"""block_attention backward on Hopper, in Gluon: five products, every gradient added up in one order.

By column, for dk and dv: an item is two units of 64 keys, a warpgroup each, over the stream of
queries that either attends to. The gradient of the scores, which dq needs too, goes once through
global memory, in the operands' dtype. By row, for dq: it is read again, times the keys. One launch
works on the columns of one share of the heads and on the rows of the share before, so that the
workspace is bounded and the reading hides behind the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.heads import shared_lists
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    HEAD,
    ITEM,
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
    store_rows,
    store_tile,
    stored_words,
    tile_counts,
    wait_free,
    wait_full,
    work_counter,
)
from sparse_layouts.kernels.block_attention.reference import dropout_threshold
from sparse_layouts.kernels.block_attention.triton_common import kept_scale, padded_head_dim

START, TILES = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.TILES)
OFFSET, UNITS = gl.constexpr(unit_schedule.OFFSET), gl.constexpr(unit_schedule.UNITS)
BEGIN, END = gl.constexpr(unit_schedule.RUN_BEGIN), gl.constexpr(unit_schedule.RUN_END)
DEAD = gl.constexpr(unit_schedule.DEAD)
# fields of an item: by column or by row; the first and the last query head of a key head; the first
# place in the workspace; which buffers hold the keys
KIND, OPENS, CLOSES = gl.constexpr(18), gl.constexpr(19), gl.constexpr(20)
PLACE, KEYS = gl.constexpr(21), gl.constexpr(22)
BY_COLUMN, BY_ROW = gl.constexpr(0), gl.constexpr(1)
# two warpgroups; two sets of buffers for their keys, in a pass by row four for the tiles
NUM_UNITS = gl.constexpr(2)
TERMS_LAYOUT = gl.constexpr(
    gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
)
INTEGERS = ["heads", "group", "column_groups", "first_column", "column_samples", "bundle"]
INTEGERS += ["row_groups", "stride_rows", "first_group", "first_row", "row_samples", "stride_map"]
INTEGERS += ["column_slot", "row_slot", "places", "units", "row_offset", "num_queries", "num_keys"]
INTEGERS += ["num_rows", "threshold"]


@triton.jit(do_not_specialize=["heads", "num_queries", "row_offset", "units", "value_dim"])
def attention_unit_terms(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, terms_ptr,
    stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_lb, stride_lh, stride_lm, stride_db, stride_dh, stride_dm,
    heads, num_queries, row_offset, units, value_dim, DV: tl.constexpr,
):  # fmt: skip
    """Of a unit's 64 rows: lse in base 2, then rowsum(dout * out) - dlse.

    A row without entries, or without a query, has lse +inf, so that exp2 of anything less gives 0.
    """
    pid = tl.program_id(0)
    unit = pid % units
    head = pid // units % heads
    batch = (pid // units // heads).to(tl.int64)
    query = unit * 64 + tl.arange(0, 64) - row_offset
    mask_m = (query >= 0) & (query < num_queries)
    query64, head64 = query.to(tl.int64), head.to(tl.int64)
    offs_d = tl.arange(0, DV)
    mask = mask_m[:, None] & (offs_d < value_dim)[None, :]
    out_ptrs = out_ptr + batch * stride_ob + head64 * stride_oh + query64[:, None] * stride_om
    dout_ptrs = dout_ptr + batch * stride_gb + head64 * stride_gh + query64[:, None] * stride_gm
    out = tl.load(out_ptrs + (offs_d * stride_od)[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptrs + (offs_d * stride_gd)[None, :], mask=mask, other=0.0).to(tl.float32)
    lse_ptrs = lse_ptr + batch * stride_lb + head64 * stride_lh + query64 * stride_lm
    lse = tl.load(lse_ptrs, mask=mask_m, other=float("-inf"))
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        dlse_ptrs = dlse_ptr + batch * stride_db + head64 * stride_dh + query64 * stride_dm
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    empty = lse == float("-inf")
    terms = terms_ptr + pid.to(tl.int64) * 128 + tl.arange(0, 64)
    tl.store(terms, tl.where(empty, float("inf"), lse * 1.4426950408889634))
    tl.store(terms + 64, tl.where(empty, 0.0, delta))


@gluon.jit
def _load_columns(
    q_desc, dout_desc, terms_desc, q_s, dout_s, terms_s, q_full, q_free, dout_full, dout_free,
    columns_ptr, first, tiles, turn, batch, head, heads, units, row_offset,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The queries of an item by column, their gradients and terms."""
    for j in range(tiles):
        stage = (turn + j) % STAGES
        unit = gl.load(columns_ptr + first + j)
        row = unit * 64 - row_offset
        wait_free(q_free, turn + j, STAGES)
        mbarrier.expect(q_full.index(stage), 64 * D * 2 + 512)
        load_rows(q_desc, q_s.index(stage), q_full.index(stage), batch, head, row, 64, 0, D)
        tma.async_copy_global_to_shared(
            terms_desc, [(batch * heads + head) * units + unit, 0], q_full.index(stage),
            terms_s.index(stage),
        )  # fmt: skip
        wait_free(dout_free, turn + j, STAGES)
        mbarrier.expect(dout_full.index(stage), 64 * D * 2)
        load_rows(
            dout_desc, dout_s.index(stage), dout_full.index(stage), batch, head, row, 64, 0, D
        )


@gluon.jit
def _load_rows(
    k_desc, ds_desc, k_s, v_s, row_full, row_free, columns_ptr, places_ptr, first, tiles, turn,
    batch, kv_head, place, D: gl.constexpr,
):  # fmt: skip
    """The keys of an item by row, and the gradients of the scores of both units."""
    for j in range(tiles):
        stage = (turn + j) % 4
        key = gl.load(columns_ptr + first + j) * 64
        own = gl.load(places_ptr + (first + j) * 2)
        other = gl.load(places_ptr + (first + j) * 2 + 1)
        parts = (own >= 0).to(gl.int32) + (other >= 0).to(gl.int32)
        wait_free(row_free, turn + j, 4)
        bar = row_full.index(stage)
        mbarrier.expect(bar, 64 * D * 2, pred=parts == 0)
        mbarrier.expect(bar, 64 * D * 2 + 8192, pred=parts == 1)
        mbarrier.expect(bar, 64 * D * 2 + 16384, pred=parts == 2)
        load_rows(k_desc, k_s.index(stage), bar, batch, kv_head, key, 64, 0, D)
        left = v_s.index(stage).slice(0, 64, dim=3)
        right = v_s.index(stage).slice(64, 64, dim=3)
        tma.async_copy_global_to_shared(
            ds_desc, [0, 0, (place + own) * 64, 0], bar, left, pred=own >= 0
        )
        tma.async_copy_global_to_shared(
            ds_desc, [0, 0, (place + other) * 64, 0], bar, right, pred=other >= 0
        )


@gluon.jit
def _hand_on(
    items, ready, read, turn, x, item, batch, head, kind, opens, closes, place, keys
):  # fmt: skip
    """Gives an item to the consumers: the numbers of its row of the schedule, and these."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    x = gl.where(lane == BATCH, batch, x)
    x = gl.where(lane == HEAD, head, x)
    x = gl.where(lane == KIND, kind, x)
    x = gl.where(lane == OPENS, opens, x)
    x = gl.where(lane == CLOSES, closes, x)
    x = gl.where(lane == PLACE, place, x)
    x = gl.where(lane == KEYS, keys, x)
    x = gl.where(lane == ITEM, item, x)
    wait_free(read, turn, 2)
    items.index(turn % 2).store(x)
    mbarrier.arrive(ready.index(turn % 2), count=1)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, dout_desc, terms_desc, ds_desc, q_s, dout_s, k_s, v_s, terms_s, items,
    ready, read, q_full, q_free, dout_full, dout_free, kv_full, kv_free, row_full, row_free,
    counter_ptr, head_map_ptr, column_rows_ptr, column_columns_ptr, row_rows_ptr, row_columns_ptr,
    places_ptr, heads, group, column_groups, first_column, column_samples, bundle, row_groups,
    stride_rows, first_group, first_row, row_samples, stride_map, column_slot, row_slot, places,
    units, row_offset,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: items by column first, of those the longest of all heads, since one that
    starts last would run alone, then bundles of key heads; then items by row.
    """
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=W)
    kv_heads = heads // group
    turn = 0
    tile_turn = 0
    kv_turn = 0
    row_turn = 0
    long = (column_groups + 7) // 8
    columns = column_groups * column_samples
    total = columns + row_groups * row_samples
    item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < total:
        if item < columns:
            if item < long * column_samples:
                rank = item // column_samples
                sample = item - rank * column_samples
            else:
                at = item - long * column_samples
                size = bundle * (column_groups - long)
                b = at // size
                rest = at - b * size
                members = gl.minimum(bundle, column_samples - b * bundle)
                rank = rest // members
                sample = b * bundle + rest - rank * members
                rank += long
            batch = (first_column + sample) // kv_heads
            kv_head = first_column + sample - batch * kv_heads
            keys = kv_turn % 2
            for m in range(group):
                head = kv_head * group + m
                which = gl.load(head_map_ptr + batch * stride_map + head)
                row = column_rows_ptr + (which * column_groups + rank) * 16
                x = gl.load(row + lane, mask=lane < 16, other=0)
                first = gl.load(row + START)
                tiles = gl.load(row + TILES)
                place = (column_slot + sample * group + m) * places + gl.load(row + OFFSET) * 2
                _hand_on(
                    items, ready, read, turn, x, item, batch, head, BY_COLUMN,
                    (m == 0).to(gl.int32), (m == group - 1).to(gl.int32), place, keys,
                )  # fmt: skip
                turn += 1
                if m == 0:
                    wait_free(kv_free, kv_turn, 2)
                    mbarrier.expect(kv_full.index(keys), 2 * NUM_UNITS * 64 * D * 2)
                    for u in gl.static_range(NUM_UNITS):
                        key = gl.load(row + UNITS + u) * 64
                        bar = kv_full.index(keys)
                        buffer = keys * NUM_UNITS + u
                        load_rows(k_desc, k_s.index(buffer), bar, batch, kv_head, key, 64, 0, D)
                        load_rows(v_desc, v_s.index(buffer), bar, batch, kv_head, key, 64, 0, D)
                _load_columns(
                    q_desc, dout_desc, terms_desc, q_s, dout_s, terms_s, q_full, q_free, dout_full,
                    dout_free, column_columns_ptr, first, tiles, tile_turn, batch, head, heads,
                    units, row_offset, D, STAGES,
                )  # fmt: skip
                tile_turn += tiles
            kv_turn += 1
        else:
            at = item - columns
            sample = at // row_groups
            rank = at - sample * row_groups
            batch = (first_row + sample) // heads
            head = first_row + sample - batch * heads
            which = gl.load(head_map_ptr + batch * stride_map + head)
            row = row_rows_ptr + (which * stride_rows + first_group + rank) * 16
            x = gl.load(row + lane, mask=lane < 16, other=0)
            first = gl.load(row + START)
            tiles = gl.load(row + TILES)
            place = (row_slot + sample) * places
            _hand_on(
                items, ready, read, turn, x, item, batch, head, BY_ROW, 0, 0, place, 0
            )  # fmt: skip
            turn += 1
            if row_turn == 0:
                # the buffers of keys, once all items by column have left them
                wait_free(kv_free, kv_turn, 2)
                wait_free(kv_free, kv_turn + 1, 2)
            _load_rows(
                k_desc, ds_desc, k_s, v_s, row_full, row_free, row_columns_ptr, places_ptr, first,
                tiles, row_turn, batch, head // group, place, D,
            )  # fmt: skip
            row_turn += tiles
        item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    wait_free(read, turn, 2)
    items.index(turn % 2).store(gl.full([32], -1, gl.int32, W))
    mbarrier.arrive(ready.index(turn % 2), count=1)
    finish(counter_ptr)


@gluon.jit
def _pass_over(q_full, q_free, dout_full, dout_free, begin, end, STAGES: gl.constexpr):
    """Releases queries that are for the other warpgroup."""
    for turn in range(begin, end):
        wait_full(q_full, turn, STAGES)
        mbarrier.arrive(q_free.index(turn % STAGES), count=1)
        wait_full(dout_full, turn, STAGES)
        mbarrier.arrive(dout_free.index(turn % STAGES), count=1)


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
    u: gl.constexpr, dq_desc, dk_desc, dv_desc, ds_desc, dq_ptr, q_s, dout_s, k_s, v_s, terms_s,
    ds_s, items, ready, read, q_full, q_free, dout_full, dout_free, kv_full, kv_free, row_full,
    row_free, columns_ptr, flags_ptr, block_tiles_ptr, log_counts_ptr, row_flags_ptr, tiles_ptr,
    seed_ptr, group, row_offset, num_queries, num_keys, num_rows, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup u: 64 keys of an item by column, 64 queries of one by row.

    By column it holds the scores of a tile, keys by queries, when its turn begins, and multiplies
    those of the next beside the last of the tile's own products.
    """
    WIDE: gl.constexpr = v_s.shape[4]
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
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
            _pass_over(
                q_full, q_free, dout_full, dout_free, tile_turn, tile_turn + begin, STAGES
            )
            wait_full(kv_full, kv_turn, 2)
            place = (field(items, own, PLACE) + begin * NUM_UNITS + u) * 64
            if field(items, own, OPENS) != 0:
                dk = gl.zeros([64, D], gl.float32, OL)
                dv = gl.zeros([64, D], gl.float32, OL)
            ragged = (unit + 1) * 64 > num_keys
            wait_full(q_full, tile_turn + begin, STAGES)
            s = warpgroup_mma(
                k_s.index((kv_turn % 2) * NUM_UNITS + u).reshape([64, D]),
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
            _pass_over(
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
def attention_backward(
    q_desc, k_desc, v_desc, dout_desc, terms_desc, ds_desc, dq_desc, dk_desc, dv_desc, dq_ptr,
    counter_ptr, head_map_ptr, column_rows_ptr, column_columns_ptr, column_flags_ptr,
    column_tiles_ptr, column_counts_ptr, row_rows_ptr, row_columns_ptr, row_flags_ptr, places_ptr,
    tiles_ptr, seed_ptr, heads, group, column_groups, first_column, column_samples, bundle,
    row_groups, stride_rows, first_group, first_row, row_samples, stride_map, column_slot, row_slot,
    places, units, row_offset, num_queries, num_keys, num_rows, scale, threshold, keep_scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of key heads `first_column` .. + `column_samples` - 1 (of the batch), and dq of
    query heads `first_row` .. + `row_samples` - 1, whose part of the workspace is written.
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
    gl.warp_specialize([
        (_consume, (
            0, dq_desc, dk_desc, dv_desc, ds_desc, dq_ptr, q_s, dout_s, k_s, v_s, terms_s, ds_s,
            items, ready, read, q_full, q_free, dout_full, dout_free, kv_full, kv_free, row_full,
            row_free, column_columns_ptr, column_flags_ptr, column_tiles_ptr, column_counts_ptr,
            row_flags_ptr, tiles_ptr, seed_ptr, group, row_offset, num_queries, num_keys, num_rows,
            scale, threshold, keep_scale, BM, BN, D, STAGES,
        )),
        (_consume, (
            1, dq_desc, dk_desc, dv_desc, ds_desc, dq_ptr, q_s, dout_s, k_s, v_s, terms_s, ds_s,
            items, ready, read, q_full, q_free, dout_full, dout_free, kv_full, kv_free, row_full,
            row_free, column_columns_ptr, column_flags_ptr, column_tiles_ptr, column_counts_ptr,
            row_flags_ptr, tiles_ptr, seed_ptr, group, row_offset, num_queries, num_keys, num_rows,
            scale, threshold, keep_scale, BM, BN, D, STAGES,
        )),
        (_produce, (
            q_desc, k_desc, v_desc, dout_desc, terms_desc, ds_desc, q_s, dout_s, k_s, v_s, terms_s,
            items, ready, read, q_full, q_free, dout_full, dout_free, kv_full, kv_free, row_full,
            row_free, counter_ptr, head_map_ptr, column_rows_ptr, column_columns_ptr, row_rows_ptr,
            row_columns_ptr, places_ptr, heads, group, column_groups, first_column, column_samples,
            bundle, row_groups, stride_rows, first_group, first_row, row_samples, stride_map,
            column_slot, row_slot, places, units, row_offset, D, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


# Keys, values, queries and their gradients of the heads worked on together: an H200's L2. Local
# stride, B 2, H 32, N 8192, D 128: 1346 us by column, with half of it 1400 (2026-11-26).
L2_BYTES = 64_000_000
# Both halves of the workspace; at least the heads of one key head are worked on at once.
WORKSPACE_BYTES = 2_400_000_000
# buffers of queries, by padded head size; at D 128 there is room for two
STAGES = {64: 3, 128: 2}


def workspace_shares(places: int, group: int, key_heads: int, dtype: torch.dtype) -> int:
    """How many key heads (of the batch) one launch works on.

    A key head's part of the workspace is a tile of 64 x 64 for each of `places` and `group` query
    heads; there are two parts, one written and one read, unless all is done in two launches.
    """
    each = places * group * 64 * 64 * dtype.itemsize
    share = max(1, min(key_heads, WORKSPACE_BYTES // 2 // max(each, 1)))
    launches = -(-key_heads // share)
    return -(-key_heads // launches)


def block_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    dbias_base: Tensor | None = None,
    dbias_blocks: int = 0,
    sequences: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, None)` as the reference defines them, in bf16 or fp16, without a bias.

    Workspace: 16 bytes a stored pair of two key heads' share at least, WORKSPACE_BYTES at most
    where that is more.
    """
    assert bias is None and sequences is None, "its requirement excludes both"
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if lse.numel() == 0 or pattern.num_blocks == 0 or head_dim == 0 or value_dim == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), None
    d = max(64, padded_head_dim(max(head_dim, value_dim)))
    group, device = heads // kv_heads, q.device
    head_map = head_map.contiguous()
    # the query heads of a key head visit its columns together: their lists have to be paired alike
    alike = shared_lists(pattern, heads, group)
    schedules = unit_schedule.gradient_schedules(pattern, 2, pair_by_length=alike)
    by_column, by_row, places = schedules.by_column, schedules.by_row, schedules.num_places
    column_groups, row_groups = by_column.rows.shape[1], by_row.rows.shape[1]
    first_group = (m - nq) // 128
    units = -(-m // 64)
    terms = torch.empty(batch * heads * units, 128, device=device, dtype=torch.float32)
    attention_unit_terms[(batch * heads * units,)](
        out,
        dout,
        lse,
        dlse,
        terms,
        *out.stride(),
        *dout.stride(),
        *lse.stride(),
        *((0, 0, 0) if dlse is None else dlse.stride()),
        heads,
        nq,
        m - nq,
        units,
        value_dim,
        DV=padded_head_dim(value_dim),
        num_warps=4,
    )
    key_heads = batch * kv_heads
    share = workspace_shares(places, group, key_heads, q.dtype)
    launches = -(-key_heads // share)
    halves = min(launches, 2)
    slots = halves * share * group * places
    workspace = torch.empty(1, 1, slots * 64, 64, device=device, dtype=q.dtype)
    dropout = seed is not None and dropout_p > 0
    operands = (
        *(rows_descriptor(t, 64) for t in (q, k, v, dout)),
        TensorDescriptor(terms, list(terms.shape), [128, 1], [1, 128], TERMS_LAYOUT.value),
        *(rows_descriptor(t, 64) for t in (workspace, dq, dk, dv)),
        dq,
        work_counter(device),
        head_map,
        by_column.heaviest_first if alike else by_column.rows,
        by_column.columns,
        by_column.flags,
        by_column.block_tiles,
        by_column.log_counts,
        by_row.heaviest_first if first_group == 0 else by_row.rows,
        by_row.columns,
        by_row.flags,
        schedules.places,
        transpose_pattern(pattern).tiles,
        seed if dropout else None,
    )
    most = multiprocessors(device)
    bytes_each = group * 4 * nq * d * q.element_size()
    for launch in range(launches + 1):
        first_column = launch * share
        columns = max(0, min(share, key_heads - first_column))
        first_row = (launch - 1) * share
        rows = max(0, min(share, key_heads - first_row)) * group if launch else 0
        items = columns * column_groups + rows * (row_groups - first_group)
        attention_backward[(min(most, items),)](
            *operands,
            heads,
            group,
            column_groups,
            first_column,
            columns,
            bundle_size(max(columns, 1), bytes_each, L2_BYTES),
            row_groups - first_group,
            row_groups,
            first_group,
            first_row * group,
            rows,
            0 if head_map.shape[0] == 1 else head_map.stride(0),
            launch % halves * share * group,
            (launch - 1) % halves * share * group,
            places,
            units,
            m - nq,
            nq,
            nk,
            m,
            scale,
            dropout_threshold(dropout_p),
            kept_scale(dropout_p) if dropout else 1.0,
            BM=bm,
            BN=bn,
            D=d,
            STAGES=STAGES[d],
            num_warps=4,
            maxnreg=168,
        )
    return dq, dk, dv, None
