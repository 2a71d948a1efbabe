"""dk and dv of block_attention in Triton: a program a key tile, over its block columns."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.triton_common import (
    ANY,
    LENGTHS,
    TileRow,
    Tiles,
    backward_compilations,
    dropout_keep,
    slot_blocks,
    slot_index,
    slot_positions,
    stored_entries,
)
from sparse_layouts.kernels.block_attention.triton_sequences import (
    chunk_at,
    chunks_between,
    find_tile,
    place_of,
)


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_columns(
    q, k_ptr, v_ptr, dout, dk_ptr, dv_ptr, lse2, delta, head_map_ptr,
    starts_ptr, plain_ptr, chunks_ptr, order_ptr, columns_ptr, block_tiles_ptr, log_counts_ptr,
    positions_ptr, tiles_ptr, bias_ptr, bias_base_ptr, seed_ptr,
    q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_map, stride_base, stride_bias_b, stride_bias_slot, stride_bias_m, stride_bias_n,
    stride_terms, heads, group, num_groups, num_tiles, row_offset, num_queries, num_keys,
    head_dim, value_dim, scale, threshold, keep_scale, num_sequences, mask_rows, mask_columns,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of TN keys of one key head: its query heads in order, each head's rows in order."""
    GATHER: tl.constexpr = TM // BM if TM > BM else 1
    PARTS: tl.constexpr = BM // TM if BM > TM else 1
    KEY_PARTS: tl.constexpr = BN // TN if BN > TN else 1
    DROPOUT: tl.constexpr = seed_ptr is not None
    SEQUENCES: tl.constexpr = q_lens_ptr is not None
    LOG2E: tl.constexpr = 1.4426950408889634
    # The longest columns of all heads come first: one that starts last would run alone. In each
    # part the tiles of a head are neighbours, which read the same queries.
    pid = tl.program_id(0)
    kv_heads = heads // group
    long = (num_tiles + 7) // 8
    num_long = long * (tl.num_programs(0) // num_tiles)
    if pid < num_long:
        rank = pid % long
        sample = pid // long
    else:
        rank = long + (pid - num_long) % (num_tiles - long)
        sample = (pid - num_long) // (num_tiles - long)
    kv_head = sample % kv_heads
    batch = sample // kv_heads
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
    begin_query = 0
    end_query = num_queries
    end_key = num_keys
    if SEQUENCES:
        if q_starts_ptr is not None:
            batch, rank = find_tile(
                rank, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences,
                num_queries, num_keys, mask_rows, mask_columns, TN, True,
            )  # fmt: skip
        row_offset, first_row, end_row, k_start, end_key = place_of(
            batch, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences, num_queries,
            num_keys, mask_rows, mask_columns,
        )  # fmt: skip
        tile = rank
        if tile * TN >= end_key:
            return
        begin_query = first_row - row_offset
        end_query = end_row - row_offset
    else:
        # a tile is dealt out by the weight that the first head of the group gives it
        which = tl.load(head_map_ptr + batch * stride_map + kv_head * group)
        tile = (
            tl.load(order_ptr + which * num_groups + rank // KEY_PARTS) * KEY_PARTS
            + rank % KEY_PARTS
        )
    offs_n = tile * TN + tl.arange(0, TN)
    offs_r = (tile % KEY_PARTS) * TN + tl.arange(0, TN)  # in the group of block columns
    mask_n = offs_n < end_key
    offs_m = tl.arange(0, TM)
    offs_d = tl.arange(0, D)
    offs_dv = tl.arange(0, DV)
    mask_k = mask_n[:, None] & (offs_d < head_dim)[None, :]
    mask_v = mask_n[:, None] & (offs_dv < value_dim)[None, :]
    keys64 = offs_n.to(tl.int64)[:, None]
    if SEQUENCES:
        tl.static_assert(not TMA, "a descriptor would read the padding of a sequence")
        keys64 += k_start
    k_ptrs = k_ptr + batch64 * stride_kb + kv_head64 * stride_kh
    k_tile = tl.load(
        k_ptrs + keys64 * stride_kn + (offs_d * stride_kd)[None, :], mask=mask_k, other=0.0
    )
    v_ptrs = v_ptr + batch64 * stride_vb + kv_head64 * stride_vh
    v_tile = tl.load(
        v_ptrs + keys64 * stride_vn + (offs_dv * stride_vd)[None, :], mask=mask_v, other=0.0
    )
    seed = 0
    columns4 = (tile * TN + tl.arange(0, TN // 4) * 4) // 4
    if DROPOUT:
        seed = tl.load(seed_ptr)
    # What is subtracted from scores and dp starts their accumulators: it holds no registers then.
    # fp32 would lose bits to the larger sums.
    FOLD: tl.constexpr = PRECISION == "tf32" and not DROPOUT
    scale2 = tl.where(scale == 0, 1e-30, scale * LOG2E)
    unscale = 1.0 / scale2

    dk = tl.zeros([TN, D], tl.float32)
    dv = tl.zeros([TN, DV], tl.float32)
    for member in tl.range(0, group, num_stages=1):
        head = kv_head * group + member
        head64 = head.to(tl.int64)
        which = tl.load(head_map_ptr + batch * stride_map + head)
        row = which * num_groups + tile // KEY_PARTS
        start = tl.load(starts_ptr + row)
        # where the mask has rows before the first query, every tile is masked
        plain = tl.where(row_offset == 0, tl.load(plain_ptr + row) * PARTS, 0)
        total = tl.load(chunks_ptr + row) * PARTS
        lead = 0
        jump = 0
        if SEQUENCES:
            # rows that are no query have lse +inf, so that full blocks need no mask
            plain, total, lead, jump = chunks_between(
                columns_ptr, start, tl.load(plain_ptr + row), total // PARTS, first_row, end_row,
                BM, GATHER,
            )  # fmt: skip
            plain *= PARTS
            total *= PARTS
        q_head, dout_head = q, dout
        if not TMA:
            q_head += batch64 * stride_qb + head64 * stride_qh
            dout_head += batch64 * stride_gb + head64 * stride_gh
        bias_head = bias_ptr
        if bias_ptr is not None:
            base = tl.load(bias_base_ptr + batch * stride_base + head)
            bias_head += batch.to(tl.int64) * stride_bias_b + base * stride_bias_slot
        terms = (batch64 * heads + head) * stride_terms
        # where the next tile lies is loaded one step ahead: its own load would wait for it
        chunk = chunk_at(0, plain, lead, jump, PARTS, SEQUENCES)
        next_blocks = slot_blocks(columns_ptr, start + chunk * GATHER, offs_m, BM, TM)
        for j in tl.range(0, total, num_stages=STAGES):
            first = start + chunk_at(j, plain, lead, jump, PARTS, SEQUENCES) * GATHER
            part = j % PARTS
            blocks = next_blocks
            chunk = chunk_at(j + 1, plain, lead, jump, PARTS, SEQUENCES)
            next_blocks = slot_blocks(columns_ptr, start + chunk * GATHER, offs_m, BM, TM)
            rows = slot_positions(blocks, part, offs_m, BM, TM)  # [TM], in the mask
            query = rows - row_offset
            mask_m = (query >= begin_query) & (query < end_query)
            if TMA:
                first_query = blocks * BM + part * TM - row_offset
                q_tile = q.load([batch, head, first_query, 0]).reshape([TM, D])
                dout_tile = dout.load([batch, head, first_query, 0]).reshape([TM, DV])
            else:
                mask_q = mask_m[:, None] & (offs_d < head_dim)[None, :]
                mask_g = mask_m[:, None] & (offs_dv < value_dim)[None, :]
                query64 = query.to(tl.int64)[:, None]
                q_tile = tl.load(
                    q_head + query64 * stride_qm + (offs_d * stride_qd)[None, :],
                    mask=mask_q,
                    other=0.0,
                )
                dout_tile = tl.load(
                    dout_head + query64 * stride_gm + (offs_dv * stride_gd)[None, :],
                    mask=mask_g,
                    other=0.0,
                )
            if TMA:
                lse2_tile = lse2.load([batch, head, first_query]).reshape([TM])
                delta_tile = delta.load([batch, head, first_query]).reshape([TM])
            else:
                lse2_tile = tl.load(lse2 + terms + query, mask=mask_m, other=float("inf"))
                delta_tile = tl.load(delta + terms + query, mask=mask_m, other=0.0)
            s = tl.zeros([TN, TM], tl.float32)
            dp = tl.zeros([TN, TM], tl.float32)
            if FOLD:
                s -= (lse2_tile * unscale)[None, :]
                dp -= delta_tile[None, :]
            s = tl.dot(k_tile, q_tile.T, s, input_precision=PRECISION) * scale2  # [TN, TM]
            if not FOLD:
                s -= lse2_tile[None, :]
            if bias_ptr is not None:
                position = tl.load(
                    positions_ptr + slot_index(first, offs_r, offs_m, BN, BM, TN, TM)
                )
                bias_ptrs = bias_head + position.to(tl.int64) * stride_bias_slot
                bias_ptrs += ((offs_r % BN) * stride_bias_n)[:, None]
                bias_ptrs += (((part * TM + offs_m) % BM) * stride_bias_m)[None, :]
                s += tl.load(bias_ptrs, mask=position >= 0, other=0.0).to(tl.float32) * LOG2E
            dp = tl.dot(v_tile, dout_tile.T, dp, input_precision=PRECISION)  # [TN, TM]
            p = tl.math.exp2(s)
            if j >= plain:
                if log_counts_ptr is not None:
                    p *= tl.math.exp2(
                        tl.load(log_counts_ptr + slot_index(first, offs_r, offs_m, BN, BM, TN, TM))
                    )
                live = stored_entries(
                    block_tiles_ptr, tiles_ptr, first, part, offs_r, offs_m, BN, BM, TN, TM
                )
                # what is not stored may have overflowed, or be NaN in keys that no block stores
                live &= mask_m[None, :]
                p = tl.where(live, p, 0.0)
                dp = tl.where(live, dp, 0.0)
            kept = p
            if DROPOUT:
                keep = dropout_keep(seed, threshold, batch, head, rows, columns4, TM, TN).T
                kept = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = tl.dot(kept.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
            if not FOLD:
                dp -= delta_tile[None, :]
            ds = p * dp
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    dk_ptrs = dk_ptr + batch64 * stride_dkb + kv_head64 * stride_dkh
    dk_ptrs += keys64 * stride_dkn + (offs_d * stride_dkd)[None, :]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_k)
    dv_ptrs = dv_ptr + batch64 * stride_dvb + kv_head64 * stride_dvh
    dv_ptrs += keys64 * stride_dvn + (offs_dv * stride_dvd)[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask_v)


# Measured as `FORWARD_TILES` are. For dk and dv `columns` keys stay and `rows` queries stream.
# Columns of small blocks are more often unlike than rows: a local-stride mask's are.
COLUMN_TILES = [
    TileRow(2, 64, 16, 99, 0.5, Tiles(64, 16, 4, 2)),
    TileRow(2, 64, 16, 99, 1, Tiles(64, 64, 4, 2)),
    TileRow(2, 64, 32, 99, 1, Tiles(32, 32, 2, 2)),
    TileRow(2, 128, 16, 99, 0.5, Tiles(64, 16, 4, 2)),
    TileRow(2, 128, 32, 99, 1, Tiles(32, 64, 4, 2)),
    TileRow(2, 128, ANY, 99, 1, Tiles(64, 64, 4, 2)),
    TileRow(2, 256, 16, 163, 0.5, Tiles(64, 16, 4, 2)),
    TileRow(2, 256, ANY, 227, 1, Tiles(64, 64, 8, 2)),
    TileRow(2, 256, ANY, 163, 1, Tiles(32, 64, 8, 2)),
    TileRow(2, 256, ANY, 99, 1, Tiles(32, 32, 4, 1)),
    TileRow(4, 64, 32, 99, 1, Tiles(64, 16, 4, 1)),
    TileRow(4, 64, ANY, 99, 1, Tiles(64, 32, 4, 1)),
    TileRow(4, 128, 32, 99, 1, Tiles(32, 16, 4, 1)),
    TileRow(4, 128, ANY, 99, 1, Tiles(64, 32, 8, 1)),
    TileRow(4, 256, ANY, 99, 1, Tiles(32, 16, 4, 1)),
]


def compilations() -> Iterator[Compilation]:
    """Every tile of the table, and every feature once."""
    yield from backward_compilations(
        attention_backward_columns, COLUMN_TILES, ("q", "dout"), lambda tiles: tiles.rows
    )
