"""nm_sddmm, by definition: the whole product, then its stored entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.nm_packing import gather_entries


def nm_sddmm(a: Tensor, b: Tensor, indices: Tensor, *, n: int, m: int) -> Tensor:
    """`values[b, p, i]`: the entries of row i of `a[b, p] @ b[b, p]` that `indices` store.

    Shapes: a (B, P, M, D), b (B, P, D, K), any strides; indices int32 (P, M, W), see
    `sparse_layouts/nm_packing.py`. Returns contiguous (B, P, M, E), E = K / m * n, in a's dtype.
    Accumulates in fp32 (fp64 for fp64).
    """
    accumulate = torch.float64 if a.dtype == torch.float64 else torch.float32
    out = torch.matmul(a.to(accumulate), b.to(accumulate)).to(a.dtype)
    return gather_entries(out, indices, n, m)
