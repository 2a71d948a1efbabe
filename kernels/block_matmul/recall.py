"""Products called again: what a call with a layout settled is kept with the layout.

A GPU of today multiplies faster than Python checks operands, chooses a kernel and launches it: 100
to 140 us of one server's CPU a product, 1200 and more with both gradients, where the kernels of a
4096 x 4096 layer over 8192 tokens, a fifth of its blocks stored, take 120 and 380 (2026-11-26). A
call like an earlier one, in plain eager mode and on a Hopper GPU, is therefore launched as that one
was, of which only the addresses change.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch.kernel_table import KERNELS, Kernel, choose
from sparse_layouts.dispatch.routes import ROUTES, shortcut
from sparse_layouts.dispatch.settings import Settings, current, restored
from sparse_layouts.kernels import sddmm
from sparse_layouts.kernels.block_matmul import FAMILY, OP, facts
from sparse_layouts.kernels.launching import can_pack
from sparse_layouts.kernels.products import product, sampled_and_summed, transposed
from sparse_layouts.kernels.recalling import (
    is_capturing,
    is_undisturbed,
    known,
    may_recall,
    takes_own_route,
)
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


def _module(row: Kernel | None, op: str) -> Any:
    """The file of this library's own kernel `row` of an op, None for any other."""
    own = row is not None and isinstance(row.implementation, str)
    name = row.source.partition(":")[0] if row is not None and own else ""
    if not name.startswith(f"sparse_layouts.kernels.{op}.") or not can_pack():
        return None
    return importlib.import_module(name)


class Settled:
    """What calls on operands like the first ones share."""

    def __init__(
        self, layout: BSRTensor, x: Tensor, face: Face, bias: Tensor | None = None
    ) -> None:
        values = layout.inner_values
        assert values is not None
        self.pattern: BlockPattern = layout.block_pattern
        self.tables = (ROUTES.changes, KERNELS.changes)
        self.face = face
        self.device, self.dtype = x.device, x.dtype
        self.x_shape = tuple(x.shape)
        self.values_stride = values.stride()
        own = self.pattern.shape[1 if face.flips else 0]
        self.out_shape = (*x.shape[:-1], own) if face.by_rows else (own, x.shape[1])
        out = x.new_empty(self.out_shape)
        self.forward = self._product(values, x, out, face.flips, bias)
        self.to_x: Any = None
        self.to_layout: Any = None
        self.prepared = False  # the launches of the gradients

    def _product(
        self, values: Tensor, x: Tensor, out: Tensor, flips: bool, bias: Tensor | None
    ) -> Any:
        """What launches one product again, None where its kernel has no such thing."""
        pattern = self.pattern
        if flips:
            values, pattern = values.mT, transpose_pattern(pattern)
        x, out = self._columns(x), self._columns(out)
        module = _module(choose(OP, facts(values, pattern, x[0, 0], self.face.by_rows)), OP)
        prepared = getattr(module, "prepared", None)
        return None if prepared is None else prepared(values[None], pattern, x, out, bias)

    def _columns(self, x: Tensor) -> Tensor:
        """x as (1, 1, K, N)."""
        if self.face.by_rows:
            x = x.reshape(-1, x.shape[-1]).mT
        return x[None, None]

    def stream(self) -> int:
        """The current CUDA stream."""
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def prepare_gradients(self, layout: BSRTensor, x: Tensor | None, dout: Tensor) -> None:
        """Settles the launches of the gradients, where kernels that can be settled take them."""
        values = layout.inner_values
        assert values is not None
        like = dout.new_empty(self.x_shape)
        self.prepared = True
        self.to_x = self._product(values, dout, like, not self.face.flips, None)
        self.to_layout = _sample_again(*self._factors(like if x is None else x, dout), self.pattern)

    def _factors(self, x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """The two matrices whose product the gradient to W samples."""
        if not self.face.by_rows:
            return dout, x.mT
        x, dout = (t.reshape(-1, t.shape[-1]) for t in (x, dout))
        return (x.mT, dout) if self.face.flips else (dout.mT, x)

    def gradient_to_x(self, layout: BSRTensor, dout: Tensor) -> Tensor:
        """`W.mT @ dout`, or what stands in its place."""
        values = layout.inner_values
        assert values is not None
        if self.to_x is not None and self.takes(layout, dout):
            dx = dout.new_empty(self.x_shape)
            addresses = (values.data_ptr(), dout.data_ptr(), dx.data_ptr())
            self.to_x(*addresses, None, self.stream())
            return dx
        flipped = layout if self.face.flips else transposed(layout)
        if self.face.by_rows:
            rows = dout.reshape(-1, dout.shape[-1])
            return product(FAMILY, flipped, rows.mT, True).mT.reshape(self.x_shape)
        return product(FAMILY, flipped, dout)

    def gradient_to_layout(self, layout: BSRTensor, x: Tensor, dout: Tensor) -> BSRTensor:
        """`dout @ x.mT` at the layout's blocks, or what stands in its place."""
        values = layout.inner_values
        assert values is not None
        if self.to_layout is not None and self.takes(layout, dout) and self.has(x):
            a, b = (x, dout) if self.face.flips else (dout, x)
            made = dout.new_empty(values.shape)
            self.to_layout(a.data_ptr(), b.data_ptr(), made.data_ptr(), self.stream())
            return layout.like_self(made)
        a, b = self._factors(x, dout)
        return as_layout(sampled_and_summed(FAMILY, a, b, layout), layout)

    def takes(self, layout: BSRTensor, dout: Tensor) -> bool:
        """Whether a layout that was saved and a gradient are like those that launches are prepared
        for; hooks and `.data` may have put others in their place.
        """
        values = layout.inner_values
        return (
            type(dout) is type(values) is Tensor
            and is_eager(dout)
            and layout._pattern is self.pattern
            and values.stride() == self.values_stride
            and dout.shape == self.out_shape
            and dout.is_contiguous()
            and dout.dtype == values.dtype == self.dtype
            and dout.device == values.device == self.device
            and not (dout.data_ptr() | values.data_ptr()) % 16
            and not torch.is_grad_enabled()  # else the gradient has to be differentiable
            and self.tables == (ROUTES.changes, KERNELS.changes)
            and torch._C._cuda_getDevice() == self.device.index
        )

    def has(self, x: Tensor) -> bool:
        """Whether an x that was saved is like the one of the forward pass, its rows in one."""
        rows = math.prod(self.x_shape[:-1])
        return (
            is_eager(x)
            and x.shape == (rows, self.x_shape[-1])
            and x.is_contiguous()
            and x.dtype == self.dtype
            and x.device == self.device
            and not x.data_ptr() % 16
        )


def _sample_again(a: Tensor, b: Tensor, pattern: BlockPattern) -> Any:
    """What launches the sampled product `a @ b` again, None where its kernel has no such thing."""
    module = _module(choose(sddmm.OP, sddmm.facts(a, b, pattern)), sddmm.OP)
    prepared = getattr(module, "prepared", None)
    if prepared is None:
        return None
    values = a.new_empty(1, pattern.num_blocks, *pattern.block_size)
    return prepared(a[None, None], b[None, None], pattern, values)


class SettledProduct(torch.autograd.Function):
    """The product of a face; of the old form, whose `apply` costs 14 us less."""

    @staticmethod
    def forward(
        ctx: Any, layout: BSRTensor, x: Tensor, bias: Tensor | None, settled: Settled
    ) -> Tensor:
        out = _multiply(layout, x, bias, settled)
        saved = None
        if ctx.needs_input_grad[0]:  # the gradient to a frozen layout is all that reads x
            # as the usual way saves it: activation checkpointing may recompute one by the other
            saved = x.flatten(0, -2).mT if settled.face.by_rows else x
        ctx.save_for_backward(layout, saved)
        ctx.settled, ctx.settings, ctx.version = settled, current(), version_of(layout)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        layout, x = ctx.saved_tensors
        settled: Settled = ctx.settled
        settings: Settings = ctx.settings
        if x is not None and settled.face.by_rows:
            x = x.mT
        dlayout = dx = dbias = None
        with restored(settings):
            if not settled.prepared and settled.takes(layout, dout) and not is_capturing():
                settled.prepare_gradients(layout, x if x is None or settled.has(x) else None, dout)
            if ctx.needs_input_grad[0]:
                dlayout = settled.gradient_to_layout(layout, x, dout)
            if ctx.needs_input_grad[1]:
                check_version(layout, ctx.version)
                dx = settled.gradient_to_x(layout, dout)
            if ctx.needs_input_grad[2]:
                dbias = dout.flatten(0, -2).sum(0)
        return dlayout, dx, dbias, None


def _multiply(layout: BSRTensor, x: Tensor, bias: Tensor | None, settled: Settled) -> Tensor:
    values = layout.inner_values
    assert values is not None
    out = x.new_empty(settled.out_shape)
    addresses = (values.data_ptr(), x.data_ptr(), out.data_ptr())
    settled.forward(*addresses, bias, settled.stream())
    return out


def _known(layout: BSRTensor, key: Any, settle: Callable[[], Any]) -> Any:
    """What earlier calls settled for the layout's blocks, as :func:`known` has it."""

    def holds(settled: Settled | SettledSample) -> bool:
        tables = (ROUTES.changes, KERNELS.changes)
        return settled.pattern is layout._pattern and settled.tables == tables

    return known(layout, key, holds, settle)


def _recall(
    layout: BSRTensor,
    x: Tensor,
    face: Face,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    bias: Tensor | None = None,
) -> Any:
    """The result of a call like an earlier one, which is settled where there was none, or
    NotImplemented.
    """
    values = layout.inner_values
    if not may_recall(values, x) or not x.is_contiguous():
        return NotImplemented
    assert values is not None
    if bias is not None and bias.data_ptr() % 16:
        return NotImplemented
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.device, bias.stride())
    key = (face, function, x.shape, x.dtype, values.dtype, values.stride(), x.device, of_bias)
    settled = _known(layout, key, lambda: _settle(layout, x, face, function, args, bias))
    if settled is None:
        return NotImplemented
    if settled.forward is None or torch._C._cuda_getDevice() != settled.device.index:
        return NotImplemented
    if torch.is_grad_enabled() and (
        x.requires_grad or layout.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return apply(SettledProduct, layout, x, bias, settled)
    return _multiply(layout, x, bias, settled)


def _settle(
    layout: BSRTensor,
    x: Tensor,
    face: Face,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    bias: Tensor | None,
) -> Settled | None:
    """What calls like this one share, for one matrix of blocks and plain operands that fit."""
    values, contracted = layout.inner_values, x.shape[-1 if face.by_rows else -2]
    p = layout.block_pattern
    if values is None or values.dim() != 3 or p.lead or x.dim() < 2:
        return None
    if x.dim() != 2 and not face.by_rows:
        return None
    if values.dtype != x.dtype or values.device != x.device or 0 in (x.numel(), p.num_blocks):
        return None
    if contracted != p.shape[0 if face.flips else 1]:
        return None
    if bias is not None:
        fits = bias.shape == p.shape[:1] and bias.dtype == x.dtype and bias.device == x.device
        if not fits or not bias.is_contiguous() or bias.data_ptr() % 16:
            return None
    if torch._C._cuda_getDevice() != x.device.index or not takes_own_route(function, args):
        return None
    return Settled(layout, x, face, bias)


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
    """A call of `F.linear`, with its arguments as they came."""
    if kwargs:
        if len(args) != 2 or kwargs.keys() != {"bias"}:
            return NotImplemented
        args = (*args, kwargs["bias"])
    if not 2 <= len(args) <= 3:
        return NotImplemented
    x, weight, *rest = args
    bias = rest[0] if rest else None
    if type(x) is not Tensor or not isinstance(weight, BSRTensor):
        return NotImplemented
    if bias is not None and type(bias) not in (Tensor, torch.nn.Parameter):
        return NotImplemented
    return _recall(weight, x, LINEAR, F.linear, args, bias)


class SettledSample:
    """What sampled products on operands like the first ones share."""

    def __init__(self, a: Tensor, b: Tensor, mask: BSRTensor) -> None:
        self.pattern: BlockPattern = mask.block_pattern
        self.tables = (ROUTES.changes, KERNELS.changes)
        self.launch = _sample_again(a, b, self.pattern)
        self.index = a.device.index


def _settle_sample(a: Tensor, b: Tensor, mask: BSRTensor) -> SettledSample | None:
    """What sampled products like this one share, of matrices that fit."""
    p = mask.block_pattern
    sizes = (a.dim(), b.dim(), *a.shape, *b.shape)
    if sizes != (2, 2, p.shape[0], a.shape[-1], a.shape[-1], p.shape[1]):
        return None
    if p.lead or p.head_map is not None or 0 in (*sizes, p.num_blocks):
        return None
    if a.dtype != b.dtype or not (a.device == b.device == p.device):
        return None
    if torch._C._cuda_getDevice() != a.device.index:
        return None
    if not takes_own_route(torch.sparse.sampled_addmm, (mask, a, b)):
        return None
    return SettledSample(a, b, mask)


def recall_sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of `sl.sddmm`, without gradients, as it comes to torch's function."""
    if len(args) != 3 or kwargs.keys() != {"beta"} or kwargs["beta"] != 0:
        return NotImplemented
    mask, a, b = args
    if not (type(a) is type(b) is Tensor and a.is_cuda and is_eager(a) and is_undisturbed(a.dtype)):
        return NotImplemented
    if not isinstance(mask, BSRTensor) or (a.data_ptr() | b.data_ptr()) % 16:
        return NotImplemented
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return NotImplemented
    if a.dtype.itemsize != 2:
        return NotImplemented
    key = ("sddmm", a.shape, b.shape, a.stride(), b.stride(), a.dtype, b.dtype, a.device, b.device)
    settled = _known(mask, key, lambda: _settle_sample(a, b, mask))
    if settled is None:
        return NotImplemented
    if settled.launch is None or torch._C._cuda_getDevice() != settled.index:
        return NotImplemented
    values = a.new_empty(mask.block_pattern.num_blocks, *mask.block_size)
    stream = torch._C._cuda_getCurrentRawStream(settled.index)
    settled.launch(a.data_ptr(), b.data_ptr(), values.data_ptr(), stream)
    return mask.like_self(values)


shortcut(F.linear)(recall_linear)
shortcut(torch.sparse.sampled_addmm)(recall_sample)
for _function in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
    shortcut(_function)(_recall_matmul(_function))
