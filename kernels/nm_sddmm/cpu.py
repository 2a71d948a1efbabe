"""nm_sddmm on the CPU: rows of the product, as many as stay in cache, and their stored entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.kernels.cpu_common import Scratch, product_dtype
from sparse_layouts.kernels.nm_matmul.cpu import columns_of_entries

# Entries of the product that are made at a time: 4 MB in fp32, as in nm_matmul.
STEP_ENTRIES = 2**20


def nm_sddmm(a: Tensor, b: Tensor, indices: Tensor, *, n: int, m: int) -> Tensor:
    """`values[b, p]` = the entries of `a[b, p] @ b[b, p]` that `indices` store, as the reference's
    `nm_sddmm`.
    """
    batch, patterns, rows, inner = a.shape
    columns = b.shape[-1]
    values = a.new_empty(batch, patterns, rows, columns // m * n)
    if values.numel() == 0:
        return values
    if inner == 0:
        return values.zero_()
    where = columns_of_entries(indices, n, m, columns)
    low, scratch = product_dtype(a.dtype), Scratch()
    group = max(1, STEP_ENTRIES // (rows * columns))  # whole matrices at a time, or
    step = min(rows, max(1, STEP_ENTRIES // columns))  # rows of one
    samples = max(1, group // patterns)
    for first_sample in range(0, batch, samples):
        some = slice(first_sample, min(batch, first_sample + samples))
        for first in range(0, patterns, group):
            own = slice(first, min(patterns, first + group))
            right = b[some, own].flatten(0, 1).to(low)
            for start in range(0, rows, step):
                at = slice(start, start + step)
                left = scratch.cast("a", a[some, own, at].flatten(0, 1), low)
                out = scratch.take("out", low, *left.shape[:2], columns)
                torch.bmm(left, right, out=out)
                index = where[own, at].expand(some.stop - some.start, -1, -1, -1)
                shape = (*index.shape[:-1], columns)
                picked = scratch.take("picked", low, *index.shape)
                values[some, own, at] = torch.gather(out.view(shape), 3, index, out=picked)
    return values
