"""`sl.csr` and `sl.csc`: single entries of a dense matrix, of scipy's and torch's sparse matrices,
of other layouts, or given as lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.csr_conversions import (
    check_dtype,
    checked,
    from_layout,
    from_scipy,
    from_torch,
)
from sparse_layouts.csr_lists import transposed_lists
from sparse_layouts.csr_tensor import CSCTensor, CSRTensor
from sparse_layouts.dense_rows import dense_source, row_chunks
from sparse_layouts.layout_autograd import sampled, with_values
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.mask_factories import Device
from sparse_layouts.matrix_sources import is_scipy
from sparse_layouts.sparsifiers import as_sparsifier
from sparse_layouts.stored_entries import short

C = TypeVar("C", CSRTensor, CSCTensor)


def csr(
    dense_scipy_or_torch: Any,
    col_indices: Any = None,
    values: Any = None,
    *,
    shape: tuple[int, int] | None = None,
    keep: Any = None,
    device: Device = None,
) -> CSRTensor:
    """A CSRTensor of single entries of a matrix (M, K).

    From | what is stored | shares memory
    ---|---|---
    a dense tensor or numpy array | non-zeros (and NaN), or what the sparsifier `keep` keeps | no
    `(crow_indices, col_indices, values, shape=(M, K))` | as given | all three
    scipy CSR, columns sorted and unique, int32 or int64 | as given, zeros too | all three
    scipy, any other format | as given; duplicates are added up | no
    `torch.sparse_csr` | as given, zeros too | all three
    `torch.sparse` COO, CSC, BSR, BSC | as given; duplicates are added up | no
    a CSRTensor / another layout | its stored entries, zeros too | it is returned / no

    Nothing sparse is made dense on the way (of a user's own layout, what its `to_scipy` does). A
    mask layout becomes a mask, a batch on one pattern stays one.
    Where memory is shared, a later change of the source in place shows in the layout; lists must
    then not be changed at all. Values that cannot be written to (read-only arrays) are copied.
    `values` (*batch, S) may have values for every sample on one pattern. Keeps the dtype.
    Differentiable in a dense argument, in `values` (which are then copied) and in a layout.
    Contents are checked, which on a GPU is a host sync. A dense tensor is read in chunks of rows:
    besides the result, memory is a chunk's, and with a sparsifier that sees all at once a byte an
    entry. `device` is where the result goes.

    Raises `TypeError` for what is no matrix, bool entries, indices that are not int32 or int64 or
    lists without `shape`; `ValueError` for lists that are no CSR matrix of that shape, a dense
    tensor that is not 2-D, NaN where `keep` compares, a layout with a pattern for every head, a
    mask that counts blocks, and a sparse tensor of torch that requires gradient, which cannot be
    followed.

    >>> import torch, sparse_layouts as sl
    >>> sl.csr(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    CSRTensor([2, 3], float32, cpu, 3 entries, density 50.00%)
    >>> sl.csr([0, 2, 3], [0, 2, 1], torch.ones(3), shape=(2, 3)).to_dense()
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    return _make(CSRTensor, dense_scipy_or_torch, col_indices, values, shape, keep, device)


def csc(
    dense_scipy_or_torch: Any,
    row_indices: Any = None,
    values: Any = None,
    *,
    shape: tuple[int, int] | None = None,
    keep: Any = None,
    device: Device = None,
) -> CSCTensor:
    """A CSCTensor of single entries of a matrix (M, K): the mirror of :func:`csr`.

    It takes what `sl.csr` takes; lists are `(ccol_indices, row_indices, values, shape=(M, K))`, and
    memory is shared with scipy's CSC matrices (rows sorted and unique), `torch.sparse_csc` and
    lists. Raises as `sl.csr`.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.csc(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    >>> w.ccol_indices().tolist(), w.row_indices().tolist(), w.values().tolist()
    ([0, 1, 2, 3], [0, 1, 0], [1.0, 3.0, 2.0])
    """
    return _make(CSCTensor, dense_scipy_or_torch, row_indices, values, shape, keep, device)


def _make(
    cls: type[C],
    source: Any,
    indices: Any,
    values: Any,
    shape: tuple[int, int] | None,
    keep: Any,
    device: Device,
) -> C:
    what = "csr" if cls.by_rows else "csc"
    if indices is not None or values is not None:
        if keep is not None:
            raise ValueError(f"{what}: keep= chooses entries of a dense tensor; lists have chosen")
        made = _from_lists(cls, what, source, indices, values, shape)
    elif shape is not None:
        names = cls.fields
        raise TypeError(
            f"{what}: shape= goes with lists, as in sl.{what}({names[1]}, {names[2]}, values, "
            "shape=(M, K)); a matrix has its own"
        )
    else:
        made = _from_matrix(cls, what, source, keep)
    return made if device is None else made.to(device)  # type: ignore[return-value]


def _from_matrix(cls: type[C], what: str, source: Any, keep: Any) -> C:
    source = dense_source(source, what)
    is_dense = isinstance(source, Tensor) and not isinstance(source, LayoutTensor)
    is_dense = is_dense and source.layout == torch.strided
    if keep is not None and not is_dense:
        raise ValueError(
            f"{what}: keep= chooses entries of a dense tensor; {_kind(source)} has chosen already "
            "(densify it first)"
        )
    if is_scipy(source):
        return from_scipy(cls, what, source)
    if isinstance(source, LayoutTensor):
        return from_layout(cls, what, source)
    if not isinstance(source, Tensor):
        raise TypeError(
            f"{what}: expected a dense, scipy or torch.sparse matrix, got {type(source).__name__}"
        )
    return _from_dense(cls, what, source, keep) if is_dense else from_torch(cls, what, source)


def _kind(source: Any) -> str:
    return type(source).__name__ if not isinstance(source, Tensor) else short(source)


# --- lists ----------------------------------------------------------------------------------------


def _from_lists(
    cls: type[C],
    what: str,
    compressed: Any,
    indices: Any,
    values: Any,
    shape: tuple[int, int] | None,
) -> C:
    names = cls.fields
    if shape is None or indices is None or values is None:
        raise TypeError(
            f"{what}: lists come as sl.{what}({names[1]}, {names[2]}, values, shape=(M, K)), all "
            "of them; values may be torch.ones(S)"
        )
    size = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    whole = [isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in size]
    if whole != [True, True] or min(size) < 0:
        raise ValueError(f"{what}: shape is (M, K), two numbers from 0, got {shape!r}")
    lists = []
    for name, given in ((names[1], compressed), (names[2], indices)):
        t = _tensor(given, f"{what}: {name}")
        if t.numel() == 0 and not isinstance(given, (Tensor, np.ndarray)):
            t = t.long()  # an empty list is none of floats
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{what}: {name} are int32 or int64, got {t.dtype}; convert with .int()"
            )
        lists.append(t.detach().contiguous())
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # the layout's values get written to
    given = _tensor(values, f"{what}: values")
    check_dtype(given.dtype, what)
    m, k = (int(s) for s in size)
    like = cls.on_lists(given.detach(), lists[0], lists[1], (m, k))
    checked(like, what)
    return with_values(like, given)  # type: ignore[return-value]


def _tensor(given: Any, what: str) -> Tensor:
    """A strided tensor, on the memory of a tensor or numpy array."""
    if isinstance(given, (list, tuple)):
        given = torch.tensor(given)
    given = dense_source(given, what)
    if not isinstance(given, Tensor) or isinstance(given, LayoutTensor):
        raise TypeError(f"{what}: expected a tensor or numpy array, got {type(given).__name__}")
    if given.layout != torch.strided:
        raise TypeError(f"{what}: expected a strided tensor, got one of {given.layout}")
    return given


# --- dense ----------------------------------------------------------------------------------------


def _from_dense(cls: type[C], what: str, dense: Tensor, keep: Any) -> C:
    check_dtype(dense.dtype, what)
    if dense.dim() != 2:
        way_out = (
            "one pattern for all samples: x.sparse_mask(sl.csr(x.abs().amax(0)).pattern)"
            if dense.dim() > 2
            else "x[None] is a row"
        )
        raise ValueError(
            f"{what}: expected a matrix (M, K), got shape {tuple(dense.shape)}; {way_out}"
        )
    crow, col, values = _entries(dense.detach(), keep, what)
    shape = (dense.shape[0], dense.shape[1])
    if not cls.by_rows:
        crow, col, order = transposed_lists(crow, col, shape)
        values = values.index_select(0, order)
    made = cls.on_lists(values, crow, col, shape)
    if torch.is_grad_enabled() and dense.requires_grad:
        return sampled(dense, made.pattern)  # type: ignore[return-value]
    return made


def _chosen(dense: Tensor, keep: Any, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of a matrix, and which of their entries to keep, until its end."""
    if keep is None:
        for _, part in row_chunks(dense):
            yield part, part != 0
        return
    sparsifier = as_sparsifier(keep, what)
    if sparsifier.scope != "materialising":
        for first, kept in sparsifier.chunks(dense):
            yield dense[first : first + kept.shape[0]], kept
        return
    whole = sparsifier.keep(dense)
    for first, part in row_chunks(dense):
        yield part, whole[first : first + part.shape[0]]


def _entries(dense: Tensor, keep: Any, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, columns and values of the entries of a matrix that are kept, row by row; int32 where
    the sizes allow.
    """
    rows, columns = dense.shape
    small = max(rows, columns) <= torch.iinfo(torch.int32).max
    counts, cols, values = [], [], []
    for part, kept in _chosen(dense, keep, what):
        counts.append(kept.sum(1))
        at = kept.reshape(-1).nonzero()[:, 0]
        values.append(part.reshape(-1).index_select(0, at))
        cols.append(at.remainder_(max(columns, 1)).to(torch.int32 if small else torch.int64))
    empty = torch.zeros(0, dtype=torch.long, device=dense.device)
    total = torch.cat([*counts, empty]).cumsum(0)
    crow = torch.nn.functional.pad(total, (1, 0))
    col = torch.cat([*cols, empty.to(torch.int32 if small else torch.int64)])
    data = torch.cat([*values, dense.new_empty(0)])
    dtype = col.dtype if col.shape[0] <= torch.iinfo(torch.int32).max else torch.int64
    return crow.to(dtype), col.to(dtype), data
