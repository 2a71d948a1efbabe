"""CSRTensor and CSCTensor: single entries of a matrix, row by row or column by column."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sparse_layouts.compressed_tensor import CompressedTensor


class CSRTensor(CompressedTensor):
    """Compressed sparse rows: the stored entries of a matrix, row by row, as in
    `torch.sparse_csr`; with values, or as a bool mask.

    A 4 x 4 example::

        1 . 2 .      crow_indices()  0 2 2 3 5
        . . . .      col_indices()   0 2 1 0 3
        . 3 . .      values()        1 2 3 4 5
        4 . . 5

    field | shape | dtype | invariant
    ---|---|---|---
    `inner_values` | (*batch, S) | any | None for a mask
    `inner_crow_indices` | (M + 1,) | int32 or int64 | from 0 to S, never falling
    `inner_col_indices` | (S,) | as the other | in range, ascending and unique within a row

    The shape is (*batch, M, K): every batch index has values of its own on one pattern. The lists
    are kept as they were given, so that scipy's and torch's are shared. An explicit zero is a
    stored entry. Memory: S * (itemsize + index size) + (M + 1) * index size bytes. `w.mT` is a
    :class:`CSCTensor` on the same three tensors.

    Made by `sl.csr`, which checks the lists; `validate()` raises `ValueError` for broken ones.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.csr(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0], [4, 0, 0, 5]]))
    >>> w.crow_indices().tolist(), w.col_indices().tolist()
    ([0, 2, 2, 3, 5], [0, 2, 1, 0, 3])
    """

    fields: ClassVar[tuple[str, ...]] = ("values", "crow_indices", "col_indices")
    by_rows = True
    scipy_class = "csr_array"
    inner_crow_indices: Tensor
    inner_col_indices: Tensor

    def crow_indices(self) -> Tensor:
        """(M + 1,), int32 or int64: where each row's entries start in `col_indices()`, and S."""
        return self.inner_crow_indices

    def col_indices(self) -> Tensor:
        """(S,), int32 or int64: the column of every stored entry, row by row."""
        return self.inner_col_indices

    def transposed(self) -> CSCTensor:
        """The transposed layout on the same three tensors."""
        m, k = self.matrix_shape
        return CSCTensor.on_lists(self.inner_values, *self.lists, (k, m))


class CSCTensor(CompressedTensor):
    """Compressed sparse columns: the stored entries of a matrix, column by column, as in
    `torch.sparse_csc`; with values, or as a bool mask.

    A 4 x 4 example::

        1 . 2 .      ccol_indices()  0 2 3 4 5
        . . . .      row_indices()   0 3 2 0 3
        . 3 . .      values()        1 4 3 2 5
        4 . . 5

    field | shape | dtype | invariant
    ---|---|---|---
    `inner_values` | (*batch, S) | any | None for a mask
    `inner_ccol_indices` | (K + 1,) | int32 or int64 | from 0 to S, never falling
    `inner_row_indices` | (S,) | as the other | in range, ascending and unique within a column

    The shape is (*batch, M, K), as of :class:`CSRTensor`, whose mirror this is: `w.mT` is one, on
    the same three tensors. Memory: S * (itemsize + index size) + (K + 1) * index size bytes.

    Made by `sl.csc`, which checks the lists; `validate()` raises `ValueError` for broken ones.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.csc(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0], [4, 0, 0, 5]]))
    >>> w.ccol_indices().tolist(), w.row_indices().tolist()
    ([0, 2, 3, 4, 5], [0, 3, 2, 0, 3])
    """

    fields: ClassVar[tuple[str, ...]] = ("values", "ccol_indices", "row_indices")
    by_rows = False
    scipy_class = "csc_array"
    inner_ccol_indices: Tensor
    inner_row_indices: Tensor

    def ccol_indices(self) -> Tensor:
        """(K + 1,), int32 or int64: where each column's entries start in `row_indices()`, and S."""
        return self.inner_ccol_indices

    def row_indices(self) -> Tensor:
        """(S,), int32 or int64: the row of every stored entry, column by column."""
        return self.inner_row_indices

    def transposed(self) -> CSRTensor:
        """The transposed layout on the same three tensors."""
        m, k = self.matrix_shape
        return CSRTensor.on_lists(self.inner_values, *self.lists, (k, m))
