"""The producer of the columns pass for wide heads on Hopper: a unit of keys, its tiles of queries.

The consumers see one stream of tiles, through the query heads of an item and on into the next one.
Each comes with its facts: where it stands, which of its entries are stored, whether it ends an
item. Tiles none of whose rows exist are left out; an item without any has one of zeros.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparse_layouts.kernels.block_attention import unit_schedule
from sparse_layouts.kernels.block_attention.hopper_common import (
    BATCH,
    FIRST_KEY,
    FIRST_ROW,
    HEAD,
    LAST_ROW,
    SHIFT,
    load_rows,
    pick,
    stored_words,
)
from sparse_layouts.kernels.block_attention.hopper_dkdv_load import (
    find_item,
    is_cut,
    live_tiles,
    load_pieces,
    load_terms,
    locate,
    total_items,
)
from sparse_layouts.kernels.hopper_common import finish, wait_free

START, TILES = gl.constexpr(unit_schedule.START), gl.constexpr(unit_schedule.TILES)
UNITS = gl.constexpr(unit_schedule.UNITS)
# facts of a tile: its number (-1: no more), the query head, whether any entry needs a test, whether
# rows have to be cut, whether it is the last of its item
TILE, TILE_HEAD, TESTED, CUT = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)
CLOSES = gl.constexpr(4)
# A warpgroup may be two items behind the one for which the producer prepares.
ITEMS = gl.constexpr(4)


@gluon.jit
def _load_tile(
    q_desc, k_desc, v_desc, dout_desc, terms_ptr, shared, columns_ptr, flags_ptr, block_tiles_ptr,
    tiles_ptr, item, item_turn, tile, turn, batch, head, heads, group, num_queries, shift,
    first_row, last_row, first_key, unit, opens, closes,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A tile's queries, with its terms, words and facts, and its rows of dout; with the first tile
    of an item its numbers, keys and values.
    """
    (
        q_s, dout_s, k_s, v_s, p_s, terms_s, words_s, facts_s, items, q_full, q_free, dout_full,
        dout_free, k_full, k_free, v_full, v_free, p_full, p_free,
    ) = shared  # fmt: skip
    L: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    SUB: gl.constexpr = 64 // BN if BN < 64 else 1
    stage = turn % STAGES
    start = (batch * heads + head).to(gl.int64) * num_queries
    lse, delta = load_terms(terms_ptr, columns_ptr, tile, start, shift, first_row, last_row, PIECE)
    # rows that do not exist, or have no entry, are tested for
    tested = gl.load(flags_ptr + tile) & 3
    tested = tested | gl.max((lse == float("inf")).to(gl.int32), 0)
    keys = gl.arange(0, 64, layout=L)
    sub_row = keys // BN if BN < 64 else keys * 0
    w0, w1, _w2, _w3 = stored_words(
        columns_ptr, block_tiles_ptr, tiles_ptr, tile, tested, sub_row, (unit * 64 + keys) % BN,
        1 << 30, BN, BM, PIECE, 64, SUB, L,
    )  # fmt: skip
    x = gl.where(lane == TILE, tile, 0)
    x = gl.where(lane == TILE_HEAD, head, x)
    x = gl.where(lane == TESTED, tested, x)
    x = gl.where(lane == CUT, is_cut(columns_ptr, tile, first_row, last_row, PIECE), x)
    x = gl.where(lane == CLOSES, closes, x)
    if opens:
        wait_free(k_free, item_turn, 1)
        mbarrier.expect(k_full.index(0), 64 * D * 2)
        load_rows(
            k_desc, k_s.index(0), k_full.index(0), batch, head // group, first_key + unit * 64, 64,
            0, D,
        )  # fmt: skip
    wait_free(q_free, turn, STAGES)
    mbarrier.expect(q_full.index(stage), 64 * D * 2)
    load_pieces(
        q_desc, q_s.index(stage), q_full.index(stage), columns_ptr, tile, batch, head, shift,
        first_row, last_row, PIECE, D,
    )  # fmt: skip
    terms_s.index(stage).slice(0, 64).store(lse)
    terms_s.index(stage).slice(64, 64).store(delta)
    words_s.index(stage).slice(0, 64).store(w0)
    words_s.index(stage).slice(64, 64).store(w1)
    facts_s.index(stage).store(x)
    if opens:
        # with the tile before the last both have released, they are through with older items
        items.index(item_turn % ITEMS).store(item)
    # a second arrival, after what all lanes store: `expect` does not wait for them
    mbarrier.arrive(q_full.index(stage), count=1)
    if opens:
        wait_free(v_free, item_turn, 1)
        mbarrier.expect(v_full.index(0), 64 * D * 2)
        load_rows(
            v_desc, v_s.index(0), v_full.index(0), batch, head // group, first_key + unit * 64, 64,
            0, D,
        )  # fmt: skip
    wait_free(dout_free, turn, STAGES)
    mbarrier.expect(dout_full.index(stage), 64 * D * 2)
    load_pieces(
        dout_desc, dout_s.index(stage), dout_full.index(stage), columns_ptr, tile, batch, head,
        shift, first_row, last_row, PIECE, D,
    )  # fmt: skip


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, terms_ptr, shared, counter_ptr, head_map_ptr, rows_ptr,
    columns_ptr, flags_ptr, block_tiles_ptr, tiles_ptr, sequences_ptr, heads, group, groups,
    bundle, samples, stride_map, row_offset, num_queries, num_keys, num_sequences, packed,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: claims items, loads their keys and values and the stream of their tiles."""
    (
        q_s, dout_s, k_s, v_s, p_s, terms_s, words_s, facts_s, items, q_full, q_free, dout_full,
        dout_free, k_full, k_free, v_full, v_free, p_full, p_free,
    ) = shared  # fmt: skip
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=W)
    kv_heads = heads // group
    turn = 0
    item_turn = 0
    total = total_items(sequences_ptr, num_sequences, samples, groups, kv_heads)
    item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < total:
        following = -1
        sequence, kv_head, rank = find_item(
            item, sequences_ptr, num_sequences, kv_heads, groups, bundle, samples
        )
        head = kv_head * group
        which = gl.load(head_map_ptr + sequence * stride_map + head)
        row = rows_ptr + (which * groups + rank) * 16
        x = gl.load(row + lane, mask=lane < 16, other=0)
        x = locate(x, sequences_ptr, sequence, packed, row_offset, num_queries, num_keys)
        x = gl.where(lane == HEAD, kv_head, x)
        unit = pick(x, UNITS)
        batch = pick(x, BATCH)
        shift = pick(x, SHIFT)
        first_row = pick(x, FIRST_ROW)
        last_row = pick(x, LAST_ROW)
        first_key = pick(x, FIRST_KEY)
        # a tile is loaded when the next one is known, or that there is none
        held = -1
        held_head = head
        first = pick(x, START)
        opening = turn
        for m in range(group):
            which = gl.load(head_map_ptr + sequence * stride_map + head + m)
            own = rows_ptr + (which * groups + rank) * 16
            first = gl.load(own + START)
            tiles = gl.load(own + TILES)
            for chunk in range(0, tiles, 32):
                bits = live_tiles(columns_ptr, first, tiles, chunk, first_row, last_row, PIECE)
                for j in range(chunk, gl.minimum(chunk + 32, tiles)):
                    if (bits >> (j - chunk)) & 1 != 0:
                        if held >= 0:
                            _load_tile(
                                q_desc, k_desc, v_desc, dout_desc, terms_ptr, shared, columns_ptr,
                                flags_ptr, block_tiles_ptr, tiles_ptr, x, item_turn, held, turn,
                                batch, held_head, heads, group, num_queries, shift, first_row,
                                last_row, first_key, unit, turn == opening, 0, BM, BN, PIECE, D,
                                STAGES,
                            )  # fmt: skip
                            turn += 1
                            if following < 0:
                                # while the consumers are busy with what is loaded
                                following = gl.atomic_add(counter_ptr, 1, sem="relaxed")
                        held = first + j
                        held_head = head + m
        if following < 0:
            following = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        # of an item without tiles no row exists
        end = gl.where(held >= 0, last_row, 0)
        _load_tile(
            q_desc, k_desc, v_desc, dout_desc, terms_ptr, shared, columns_ptr, flags_ptr,
            block_tiles_ptr, tiles_ptr, x, item_turn, gl.where(held >= 0, held, first), turn, batch,
            held_head, heads, group, num_queries, shift, first_row, end, first_key, unit,
            turn == opening, 1, BM, BN, PIECE, D, STAGES,
        )  # fmt: skip
        turn += 1
        item_turn += 1
        item = following
    wait_free(q_free, turn, STAGES)
    facts_s.index(turn % STAGES).store(gl.full([32], -1, gl.int32, W))
    mbarrier.arrive(q_full.index(turn % STAGES), count=2)
    finish(counter_ptr)
