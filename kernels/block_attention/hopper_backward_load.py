"""The producer of block_attention's backward on Hopper: claims items and loads their tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.hopper_common import BATCH, HEAD, ITEM, load_rows
from sparse_layouts.kernels.hopper_common import finish, wait_free

START, TILES = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.TILES)
OFFSET, UNITS = gl.constexpr(unit_schedule.OFFSET), gl.constexpr(unit_schedule.UNITS)
# fields of an item: by column or by row; the first and the last query head of a key head; the first
# place in the workspace; which buffers hold the keys
KIND, OPENS, CLOSES = gl.constexpr(18), gl.constexpr(19), gl.constexpr(20)
PLACE, KEYS = gl.constexpr(21), gl.constexpr(22)
BY_COLUMN, BY_ROW = gl.constexpr(0), gl.constexpr(1)
# two warpgroups; two sets of buffers for their keys, in a pass by row four for the tiles
NUM_UNITS = gl.constexpr(2)


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
def _claim(counter_ptr, columns, by_row):
    """The next item: by column, then by row, from `columns` on; with `by_row` only the latter."""
    item = columns
    if by_row == 0:
        item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if item >= columns:
        item = columns + gl.atomic_add(counter_ptr + 2, 1, sem="relaxed")
    return item


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, terms_desc, ds_desc, shared, counter_ptr, head_map_ptr,
    column_rows_ptr, column_columns_ptr, row_rows_ptr, row_columns_ptr, places_ptr, heads, group,
    column_groups, first_column, column_samples, bundle, row_groups, stride_rows, first_group,
    first_row, row_samples, row_programs, stride_map, column_slot, row_slot, places, units,
    row_offset, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: items by column first, of those the longest of all heads, since one that
    starts last would run alone, then bundles of key heads; then items by row, which the first
    `row_programs` programs begin with.
    """
    (
        q_s, dout_s, k_s, v_s, terms_s, ds_s, items, ready, read, q_full, q_free, dout_full,
        dout_free, kv_full, kv_free, row_full, row_free,
    ) = shared  # fmt: skip
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
    by_row = (gl.program_id(0) < row_programs).to(gl.int32)
    item = _claim(counter_ptr, columns, by_row)
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
            by_row = 1
        item = _claim(counter_ptr, columns, by_row)
    wait_free(read, turn, 2)
    items.index(turn % 2).store(gl.full([32], -1, gl.int32, W))
    mbarrier.arrive(ready.index(turn % 2), count=1)
    finish(counter_ptr, True)
