"""What dispatch knows of a layout: that it is one, and that it can be made dense."""

from __future__ import annotations

import torch
from torch import Tensor


class Layout:
    """Marks a tensor subclass that stores part of its entries.

    `to_dense()` is all that the fallback needs of it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def to_dense(self) -> Tensor:
        """The whole matrix as a plain tensor, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} defines no to_dense()")

    def one_line(self) -> str:
        """How messages name it; a layout's repr may take several lines."""
        return f"{type(self).__name__} of shape {tuple(self.shape)}"


def dense_bytes(layout: Layout) -> int:
    """Bytes of the layout's dense form."""
    return layout.shape.numel() * layout.dtype.itemsize
