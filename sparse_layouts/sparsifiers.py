"""Sparsifiers: they decide which entries, or blocks, of a dense tensor to keep."""

from __future__ import annotations

import torch
from torch import Tensor


class Magnitude:
    """Keeps the largest part, `density` of all: of entries by absolute value, of blocks by
    Frobenius norm.

    `round(density * number)` are kept, over all leading dimensions together; among equals the first
    ones. Sees all at once.

    Raises `ValueError` for a density outside [0, 1].

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.randn(64, 64), block_size=16, keep=sl.Magnitude(density=0.25))
    >>> w.density
    0.25
    """

    def __init__(self, density: float) -> None:
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"Magnitude: density is between 0 and 1, got {density}")
        self.density = float(density)

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes` (non-negative): which to keep. No host sync."""
        flat = magnitudes.flatten()
        count = round(self.density * flat.numel())
        order = torch.argsort(flat, descending=True, stable=True)
        kept = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
        kept[order[:count]] = True
        return kept.view(magnitudes.shape)

    def __repr__(self) -> str:
        return f"Magnitude(density={self.density})"
