"""Products by fragments called again: what a call settled is kept with the layout, as
`block_matmul/recall.py` keeps it, for calls without gradients.

A product of few columns takes 10 to 20 us; the usual way to it costs several times that of CPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.dispatch.kernel_table import KERNELS, choose
from sparse_layouts.dispatch.routes import ROUTES, shortcut
from sparse_layouts.kernels.launching import PackedLaunch, can_pack
from sparse_layouts.kernels.nm_matmul import BY_FRAGMENTS, OP, facts
from sparse_layouts.kernels.recalling import known, may_recall, takes_own_route
from sparse_layouts.kernels.requirements import FRAGMENT_COLUMNS
from sparse_layouts.nm_fragments import FRAGMENTS
from sparse_layouts.nm_tensor import NMTensor


class Settled:
    """What calls on operands like the first ones share.

    `by_rows`: x and the result hold vectors as rows, as F.linear has them.
    """

    def __init__(self, layout: NMTensor, x: Tensor, by_rows: bool, fits: bool) -> None:
        values = layout.inner_values
        assert values is not None
        self.indices, self.device, self.by_rows = layout.inner_indices, x.device, by_rows
        self.tables = (ROUTES.changes, KERNELS.changes)
        self.packed: PackedLaunch | None = None
        if not fits:
            return
        rows, vectors = layout.rows, math.prod(x.shape[:-1]) if by_rows else x.shape[1]
        self.out_shape = (*x.shape[:-1], rows) if by_rows else (rows, vectors)
        matrix = (rows, layout.columns)
        own = facts(values, layout.n, layout.m, vectors, matrix, False, layout.order)
        if vectors > FRAGMENT_COLUMNS or choose(OP, own) is not BY_FRAGMENTS[0]:
            return
        module = importlib.import_module(BY_FRAGMENTS[0].source.partition(":")[0])
        out = x.new_empty(self.out_shape)
        operands = (values, self.indices[0], self.vectors(x), layout.n, layout.m)
        launch = module.launch(out.view(vectors, rows).mT if by_rows else out, *operands)
        self.packed, self.programs = launch.pack(("values_ptr", "out_ptr")), launch.programs

    def vectors(self, x: Tensor) -> Tensor:
        """x as the kernel takes it: (N, K), contiguous."""
        if self.by_rows:
            return x.view(-1, x.shape[-1])
        turned = x.mT.contiguous()
        return turned.view(-1).view(turned.shape)  # one row may have had any step

    def multiply(self, values: Tensor, x: Tensor) -> Tensor:
        """The product with these values."""
        packed = self.packed
        assert packed is not None
        out = x.new_empty(self.out_shape)
        if not self.by_rows:
            x = x.mT.contiguous()
        address = values.data_ptr()
        with packed.lock:
            packed.describe("values_desc", address)
            packed.describe("x_desc", x.data_ptr())
            packed.point("values_ptr", address)
            packed.point("out_ptr", out.data_ptr())
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            packed.launch(self.programs, stream)
        return out


def _recall(
    layout: NMTensor, x: Tensor, by_rows: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """The result of a call like earlier ones, or NotImplemented; the second such call settles what
    the others take.
    """
    values = layout.inner_values
    if layout.order != FRAGMENTS or not may_recall(values, x):
        return NotImplemented
    assert values is not None
    if torch.is_grad_enabled() and (x.requires_grad or layout.requires_grad):
        return NotImplemented
    if by_rows and not x.is_contiguous():
        return NotImplemented
    key = (by_rows, function, x.shape, x.dtype, values.dtype, values.stride(), x.device)

    def holds(settled: Settled) -> bool:
        tables = (ROUTES.changes, KERNELS.changes)
        return settled.indices is layout.inner_indices and settled.tables == tables

    def settle() -> Settled | None:
        if torch._C._cuda_getDevice() != x.device.index:
            return None
        fits = _fits(layout, values, x, by_rows) and takes_own_route(function, args)
        return Settled(layout, x, by_rows, fits)

    settled = known(layout, key, holds, settle)
    if settled is None:
        return NotImplemented
    if settled.packed is None or torch._C._cuda_getDevice() != settled.device.index:
        return NotImplemented
    return settled.multiply(values, x)


def _fits(layout: NMTensor, values: Tensor, x: Tensor, by_rows: bool) -> bool:
    """Whether this is one matrix and plain operands that can be multiplied."""
    if layout.lead or layout.axis != -1 or values.dim() != 2 or not values.is_contiguous():
        return False
    if x.dim() < 2 or (x.dim() != 2 and not by_rows) or 0 in (x.numel(), values.numel()):
        return False
    same = values.dtype == x.dtype and values.device == x.device
    return same and x.shape[-1 if by_rows else -2] == layout.columns and can_pack()


def _recall_matmul(function: Callable[..., Any]) -> Callable[..., Any]:
    def recall_nm_matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a matrix product with its arguments as they came."""
        if len(args) == 2 and not kwargs and isinstance(args[0], NMTensor):
            return _recall(args[0], args[1], False, function, args)
        return NotImplemented

    return recall_nm_matmul


def recall_nm_linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of `F.linear` without a bias, with its arguments as they came."""
    if len(args) == 3 and args[2] is None:
        args = args[:2]
    if len(args) != 2 or (kwargs and kwargs != {"bias": None}):
        return NotImplemented
    if isinstance(args[1], NMTensor):
        return _recall(args[1], args[0], True, F.linear, args)
    return NotImplemented


shortcut(F.linear)(recall_nm_linear)
for _function in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
    shortcut(_function)(_recall_matmul(_function))
