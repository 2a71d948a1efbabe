"""`w[2:5]`, `w[i]`, `w[:, 3:]` of CSR and CSC layouts."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.csr_lists import entry_rows
from sparse_layouts.dispatch import route
from sparse_layouts.layout_autograd import values_of, with_values
from sparse_layouts.layout_routes import if_taken

C = TypeVar("C", bound=CompressedTensor)


class Cut(NamedTuple):
    """An index read: what is taken of the batch, of rows and of columns; `dense` dimensions (-2,
    -1) are integers, which leave a dense result.
    """

    batch: tuple[int | slice, ...]
    rows: range
    columns: range
    dense: tuple[int, ...]


def read_index(layout: CompressedTensor, index: Any) -> Cut | None:
    """The index of integers and slices with positive steps, None for any other.

    Raises `IndexError` for one out of range or with too many dimensions.
    """
    index = index if isinstance(index, tuple) else (index,)
    dims = layout.dim()
    if any(isinstance(i, (Tensor, list)) for i in index):  # before `in`, which compares them
        return None
    if sum(i is Ellipsis for i in index) == 1:
        at = next(i for i, taken in enumerate(index) if taken is Ellipsis)
        whole = [slice(None)] * (dims - len(index) + 1)
        index = (*index[:at], *whole, *index[at + 1 :])
    if not all(isinstance(i, (int, slice)) and not isinstance(i, bool) for i in index):
        return None
    if len(index) > dims:
        raise IndexError(f"too many indices: {len(index)} for a layout of {dims} dimensions")
    index = (*index, *[slice(None)] * (dims - len(index)))
    ranges, dense = [], []
    for dim, (taken, size) in enumerate(zip(index, layout.shape, strict=True)):
        if isinstance(taken, int):
            if not -size <= taken < size:
                raise IndexError(f"index {taken} is out of range for dimension {dim} of {size}")
            taken %= size
            ranges.append(range(taken, taken + 1))
            if dim >= dims - 2:
                dense.append(dim - dims)
        else:
            if taken.step is not None and taken.step < 1:
                return None
            ranges.append(range(*taken.indices(size)))
    return Cut(index[:-2], ranges[-2], ranges[-1], tuple(dense))


def reads_index(input: CompressedTensor, index: Any) -> bool:
    """Whether `input[index]` needs no dense matrix."""
    return read_index(input, index) is not None


@route(torch.Tensor.__getitem__, input=CompressedTensor, uses=if_taken(reads_index))
def select_entries(input: CompressedTensor, index: Any) -> Any:
    """`w[a:b]`, `w[:, a:b]`, `w[sample]`: integers and slices with positive steps, in the layout.

    `w[i]` and `w[:, j]` of a matrix are dense vectors. Consecutive rows of a CSRTensor (columns of
    a CSCTensor) share its memory, where no gradient is wanted; other selections copy. Both wait for
    a GPU: how much is stored decides the sizes.
    """
    cut = read_index(input, index)
    if cut is None:
        return NotImplemented
    of_batch = input if all(i == slice(None) for i in cut.batch) else _samples(input, cut.batch)
    rows, columns = (cut.rows, cut.columns) if input.by_rows else (cut.columns, cut.rows)
    found = _lines(_across(of_batch, columns), rows)
    if not cut.dense:
        return found
    dense = found.to_dense()
    for dim in cut.dense:
        dense = dense.select(dim if len(cut.dense) == 1 else -1, 0)
    return dense


def _samples(layout: C, batch: tuple[int | slice, ...]) -> C:
    values = values_of(layout)[batch]
    return with_values(layout.like_self(values.detach()), values)  # type: ignore[return-value]


def _lines(layout: C, which: range) -> C:
    """Rows of a CSR, columns of a CSC."""
    compressed, indices = layout.lists
    size = compressed.shape[0] - 1
    if which == range(size):
        return layout
    m, k = layout.matrix_shape
    shape = (len(which), k) if layout.by_rows else (m, len(which))
    if which.step == 1 or len(which) < 2:
        start, stop = which.start, which.start + len(which)
        first, last = compressed[[start, stop]].tolist()
        offsets = compressed[start : stop + 1]
        return _picked(
            layout,
            offsets - first if first else offsets,
            indices[first:last],
            slice(first, last),
            shape,
        )
    lines = torch.arange(which.start, which.stop, which.step, device=compressed.device)
    lengths = compressed.diff()[lines]
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=compressed.dtype), (1, 0))
    total = int(offsets[-1])
    # entry t of the result is so far from the first entry of its line in the source
    starts = (compressed[:-1][lines] - offsets[:-1]).long()
    at = starts[entry_rows(offsets, total)] + torch.arange(total, device=starts.device)
    return _picked(layout, offsets, indices[at], at, shape)


def _across(layout: C, which: range) -> C:
    """Columns of a CSR, rows of a CSC: every entry is looked at."""
    compressed, indices = layout.lists
    if which == range(layout.compressed_shape[1]):
        return layout
    m, k = layout.matrix_shape
    shape = (m, len(which)) if layout.by_rows else (len(which), k)
    kept = (indices >= which.start) & (indices < which.stop)
    if which.step != 1:
        kept &= (indices - which.start) % which.step == 0
    before = torch.nn.functional.pad(kept.cumsum(0, dtype=compressed.dtype), (1, 0))
    at = kept.nonzero()[:, 0]
    new = (indices[at] - which.start) // which.step
    return _picked(layout, before[compressed.long()], new, at, shape)


def _picked(
    layout: C, compressed: Tensor, indices: Tensor, at: Tensor | slice, shape: tuple[int, int]
) -> C:
    """The entries `at` of a layout, on their new lists."""
    kind = type(layout)
    if layout.inner_values is None:
        return kind.on_lists(None, compressed, indices, shape)
    values = values_of(layout)[..., at]
    like = kind.on_lists(values.detach(), compressed, indices, shape)
    return with_values(like, values)  # type: ignore[return-value]
