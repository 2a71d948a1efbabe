"""scipy's and torch's sparse matrices, and other layouts, as CSR and CSC layouts; and one as the
other.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.conversions import check_no_counts
from sparse_layouts.csr_lists import transposed_lists
from sparse_layouts.csr_tensor import CSCTensor, CSRTensor
from sparse_layouts.dense_rows import dense_source
from sparse_layouts.entry_lists import entries_of, lead_of, picked
from sparse_layouts.layout_autograd import values_of, with_values
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import is_scipy
from sparse_layouts.stored_entries import short

C = TypeVar("C", CSRTensor, CSCTensor)


def check_dtype(dtype: Any, what: str) -> None:
    """Raises for bool entries: those are a mask's."""
    if dtype in (torch.bool, np.dtype(bool)):
        raise TypeError(
            f"{what}: expected values, got bool; a mask of these entries is "
            f"sl.{what}(x.astype('float32') or x.float()).pattern"
        )


def checked(made: C, what: str) -> C:
    """A layout whose lists and values fit; raises `ValueError` that begins with `what`."""
    try:
        made.validate()
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return made


# --- scipy and torch.sparse -----------------------------------------------------------------------


def from_sparse_matrix(source: Any, what: str) -> CSRTensor:
    """A scipy matrix or a torch.sparse tensor row by row; errors speak of `what`."""
    make = from_scipy if is_scipy(source) else from_torch
    return make(CSRTensor, what, source)


def from_scipy(cls: type[C], what: str, matrix: Any) -> C:
    """A scipy matrix of any format, on its memory where it is compressed that way already."""
    if matrix.ndim != 2:
        raise ValueError(f"{what}: expected a matrix, got shape {tuple(matrix.shape)}")
    check_dtype(matrix.dtype, what)
    # itself where it is that; COO's duplicates are added up
    made = matrix.asformat("csr" if cls.by_rows else "csc")
    if not made.has_canonical_format:
        made = made.copy()
        made.sum_duplicates()
    size = int(made.indptr[-1])  # scipy may have room for more
    offsets, indices = made.indptr, made.indices[:size]
    if offsets.dtype != indices.dtype or offsets.dtype not in (np.int32, np.int64):
        offsets, indices = offsets.astype(np.int64), indices.astype(np.int64)
    data = made.data[:size]
    data = data if data.flags.writeable else data.copy()  # the layout's values get written to
    values = dense_source(np.asarray(data), what)
    compressed, columns = (dense_source(np.asarray(t), what) for t in (offsets, indices))
    m, k = made.shape
    return checked(cls.on_lists(values, compressed, columns, (int(m), int(k))), what)


def from_torch(cls: type[C], what: str, source: Tensor) -> C:
    """A torch.sparse tensor of any layout, on its memory where it is compressed that way."""
    if source.dim() != 2 or source.dense_dim():
        raise ValueError(
            f"{what}: expected a sparse matrix, got shape {tuple(source.shape)} with "
            f"{source.dense_dim()} dense dimensions; convert each sample for itself"
        )
    if source.requires_grad:
        raise ValueError(
            f"{what}: expected a sparse tensor without gradient, got one that requires it, which "
            "cannot be followed; pass the dense tensor, the values with their lists, or "
            "source.detach()"
        )
    check_dtype(source.dtype, what)
    if source.layout in (torch.sparse_bsr, torch.sparse_bsc):
        source = source.to_sparse()
    if source.layout == torch.sparse_coo:
        source = source.coalesce()
    source = source.to_sparse_csr() if cls.by_rows else source.to_sparse_csc()
    if cls.by_rows:
        lists = (source.crow_indices(), source.col_indices())
    else:
        lists = (source.ccol_indices(), source.row_indices())
    shape = (source.shape[0], source.shape[1])
    return checked(cls.on_lists(source.values(), *lists, shape), what)


# --- layouts --------------------------------------------------------------------------------------


def from_layout(cls: type[C], what: str, source: LayoutTensor) -> C:
    """The stored entries of any layout; differentiable."""
    if isinstance(source, cls):
        return source
    if isinstance(source, CompressedTensor):
        return recompressed(source)  # type: ignore[return-value]
    if lead_of(source):
        raise ValueError(
            f"{what}: expected a matrix, got {short(source)}; convert each one for itself"
        )
    check_no_counts(source, what)
    entries = entries_of(source)
    (m, k), size = entries.shape, entries.rows.shape[0]
    small = max(m, k, size) <= torch.iinfo(torch.int32).max
    dtype = torch.int32 if small else torch.int64
    counts = torch.bincount(entries.rows, minlength=m)
    compressed = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(dtype)
    indices = entries.columns.to(dtype)
    if not cls.by_rows:
        compressed, indices, order = transposed_lists(compressed, indices, (m, k))
        slots = order.long() if entries.slots is None else entries.slots[order]
        entries = entries._replace(slots=slots)
    like = cls.on_lists(None, compressed, indices, (m, k))
    if source.stored_values is None:
        return like
    values = picked(source, entries)
    if values.dtype == torch.bool:
        check_dtype(values.dtype, what)
    return with_values(like, values)  # type: ignore[return-value]


def recompressed(layout: CompressedTensor) -> CompressedTensor:
    """A CSRTensor as a CSCTensor of the same matrix, and the other way round; differentiable.

    The values are copied into the other order. Its lists are kept with the pattern.
    """
    compressed, indices, order = transposed_lists(*layout.lists, layout.compressed_shape)
    other = CSCTensor if layout.by_rows else CSRTensor
    shape = layout.matrix_shape
    if layout.inner_values is None:
        return other.on_lists(None, compressed, indices, shape)
    values = values_of(layout).index_select(-1, order)
    like = other.on_lists(values.detach(), compressed, indices, shape)
    return with_values(like, values)  # type: ignore[return-value]
