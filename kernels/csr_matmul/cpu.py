"""csr_matmul on the CPU: MKL's product for few columns, torch's row by row for many."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_layouts.csr_lists import transposed_lists
from sparse_layouts.kernels.cpu_common import score_dtype
from sparse_layouts.kernels.torch_csr import torch_csr

# x is multiplied in parts of as many columns as keep so many bytes of it in cache, but not fewer
# than so many columns (two cores of an EPYC 9004, DLMC matrices, 2026-11-21).
PART_BYTES = 2**20
PART_COLUMNS = 256
# MKL's lists are int32, and torch converts without looking.
MKL_LARGEST = 2**31 - 1


def csr_matmul_mkl(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    *,
    shape: tuple[int, int],
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b] = W[b] @ x[b]`, as the reference's `csr_matmul` defines it, by MKL; fp16 and bf16 in
    fp32.
    """

    def multiply(w: Tensor, dense: Tensor) -> Tensor:
        if dense.shape[1] == 1:
            return torch.mv(w, dense[:, 0].contiguous())[:, None]
        return torch.mm(w, dense)

    if max(values.shape[1], *shape) > MKL_LARGEST:
        return csr_matmul(
            values,
            crow,
            col,
            x,
            shape=shape,
            transposed=transposed,
            transposed_output=transposed_output,
        )
    high = score_dtype(x.dtype)
    lists = (crow, col)
    return _products(multiply, high, values, lists, x, shape, transposed, transposed_output)


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
    """`out[b] = W[b] @ x[b]`, as the reference's `csr_matmul` defines it: for every row the sum of
    the rows of x that its entries choose. Adds up in fp32, whatever the dtype.
    """
    width = max(PART_COLUMNS, PART_BYTES // max(1, x.shape[1] * x.element_size()))

    def multiply(w: Tensor, dense: Tensor) -> Tensor:
        if dense.shape[1] <= width:
            return torch.sparse.mm(w, dense.contiguous(), "sum")
        out = dense.new_empty(w.shape[0], dense.shape[1])
        for part, into in zip(dense.split(width, 1), out.split(width, 1), strict=True):
            into.copy_(torch.sparse.mm(w, part.contiguous(), "sum"))
        return out

    lists = (crow, col)
    return _products(multiply, x.dtype, values, lists, x, shape, transposed, transposed_output)


def _products(
    multiply: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    values: Tensor,
    lists: tuple[Tensor, Tensor],
    x: Tensor,
    shape: tuple[int, int],
    transposed: bool,
    transposed_output: bool,
) -> Tensor:
    """The products of all samples; `multiply` takes W as `torch.sparse_csr` and x in `dtype`."""
    batch = max(values.shape[0], x.shape[0]) if values.shape[0] and x.shape[0] else 0
    rows, inner = (shape[1], shape[0]) if transposed else shape
    n = x.shape[2]
    if batch * rows * n * values.shape[1] == 0:
        if transposed_output:
            return x.new_zeros(batch, n, rows).mT
        return x.new_zeros(batch, rows, n)
    crow, col = lists
    if transposed:
        crow, col, order = transposed_lists(crow, col, shape)
        values = values.index_select(1, order)
    if values.dtype != dtype:
        values = values.to(dtype)
    if batch == 1:
        w = torch_csr(values.squeeze(0), crow, col, (rows, inner))
        out = _product(multiply, w, x.squeeze(0), dtype)
        out = out.mT.contiguous().mT if transposed_output else out.contiguous()
        return out.unsqueeze(0)
    if transposed_output:
        out = x.new_empty(batch, n, rows).mT
    else:
        out = x.new_empty(batch, rows, n)
    matrices = [torch_csr(v, crow, col, (rows, inner)) for v in values]
    for b, into in enumerate(out):
        into.copy_(_product(multiply, matrices[b % len(matrices)], x[b % x.shape[0]], dtype))
    return out


def _product(
    multiply: Callable[[Tensor, Tensor], Tensor], w: Tensor, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """One product in `dtype`, rounded to x's."""
    return multiply(w, x) if x.dtype == dtype else multiply(w, x.to(dtype)).to(x.dtype)
