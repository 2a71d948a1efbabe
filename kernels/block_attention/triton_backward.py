"""block_attention backward in Triton: two passes over the stored blocks, no atomics."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.reference import dropout_threshold
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.tile_schedule import tile_fill, tile_schedule
from sparse_layouts.kernels.block_attention.triton_backward_columns import (
    COLUMN_TILES,
    attention_backward_columns,
)
from sparse_layouts.kernels.block_attention.triton_backward_rows import (
    ROW_TILES,
    attention_backward_rows,
)
from sparse_layouts.kernels.block_attention.triton_common import (
    LENGTHS,
    TYPE_NAMES,
    Tiles,
    backward_precision,
    choose,
    kept_scale,
    padded_head_dim,
    schedule_operands,
    shared_memory_kb,
    shared_strides,
    signature,
    terms_descriptor,
    tile_descriptor,
    tma_ready,
)
from sparse_layouts.kernels.block_attention.triton_sequences import most_tiles, sequence_operands
from sparse_layouts.kernels.launching import PassLaunch, PreparedLaunches


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
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, dbias)` as the reference defines them, in bf16, fp16 or fp32.

    The scores are computed twice, by columns for dk and dv and by rows for dq and dbias, so that
    every gradient is added up in one place and in one order: the same inputs give the same bits.
    """
    with torch.cuda.device_of(q):
        return launch_backward(
            dout, dlse, q, k, v, out, lse, pattern, head_map, scale, dropout_p, seed, bias,
            bias_base, dbias_base, dbias_blocks, *tiles_for(q, v, pattern), sequences,
        )  # fmt: skip


def tiles_for(q: Tensor, v: Tensor, pattern: BlockPattern) -> tuple[Tiles, Tiles]:
    """From the tables: by column and by row."""
    head_dim, (bm, bn) = max(q.shape[-1], v.shape[-1]), pattern.block_size
    size, shared_kb = q.element_size(), shared_memory_kb(q.device)
    by_column = functools.partial(tile_fill, transpose_pattern(pattern))
    by_row = functools.partial(tile_fill, pattern)
    return (
        choose(COLUMN_TILES, size, head_dim, bn, shared_kb, by_column),
        choose(ROW_TILES, size, head_dim, bm, shared_kb, by_row),
    )


class PreparedBackward:
    """Backward passes on operands like these, without dropout, bias, sequences and a gradient of
    lse: all but addresses is settled.
    """

    MOVING = ("q", "k", "v", "dout", "out", "lse", "lse2", "delta", "dq", "dk", "dv")

    def __init__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        pattern: BlockPattern,
        head_map: Tensor,
        scale: float,
    ) -> None:
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None)
        operands = (dout, None, q, k, v, out, lse, terms_room(q), gradients, pattern, head_map)
        launches = backward_passes(*operands, scale, *tiles_for(q, v, pattern))
        self._launches = PreparedLaunches(launches, self.MOVING)

    def __call__(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, stream: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dq, dk, dv)`; `dout` has out's strides."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        lse2, delta = terms_room(q)
        self._launches.launch((q, k, v, dout, out, lse, lse2, delta, dq, dk, dv), stream)
        return dq, dk, dv


def terms_room(q: Tensor) -> Tensor:
    """Room for what both passes need of every row of q: lse in base 2 and delta (2, B, H, Nq); rows
    stand 16 bytes apart, as descriptors want them.
    """
    batch, heads, nq, _ = q.shape
    room = torch.empty(2, batch, heads, -(-nq // 4) * 4, device=q.device, dtype=torch.float32)
    return room[..., :nq]


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
    sequences: Sequences | None = None,
    tma: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`block_attention_backward` with given tiles, to measure; `tma=False`: plain loads."""
    head_dim, nk, value_dim = q.shape[-1], k.shape[2], v.shape[-1]
    bm, bn = pattern.block_size
    dbias_base = None if dbias_base is None else dbias_base.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbias = None
    if bias is not None and dbias_base is not None:
        own = q.shape[0] if sequences is None else sequences.num_sequences
        samples = 1 if dbias_base.shape[0] > 1 else own
        dbias = bias.new_zeros(samples, dbias_blocks, bm, bn)
    if lse.numel() == 0 or pattern.num_blocks == 0 or head_dim == 0 or value_dim == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    if sequences is not None:
        # rows of no sequence are never written
        for gradient in (dq, dk, dv):
            gradient.zero_()
        if sequences.num_sequences == 0 or nk == 0:
            return dq, dk, dv, dbias
    gradients = (dq, dk, dv, dbias)
    operands = (dout, dlse, q, k, v, out, lse, terms_room(q), gradients, pattern, head_map, scale)
    options = (dropout_p, seed, bias, bias_base, dbias_base, sequences, tma)
    for launch in backward_passes(*operands, by_column, by_row, *options):
        launch.run()
    return gradients


def backward_passes(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor | None],
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    by_column: Tiles,
    by_row: Tiles,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    dbias_base: Tensor | None = None,
    sequences: Sequences | None = None,
    tma: bool = True,
) -> list[PassLaunch]:
    """Of the terms, by column, by row; `gradients` are dq, dk, dv and dbias."""
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    head_map = head_map.contiguous()
    bias_base = None if bias_base is None else bias_base.contiguous()
    dq, dk, dv, dbias = gradients
    lse2, delta = terms
    d, dv_tile = padded_head_dim(head_dim), padded_head_dim(value_dim)
    rows_of_terms = max(16, 4096 // dv_tile)
    values = (
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
    )
    options = {"ROWS": rows_of_terms, "DV": dv_tile, "num_warps": 4}
    arguments = dict(zip(attention_row_terms.arg_names, values, strict=False))
    of_terms = PassLaunch(
        attention_row_terms, triton.cdiv(lse.numel(), rows_of_terms), arguments, options
    )
    dropout = seed is not None and dropout_p > 0
    sizes = (m - nq, nq, nk, head_dim, value_dim)
    numbers = (scale, dropout_threshold(dropout_p), kept_scale(dropout_p) if dropout else 1.0)
    flags = {
        "BM": bm,
        "BN": bn,
        "D": d,
        "DV": dv_tile,
        "PRECISION": backward_precision(q.dtype, max(d, dv_tile)),
    }
    inputs = (*q.stride(), *k.stride(), *v.stride(), *dout.stride())
    shared = shared_strides(head_map, bias, bias_base)
    seed = seed if dropout else None
    arrays, lengths = sequence_operands(sequences, pattern.shape)
    tma = tma and sequences is None

    transposed = transpose_pattern(pattern)
    schedule = tile_schedule(
        transposed,
        max(1, by_column.columns // bn),
        max(1, by_column.rows // bm),
        positions=None if bias is None else "columns",
    )
    groups = schedule.chunks.shape[1]
    num_tiles = groups * max(1, bn // by_column.columns)
    if sequences is not None:
        num_tiles = most_tiles(sequences, nk, by_column.columns, pattern.shape[1], aligned=True)
    # a descriptor's rows of terms are read from 16-byte boundaries
    use_tma = tma and bm >= by_column.rows and (m - nq) % 4 == 0
    use_tma = use_tma and tma_ready(q) and tma_ready(dout)
    values = (
        tile_descriptor(q, by_column.rows, d) if use_tma else q,
        k,
        v,
        tile_descriptor(dout, by_column.rows, dv_tile) if use_tma else dout,
        dk,
        dv,
        terms_descriptor(lse2, by_column.rows) if use_tma else lse2,
        terms_descriptor(delta, by_column.rows) if use_tma else delta,
        head_map,
        *schedule_operands(schedule, ordered=sequences is None),
        transposed.tiles,
        bias,
        bias_base,
        seed,
        *arrays,
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
        *lengths,
    )
    options = {
        "TMA": use_tma,
        **flags,
        "TM": by_column.rows,
        "TN": by_column.columns,
        "STAGES": by_column.num_stages,
        "num_warps": by_column.num_warps,
    }
    arguments = dict(zip(attention_backward_columns.arg_names, values, strict=False))
    of_columns = PassLaunch(
        attention_backward_columns, num_tiles * kv_heads * batch, arguments, options
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
    ordered = m == nq and sequences is None
    if ordered:
        num_tiles = groups * max(1, bm // by_row.rows)
    if sequences is not None:
        num_tiles = most_tiles(sequences, nq, by_row.rows, m, aligned=False)
    use_tma = tma and bn >= by_row.columns and tma_ready(k) and tma_ready(v)
    values = (
        q,
        tile_descriptor(k, by_row.columns, d) if use_tma else k,
        tile_descriptor(v, by_row.columns, dv_tile) if use_tma else v,
        dout,
        dq,
        dbias,
        lse2,
        delta,
        head_map,
        *schedule_operands(schedule, ordered),
        pattern.tiles,
        bias,
        bias_base,
        None if dbias is None else dbias_base,
        seed,
        *arrays,
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
        *lengths,
    )
    options = {
        "TMA": use_tma,
        **flags,
        "TM": by_row.rows,
        "TN": by_row.columns,
        "STAGES": by_row.num_stages,
        "num_warps": by_row.num_warps,
    }
    arguments = dict(zip(attention_backward_rows.arg_names, values, strict=False))
    of_rows = PassLaunch(attention_backward_rows, num_tiles * heads * batch, arguments, options)
    return [of_terms, of_columns, of_rows]


def compilations() -> Iterator[Compilation]:
    """The row terms in every dtype, with and without a gradient of lse."""
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
