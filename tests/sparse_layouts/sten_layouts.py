"""Layouts that hold half of a dense matrix, for the tests of STen's behaviours."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import sparse_layouts as sl
from tests.sparse_layouts.user_csc import CscTensor

F64 = torch.float64
blocks = functools.partial(sl.bsr, block_size=(4, 8))


def some(dense: Tensor, density: float = 0.5) -> Tensor:
    """Zero but for the largest entries."""
    return torch.where(sl.Magnitude(density).keep(dense), dense, 0)


LAYOUTS: dict[str, Callable[[Tensor], sl.LayoutTensor]] = {
    "blocks": lambda dense: blocks(dense, keep=sl.Magnitude(0.5)),
    "csr": lambda dense: sl.csr(dense, keep=sl.Magnitude(0.5)),
    "n:m": lambda dense: sl.nm(dense, 2, 4),
    "user's": lambda dense: CscTensor.from_dense(some(dense)),
}


def stored(w: sl.LayoutTensor) -> Tensor:
    """bool: where an entry is stored."""
    return torch.ones(w.shape, dtype=w.dtype).sparse_mask(w.detach()).to_dense() != 0


def as_dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if isinstance(tensor, sl.LayoutTensor) else tensor
