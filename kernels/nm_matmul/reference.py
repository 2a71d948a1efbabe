"""nm_matmul, by definition: densify, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.nm_fragments import FRAGMENTS, ROWS, by_rows, row_indices
from sparse_layouts.nm_packing import scatter_entries


def nm_matmul(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
    order: str = ROWS,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]`, or `W[b, p].mT @ x[b, p]` with `transposed`; W (M, K) has
    `values` at `indices`.

    Shapes: values (B or 1, P, M, E), E = K / m * n; indices int32 (P, M, W), see
    `sparse_layouts/nm_packing.py`; x (B or 1, P, R, N), any strides (0 where expanded), R = K, or M
    with `transposed`. Returns (B, P, rows, N), rows = M, or K with `transposed`;
    `transposed_output`: its storage is that of a contiguous (B, P, N, rows).

    `order`: "fragments" if values and indices lie so, indices (P, M / 16, W'): see
    `sparse_layouts/nm_fragments.py`. Kernels are asked for what lies row by row, but for the one
    that requires fragments.

    Accumulates in fp32 (fp64 for fp64); out has x's dtype.
    """
    columns = values.shape[-1] // n * m
    if order == FRAGMENTS:
        values, indices = by_rows(values, n, m), row_indices(indices, n, m, columns)
    w = scatter_entries(values, indices, n, m, columns)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = (w.mT if transposed else w).to(accumulate)
    out = torch.matmul(w, x.to(accumulate)).to(x.dtype)
    return out.mT.contiguous().mT if transposed_output else out.contiguous()
