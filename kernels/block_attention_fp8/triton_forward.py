"""block_attention_fp8 in Triton: both products of e4m3 factors, the softmax between them in fp32.

Tensor cores multiply numbers of 8 bits fast only if both operands lie along the summed dimension:
q and k by rows, v by columns, as the quantiser stores them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.tile_schedule import tile_schedule
from sparse_layouts.kernels.block_attention.triton_common import (
    ANY,
    LENGTHS,
    TYPE_NAMES,
    TileRow,
    Tiles,
    Variant,
    choose,
    schedule_operands,
    shared_memory_kb,
    signature,
    slot_blocks,
    slot_index,
    slot_positions,
    stored_entries,
    tile_descriptor,
    tma_ready,
)
from sparse_layouts.kernels.block_attention.triton_sequences import (
    chunk_at,
    chunks_between,
    find_tile,
    most_tiles,
    place_of,
    sequence_operands,
)
from sparse_layouts.kernels.block_attention_fp8.quantize import ALIGNED, ROWS_PER_SCALE
from sparse_layouts.kernels.launching import PassLaunch, PreparedLaunches


@triton.jit(do_not_specialize=LENGTHS)
def attention_fp8_forward(
    q_ptr, k, v, out_ptr, lse_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, k_shift_ptr, head_map_ptr,
    starts_ptr, plain_ptr, chunks_ptr, order_ptr, columns_ptr, block_tiles_ptr, log_counts_ptr,
    tiles_ptr, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vd, stride_ob, stride_oh, stride_om, stride_map,
    heads, group, num_groups, num_tiles, first_tile, row_offset, num_queries, num_keys,
    head_dim, value_dim, scale, num_sequences, mask_rows, mask_columns,
    TMA: tl.constexpr, POSITIVE: tl.constexpr, ROWS_PER_SCALE: tl.constexpr, RUN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TM rows of one head, as `attention_forward` of the op in 16 and 32 bits takes them.

    q and k lie by rows, v by columns, out by rows: the stride of the other dimension is 1.
    """
    GATHER: tl.constexpr = TN // BN if TN > BN else 1
    PARTS: tl.constexpr = BN // TN if BN > TN else 1
    ROW_PARTS: tl.constexpr = BM // TM if BM > TM else 1
    SEQUENCES: tl.constexpr = q_lens_ptr is not None
    # whether the keys of a tile share one scale
    ONE_SCALE: tl.constexpr = GATHER == 1 and k_starts_ptr is None
    tl.static_assert(not ONE_SCALE or ROWS_PER_SCALE % TN == 0)
    LOG2E: tl.constexpr = 1.4426950408889634
    # probabilities are at most 1, e4m3 reaches to 448: they are rounded as 2 ** 8 times as much,
    # which their sum is too
    P_BITS: tl.constexpr = 8.0
    pid = tl.program_id(0)
    rank = pid % num_tiles
    head = pid // num_tiles % heads
    batch = pid // num_tiles // heads
    kv_head = head // group
    kv_heads = heads // group
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
    q_ptrs += query.to(tl.int64)[:, None] * stride_qm + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < head_dim)[None, :], other=0.0)
    q_scale_ptr += (batch64 * heads + head64) * tl.cdiv(num_queries, ROWS_PER_SCALE)
    q_scale = tl.load(q_scale_ptr + query // ROWS_PER_SCALE, mask=mask_m, other=1.0)  # [TM]
    row_rate = q_scale * (scale * LOG2E)
    k_scale_ptr += (batch64 * kv_heads + kv_head64) * tl.cdiv(num_keys, ROWS_PER_SCALE)
    if k_shift_ptr is not None:
        # the keys were smaller by k_shift, which no probability sees; before the loop, through
        # which q would otherwise be kept in registers
        k_shift_ptr += (batch64 * kv_heads + kv_head64) * head_dim
        k_shift = tl.load(k_shift_ptr + offs_d, mask=offs_d < head_dim, other=0.0)  # [D]
        shift_score = tl.sum(q.to(tl.float32) * k_shift[None, :], 1) * (q_scale * scale)  # [TM]
    # the maximum is taken before scaling where the scale is positive and nothing is masked or added
    SCALED: tl.constexpr = not POSITIVE
    if not TMA:
        k += batch64 * stride_kb + kv_head64 * stride_kh
        v += batch64 * stride_vb + kv_head64 * stride_vh
    if SEQUENCES:
        tl.static_assert(not TMA, "a descriptor would read the padding of a sequence")
        k += k_start.to(tl.int64) * stride_kn
        v += k_start

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
            v_tile = v.load([batch, kv_head, 0, first_key]).reshape([DV, TN])
        else:
            mask_k = mask_n[:, None] & (offs_d < head_dim)[None, :]
            if SEQUENCES:
                there = mask_n
            else:
                # v has zeros up to a multiple of RUN: whole words are loaded
                there = (keys >= 0) & (keys < tl.cdiv(end_key, RUN) * RUN)
            mask_v = (offs_dv < value_dim)[:, None] & there[None, :]
            runs = tl.max_contiguous(tl.multiple_of(keys, RUN), RUN)
            k_tile = tl.load(
                k + keys.to(tl.int64)[:, None] * stride_kn + offs_d[None, :], mask=mask_k, other=0.0
            )
            v_tile = tl.load(
                v + offs_dv.to(tl.int64)[:, None] * stride_vd + runs[None, :],
                mask=mask_v,
                other=0.0,
            )
        s = tl.dot(q, k_tile.T)  # [TM, TN]
        if ONE_SCALE:
            # a block may reach over the end
            first_key = tl.minimum(blocks * BN + part * TN, num_keys - 1)
            rate = row_rate * tl.load(k_scale_ptr + first_key // ROWS_PER_SCALE)
        else:
            rate = row_rate
            place = keys
            if SEQUENCES:
                place += k_start
            s *= tl.load(k_scale_ptr + place // ROWS_PER_SCALE, mask=mask_n, other=1.0)[None, :]
        if SCALED:
            s *= rate[:, None]
            rate = tl.full([TM], 1.0, tl.float32)
        if SEQUENCES:
            # also full blocks reach over the end of a sequence
            s = tl.where(mask_n[None, :], s, float("-inf"))
        if j >= plain:
            if not SCALED:
                # before the mask: what a row does not attend to may have a scale that is NaN
                s *= rate[:, None]
                rate = tl.full([TM], 1.0, tl.float32)
            if log_counts_ptr is not None:
                s += tl.load(log_counts_ptr + slot_index(first, offs_r, offs_n, BM, BN, TM, TN))
            live = stored_entries(
                block_tiles_ptr, tiles_ptr, first, part, offs_r, offs_n, BM, BN, TM, TN
            )
            s = tl.where(live & mask_n[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * rate)
        # a row that has met nothing yet keeps -inf, and must not subtract it from itself
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.math.exp2(s * rate[:, None] - (shift - P_BITS)[:, None])
        decay = tl.math.exp2(peak - shift)
        norm = norm * decay + tl.sum(p, 1)
        peak = new_peak
        # The sum over a tile starts from 0 and is added in fp32: tensor cores that add up e4m3
        # products keep some 14 bits of the largest, which over thousands of keys would show.
        acc = acc * decay[:, None] + tl.dot(p.to(v_tile.dtype), v_tile.T)

    empty = norm == 0
    lse = (peak - P_BITS + tl.math.log2(norm)) * 0.6931471805599453
    if k_shift_ptr is not None:
        lse += shift_score
    lse = tl.where(empty, float("-inf"), lse)
    tl.store(lse_ptr + (batch64 * heads + head) * num_queries + query, lse, mask=mask_m)
    v_scale_ptr += (batch64 * kv_heads + kv_head64) * value_dim
    v_scale = tl.load(v_scale_ptr + offs_dv, mask=offs_dv < value_dim, other=1.0)  # [DV]
    acc = acc * (1.0 / tl.where(empty, 1.0, norm))[:, None] * v_scale[None, :]
    acc = tl.where(empty[:, None], 0.0, acc)  # whatever the scale
    out_ptrs = out_ptr + batch64 * stride_ob + head64 * stride_oh
    out_ptrs += query.to(tl.int64)[:, None] * stride_om + offs_dv[None, :]
    tl.store(
        out_ptrs,
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_dv < value_dim)[None, :],
    )


# Measured on an H200, 2026-11-27, of quantised bf16, N 8192, random blocks (2 to 40%) and local
# stride: blocks of 16, 64 and 128 at D 64 and 128, of 64 at D 256. Rows for less shared memory are
# not measured.
FORWARD_TILES = [
    TileRow(1, 128, 32, 163, 1, Tiles(64, 128, 4, 3)),
    TileRow(1, 128, 64, 99, 1, Tiles(64, 64, 4, 3)),
    TileRow(1, 128, ANY, 163, 1, Tiles(64, 128, 4, 3)),
    TileRow(1, 128, ANY, 99, 1, Tiles(64, 64, 4, 3)),
    TileRow(1, 256, ANY, 163, 1, Tiles(64, 64, 8, 3)),
    TileRow(1, 256, ANY, 99, 1, Tiles(64, 64, 8, 2)),
]
# Where a sequence may begin at any key, columns of v are loaded a byte at a time: with 4 warps the
# addresses take more registers than there are (130 to 140 of them spilled).
ANYWHERE_WARPS = 8


def block_attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_shift: Tensor | None,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as `reference.block_attention_fp8` defines them, in bf16, fp16 or fp32.

    The scale of q goes into the exponent's rate of a row, that of k too where a tile of keys has
    one, that of v into the result: inside the loop scales cost next to nothing.
    """
    head_dim, block = max(q.shape[-1], v.shape[-1]), pattern.block_size[0]
    anywhere = sequences is not None and sequences.k_starts is not None
    tiles = tiles_for(head_dim, block, shared_memory_kb(q.device), anywhere)
    scales = (q_scale, k_scale, v_scale, k_shift)
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, scales, pattern, head_map, scale, dtype, tiles, sequences)


class PreparedForward:
    """Calls on operands like these, contiguous scales too: all but addresses is settled."""

    MOVING = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "out", "lse")

    @staticmethod
    def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether the operands are read where they are."""
        return k.shape[2] % ALIGNED == 0 and all(along_rows(x) is x for x in (q, k, v.mT))

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        pattern: BlockPattern,
        head_map: Tensor,
        scale: float,
    ) -> None:
        head_dim, block = max(q.shape[-1], v.shape[-1]), pattern.block_size[0]
        tiles = tiles_for(head_dim, block, shared_memory_kb(q.device), anywhere=False)
        lse = self._lse(q)
        operands = (q, k, v, (*scales, None), out, lse, pattern, head_map, scale, tiles)
        self._launches = PreparedLaunches([forward_pass(*operands)], self.MOVING)

    @staticmethod
    def _lse(q: Tensor) -> Tensor:
        return torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_scale: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        out: Tensor,
        stream: int,
    ) -> None:
        """Writes `out`."""
        moving = (q, k, v, q_scale, k_scale, v_scale, out, self._lse(q))
        self._launches.launch(moving, stream)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor, Tensor | None],
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    dtype: torch.dtype,
    tiles: Tiles,
    sequences: Sequences | None = None,
    tma: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`block_attention_fp8` with a given tile and Triton's launch options, for measuring;
    `tma=False`: plain loads.
    """
    out = torch.empty(*q.shape[:-1], v.shape[-1], device=q.device, dtype=dtype)
    lse = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
    if out.numel() == 0 or pattern.num_blocks == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if sequences is not None:
        # rows of no sequence are never written
        out.zero_()
        lse.fill_(-math.inf)
        if sequences.num_sequences == 0:
            return out, lse
    operands = (q, k, v, scales, out, lse, pattern, head_map, scale, tiles)
    launch = forward_pass(*operands, sequences, tma)
    launch._replace(options=launch.options | options).run()
    return out, lse


def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    tiles: Tiles,
    sequences: Sequences | None = None,
    tma: bool = True,
) -> PassLaunch:
    """The launch of the kernel, on copies of operands that it cannot read as they lie; `tma=False`:
    plain loads.
    """
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    head_map = head_map.contiguous()
    schedule = tile_schedule(pattern, max(1, tiles.rows // bm), max(1, tiles.columns // bn))
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
    q, k, columns = along_rows(q), along_rows(k), along_rows(v.mT)
    tma = tma and sequences is None and bn >= tiles.columns and tma_ready(k) and tma_ready(columns)
    if not tma and sequences is None and nk % ALIGNED:
        columns = pad(columns, (0, -nk % ALIGNED))
    arrays, sizes = sequence_operands(sequences, pattern.shape)
    values = (
        q,
        tile_descriptor(k, tiles.columns, d) if tma else k,
        tile_descriptor(columns, dv, tiles.columns) if tma else columns,
        out,
        lse,
        *(None if t is None else t.contiguous() for t in scales),
        head_map,
        *schedule_operands(schedule, ordered)[:-1],  # positions are for biases
        pattern.tiles,
        *arrays,
        *q.stride()[:3],
        *k.stride()[:3],
        *columns.stride()[:3],
        *out.stride()[:3],
        0 if head_map.shape[0] == 1 else head_map.stride(0),
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
        *sizes,
    )
    options = {
        "TMA": tma,
        "POSITIVE": scale > 0,
        "ROWS_PER_SCALE": ROWS_PER_SCALE,
        "RUN": ALIGNED,
        "BM": bm,
        "BN": bn,
        "TM": tiles.rows,
        "TN": tiles.columns,
        "D": d,
        "DV": dv,
        "STAGES": tiles.num_stages,
        "num_warps": tiles.num_warps,
    }
    arguments = dict(zip(attention_fp8_forward.arg_names, values, strict=False))
    return PassLaunch(attention_fp8_forward, num_tiles * heads * batch, arguments, options)


def tiles_for(head_dim: int, block: int, shared_kb: int, anywhere: bool) -> Tiles:
    """From the table; `anywhere`: sequences begin at any key."""
    tiles = choose(FORWARD_TILES, 1, head_dim, block, shared_kb, lambda: 1.0)
    return tiles._replace(num_warps=ANYWHERE_WARPS) if anywhere and head_dim > 64 else tiles


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a tile holds for a head size; tensor cores add up 32 products of e4m3
    at once.
    """
    return max(32, triton.next_power_of_2(head_dim))


def along_rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def compilations() -> Iterator[Compilation]:
    """Every tile of the table, and every feature once."""
    bf16, fp16, fp32 = TYPE_NAMES
    cases = [
        Variant(64, 128, bf16, tma=True),
        Variant(64, 64, bf16, tma=True),
        Variant(128, 128, bf16, tma=True),
        Variant(64, 256, bf16, tma=True),
        Variant(64, 32, fp16, tma=True, tiles=False, counts=True),
    ]
    for block in (16, 32, 64, 128):
        cases.append(Variant(block, 128, bf16, shared_kb=99))
    cases += [
        Variant(16, 64, fp32, counts=True, shared_kb=99),
        Variant(64, 256, fp16, shared_kb=99),
        Variant(64, 128, bf16, sequences="packed", shared_kb=99),
        Variant(64, 128, bf16, sequences="padded", tiles=False, shared_kb=99),
        Variant(128, 64, bf16, sequences="padded"),
        Variant(16, 64, fp16, counts=True, sequences="packed", shared_kb=99),
    ]
    for case in cases:
        for with_shift in (False, True):
            if with_shift and (case.counts or case.block != 64 or case.head_dim != 128):
                continue
            yield _compilation(case, with_shift)


def _compilation(case: Variant, with_shift: bool) -> Compilation:
    d, kind = padded_head_dim(case.head_dim), TYPE_NAMES[case.dtype]
    tiles = tiles_for(d, case.block, case.shared_kb, case.sequences == "packed")
    constexprs = case.absent() | {
        "TMA": case.tma,
        "POSITIVE": True,
        "ROWS_PER_SCALE": ROWS_PER_SCALE,
        "RUN": ALIGNED,
        "BM": case.block,
        "BN": case.block,
        "TM": tiles.rows,
        "TN": tiles.columns,
        "D": d,
        "DV": d,
        "STAGES": tiles.num_stages,
    }
    names = attention_fp8_forward.arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    if not with_shift:
        constexprs["k_shift_ptr"] = None
    given = {"q_ptr": "*fp8e4nv", "k": "*fp8e4nv", "v": "*fp8e4nv", "out_ptr": f"*{kind}"}
    if case.tma:
        given["k"] = f"tensordesc<fp8e4nv[1, 1, {tiles.columns}, {d}]>"
        given["v"] = f"tensordesc<fp8e4nv[1, 1, {d}, {tiles.columns}]>"
    of_fp32 = ("lse_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "k_shift_ptr")
    given |= dict.fromkeys((*of_fp32, "log_counts_ptr"), "*fp32")
    return Compilation(
        f"attention_fp8_forward-{case.name}{'-shift' if with_shift else ''}",
        attention_fp8_forward,
        signature(attention_fp8_forward, given, constexprs),
        constexprs,
        {"num_warps": tiles.num_warps},
        max(89, case.min_capability) if case.shared_kb <= 99 else 90,
        case.max_capability,
    )
