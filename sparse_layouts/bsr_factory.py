"""`sl.bsr`: a block-sparse tensor from a dense one, from another layout, from scipy's or torch's
own sparse matrices; `sparse_mask` onto any layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import build_pattern
from sparse_layouts.bsr_tensor import BSRTensor, block_size_pair
from sparse_layouts.conversions import into_blocks
from sparse_layouts.csr_conversions import from_sparse_matrix
from sparse_layouts.csr_tensor import CSCTensor, CSRTensor
from sparse_layouts.dense_blocks import pattern_from_dense
from sparse_layouts.dense_rows import dense_source, nonzero_blocks
from sparse_layouts.dispatch import dense_bytes, facts_of, permit, record, route
from sparse_layouts.layout_autograd import aligned, sampled, values_of, with_values
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.mask_factories import Device
from sparse_layouts.matrix_sources import is_scipy
from sparse_layouts.sparsifiers import as_sparsifier
from sparse_layouts.stored_entries import short


def bsr(
    dense_or_torch_sparse: Any,
    block_size: int | tuple[int, int] | None = None,
    *,
    keep: Any = None,
    device: Device = None,
) -> BSRTensor:
    """A BSRTensor of the blocks of a matrix that are kept: with `keep=None` those with a non-zero,
    else what the sparsifier keeps.

    dense (*lead, M, N): a 2-D matrix, or one pattern for each leading index, e.g. (H, M, N); a
    numpy array, too, e.g. a `numpy.memmap`. `block_size`: int or (bm, bn), by default 32; it must
    divide M and N. `keep` chooses among the blocks of a dense matrix by their Frobenius norms:
    `sl.Magnitude(0.25)` a quarter of them, over all leading indices together. Keeps the dtype;
    differentiable in a dense argument and in a layout. Besides the result memory is that of the
    norms and of a few block rows: the dense tensor may be larger than the memory.

    From what is sparse already, nothing is made dense: a block is stored where the source stores an
    entry, be it 0.

    From | what is stored | shares memory
    ---|---|---
    a dense tensor or numpy array | blocks with a non-zero (or NaN), or what `keep` keeps | no
    a BSRTensor of these blocks | as it is | it is returned
    another layout with values | blocks with a stored entry; one pattern for a batch | no
    `torch.sparse_bsr`, sorted | its own blocks | values
    `torch.sparse_bsc`, sorted | its own blocks, column by column | values
    scipy BSR, sorted and unique | its own blocks | values, int32 lists
    other blocks than `block_size`, other sparse matrices | blocks with a stored entry | no

    `block_size=None` keeps a source's own blocks. Where memory is shared, a later change of the
    source in place shows in the layout, and the other way round; `sl.bsr(source).clone()` has
    values of its own. Values that numpy holds read-only are copied.

    Raises `TypeError` for what is no matrix or has bool entries and for a `keep` that is no
    sparsifier, `ValueError` for sizes that the block does not divide, for NaN where `keep` compares
    norms, for `keep` with a source that is sparse already, and for a sparse tensor of torch that
    requires gradient or has several matrices.

    >>> import torch, sparse_layouts as sl
    >>> sl.bsr(torch.eye(64), block_size=16)
    BSRTensor([64, 64], float32, cpu, block 16, 4 blocks, density 25.00%)
    >>> sl.bsr(torch.randn(64, 64), block_size=16, keep=sl.Magnitude(density=0.5)).density
    0.5
    """
    source = dense_source(dense_or_torch_sparse, "bsr")
    if is_scipy(source) or (isinstance(source, Tensor) and not _is_dense(source)):
        made = _from_sparse(source, block_size, keep)
        return made if device is None else made.to(device)  # type: ignore[return-value]
    if not isinstance(source, Tensor):
        raise TypeError(
            "bsr: expected a dense or torch.sparse tensor, a scipy matrix or a layout, got "
            f"{type(source).__name__}"
        )
    if device is not None:
        source = source.to(device)
    block = block_size_pair(32 if block_size is None else block_size, "bsr")
    _check_dense(source, block)
    if keep is None:
        kept = nonzero_blocks(source.detach(), block)
    else:
        kept = as_sparsifier(keep, "bsr").keep_blocks(source, block)
    m, n = source.shape[-2:]
    pattern = pattern_from_dense(kept, block, (m, n))
    like = BSRTensor.on_pattern(None, pattern)
    return sampled(source, like)  # type: ignore[return-value]


def _is_dense(source: Tensor) -> bool:
    return source.layout == torch.strided and not isinstance(source, LayoutTensor)


def _check_not_bool(source: Any) -> None:
    if source.dtype in (torch.bool, np.dtype(bool)):
        raise TypeError(
            "bsr: expected values, got a bool tensor; sl.mask_from makes an exact mask of it"
        )


def _check_dense(dense: Tensor, block: tuple[int, int]) -> None:
    _check_not_bool(dense)
    if dense.dim() < 2:
        raise ValueError(f"bsr: expected (*lead, M, N), got shape {tuple(dense.shape)}")
    m, n = dense.shape[-2:]
    bm, bn = block
    if m % bm or n % bn:
        raise ValueError(
            f"bsr: the block {block} does not divide the matrix {(m, n)}; pad it to "
            f"{(-(-m // bm) * bm, -(-n // bn) * bn)} "
            f"with torch.nn.functional.pad(x, (0, {-n % bn}, 0, {-m % bm}))"
        )


def _from_sparse(source: Any, block_size: int | tuple[int, int] | None, keep: Any) -> BSRTensor:
    """A layout, a scipy matrix or a torch.sparse tensor."""
    given = short(source) if isinstance(source, Tensor) else type(source).__name__
    if keep is not None:
        raise ValueError(
            f"bsr: keep= chooses blocks of a dense tensor; a sparse tensor has chosen already: "
            f"{given} (densify it first)"
        )
    _check_not_bool(source)
    block = None if block_size is None else block_size_pair(block_size, "bsr")
    if isinstance(source, BSRTensor) and block in (None, source.block_size):
        return source
    if isinstance(source, Tensor) and not isinstance(source, LayoutTensor):
        _check_torch(source)
    if not isinstance(source, LayoutTensor):
        own = _own_blocks(source)
        if own is not None and block in (None, own):
            try:
                return _from_blocks(source)
            except ValueError as error:
                raise ValueError(f"bsr: {str(error).removeprefix('bsr: ')}") from None
        source = from_sparse_matrix(source, "bsr")
    block = block or (32, 32)
    (m, n), (bm, bn) = source.matrix_shape, block
    if m % bm or n % bn:
        padded = (-(-m // bm) * bm, -(-n // bn) * bn)
        raise ValueError(
            f"bsr: the block {block} does not divide the matrix {(m, n)} of {given}; pad it to "
            f"{padded}, a scipy matrix with x.resize({padded})"
        )
    return into_blocks(source, block)


def _check_torch(source: Tensor) -> None:
    if source.dim() != 2:
        raise ValueError(
            f"bsr: expected a sparse matrix, got shape {tuple(source.shape)}; convert each "
            f"sample for itself"
        )
    if source.requires_grad:
        raise ValueError(
            "bsr: expected a sparse tensor without gradient, got one that requires it, which "
            "cannot be followed; pass the dense tensor, or source.detach()"
        )


def _own_blocks(source: Any) -> tuple[int, int] | None:
    """The block size of a torch.sparse tensor or scipy matrix of blocks, None of others."""
    if is_scipy(source):
        return tuple(source.blocksize) if source.format == "bsr" else None
    if source.layout in (torch.sparse_bsr, torch.sparse_bsc):
        return source.values().shape[-2], source.values().shape[-1]
    return None


def _from_blocks(source: Any) -> BSRTensor:
    """The blocks of a torch.sparse tensor or scipy matrix of blocks, on its memory."""
    by_rows = True
    if is_scipy(source):
        matrix = source
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        stored = int(matrix.indptr[-1])  # scipy may have room for more
        data = matrix.data[:stored]
        data = data if data.flags.writeable else data.copy()  # the layout's values get written to
        arrays = (matrix.indptr, matrix.indices[:stored], data)
        crow, col, values = (dense_source(np.asarray(t), "bsr") for t in arrays)
    elif source.layout == torch.sparse_bsr:
        crow, col, values = source.crow_indices(), source.col_indices(), source.values()
    else:
        by_rows = False
        crow, col, values = source.ccol_indices(), source.row_indices(), source.values().mT
    (m, n), (bm, bn) = (int(size) for size in source.shape), values.shape[-2:]
    # before anything is computed from lists that nobody may have checked
    if by_rows:
        CSRTensor.on_lists(None, crow, col, (m // bm, n // bn)).validate()
    else:
        CSCTensor.on_lists(None, crow, col, (m // bn, n // bm)).validate()
    pattern = build_pattern(
        crow[None].int(),
        col.int(),
        shape=(m, n) if by_rows else (n, m),
        block_size=(bm, bn),
    )
    made = BSRTensor.on_pattern(values, pattern)
    made.validate()
    return made if by_rows else made.transposed()


@route(torch.Tensor.sparse_mask, input=LayoutTensor, mask=LayoutTensor)
def sparse_mask_of_layout(input: LayoutTensor, mask: LayoutTensor) -> LayoutTensor:
    """`v.sparse_mask(w)` of another layout v: v's entries that w stores, 0 where v stores none;
    dense inside.
    """
    if input.stored_values is not None and input.same_pattern(mask):
        input = aligned(input, mask)
        return with_values(input, values_of(input).clone())
    kind = type(input).__name__
    what = f"sparse_mask of a {kind} has no kernel; sampling its dense form."
    permit(what, dense_bytes(input), input.device.type, "sparse_mask")
    dense = input.to_dense()
    record("sparse_mask", "dense fallback", facts_of(dense), dense_bytes(input))
    return sparse_mask(dense, mask)


@route(torch.Tensor.sparse_mask, mask=LayoutTensor)
def sparse_mask(input: Tensor, mask: LayoutTensor) -> LayoutTensor:
    """`x.sparse_mask(w)`: the entries of a dense x that w stores, in w's layout; differentiable in
    x.
    """
    tail = mask.pattern_dims
    if tuple(input.shape[-tail:]) != tuple(mask.shape[-tail:]):
        raise ValueError(
            f"sparse_mask: expected a tensor of shape (*batch, "
            f"{', '.join(map(str, mask.shape[-tail:]))}), got {tuple(input.shape)}"
        )
    return sampled(input, mask)
