"""Where a layout, a torch.sparse matrix or a bool tensor stores something: by rows, by blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import expand_heads
from sparse_layouts.block_values import cells
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dense_rows import flat_shape, nonzero_blocks
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.stored_entries import short

Rows = Callable[[int, int], Tensor]


class Positions:
    """The stored positions of `like`, for tensors of its shape, or of that shape repeated over
    leading dimensions.
    """

    def __init__(self, like: Any, what: str) -> None:
        known = isinstance(like, Tensor) and (
            isinstance(like, LayoutTensor)
            or like.layout != torch.strided
            or like.dtype == torch.bool
        )
        if not known:
            hint = "; x != 0 is a bool tensor" if isinstance(like, Tensor) else ""
            raise TypeError(
                f"{what}: expected a layout, a torch.sparse matrix or a bool tensor, got "
                f"{short(like)}{hint}"
            )
        if like.dim() < 1:
            raise ValueError(f"{what}: expected a matrix, got a tensor without dimensions")
        if like.layout != torch.strided and like.dim() != 2:
            raise ValueError(
                f"{what}: expected a matrix of torch.sparse, got shape {tuple(like.shape)}"
            )
        self.like: Tensor = like.detach()
        self.what = what

    def rows(self, shape: tuple[int, ...], device: torch.device) -> Rows:
        """What gives bool (number, N) for flat rows of a tensor of `shape`, from a first one on."""
        self._check_shape(shape)
        height, width = flat_shape(tuple(self.like.shape))
        if self._is_dense():
            dense = self.like.reshape(height, width)

            def dense_rows(first: int, number: int) -> Tensor:
                at = first % max(1, height)
                if at + number <= height:
                    return dense[at : at + number].to(device)
                which = torch.arange(first, first + number, device=dense.device) % height
                return dense[which].to(device)

            return dense_rows
        crow, col = self._row_lists()

        def listed_rows(first: int, number: int) -> Tensor:
            kept = torch.zeros(number, width, dtype=torch.bool)
            done = 0
            while done < number:  # `like` may repeat
                at = (first + done) % height
                some = min(number - done, height - at)
                begin, end = int(crow[at]), int(crow[at + some])
                lengths = np.diff(crow[at : at + some + 1])
                row = torch.from_numpy(np.repeat(np.arange(done, done + some), lengths))
                kept[row, torch.from_numpy(col[begin:end])] = True
                done += some
            return kept.to(device)

        return listed_rows

    def blocks(
        self, shape: tuple[int, ...], block: tuple[int, int], device: torch.device
    ) -> Tensor:
        """bool (*lead, M / bm, N / bn): the blocks of a tensor of `shape` with a stored entry."""
        (bm, bn), (m, n) = block, shape[-2:]
        grid = (*shape[:-2], m // bm, n // bn)
        like = self.like
        if self._is_dense() and tuple(like.shape) == grid:
            return like.to(device)
        self._check_shape(shape)
        own_grid = (*like.shape[:-2], m // bm, n // bn)
        if self._is_dense():
            found = nonzero_blocks(like, block)
        elif isinstance(like, BSRTensor) and like.block_size == block:
            p = expand_heads(like.block_pattern)
            found = torch.zeros(
                p.num_patterns * p.grid[0] * p.grid[1], dtype=torch.bool, device=p.device
            )
            found[cells(p)] = True
            found = found.view(*p.lead, *p.grid).expand(own_grid)
        else:
            crow, col = self._row_lists()
            row = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
            made = np.zeros((len(crow) - 1) // bm * (n // bn), dtype=bool)
            made[row // bm * (n // bn) + col // bn] = True
            found = torch.from_numpy(made).view(own_grid)
        return found.expand(grid).to(device)

    def _is_dense(self) -> bool:
        return self.like.layout == torch.strided and not isinstance(self.like, LayoutTensor)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        own = tuple(self.like.shape)
        if len(shape) < len(own) or tuple(shape[len(shape) - len(own) :]) != own:
            raise ValueError(
                f"{self.what}: expected a tensor of the pattern's shape {own}, or of such matrices "
                f"over leading dimensions, got shape {tuple(shape)}"
            )

    def _row_lists(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 offsets (R + 1,) and columns of the stored entries, by flat row."""
        like = self.like
        if not isinstance(like, LayoutTensor):
            return _offsets_and_columns([_scipy_pattern(like)])
        ones = like
        if like.stored_values is not None:
            ones = like.like_self(torch.ones_like(like.stored_values, dtype=torch.float32))
            ones.clear_unstored()
        if like.dim() == 2 or isinstance(like, BSRTensor):
            return _offsets_and_columns(_flat(ones.to_scipy()))
        stored = (ones.to_dense_entries() != 0).flatten(0, -2).cpu()
        lengths = stored.sum(1).numpy()
        crow_of = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
        return crow_of, stored.nonzero()[:, 1].numpy()


def _offsets_and_columns(matrices: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """int64 row offsets and columns of the non-zeros of scipy matrices, one below the other."""
    crow, col, end = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for matrix in matrices:
        rows = matrix.tocsr()
        if not rows.data.all():  # room inside a block that is not stored
            rows.eliminate_zeros()
        crow.append(rows.indptr[1:].astype(np.int64) + end)
        col.append(rows.indices.astype(np.int64))
        end += len(rows.indices)
    return np.concatenate(crow), np.concatenate(col)


def _scipy_pattern(like: Tensor) -> Any:
    """Ones at the stored entries of a torch.sparse matrix, as a scipy matrix."""
    import scipy.sparse

    shape = (like.shape[0], like.shape[1])
    if like.layout == torch.sparse_coo:
        at = like.coalesce().indices().cpu().numpy()
        return scipy.sparse.coo_array((np.ones(at.shape[1], dtype=bool), tuple(at)), shape=shape)
    by_rows = like.layout in (torch.sparse_csr, torch.sparse_bsr)
    if by_rows:
        offsets, indices = like.crow_indices(), like.col_indices()
    else:
        offsets, indices = like.ccol_indices(), like.row_indices()
    ones = np.ones(like.values().shape, dtype=bool)
    lists = (indices.cpu().numpy(), offsets.cpu().numpy())
    if like.layout in (torch.sparse_csr, torch.sparse_csc):
        kind = scipy.sparse.csr_array if by_rows else scipy.sparse.csc_array
        return kind((ones, *lists), shape=shape)
    if by_rows:
        return scipy.sparse.bsr_array((ones, *lists), shape=shape)
    turned = scipy.sparse.bsr_array((ones.swapaxes(-1, -2), *lists), shape=shape[::-1])
    return turned.T


def _flat(nested: Any) -> list[Any]:
    """The matrices of nested lists, in order."""
    if not isinstance(nested, list):
        return [nested]
    return [matrix for each in nested for matrix in _flat(each)]
