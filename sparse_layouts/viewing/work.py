"""How much a call on a layout has to compute and to move, and the dense one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.dispatch.faces import canonical, name_of
from sparse_layouts.dispatch.fallback import layouts_in
from sparse_layouts.layout_tensor import LayoutTensor


class Work(NamedTuple):
    """Floating point operations of the stored part and of the dense call, and the least bytes that
    each moves: every operand read once, the result written once.
    """

    flop: float
    dense_flop: float
    bytes: int
    dense_bytes: int

    @property
    def share(self) -> float:
        """The stored part of the dense work."""
        return self.flop / self.dense_flop if self.dense_flop else 0.0

    @property
    def intensity(self) -> float:
        """FLOP for every byte moved."""
        return self.flop / max(1, self.bytes)


def attention_work(
    mask: LayoutTensor, batch: int, heads: int, head_dim: int, itemsize: int
) -> Work:
    """The forward pass of attention with this mask: two products of 2 * head_dim FLOP for every
    stored pair; q, k, v and the output have `heads` heads. Dense is the same without a mask.
    """
    m, n = mask.matrix_shape
    stored = batch * heads * mask.density * m * n
    moved = batch * heads * (2 * m + 2 * n) * head_dim * itemsize
    dense = 4.0 * head_dim * batch * heads * m * n
    return Work(4.0 * head_dim * stored, dense, moved + mask.nbytes, moved)


def product_work(layout: LayoutTensor, columns: int) -> Work:
    """A product of a layout (M, K) with `columns` dense columns: 2 FLOP for every stored entry and
    column.
    """
    m, k = layout.matrix_shape
    matrices = math.prod(layout.shape[:-2])
    size = layout.dtype.itemsize
    moved = (m + k) * columns * matrices * size
    return Work(
        2.0 * layout.nnz * columns,
        2.0 * matrices * m * k * columns,
        layout.nbytes + moved,
        matrices * m * k * size + moved,
    )


_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, F.linear)


def work_of(function: Any, *args: Any, **kwargs: Any) -> Work:
    """The work of a product (`torch.matmul`, `mm`, `bmm`, `F.linear`) with one layout, or of
    attention with a layout as its mask.

    Raises `TypeError` without a layout, `NotImplementedError` for other functions.

    >>> import torch, sparse_layouts as sl
    >>> from sparse_layouts.viewing.work import work_of
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> work_of(torch.matmul, w, torch.ones(64, 2)).flop
    4096.0
    """
    from sparse_layouts.kernels.block_attention.calls import attention

    layouts = layouts_in(args) + layouts_in(kwargs)
    if len(layouts) != 1:
        raise TypeError(f"work_of: expected one layout among the operands, got {len(layouts)}")
    (layout,) = layouts
    if function in (F.scaled_dot_product_attention, attention):
        q = args[0] if args else kwargs.get("query", kwargs.get("q"))
        assert isinstance(q, Tensor)
        batch, heads, _, head_dim = (1, 1, *q.shape)[-4:] if q.dim() < 4 else q.shape
        return attention_work(layout, batch, heads, head_dim, q.element_size())
    own = canonical(function)
    if own not in _PRODUCTS:
        raise NotImplementedError(
            f"work_of: counts products and attention, not {name_of(function)}"
        )
    dense = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t is not layout)
    m, k = layout.matrix_shape
    is_left = bool(args) and args[0] is layout
    contracted = k if is_left or own is F.linear else m
    columns = dense.numel() // max(1, contracted)
    if dense.dim() > 2:  # a matrix for each of the layout's, not one for all
        columns //= max(1, math.prod(layout.shape[:-2]))
    return product_work(layout, max(1, columns))
