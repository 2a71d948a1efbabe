"""block_attention's backward on the CPU: the forward's steps, dk and dv added up block by block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_attention.cpu import (
    BiasBlocks,
    Options,
    TilePlaces,
    add_bias,
    bias_blocks,
    kept,
    query_range,
    tile_places,
)
from sparse_layouts.kernels.block_attention.cpu_sequences import sequence_schedule
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.cpu_common import (
    LOG2_E,
    Scratch,
    add_masks,
    pad_rows,
    product_dtype,
    score_dtype,
)
from sparse_layouts.kernels.cpu_schedule import Schedule, Step, attention_schedule


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
    """`(dq, dk, dv, dbias)` as the reference's `block_attention_backward` defines them.

    With P the probabilities and Z what dropout keeps, over 1 - p: dv = (P Z)^T do,
    dS = P (Z do v^T - rowsum(do o) + dlse), dq = scale dS k, dk = scale dS^T q.
    bf16: P and dS are made in fp32 and rounded once, for their products; dk and dv add up in fp32.
    """
    (batch, _, nq, _), (kv_heads, nk, _) = q.shape, v.shape[1:]
    high = score_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    dbias = None
    if bias is not None and dbias_base is not None:
        own = batch if sequences is None else sequences.num_sequences
        samples = 1 if dbias_base.shape[0] > 1 else own
        dbias = torch.zeros(samples, dbias_blocks, *pattern.block_size, dtype=bias.dtype)
    if q.numel() == 0 or pattern.num_blocks == 0:
        return dq, dk, dv, dbias
    options = Options(pattern, scale, dropout_p, seed, bias_blocks(bias, bias_base))
    own_blocks = bias_blocks(dbias, dbias_base)
    scratch = Scratch()
    if sequences is not None:
        plan, q_spans, k_spans, _ = sequence_schedule(
            pattern, head_map, kv_heads, sequences, nq, nk, high, bias is not None
        )
        if not plan.steps:
            return dq, dk, dv, dbias
        deltas, tops = row_terms(dout, dlse, out, lse, high)
        operands = Operands(
            q_spans.laid_out(q, high),
            q_spans.laid_out(dout, high),
            k_spans.laid_out(k, high),
            k_spans.laid_out(v, high),
            q_spans.laid_out(deltas[..., None], high),
            q_spans.laid_out(tops[..., None], high, torch.inf),
        )
        made = Gradients(
            torch.zeros_like(operands.queries, dtype=q.dtype),
            torch.zeros_like(operands.keys),
            torch.zeros_like(operands.values),
            own_blocks,
        )
        _differentiate(operands, made, plan, 0, options, scratch)
        q_spans.put_back(made.dq, dq)
        k_spans.put_back(made.dk, dk)
        k_spans.put_back(made.dv, dv)
        return dq, dk, dv, dbias
    padded_keys = pattern.grid[1] * pattern.block_size[1]
    for b in range(batch):
        own_map = head_map[b % head_map.shape[0]]
        plan = attention_schedule(pattern, own_map, kv_heads, nq, high, bias is not None)
        before, rows = query_range(plan, pattern, nq)
        terms = row_terms(dout[b], None if dlse is None else dlse[b], out[b], lse[b], high)
        operands = Operands(
            pad_rows(q[b], before, rows, high),
            pad_rows(dout[b], before, rows, high),
            pad_rows(k[b], 0, padded_keys, high),
            pad_rows(v[b], 0, padded_keys, high),
            pad_rows(terms[0][..., None], before, rows, high),
            pad_rows(terms[1][..., None], before, rows, high, torch.inf),
        )
        parts = [
            x[b]
            if x.dtype == dtype and x.shape[2] == total
            else torch.zeros(x.shape[1], total, x.shape[3], dtype=dtype)
            for x, total, dtype in (
                (dq, rows, q.dtype),
                (dk, padded_keys, high),
                (dv, padded_keys, high),
            )
        ]
        made = Gradients(parts[0], parts[1], parts[2], own_blocks)
        _differentiate(operands, made, plan, b, options, scratch)
        for whole, part, start, size in zip(
            (dq, dk, dv), parts, (before, 0, 0), (nq, nk, nk), strict=True
        ):
            if whole[b].data_ptr() != part.data_ptr():
                whole[b] = part[:, start : start + size]
    return dq, dk, dv, dbias


class Operands(NamedTuple):
    """What a plan's tiles read, contiguous: `queries` and `douts` (H, tiles * R, D and Dv), `keys`
    and `values` (Hkv, whole blocks, D and Dv), `deltas` and `tops` of `row_terms` (H, tiles * R,
    1). Rows that are no query have top inf: their probabilities are then 0, whatever the bias is.
    """

    queries: Tensor
    douts: Tensor
    keys: Tensor
    values: Tensor
    deltas: Tensor
    tops: Tensor


class Gradients(NamedTuple):
    """What a plan's tiles write (dq and the blocks of dbias) or add to (dk and dv), laid out as the
    operands.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: BiasBlocks | None


def row_terms(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, high: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(..., H, Nq) each: rowsum(dout * out) - dlse, and lse in base 2, 0 where a row is empty."""
    empty = lse.isneginf()
    delta = torch.linalg.vecdot(dout.to(high), out.to(high))
    if dlse is not None:
        delta -= dlse.masked_fill(empty, 0.0)
    return delta, lse.masked_fill(empty, 0.0) * LOG2_E


def _differentiate(
    operands: Operands,
    gradients: Gradients,
    plan: Schedule,
    sample: int,
    options: Options,
    scratch: Scratch,
) -> None:
    """The gradients of a plan's tiles."""
    queries, douts, keys, values, deltas, tops = operands
    dq, dk, dv, dbias = gradients
    d, dv_size, high = queries.shape[2], values.shape[2], queries.dtype
    low = product_dtype(dq.dtype)
    pattern, scale, dropout_p, seed, bias = options
    by_tile, block_columns = queries.shape[0] * plan.num_tiles, pattern.block_size[1]
    queries, douts, deltas, tops, dq_tiles = (
        x.view(by_tile, -1) for x in (queries, douts, deltas, tops, dq)
    )
    keys, values, dk_blocks, dv_blocks = (
        x.view(-1, block_columns * x.shape[2]) for x in (keys, values, dk, dv)
    )
    for step in plan.steps:
        tiles, columns = step.tiles.shape[0], step.length * block_columns
        q_tile = scratch.gather("q", queries, step.tiles, tiles, plan.rows, d)
        do_tile = scratch.gather("do", douts, step.tiles, tiles, plan.rows, dv_size)
        k_tile = scratch.gather("k", keys, step.columns, tiles, columns, d)
        v_tile = scratch.gather("v", values, step.columns, tiles, columns, dv_size)
        top = scratch.gather("top", tops, step.tiles, tiles, plan.rows, 1)
        delta_tile = scratch.gather("delta", deltas, step.tiles, tiles, plan.rows, 1)
        p = scratch.take("p", high, tiles, plan.rows, columns)
        torch.baddbmm(p, q_tile, k_tile.mT, beta=0, alpha=scale * LOG2_E, out=p)
        if bias is not None or dropout_p:
            where = tile_places(plan, step, pattern, sample)
        if bias is not None:
            add_bias(p, plan, step, bias, where)
        add_masks(p, plan, step, scratch)
        p.sub_(top).exp2_()
        ds = scratch.take("ds", high, tiles, plan.rows, columns)
        torch.bmm(do_tile, v_tile.mT, out=ds)
        p_kept = p
        if dropout_p:
            assert seed is not None
            keep = kept(plan, where, pattern, seed, dropout_p).to(high).mul_(1 / (1 - dropout_p))
            ds.mul_(keep)
            p_kept = keep.mul_(p)
        ds.sub_(delta_tile).mul_(p)
        if dbias is not None:
            _store_bias_gradient(dbias, ds, plan, step, where)

        p_low, ds_low = scratch.cast("p", p_kept, low), scratch.cast("ds", ds, low)
        q_low, do_low = scratch.cast("q", q_tile, low), scratch.cast("do", do_tile, low)
        k_low = scratch.cast("k", k_tile, low)
        dq_tile = scratch.take("dq", low, tiles, plan.rows, d)
        torch.baddbmm(dq_tile, ds_low, k_low, beta=0, alpha=scale, out=dq_tile)
        dq_tile = scratch.cast("dq", dq_tile, dq.dtype)
        dq_tiles.index_copy_(0, step.tiles, dq_tile.view(tiles, -1))
        # The gathered keys and values are used up: their places take the gradients.
        dv_tile = scratch.take("v", low, tiles, columns, dv_size)
        torch.bmm(p_low.mT, do_low, out=dv_tile)
        dv_tile = scratch.cast("v", dv_tile, high)
        dv_blocks.index_add_(0, step.columns, dv_tile.view(-1, dv_blocks.shape[1]))
        dk_tile = scratch.take("k", low, tiles, columns, d)
        torch.baddbmm(dk_tile, ds_low.mT, q_low, beta=0, alpha=scale, out=dk_tile)
        dk_tile = scratch.cast("k", dk_tile, high)
        dk_blocks.index_add_(0, step.columns, dk_tile.view(-1, dk_blocks.shape[1]))


def _store_bias_gradient(
    dbias: BiasBlocks, ds: Tensor, plan: Schedule, step: Step, where: TilePlaces
) -> None:
    """Writes the blocks of ds (T, R, C) that are stored to their own slots of dbias (S, bm, bn)."""
    _, bm, bn = dbias.values.shape
    assert step.positions is not None
    live = (step.positions.flatten() >= 0).nonzero()[:, 0]
    slots = dbias.slots(step, where).flatten()[live]
    blocks = ds.view(-1, plan.group, bm, step.length, bn).transpose(2, 3).reshape(-1, bm, bn)
    dbias.values.index_copy_(0, slots, blocks[live].to(dbias.values.dtype))
