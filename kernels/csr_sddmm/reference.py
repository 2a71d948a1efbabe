"""csr_sddmm, by definition: the whole product, then its stored entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.csr_lists import gather


def csr_sddmm(a: Tensor, b: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """`values[n, s] = (a[n] @ b[n])[i, j]`, (i, j) the row and column of the lists' entry s.

    Shapes: a (B, M, D), b (B, D, K), any strides; crow (M + 1,), col (S,); values (B, S)
    contiguous. `shape` is (M, K). Accumulates in fp32 (fp64 for fp64); values have a's dtype.
    """
    assert (a.shape[-2], b.shape[-1]) == tuple(shape)
    accumulate = torch.float64 if a.dtype == torch.float64 else torch.float32
    dense = torch.matmul(a.to(accumulate), b.to(accumulate)).to(a.dtype)
    return gather(dense, crow, col).contiguous()
