"""Masks from dense ones: `bsr_mask` of blocks, `mask_from` of entries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import (
    BlockPattern,
    entry_rows,
    interval_tiles,
    pack_tiles,
    send_together,
)
from sparse_layouts.bsr_tensor import BSRTensor, block_size_pair
from sparse_layouts.dense_blocks import pattern_from_dense
from sparse_layouts.dense_rows import dense_source
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import is_scipy
from sparse_layouts.outside_graphs import outside_graphs

Device = torch.device | str | None


def checked_length(value: object, name: str, what: str, low: int = 0) -> int:
    """An int of at least `low`; raises `TypeError` or `ValueError` that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what}: {name} is an int, got {value!r}")
    if value < low:
        raise ValueError(f"{what}: {name} must be at least {low}, got {value}")
    return int(value)


def square_block(block_size: object, what: str) -> int:
    """The edge of a square block; raises for a pair of different edges."""
    bm, bn = block_size_pair(block_size, what)  # type: ignore[arg-type]
    if bm != bn:
        raise ValueError(f"{what}: expected square blocks, got {block_size!r}")
    return bm


@outside_graphs
def bsr_mask(
    blocks: Any,
    block_size: int | tuple[int, int],
    *,
    shape: tuple[int, int] | None = None,
    causal: bool = False,
    device: Device = None,
) -> BSRTensor:
    """A mask from a matrix of blocks: bool, or integer counts (how often a block counts in a
    softmax).

    blocks (*lead, Mb, Nb), a tensor or numpy array, e.g. (H, Mb, Nb) for a pattern per head; equal
    heads are stored once.
    `shape` (M, N) in entries, by default (Mb * bm, Nb * bn), may cut the last blocks. `causal`
    removes, by token, what lies right of the diagonal from the upper left.

    Raises `TypeError` for blocks that are neither bool nor integers and for what is not dense (a
    mask of entries, in whatever layout, goes through `sl.mask_from`), `ValueError` for negative
    counts or a shape of other blocks.

    >>> import torch, sparse_layouts as sl
    >>> sl.bsr_mask(torch.ones(3, 3, dtype=torch.bool), 16, causal=True)
    BSRTensor([48, 48], bool, cpu, block 16, 6 blocks, density 51.04%)
    """
    what = "bsr_mask"
    bm, bn = block_size_pair(block_size, what)
    blocks = dense_source(blocks, what)
    known = isinstance(blocks, Tensor) and not isinstance(blocks, LayoutTensor)
    if not known or blocks.layout != torch.strided:
        kind = f"a tensor of {blocks.layout}" if known else type(blocks).__name__
        raise TypeError(
            f"{what}: blocks is a dense tensor (*lead, Mb, Nb), got {kind}; sl.mask_from takes a "
            "mask of entries, x.to_dense() a sparse matrix of blocks"
        )
    if blocks.dtype.is_floating_point or blocks.dtype.is_complex:
        raise TypeError(
            f"{what}: blocks are bool or integer counts, got {blocks.dtype}; write blocks != 0 "
            f"for a bool mask"
        )
    if blocks.dim() < 2:
        raise ValueError(f"{what}: blocks is (*lead, Mb, Nb), got shape {tuple(blocks.shape)}")
    blocks = blocks.to(device) if device is not None else blocks
    if blocks.dtype != torch.bool and blocks.numel() and int(blocks.min()) < 0:
        raise ValueError(f"{what}: counts must not be negative, got {int(blocks.min())}")
    mb, nb = blocks.shape[-2:]
    m, n = (mb * bm, nb * bn) if shape is None else (int(shape[0]), int(shape[1]))
    if (-(-m // bm), -(-n // bn)) != (mb, nb):
        raise ValueError(
            f"{what}: {mb} x {nb} blocks of {bm} x {bn} cover a shape up to "
            f"{(mb * bm, nb * bn)}, not {(m, n)}; "
            f"that takes {-(-m // bm)} x {-(-n // bn)} blocks"
        )
    if causal:
        # the last block column of every block row that is not all right of the diagonal
        last_row = np.minimum(np.arange(mb) * bm + bm, m) - 1
        (last,) = send_together([last_row // bn], blocks.device)
        blocks = blocks * (torch.arange(nb, device=blocks.device) <= last[:, None])
    pattern = pattern_from_dense(blocks, (bm, bn), (m, n))
    return BSRTensor.on_pattern(None, _causal_by_token(pattern) if causal else pattern)


def _causal_by_token(pattern: BlockPattern) -> BlockPattern:
    """A pattern of full blocks, none all right of the diagonal, without what is right of it."""
    (mb, nb), (bm, bn), device = pattern.grid, pattern.block_size, pattern.device
    # Block (i, j) sees rows i * bm + r and columns j * bn + c: only i * bm - j * bn matters, and
    # from bn - 1 on the block is full.
    row = np.arange(mb)[:, None]
    column = (row * bm + 1) // bn + np.arange((bm - 2) // bn + 2)  # the partial blocks of a row
    offset = row * bm - column * bn
    seen = column * bn < np.minimum(row * bm + bm, pattern.shape[0])
    kinds = np.unique(offset[seen & (column < nb) & (offset < bn - 1)])
    if not kinds.size:
        return pattern
    stops = np.clip(kinds[:, None] + np.arange(bm) + 1, 0, bn)
    number = np.zeros(bm + bn - 1)
    number[kinds + bm - 1] = np.arange(1, kinds.size + 1)
    words = interval_tiles(np.zeros_like(stops), stops, bn)
    number, words = send_together([number, words], device)
    rows = entry_rows(pattern.crow_indices, pattern.num_blocks) % mb
    offsets = (rows * bm).sub_(pattern.col_indices, alpha=bn)
    ids = number.index_select(0, offsets.clamp_(max=bn - 1).add_(bm - 1))
    return pattern._replace(block_tiles=ids, tiles=words.clone())


@outside_graphs
def mask_from(
    dense_bool: Any, block_size: int | tuple[int, int], *, device: Device = None
) -> BSRTensor:
    """The exact block mask of a bool mask (*lead, M, N): full blocks, and bit tiles for the partial
    ones, each stored once.

    The mask is a dense tensor or numpy array, any mask layout (`sl.mask_from(w.pattern, 64)` is
    that of a layout's stored entries), a scipy matrix or a `torch.sparse` tensor of bool; only what
    is dense is read densely. A BSRTensor of these blocks is returned as it is, with its counts.

    Raises `TypeError` for what is no mask or not bool, `ValueError` for a mask whose counts other
    blocks could not keep, and for a vector.

    >>> import torch, sparse_layouts as sl
    >>> mask = sl.mask_from(torch.ones(40, 40, dtype=torch.bool).tril(), 16)
    >>> mask.nnz, torch.equal(mask.to_dense(), torch.ones(40, 40, dtype=torch.bool).tril())
    (820, True)
    """
    what = "mask_from"
    bm, bn = block_size_pair(block_size, what)
    dense_bool = dense_source(dense_bool, what)
    is_tensor = isinstance(dense_bool, Tensor)
    is_dense = is_tensor and dense_bool.layout == torch.strided
    if is_scipy(dense_bool) or (is_tensor and not is_dense) or isinstance(dense_bool, LayoutTensor):
        from sparse_layouts.conversions import mask_of

        made = mask_of(dense_bool, (bm, bn), what)
        return made if device is None else made.to(device)  # type: ignore[return-value]
    if not isinstance(dense_bool, Tensor) or dense_bool.dtype != torch.bool:
        kind = getattr(dense_bool, "dtype", type(dense_bool).__name__)
        raise TypeError(
            f"{what}: expected a bool tensor, got {kind}; write x != 0 for its non-zero entries"
        )
    if dense_bool.dim() < 2:
        raise ValueError(f"{what}: expected (*lead, M, N), got shape {tuple(dense_bool.shape)}")
    dense = dense_bool.to(device) if device is not None else dense_bool
    *lead, m, n = dense.shape
    mb, nb = -(-m // bm), -(-n // bn)
    pad = (0, nb * bn - n, 0, mb * bm - m)

    def blocked(value: bool) -> Tensor:  # [*lead, mb, bm, nb, bn]
        padded = torch.nn.functional.pad(dense, pad, value=value) if any(pad) else dense
        return padded.reshape(*lead, mb, bm, nb, bn)

    # as bytes: any() and all() of bools take 30 times longer on a CPU
    stored = blocked(False).view(torch.uint8).amax(-3).amax(-1).bool()
    # what lies over the edge is never read: True there lets an edge block be full
    true_edges = blocked(True)
    partial = stored & ~true_edges.view(torch.uint8).amin(-3).amin(-1).bool()
    ids = tiles = None
    index = partial.nonzero(as_tuple=True)
    if index[0].numel():
        bits = true_edges.transpose(-3, -2)[index]
        tiles, kind = torch.unique(pack_tiles(bits), dim=0, return_inverse=True)
        ids = torch.zeros_like(stored, dtype=torch.int32)
        ids[index] = kind.int() + 1
    return BSRTensor.on_pattern(None, pattern_from_dense(stored, (bm, bn), (m, n), ids, tiles))
