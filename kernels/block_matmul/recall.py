"""Products called again: what a call with a layout settled is kept with the layout.

A GPU of today multiplies faster than Python checks operands, chooses a kernel and launches it: 100
to 140 us of one server's CPU a product, 1200 and more with both gradients, where the kernels of a
4096 x 4096 layer over 8192 tokens, a fifth of its blocks stored, take 120 and 380 (2026-11-26). A
call like an earlier one, in plain eager mode and on a Hopper GPU, is therefore launched as that one
was, of which only the addresses change.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch.kernel_table import KERNELS, choose
from sparse_layouts.dispatch.routes import ROUTES, shortcut
from sparse_layouts.dispatch.settings import Settings, current, restored
from sparse_layouts.kernels import sddmm
from sparse_layouts.kernels.block_matmul import FAMILY, OP, facts
from sparse_layouts.kernels.launching import Launch, PackedLaunch, can_pack
from sparse_layouts.kernels.products import product, sampled_and_summed, transposed
from sparse_layouts.kernels.recalling import MOST, may_recall, takes_own_route
from sparse_layouts.layout_autograd import (
    apply,
    as_layout,
    check_version,
    version_of,
)
from sparse_layouts.opaque import is_eager


class Face(NamedTuple):
    """A way to call the product of a layout W and a dense x.

    `by_rows`: x and the result hold vectors as rows, `x @ W.mT` (or `x @ W`), not as columns.
    `flips`: whether W.mT is multiplied by.
    """

    by_rows: bool
    flips: bool


LAYOUT_TIMES_DENSE = Face(by_rows=False, flips=False)
DENSE_TIMES_LAYOUT = Face(by_rows=True, flips=True)
LINEAR = Face(by_rows=True, flips=False)


class Prepared:
    """A launch of which only addresses change: of `described` and `moving`, and the counter's."""

    def __init__(self, launch: Launch, moving: tuple[str, ...] = ()) -> None:
        self.packed: PackedLaunch = launch.pack((*moving, "counter_ptr"))
        self.programs = launch.programs
        self.names = tuple(launch.described)
        self.counter = importlib.import_module("sparse_layouts.kernels.hopper_common").work_counter

    def run(self, described: tuple[int, ...], device: torch.device, stream: int) -> None:
        """Launches with these addresses of what is described."""
        packed = self.packed
        with packed.lock:
            for name, address in zip(self.names, described, strict=True):
                packed.describe(name, address)
            packed.point("counter_ptr", self.counter(device, stream).data_ptr())
            packed.launch(self.programs, stream)


class Settled:
    """What calls on operands like the first ones share."""

    def __init__(self, layout: BSRTensor, x: Tensor, face: Face) -> None:
        values = layout.inner_values
        assert values is not None
        self.pattern: BlockPattern = layout.block_pattern
        self.tables = (ROUTES.changes, KERNELS.changes)
        self.face = face
        self.device = x.device
        self.values_stride = values.stride()
        own = self.pattern.shape[1 if face.flips else 0]
        self.out_shape = (*x.shape[:-1], own) if face.by_rows else (own, x.shape[1])
        out = x.new_empty(self.out_shape)
        self.forward = self._product(values, x, out, face.flips)
        self.to_x: Prepared | None = None
        self.to_layout: Prepared | None = None
        self.prepared = False  # the launches of the gradients

    def _product(self, values: Tensor, x: Tensor, out: Tensor, flips: bool) -> Prepared | None:
        """The launch of one product, None where another kernel is chosen for it."""
        pattern = self.pattern
        if flips:
            values, pattern = values.mT, transpose_pattern(pattern)
        x, out = self._columns(x), self._columns(out)
        row = choose(OP, facts(values, pattern, x[0, 0], self.face.by_rows))
        if row is None or not row.source.partition(":")[0].endswith(".hopper_block_matmul"):
            return None
        module = importlib.import_module(row.source.partition(":")[0])
        return Prepared(module.launch(values[None], pattern, x, out, None, None, self.stream()))

    def _columns(self, x: Tensor) -> Tensor:
        """x as (1, 1, K, N)."""
        if self.face.by_rows:
            x = x.reshape(-1, x.shape[-1]).mT
        return x[None, None]

    def stream(self) -> int:
        """The current CUDA stream."""
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def prepare_gradients(self, layout: BSRTensor, x: Tensor, dout: Tensor) -> None:
        """Settles the launches of the gradients, where Hopper's kernels take them."""
        self.prepared = True
        values = layout.inner_values
        assert values is not None
        self.to_x = self._product(values, dout, torch.empty_like(x), not self.face.flips)
        a, b = self._factors(x, dout)
        row = choose(sddmm.OP, sddmm.facts(a, b, self.pattern))
        if row is not None and row.source.partition(":")[0].endswith(".hopper_sddmm"):
            module = importlib.import_module(row.source.partition(":")[0])
            made = values.new_empty(1, *values.shape)
            self.to_layout = Prepared(
                module.launch(a[None, None], b[None, None], self.pattern, made, self.stream())
            )

    def _factors(self, x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """The two matrices whose product the gradient to W samples."""
        if not self.face.by_rows:
            return dout, x.mT
        x, dout = (t.reshape(-1, t.shape[-1]) for t in (x, dout))
        return (x.mT, dout) if self.face.flips else (dout.mT, x)

    def gradient_to_x(self, layout: BSRTensor, x_like: tuple[int, ...], dout: Tensor) -> Tensor:
        """`W.mT @ dout`, or what stands in its place."""
        values = layout.inner_values
        assert values is not None
        if self.to_x is not None and self.takes(dout) and values.stride() == self.values_stride:
            dx = dout.new_empty(x_like)
            addresses = (values.data_ptr(), dout.data_ptr(), dx.data_ptr())
            if not (addresses[0] | addresses[1]) % 16:
                self.to_x.run(addresses, self.device, self.stream())
                return dx
        flipped = layout if self.face.flips else transposed(layout)
        if self.face.by_rows:
            rows = dout.reshape(-1, dout.shape[-1])
            return product(FAMILY, flipped, rows.mT, True).mT.reshape(x_like)
        return product(FAMILY, flipped, dout)

    def gradient_to_layout(self, layout: BSRTensor, x: Tensor, dout: Tensor) -> BSRTensor:
        """`dout @ x.mT` at the layout's blocks, or what stands in its place."""
        values = layout.inner_values
        assert values is not None
        if self.to_layout is not None and self.takes(dout):
            a, b = (x, dout) if self.face.flips else (dout, x)
            addresses = (a.data_ptr(), b.data_ptr())
            if not (addresses[0] | addresses[1]) % 16:
                made = dout.new_empty(values.shape)
                self.to_layout.run((*addresses, made.data_ptr()), self.device, self.stream())
                return layout.like_self(made)
        a, b = self._factors(x, dout)
        return as_layout(sampled_and_summed(FAMILY, a, b, layout), layout)

    def takes(self, dout: Tensor) -> bool:
        """Whether a gradient is like the one that the launches were prepared for."""
        return (
            is_eager(dout)
            and dout.is_contiguous()
            and not torch.is_grad_enabled()  # else the gradient has to be differentiable
            and self.tables == (ROUTES.changes, KERNELS.changes)
            and torch._C._cuda_getDevice() == self.device.index
        )


class SettledProduct(torch.autograd.Function):
    """The product of a face; of the old form, whose `apply` costs 14 us less."""

    @staticmethod
    def forward(ctx: Any, layout: BSRTensor, x: Tensor, settled: Settled) -> Tensor:
        out = _multiply(layout, x, settled)
        # the gradient to a frozen layout is all that reads x
        ctx.save_for_backward(layout, x if ctx.needs_input_grad[0] else None)
        ctx.settled, ctx.shape, ctx.dtype = settled, x.shape, x.dtype
        ctx.settings, ctx.version = current(), version_of(layout)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        layout, x = ctx.saved_tensors
        settled: Settled = ctx.settled
        settings: Settings = ctx.settings
        if not settled.prepared and dout.is_contiguous():
            like = dout.new_empty(ctx.shape) if x is None else x
            settled.prepare_gradients(layout, like, dout)
        dlayout = dx = None
        with restored(settings):
            if ctx.needs_input_grad[0]:
                dlayout = settled.gradient_to_layout(layout, x, dout)
            if ctx.needs_input_grad[1]:
                check_version(layout, ctx.version)
                dx = settled.gradient_to_x(layout, ctx.shape, dout)
        return dlayout, dx, None


def _multiply(layout: BSRTensor, x: Tensor, settled: Settled) -> Tensor:
    values = layout.inner_values
    assert values is not None
    assert settled.forward is not None
    out = x.new_empty(settled.out_shape)
    addresses = (values.data_ptr(), x.data_ptr(), out.data_ptr())
    settled.forward.run(addresses, settled.device, settled.stream())
    return out


def _recall(
    layout: BSRTensor, x: Tensor, face: Face, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """The result of a call like an earlier one, which is settled where there was none, or
    NotImplemented.
    """
    values = layout.inner_values
    if not may_recall(values, x) or not x.is_contiguous():
        return NotImplemented
    assert values is not None
    key = (face, function, x.shape, x.dtype, values.dtype, values.stride(), x.device)
    known = layout._recalled
    settled = None if known is None else known.get(key)
    if (
        settled is None
        or settled.pattern is not layout._pattern
        or settled.tables != (ROUTES.changes, KERNELS.changes)
    ):
        settled = _settle(layout, x, face, function, args)
        if settled is None:
            return NotImplemented
        if known is None or len(known) >= MOST:
            known = layout._recalled = {}
        known[key] = settled
    if settled.forward is None or torch._C._cuda_getDevice() != settled.device.index:
        return NotImplemented
    if torch.is_grad_enabled() and (x.requires_grad or layout.requires_grad):
        return apply(SettledProduct, layout, x, settled)
    return _multiply(layout, x, settled)


def _settle(
    layout: BSRTensor, x: Tensor, face: Face, function: Callable[..., Any], args: tuple[Any, ...]
) -> Settled | None:
    """What calls like this one share, for one matrix of blocks and plain operands that fit."""
    values, contracted = layout.inner_values, x.shape[-1 if face.by_rows else -2]
    p = layout.block_pattern
    if values is None or values.dim() != 3 or p.lead or x.dim() < 2 or not can_pack():
        return None
    if x.dim() != 2 and not face.by_rows:
        return None
    if values.dtype != x.dtype or values.device != x.device or 0 in (x.numel(), p.num_blocks):
        return None
    if contracted != p.shape[0 if face.flips else 1]:
        return None
    if torch._C._cuda_getDevice() != x.device.index:
        return None
    if not takes_own_route(function, args):
        return None
    return Settled(layout, x, face)


def _recall_matmul(function: Callable[..., Any]) -> Callable[..., Any]:
    def recall_matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a matrix product with its arguments as they came."""
        if len(args) != 2 or kwargs:
            return NotImplemented
        a, b = args
        if type(a) is Tensor and isinstance(b, BSRTensor):
            return _recall(b, a, DENSE_TIMES_LAYOUT, function, args)
        if type(b) is Tensor and isinstance(a, BSRTensor):
            return _recall(a, b, LAYOUT_TIMES_DENSE, function, args)
        return NotImplemented

    return recall_matmul


def recall_linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of `F.linear` without a bias, with its arguments as they came."""
    if len(args) == 3 and args[2] is None:
        args = args[:2]
    if len(args) != 2 or (kwargs and kwargs != {"bias": None}):
        return NotImplemented
    x, weight = args
    if type(x) is Tensor and isinstance(weight, BSRTensor):
        return _recall(weight, x, LINEAR, F.linear, args)
    return NotImplemented


shortcut(F.linear)(recall_linear)
for _function in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
    shortcut(_function)(_recall_matmul(_function))
