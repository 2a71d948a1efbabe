"""BSRTensor: blocks of a matrix, with values or as a mask, a pattern for each head where wanted."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import (
    TENSOR_FIELDS,
    BlockPattern,
    expand_heads,
    transpose_pattern,
)
from sparse_layouts.block_values import (
    densify,
    entry_mask,
    gather,
    num_entries,
    slots_in_row_order,
    unstored_entries,
)
from sparse_layouts.derived import derived, derived_bytes
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import nested_lists, scipy_data
from sparse_layouts.pattern_checks import check_pattern

if TYPE_CHECKING:
    from typing_extensions import Self


class BSRTensor(LayoutTensor):
    """Block-sparse rows: the stored blocks of a matrix, row by row, as in `torch.sparse_bsr`; with
    values, or as a bool mask.

    A 4 x 4 example with blocks of 2::

        1 2 . .      crow_indices()  0 1 3
        3 4 . .      col_indices()   0 0 1
        5 6 7 8      values()        [[1 2] [3 4]] [[5 6] [9 8]] [[7 8] [7 6]]
        9 8 7 6

    field | shape | dtype | invariant
    ---|---|---|---
    `inner_values` | (*batch, nnzb, bm, bn) | any | None for a mask; 0 wherever nothing is stored
    the ten tensors of `block_pattern` | see `BlockPattern` | int32 | ascending, in range

    The shape is (*batch, *lead, M, N): every batch index has values of its own on one pattern;
    leading indices (heads) have a pattern each, and heads of a mask that are equal share one.
    Memory: nnzb * (bm * bn * itemsize + 12) + 4 * (Mb + Nb + 2) bytes (8 of the 12 and half of the
    rest are the column lists, which transposed products and gradients use).

    Made by `sl.bsr`, `sl.bsr_mask`, `sl.mask_from` and the mask factories, which check what they
    are given; `validate()` raises `ValueError` for broken tensors.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.tensor([[1.0, 2, 0, 0], [3, 4, 0, 0], [5, 6, 7, 8], [9, 8, 7, 6]]), 2)
    >>> w.crow_indices().tolist(), w.col_indices().tolist(), w.values().shape
    ([0, 1, 3], [0, 0, 1], torch.Size([3, 2, 2]))
    """

    fields: ClassVar[tuple[str, ...]] = ("values", *TENSOR_FIELDS)
    static_fields: ClassVar[tuple[str, ...]] = ("block_size", "lead_dims")

    block_size: tuple[int, int]
    lead_dims: int
    inner_values: Tensor | None
    _pattern: BlockPattern | None = None
    _recalled: dict[Any, Any] | None = None  # what calls of attention settled

    @classmethod
    def on_pattern(cls, values: Tensor | None, pattern: BlockPattern, **static: Any) -> Self:
        """A layout of `values` (*batch, S, bm, bn), or a mask for None, on a pattern."""
        if values is not None:
            pattern = expand_heads(pattern)
        batch = () if values is None else tuple(values.shape[:-3])
        out = cls(
            values,
            *pattern[:10],
            shape=(*batch, *pattern.lead, *pattern.shape),
            dtype=torch.bool if values is None else values.dtype,
            block_size=pattern.block_size,
            lead_dims=len(pattern.lead),
            **static,
        )
        out._pattern = pattern
        return out

    def own_static(self) -> dict[str, Any]:
        """The static metadata that a subclass adds."""
        return {n: getattr(self, n) for n in self.static_fields if n not in BSRTensor.static_fields}

    @property
    def block_pattern(self) -> BlockPattern:
        """The pattern as a tuple of tensors and sizes."""
        if self._pattern is None:
            with torch._C.DisableTorchFunctionSubclass():
                shape = self.shape
            m, n = shape[-2:]
            lead = tuple(shape[len(shape) - 2 - self.lead_dims : -2])
            self._pattern = BlockPattern._make(
                (*self.inner_tensors()[1:], (m, n), self.block_size, lead)
            )
        return self._pattern

    @property
    def pattern(self) -> BSRTensor:
        """The mask of the stored entries (a bool layout of the leading dimensions, without the
        batch); a mask returns itself.
        """
        if self.inner_values is None:
            return self
        return type(self).on_pattern(None, self.block_pattern, **self.own_static())

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.block_pattern.shape

    @property
    def pattern_dims(self) -> int:
        """Leading and matrix dimensions, without the batch."""
        return self.lead_dims + 2

    @property
    def is_mask(self) -> bool:
        """Whether this is a mask: a bool layout without values."""
        return self.inner_values is None

    def like_self(self, values: Tensor | None) -> Self:
        """This layout with other values (*batch, S, bm, bn) in slot order, or None: as a mask."""
        return type(self).on_pattern(values, self.block_pattern, **self.own_static())

    def map_inner(self, function: Any, values: Tensor | None) -> Self:
        """This layout with `function` applied to every index tensor, and with these values."""
        pattern = self.block_pattern if values is None else expand_heads(self.block_pattern)
        moved = [None if t is None else function(t) for t in pattern[:10]]
        pattern = BlockPattern._make((*moved, *pattern[10:]))
        return type(self).on_pattern(values, pattern, **self.own_static())

    def to_dense_entries(self) -> Tensor:
        """The plain matrix; bool for a mask."""
        if self.inner_values is None:
            p = self.block_pattern._replace(head_map=None, lead=(self.block_pattern.num_patterns,))
            each = densify(_mask_values(p)[None], p)[0]  # (P, M, N)
            head_map = self.block_pattern.head_map
            return (each if head_map is None else each[head_map.long()]).reshape(self.shape)
        values = self.inner_values
        flat = values.reshape(math.prod(values.shape[:-3]), *values.shape[-3:])
        return densify(flat, self.block_pattern).reshape(self.shape)

    def sample(self, dense: Tensor) -> Self:
        """The entries of `dense` (this layout's shape, or with other leading batch dimensions) that
        are stored here.
        """
        p = expand_heads(self.block_pattern)
        batch = dense.shape[: dense.dim() - 2 - self.lead_dims]
        values = gather(dense.reshape(math.prod(batch), p.num_patterns, *p.shape), p)
        return self.like_self(values.view(*batch, *values.shape[1:]))

    def ones(self, dtype: torch.dtype) -> Tensor:
        """Values of 1 at every stored entry, in slot order of the expanded pattern."""
        return _mask_values(expand_heads(self.block_pattern)).to(dtype)

    def forget_derived(self) -> None:
        """Drops the pattern tuple, which holds the inner tensors that were, and what it led to."""
        self._pattern = self._recalled = None

    def same_pattern(self, other: LayoutTensor) -> bool:
        """Whether both store the same entries in the same places.

        By identity of the index tensors, else by content; a True is remembered with the pattern.
        """
        mine, its = self.inner_tensors()[1:], other.inner_tensors()[1:]
        if len(mine) == len(its) and all(a is b for a, b in zip(mine, its, strict=True)):
            return super().same_pattern(other)
        if not isinstance(other, BSRTensor) or not _is_eager(self.block_pattern):
            return super().same_pattern(other)
        equal: dict[Any, Any] = derived(self.block_pattern, "same", dict)
        key = (type(self), type(other), tuple(self.shape), tuple(other.shape), *map(id, its))
        if all(found() is not None for found in equal.get(key, (_dead,))):
            return True
        same = super().same_pattern(other)
        if same:
            for stale in [k for k, refs in equal.items() if any(r() is None for r in refs)]:
                del equal[stale]
            equal[key] = tuple(weakref.ref(t) for t in its if t is not None)
        return same

    def clear_unstored(self) -> None:
        """Sets what lies inside a block but is not stored (bit tiles, over the edge) to zero, in
        place.
        """
        p, values = self.block_pattern, self.inner_values
        if values is None:
            return
        if not _is_eager(p):
            mask = entry_mask(p)
            if mask is not None:
                values.masked_fill_(~mask, 0)
            return
        found = unstored_entries(p)
        if found is not None:
            slots, unstored = found
            values.index_copy_(-3, slots, values.index_select(-3, slots).masked_fill_(unstored, 0))

    def crow_indices(self) -> Tensor:
        """int32 (Mb + 1,), or (*lead, Mb + 1) with offsets into one `col_indices()`; equal heads of
        a mask share offsets.
        """
        p = self.block_pattern
        if not p.lead:
            return p.crow_indices[0]
        crow = p.crow_indices if p.head_map is None else p.crow_indices[p.head_map.long()]
        return crow.view(*p.lead, -1)

    def col_indices(self) -> Tensor:
        """int32 (nnzb,): the block column of every stored block, row by row."""
        return self.block_pattern.col_indices

    def values(self) -> Tensor:
        """(*batch, nnzb, bm, bn): the stored blocks in the order of `col_indices()`,
        differentiable.

        Shares memory with the layout (but for a transposed one, whose blocks have to be put in
        order). Raises `TypeError` for a mask.
        """
        from sparse_layouts.layout_autograd import values_of

        if self.inner_values is None:
            raise TypeError("values: a mask layout has none; mask.to(dtype) has ones")
        values = values_of(self)
        slots = self.block_pattern.row_slots
        return values if slots is None else values.index_select(-3, slots.long())

    def block_counts(self) -> Tensor | None:
        """int32 (nnzb,): how often each block counts in a softmax, or None where all count once."""
        counts = self.block_pattern.block_counts
        return None if counts is None else counts[slots_in_row_order(self.block_pattern)]

    @property
    def nnz(self) -> int:
        """Stored entries, by token: of partial blocks those that are True, over all heads and the
        batch.
        """
        p = self.block_pattern
        return num_entries(p) * math.prod(self.shape[: self.dim() - 2 - self.lead_dims])

    @property
    def density_of_causal(self) -> float:
        """Stored entries over those of a causal mask of this shape (from the upper left)."""
        m, n = self.block_pattern.shape
        rows = min(m, n)
        triangle = rows * (rows + 1) // 2 + (m - rows) * n
        return self.nnz / max(1, triangle * math.prod(self.shape[:-2]))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the tile schedules and the like that have been derived from the pattern."""
        return derived_bytes(self.block_pattern)

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        p = self.block_pattern
        bm, bn = p.block_size
        block = f"block {bm}" if bm == bn else f"block ({bm}, {bn})"
        if self.inner_tensors()[1] is None or type(p.col_indices) is not Tensor:
            return [block]  # being traced: there is nothing to count
        if p.device.type == "meta":
            return [block, f"{p.num_blocks} blocks"]
        text = [block, f"{p.num_blocks} blocks", f"density {self.density:.2%}"]
        if p.head_map is not None or p.num_patterns > 1:
            text.append(f"{p.num_patterns} patterns")
        return text

    def to_scipy(self) -> Any:
        """A `scipy.sparse.bsr_array` (csr_array where the block does not divide the shape); nested
        lists over leading dimensions.

        On this tensor's memory, where blocks lie row by row, contiguous and on the CPU; else (a
        transposed layout, a csr_array) a copy. bfloat16 and float16, which scipy lacks, become
        float32. A mask becomes a bool array.
        """
        return self._each_matrix(self._one_scipy)

    def to_torch_sparse(self) -> Any:
        """A `torch.sparse_bsr` tensor (CSR where the block does not divide the shape); nested lists
        over leading dimensions.

        On this tensor's memory where blocks lie row by row and contiguous; else (a transposed
        layout, CSR) a copy. A mask becomes one of bool.
        """
        return self._each_matrix(self._one_torch)

    def _each_matrix(self, make: Any) -> Any:
        p = self.block_pattern
        values = self.inner_values
        if values is None:
            values = _mask_values(p)
        values = values.detach()
        batch = values.shape[:-3]
        flat = values.reshape(math.prod(batch), *values.shape[-3:])

        def one(b: int, lead: int) -> Any:
            which = lead if p.head_map is None else int(p.head_map[lead])
            crow = p.crow_indices[which]
            first, last = int(crow[0]), int(crow[-1])
            each = flat[b]
            if p.row_slots is None:
                each = each[first:last]
            else:
                each = each[p.row_slots[first:last].long()]
            return make(crow - first if first else crow, p.col_indices[first:last], each)

        made = [one(b, h) for b in range(flat.shape[0]) for h in range(math.prod(p.lead))]
        return nested_lists(made, (*batch, *p.lead))

    def _one_scipy(self, crow: Tensor, col: Tensor, values: Tensor) -> Any:
        import scipy.sparse

        (m, n), (mb, nb) = self.block_pattern.shape, self.block_pattern.grid
        bm, bn = self.block_size
        data, indices, indptr = scipy_data(values), col.cpu().numpy(), crow.cpu().numpy()
        size = (mb * bm, nb * bn)
        if not len(indices):
            made = scipy.sparse.bsr_array(size, blocksize=(bm, bn), dtype=data.dtype)
        else:
            made = scipy.sparse.bsr_array((data, indices, indptr), shape=size)
        if (m, n) == (mb * bm, nb * bn):
            return made
        cut = made.tocsr()[:m, :n]
        cut.eliminate_zeros()
        return cut

    def _one_torch(self, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
        (m, n), (mb, nb) = self.block_pattern.shape, self.block_pattern.grid
        bm, bn = self.block_size
        if (m, n) == (mb * bm, nb * bn):
            values = values.contiguous()
            return torch.sparse_bsr_tensor(crow, col, values, size=(m, n), check_invariants=False)
        rows = torch.arange(mb, device=crow.device).repeat_interleave(crow.diff().long())
        keep = values != 0
        at = keep.nonzero(as_tuple=True)
        index = torch.stack([rows[at[0]] * bm + at[1], col.long()[at[0]] * bn + at[2]])
        inside = (index[0] < m) & (index[1] < n)
        coo = torch.sparse_coo_tensor(
            index[:, inside], values[at][inside], (m, n), check_invariants=False
        )
        return coo.coalesce().to_sparse_csr()

    def validate(self) -> None:
        """Checks every invariant of the pattern and the values; raises `ValueError` that names the
        first broken one.
        """
        check_pattern(self.block_pattern)
        values = self.inner_values
        if values is None:
            return
        p = self.block_pattern
        if p.head_map is not None:
            raise ValueError("values need a pattern of their own for every head; got a head map")
        if values.dim() < 3 or tuple(values.shape[-3:]) != (p.num_blocks, *p.block_size):
            raise ValueError(
                f"values: expected (*batch, {p.num_blocks}, {p.block_size[0]}, "
                f"{p.block_size[1]}), got {tuple(values.shape)}"
            )
        if values.device != p.device:
            raise ValueError(f"values are on {values.device}, the pattern on {p.device}")
        mask = entry_mask(p)
        if mask is not None and bool((values.masked_fill(mask, 0) != 0).any()):
            raise ValueError(
                "values: an entry that the pattern does not store is not 0 (inside a partial "
                "block or over the edge)"
            )

    def own_heads(self) -> Self:
        """The same layout with lists of its own for every head, also where heads are equal (values
        need that).
        """
        return type(self).on_pattern(
            self.inner_values, expand_heads(self.block_pattern), **self.own_static()
        )

    def transposed(self) -> BSRTensor:
        """The transposed layout: values shared (a view), row and column lists exchanged."""
        values = self.inner_values
        return BSRTensor.on_pattern(
            None if values is None else values.mT, transpose_pattern(self.block_pattern)
        )


def _dead() -> None:
    """A weak reference to nothing."""


def _is_eager(pattern: BlockPattern) -> bool:
    """Whether nobody traces or captures, so that something may be learnt of the lists and kept."""
    lists = pattern.col_indices
    return (
        not torch.compiler.is_compiling()
        and type(lists) is Tensor
        and lists.device.type != "meta"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not (lists.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _mask_values(pattern: BlockPattern) -> Tensor:
    """bool (S, bm, bn): the stored entries of every block, by slot."""
    mask = entry_mask(pattern)
    if mask is not None:
        return mask
    return torch.ones(
        pattern.num_blocks, *pattern.block_size, dtype=torch.bool, device=pattern.device
    )


def block_size_pair(block_size: int | tuple[int, int], what: str) -> tuple[int, int]:
    """(bm, bn) from an int or a pair; raises for anything else."""
    pair = (block_size, block_size) if isinstance(block_size, (int, np.integer)) else block_size
    edges = pair if isinstance(pair, (tuple, list)) else ()
    whole = [isinstance(e, (int, np.integer)) and not isinstance(e, bool) for e in edges]
    if whole != [True, True]:
        raise TypeError(f"{what}: block_size is an int or a pair of ints, got {block_size!r}")
    bm, bn = pair
    if bm < 1 or bn < 1:
        raise ValueError(f"{what}: block_size must be positive, got {block_size!r}")
    return int(bm), int(bn)
