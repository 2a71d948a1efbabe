"""block_matmul on the CPU: block rows, their blocks side by side, times the gathered rows of x."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.activations import finish
from sparse_layouts.kernels.cpu_common import (
    Scratch,
    dense_blocks,
    gather_blocks,
    pad_rows,
    product_dtype,
    score_dtype,
)
from sparse_layouts.kernels.cpu_schedule import row_schedule

# Columns of x in one pass, and entries of x that a step gathers, 2 MB in fp32: what stays in cache
# (two cores of an EPYC 9004, 4096 x 4096 in blocks of 64 at 10%, 512 columns, 2026-11-20).
CHUNK = 512
STEP_ENTRIES = 2**19


def block_matmul(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    *,
    transposed_output: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`out[b, p] = activation(W[b, p] @ x[b, p] + bias)` as the reference's `block_matmul` defines
    it; in bfloat16 the product itself is rounded too.
    """
    out = _product(values, pattern, x, transposed_output)
    if bias is not None or activation is not None:
        out.copy_(finish(out.to(score_dtype(x.dtype)), bias, activation))
    return out


def _product(values: Tensor, pattern: BlockPattern, x: Tensor, transposed_output: bool) -> Tensor:
    p, (batch, patterns, _, n) = pattern, x.shape
    batch = max(batch, values.shape[0]) if min(batch, values.shape[0]) else 0
    (m, _), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    low = product_dtype(x.dtype)
    if transposed_output:
        out = torch.zeros(batch, patterns, n, m, dtype=x.dtype).mT
    else:
        out = torch.zeros(batch, patterns, m, n, dtype=x.dtype)
    if out.numel() == 0 or p.num_blocks == 0:
        return out
    scratch = Scratch()
    width = min(n, CHUNK)
    plan = row_schedule(p, STEP_ENTRIES // width)
    for b in range(batch):
        blocks = dense_blocks(values[b % values.shape[0]])
        for start in range(0, n, width):
            size = min(width, n - start)
            x_rows = pad_rows(x[b % x.shape[0], ..., start : start + size], 0, nb * bn, low)
            x_rows = x_rows.view(patterns * nb, bn * size)
            target = out[b, ..., start : start + size]
            direct = m == mb * bm and x.dtype == low and target.is_contiguous()
            whole = target
            if not direct:
                whole = scratch.take("whole", low, patterns, mb * bm, size).zero_()
            out_rows = whole.view(patterns * mb, bm, size)
            for step in plan.steps:
                tiles, columns = step.tiles.shape[0], step.length * bn
                w_tile = gather_blocks(scratch, "w", blocks, step, low)
                x_tile = scratch.gather("x", x_rows, step.columns, tiles, columns, size)
                out_tile = scratch.take("out", low, tiles, bm, size)
                torch.bmm(w_tile, x_tile, out=out_tile)
                out_rows.index_copy_(0, step.tiles, out_tile)
            if not direct:
                # torch transposes fast in two dimensions only, into contiguous memory.
                for own, made in zip(target, whole, strict=True):
                    own.mT.copy_(made[:m].mT)
    return out
