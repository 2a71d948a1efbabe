"""block_attention's backward on the CPU: the forward's steps, dk and dv added up block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_attention.cpu import add_bias, bias_slots, kept, query_range
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, dbias)` as the reference's `block_attention_backward` defines them.

    With P the probabilities and Z what dropout keeps, over 1 - p: dv = (P Z)^T do,
    dS = P (Z do v^T - rowsum(do o) + dlse), dq = scale dS k, dk = scale dS^T q.
    bf16: P and dS are made in fp32 and rounded once, for their products; dk and dv add up in fp32.
    """
    (batch, heads, nq, d), (kv_heads, nk, dv_size) = q.shape, v.shape[1:]
    high, low = score_dtype(q.dtype), product_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    dbias = None
    if bias is not None and dbias_base is not None:
        samples = 1 if dbias_base.shape[0] > 1 else batch
        dbias = torch.zeros(samples, dbias_blocks, *pattern.block_size, dtype=bias.dtype)
    if q.numel() == 0 or pattern.num_blocks == 0:
        return dq, dk, dv, dbias
    scratch = Scratch()
    padded_keys, block_columns = pattern.grid[1] * pattern.block_size[1], pattern.block_size[1]
    for b in range(batch):
        own_map = head_map[b % head_map.shape[0]]
        plan = attention_schedule(pattern, own_map, kv_heads, nq, high, bias is not None)
        before, rows = query_range(plan, pattern, nq)
        by_tile = heads * plan.num_tiles
        empty = lse[b].isneginf()
        delta = torch.linalg.vecdot(dout[b].to(high), out[b].to(high))
        if dlse is not None:
            delta -= dlse[b].masked_fill(empty, 0.0)
        queries, douts = (pad_rows(x[b], before, rows, high).view(by_tile, -1) for x in (q, dout))
        deltas, tops = (
            pad_rows(x[..., None], before, rows, high).view(by_tile, -1)
            for x in (delta, lse[b].masked_fill(empty, 0.0) * LOG2_E)
        )
        keys, values = (
            pad_rows(x[b], 0, padded_keys, high).view(-1, block_columns * x.shape[3])
            for x in (k, v)
        )
        dq_b, dk_b, dv_b = (
            x[b]
            if x.dtype == dtype and x.shape[2] == total
            else torch.zeros(x.shape[1], total, x.shape[3], dtype=dtype)
            for x, total, dtype in (
                (dq, rows, q.dtype),
                (dk, padded_keys, high),
                (dv, padded_keys, high),
            )
        )
        dq_tiles = dq_b.view(by_tile, -1)
        dk_blocks, dv_blocks = dk_b.view(keys.shape), dv_b.view(values.shape)
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
            if bias is not None:
                assert bias_base is not None
                base = bias_base[b % bias_base.shape[0]]
                add_bias(p, plan, step, bias[b % bias.shape[0]], base)
            add_masks(p, plan, step)
            p.sub_(top).exp2_()
            ds = scratch.take("ds", high, tiles, plan.rows, columns)
            torch.bmm(do_tile, v_tile.mT, out=ds)
            p_kept = p
            if dropout_p:
                assert seed is not None
                keep = (
                    kept(plan, step, pattern, seed, dropout_p, b).to(high).mul_(1 / (1 - dropout_p))
                )
                ds.mul_(keep)
                p_kept = keep.mul_(p)
            ds.sub_(delta_tile).mul_(p)
            if dbias is not None:
                assert dbias_base is not None
                target = dbias[b % dbias.shape[0]]
                _store_bias_gradient(target, ds, plan, step, dbias_base[b % dbias_base.shape[0]])

            p_low, ds_low = scratch.cast("p", p_kept, low), scratch.cast("ds", ds, low)
            q_low, do_low = scratch.cast("q", q_tile, low), scratch.cast("do", do_tile, low)
            k_low = scratch.cast("k", k_tile, low)
            dq_tile = scratch.take("dq", low, tiles, plan.rows, d)
            torch.baddbmm(dq_tile, ds_low, k_low, beta=0, alpha=scale, out=dq_tile)
            dq_tile = scratch.cast("dq", dq_tile, q.dtype)
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
        for whole, part, start, size in (
            (dq, dq_b, before, nq),
            (dk, dk_b, 0, nk),
            (dv, dv_b, 0, nk),
        ):
            if whole[b].data_ptr() != part.data_ptr():
                whole[b] = part[:, start : start + size]
    return dq, dk, dv, dbias


def _store_bias_gradient(
    dbias: Tensor, ds: Tensor, plan: Schedule, step: Step, base: Tensor
) -> None:
    """Writes the blocks of ds (T, R, C) that are stored to their own slots of dbias (S, bm, bn)."""
    _, bm, bn = dbias.shape
    assert step.positions is not None
    live = (step.positions.flatten() >= 0).nonzero()[:, 0]
    slots = bias_slots(step, plan, base).flatten()[live]
    blocks = ds.view(-1, plan.group, bm, step.length, bn).transpose(2, 3).reshape(-1, bm, bn)
    dbias.index_copy_(0, slots, blocks[live].to(dbias.dtype))
