"""block_softmax on the CPU: batches of block rows with equally many blocks, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.cpu_common import (
    LOG2_E,
    Scratch,
    add_masks,
    clear_edge,
    clear_masked,
    dense_blocks,
    gather_blocks,
    score_dtype,
    store_blocks,
)
from sparse_layouts.kernels.cpu_schedule import STEP_SCORES, row_schedule


def block_softmax(values: Tensor, pattern: BlockPattern, *, log: bool = False) -> Tensor:
    """Softmax or log_softmax over a row's stored entries, as the reference's `block_softmax`."""
    p, high = pattern, score_dtype(values.dtype)
    out = torch.empty(values.shape, dtype=values.dtype)
    if out.numel() == 0:
        return out
    scratch = Scratch()
    plan = row_schedule(p, STEP_SCORES // p.block_size[0], high)
    tiny, lowest = torch.finfo(high).tiny, torch.finfo(high).min
    for b in range(values.shape[0]):
        blocks = dense_blocks(values[b])
        for step in plan.steps:
            scores = gather_blocks(scratch, "scores", blocks, step, high).contiguous()  # [T, BM, C]
            scores.mul_(LOG2_E)
            add_masks(scores, plan, step, scratch)
            # A row of -inf keeps a finite maximum: its probabilities are then 0, not NaN.
            scores.sub_(scores.amax(-1, keepdim=True).clamp_(min=lowest))
            if log:
                powers = scratch.take("powers", high, *scores.shape)
                total = torch.exp2(scores, out=powers).sum(-1, keepdim=True).clamp_(min=tiny)
                scores.sub_(total.log2_()).mul_(1 / LOG2_E)
                clear_masked(scores, plan, step)
            else:
                total = scores.exp2_().sum(-1, keepdim=True).clamp_(min=tiny)
                scores.mul_(total.reciprocal_())
            store_blocks(out[b], scores, step)
    clear_edge(out, p)
    return out


def block_softmax_backward(
    grad: Tensor, out: Tensor, pattern: BlockPattern, *, log: bool = False
) -> Tensor:
    """The gradient to `values`, as the reference's `block_softmax_backward` defines it."""
    p, high = pattern, score_dtype(grad.dtype)
    dx = torch.empty(grad.shape, dtype=grad.dtype)
    if dx.numel() == 0:
        return dx
    scratch = Scratch()
    plan = row_schedule(p, STEP_SCORES // p.block_size[0], high)
    for b in range(grad.shape[0]):
        g_blocks, o_blocks = dense_blocks(grad[b]), dense_blocks(out[b])
        for step in plan.steps:
            g = gather_blocks(scratch, "g", g_blocks, step, high).contiguous()  # [T, BM, C]
            o = gather_blocks(scratch, "o", o_blocks, step, high).contiguous()
            clear_masked(g, plan, step)
            if log:
                g.sub_(o.exp_().mul_(g.sum(-1, keepdim=True)))
                clear_masked(g, plan, step)
            else:
                g.sub_(torch.linalg.vecdot(g, o)[..., None]).mul_(o)
            store_blocks(dx[b], g, step)
    clear_edge(dx, p)
    return dx
