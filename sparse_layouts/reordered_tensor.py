"""ReorderedTensor: blocks of a matrix whose rows are stored in another order, like by like."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.block_values import densify, gather, num_entries
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.derived import derived_bytes
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.pattern_checks import check_pattern
from sparse_layouts.reorder_gain import ReorderGain, block_bytes, modelled_seconds, source_blocks

if TYPE_CHECKING:
    from typing_extensions import Self


class ReorderedTensor(LayoutTensor):
    """A block-sparse matrix whose rows are stored in another order, so that those which store the
    same columns share taller blocks; outside it is the matrix it was made of, in its own order.

    A 4 x 4 example, of blocks of 1 x 2; rows 0 and 2, 1 and 3 are stored together, in blocks of
    2 x 2::

        1 2 . .      row_order()  0 2 1 3
        . . 3 4      values()     [[1 2] [5 6]]   [[3 4] [7 8]]
        5 6 . .
        . . 7 8

    field | shape | dtype | invariant
    ---|---|---|---
    `inner_values` | (*batch, nnzb, bm, bn) | any | None for a mask; 0 wherever nothing is stored
    `inner_row_order` | (M,) | int32 | the row that each stored row is
    `inner_row_places` | (M,) | int32 | its inverse: where each row is stored
    `inner_crow_indices` ... `inner_tiles` | see `BlockPattern` | int32 | of the rows as stored
    `block_size` | static | (int, int) | bm and bn of the stored blocks
    `source_block` | static | (int, int) | the block that it was made of; its edges divide
    `axis` | static | int | -2; -1: the transpose, whose columns are stored in another order

    The shape is (*batch, M, N), for axis -1 (*batch, N, M). Bit tiles say which entries of a block
    are stored: those that the source stored, so that fill-in stays 0 in training. A product is one
    of the blocks, with the rows of the result, or of the dense operand, taken in the other order.
    Memory: nnzb * (bm * bn * itemsize + 12) + 4 * (Mb + Nb + 2) + 8 * M bytes; where blocks are
    stored in part 4 bytes a block, and bm * ceil(bn / 32) * 4 for each different bit tile.

    Made by `sl.reorder`; `w.gain` says what that brings. `validate()` raises `ValueError` for
    broken tensors.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.tensor([[1.0, 2, 0, 0], [0, 0, 3, 4], [5, 6, 0, 0], [0, 0, 7, 8]]), (1, 2))
    >>> r = sl.reorder(w, block_rows=2)
    >>> r.row_order().tolist(), r.values().tolist()
    ([0, 2, 1, 3], [[[1.0, 2.0], [5.0, 6.0]], [[3.0, 4.0], [7.0, 8.0]]])
    >>> torch.equal(r.to_dense(), w.to_dense())
    True
    """

    fields: ClassVar[tuple[str, ...]] = (
        "values",
        "row_order",
        "row_places",
        "crow_indices",
        "col_indices",
        "ccol_indices",
        "row_indices",
        "col_slots",
        "block_tiles",
        "tiles",
    )
    static_fields: ClassVar[tuple[str, ...]] = ("block_size", "source_block", "axis")

    block_size: tuple[int, int]
    source_block: tuple[int, int]
    axis: int
    inner_values: Tensor | None
    inner_row_order: Tensor
    inner_row_places: Tensor
    _pattern: BlockPattern | None = None

    @classmethod
    def on_order(
        cls,
        values: Tensor | None,
        pattern: BlockPattern,
        row_order: Tensor,
        row_places: Tensor,
        *,
        source_block: tuple[int, int],
        axis: int = -2,
    ) -> Self:
        """A layout of `values` (*batch, S, bm, bn), or a mask for None, on a pattern of the rows in
        this order, which has neither row slots nor heads nor counts.
        """
        p = pattern
        lists = (p.crow_indices, p.col_indices, p.ccol_indices, p.row_indices, p.col_slots)
        batch = () if values is None else tuple(values.shape[:-3])
        size = p.shape if axis == -2 else p.shape[::-1]
        out = cls(
            values,
            row_order,
            row_places,
            *lists,
            p.block_tiles,
            p.tiles,
            shape=(*batch, *size),
            dtype=torch.bool if values is None else values.dtype,
            block_size=p.block_size,
            source_block=source_block,
            axis=axis,
        )
        out._pattern = p
        return out

    @property
    def block_pattern(self) -> BlockPattern:
        """The pattern of the rows as they are stored."""
        if self._pattern is None:
            crow, col, ccol, row, slots, block_tiles, tiles = self.inner_tensors()[3:]
            shape = self.matrix_shape if self.axis == -2 else self.matrix_shape[::-1]
            lists = (crow, col, None, ccol, row, slots, None, block_tiles, tiles, None)
            self._pattern = BlockPattern._make((*lists, shape, self.block_size, ()))
        return self._pattern

    def _on(self, values: Tensor | None, pattern: BlockPattern, axis: int) -> Self:
        orders = (self.inner_row_order, self.inner_row_places)
        block = self.source_block
        return type(self).on_order(values, pattern, *orders, source_block=block, axis=axis)

    def like_self(self, values: Tensor | None) -> Self:
        """This layout with other values (*batch, nnzb, bm, bn), or None: as a mask."""
        return self._on(values, self.block_pattern, self.axis)

    def map_inner(self, function: Any, values: Tensor | None) -> Self:
        """This layout with `function` applied to every index tensor, and with these values."""
        p = self.block_pattern
        moved = [None if t is None else function(t) for t in p[:10]]
        orders = (function(self.inner_row_order), function(self.inner_row_places))
        pattern = BlockPattern._make((*moved, *p[10:]))
        block = self.source_block
        return type(self).on_order(values, pattern, *orders, source_block=block, axis=self.axis)

    def transposed(self) -> Self:
        """The transpose, on the same tensors."""
        return self._on(self.inner_values, self.block_pattern, -3 - self.axis)

    def forget_derived(self) -> None:
        """Drops the pattern tuple, which holds the inner tensors that were."""
        self._pattern = None

    @property
    def pattern_dims(self) -> int:
        """2: those of the matrix, without the batch."""
        return 2

    @property
    def is_mask(self) -> bool:
        """Whether this is a mask: a bool layout without values."""
        return self.inner_values is None

    @property
    def pattern(self) -> ReorderedTensor:
        """The mask of the stored entries, without the batch; a mask returns itself."""
        return self if self.inner_values is None else self.like_self(None)

    def stored_blocks(self) -> BSRTensor:
        """The rows (of a transposed layout the columns) as they are stored, as a block layout that
        shares memory, not differentiable; `row_order()` says which they are.
        """
        return BSRTensor.on_pattern(self.inner_values, self.block_pattern)

    def row_order(self) -> Tensor:
        """int32 (M,): the row that each stored row is; of a transposed layout the column."""
        return self.inner_row_order

    def values(self) -> Tensor:
        """(*batch, nnzb, bm, bn): the blocks as they are stored, differentiable; shares memory.

        Their rows are in `row_order()`; `sl.bsr(w, w.source_block).values()` are those in the
        matrix's own order. Raises `TypeError` for a mask.
        """
        from sparse_layouts.layout_autograd import values_of

        if self.inner_values is None:
            raise TypeError("values: a mask layout has none; mask.to(dtype) has ones")
        return values_of(self)

    def ones(self, dtype: torch.dtype) -> Tensor:
        """Values of 1 at every stored entry."""
        return BSRTensor.on_pattern(None, self.block_pattern).ones(dtype)

    def to_dense_entries(self) -> Tensor:
        """The plain matrix; bool for a mask."""
        p = self.block_pattern
        values = self.ones(torch.bool) if self.inner_values is None else self.inner_values
        batch = values.shape[:-3]
        flat = values.reshape(math.prod(batch), *values.shape[-3:])
        dense = densify(flat, p).view(*batch, *p.shape).index_select(-2, self.inner_row_places)
        return dense if self.axis == -2 else dense.mT.contiguous()

    def sample(self, dense: Tensor) -> Self:
        """The entries of `dense` (this layout's shape, or with other leading dimensions) that are
        stored here.
        """
        p = self.block_pattern
        dense = dense if self.axis == -2 else dense.mT
        batch = dense.shape[:-2]
        flat = dense.index_select(-2, self.inner_row_order).reshape(math.prod(batch), 1, *p.shape)
        values = gather(flat, p)
        return self.like_self(values.view(*batch, *values.shape[1:]))

    def clear_unstored(self) -> None:
        """Sets fill-in, and what lies over the matrix's edge, to zero, in place."""
        if self.inner_values is not None:
            self.stored_blocks().clear_unstored()

    @property
    def nnz(self) -> int:
        """Stored entries, without fill-in, of all samples."""
        values = self.inner_values
        batch = 1 if values is None else math.prod(values.shape[:-3])
        return num_entries(self.block_pattern) * batch

    @property
    def density_of_causal(self) -> float:
        """Stored entries over the entries on and below the diagonal."""
        m, n = self.matrix_shape
        rows = min(m, n)
        triangle = rows * (rows + 1) // 2 + (m - rows) * n
        return self.nnz / max(1, triangle * math.prod(self.shape[:-2]))

    @property
    def cached_bytes(self) -> int:
        """Bytes of what has been derived from the pattern and is kept with it."""
        return derived_bytes(self.block_pattern)

    @property
    def gain(self) -> ReorderGain:
        """What the order brings, against the blocks that it was made of: a table to print."""
        p, block, values = self.block_pattern, self.source_block, self.inner_values
        itemsize = 0 if values is None else values.element_size()
        before = source_blocks(p, block)
        lists = sum(t.nbytes for t in self.inner_tensors()[1:] if t is not None)
        return ReorderGain(
            block,
            p.block_size,
            before,
            p.num_blocks,
            num_entries(p),
            block_bytes(p.shape, before, block, itemsize),
            p.num_blocks * math.prod(p.block_size) * itemsize + lists,
            modelled_seconds(before, block, p.shape[0]),
            modelled_seconds(p.num_blocks, p.block_size, p.shape[0], reordered=True),
        )

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        p = self.block_pattern
        text = [f"block {p.block_size}"]
        if type(p.col_indices) is not Tensor:
            return text  # being traced: there is nothing to count
        if p.device.type == "meta":
            return [*text, f"{p.num_blocks} blocks"]
        gain = self.gain
        return [
            *text,
            f"density {self.density:.2%}",
            *(["transposed"] if self.axis == -1 else []),
            f"{p.num_blocks} blocks for {gain.blocks_before} of {self.source_block}",
            f"fill-in {gain.fill_in:.1%}",
            f"modelled gain {gain.speedup:.2f}x",
        ]

    def to_scipy(self) -> Any:
        """A `scipy.sparse.csr_array` of the stored entries; nested lists over a batch.

        bfloat16 and float16, which scipy lacks, become float32. A mask becomes a bool array.
        """
        return self._by_rows().to_scipy()

    def to_torch_sparse(self) -> Any:
        """A `torch.sparse_csr` tensor of the stored entries; nested lists over a batch. A mask
        becomes one of bool.
        """
        return self._by_rows().to_torch_sparse()

    def _by_rows(self) -> Any:
        from sparse_layouts.csr_factory import csr

        return csr(self.detach())

    def validate(self) -> None:
        """Checks every invariant of order, pattern and values; raises `ValueError` that names the
        first broken one.
        """
        if self.axis not in (-1, -2):
            raise ValueError(f"axis: expected -1 or -2, got {self.axis}")
        for name in ("block_size", "source_block"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected edges from 1, got {getattr(self, name)}")
        p, (bm, bn) = self.block_pattern, self.source_block
        if p.block_size[0] % bm or p.block_size[1] != bn:
            raise ValueError(
                f"source_block: expected one whose height divides that of {p.block_size} and whose "
                f"width is the same, got {self.source_block}"
            )
        check_pattern(p)
        order, places, rows = self.inner_row_order, self.inner_row_places, p.shape[0]
        for name, tensor in (("row_order", order), ("row_places", places)):
            if tensor.dtype != torch.int32 or tuple(tensor.shape) != (rows,):
                raise ValueError(
                    f"{name}: expected int32 of shape ({rows},), got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
            if tensor.device != p.device:
                raise ValueError(f"{name} is on {tensor.device}, col_indices on {p.device}")
        every = torch.arange(rows, dtype=torch.int32, device=p.device)
        if not torch.equal(order.sort().values, every):
            raise ValueError(f"row_order: expected a permutation of 0..{rows - 1}")
        if rows and not 0 <= int(places.min()) <= int(places.max()) < rows:
            raise ValueError(f"row_places: expected rows from 0 to {rows - 1}")
        if not torch.equal(order[places.long()], every):
            raise ValueError("row_places: expected the inverse of row_order")
        if self.inner_values is not None:
            self.stored_blocks().validate()
