"""csr_matmul on an NVIDIA GPU by cuSPARSE, through torch's sparse tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.csr_lists import transposed_lists
from sparse_layouts.kernels.torch_csr import torch_csr


def csr_matmul(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    *,
    shape: tuple[int, int],
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b] = W[b] @ x[b]`, as the reference's `csr_matmul` defines it; no host sync.

    The transpose is a product with the other compression, whose lists are kept with the pattern:
    cuSPARSE's own transposed product adds with atomics.
    """
    batch = max(values.shape[0], x.shape[0]) if values.shape[0] and x.shape[0] else 0
    rows, inner = (shape[1], shape[0]) if transposed else shape
    n = x.shape[-1]
    if transposed_output:
        out = x.new_empty(batch, n, rows).mT
    else:
        out = x.new_empty(batch, rows, n)
    if out.numel() == 0 or values.shape[1] == 0:
        return out.zero_()
    if transposed:
        crow, col, order = transposed_lists(crow, col, shape)
        values = values.index_select(1, order)
    matrices = [torch_csr(v, crow, col, (rows, inner)) for v in values.contiguous()]
    if batch == 1 and not transposed_output:
        return torch.mm(matrices[0], x[0])[None]
    for b, into in enumerate(out):
        into.copy_(torch.mm(matrices[b % len(matrices)], x[b % x.shape[0]]))
    return out
