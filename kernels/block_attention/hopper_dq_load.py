"""The producer of dq on Hopper: claims items and loads their queries and tiles of keys."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    FIRST_KEY,
    HEAD,
    SHIFT,
    load_rows,
    pick,
)
from sparse_layouts.kernels.block_attention.hopper_forward_load import claim, load_tiles
from sparse_layouts.kernels.hopper_common import finish, wait_free

START, TILES = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.TILES)
UNITS = gl.constexpr(unit_schedule.UNITS)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, shared, counter_ptr, head_map_ptr, rows_ptr, columns_ptr,
    sequences_ptr, heads, group, groups, bundle, samples, stride_map, stride_rows, first_group,
    row_offset, num_queries, num_keys, num_sequences, packed,
    PIECE: gl.constexpr, TN: gl.constexpr, D: gl.constexpr, NUM_UNITS: gl.constexpr,
    STAGES: gl.constexpr, QUERIES: gl.constexpr, HEADS_EACH: gl.constexpr,
):  # fmt: skip
    """The producer: claims an item ahead, hands it on, loads its queries and their gradients, and
    its tiles.
    """
    (
        q_s, dout_s, k_s, v_s, items, ready, q_full, q_free, k_full, k_free, v_full, v_free
    ) = shared  # fmt: skip
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    # With one buffer for queries, keys come first: they need not wait until an item is stored. With
    # two, consumers wait for the next item while they hold a tile.
    KEYS_FIRST: gl.constexpr = QUERIES == 1
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
        place = turn % QUERIES
        some = gl.minimum(tiles, STAGES)
        if KEYS_FIRST:
            load_tiles(
                k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, 0,
                some, tile_turn, batch, kv_head, first_key, PIECE, TN, D, STAGES,
            )  # fmt: skip
        wait_free(q_free, turn, QUERIES)
        items.index(place).store(x)
        mbarrier.arrive(ready.index(place), count=1)
        bar = q_full.index(place)
        mbarrier.expect(bar, 2 * NUM_UNITS * 64 * D * 2)
        for u in gl.static_range(NUM_UNITS):
            if HEADS_EACH == 1:
                unit = gl.load(rows_ptr + row * 16 + UNITS + u)
                own_head = head
            else:
                unit = gl.load(rows_ptr + row * 16 + UNITS)
                own_head = head + u
            buffer = place * NUM_UNITS + u
            query = unit * 64 + shift
            load_rows(q_desc, q_s.index(buffer), bar, batch, own_head, query, 64, 0, D)
            load_rows(dout_desc, dout_s.index(buffer), bar, batch, own_head, query, 64, 0, D)
        if not KEYS_FIRST:
            load_tiles(
                k_desc, v_desc, k_s, v_s, k_full, k_free, v_full, v_free, columns_ptr, first, 0,
                some, tile_turn, batch, kv_head, first_key, PIECE, TN, D, STAGES,
            )  # fmt: skip
        # the next item is claimed while the consumers are still busy with what is loaded
        more, next_x, row = claim(
            counter_ptr, rows_ptr, head_map_ptr, sequences_ptr, heads, groups, bundle, samples,
            stride_map, stride_rows, first_group, row_offset, num_queries, num_keys, num_sequences,
            packed, HEADS_EACH,
        )  # fmt: skip
        load_tiles(
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
