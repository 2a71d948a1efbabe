"""csr_softmax, by definition: over the entries of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.csr_lists import entry_rows


def _row_sums(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The sum of each row's entries of x (B, S), at every entry."""
    totals = x.new_zeros(x.shape[0], num_rows).index_add(1, rows, x)
    return totals[:, rows]


def csr_softmax(values: Tensor, crow: Tensor, *, log: bool = False) -> Tensor:
    """values (B, S) -> softmax (or log_softmax) over the entries of each row, same shape, in
    values' dtype.

    crow (M + 1,): row i has the entries from crow[i] to crow[i + 1]. A row whose entries are all
    -inf attends to nothing: it gives 0 (the logarithm -inf), never NaN. Any strides in, contiguous
    out. Computed in fp32 (fp64 for fp64).
    """
    x = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    rows, num_rows = entry_rows(crow, values.shape[1]), crow.shape[0] - 1
    lowest = x.new_full((x.shape[0], num_rows), -torch.inf)
    highest = lowest.scatter_reduce(1, rows.expand_as(x), x.detach(), "amax")
    highest = torch.where(highest.isneginf(), 0.0, highest)[:, rows]
    powers = (x - highest).exp()
    total = _row_sums(powers, rows, num_rows)
    attends = total != 0
    safe = torch.where(attends, total, 1.0)
    out = x - highest - safe.log() if log else powers / safe
    return out.to(values.dtype).contiguous()


def csr_softmax_backward(grad: Tensor, out: Tensor, crow: Tensor, *, log: bool = False) -> Tensor:
    """The gradient to `values`, (B, S), from the gradient to `out` and `out` itself.

    softmax: `out * (grad - sum(grad * out))`; log_softmax: `grad - exp(out) * sum(grad)`; sums over
    the row's entries.
    """
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    rows, num_rows = entry_rows(crow, grad.shape[1]), crow.shape[0] - 1
    g, o = grad.to(accumulate), out.to(accumulate)
    if log:
        dx = g - o.exp() * _row_sums(g, rows, num_rows)
    else:
        dx = o * (g - _row_sums(g * o, rows, num_rows))
    return dx.to(grad.dtype).contiguous()
