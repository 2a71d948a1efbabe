"""GroupedNMTensor and `sl.grouped_nm`: n of every m rows, and groups of columns that share them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_layouts.derived import derived, derived_bytes
from sparse_layouts.grouped_nm_assignment import assign_patterns
from sparse_layouts.grouped_nm_packing import (
    absolute_columns,
    choices,
    densify,
    entry_rows,
    gather,
)
from sparse_layouts.layout_autograd import sampled
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.mask_factories import Device
from sparse_layouts.matrix_sources import plain_matrix

MAX_M = 16
MAX_CHUNK = 2**15 - 1  # columns are kept as int16 within their chunk


class GroupedNMTensor(LayoutTensor):
    """Grouped n:m sparsity (n:m:g): of m rows a column keeps n, and in a chunk of `C(m, n) * g`
    columns each of the C(m, n) choices of rows is that of exactly g columns.

    A 2 x 4 example of 1:2:2, one chunk of 2 * 2 columns; the first two stored columns keep row 0,
    the others row 1::

        1 . 2 .      columns  0 2 | 1 3
        . 3 . 4      values   1 2 | 3 4

    field | shape | dtype | invariant
    ---|---|---|---
    `inner_values` | (*batch, Mb, S, n) | any | None for a mask; 0 where the shape ends
    `inner_columns` | (Mb, S) | int16 | within its chunk; a permutation of it
    `n`, `m`, `g` | static | int | 1 <= n < m <= 16, g >= 1
    `rows`, `cols` | static | int | the matrix's sizes, before `axis`
    `axis` | static | int | -2: m runs down the rows; -1: the transpose of that

    The shape is (*batch, rows, cols), for axis -1 (*batch, cols, rows). Mb = ceil(rows / m), S =
    ceil(cols / chunk) * chunk: over the edge there is room that stays 0. Slot s of a row of blocks
    belongs to chunk `s // (C g)` and keeps the rows of choice `s % (C g) // g`, choices in
    lexicographic order: g neighbouring slots are a dense n x g piece. Memory: n / m of the dense
    matrix, and 2 bytes for every m entries.

    Source: the grouped n:m layout of STen, https://arxiv.org/abs/2304.07613, section 5.
    Made by `sl.grouped_nm`; `validate()` raises `ValueError` for broken tensors.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.grouped_nm(torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4]]), 1, 2, 2)
    >>> w.to_dense().tolist(), w.nnz
    ([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 4.0]], 4)
    """

    fields: ClassVar[tuple[str, ...]] = ("values", "columns")
    static_fields: ClassVar[tuple[str, ...]] = ("n", "m", "g", "rows", "cols", "axis")

    n: int
    m: int
    g: int
    rows: int
    cols: int
    axis: int
    inner_values: Tensor | None
    inner_columns: Tensor

    def _like(self, values: Tensor | None, columns: Tensor, axis: int) -> GroupedNMTensor:
        batch = () if values is None else tuple(values.shape[:-3])
        size = (self.rows, self.cols) if axis == -2 else (self.cols, self.rows)
        return type(self)(
            values,
            columns,
            shape=(*batch, *size),
            dtype=torch.bool if values is None else values.dtype,
            **{**self.static(), "axis": axis},
        )

    def like_self(self, values: Tensor | None) -> GroupedNMTensor:
        """This layout with other values (*batch, Mb, S, n), or None: as a mask."""
        return self._like(values, self.inner_columns, self.axis)

    def map_inner(self, function: Any, values: Tensor | None) -> GroupedNMTensor:
        """This layout with `function` applied to the columns, and with these values."""
        return self._like(values, function(self.inner_columns), self.axis)

    @property
    def pattern_dims(self) -> int:
        """2: those of the matrix, without the batch."""
        return 2

    def transposed(self) -> GroupedNMTensor:
        """The transpose, on the same tensors."""
        return self._like(self.inner_values, self.inner_columns, -3 - self.axis)

    @property
    def pattern(self) -> GroupedNMTensor:
        """The mask of the stored entries; a mask returns itself."""
        return self if self.inner_values is None else self.like_self(None)

    @property
    def chunk_columns(self) -> int:
        """Columns of a chunk: C(m, n) * g."""
        return math.comb(self.m, self.n) * self.g

    def columns(self) -> Tensor:
        """int64 (Mb, S): the column of every slot; `cols` or more in the room over the edge."""
        return absolute_columns(self.inner_columns, self.chunk_columns)

    def values(self) -> Tensor:
        """(*batch, Mb, S, n): the kept entries of every slot, differentiable; shares memory.

        Raises `TypeError` for a mask.
        """
        from sparse_layouts.layout_autograd import values_of

        if self.inner_values is None:
            raise TypeError("values: a mask layout has none; mask.to(dtype) has ones")
        return values_of(self)

    def _inside(self) -> Tensor | None:
        """bool (Mb, S, n): which room is an entry of the matrix; None where all of it is."""
        blocks, slots = self.inner_columns.shape
        if blocks * self.m == self.rows and slots == self.cols:
            return None

        def build() -> Tensor:
            return entry_rows(self.inner_columns, self.n, self.m, self.g).lt(self.rows) & (
                self.columns() < self.cols
            ).unsqueeze(-1)

        return derived((self.inner_columns,), ("inside", self.rows, self.cols), build)

    def ones(self, dtype: torch.dtype) -> Tensor:
        """Values of 1 at every stored entry."""
        inside = self._inside()
        if inside is not None:
            return inside.to(dtype)
        return self.inner_columns.new_ones(*self.inner_columns.shape, self.n, dtype=dtype)

    def to_dense_entries(self) -> Tensor:
        """The plain matrix; bool for a mask."""
        values = self.inner_values
        values = self.ones(torch.uint8) if values is None else values
        batch = values.shape[:-3]
        flat = values.reshape(math.prod(batch), *values.shape[-3:])
        dense = densify(flat, self.inner_columns, self.n, self.m, self.g, (self.rows, self.cols))
        dense = dense.view(*batch, self.rows, self.cols).to(self.dtype)
        return dense if self.axis == -2 else dense.mT.contiguous()

    def sample(self, dense: Tensor) -> GroupedNMTensor:
        """The entries of `dense` (this layout's shape, or with other leading dimensions) that are
        stored here.
        """
        dense = dense if self.axis == -2 else dense.mT
        batch = dense.shape[:-2]
        flat = dense.reshape(math.prod(batch), self.rows, self.cols)
        values = gather(flat, self.inner_columns, self.n, self.m, self.g)
        return self.like_self(values.view(*batch, *values.shape[1:]))

    def clear_unstored(self) -> None:
        """Sets the room over the matrix's edge to zero."""
        inside = self._inside()
        if inside is not None and self.inner_values is not None:
            self.inner_values.masked_fill_(~inside, 0)

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

    @property
    def nnz(self) -> int:
        """Stored entries, of all samples; on the meta device with the room over the edge."""
        inside = self._inside()
        count = self.inner_columns.numel() * self.n
        if inside is not None and not inside.is_meta:
            key = ("nnz", self.rows, self.cols)
            count = derived((self.inner_columns,), key, lambda: int(inside.sum()))
        values = self.inner_values
        return count if values is None else count * math.prod(values.shape[:-3])

    @property
    def density_of_causal(self) -> float:
        """Stored entries over the entries on and below the diagonal."""
        m, n = self.matrix_shape
        causal = sum(min(i + 1, n) for i in range(m))
        batch = 1 if self.inner_values is None else math.prod(self.inner_values.shape[:-3])
        return self.nnz / max(1, causal * batch)

    @property
    def cached_bytes(self) -> int:
        """Bytes of what has been derived from the columns and is kept with them."""
        return derived_bytes((self.inner_columns,))

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        side = "" if self.axis == -2 else ", transposed"
        return [f"{self.n}:{self.m}:{self.g}{side}", f"density {self.density:.2%}"]

    def validate(self) -> None:
        """Checks every invariant; raises `ValueError` that names the first broken one."""
        _check_sizes(self.n, self.m, self.g, "GroupedNMTensor")
        columns, chunk = self.inner_columns, self.chunk_columns
        blocks, chunks = -(-self.rows // self.m), -(-self.cols // chunk)
        if self.axis not in (-1, -2):
            raise ValueError(f"axis: expected -1 or -2, got {self.axis}")
        size = (self.rows, self.cols) if self.axis == -2 else (self.cols, self.rows)
        if self.matrix_shape != size:
            raise ValueError(f"shape: expected (..., {size[0]}, {size[1]}), got {self.shape}")
        if columns.dtype != torch.int16 or tuple(columns.shape) != (blocks, chunks * chunk):
            raise ValueError(
                f"columns: expected int16 of shape {(blocks, chunks * chunk)}, got "
                f"{columns.dtype} of shape {tuple(columns.shape)}"
            )
        ordered = columns.view(blocks, chunks, chunk).sort(-1)[0].long()
        if not torch.equal(ordered, torch.arange(chunk, device=columns.device).expand_as(ordered)):
            raise ValueError("columns: expected a permutation of every chunk's columns")
        values = self.inner_values
        if values is None:
            return
        if values.dim() < 3 or tuple(values.shape[-3:]) != (*columns.shape, self.n):
            raise ValueError(
                f"values: expected (*batch, {blocks}, {chunks * chunk}, {self.n}), got "
                f"{tuple(values.shape)}"
            )
        if values.device != columns.device:
            raise ValueError(f"values are on {values.device}, the columns on {columns.device}")
        inside = self._inside()
        if inside is not None and bool((values.masked_fill(inside, 0) != 0).any()):
            raise ValueError("values: what lies over the matrix's edge is not 0")


def grouped_nm(dense: Any, n: int, m: int, g: int, *, device: Device = None) -> GroupedNMTensor:
    """A GroupedNMTensor of a matrix: n of every m rows of a column, each choice of rows for g
    columns of every chunk of `C(m, n) * g`.

    dense (M, K), floating; sizes that m and the chunk do not divide are padded within the layout.
    Columns get their choices by descending magnitude (the sum of what is kept), greedily, each
    choice g times. Also a numpy array, a layout, a `torch.sparse` matrix or a scipy one, which are
    made dense. Keeps the dtype; differentiable in a tensor: what is kept gets its gradient.

    Raises `TypeError` for what is no floating matrix or no int, `ValueError` for n, m, g out of
    range, other dimensions, and NaN. Source: STen, https://arxiv.org/abs/2304.07613.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.grouped_nm(torch.randn(64, 96), 2, 4, 4)
    >>> w
    GroupedNMTensor([64, 96], float32, cpu, 2:4:4, density 50.00%)
    """
    what = "grouped_nm"
    _check_sizes(n, m, g, what)
    dense = plain_matrix(dense, what)
    if not dense.dtype.is_floating_point:
        raise TypeError(f"{what}: expected a floating tensor, got {dense.dtype}")
    if dense.dim() != 2:
        raise ValueError(
            f"{what}: expected a matrix (M, K), got shape {tuple(dense.shape)}; convert each "
            f"matrix for itself"
        )
    if device is not None:
        dense = dense.to(device)
    columns = assign_patterns(dense.detach(), choices(n, m, dense.device), m, g)
    rows, cols = dense.shape
    static = {"n": n, "m": m, "g": g, "rows": rows, "cols": cols, "axis": -2}
    like = GroupedNMTensor(None, columns, shape=(rows, cols), dtype=torch.bool, **static)
    return sampled(dense, like)  # type: ignore[return-value]


def _check_sizes(n: object, m: object, g: object, what: str) -> None:
    for name, value in (("n", n), ("m", m), ("g", g)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{what}: {name} is an int, got {value!r}")
    assert isinstance(n, int)
    assert isinstance(m, int)
    assert isinstance(g, int)
    if not 1 <= n < m <= MAX_M:
        raise ValueError(f"{what}: expected 1 <= n < m <= {MAX_M}, got n={n}, m={m}")
    if g < 1:
        raise ValueError(f"{what}: expected g of at least 1, got {g}")
    if math.comb(m, n) * g > MAX_CHUNK:
        raise ValueError(
            f"{what}: a chunk of C({m}, {n}) * {g} = {math.comb(m, n) * g} columns is over the "
            f"{MAX_CHUNK} that can be; take a smaller g or m"
        )
