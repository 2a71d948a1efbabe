"""What the Gluon attention kernels share: masks, dropout, rows of queries and keys.

A program has one producer warp, which claims items of work and loads tiles by TMA, and one or two
consumer warpgroups, which multiply.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_attention.reference import dropout_threshold
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.triton_common import kept_scale
from sparse_layouts.kernels.block_attention.unit_schedule import UNIT, UnitSchedule
from sparse_layouts.kernels.hopper_common import rows_descriptor, wait_full, work_counter

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# fields of an item beside the 16 of its row of the schedule
BATCH, HEAD = gl.constexpr(16), gl.constexpr(17)
# where there may be sequences: what to add to a row of the mask for its query, the rows and keys
# there are
SHIFT, FIRST_ROW, LAST_ROW = gl.constexpr(18), gl.constexpr(19), gl.constexpr(20)
KEYS, FIRST_KEY, SEQUENCE = gl.constexpr(21), gl.constexpr(22), gl.constexpr(23)
ITEM = gl.constexpr(31)


@gluon.jit
def pick(x, which: gl.constexpr):
    """A lane's number, to the producer itself."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    return gl.sum(gl.where(lane == which, x, 0), 0)


@gluon.jit
def pass_over(a_full, a_free, b_full, b_free, begin, end, STAGES: gl.constexpr):
    """Releases tiles of two operands that are for another warpgroup."""
    for turn in range(begin, end):
        wait_full(a_full, turn, STAGES)
        mbarrier.arrive(a_free.index(turn % STAGES), count=1)
        wait_full(b_full, turn, STAGES)
        mbarrier.arrive(b_free.index(turn % STAGES), count=1)


@gluon.jit
def load_rows(
    desc, buffer, bar, batch, head, row, ROWS: gl.constexpr, FIRST: gl.constexpr, D: gl.constexpr
):
    """ROWS rows of (B, H, N, D) into rows FIRST.. of a buffer [1, 1, any, D], as many columns at
    once as the descriptor says.
    """
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    for c in gl.static_range(D // COLUMNS):
        part = buffer.slice(FIRST, ROWS, dim=2).slice(c * COLUMNS, COLUMNS, dim=3)
        tma.async_copy_global_to_shared(desc, [batch, head, row, c * COLUMNS], bar, part)


@gluon.jit
def store_tile(desc, buffer, batch, head, row, D: gl.constexpr):
    """A buffer [1, 1, 64, D] to rows of (B, H, N, D); what reaches over the end is cut off."""
    for c in gl.static_range(D // 64):
        tma.async_copy_shared_to_global(
            desc, [batch, head, row, c * 64], buffer.slice(c * 64, 64, dim=3)
        )


@gluon.jit
def store_rows(desc, ptr, x, batch, head, row, first, last, D: gl.constexpr):
    """Those of 64 rows x, from `row` on, that lie in first .. last - 1 of (B, H, N, D).

    TMA cannot: it stores no box that begins before the tensor, nor part of one inside.
    """
    layout: gl.constexpr = x.type.layout
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    start = ptr + batch.to(gl.int64) * desc.strides[0] + head.to(gl.int64) * desc.strides[1]
    offs = rows.to(gl.int64) * desc.strides[2]
    mask = ((rows >= first) & (rows < last))[:, None] & (columns < desc.shape[3])[None, :]
    gl.store(start + offs[:, None] + columns[None, :], x, mask=mask)


@gluon.jit
def _row_word(
    block_tiles_ptr, tiles_ptr, place, in_block, word, BM: gl.constexpr, WORDS: gl.constexpr
):
    """32 bits of each of 64 rows of a block: all of a full one, none of one not stored."""
    tile = gl.load(block_tiles_ptr + place)  # [64]
    bits = gl.where(tile == 0, -1, 0)
    if tiles_ptr is not None:
        offs = ((tile - 1) * BM + in_block).to(gl.int64) * WORDS + word
        bits = bits | gl.load(tiles_ptr + offs, mask=tile > 0, other=0)
    return bits


@gluon.jit
def _first_bits(count):
    """A word whose first `count` bits are set; all of them from 32 on, none below 1."""
    some = (1 << gl.minimum(gl.maximum(count, 0), 31)) - 1
    return gl.where(count >= 32, -1, some)


@gluon.jit
def _word(
    columns_ptr, block_tiles_ptr, tiles_ptr, tile, which: gl.constexpr, sub_row, in_block, num_keys,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Columns 32 * which .. + 31 of a tile, a bit each, for every row; none from `num_keys` on."""
    SLOTS: gl.constexpr = TN // PIECE
    WORDS: gl.constexpr = (BN + 31) // 32
    if PIECE < 32:
        slot = tile * SLOTS + 2 * which
        low = _row_word(block_tiles_ptr, tiles_ptr, slot * WIDTH + sub_row, in_block, 0, BM, WORDS)
        high = _row_word(
            block_tiles_ptr, tiles_ptr, (slot + 1) * WIDTH + sub_row, in_block, 0, BM, WORDS
        )
        left = num_keys - gl.load(columns_ptr + slot) * PIECE
        right = num_keys - gl.load(columns_ptr + slot + 1) * PIECE
        low = low & _first_bits(gl.minimum(left, 16))
        bits = low | ((high & _first_bits(gl.minimum(right, 16))) << 16)
    else:
        slot = tile * SLOTS + which // (PIECE // 32)
        column = gl.load(columns_ptr + slot) * PIECE + (which % (PIECE // 32)) * 32
        word = 0
        if BN > 32:
            word = (column % BN) // 32
        bits = _row_word(
            block_tiles_ptr, tiles_ptr, slot * WIDTH + sub_row, in_block, word, BM, WORDS
        )
        bits = bits & _first_bits(num_keys - column)
    return bits


@gluon.jit
def stored_words(
    columns_ptr, block_tiles_ptr, tiles_ptr, tile, flag, sub_row, in_block, num_keys,
    BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, TN: gl.constexpr, WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """What 64 rows store of a tile, 32 columns a word; all of it where `flag` is 0.

    Separate from :func:`select`, so that the loads go on while the tensor cores do.
    """
    w0 = gl.full([64], -1, gl.int32, ROWS)
    w1 = w0
    w2 = w0
    w3 = w0
    if flag != 0:
        w0 = _word(
            columns_ptr, block_tiles_ptr, tiles_ptr, tile, 0, sub_row, in_block, num_keys,
            BM, BN, PIECE, TN, WIDTH,
        )  # fmt: skip
        if TN > 32:
            w1 = _word(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, 1, sub_row, in_block, num_keys,
                BM, BN, PIECE, TN, WIDTH,
            )  # fmt: skip
        if TN > 64:
            w2 = _word(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, 2, sub_row, in_block, num_keys,
                BM, BN, PIECE, TN, WIDTH,
            )  # fmt: skip
            w3 = _word(
                columns_ptr, block_tiles_ptr, tiles_ptr, tile, 3, sub_row, in_block, num_keys,
                BM, BN, PIECE, TN, WIDTH,
            )  # fmt: skip
    return w0, w1, w2, w3


@gluon.jit
def select(x, w0, w1, w2, w3, otherwise):
    """x [64, TN] where a bit of the words is set, else `otherwise`.

    The column is split into what differs between threads and what does not, so that a test of a bit
    is one instruction.
    """
    TN: gl.constexpr = x.shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, x.type.layout)
    c = gl.arange(0, TN, layout=COLUMNS)[None, :]
    word = w0[:, None]
    if TN > 32:
        word = gl.where(c < 32, word, w1[:, None])
    if TN > 64:
        word = gl.where(c < 64, word, gl.where(c < 96, w2[:, None], w3[:, None]))
    bit = (word >> (c & 7)) & (1 << (c & 24))
    return gl.where(bit != 0, x, otherwise)


@gluon.jit
def tile_counts(
    log_counts_ptr, tile, sub_row, PIECE: gl.constexpr, TN: gl.constexpr, WIDTH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """log2 of how often each entry of a tile counts, [64, TN]."""
    c = gl.arange(0, TN, layout=gl.SliceLayout(0, LAYOUT))
    slot = tile * (TN // PIECE) + c // PIECE
    return gl.load(log_counts_ptr + (slot * WIDTH)[None, :] + sub_row[:, None])


@gluon.jit
def tile_columns(
    columns_ptr, tile, PIECE: gl.constexpr, TN: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """The columns of the mask that a tile's entries stand in, [TN]."""
    c = gl.arange(0, TN, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(columns_ptr + tile * (TN // PIECE) + c // PIECE) * PIECE + c % PIECE


@gluon.jit
def dropout_keep(seed, threshold, batch, head, rows, columns):
    """Which probabilities dropout keeps, as `reference.dropout_keep`; `rows` and `columns` [64, TN]
    after broadcasting, integers.
    """
    zero = (rows + columns) * 0
    c0 = (zero + columns // 4).to(gl.uint32)
    c1 = (zero + rows).to(gl.uint32)
    c2 = (zero + head).to(gl.uint32)
    c3 = (zero + batch).to(gl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(gl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(gl.uint32)
    for _ in gl.static_range(10):
        a = gl.full([], 0xCD9E8D57, gl.uint32)
        b = gl.full([], 0xD2511F53, gl.uint32)
        high_a, low_a = gl.umulhi(c2, a + c2 * 0), c2 * a
        high_b, low_b = gl.umulhi(c0, b + c0 * 0), c0 * b
        c0 = high_a ^ c1 ^ k0
        c1 = low_a
        c2 = high_b ^ c3 ^ k1
        c3 = low_b
        k0 = k0 + gl.full([], 0x9E3779B9, gl.uint32)
        k1 = k1 + gl.full([], 0xBB67AE85, gl.uint32)
    which = zero + columns % 4
    word = gl.where(which < 2, gl.where(which == 0, c0, c1), gl.where(which == 2, c2, c3))
    return word >= threshold.to(gl.uint32)


@triton.jit(
    do_not_specialize=["num_sequences", "query_rows", "key_rows", "mask_rows", "mask_columns"]
)
def sequence_tiles(
    q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, table_ptr,
    num_sequences, query_rows, key_rows, mask_rows, mask_columns,
    TILE: tl.constexpr, BLOCK: tl.constexpr, KEY_TILE: tl.constexpr = 128,
):  # fmt: skip
    """Of every sequence, 8 numbers: the tiles of all before it, its first tile of rows, what to add
    to a row of the mask for its query, its first row and the one after its last, its first key, how
    many keys, and the tiles of keys of all before it. One program.
    """
    total = 0
    key_total = 0
    for first in range(0, num_sequences, BLOCK):
        b = first + tl.arange(0, BLOCK)
        inside = b < num_sequences
        q_start = tl.zeros([BLOCK], tl.int32)
        k_start = tl.zeros([BLOCK], tl.int32)
        if q_starts_ptr is not None:
            q_start = tl.load(q_starts_ptr + b, mask=inside, other=0)
        if k_starts_ptr is not None:
            k_start = tl.load(k_starts_ptr + b, mask=inside, other=0)
        q_start = tl.minimum(tl.maximum(q_start, 0), query_rows)
        k_start = tl.minimum(tl.maximum(k_start, 0), key_rows)
        q_len = tl.load(q_lens_ptr + b, mask=inside, other=0)
        k_len = tl.load(k_lens_ptr + b, mask=inside, other=0)
        q_len = tl.minimum(tl.maximum(q_len, 0), query_rows - q_start)
        k_len = tl.minimum(tl.maximum(k_len, 0), key_rows - k_start)
        past = k_len - q_len
        first_row = tl.maximum(past, 0)
        end_row = tl.maximum(tl.minimum(k_len, mask_rows), first_row)
        tile = first_row // TILE
        count = tl.where(end_row > first_row, (end_row + TILE - 1) // TILE - tile, 0)
        row = table_ptr + b * 8
        tl.store(row, total + tl.cumsum(count, 0) - count, mask=inside)
        tl.store(row + 1, tile, mask=inside)
        tl.store(row + 2, q_start - past, mask=inside)
        tl.store(row + 3, first_row, mask=inside)
        tl.store(row + 4, end_row, mask=inside)
        tl.store(row + 5, k_start, mask=inside)
        keys = tl.minimum(k_len, mask_columns)
        tl.store(row + 6, keys, mask=inside)
        total += tl.sum(count, 0)
        count = tl.where(end_row > first_row, (keys + KEY_TILE - 1) // KEY_TILE, 0)
        tl.store(row + 7, key_total + tl.cumsum(count, 0) - count, mask=inside)
        key_total += tl.sum(count, 0)
    tl.store(table_ptr + num_sequences * 8, total)
    tl.store(table_ptr + num_sequences * 8 + 7, key_total)


# --- on the host ----------------------------------------------------------------------------------


def bundle_size(samples: int, bytes_each: int, budget: int) -> int:
    """How many samples to work on together, so that what they stream stays in the L2; about equal
    bundles.
    """
    bundles = max(1, round(samples * bytes_each / budget))
    return max(1, -(-samples // bundles))


def terms_strides(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> dict[str, int]:
    """Strides of what a kernel of row terms reads, by the names of its parameters."""
    found: dict[str, int] = {}
    for letter, t in (("o", out), ("g", dout)):
        names = [f"stride_{letter}{axis}" for axis in "bhmd"]
        found |= dict(zip(names, t.stride(), strict=True))
    for letter, row in (("l", lse), ("d", dlse)):
        names = [f"stride_{letter}{axis}" for axis in "bhm"]
        found |= dict(zip(names, (0, 0, 0) if row is None else row.stride(), strict=True))
    return found


def sequence_table(
    sequences: Sequences,
    nq: int,
    nk: int,
    pattern: BlockPattern,
    rows: int,
    device: torch.device,
    *,
    keys: int = 128,
) -> Tensor:
    """What producers read of sequences, made on the device: see `sequence_tiles`. `rows` and `keys`
    are those of an item of queries, and of one of keys.
    """
    num = sequences.num_sequences
    table = torch.empty(num + 1, 8, device=device, dtype=torch.int32)
    sequence_tiles[(1,)](
        sequences.q_starts,
        sequences.q_lens,
        sequences.k_starts,
        sequences.k_lens,
        table,
        num,
        nq,
        nk,
        *pattern.shape,
        TILE=rows,
        BLOCK=128,
        KEY_TILE=keys,
        num_warps=4,
    )
    return table


def pass_arguments(
    q: Tensor,
    k: Tensor,
    mask_rows: int,
    tiles: Tensor | None,
    head_map: Tensor,
    schedule: UnitSchedule,
    sequences: Sequences | None,
    table: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> dict[str, Any]:
    """What every pass over a schedule takes by name; `tiles` are the bits of the schedule's
    pattern, `table` is that of the sequences.
    """
    (_, heads, nq, _), (kv_heads, nk) = q.shape, k.shape[1:3]
    return {
        "counter_ptr": work_counter(q.device, torch.cuda.current_stream(q.device).cuda_stream),
        "head_map_ptr": head_map,
        "columns_ptr": schedule.columns,
        "flags_ptr": schedule.flags,
        "block_tiles_ptr": schedule.block_tiles,
        "log_counts_ptr": schedule.log_counts,
        "tiles_ptr": tiles,
        "sequences_ptr": table,
        "seed_ptr": seed,
        "heads": heads,
        "group": heads // kv_heads,
        "stride_map": 0 if head_map.shape[0] == 1 else head_map.stride(0),
        "row_offset": mask_rows - nq,
        "num_queries": nq,
        "num_keys": nk,
        "num_sequences": 0 if sequences is None else sequences.num_sequences,
        "packed": 0 if sequences is None else int(sequences.packed),
        "scale": scale,
        "threshold": dropout_threshold(dropout_p),
        "keep_scale": kept_scale(dropout_p),
    }


def keys_operands(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Tensor, dk: Tensor, dv: Tensor, piece: int
) -> dict[str, Any]:
    """What a pass by column reads and writes, by name; q and dout move `piece` rows at once."""
    return {
        "q_desc": rows_descriptor(q, piece),
        "k_desc": rows_descriptor(k, UNIT),
        "v_desc": rows_descriptor(v, UNIT),
        "dout_desc": rows_descriptor(dout, piece),
        "dk_desc": rows_descriptor(dk, UNIT),
        "dv_desc": rows_descriptor(dv, UNIT),
        "dk_ptr": dk,
        "dv_ptr": dv,
        "terms_ptr": terms,
    }
