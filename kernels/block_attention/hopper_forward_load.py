"""The producer of block_attention's forward on Hopper: claims items and loads their tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    FIRST_KEY,
    FIRST_ROW,
    HEAD,
    ITEM,
    KEYS,
    LAST_ROW,
    SEQUENCE,
    SHIFT,
    load_rows,
    pick,
)
from sparse_layouts.kernels.hopper_common import finish, wait_free

START, TILES = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.TILES)
UNITS = gl.constexpr(unit_schedule.UNITS)


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
def claim(
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
def load_tiles(
    k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, begin, end, turn,
    batch, kv_head, first_key,
    PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    scales=None, ROWS_PER_SCALE: gl.constexpr = 128,
):  # fmt: skip
    """Keys and values of tiles `first + begin` .. `first + end - 1`.

    In 8 bits values lie by column, and a tile of keys has a scale: `scales` are those of a head,
    the ring for a tile's and how many keys there are.
    """
    SLOTS: gl.constexpr = TN // PIECE
    BYTES: gl.constexpr = k_desc.dtype.primitive_bitwidth // 8
    for j in range(begin, end):
        stage = (turn + j) % STAGES
        slot = (first + j) * SLOTS
        if scales is not None:
            scale_ptr, rates, num_keys = scales
            # there are tiles of no block (-1), and blocks may reach over the end
            key = gl.minimum(gl.load(columns_ptr + slot) * PIECE, num_keys - 1)
            scale = gl.load(scale_ptr + key // ROWS_PER_SCALE, mask=key >= 0, other=1.0)
        wait_free(k_free, turn + j, STAGES)
        if scales is not None:
            # before the copies that complete the buffer's turn are issued
            W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
            rates.index(stage).store(gl.zeros([32], gl.float32, W) + scale)
        mbarrier.expect(k_full.index(stage), TN * D * BYTES)
        for i in gl.static_range(SLOTS):
            row = first_key + gl.load(columns_ptr + slot + i) * PIECE
            load_rows(
                k_desc, k_s.index(stage), k_full.index(stage), batch, kv_head, row,
                PIECE, i * PIECE, D,
            )  # fmt: skip
        wait_free(v_free, turn + j, STAGES)
        mbarrier.expect(v_full.index(stage), TN * D * BYTES)
        for i in gl.static_range(SLOTS):
            row = first_key + gl.load(columns_ptr + slot + i) * PIECE
            if BYTES == 1:
                gl.static_assert(SLOTS == 1, "columns of several pieces would share a swizzle")
                tma.async_copy_global_to_shared(
                    v_desc, [batch, kv_head, 0, row], v_full.index(stage), v_s.index(stage)
                )
            else:
                load_rows(
                    v_desc, v_s.index(stage), v_full.index(stage), batch, kv_head, row,
                    PIECE, i * PIECE, D,
                )  # fmt: skip


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, shared, counter_ptr, head_map_ptr, rows_ptr, columns_ptr,
    sequences_ptr, k_scale_ptr, heads, group, groups, bundle, samples, stride_map, stride_rows,
    first_group, row_offset, num_queries, num_keys, num_sequences, packed,
    PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr, NUM_UNITS: gl.constexpr,
    STAGES: gl.constexpr, QUERIES: gl.constexpr, HEADS_EACH: gl.constexpr,
    ROWS_PER_SCALE: gl.constexpr,
):  # fmt: skip
    """The producer: claims an item ahead, hands it on, loads its queries and its tiles."""
    q_s, k_s, v_s, items, ready, q_full, q_free, k_full, k_free, v_full, v_free = shared[:11]
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    BYTES: gl.constexpr = q_desc.dtype.primitive_bitwidth // 8
    tile_turn = 0
    turn = 0
    more, x, row = claim(
        counter_ptr, rows_ptr, head_map_ptr, sequences_ptr, heads, groups, bundle, samples,
        stride_map, stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences,
        packed, HEADS_EACH,
    )  # fmt: skip
    while more:
        batch = pick(x, BATCH)
        head = pick(x, HEAD)
        shift = pick(x, SHIFT)
        first_key = pick(x, FIRST_KEY)
        first = pick(x, START)
        tiles = pick(x, TILES)
        kv_head = head // group
        scales = None
        if k_scale_ptr is not None:
            sample = batch * (heads // group) + kv_head
            own_scales = k_scale_ptr + sample * gl.cdiv(num_keys, ROWS_PER_SCALE)
            scales = (own_scales, shared[11], num_keys)
        place = turn % QUERIES
        wait_free(q_free, turn, QUERIES)
        items.index(place).store(x)
        mbarrier.arrive(ready.index(place), count=1)
        mbarrier.expect(q_full.index(place), NUM_UNITS * 64 * D * BYTES)
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
        load_tiles(
            k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, 0, some,
            tile_turn, batch, kv_head, first_key, PIECE, TN, D, STAGES, scales, ROWS_PER_SCALE,
        )  # fmt: skip
        # the next item is claimed while the consumers are still busy with what is loaded
        more, next_x, row = claim(
            counter_ptr, rows_ptr, head_map_ptr, sequences_ptr, heads, groups, bundle, samples,
            stride_map, stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences,
            packed, HEADS_EACH,
        )  # fmt: skip
        load_tiles(
            k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, some,
            tiles, tile_turn, batch, kv_head, first_key, PIECE, TN, D, STAGES, scales,
            ROWS_PER_SCALE,
        )  # fmt: skip
        tile_turn += tiles
        turn += 1
        x = next_x
    wait_free(q_free, turn, QUERIES)
    items.index(turn % QUERIES).store(gl.full([32], -1, gl.int32, W))
    mbarrier.arrive(ready.index(turn % QUERIES), count=1)
    finish(counter_ptr)
