"""csr_sddmm on the CPU: torch's products of the chosen rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.kernels.cpu_common import score_dtype
from sparse_layouts.kernels.torch_csr import torch_csr


def csr_sddmm(a: Tensor, b: Tensor, crow: Tensor, col: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """`values[n, s]`, as the reference's `csr_sddmm` defines them; fp16 and bf16 in fp32."""
    high = score_dtype(a.dtype)
    out = torch.zeros(a.shape[0], col.shape[0], dtype=a.dtype)
    if out.numel() == 0 or a.shape[2] == 0:
        return out
    pattern = torch_csr(torch.zeros(col.shape[0], dtype=high), crow, col, shape)
    for n, into in enumerate(out):
        made = torch.sparse.sampled_addmm(pattern, a[n].to(high), b[n].to(high), beta=0.0)
        into.copy_(made.values())
    return out
