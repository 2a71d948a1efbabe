"""A CSR matrix as torch's own sparse tensor, on the same memory, for torch's kernels."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


@functools.cache
def _say_beta_once() -> None:
    """Takes torch's warnings that sparse CSR support is in beta and (2.11) that invariants are not
    checked, which it gives once a process: whoever calls a layout's product made no such tensor.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        one = torch.ones(1)
        torch.sparse_csr_tensor(torch.arange(2), torch.zeros(1).long(), one, check_invariants=None)


def torch_csr(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    """The (M, K) matrix of values (S,) as `torch.sparse_csr`; shares memory, no host sync."""
    _say_beta_once()
    return torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=False)
