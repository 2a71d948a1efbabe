"""block_softmax, by definition: a softmax in which what is not stored is -inf."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, dense_counts
from sparse_layouts.kernels.block_matmul.reference import densify
from sparse_layouts.kernels.sddmm.reference import sample


def block_softmax(values: Tensor, pattern: BlockPattern, *, log: bool = False) -> Tensor:
    """`values` (B, S, bm, bn) -> softmax (or log_softmax) over each row's stored entries, same
    shape and slots.

    An entry whose block counts c times enters as c equal entries: it gets c exp(x) / sum. What is
    not stored stays 0. Any strides in, contiguous out. Computed in fp32 (fp64 for fp64). `pattern`
    has no head map.
    """
    accumulate = torch.float64 if values.dtype == torch.float64 else torch.float32
    counts = dense_counts(pattern._replace(lead=(pattern.num_patterns,)))
    scores = densify(values.to(accumulate), pattern)
    scores = scores.masked_fill(counts == 0, -torch.inf) + counts.clamp(min=1).to(accumulate).log()
    lse = scores.logsumexp(-1, keepdim=True)
    lse = lse.masked_fill(counts.sum(-1, keepdim=True) == 0, 0.0)
    out = scores - lse
    out = torch.where(counts == 0, 0.0, out if log else out.exp())
    return sample(out.to(values.dtype), pattern)


def block_softmax_backward(
    grad: Tensor, out: Tensor, pattern: BlockPattern, *, log: bool = False
) -> Tensor:
    """The gradient to `values`, (B, S, bm, bn), from the gradient to `out` and `out` itself.

    softmax: `out * (grad - sum(grad * out))`; log_softmax: `grad - exp(out) * sum(grad)`; sums over
    the row's stored entries.
    """
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    stored = dense_counts(pattern._replace(lead=(pattern.num_patterns,))) != 0
    g, o = densify(grad.to(accumulate), pattern), densify(out.to(accumulate), pattern)
    g = torch.where(stored, g, 0.0)
    if log:
        dx = g - o.exp() * g.sum(-1, keepdim=True)
    else:
        dx = o * (g - (g * o).sum(-1, keepdim=True))
    return sample(torch.where(stored, dx, 0.0).to(grad.dtype), pattern)
