"""`sl.bsr`:

a block-sparse tensor from a dense one or from torch's own sparse tensors; `sparse_mask` onto any
layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import build_pattern, pattern_from_dense
from sparse_layouts.bsr_tensor import BSRTensor, block_size_pair
from sparse_layouts.dense_rows import dense_source, nonzero_blocks
from sparse_layouts.dispatch import route
from sparse_layouts.layout_autograd import sampled
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.mask_factories import Device
from sparse_layouts.sparsifiers import as_sparsifier


def bsr(
    dense_or_torch_sparse: Tensor | np.ndarray,
    block_size: int | tuple[int, int] | None = None,
    *,
    keep: Any = None,
    device: Device = None,
) -> BSRTensor:
    """A BSRTensor of the blocks of a matrix that are kept: with `keep=None` those with a non-zero,
    else what the sparsifier keeps.

    dense (*lead, M, N): a 2-D matrix, or one pattern for each leading index, e.g. (H, M, N); a
    numpy array, too, e.g. a `numpy.memmap`. `block_size`: int or (bm, bn), by default 32; it must
    divide M and N. `keep` chooses among the blocks by their Frobenius norms: `sl.Magnitude(0.25)`
    a quarter of them, over all leading indices together. Keeps the dtype; differentiable in a dense
    argument. Besides the result memory is that of the norms and of a few block rows: the dense
    tensor may be larger than the memory. A `torch.sparse_bsr` tensor keeps its own blocks, other
    sparse tensors of torch are converted without densifying.

    Raises `TypeError` for what is no tensor or a bool one and for a `keep` that is no sparsifier,
    `ValueError` for sizes that the block does not divide, and for NaN where `keep` compares norms.

    >>> import torch, sparse_layouts as sl
    >>> sl.bsr(torch.eye(64), block_size=16)
    BSRTensor([64, 64], float32, cpu, block 16, 4 blocks, density 25.00%)
    >>> sl.bsr(torch.randn(64, 64), block_size=16, keep=sl.Magnitude(density=0.5)).density
    0.5
    """
    source = dense_source(dense_or_torch_sparse, "bsr")
    if not isinstance(source, Tensor):
        raise TypeError(
            f"bsr: expected a dense or torch.sparse tensor, got {type(source).__name__}"
        )
    if isinstance(source, LayoutTensor):
        source = source.to_dense()
    if device is not None:
        source = source.to(device)
    if source.layout != torch.strided:
        return _from_torch_sparse(source, block_size, keep)
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


def _check_not_bool(dense: Tensor) -> None:
    if dense.dtype == torch.bool:
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


def _from_torch_sparse(
    source: Tensor, block_size: int | tuple[int, int] | None, keep: Any
) -> BSRTensor:
    if keep is not None:
        raise ValueError(
            "bsr: keep= chooses blocks of a dense tensor; a sparse tensor has chosen already "
            "(densify it first)"
        )
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
    _check_not_bool(source)
    if source.layout != torch.sparse_bsr:
        block = block_size_pair(32 if block_size is None else block_size, "bsr")
        _check_dense(source, block)
        if source.layout == torch.sparse_coo:
            source = source.coalesce()
        source = source.to_sparse_csr().to_sparse_bsr(block)
    own = (source.values().shape[-2], source.values().shape[-1])
    if block_size is not None and block_size_pair(block_size, "bsr") != own:
        raise ValueError(
            f"bsr: the tensor has blocks of {own}, not {block_size}; leave block_size out to "
            f"keep them"
        )
    pattern = build_pattern(
        source.crow_indices()[None].int(),
        source.col_indices().int(),
        shape=(source.shape[0], source.shape[1]),
        block_size=own,
    )
    made = BSRTensor.on_pattern(source.values().clone(), pattern)
    made.validate()
    return made


@route(torch.Tensor.sparse_mask, mask=LayoutTensor)
def sparse_mask(input: Tensor, mask: LayoutTensor) -> LayoutTensor:
    """`x.sparse_mask(w)`:

    the entries of a dense x that w stores, in w's layout; differentiable in x.
    """
    tail = mask.pattern_dims
    if tuple(input.shape[-tail:]) != tuple(mask.shape[-tail:]):
        raise ValueError(
            f"sparse_mask: expected a tensor of shape (*batch, "
            f"{', '.join(map(str, mask.shape[-tail:]))}), got {tuple(input.shape)}"
        )
    return sampled(input, mask)
