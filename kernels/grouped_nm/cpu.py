"""grouped_nm_matmul and grouped_nm_sddmm on the CPU: a few rows of blocks at a time, in cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts.grouped_nm_packing import absolute_columns, choices, densify, gather
from sparse_layouts.kernels.cpu_common import product_dtype, score_dtype

# Entries of W that are made dense at a time: 2 MB in fp32 stay in cache.
STEP_ENTRIES = 2**19
# Up to so many columns of x are gathered by W's columns; more are multiplied by expanded rows.
FEW_COLUMNS = 2


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
    """`W @ x` or `W.mT @ x`, as the reference defines it."""
    batch = values.shape[0] if x.shape[0] == 1 else x.shape[0]
    rows, width = shape[1 if transposed else 0], x.shape[2]
    made = x.new_zeros(batch, width, rows).mT if transposed_output else None
    out = x.new_zeros(batch, rows, width) if made is None else made
    if out.numel() == 0 or columns.numel() == 0:
        return out
    for b in range(batch):
        own, dense = values[b % values.shape[0]], x[b % x.shape[0]]
        if transposed:
            _transposed_product(own, columns, dense, n, m, g, shape, out[b])
        elif width <= FEW_COLUMNS:
            for column in range(width):
                out[b, :, column] = _product_of_one(own, columns, dense[:, column], n, m, g)[:rows]
        else:
            _product(own, columns, dense, n, m, g, shape, out[b])
    return out


def _steps(columns: Tensor, m: int) -> range:
    blocks, slots = columns.shape
    return range(0, blocks, max(1, STEP_ENTRIES // (m * slots)))


def _product_of_one(values: Tensor, columns: Tensor, x: Tensor, n: int, m: int, g: int) -> Tensor:
    """W @ x for one column x (K,): (Mb * m,)."""
    (blocks, slots), count = columns.shape, math.comb(m, n)
    work = score_dtype(x.dtype)
    at = absolute_columns(columns, count * g)
    read = torch.nn.functional.pad(x.to(work), (0, slots - x.shape[0]))[at]  # (Mb, S)
    products = values.to(work) * read[..., None]
    by_choice = products.view(blocks, slots // (count * g), count, g, n).sum((1, 3))
    out = read.new_zeros(blocks, m)
    out.index_add_(1, choices(n, m, x.device).flatten(), by_choice.flatten(1))
    return out.flatten().to(x.dtype)


def _product(
    values: Tensor,
    columns: Tensor,
    x: Tensor,
    n: int,
    m: int,
    g: int,
    shape: tuple[int, int],
    out: Tensor,
) -> None:
    low = product_dtype(x.dtype)
    x = x.to(low)
    steps = _steps(columns, m)
    for first in steps:
        part = slice(first, first + steps.step)
        rows = min(shape[0] - first * m, steps.step * m)
        w = densify(values[None, part].to(low), columns[part], n, m, g, (rows, shape[1]))[0]
        out[first * m : first * m + rows] = torch.mm(w, x)


def _transposed_product(
    values: Tensor,
    columns: Tensor,
    x: Tensor,
    n: int,
    m: int,
    g: int,
    shape: tuple[int, int],
    out: Tensor,
) -> None:
    work = score_dtype(x.dtype)  # sums of several products are not rounded on the way
    total = torch.zeros(out.shape, dtype=work)
    steps = _steps(columns, m)
    for first in steps:
        part = slice(first, first + steps.step)
        rows = min(shape[0] - first * m, steps.step * m)
        w = densify(values[None, part].to(work), columns[part], n, m, g, (rows, shape[1]))[0]
        total.addmm_(w.mT, x[first * m : first * m + rows].to(work))
    out.copy_(total)


def grouped_nm_sddmm(a: Tensor, b: Tensor, columns: Tensor, *, n: int, m: int, g: int) -> Tensor:
    """`a @ b` at the stored entries, as the reference defines it."""
    out = a.new_zeros(a.shape[0], *columns.shape, n)
    if out.numel() == 0:
        return out
    low = product_dtype(a.dtype)
    a, b = a.to(low), b.to(low)
    steps = _steps(columns, m)
    for first in steps:
        part = slice(first, first + steps.step)
        scores = torch.matmul(a[:, first * m : (first + steps.step) * m], b)
        out[:, part] = gather(scores, columns[part], n, m, g)
    return out
