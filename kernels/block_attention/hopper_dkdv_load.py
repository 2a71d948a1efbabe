"""The producer of the columns pass on Hopper: claims groups of keys, loads their tiles of queries.

An item is a group of units of 64 keys of one key head. It is handed to the consumers once for each
query head of that key head, with that head's tiles: 64 queries, gathered from pieces of blocks,
their rows of dout, and their terms (lse in base 2 and delta), which come by plain loads. With
sequences, tiles none of whose rows belong to the item's are left out, and the consumers are told
with each tile which one it is.
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
BEGIN, END = gl.constexpr(unit_schedule.RUN_BEGIN), gl.constexpr(unit_schedule.RUN_END)
# fields of an item: the first and the last query head of a key head; which buffers hold the keys
OPENS, CLOSES, BUFFER = gl.constexpr(24), gl.constexpr(25), gl.constexpr(26)
# what a tile of a sequence comes with: its number, whether it has rows that are not the sequence's
TILE, CUT = gl.constexpr(0), gl.constexpr(1)
# two warpgroups, a unit of 64 keys each
NUM_UNITS = gl.constexpr(2)


@gluon.jit
def total_items(sequences_ptr, num_sequences, samples, groups, kv_heads):
    """How many items there are: groups of keys of all key heads."""
    if sequences_ptr is None:
        total = samples * groups
    else:
        total = gl.load(sequences_ptr + num_sequences * 8 + 7) * kv_heads
    return total


@gluon.jit
def find_keys(item, sequences_ptr, num_sequences, kv_heads):
    """(sequence, key head, group of keys) of an item: sequence by sequence, head by head, first
    keys first, which in a causal mask have most queries.
    """
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=W)
    passed = gl.zeros([32], gl.int32, W)
    for b in range(0, num_sequences, 32):
        mask = b + lane < num_sequences
        before = gl.load(
            sequences_ptr + (b + lane + 1) * 8 + 7, mask=mask, other=2147483647 // kv_heads
        )
        passed += (before * kv_heads <= item).to(gl.int32)
    sequence = gl.minimum(gl.sum(passed, 0), num_sequences - 1)
    before = gl.load(sequences_ptr + sequence * 8 + 7)
    count = gl.maximum(gl.load(sequences_ptr + sequence * 8 + 15) - before, 1)
    rest = item - before * kv_heads
    kv_head = rest // count
    return sequence, kv_head, rest - kv_head * count


@gluon.jit
def find_item(item, sequences_ptr, num_sequences, kv_heads, groups, bundle, samples):
    """(sample or sequence, key head, rank of the group in its schedule) of an item.

    Of the plain batch the longest of all key heads come first, since one that starts last would run
    alone, then bundles of key heads, in each the longest first.
    """
    if sequences_ptr is None:
        long = (groups + 7) // 8
        if item < long * samples:
            rank = item // samples
            sample = item - rank * samples
        else:
            at = item - long * samples
            size = bundle * (groups - long)
            b = at // size
            rest = at - b * size
            members = gl.minimum(bundle, samples - b * bundle)
            rank = rest // members
            sample = b * bundle + rest - rank * members
            rank += long
        batch = sample // kv_heads
        kv_head = sample - batch * kv_heads
    else:
        batch, kv_head, rank = find_keys(item, sequences_ptr, num_sequences, kv_heads)
    return batch, kv_head, rank


@gluon.jit
def locate(x, sequences_ptr, sequence, packed, row_offset, num_queries, num_keys):
    """A row of the schedule, a number a lane, with where the item's queries and keys lie."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    x = gl.where(lane == SEQUENCE, sequence, x)
    if sequences_ptr is None:
        x = gl.where(lane == BATCH, sequence, x)
        x = gl.where(lane == SHIFT, -row_offset, x)
        x = gl.where(lane == FIRST_ROW, row_offset, x)
        x = gl.where(lane == LAST_ROW, row_offset + num_queries, x)
        x = gl.where(lane == FIRST_KEY, 0, x)
        x = gl.where(lane == KEYS, num_keys, x)
    else:
        own = sequences_ptr + sequence * 8
        x = gl.where(lane == BATCH, gl.where(packed != 0, 0, sequence), x)
        x = gl.where(lane == SHIFT, gl.load(own + 2), x)
        x = gl.where(lane == FIRST_ROW, gl.load(own + 3), x)
        x = gl.where(lane == LAST_ROW, gl.load(own + 4), x)
        x = gl.where(lane == FIRST_KEY, gl.load(own + 5), x)
        x = gl.where(lane == KEYS, gl.load(own + 6), x)
    return x


@gluon.jit
def live_tiles(columns_ptr, first, tiles, chunk, first_row, last_row, PIECE: gl.constexpr):
    """Of the tiles `chunk` .. + 31 of a stream, a bit each: whether any of its rows exists."""
    SLOTS: gl.constexpr = 64 // PIECE
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    inside = chunk + lane < tiles
    live = inside & (lane < 0)
    for i in gl.static_range(SLOTS):
        slot = (first + chunk + lane) * SLOTS + i
        column = gl.load(columns_ptr + slot, mask=inside, other=-1)
        row = column * PIECE
        live = live | ((column >= 0) & (row < last_row) & (row + PIECE > first_row))
    return gl.sum(gl.where(live, 1 << lane, 0), 0)


@gluon.jit
def _ones(bits):
    """How many bits of 32 are set."""
    x = bits.to(gl.uint32)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(gl.int32)


@gluon.jit
def count_live(x, columns_ptr, first_row, last_row, PIECE: gl.constexpr):
    """A row of the schedule whose TILES, and whose units' runs, count tiles with rows alone.

    A unit of whose run no tile is left has a run that ends where it begins.
    """
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    first = pick(x, START)
    tiles = pick(x, TILES)
    before = x * 0
    for chunk in range(0, tiles, 32):
        bits = live_tiles(columns_ptr, first, tiles, chunk, first_row, last_row, PIECE)
        count = x - chunk
        some = (1 << gl.minimum(gl.maximum(count, 0), 31)) - 1
        before += _ones(gl.where(count >= 32, -1, some) & bits)
    return gl.where((lane == TILES) | ((lane >= BEGIN) & (lane < END + 4)), before, x)


@gluon.jit
def load_terms(
    terms_ptr, columns_ptr, tile, start, shift, first_row, last_row, PIECE: gl.constexpr
):  # fmt: skip
    """(lse in base 2, delta) of a tile's 64 queries; +inf and 0 of rows that do not exist.

    `start` is the head's first row in (B * H * Nq, 2), int64.
    """
    rows = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [1], [0]))
    column = gl.load(columns_ptr + tile * (64 // PIECE) + rows // PIECE)
    row = column * PIECE + rows % PIECE
    # a slot without a piece has negative rows, which no sequence has
    exists = (column >= 0) & (row >= first_row) & (row < last_row)
    own = terms_ptr + 2 * (start + shift) + 2 * row
    lse = gl.load(own, mask=exists, other=float("inf"))
    delta = gl.load(own + 1, mask=exists, other=0.0)
    return lse, delta


@gluon.jit
def load_pieces(
    desc, buffer, bar, columns_ptr, tile, batch, head, shift, first_row, last_row,
    PIECE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """A tile's 64 rows of (B, H, Nq, D); zeros for pieces none of whose rows exist."""
    SLOTS: gl.constexpr = 64 // PIECE
    for i in gl.static_range(SLOTS):
        row = gl.load(columns_ptr + tile * SLOTS + i) * PIECE
        exists = (row >= 0) & (row < last_row) & (row + PIECE > first_row)
        # what begins so far before the tensor lies outside it, and is filled with zeros
        row = gl.where(exists, row + shift, -PIECE)
        load_rows(desc, buffer, bar, batch, head, row, PIECE, i * PIECE, D)


@gluon.jit
def is_cut(columns_ptr, tile, first_row, last_row, PIECE: gl.constexpr):
    """1 where a piece of a tile has both rows that exist and rows that do not, else 0."""
    SLOTS: gl.constexpr = 64 // PIECE
    cut = first_row < first_row
    for i in gl.static_range(SLOTS):
        row = gl.load(columns_ptr + tile * SLOTS + i) * PIECE
        exists = (row >= 0) & (row < last_row) & (row + PIECE > first_row)
        cut = cut | (exists & ((row < first_row) | (row + PIECE > last_row)))
    return cut.to(gl.int32)


@gluon.jit
def load_tile(
    q_desc, dout_desc, terms_ptr, q_s, dout_s, terms_s, facts_s, q_full, q_free, dout_full,
    dout_free, columns_ptr, tile, turn, batch, head, start, shift, first_row, last_row,
    SEQUENCES: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A tile's queries, with their terms, and their rows of dout."""
    stage = turn % STAGES
    lse, delta = load_terms(terms_ptr, columns_ptr, tile, start, shift, first_row, last_row, PIECE)
    wait_free(q_free, turn, STAGES)
    mbarrier.expect(q_full.index(stage), 64 * D * 2)
    load_pieces(
        q_desc, q_s.index(stage), q_full.index(stage), columns_ptr, tile, batch, head, shift,
        first_row, last_row, PIECE, D,
    )  # fmt: skip
    wait_free(dout_free, turn, STAGES)
    mbarrier.expect(dout_full.index(stage), 64 * D * 2)
    load_pieces(
        dout_desc, dout_s.index(stage), dout_full.index(stage), columns_ptr, tile, batch, head,
        shift, first_row, last_row, PIECE, D,
    )  # fmt: skip
    # last, because they come by way of registers
    terms_s.index(stage).slice(0, 64).store(lse)
    terms_s.index(stage).slice(64, 64).store(delta)
    if SEQUENCES:
        lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
        cut = is_cut(columns_ptr, tile, first_row, last_row, PIECE)
        facts_s.index(stage).store(gl.where(lane == TILE, tile, cut))
    # a second arrival, after what all lanes store: `expect` does not wait for them
    mbarrier.arrive(q_full.index(stage), count=1)


@gluon.jit
def load_tiles(
    q_desc, dout_desc, terms_ptr, q_s, dout_s, terms_s, facts_s, q_full, q_free, dout_full,
    dout_free, columns_ptr, first, begin, end, turn, batch, head, start, shift, first_row, last_row,
    SEQUENCES: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles `first + begin` .. `first + end - 1`, of sequences those with rows; the turn after."""
    if SEQUENCES:
        for chunk in range(begin, end, 32):
            bits = live_tiles(columns_ptr, first, end, chunk, first_row, last_row, PIECE)
            for j in range(chunk, gl.minimum(chunk + 32, end)):
                if (bits >> (j - chunk)) & 1 != 0:
                    load_tile(
                        q_desc, dout_desc, terms_ptr, q_s, dout_s, terms_s, facts_s, q_full, q_free,
                        dout_full, dout_free, columns_ptr, first + j, turn, batch, head, start,
                        shift, first_row, last_row, SEQUENCES, PIECE, D, STAGES,
                    )  # fmt: skip
                    turn += 1
    else:
        for j in range(begin, end):
            load_tile(
                q_desc, dout_desc, terms_ptr, q_s, dout_s, terms_s, facts_s, q_full, q_free,
                dout_full, dout_free, columns_ptr, first + j, turn, batch, head, start, shift,
                first_row, last_row, SEQUENCES, PIECE, D, STAGES,
            )  # fmt: skip
            turn += 1
    return turn


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, terms_ptr, shared, counter_ptr, head_map_ptr, rows_ptr,
    columns_ptr, sequences_ptr, heads, group, groups, bundle, samples, stride_map, row_offset,
    num_queries, num_keys, num_sequences, packed,
    PIECE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: claims items, hands them on for each query head, loads keys and tiles."""
    (
        q_s, dout_s, k_s, v_s, terms_s, facts_s, items, ready, read, q_full, q_free, dout_full,
        dout_free, kv_full, kv_free,
    ) = shared  # fmt: skip
    W: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    SEQUENCES: gl.constexpr = sequences_ptr is not None
    lane = gl.arange(0, 32, layout=W)
    kv_heads = heads // group
    turn = 0
    tile_turn = 0
    kv_turn = 0
    total = total_items(sequences_ptr, num_sequences, samples, groups, kv_heads)
    item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < total:
        following = item
        sequence, kv_head, rank = find_item(
            item, sequences_ptr, num_sequences, kv_heads, groups, bundle, samples
        )
        keys = kv_turn % 2
        for m in range(group):
            head = kv_head * group + m
            which = gl.load(head_map_ptr + sequence * stride_map + head)
            row = rows_ptr + (which * groups + rank) * 16
            x = gl.load(row + lane, mask=lane < 16, other=0)
            first = pick(x, START)
            every_tile = pick(x, TILES)
            x = locate(x, sequences_ptr, sequence, packed, row_offset, num_queries, num_keys)
            batch = pick(x, BATCH)
            shift = pick(x, SHIFT)
            first_row = pick(x, FIRST_ROW)
            last_row = pick(x, LAST_ROW)
            if SEQUENCES:
                x = count_live(x, columns_ptr, first_row, last_row, PIECE)
            x = gl.where(lane == HEAD, head, x)
            x = gl.where(lane == OPENS, (m == 0).to(gl.int32), x)
            x = gl.where(lane == CLOSES, (m == group - 1).to(gl.int32), x)
            x = gl.where(lane == BUFFER, keys, x)
            x = gl.where(lane == ITEM, item, x)
            wait_free(read, turn, 2)
            items.index(turn % 2).store(x)
            mbarrier.arrive(ready.index(turn % 2), count=1)
            turn += 1
            if m == 0:
                first_key = pick(x, FIRST_KEY)
                wait_free(kv_free, kv_turn, 2)
                bar = kv_full.index(keys)
                mbarrier.expect(bar, 2 * NUM_UNITS * 64 * D * 2)
                for u in gl.static_range(NUM_UNITS):
                    key = first_key + gl.load(row + UNITS + u) * 64
                    buffer = keys * NUM_UNITS + u
                    load_rows(k_desc, k_s.index(buffer), bar, batch, kv_head, key, 64, 0, D)
                    load_rows(v_desc, v_s.index(buffer), bar, batch, kv_head, key, 64, 0, D)
            start = (batch * heads + head).to(gl.int64) * num_queries
            some = gl.minimum(every_tile, STAGES)
            tile_turn = load_tiles(
                q_desc, dout_desc, terms_ptr, q_s, dout_s, terms_s, facts_s, q_full, q_free,
                dout_full, dout_free, columns_ptr, first, 0, some, tile_turn, batch, head, start,
                shift, first_row, last_row, SEQUENCES, PIECE, D, STAGES,
            )  # fmt: skip
            if m == 0:
                # the next item is claimed while the consumers are busy with what is loaded
                following = gl.atomic_add(counter_ptr, 1, sem="relaxed")
            tile_turn = load_tiles(
                q_desc, dout_desc, terms_ptr, q_s, dout_s, terms_s, facts_s, q_full, q_free,
                dout_full, dout_free, columns_ptr, first, some, every_tile, tile_turn, batch, head,
                start, shift, first_row, last_row, SEQUENCES, PIECE, D, STAGES,
            )  # fmt: skip
        kv_turn += 1
        item = following
    wait_free(read, turn, 2)
    items.index(turn % 2).store(gl.full([32], -1, gl.int32, W))
    mbarrier.arrive(ready.index(turn % 2), count=1)
    finish(counter_ptr)
