"""NMTensor: n of every m entries of a matrix's rows, values packed and positions in a few bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparse_layouts.derived import derived_bytes
from sparse_layouts.dispatch import facts_of
from sparse_layouts.index_identity import same_indices
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import nested_lists
from sparse_layouts.nm_checks import check_fragments, check_layout
from sparse_layouts.nm_fragments import (
    FRAGMENTS,
    ORDERS,
    ROWS,
    TILE_ROWS,
    by_fragments,
    by_rows,
    fragment_indices,
    has_fragments,
    row_indices,
)
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
    `order` | static | str | "rows", as above, or "fragments": see `prepack`

    The shape is (*batch, *lead, M, K), for axis -2 (*batch, *lead, K, M); m divides K. Every batch
    index has values of its own on one pattern, leading indices (heads) have a pattern each, P in
    all. A position takes max(1, ceil(log2 m)) bits, and an int32 word as many as fit
    (`sparse_layouts/nm_packing.py`). Memory: M * E * itemsize bytes of values and M * W * 4 of
    positions, W = ceil(E / (32 // bits)): 2:4 in bfloat16 takes 1.125 bytes for every entry of the
    dense matrix.

    By fragments (`sparse_layouts/nm_fragments.py`) values and positions have other places, indices
    are (P, M / 16, W'), and memory is the same or (m = 8) a little less. `values()` and all else
    undo it; what works entry by entry does not mind it.

    `w.mT` shares all tensors. Made by `sl.nm`; `validate()` raises `ValueError` for broken tensors.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.nm(torch.randn(64, 64, dtype=torch.bfloat16), 2, 4)
    >>> w, w.nbytes / w.numel()
    (NMTensor([64, 64], bfloat16, cpu, 2:4, density 50.00%), 1.125)
    """

    fields: ClassVar[tuple[str, ...]] = ("values", "indices")
    static_fields: ClassVar[tuple[str, ...]] = ("n", "m", "lead_dims", "axis", "order")

    n: int
    m: int
    lead_dims: int
    axis: int
    order: str
    inner_values: Tensor | None
    inner_indices: Tensor
    _recalled: dict[Any, Any] | None = None  # what calls of products settled

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
        order: str = ROWS,
    ) -> Self:
        """A layout of `values` (*batch, *lead, M, E), or a mask for None, at packed `indices` (P,
        M, W), both in this order; `columns` is K, P the product of `lead`.
        """
        batch = () if values is None else tuple(values.shape[: values.dim() - len(lead) - 2])
        rows = indices.shape[1] * (TILE_ROWS if order == FRAGMENTS else 1)
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
            order=order,
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
        return self.inner_indices.shape[1] * (TILE_ROWS if self.order == FRAGMENTS else 1)

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
            order=self.order,
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

    def prepack(self) -> Self:
        """This tensor in the order that the device's kernels want, differentiable; itself where it
        has that already.

        That of fragments for few columns of 2:4, 1:4, 2:8 and 1:8 in float16 and bfloat16 on a GPU
        of compute capability 9.0 (`sl.explain` tells), of matrices whose rows 16 and whose columns
        64 (2:4), 128 (1:4, 2:8) or 256 (1:8) divides; else row by row.

        A product may leave out what no stored entry meets: NaN of the dense operand need not reach
        rows that store nothing in its column.
        """
        values = self.inner_values
        if values is None:
            return self
        facts = facts_of(values)
        served = facts.capability == (9, 0) and bool(facts.triton)
        served = served and values.dtype in (torch.float16, torch.bfloat16)
        served = served and has_fragments(self.n, self.m, self.rows, self.columns)
        return self.in_order(FRAGMENTS if served else ROWS)

    def in_order(self, order: str) -> Self:
        """This tensor, its entries in the order "rows" or "fragments"; itself where they are;
        differentiable.

        Raises `ValueError` where an n:m or a size has no fragments.
        """
        from sparse_layouts.layout_autograd import reordered

        if order == self.order:
            return self
        if order not in ORDERS:
            raise ValueError(f"in_order: expected one of {ORDERS}, got {order!r}")
        if order == FRAGMENTS:
            check_fragments(self.n, self.m, self.rows, self.columns)
        return reordered(self, lambda layout: layout._moved(order))

    def in_order_of(self, like: LayoutTensor) -> Self:
        """This tensor in the order of an n:m layout of this size, not differentiable."""
        if not isinstance(like, NMTensor) or like.order == self.order or not self._fits(like):
            return self
        return self._moved(like.order)

    def _fits(self, other: NMTensor) -> bool:
        """Whether both have n of m entries of the same matrices, in whatever order."""
        mine, its = (t.static() | {"order": None} for t in (self, other))
        return mine == its and self.shape == other.shape

    def _moved(self, order: str) -> Self:
        """In another order, not differentiable; a row by row pattern is kept with the other."""
        values, n, m = self.inner_values, self.n, self.m
        if order == ROWS:
            indices = self.row_indices()
            values = None if values is None else by_rows(values, n, m)
        else:
            indices = fragment_indices(self.inner_indices, n, m, self.columns)
            values = None if values is None else by_fragments(values, n, m)
        return type(self).on_indices(
            values,
            indices,
            n=n,
            m=m,
            columns=self.columns,
            lead=self.lead,
            axis=self.axis,
            order=order,
        )

    def row_indices(self) -> Tensor:
        """int32 (P, M, W): the packed positions row by row, whatever the order."""
        if self.order == ROWS:
            return self.inner_indices
        return row_indices(self.inner_indices, self.n, self.m, self.columns)

    def same_pattern(self, other: LayoutTensor) -> bool:
        """Whether both store the same entries, in whatever order."""
        if not isinstance(other, NMTensor) or self.order == other.order:
            return super().same_pattern(other)
        if type(self) is not type(other) or not self._fits(other):
            return False
        return same_indices((self.row_indices(),), (other.row_indices(),))

    def values(self) -> Tensor:
        """(*batch, *lead, M, E): the stored entries of every row of groups, differentiable; shares
        memory (but for the order of fragments, which is undone).

        Raises `TypeError` for a mask.
        """
        from sparse_layouts.layout_autograd import values_of

        if self.inner_values is None:
            raise TypeError("values: a mask layout has none; mask.to(dtype) has ones")
        values = values_of(self)
        return values if self.order == ROWS else by_rows(values, self.n, self.m)

    def indices(self) -> Tensor:
        """int32 (*lead, M, E): where every entry of `values()` lies along its row of groups: its
        column, and its row in a transposed layout.
        """
        found = entry_columns(self.row_indices(), self.n, self.m, self.columns).int()
        return found.view(*self.lead, *found.shape[1:])

    def positions(self) -> Tensor:
        """uint8 (*lead, M, E): where every entry of `values()` lies within its group, 0..m-1."""
        found = unpack_positions(self.row_indices(), self.n, self.m, self.columns)
        return found.view(*self.lead, *found.shape[1:])

    def ones(self, dtype: torch.dtype) -> Tensor:
        """Values of 1 at every stored entry."""
        return self.inner_indices.new_ones(*self.lead, self.rows, self.entries, dtype=dtype)

    def to_dense_entries(self) -> Tensor:
        """The plain matrix; bool for a mask."""
        where = (self._by_lead(), self.n, self.m, self.columns)
        values = self._row_values()
        dense = stored_places(*where) if values is None else scatter_entries(values, *where)
        return dense if self.axis == -1 else dense.mT.contiguous()

    def sample(self, dense: Tensor) -> Self:
        """The entries of `dense` (this layout's shape, or with other leading batch dimensions) that
        are stored here.
        """
        dense = dense if self.axis == -1 else dense.mT
        values = gather_entries(dense, self._by_lead(), self.n, self.m)
        if self.order == FRAGMENTS:
            values = by_fragments(values, self.n, self.m)
        return self.like_self(values)

    def _by_lead(self) -> Tensor:
        """The packed indices (*lead, M, W), row by row."""
        indices = self.row_indices()
        return indices.view(*self.lead, *indices.shape[1:])

    def _row_values(self) -> Tensor | None:
        """The values row by row, not differentiable."""
        values = self.inner_values
        if values is None or self.order == ROWS:
            return values
        return by_rows(values, self.n, self.m)

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
        if self.order != ROWS:
            text.append(f"by {self.order}")
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
        values = self._row_values()
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
