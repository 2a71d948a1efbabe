"""block_matmul, by definition: densify, multiply, add, activate."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.block_values import densify
from sparse_layouts.kernels.activations import finish


def block_matmul(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    *,
    transposed_output: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`out[b, p] = activation(W[b, p] @ x[b, p] + bias)`, W the matrix of `values` on the p-th
    pattern.

    Shapes: `values` (B or 1, S, bm, bn), x (B or 1, P, K, N), any strides (0 where expanded); bias
    (M,), one for every row of out (B, P, M, N). `transposed_output`: the storage of out is that of
    a contiguous (B, P, N, M). `activation`: a name of `kernels/activations.py`.

    `pattern` has no head map; `values` are 0 wherever the pattern stores nothing (inside partial
    blocks, over the edge). Accumulates, adds the bias and activates in fp32 (fp64 for fp64), then
    rounds to x's dtype.
    """
    w = densify(values, pattern)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.matmul(w.to(accumulate), x.to(accumulate))
    out = finish(out, bias, activation).to(x.dtype)
    return out.mT.contiguous().mT if transposed_output else out.contiguous()
