"""grouped_nm_matmul and grouped_nm_sddmm, by definition: densify, multiply, sample."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.grouped_nm_packing import densify, gather


def grouped_nm_matmul(
    values: Tensor,
    columns: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    g: int,
    shape: tuple[int, int],
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b] = W[b] @ x[b]`, or `W[b].mT @ x[b]` with `transposed`; W (M, K) = `shape`.

    Shapes: values (B or 1, Mb, S, n), columns int16 (Mb, S), x (B or 1, R, N), R = K (M with
    `transposed`), any strides; out (B, M, N) ((B, K, N)). `transposed_output`: the storage of out
    is that of a contiguous (B, N, ...). values are 0 over the matrix's edge. Accumulates in fp32
    (fp64 for fp64); out has x's dtype.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = densify(values, columns, n, m, g, shape).to(accumulate)
    out = torch.matmul(w.mT if transposed else w, x.to(accumulate)).to(x.dtype)
    return out.mT.contiguous().mT if transposed_output else out.contiguous()


def grouped_nm_sddmm(a: Tensor, b: Tensor, columns: Tensor, *, n: int, m: int, g: int) -> Tensor:
    """Values (B, Mb, S, n) of `a[b] @ b[b]` at the stored entries, 0 over the matrix's edge.

    Shapes: a (B, M, D), b (B, D, K), any strides. Accumulates in fp32 (fp64 for fp64); the result
    has a's dtype.
    """
    accumulate = torch.float64 if a.dtype == torch.float64 else torch.float32
    return gather(torch.matmul(a.to(accumulate), b.to(accumulate)), columns, n, m, g).to(a.dtype)
