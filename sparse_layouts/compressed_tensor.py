"""CompressedTensor: what CSRTensor and CSCTensor share, one compressing rows and the other columns.

Everything is written once, for the lists of the matrix whose rows are compressed; a CSCTensor is
the CSR of its transpose.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparse_layouts.csr_lists import densify, entry_rows, first_fault, gather, is_plain
from sparse_layouts.derived import derived, derived_bytes
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import nested_lists, scipy_data

if TYPE_CHECKING:
    from typing_extensions import Self


class CompressedTensor(LayoutTensor):
    """A matrix of single entries, its rows or its columns compressed: values (*batch, S) on one
    pattern, or a mask.

    The base of :class:`CSRTensor` and :class:`CSCTensor`; not made by itself.
    """

    by_rows: ClassVar[bool]
    scipy_class: ClassVar[str]
    inner_values: Tensor | None

    @classmethod
    def on_lists(
        cls, values: Tensor | None, compressed: Tensor, indices: Tensor, shape: tuple[int, int]
    ) -> Self:
        """A layout of `values` (*batch, S), or a mask for None, on lists that are taken as they
        are; `shape` is the matrix's (M, K). Nothing is checked: see `validate`.
        """
        batch = () if values is None else values.shape[:-1]
        dtype = torch.bool if values is None else values.dtype
        return cls(values, compressed, indices, shape=(*batch, *shape), dtype=dtype)

    @classmethod
    def from_dense(cls, dense: Tensor) -> Self:
        """The non-zeros of a dense matrix, as `sl.csr(dense)` or `sl.csc(dense)`."""
        from sparse_layouts import csr_factory

        return getattr(csr_factory, "csr" if cls.by_rows else "csc")(dense)

    @property
    def lists(self) -> tuple[Tensor, Tensor]:
        """The offsets (rows or columns + 1,) and the indices (S,)."""
        _, compressed, indices = self.inner_tensors()
        assert compressed is not None
        assert indices is not None
        return compressed, indices

    @property
    def compressed_shape(self) -> tuple[int, int]:
        """The sizes of the matrix whose rows the lists compress: (M, K), of a CSC (K, M)."""
        m, k = self.matrix_shape
        return (m, k) if self.by_rows else (k, m)

    @property
    def pattern_dims(self) -> int:
        """The matrix dimensions, without the batch."""
        return 2

    @property
    def is_mask(self) -> bool:
        """Whether this is a mask: a bool layout without values."""
        return self.inner_values is None

    @property
    def pattern(self) -> Self:
        """The mask of the stored entries (a bool layout (M, K), without the batch); a mask returns
        itself.
        """
        return self if self.inner_values is None else self.like_self(None)

    def like_self(self, values: Tensor | None) -> Self:
        """This layout with other values (*batch, S), or None: as a mask."""
        return type(self).on_lists(values, *self.lists, self.matrix_shape)

    def to_dense_entries(self) -> Tensor:
        """The plain matrix; bool for a mask."""
        values = self.inner_values
        if values is None:
            values = torch.ones(self.lists[1].shape, dtype=torch.bool, device=self.lists[1].device)
        flat = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
        dense = densify(flat, *self.lists, self.compressed_shape)
        return (dense if self.by_rows else dense.mT).reshape(*values.shape[:-1], *self.matrix_shape)

    def sample(self, dense: Tensor) -> Self:
        """The entries of `dense` (*batch, M, K) that are stored here."""
        return self.like_self(gather(dense if self.by_rows else dense.mT, *self.lists))

    def ones(self, dtype: torch.dtype) -> Tensor:
        """Values of 1 at every stored entry, (S,)."""
        return torch.ones(self.lists[1].shape, dtype=dtype, device=self.lists[1].device)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """int64 (S,) each: row and column of every stored entry."""
        compressed, indices = self.lists
        major, minor = entry_rows(compressed, indices.shape[0]), indices.long()
        return (major, minor) if self.by_rows else (minor, major)

    def same_pattern(self, other: LayoutTensor) -> bool:
        """Whether both store the same entries in the same places.

        By identity of the index tensors, else by content; a True is remembered with the pattern.
        """
        if type(self) is not type(other) or self.shape != other.shape:
            return False
        mine, its = self.lists, other.inner_tensors()[1:]
        if all(a is b for a, b in zip(mine, its, strict=True)):
            return True
        if not is_plain(mine[0]):
            return super().same_pattern(other)
        equal: dict[Any, Any] = derived(mine, "same", dict)
        key = tuple(map(id, its))
        if key in equal and all(found() is not None for found in equal[key]):
            return True
        same = super().same_pattern(other)
        if same:
            for stale in [k for k, refs in equal.items() if any(r() is None for r in refs)]:
                del equal[stale]
            equal[key] = tuple(weakref.ref(t) for t in its)
        return same

    def values(self) -> Tensor:
        """(*batch, S): the stored entries in the order of the lists, differentiable; shares memory
        with the layout. Raises `TypeError` for a mask.
        """
        from sparse_layouts.layout_autograd import values_of

        if self.inner_values is None:
            raise TypeError("values: a mask layout has none; mask.to(dtype) has ones")
        return values_of(self)

    @property
    def nnz(self) -> int:
        """Stored entries, over the whole batch; explicit zeros count."""
        return self.lists[1].shape[0] * math.prod(self.shape[:-2])

    @property
    def density_of_causal(self) -> float:
        """Stored entries over those of a causal mask of this shape (from the upper left)."""
        m, k = self.matrix_shape
        rows = min(m, k)
        triangle = rows * (rows + 1) // 2 + (m - rows) * k
        return self.nnz / max(1, triangle * math.prod(self.shape[:-2]))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the other compression and the like that have been derived from the pattern."""
        return derived_bytes(self.lists)

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        indices = self.inner_tensors()[2]
        if indices is None or type(indices) is not Tensor:
            return []  # being traced: there is nothing to count
        return [f"{indices.shape[0]} entries", f"density {self.density:.2%}"]

    def to_scipy(self) -> Any:
        """A `scipy.sparse.csr_array` (of a CSCTensor a csc_array) on this tensor's memory, where it
        is contiguous and on the CPU; nested lists over a batch.

        bfloat16 and float16, which scipy lacks, become float32. A mask becomes a bool array.
        """
        return self._each_matrix(self._one_scipy)

    def to_torch_sparse(self) -> Any:
        """A `torch.sparse_csr` tensor (of a CSCTensor `torch.sparse_csc`) on this tensor's memory;
        nested lists over a batch. A mask becomes one of bool.
        """
        return self._each_matrix(self._one_torch)

    def _each_matrix(self, make: Any) -> Any:
        values = self.inner_values
        values = self.ones(torch.bool) if values is None else values.detach()
        batch = values.shape[:-1]
        flat = values.reshape(math.prod(batch), values.shape[-1])
        return nested_lists([make(each) for each in flat], batch)

    def _one_scipy(self, values: Tensor) -> Any:
        import scipy.sparse

        made = getattr(scipy.sparse, self.scipy_class)(self.matrix_shape, dtype=bool)
        # The constructor would make int32 of int64 indices that fit, which is a copy.
        made.data = scipy_data(values.contiguous())
        made.indptr, made.indices = (t.cpu().numpy() for t in self.lists)
        return made

    def _one_torch(self, values: Tensor) -> Tensor:
        make = torch.sparse_csr_tensor if self.by_rows else torch.sparse_csc_tensor
        values = values.contiguous()
        return make(*self.lists, values, size=self.matrix_shape, check_invariants=False)

    def validate(self) -> None:
        """Checks every invariant of the lists and the values; raises `ValueError` that names the
        first broken one. One host sync.
        """
        names = self.fields[1:]
        rows, columns = self.compressed_shape
        compressed, indices = self.lists
        for name, t in zip(names, self.lists, strict=True):
            if t.dtype not in (torch.int32, torch.int64) or t.dtype != compressed.dtype:
                raise ValueError(
                    f"{name}: expected {names[0]} and {names[1]} both int32 or both int64, got "
                    f"{compressed.dtype} and {indices.dtype}; convert them with .to(torch.int32)"
                )
            if t.dim() != 1:
                raise ValueError(f"{name}: expected one dimension, got shape {tuple(t.shape)}")
            if t.device != compressed.device:
                raise ValueError(
                    f"{name} is on {t.device}, {names[0]} on {compressed.device}; move it with .to"
                )
        if compressed.shape[0] != rows + 1:
            raise ValueError(
                f"{names[0]}: expected {rows + 1} offsets for a matrix of {self.matrix_shape}, "
                f"got {compressed.shape[0]}"
            )
        self._check_values()
        fault = first_fault(compressed, indices, columns)
        if fault is not None:
            raise ValueError(self._explain(fault, columns))

    def _check_values(self) -> None:
        values, (_, indices) = self.inner_values, self.lists
        if values is None:
            return
        if values.dim() < 1 or values.shape[-1] != indices.shape[0]:
            raise ValueError(
                f"values: expected (*batch, {indices.shape[0]}), one for each of "
                f"{self.fields[2]}, got {tuple(values.shape)}"
            )
        if values.device != indices.device:
            raise ValueError(f"values are on {values.device}, the pattern on {indices.device}")

    def _explain(self, fault: str, columns: int) -> str:
        """The message for a fault that `first_fault` named."""
        offsets, names = self.fields[1:]
        line, other = ("row", "column") if self.by_rows else ("column", "row")
        compressed, indices = self.lists
        sort = "scipy's matrix.sum_duplicates() does both"
        return {
            "starts": f"{offsets}: expected the first offset to be 0, got {int(compressed[0])}",
            "ends": f"{offsets}: expected the last offset to be {indices.shape[0]}, the number of "
            f"{names}, got {int(compressed[-1])}",
            "falls": f"{offsets}: expected offsets that never fall, got some that do",
            "range": f"{names}: expected {other}s from 0 to {columns - 1}, got "
            f"{_extremes(indices)}",
            "twice": f"{names}: expected every {other} once in a {line}, got one twice; add such "
            f"values up and sort ({sort})",
            "order": f"{names}: expected ascending {other}s within every {line}, got others; sort "
            f"them with their values ({sort})",
        }[fault]


def _extremes(indices: Tensor) -> str:
    return f"{int(indices.min())} to {int(indices.max())}" if indices.numel() else "none"
