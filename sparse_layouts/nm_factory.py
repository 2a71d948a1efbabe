"""`sl.nm`: n of every m entries of a dense matrix, those of largest magnitude."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.dense_rows import magnitudes, row_chunks
from sparse_layouts.layout_autograd import differentiates, sampled
from sparse_layouts.mask_factories import Device
from sparse_layouts.matrix_sources import plain_matrix
from sparse_layouts.nm_checks import check_nm
from sparse_layouts.nm_packing import pack_positions, words_per_row
from sparse_layouts.nm_tensor import NMTensor
from sparse_layouts.selection import order_keys

# Rows at a time: what is computed from so many bytes of the dense tensor stays in a CPU's cache
# (two cores of an EPYC 9004, 4096 x 4096 in fp32, 2026-11-21).
CHUNK_BYTES = 1 << 20
CHUNK_BYTES_GPU = 1 << 27


def nm(dense: Any, n: int, m: int, *, device: Device = None) -> NMTensor:
    """An NMTensor of the n largest magnitudes of every m entries along the last dimension; among
    equals the first ones.

    dense (*lead, M, K), floating: a matrix, or one pattern for each leading index, e.g. (H, M, K);
    m divides K, 1 <= n < m <= 16. Also a numpy array, a layout, a `torch.sparse` matrix or a scipy
    one, which are made dense. Keeps the dtype; differentiable in a tensor: the stored entries get
    their gradient. Memory besides the result is that of a few rows.

    Raises `TypeError` for what is no matrix of floats and for n, m that are no ints, `ValueError`
    for n, m out of range, vectors, a last dimension that m does not divide, and NaN, which has no
    place in an order (one host sync on a GPU).

    >>> import torch, sparse_layouts as sl
    >>> w = sl.nm(torch.tensor([[1.0, -4.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]]), 2, 4)
    >>> w.to_dense()
    tensor([[ 0., -4.,  3.,  0.],
            [ 5.,  5.,  0.,  0.]])
    """
    check_nm(n, m, "nm")
    source = plain_matrix(dense, "nm")
    if not source.dtype.is_floating_point or source.dtype.itemsize == 1:
        raise TypeError(
            f"nm: expected a matrix of float16, bfloat16, float32 or float64, got {source.dtype}; "
            "convert it with .to(dtype)"
        )
    if source.dim() < 2:
        raise ValueError(
            f"nm: expected (*lead, M, K), got shape {tuple(source.shape)}; a vector is x[None]"
        )
    columns = source.shape[-1]
    if columns % m:
        raise ValueError(
            f"nm: m={m} does not divide the last dimension {columns} of {tuple(source.shape)}; "
            f"pad it with torch.nn.functional.pad(x, (0, {-columns % m}))"
        )
    if device is not None:
        source = source.to(device)
    lead = tuple(source.shape[:-2])
    values, indices = largest_of_groups(source.detach(), n, m)
    if not differentiates(source):
        return NMTensor.on_indices(values, indices, n=n, m=m, columns=columns, lead=lead)
    mask = NMTensor.on_indices(None, indices, n=n, m=m, columns=columns, lead=lead)
    return sampled(source, mask)  # type: ignore[return-value]


def largest_of_groups(dense: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Values (*lead, M, E) and packed indices (P, M, W) of the n largest magnitudes of every m
    entries of `dense` (*lead, M, K), P the product of `lead`.

    Raises `ValueError` for NaN.
    """
    *lead, columns = dense.shape
    rows, entries = math.prod(lead), columns // m * n
    values = dense.new_empty(rows, entries)
    indices = dense.new_empty(rows, words_per_row(entries, m), dtype=torch.int32)
    first_column = torch.arange(0, columns, m, dtype=torch.int32, device=dense.device)
    highest = None
    step = CHUNK_BYTES if dense.device.type == "cpu" else CHUNK_BYTES_GPU
    height = max(1, step // max(1, columns * dense.itemsize))
    for first, chunk in row_chunks(dense, rows=height):
        if not chunk.numel():
            break
        keys = order_keys(magnitudes(chunk))
        top = keys.amax()
        highest = top if highest is None else torch.maximum(highest, top)
        positions = _largest(keys.unflatten(1, (-1, m)), n)
        at = slice(first, first + chunk.shape[0])
        indices[at] = pack_positions(positions.flatten(1), m)
        where = positions.int().add_(first_column[:, None]).flatten(1)
        torch.gather(chunk, 1, where, out=values[at])
    if highest is not None and dense.device.type != "meta":
        _refuse_nan(highest, dense)
    patterns = math.prod(lead[:-1])
    return values.view(*lead, entries), indices.view(patterns, lead[-1], indices.shape[1])


def _largest(keys: Tensor, n: int) -> Tensor:
    """uint8 (r, G, n): the positions of the n largest of keys (r, G, m), ascending; the first of
    equals.

    By the number of entries that come before each, from comparisons of whole columns: the columns
    lie one after the other in memory, which sorting small groups would not use.
    """
    r, groups, m = keys.shape
    each = keys.permute(2, 0, 1).contiguous()  # (m, r, G)
    # the j-th has the j before it ahead of it, but for those that it exceeds
    ahead = torch.arange(m, dtype=torch.uint8, device=keys.device)[:, None, None]
    ahead = ahead.repeat(1, r, groups)
    for j in range(1, m):
        for i in range(j):
            exceeds = (each[j] > each[i]).view(torch.uint8)
            ahead[j] -= exceeds
            ahead[i] += exceeds
    kept = ahead.lt_(n)
    # the s-th of those kept comes after as many entries as have counted at most s
    positions = torch.zeros(n, r, groups, dtype=torch.uint8, device=keys.device)
    counted = torch.zeros(r, groups, dtype=torch.uint8, device=keys.device)
    for j in range(m - 1):
        counted += kept[j]
        for s in range(n):
            positions[s] += (counted <= s).view(torch.uint8)
    return positions.permute(1, 2, 0)


def _refuse_nan(highest: Tensor, dense: Tensor) -> None:
    """Raises where the highest of all keys is that of a NaN, which is above infinity's."""
    infinity = order_keys(magnitudes(torch.full((1,), math.inf, dtype=dense.dtype)))
    if int(highest) > int(infinity):
        at = tuple(dense.isnan().nonzero()[0].tolist())
        raise ValueError(
            f"nm: expected numbers to compare, got NaN, first at {at} of {tuple(dense.shape)}; "
            "replace them with torch.nan_to_num"
        )
