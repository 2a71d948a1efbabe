"""block_attention backward in Triton: two passes over the stored blocks, no atomics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.reference import dropout_threshold
from sparse_layouts.kernels.block_attention.tile_schedule import tile_schedule
from sparse_layouts.kernels.block_attention.triton_common import (
    ANY,
    LENGTHS,
    TYPE_NAMES,
    Tiles,
    choose,
    dropout_keep,
    kept_scale,
    padded_head_dim,
    precision,
    schedule_operands,
    shared_memory_kb,
    shared_strides,
    signature,
    slot_blocks,
    slot_index,
    slot_positions,
    stored_entries,
    terms_descriptor,
    tile_descriptor,
    tma_ready,
    unsupported,
    variants,
)


@triton.jit(do_not_specialize=LENGTHS)
def attention_row_terms(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_lb, stride_lh, stride_lm, stride_db, stride_dh, stride_dm,
    stride_terms, heads, num_queries, num_rows, value_dim,
    ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Per query: rowsum(dout * out) - dlse, and lse in base 2.

    A row without entries has lse +inf, so that exp2 of anything less gives 0.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    mask_m = row < num_rows
    query = row % num_queries
    head = row // num_queries % heads
    batch = row // num_queries // heads
    offs_d = tl.arange(0, DV)
    mask = mask_m[:, None] & (offs_d < value_dim)[None, :]
    out_ptrs = out_ptr + (batch * stride_ob + head * stride_oh + query * stride_om)[:, None]
    dout_ptrs = dout_ptr + (batch * stride_gb + head * stride_gh + query * stride_gm)[:, None]
    out = tl.load(out_ptrs + (offs_d * stride_od)[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptrs + (offs_d * stride_gd)[None, :], mask=mask, other=0.0).to(tl.float32)
    lse_ptrs = lse_ptr + batch * stride_lb + head * stride_lh + query * stride_lm
    lse = tl.load(lse_ptrs, mask=mask_m, other=0.0)
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        dlse_ptrs = dlse_ptr + batch * stride_db + head * stride_dh + query * stride_dm
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    empty = lse == float("-inf")
    terms = (batch * heads + head) * stride_terms + query
    tl.store(lse2_ptr + terms, tl.where(empty, float("inf"), lse * 1.4426950408889634), mask=mask_m)
    tl.store(delta_ptr + terms, tl.where(empty, 0.0, delta), mask=mask_m)


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_columns(
    q, k_ptr, v_ptr, dout, dk_ptr, dv_ptr, lse2, delta, head_map_ptr,
    starts_ptr, plain_ptr, chunks_ptr, order_ptr, columns_ptr, block_tiles_ptr, log_counts_ptr,
    positions_ptr, tiles_ptr, bias_ptr, bias_base_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_map, stride_base, stride_bias_b, stride_bias_slot, stride_bias_m, stride_bias_n,
    stride_terms, heads, group, num_groups, num_tiles, row_offset, num_queries, num_keys,
    head_dim, value_dim, scale, threshold, keep_scale,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of TN keys of one key head: its query heads in order, each head's rows in order."""
    GATHER: tl.constexpr = TM // BM if TM > BM else 1
    PARTS: tl.constexpr = BM // TM if BM > TM else 1
    KEY_PARTS: tl.constexpr = BN // TN if BN > TN else 1
    DROPOUT: tl.constexpr = seed_ptr is not None
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
    # a tile is dealt out by the weight that the first head of the group gives it
    which = tl.load(head_map_ptr + batch * stride_map + kv_head * group)
    tile = (
        tl.load(order_ptr + which * num_groups + rank // KEY_PARTS) * KEY_PARTS + rank % KEY_PARTS
    )
    offs_n = tile * TN + tl.arange(0, TN)
    offs_r = (tile % KEY_PARTS) * TN + tl.arange(0, TN)  # in the group of block columns
    mask_n = offs_n < num_keys
    offs_m = tl.arange(0, TM)
    offs_d = tl.arange(0, D)
    offs_dv = tl.arange(0, DV)
    mask_k = mask_n[:, None] & (offs_d < head_dim)[None, :]
    mask_v = mask_n[:, None] & (offs_dv < value_dim)[None, :]
    keys64 = offs_n.to(tl.int64)[:, None]
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
        q_head, dout_head = q, dout
        if not TMA:
            q_head += batch64 * stride_qb + head64 * stride_qh
            dout_head += batch64 * stride_gb + head64 * stride_gh
        bias_head = bias_ptr
        if bias_ptr is not None:
            base = tl.load(bias_base_ptr + batch * stride_base + head)
            bias_head += batch64 * stride_bias_b + base * stride_bias_slot
        terms = (batch64 * heads + head) * stride_terms
        # where the next tile lies is loaded one step ahead: its own load would wait for it
        next_blocks = slot_blocks(columns_ptr, start, offs_m, BM, TM)
        for j in tl.range(0, total, num_stages=STAGES):
            first = start + j // PARTS * GATHER
            part = j % PARTS
            blocks = next_blocks
            next_blocks = slot_blocks(
                columns_ptr, start + (j + 1) // PARTS * GATHER, offs_m, BM, TM
            )
            rows = slot_positions(blocks, part, offs_m, BM, TM)  # [TM], in the mask
            query = rows - row_offset
            mask_m = (query >= 0) & (query < num_queries)
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


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_rows(
    q_ptr, k, v, dout_ptr, dq_ptr, dbias_ptr, lse2, delta, head_map_ptr,
    starts_ptr, plain_ptr, chunks_ptr, order_ptr, columns_ptr, block_tiles_ptr, log_counts_ptr,
    positions_ptr, tiles_ptr, bias_ptr, bias_base_ptr, dbias_base_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_map, stride_base, stride_bias_b, stride_bias_slot, stride_bias_m, stride_bias_n,
    stride_dbase, stride_dbias_b, stride_terms, heads, group, num_groups, num_tiles, first_tile,
    row_offset, num_queries, num_keys, head_dim, value_dim, scale, threshold, keep_scale,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of TM rows of one head, laid out as in the forward, and the gradient of the bias there."""
    GATHER: tl.constexpr = TN // BN if TN > BN else 1
    PARTS: tl.constexpr = BN // TN if BN > TN else 1
    ROW_PARTS: tl.constexpr = BM // TM if BM > TM else 1
    DROPOUT: tl.constexpr = seed_ptr is not None
    LOG2E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    rank = pid % num_tiles
    head = pid // num_tiles % heads
    batch = pid // num_tiles // heads
    kv_head = head // group
    batch64, head64, kv_head64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    which = tl.load(head_map_ptr + batch * stride_map + head)
    if order_ptr is not None:
        tile = (
            tl.load(order_ptr + which * num_groups + rank // ROW_PARTS) * ROW_PARTS
            + rank % ROW_PARTS
        )
    else:
        tile = first_tile + num_tiles - 1 - rank
    row = which * num_groups + tile // ROW_PARTS
    start = tl.load(starts_ptr + row)
    plain = tl.load(plain_ptr + row) * PARTS
    total = tl.load(chunks_ptr + row) * PARTS

    offs_m = tile * TM + tl.arange(0, TM)
    offs_r = (tile % ROW_PARTS) * TM + tl.arange(0, TM)
    query = offs_m - row_offset
    mask_m = (query >= 0) & (query < num_queries)
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
    if bias_ptr is not None:
        base = tl.load(bias_base_ptr + batch * stride_base + head)
        bias_ptr += batch64 * stride_bias_b + base * stride_bias_slot
    if dbias_ptr is not None:
        base = tl.load(dbias_base_ptr + batch * stride_dbase + head)
        dbias_ptr += batch64 * stride_dbias_b + base * (BM * BN)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    scale2 = scale * LOG2E

    dq = tl.zeros([TM, D], tl.float32)
    next_blocks = slot_blocks(columns_ptr, start, offs_n, BN, TN)
    for j in tl.range(0, total, num_stages=STAGES):
        first = start + j // PARTS * GATHER
        part = j % PARTS
        blocks = next_blocks
        next_blocks = slot_blocks(columns_ptr, start + (j + 1) // PARTS * GATHER, offs_n, BN, TN)
        keys = slot_positions(blocks, part, offs_n, BN, TN)  # [TN]
        mask_n = (keys >= 0) & (keys < num_keys)
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


# (bytes of an element, largest head size, largest block, KB of shared memory): tile; see `choose`.
# Measured on an H200, 2026-11-20, on local-stride masks: bf16 at N 8192, D 128, blocks of 64 and
# 128, and at N 4096, D 64, 128 and 256, blocks of 16, 32 and 64; fp32 at N 4096, D 128 and 256,
# block 64. The entries for less shared memory are not measured.
# For dk and dv `columns` keys stay and `rows` queries stream. Neighbouring small blocks are unlike:
# their columns want narrow tiles.
COLUMN_TILES = [
    (2, 64, 16, 99, Tiles(32, 16, 1, 2)),
    (2, 64, 32, 99, Tiles(32, 32, 2, 2)),
    (2, 128, 16, 99, Tiles(32, 16, 2, 2)),
    (2, 128, ANY, 99, Tiles(64, 64, 4, 2)),
    (2, 256, ANY, 227, Tiles(64, 64, 8, 2)),
    (2, 256, ANY, 163, Tiles(32, 64, 8, 2)),
    (2, 256, ANY, 99, Tiles(32, 32, 4, 1)),
    (4, 128, ANY, 99, Tiles(64, 32, 8, 1)),
    (4, 256, ANY, 99, Tiles(32, 16, 4, 1)),
]
# For dq `rows` queries stay and `columns` keys stream.
ROW_TILES = [
    (2, 128, 32, 99, Tiles(64, 32, 4, 3)),
    (2, 128, ANY, 99, Tiles(64, 64, 4, 2)),
    (2, 256, ANY, 227, Tiles(128, 32, 8, 2)),
    (2, 256, ANY, 163, Tiles(64, 32, 4, 2)),
    (2, 256, ANY, 99, Tiles(32, 32, 4, 1)),
    (4, 128, ANY, 227, Tiles(64, 64, 8, 1)),
    (4, 128, ANY, 99, Tiles(32, 32, 4, 1)),
    (4, 256, ANY, 99, Tiles(16, 32, 4, 1)),
]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, dbias)` as the reference defines them, in bf16, fp16 or fp32.

    The scores are computed twice, by columns for dk and dv and by rows for dq and dbias, so that
    every gradient is added up in one place and in one order: the same inputs give the same bits.
    """
    head_dim, (bm, bn) = max(q.shape[-1], v.shape[-1]), pattern.block_size
    size, shared_kb = q.element_size(), shared_memory_kb(q.device)
    return launch_backward(
        dout, dlse, q, k, v, out, lse, pattern, head_map, scale, dropout_p, seed, bias, bias_base,
        dbias_base, dbias_blocks,
        choose(COLUMN_TILES, size, head_dim, bn, shared_kb),
        choose(ROW_TILES, size, head_dim, bm, shared_kb),
    )  # fmt: skip


def launch_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    bias_base: Tensor | None,
    dbias_base: Tensor | None,
    dbias_blocks: int,
    by_column: Tiles,
    by_row: Tiles,
    tma: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`block_attention_backward` with given tiles, to measure; `tma=False`: plain loads."""
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    head_map = head_map.contiguous()
    bias_base = None if bias_base is None else bias_base.contiguous()
    dbias_base = None if dbias_base is None else dbias_base.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbias = None
    if bias is not None and dbias_base is not None:
        samples = 1 if dbias_base.shape[0] > 1 else batch
        dbias = bias.new_zeros(samples, dbias_blocks, bm, bn)
    if lse.numel() == 0 or pattern.num_blocks == 0 or head_dim == 0 or value_dim == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    # rows of terms stand 16 bytes apart, as descriptors want them
    terms = torch.empty(2, batch, heads, -(-nq // 4) * 4, device=q.device, dtype=torch.float32)
    lse2, delta = terms[..., :nq]
    d, dv_tile = padded_head_dim(head_dim), padded_head_dim(value_dim)
    rows_of_terms = max(16, 4096 // dv_tile)
    attention_row_terms[(triton.cdiv(lse.numel(), rows_of_terms),)](
        out,
        dout,
        lse,
        dlse,
        lse2,
        delta,
        *out.stride(),
        *dout.stride(),
        *lse.stride(),
        *((0, 0, 0) if dlse is None else dlse.stride()),
        lse2.stride(1),
        heads,
        nq,
        lse.numel(),
        value_dim,
        ROWS=rows_of_terms,
        DV=dv_tile,
        num_warps=4,
    )
    dropout = seed is not None and dropout_p > 0
    sizes = (m - nq, nq, nk, head_dim, value_dim)
    numbers = (scale, dropout_threshold(dropout_p), kept_scale(dropout_p) if dropout else 1.0)
    flags = {
        "BM": bm,
        "BN": bn,
        "D": d,
        "DV": dv_tile,
        "PRECISION": precision(q.dtype),
    }
    inputs = (*q.stride(), *k.stride(), *v.stride(), *dout.stride())
    shared = shared_strides(head_map, bias, bias_base)
    seed = seed if dropout else None

    transposed = transpose_pattern(pattern)
    schedule = tile_schedule(
        transposed,
        max(1, by_column.columns // bn),
        max(1, by_column.rows // bm),
        positions=None if bias is None else "columns",
    )
    groups = schedule.chunks.shape[1]
    num_tiles = groups * max(1, bn // by_column.columns)
    # a descriptor's rows of terms are read from 16-byte boundaries
    use_tma = tma and bm >= by_column.rows and (m - nq) % 4 == 0
    use_tma = use_tma and tma_ready(q) and tma_ready(dout)
    attention_backward_columns[(num_tiles * kv_heads * batch,)](
        tile_descriptor(q, by_column.rows, d) if use_tma else q,
        k,
        v,
        tile_descriptor(dout, by_column.rows, dv_tile) if use_tma else dout,
        dk,
        dv,
        terms_descriptor(lse2, by_column.rows) if use_tma else lse2,
        terms_descriptor(delta, by_column.rows) if use_tma else delta,
        head_map,
        *schedule_operands(schedule),
        transposed.tiles,
        bias,
        bias_base,
        seed,
        *inputs,
        *dk.stride(),
        *dv.stride(),
        *shared,
        lse2.stride(1),
        heads,
        heads // kv_heads,
        groups,
        num_tiles,
        *sizes,
        *numbers,
        TMA=use_tma,
        **flags,
        TM=by_column.rows,
        TN=by_column.columns,
        STAGES=by_column.num_stages,
        num_warps=by_column.num_warps,
    )

    schedule = tile_schedule(
        pattern,
        max(1, by_row.rows // bm),
        max(1, by_row.columns // bn),
        positions=None if bias is None else "rows",
    )
    groups = schedule.chunks.shape[1]
    first_tile = (m - nq) // by_row.rows
    num_tiles = -(-m // by_row.rows) - first_tile
    if m == nq:
        num_tiles = groups * max(1, bm // by_row.rows)
    use_tma = tma and bn >= by_row.columns and tma_ready(k) and tma_ready(v)
    attention_backward_rows[(num_tiles * heads * batch,)](
        q,
        tile_descriptor(k, by_row.columns, d) if use_tma else k,
        tile_descriptor(v, by_row.columns, dv_tile) if use_tma else v,
        dout,
        dq,
        dbias,
        lse2,
        delta,
        head_map,
        *schedule_operands(schedule, ordered=m == nq),
        pattern.tiles,
        bias,
        bias_base,
        None if dbias is None else dbias_base,
        seed,
        *inputs,
        *dq.stride(),
        *shared,
        dbias_base.stride(0) if dbias is not None and dbias_base.shape[0] > 1 else 0,
        dbias.stride(0) if dbias is not None and dbias.shape[0] > 1 else 0,
        lse2.stride(1),
        heads,
        heads // kv_heads,
        groups,
        num_tiles,
        first_tile,
        *sizes,
        *numbers,
        TMA=use_tma,
        **flags,
        TM=by_row.rows,
        TN=by_row.columns,
        STAGES=by_row.num_stages,
        num_warps=by_row.num_warps,
    )
    return dq, dk, dv, dbias


def requires(
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
) -> str | None:
    """None, or why these kernels do not take a case."""
    return unsupported(device_type, capability, dtype, head_dim, block_size)


def compilations() -> Iterator[Compilation]:
    """Every tile of the two tables, and every feature once."""
    for case in variants():
        d = padded_head_dim(case.head_dim)
        kind = TYPE_NAMES[case.dtype]
        chosen = (case.dtype.itemsize, d, case.block, case.shared_kb)
        by_column, by_row = choose(COLUMN_TILES, *chosen), choose(ROW_TILES, *chosen)
        flags = {"BM": case.block, "BN": case.block, "D": d, "DV": d}
        flags["PRECISION"] = precision(case.dtype)
        for kernel, tiles, streamed, length in (
            (attention_backward_columns, by_column, ("q", "dout"), by_column.rows),
            (attention_backward_rows, by_row, ("k", "v"), by_row.columns),
        ):
            if case.tma and case.block < length:
                continue
            constexprs = case.absent() | flags | {"TMA": case.tma, "STAGES": tiles.num_stages}
            constexprs |= {"TM": tiles.rows, "TN": tiles.columns}
            if not case.bias and kernel is attention_backward_rows:
                constexprs |= {"dbias_ptr": None, "dbias_base_ptr": None}
            descriptor = f"tensordesc<{kind}[1, 1, {length}, {d}]>" if case.tma else f"*{kind}"
            plain = ("q_ptr", "k_ptr", "v_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
            given = dict.fromkeys((*plain, "bias_ptr", "dbias_ptr"), f"*{kind}")
            given |= dict.fromkeys(streamed, descriptor)
            terms = f"tensordesc<fp32[1, 1, {length}]>" if case.tma and "q" in streamed else "*fp32"
            given |= {"lse2": terms, "delta": terms, "log_counts_ptr": "*fp32"}
            given |= dict.fromkeys(("bias_base_ptr", "dbias_base_ptr", "seed_ptr"), "*i64")
            yield Compilation(
                f"{kernel.__name__}-{case.name}",
                kernel,
                signature(kernel, given, constexprs),
                constexprs,
                {"num_warps": tiles.num_warps},
                case.min_capability,
            )
    for dtype, kind in TYPE_NAMES.items():
        constexprs = {"ROWS": 64, "DV": 64} | ({} if dtype == torch.float32 else {"dlse_ptr": None})
        given = {"out_ptr": f"*{kind}", "dout_ptr": f"*{kind}"}
        given |= dict.fromkeys(("lse_ptr", "dlse_ptr", "lse2_ptr", "delta_ptr"), "*fp32")
        yield Compilation(
            f"attention_row_terms-{kind}",
            attention_row_terms,
            signature(attention_row_terms, given, constexprs),
            constexprs,
            {"num_warps": 4},
        )
