"""NMTensor: n of every m entries of a matrix's rows, values packed and positions in a few bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparse_layouts.derived import derived_bytes
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import nested_lists
from sparse_layouts.nm_checks import check_layout
from sparse_layouts.nm_packing import (
    entry_columns,
    gather_entries,
    scatter_entries,
    stored_places,
    unpack_positions,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class NMTensor(LayoutTensor):
    """n:m sparsity: of every m entries along a row n are stored, as in NVIDIA's 2:4; with values,
    or as a bool mask.

    A 4 x 4 example of 2:4, one group a row::

        1 2 . .      values()   1 2    indices()   0 1    inner_indices   0b0100
        3 . . 4                 3 4                0 3                    0b1100
        . 5 6 .                 5 6                1 2                    0b1001
        . . 7 8                 7 8                2 3                    0b1110

    field | shape | dtype | invariant
    ---|---|---|---
    `inner_values` | (*batch, *lead, M, E) | any | None for a mask; E = K / m * n
    `inner_indices` | (P, M, W) | int32 | positions 0..m-1, ascending in a group; unused bits 0
    `n`, `m` | static | int | 1 <= n < m <= 16
    `lead_dims` | static | int | how many leading dimensions have a pattern each
    `axis` | static | int | -1: groups run along rows; -2: the transpose, along columns

    The shape is (*batch, *lead, M, K), for axis -2 (*batch, *lead, K, M); m divides K. Every batch
    index has values of its own on one pattern, leading indices (heads) have a pattern each, P in
    all. A position takes max(1, ceil(log2 m)) bits, and an int32 word as many as fit
    (`sparse_layouts/nm_packing.py`). Memory: M * E * itemsize bytes of values and M * W * 4 of
    positions, W = ceil(E / (32 // bits)): 2:4 in bfloat16 takes 1.125 bytes for every entry of the
    dense matrix.

    `w.mT` shares all tensors. Made by `sl.nm`; `validate()` raises `ValueError` for broken tensors.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.nm(torch.randn(64, 64, dtype=torch.bfloat16), 2, 4)
    >>> w, w.nbytes / w.numel()
    (NMTensor([64, 64], bfloat16, cpu, 2:4, density 50.00%), 1.125)
    """

    fields: ClassVar[tuple[str, ...]] = ("values", "indices")
    static_fields: ClassVar[tuple[str, ...]] = ("n", "m", "lead_dims", "axis")

    n: int
    m: int
    lead_dims: int
    axis: int
    inner_values: Tensor | None
    inner_indices: Tensor

    @classmethod
    def on_indices(
        cls,
        values: Tensor | None,
        indices: Tensor,
        *,
        n: int,
        m: int,
        columns: int,
        lead: tuple[int, ...] = (),
        axis: int = -1,
    ) -> Self:
        """A layout of `values` (*batch, *lead, M, E), or a mask for None, at packed `indices` (P,
        M, W); `columns` is K, P the product of `lead`.
        """
        batch = () if values is None else tuple(values.shape[: values.dim() - len(lead) - 2])
        rows = indices.shape[1]
        sizes = (rows, columns) if axis == -1 else (columns, rows)
        return cls(
            values,
            indices,
            shape=(*batch, *lead, *sizes),
            dtype=torch.bool if values is None else values.dtype,
            n=n,
            m=m,
            lead_dims=len(lead),
            axis=axis,
        )

    @property
    def pattern_dims(self) -> int:
        """The dimensions of one sample: leading ones with a pattern each, and the matrix."""
        return self.lead_dims + 2

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading sizes that have a pattern each."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = self.shape
        return tuple(shape[len(shape) - 2 - self.lead_dims : -2])

    @property
    def rows(self) -> int:
        """M: how many rows of groups there are; in a transposed layout they are its columns."""
        return self.inner_indices.shape[1]

    @property
    def columns(self) -> int:
        """K: the length of a row of groups."""
        return self.matrix_shape[self.axis]

    @property
    def entries(self) -> int:
        """E: stored entries of a row of groups."""
        return self.columns // self.m * self.n

    @property
    def pattern(self) -> NMTensor:
        """The mask of the stored entries (a bool layout of the leading dimensions, without the
        batch); a mask returns itself.
        """
        return self if self.inner_values is None else self.like_self(None)

    @property
    def is_mask(self) -> bool:
        """Whether this is a mask: a bool layout without values."""
        return self.inner_values is None

    def _on(self, values: Tensor | None, indices: Tensor, axis: int) -> Self:
        return type(self).on_indices(
            values,
            indices,
            n=self.n,
            m=self.m,
            columns=self.columns,
            lead=self.lead,
            axis=axis,
        )

    def like_self(self, values: Tensor | None) -> Self:
        """This layout with other values (*batch, *lead, M, E), or None: as a mask."""
        return self._on(values, self.inner_indices, self.axis)

    def map_inner(self, function: Any, values: Tensor | None) -> Self:
        """This layout with `function` applied to the indices, and with these values."""
        return self._on(values, function(self.inner_indices), self.axis)

    def transposed(self) -> Self:
        """The transpose, on the same tensors."""
        return self._on(self.inner_values, self.inner_indices, -3 - self.axis)

    def values(self) -> Tensor:
        """(*batch, *lead, M, E): the stored entries of every row of groups, differentiable; shares
        memory.

        Raises `TypeError` for a mask.
        """
        from sparse_layouts.layout_autograd import values_of

        if self.inner_values is None:
            raise TypeError("values: a mask layout has none; mask.to(dtype) has ones")
        return values_of(self)

    def indices(self) -> Tensor:
        """int32 (*lead, M, E): where every entry of `values()` lies along its row of groups: its
        column, and its row in a transposed layout.
        """
        found = entry_columns(self.inner_indices, self.n, self.m, self.columns).int()
        return found.view(*self.lead, *found.shape[1:])

    def positions(self) -> Tensor:
        """uint8 (*lead, M, E): where every entry of `values()` lies within its group, 0..m-1."""
        found = unpack_positions(self.inner_indices, self.n, self.m, self.columns)
        return found.view(*self.lead, *found.shape[1:])

    def ones(self, dtype: torch.dtype) -> Tensor:
        """Values of 1 at every stored entry."""
        return self.inner_indices.new_ones(*self.lead, self.rows, self.entries, dtype=dtype)

    def to_dense_entries(self) -> Tensor:
        """The plain matrix; bool for a mask."""
        where = (self._by_lead(), self.n, self.m, self.columns)
        values = self.inner_values
        dense = stored_places(*where) if values is None else scatter_entries(values, *where)
        return dense if self.axis == -1 else dense.mT.contiguous()

    def sample(self, dense: Tensor) -> Self:
        """The entries of `dense` (this layout's shape, or with other leading batch dimensions) that
        are stored here.
        """
        dense = dense if self.axis == -1 else dense.mT
        return self.like_self(gather_entries(dense, self._by_lead(), self.n, self.m))

    def _by_lead(self) -> Tensor:
        """The packed indices (*lead, M, W)."""
        return self.inner_indices.view(*self.lead, *self.inner_indices.shape[1:])

    @property
    def nnz(self) -> int:
        """Stored entries, over all heads and the batch."""
        values = self.inner_values
        if values is not None:
            return values.numel()
        return math.prod(self.lead) * self.rows * self.entries

    @property
    def density_of_causal(self) -> float:
        """Stored entries over those of a causal mask of this shape (from the upper left)."""
        m, n = self.matrix_shape
        rows = min(m, n)
        triangle = rows * (rows + 1) // 2 + (m - rows) * n
        return self.nnz / max(1, triangle * math.prod(self.shape[:-2]))

    @property
    def cached_bytes(self) -> int:
        """Bytes of what kernels have derived from the indices and keep with them."""
        return derived_bytes((self.inner_indices,))

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        side = "" if self.axis == -1 else " transposed"
        text = [f"{self.n}:{self.m}{side}", f"density {self.density:.2%}"]
        patterns = math.prod(self.lead)
        return text if patterns == 1 else [*text, f"{patterns} patterns"]

    def to_scipy(self) -> Any:
        """A `scipy.sparse.csr_array`, of a transposed layout a `csc_array`; nested lists over
        leading dimensions.

        bfloat16 and float16, which scipy lacks, become float32.
        """
        import scipy.sparse

        kind = scipy.sparse.csr_array if self.axis == -1 else scipy.sparse.csc_array
        low = (torch.bfloat16, torch.float16)

        def one(crow: Tensor, col: Tensor, values: Tensor) -> Any:
            exact = values.float() if values.dtype in low else values
            parts = (exact.numpy(), col.numpy(), crow.numpy())
            return kind(parts, shape=self.matrix_shape)

        return self._each_matrix(one, torch.device("cpu"))

    def to_torch_sparse(self) -> Any:
        """A `torch.sparse_csr` tensor, of a transposed layout a `torch.sparse_csc` one; nested
        lists over leading dimensions.
        """
        kind = torch.sparse_csr_tensor if self.axis == -1 else torch.sparse_csc_tensor

        def one(crow: Tensor, col: Tensor, values: Tensor) -> Any:
            return kind(crow, col, values, size=self.matrix_shape, check_invariants=False)

        return self._each_matrix(one, self.inner_indices.device)

    def _each_matrix(self, make: Any, device: torch.device) -> Any:
        """`make(crow, col, values)` of every matrix, in copies of its own."""
        values = self.inner_values
        values = self.ones(torch.bool) if values is None else values.detach()
        batch = values.shape[: values.dim() - self.lead_dims - 2]
        rows, entries, patterns = self.rows, self.entries, math.prod(self.lead)
        values = values.reshape(math.prod(batch), patterns, rows * entries).to(device)
        col = self.indices().view(patterns, -1).to(device)
        crow = torch.arange(rows + 1, dtype=torch.int32, device=device) * entries
        made = [
            make(crow.clone(), col[p].clone(), sample[p].clone())
            for sample in values
            for p in range(patterns)
        ]
        return nested_lists(made, (*batch, *self.lead))

    def validate(self) -> None:
        """Checks every invariant of indices and values; raises `ValueError` that names the first
        broken one.
        """
        check_layout(self)
