"""block_attention's forward on the CPU: stacked query tiles against gathered keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_attention.reference import dropout_keep, dropout_threshold, philox
from sparse_layouts.kernels.cpu_common import (
    LOG2_E,
    Scratch,
    add_masks,
    pad_rows,
    product_dtype,
    score_dtype,
)
from sparse_layouts.kernels.cpu_schedule import Schedule, Step, attention_schedule


def query_range(plan: Schedule, pattern: BlockPattern, num_queries: int) -> tuple[int, int]:
    """Where the queries begin among the rows of the plan's tiles, and how many rows those are."""
    start = plan.first_tile * plan.group * pattern.block_size[0] + plan.crop
    return pattern.shape[0] - num_queries - start, plan.num_tiles * plan.rows


def bias_slots(step: Step, plan: Schedule, base: Tensor) -> Tensor:
    """The slots (T, group, L) of a step's blocks, from `base` (H,); meaningless if dead."""
    assert step.positions is not None
    heads = step.tiles.div(plan.num_tiles, rounding_mode="floor")
    return base[heads][:, None, None] + step.positions


def add_bias(scores: Tensor, plan: Schedule, step: Step, bias: Tensor, base: Tensor) -> None:
    """Adds bias (Sb, bm, bn) in base 2 to scores (T, R, C); dead blocks get some other block's."""
    _, bm, bn = bias.shape
    slots = bias_slots(step, plan, base).clamp_(min=0)
    blocks = bias.index_select(0, slots.flatten())
    blocks = blocks.view(*slots.shape, bm, bn).transpose(2, 3)  # (T, group, bm, L, bn)
    by_block = scores.view(-1, plan.group, bm, step.length, bn)
    by_block.add_(blocks.to(scores.dtype), alpha=LOG2_E)


def kept(
    plan: Schedule, step: Step, pattern: BlockPattern, seed: Tensor, p: float, batch: int
) -> Tensor:
    """bool (T, R, C): what dropout keeps of a step's probabilities."""
    bm, bn = pattern.block_size
    heads = step.tiles.div(plan.num_tiles, rounding_mode="floor")
    tile = step.tiles - heads * plan.num_tiles + plan.first_tile
    row = (tile * plan.group * bm + plan.crop)[:, None, None] + torch.arange(plan.rows)[:, None]
    block = (step.columns % pattern.grid[1]).view(-1, 1, step.length, 1)
    sample = torch.tensor(batch)
    heads = heads[:, None, None]
    if bn % 4:
        column = (block * bn + torch.arange(bn)).flatten(2)
        return dropout_keep(seed, p, sample, heads, row, column)
    quad = (block * (bn // 4) + torch.arange(bn // 4)).flatten(
        2
    )  # one philox call draws for four columns
    shape = torch.broadcast_shapes(row.shape, quad.shape)
    counters = (quad.expand(shape), row.expand(shape), heads.expand(shape), sample.expand(shape))
    return (torch.stack(philox(seed, counters), -1) >= dropout_threshold(p)).flatten(2)


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
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the reference's `block_attention` defines them.

    Takes memory for one step of tiles, and for copies of operands that are not contiguous or fp32.
    bf16: scores in fp32, so that large ones keep their digits, and the second product in bf16.
    """
    (batch, heads, nq, _), (kv_heads, _, dv) = q.shape, v.shape[1:]
    high, low = score_dtype(q.dtype), product_dtype(q.dtype)
    out = torch.zeros(batch, heads, nq, dv, dtype=q.dtype)
    lse = torch.full((batch, heads, nq), -torch.inf, dtype=high)
    if out.numel() == 0 or pattern.num_blocks == 0:
        return out, lse
    scratch = Scratch()
    tiny, lowest = torch.finfo(high).tiny, torch.finfo(high).min
    padded_keys, block_columns = pattern.grid[1] * pattern.block_size[1], pattern.block_size[1]
    for b in range(batch):
        own_map = head_map[b % head_map.shape[0]]
        plan = attention_schedule(pattern, own_map, kv_heads, nq, high, bias is not None)
        before, rows = query_range(plan, pattern, nq)
        queries = pad_rows(q[b], before, rows, high).view(heads * plan.num_tiles, -1)
        keys, values = (
            pad_rows(x[b], 0, padded_keys, dtype).view(-1, block_columns * x.shape[3])
            for x, dtype in ((k, high), (v, low))
        )
        exact = rows == nq
        out_b = out[b] if exact else torch.zeros(heads, rows, dv, dtype=q.dtype)
        lse_b = lse[b] if exact else torch.full((heads, rows), -torch.inf, dtype=high)
        out_tiles, lse_tiles = (x.view(heads * plan.num_tiles, -1) for x in (out_b, lse_b))
        for step in plan.steps:
            tiles, columns = step.tiles.shape[0], step.length * block_columns
            q_tile = scratch.gather("q", queries, step.tiles, tiles, plan.rows, -1)
            k_tile = scratch.gather("k", keys, step.columns, tiles, columns, -1)
            scores = scratch.take("scores", high, tiles, plan.rows, columns)
            torch.baddbmm(scores, q_tile, k_tile.mT, beta=0, alpha=scale * LOG2_E, out=scores)
            if bias is not None:
                assert bias_base is not None
                base = bias_base[b % bias_base.shape[0]]
                add_bias(scores, plan, step, bias[b % bias.shape[0]], base)
            add_masks(scores, plan, step)
            # A row of -inf keeps a finite maximum: its probabilities are then 0, not NaN.
            top = scores.amax(-1, keepdim=True).clamp_(min=lowest)
            scores.sub_(top).exp2_()
            total = scores.sum(-1, keepdim=True)
            lse_step = (total.log2() + top).mul_(1 / LOG2_E)
            lse_tiles.index_copy_(0, step.tiles, lse_step.view(tiles, -1))
            inverse = total.clamp_(min=tiny).reciprocal_()
            if dropout_p:
                assert seed is not None
                scores.mul_(kept(plan, step, pattern, seed, dropout_p, b))
                inverse.mul_(1 / (1 - dropout_p))
            if low != high:
                scores.mul_(inverse)
            probabilities = scratch.cast("probabilities", scores, low)
            v_tile = scratch.gather("v", values, step.columns, tiles, columns, -1)
            o_tile = scratch.take("o", low, tiles, plan.rows, dv)
            torch.bmm(probabilities, v_tile, out=o_tile)
            if low == high:
                o_tile.mul_(inverse)
            o_tile = scratch.cast("out", o_tile, q.dtype)
            out_tiles.index_copy_(0, step.tiles, o_tile.view(tiles, -1))
        if not exact:
            out[b] = out_b[:, before : before + nq]
            lse[b] = lse_b[:, before : before + nq]
    return out, lse
