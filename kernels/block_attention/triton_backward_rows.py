"""dq and dbias of block_attention in Triton: a program a query tile, over its block rows."""

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
def attention_backward_rows(
    q_ptr, k, v, dout_ptr, dq_ptr, dbias_ptr, lse2, delta, head_map_ptr,
    starts_ptr, plain_ptr, chunks_ptr, order_ptr, columns_ptr, block_tiles_ptr, log_counts_ptr,
    positions_ptr, tiles_ptr, bias_ptr, bias_base_ptr, dbias_base_ptr, seed_ptr,
    q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_map, stride_base, stride_bias_b, stride_bias_slot, stride_bias_m, stride_bias_n,
    stride_dbase, stride_dbias_b, stride_terms, heads, group, num_groups, num_tiles, first_tile,
    row_offset, num_queries, num_keys, head_dim, value_dim, scale, threshold, keep_scale,
    num_sequences, mask_rows, mask_columns,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of TM rows of one head, laid out as in the forward, and the gradient of the bias there."""
    GATHER: tl.constexpr = TN // BN if TN > BN else 1
    PARTS: tl.constexpr = BN // TN if BN > TN else 1
    ROW_PARTS: tl.constexpr = BM // TM if BM > TM else 1
    DROPOUT: tl.constexpr = seed_ptr is not None
    SEQUENCES: tl.constexpr = q_lens_ptr is not None
    LOG2E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    rank = pid % num_tiles
    head = pid // num_tiles % heads
    batch = pid // num_tiles // heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    begin_query = 0
    end_query = num_queries
    end_key = num_keys
    if SEQUENCES:
        if q_starts_ptr is not None:
            batch, rank = find_tile(
                rank, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences,
                num_queries, num_keys, mask_rows, mask_columns, TM, False,
            )  # fmt: skip
        row_offset, first_row, end_row, k_start, end_key = place_of(
            batch, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences, num_queries,
            num_keys, mask_rows, mask_columns,
        )  # fmt: skip
        tile = (end_row + TM - 1) // TM - 1 - rank
        if (end_row <= first_row) | (tile < first_row // TM):
            return
        begin_query = first_row - row_offset
        end_query = end_row - row_offset
    which = tl.load(head_map_ptr + batch * stride_map + head)
    if order_ptr is not None:
        tile = (
            tl.load(order_ptr + which * num_groups + rank // ROW_PARTS) * ROW_PARTS
            + rank % ROW_PARTS
        )
    elif not SEQUENCES:
        tile = first_tile + num_tiles - 1 - rank
    row = which * num_groups + tile // ROW_PARTS
    start = tl.load(starts_ptr + row)
    plain = tl.load(plain_ptr + row) * PARTS
    total = tl.load(chunks_ptr + row) * PARTS
    lead = 0
    jump = 0
    if SEQUENCES:
        plain, total, lead, jump = chunks_between(
            columns_ptr, start, plain // PARTS, total // PARTS, 0, end_key, BN, GATHER
        )
        plain *= PARTS
        total *= PARTS

    offs_m = tile * TM + tl.arange(0, TM)
    offs_r = (tile % ROW_PARTS) * TM + tl.arange(0, TM)
    query = offs_m - row_offset
    mask_m = (query >= begin_query) & (query < end_query)
    offs_n = tl.arange(0, TN)
    offs_d = tl.arange(0, D)
    offs_dv = tl.arange(0, DV)
    mask_q = mask_m[:, None] & (offs_d < head_dim)[None, :]
    mask_g = mask_m[:, None] & (offs_dv < value_dim)[None, :]
    query64 = query.to(tl.int64)[:, None]
    q_ptrs = q_ptr + batch64 * stride_qb + head64 * stride_qh
    q_tile = tl.load(
        q_ptrs + query64 * stride_qm + (offs_d * stride_qd)[None, :], mask=mask_q, other=0.0
    )
    dout_ptrs = dout_ptr + batch64 * stride_gb + head64 * stride_gh
    dout_tile = tl.load(
        dout_ptrs + query64 * stride_gm + (offs_dv * stride_gd)[None, :], mask=mask_g, other=0.0
    )
    terms = (batch64 * heads + head) * stride_terms + query
    lse2_tile = tl.load(lse2 + terms, mask=mask_m, other=float("inf"))
    delta_tile = tl.load(delta + terms, mask=mask_m, other=0.0)
    if not TMA:
        k += batch64 * stride_kb + kv_head64 * stride_kh
        v += batch64 * stride_vb + kv_head64 * stride_vh
    if SEQUENCES:
        tl.static_assert(not TMA, "a descriptor would read the padding of a sequence")
        k += k_start.to(tl.int64) * stride_kn
        v += k_start.to(tl.int64) * stride_vn
    if bias_ptr is not None:
        base = tl.load(bias_base_ptr + batch * stride_base + head)
        bias_ptr += batch.to(tl.int64) * stride_bias_b + base * stride_bias_slot
    if dbias_ptr is not None:
        base = tl.load(dbias_base_ptr + batch * stride_dbase + head)
        dbias_ptr += batch.to(tl.int64) * stride_dbias_b + base * (BM * BN)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    scale2 = scale * LOG2E

    dq = tl.zeros([TM, D], tl.float32)
    chunk = chunk_at(0, plain, lead, jump, PARTS, SEQUENCES)
    next_blocks = slot_blocks(columns_ptr, start + chunk * GATHER, offs_n, BN, TN)
    for j in tl.range(0, total, num_stages=STAGES):
        first = start + chunk_at(j, plain, lead, jump, PARTS, SEQUENCES) * GATHER
        part = j % PARTS
        blocks = next_blocks
        chunk = chunk_at(j + 1, plain, lead, jump, PARTS, SEQUENCES)
        next_blocks = slot_blocks(columns_ptr, start + chunk * GATHER, offs_n, BN, TN)
        keys = slot_positions(blocks, part, offs_n, BN, TN)  # [TN]
        mask_n = (keys >= 0) & (keys < end_key)
        if TMA:
            first_key = blocks * BN + part * TN
            k_tile = k.load([batch, kv_head, first_key, 0]).reshape([TN, D])
            v_tile = v.load([batch, kv_head, first_key, 0]).reshape([TN, DV])
        else:
            mask_k = mask_n[:, None] & (offs_d < head_dim)[None, :]
            mask_v = mask_n[:, None] & (offs_dv < value_dim)[None, :]
            keys64 = keys.to(tl.int64)[:, None]
            k_tile = tl.load(
                k + keys64 * stride_kn + (offs_d * stride_kd)[None, :], mask=mask_k, other=0.0
            )
            v_tile = tl.load(
                v + keys64 * stride_vn + (offs_dv * stride_vd)[None, :], mask=mask_v, other=0.0
            )
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale2  # [TM, TN]
        if bias_ptr is not None:
            position = tl.load(positions_ptr + slot_index(first, offs_r, offs_n, BM, BN, TM, TN))
            in_row = offs_r % BM
            in_column = (part * TN + offs_n) % BN
            bias_ptrs = bias_ptr + position.to(tl.int64) * stride_bias_slot
            bias_ptrs += (in_row * stride_bias_m)[:, None] + (in_column * stride_bias_n)[None, :]
            s += tl.load(bias_ptrs, mask=position >= 0, other=0.0).to(tl.float32) * LOG2E
        p = tl.math.exp2(s - lse2_tile[:, None])
        if SEQUENCES:
            # also full blocks reach over the end of a sequence
            p = tl.where(mask_n[None, :], p, 0.0)
        if j >= plain:
            if log_counts_ptr is not None:
                p *= tl.math.exp2(
                    tl.load(log_counts_ptr + slot_index(first, offs_r, offs_n, BM, BN, TM, TN))
                )
            live = stored_entries(
                block_tiles_ptr, tiles_ptr, first, part, offs_r, offs_n, BM, BN, TM, TN
            )
            # what is not stored may have overflowed
            p = tl.where(live & mask_n[None, :], p, 0.0)
        dp = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)  # [TM, TN]
        if DROPOUT:
            offs4 = tl.arange(0, TN // 4) * 4
            columns4 = (
                slot_positions(slot_blocks(columns_ptr, first, offs4, BN, TN), part, offs4, BN, TN)
                // 4
            )
            keep = dropout_keep(seed, threshold, batch, head, offs_m, columns4, TM, TN)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta_tile[:, None])
        if dbias_ptr is not None:
            dbias_ptrs = dbias_ptr + position.to(tl.int64) * (BM * BN)
            dbias_ptrs += (in_row * BN)[:, None] + in_column[None, :]
            mask_b = (position >= 0) & mask_m[:, None]
            tl.store(dbias_ptrs, ds.to(dbias_ptr.dtype.element_ty), mask=mask_b)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    dq_ptrs = dq_ptr + batch64 * stride_dqb + head64 * stride_dqh
    dq_ptrs += query64 * stride_dqm + (offs_d * stride_dqd)[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_q)


# Measured as `FORWARD_TILES` are. For dq `rows` queries stay and `columns` keys stream.
ROW_TILES = [
    TileRow(2, 64, 16, 99, 0.5, Tiles(16, 64, 2, 2)),
    TileRow(2, 128, 16, 99, 0.5, Tiles(16, 32, 2, 3)),
    TileRow(2, 128, 32, 99, 1, Tiles(64, 32, 4, 3)),
    TileRow(2, 128, ANY, 99, 1, Tiles(64, 64, 4, 2)),
    TileRow(2, 256, 16, 99, 0.5, Tiles(16, 32, 2, 2)),
    TileRow(2, 256, ANY, 163, 1, Tiles(64, 32, 4, 2)),
    TileRow(2, 256, ANY, 99, 1, Tiles(32, 32, 4, 1)),
    TileRow(4, 128, ANY, 99, 1, Tiles(16, 32, 2, 1)),
    TileRow(4, 256, ANY, 99, 1, Tiles(16, 32, 4, 1)),
]


def compilations() -> Iterator[Compilation]:
    """Every tile of the table, and every feature once."""
    yield from backward_compilations(
        attention_backward_rows, ROW_TILES, ("k", "v"), lambda tiles: tiles.columns
    )
