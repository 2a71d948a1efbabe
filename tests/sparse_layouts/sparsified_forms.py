"""What the tests of `sl.sparsified` share: forms, and what they keep of a dense tensor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import sparse_layouts as sl

F64 = torch.float64
blocks = functools.partial(sl.bsr, block_size=(4, 8))


def largest(dense: Tensor, density: float) -> Tensor:
    """Zero but for the largest entries."""
    return torch.where(sl.Magnitude(density).keep(dense), dense, 0)


def largest_blocks(dense: Tensor, density: float) -> Tensor:
    return blocks(dense.detach(), keep=sl.Magnitude(density)).to_dense()


def pattern_of(dense: Tensor) -> sl.BSRTensor:
    return blocks(dense.detach(), keep=sl.Magnitude(0.25)).pattern
