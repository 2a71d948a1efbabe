"""csr_softmax on the CPU: maxima and sums of the rows' segments, spread over their entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_layouts.csr_lists import entry_rows
from sparse_layouts.derived import derived
from sparse_layouts.kernels.cpu_common import score_dtype


def _rows(crow: Tensor, size: int) -> Tensor:
    """int64 (S,): the row of every entry; made once for a pattern and kept with it."""
    return derived((crow,), ("entry_rows", size), lambda: entry_rows(crow, size))


def _sums(x: Tensor, crow: Tensor) -> Tensor:
    """The sums (M,) of the rows' entries of x (S,), in order."""
    reduce: Any = torch.segment_reduce
    return reduce(x, "sum", offsets=crow, unsafe=True, initial=0)


def csr_softmax(values: Tensor, crow: Tensor, *, log: bool = False) -> Tensor:
    """Softmax or log_softmax over each row's entries, as the reference's `csr_softmax`."""
    high, size = score_dtype(values.dtype), values.shape[1]
    out = torch.empty(values.shape, dtype=values.dtype)
    if out.numel() == 0:
        return out
    rows, offsets = _rows(crow, size), crow.long()
    finite = torch.finfo(high)
    for x, into in zip(values, out, strict=True):
        x = x.to(high)
        # A row of -inf keeps a finite maximum: its probabilities are then 0, not NaN.
        highest = torch.full((crow.shape[0] - 1,), finite.min, dtype=high)
        highest.scatter_reduce_(0, rows, x, "amax")
        shifted = x - highest.index_select(0, rows)
        powers = shifted.exp()
        total = _sums(powers, offsets).clamp_(min=finite.tiny)
        if log:
            into.copy_(shifted.sub_(total.log_().index_select(0, rows)))
        else:
            into.copy_(powers.div_(total.index_select(0, rows)))
    return out


def csr_softmax_backward(grad: Tensor, out: Tensor, crow: Tensor, *, log: bool = False) -> Tensor:
    """The gradient to `values`, as the reference's `csr_softmax_backward` defines it."""
    high, size = score_dtype(grad.dtype), grad.shape[1]
    dx = torch.empty(grad.shape, dtype=grad.dtype)
    if dx.numel() == 0:
        return dx
    rows, offsets = _rows(crow, size), crow.long()
    for g, o, into in zip(grad, out, dx, strict=True):
        g, o = g.to(high), o.to(high)
        if log:
            total = _sums(g.contiguous(), offsets).index_select(0, rows)
            into.copy_(g - o.exp() * total)
        else:
            total = _sums(g * o, offsets).index_select(0, rows)
            into.copy_((g - total).mul_(o))
    return dx
