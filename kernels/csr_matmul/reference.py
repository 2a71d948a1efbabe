"""csr_matmul, by definition: densify, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.csr_lists import densify


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
    """`out[b] = W[b] @ x[b]`, or `W[b].mT @ x[b]` with `transposed`, W[b] the (M, K) matrix of
    values[b] on the lists.

    Shapes: values (B or 1, S), crow (M + 1,), col (S,), x (B or 1, R, N) with R = K, or M with
    `transposed`, any strides (0 where expanded); out (B, rows, N). `shape` is (M, K), S, N, M, K
    and B may be 0. `transposed_output`: the storage of out is that of a contiguous (B, N, rows).

    The lists are as in `torch.sparse_csr`: columns ascending and unique within a row, both int32
    or both int64. Accumulates in fp32 (fp64 for fp64); out has x's dtype.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = densify(values.to(accumulate), crow, col, (shape[0], shape[1]))
    out = torch.matmul(w.mT if transposed else w, x.to(accumulate)).to(x.dtype)
    return out.mT.contiguous().mT if transposed_output else out.contiguous()
