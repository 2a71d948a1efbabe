"""sddmm, by definition: the whole product, then its stored entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, dense_counts, entry_rows


def sample(dense: Tensor, pattern: BlockPattern) -> Tensor:
    """The stored entries (B, S, bm, bn) of `dense` (B, P, M, N), in slot order, 0 at what is not
    stored; differentiable.
    """
    p = pattern
    assert p.head_map is None, "values need lists of their own for every head: expand_heads"
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    stored = dense_counts(p._replace(lead=(p.num_patterns,))).bool()
    dense = torch.where(stored, dense, torch.zeros((), dtype=dense.dtype, device=dense.device))
    dense = torch.nn.functional.pad(dense, (0, nb * bn - n, 0, mb * bm - m))
    blocks = dense.view(-1, p.num_patterns, mb, bm, nb, bn).transpose(3, 4)
    blocks = blocks.reshape(-1, p.num_patterns * mb * nb, bm, bn)
    where = entry_rows(p.crow_indices, p.num_blocks) * nb + p.col_indices
    if p.row_slots is not None:
        where = torch.empty_like(where).index_copy(0, p.row_slots.long(), where)
    return blocks[:, where]


def sddmm(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """`values[n, s]` = the block of `a[n, p] @ b[n, p]` at slot s of the pattern, in slot order.

    Shapes: a (B, P, M, K), b (B, P, K, N), any strides; values (B, S, bm, bn) contiguous, 0
    wherever the pattern stores nothing (inside partial blocks, over the edge). `pattern` has no
    head map. Accumulates in fp32 (fp64 for fp64); values have a's dtype.
    """
    accumulate = torch.float64 if a.dtype == torch.float64 else torch.float32
    return sample(torch.matmul(a.to(accumulate), b.to(accumulate)).to(a.dtype), pattern)
