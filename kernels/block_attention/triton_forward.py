"""block_attention forward in Triton: online softmax over the tile schedule's columns."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.reference import dropout_threshold
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.tile_schedule import tile_fill, tile_schedule
from sparse_layouts.kernels.block_attention.triton_common import (
    ANY,
    LENGTHS,
    TYPE_NAMES,
    TileRow,
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
    tile_descriptor,
    tma_ready,
    variants,
)
from sparse_layouts.kernels.block_attention.triton_sequences import (
    chunk_at,
    chunks_between,
    find_tile,
    most_tiles,
    place_of,
    sequence_operands,
)
from sparse_layouts.kernels.launching import PassLaunch, PreparedLaunches


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    q_ptr, k, v, out_ptr, lse_ptr, head_map_ptr,
    starts_ptr, plain_ptr, chunks_ptr, order_ptr, columns_ptr, block_tiles_ptr, log_counts_ptr,
    positions_ptr, tiles_ptr, bias_ptr, bias_base_ptr, seed_ptr,
    q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od,
    stride_map, stride_base, stride_bias_b, stride_bias_slot, stride_bias_m, stride_bias_n,
    heads, group, num_groups, num_tiles, first_tile, row_offset, num_queries, num_keys,
    head_dim, value_dim, scale, threshold, keep_scale, num_sequences, mask_rows, mask_columns,
    TMA: tl.constexpr, POSITIVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TM rows of one head: rows of the mask, of which the queries are the last, or rows of one of
    several sequences, whose place `q_lens_ptr` and the like say.
    """
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
        # the last rows first: under a causal mask they have the most keys
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

    offs_m = tile * TM + tl.arange(0, TM)  # in the mask
    offs_r = (tile % ROW_PARTS) * TM + tl.arange(0, TM)  # in the group of block rows
    query = offs_m - row_offset
    mask_m = (query >= begin_query) & (query < end_query)
    offs_d = tl.arange(0, D)
    offs_dv = tl.arange(0, DV)
    q_ptrs = q_ptr + batch64 * stride_qb + head64 * stride_qh
    q_ptrs += query.to(tl.int64)[:, None] * stride_qm + (offs_d * stride_qd)[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < head_dim)[None, :], other=0.0)
    # the maximum is taken before scaling where the scale is positive and nothing is added to scores
    SCALED: tl.constexpr = bias_ptr is not None or log_counts_ptr is not None or not POSITIVE
    scale2 = scale * LOG2E
    rate = 1.0 if SCALED else scale2
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
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    offs_n = tl.arange(0, TN)
    peak = tl.full([TM], float("-inf"), tl.float32)
    norm = tl.zeros([TM], tl.float32)
    acc = tl.zeros([TM, DV], tl.float32)
    # where the next tile lies is loaded one step ahead: its own load would wait for it
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
        s = tl.dot(q, k_tile.T, input_precision=PRECISION)  # [TM, TN]
        if SCALED:
            s *= scale2
        if bias_ptr is not None:
            position = tl.load(positions_ptr + slot_index(first, offs_r, offs_n, BM, BN, TM, TN))
            bias_ptrs = bias_ptr + position.to(tl.int64) * stride_bias_slot
            bias_ptrs += ((offs_r % BM) * stride_bias_m)[:, None]
            bias_ptrs += (((part * TN + offs_n) % BN) * stride_bias_n)[None, :]
            s += tl.load(bias_ptrs, mask=position >= 0, other=0.0).to(tl.float32) * LOG2E
        if SEQUENCES:
            # also full blocks reach over the end of a sequence
            s = tl.where(mask_n[None, :], s, float("-inf"))
        if j >= plain:
            if log_counts_ptr is not None:
                s += tl.load(log_counts_ptr + slot_index(first, offs_r, offs_n, BM, BN, TM, TN))
            live = stored_entries(
                block_tiles_ptr, tiles_ptr, first, part, offs_r, offs_n, BM, BN, TM, TN
            )
            s = tl.where(live & mask_n[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * rate)
        # a row that has met nothing yet keeps -inf, and must not subtract it from itself
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.math.exp2(s * rate - shift[:, None])
        decay = tl.math.exp2(peak - shift)
        norm = norm * decay + tl.sum(p, 1)
        peak = new_peak
        if DROPOUT:
            offs4 = tl.arange(0, TN // 4) * 4
            columns4 = (
                slot_positions(slot_blocks(columns_ptr, first, offs4, BN, TN), part, offs4, BN, TN)
                // 4
            )
            p = tl.where(
                dropout_keep(seed, threshold, batch, head, offs_m, columns4, TM, TN), p, 0.0
            )
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)

    empty = norm == 0
    norm = tl.where(empty, 1.0, norm)
    acc = acc * (keep_scale / norm)[:, None]
    lse = tl.where(empty, float("-inf"), (peak + tl.math.log2(norm)) * 0.6931471805599453)
    tl.store(lse_ptr + (batch64 * heads + head) * num_queries + query, lse, mask=mask_m)
    out_ptrs = out_ptr + batch64 * stride_ob + head64 * stride_oh
    out_ptrs += query.to(tl.int64)[:, None] * stride_om + (offs_dv * stride_od)[None, :]
    tl.store(
        out_ptrs,
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_dv < value_dim)[None, :],
    )


# Measured on an H200: 2026-11-20 on local-stride masks, 2026-11-27 beside them on random blocks
# (2 to 40%), BigBird and sliding windows, N 8192, blocks of 16 to 128. Rows for less shared memory
# are not measured. What decides is not how much is stored but how alike neighbours are, and only
# with blocks of 16: at D 64 random ones take 1.2 to 1.8 times as long with the tile of 64 rows,
# local stride 2.2 times as long with that of 16. In fp32 small tiles are up to 5 times as fast as
# large ones, which run out of registers.
FORWARD_TILES = [
    TileRow(2, 64, 16, 99, 0.5, Tiles(16, 32, 1, 3)),
    TileRow(2, 64, 64, 99, 1, Tiles(64, 64, 4, 3)),
    TileRow(2, 64, ANY, 99, 1, Tiles(64, 128, 4, 2)),
    TileRow(2, 128, 16, 99, 0.35, Tiles(16, 32, 2, 3)),
    # three stages of 64 keys at D 128 take 112 KB, of which two just fit a multiprocessor
    TileRow(2, 128, 16, 163, 1, Tiles(64, 64, 4, 3)),
    TileRow(2, 128, 32, 99, 1, Tiles(64, 32, 4, 3)),
    TileRow(2, 128, ANY, 163, 1, Tiles(64, 64, 4, 3)),
    TileRow(2, 128, ANY, 99, 1, Tiles(64, 64, 4, 2)),
    TileRow(2, 256, 16, 99, 0.35, Tiles(16, 32, 2, 2)),
    TileRow(2, 256, 32, 99, 1, Tiles(64, 32, 4, 2)),
    TileRow(2, 256, ANY, 99, 1, Tiles(64, 64, 4, 1)),
    TileRow(4, 64, 32, 99, 1, Tiles(16, 32, 2, 2)),
    TileRow(4, 64, ANY, 99, 1, Tiles(16, 64, 4, 2)),
    TileRow(4, 128, 32, 99, 1, Tiles(16, 32, 2, 2)),
    TileRow(4, 128, ANY, 99, 1, Tiles(16, 64, 4, 2)),
    TileRow(4, 256, ANY, 163, 1, Tiles(16, 32, 4, 2)),
    TileRow(4, 256, ANY, 99, 1, Tiles(16, 32, 4, 1)),
]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as `reference.block_attention` defines them, in bf16, fp16 or fp32.

    After FlashAttention-2 (Dao, arXiv 2307.08691): one pass over the stored blocks of a tile of
    rows, the softmax in base 2.
    """
    tiles = tiles_for(q, v, pattern)
    with torch.cuda.device_of(q):
        return launch_forward(
            q, k, v, pattern, head_map, scale, dropout_p, seed, bias, bias_base, tiles, sequences
        )


def tiles_for(q: Tensor, v: Tensor, pattern: BlockPattern) -> Tiles:
    """From the table."""
    head_dim, block = max(q.shape[-1], v.shape[-1]), pattern.block_size[0]
    size, shared_kb = q.element_size(), shared_memory_kb(q.device)
    fill = functools.partial(tile_fill, pattern)
    return choose(FORWARD_TILES, size, head_dim, block, shared_kb, fill)


class PreparedForward:
    """Calls on operands like these, without dropout, bias and sequences: all but addresses is
    settled.
    """

    MOVING = ("q", "k", "v", "out", "lse")

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        pattern: BlockPattern,
        head_map: Tensor,
        scale: float,
    ) -> None:
        tiles, self._lse_shape = tiles_for(q, v, pattern), lse.shape
        launch = forward_pass(q, k, v, out, lse, pattern, head_map, scale, tiles)
        self._launches = PreparedLaunches([launch], self.MOVING)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, stream: int
    ) -> None:
        """Writes `out` and, if there is one, `lse`."""
        if lse is None:
            lse = torch.empty(self._lse_shape, device=q.device, dtype=torch.float32)
        self._launches.launch((q, k, v, out, lse), stream)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    bias_base: Tensor | None,
    tiles: Tiles,
    sequences: Sequences | None = None,
    tma: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`block_attention` with a given tile, for measuring; `tma=False`: plain loads."""
    value_dim = v.shape[-1]
    out = torch.empty_like(q) if value_dim == q.shape[-1] else q.new_empty(*q.shape[:-1], value_dim)
    lse = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
    if lse.numel() == 0 or pattern.num_blocks == 0 or value_dim == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if sequences is not None:
        # rows of no sequence are never written
        out.zero_()
        lse.fill_(-math.inf)
        if sequences.num_sequences == 0:
            return out, lse
    operands = (q, k, v, out, lse, pattern, head_map, scale, tiles)
    forward_pass(*operands, dropout_p, seed, bias, bias_base, sequences, tma).run()
    return out, lse


def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    tiles: Tiles,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    sequences: Sequences | None = None,
    tma: bool = True,
) -> PassLaunch:
    """The launch of the kernel; `tma=False`: plain loads."""
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    head_map = head_map.contiguous()
    bias_base = None if bias_base is None else bias_base.contiguous()
    schedule = tile_schedule(
        pattern,
        max(1, tiles.rows // bm),
        max(1, tiles.columns // bn),
        positions=None if bias is None else "rows",
    )
    d, dv = padded_head_dim(head_dim), padded_head_dim(value_dim)
    first_tile = (m - nq) // tiles.rows
    num_tiles = -(-m // tiles.rows) - first_tile
    row_parts = max(1, bm // tiles.rows)
    # with all rows there, whole groups are dealt out, heaviest first
    ordered = m == nq and sequences is None
    if ordered:
        num_tiles = schedule.chunks.shape[1] * row_parts
    if sequences is not None:
        num_tiles = most_tiles(sequences, nq, tiles.rows, m, aligned=False)
    tma = tma and sequences is None and bn >= tiles.columns and tma_ready(k) and tma_ready(v)
    arrays, sizes = sequence_operands(sequences, pattern.shape)
    dropout = seed is not None and dropout_p > 0
    values = (
        q,
        tile_descriptor(k, tiles.columns, d) if tma else k,
        tile_descriptor(v, tiles.columns, dv) if tma else v,
        out,
        lse,
        head_map,
        *schedule_operands(schedule, ordered),
        pattern.tiles,
        bias,
        bias_base,
        seed if dropout else None,
        *arrays,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *shared_strides(head_map, bias, bias_base),
        heads,
        heads // kv_heads,
        schedule.chunks.shape[1],
        num_tiles,
        first_tile,
        m - nq,
        nq,
        nk,
        head_dim,
        value_dim,
        scale,
        dropout_threshold(dropout_p),
        kept_scale(dropout_p) if dropout else 1.0,
        *sizes,
    )
    options = {
        "TMA": tma,
        "POSITIVE": scale > 0,
        "BM": bm,
        "BN": bn,
        "TM": tiles.rows,
        "TN": tiles.columns,
        "D": d,
        "DV": dv,
        "PRECISION": precision(q.dtype),
        "STAGES": tiles.num_stages,
        "num_warps": tiles.num_warps,
    }
    arguments = dict(zip(attention_forward.arg_names, values, strict=False))
    return PassLaunch(attention_forward, num_tiles * heads * batch, arguments, options)


def compilations() -> Iterator[Compilation]:
    """Every tile of the table, and every feature once."""
    for case in variants():
        d = padded_head_dim(case.head_dim)
        tiles = case.tiles_of(FORWARD_TILES)
        if case.tma and case.block < tiles.columns:
            continue
        kind = TYPE_NAMES[case.dtype]
        constexprs = case.absent() | {
            "TMA": case.tma,
            "POSITIVE": True,
            "BM": case.block,
            "BN": case.block,
            "TM": tiles.rows,
            "TN": tiles.columns,
            "D": d,
            "DV": d,
            "PRECISION": precision(case.dtype),
            "STAGES": tiles.num_stages,
        }
        streamed = f"tensordesc<{kind}[1, 1, {tiles.columns}, {d}]>" if case.tma else f"*{kind}"
        given = dict.fromkeys(("q_ptr", "out_ptr", "bias_ptr"), f"*{kind}")
        given |= {"k": streamed, "v": streamed, "lse_ptr": "*fp32", "log_counts_ptr": "*fp32"}
        given |= {"bias_base_ptr": "*i64", "seed_ptr": "*i64"}
        yield Compilation(
            f"attention_forward-{case.name}",
            attention_forward,
            signature(attention_forward, given, constexprs),
            constexprs,
            {"num_warps": tiles.num_warps},
            case.min_capability,
            case.max_capability,
        )
