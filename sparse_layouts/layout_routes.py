"""Routes that need no kernel:

views, arithmetic that keeps the layout, sums; for every layout or for block layouts.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import dense_bytes, facts_of, permit, record, route
from sparse_layouts.layout_autograd import apply, as_layout, sampled, values_of, with_values
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.mask_algebra import select


class Transpose(torch.autograd.Function):
    """The transposed block layout; its values are a view of the argument's."""

    @staticmethod
    def forward(layout: BSRTensor) -> BSRTensor:
        return layout.transposed()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        layout, output = ctx.saved_tensors
        flipped = transpose_blocks(as_layout(grad, output), -2, -1)
        if type(flipped) is type(layout):
            return flipped
        return with_values(layout, values_of(flipped))  # the slots are the same


@route(torch.transpose, input=BSRTensor)
def transpose_blocks(input: BSRTensor, dim0: int, dim1: int) -> Any:
    """`w.mT`:

    row and column lists change places and the values are shared; the last two dimensions only.
    """
    with torch._C.DisableTorchFunctionSubclass():
        dims = input.dim()
        differentiable = torch.is_grad_enabled() and input.requires_grad
    if {dim0 % dims, dim1 % dims} != {dims - 1, dims - 2}:
        return NotImplemented
    if not differentiable:
        return input.transposed()
    out = apply(Transpose, input)
    if not torch.compiler.is_compiling():
        out._shares_values = True
        if not input.is_leaf:
            input._shares_values = True  # type: ignore[attr-defined]
    return out


@route(torch.Tensor.__getitem__, input=BSRTensor)
def select_blocks(input: BSRTensor, index: Any) -> Any:
    """`w[h]`, `w[:, 64:128]`:

    heads, samples, and rows and columns cut at block edges; any other index is dense. The result is
    a copy: writing to it (`w[0:64].zero_()`) does not change w, write to `w.values()` instead.
    """
    found = select(input, index)
    return NotImplemented if found is None else found


@route(torch.mul, input=LayoutTensor)
def scale_or_sample(input: LayoutTensor, other: Any) -> Any:
    """`w * 2` scales the stored entries;

    `w * dense` takes the dense entries that w stores, times w.
    """
    return _times(input, other)


@route(torch.mul, other=LayoutTensor)
def scale_or_sample_right(input: Any, other: LayoutTensor) -> Any:
    """`2 * w` and `dense * w`, as above."""
    return _times(other, input)


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or (
        value.dim() == 0 and not isinstance(value, LayoutTensor)
    )


def _times(layout: LayoutTensor, other: Any) -> Any:
    mask = layout.stored_values is None
    if _is_scalar(other):
        # infinity or NaN times an entry that is not stored would not be 0
        if mask or (not isinstance(other, Tensor) and not math.isfinite(other)):
            return NotImplemented
        return with_values(layout, values_of(layout) * other)
    if isinstance(layout, BSRTensor) and mask:
        tail = layout.lead_dims + 2
        if tuple(other.shape[-tail:]) == tuple(layout.shape[-tail:]):
            return sampled(other, layout)
        return NotImplemented
    if mask or other.dim() > layout.dim():
        return NotImplemented
    if torch.broadcast_shapes(other.shape, layout.shape) != layout.shape:
        return NotImplemented
    picked = sampled(other.expand(layout.shape), layout)
    return with_values(layout, values_of(layout) * values_of(picked))


@route(torch.mul, input=LayoutTensor, other=LayoutTensor)
def multiply_entries(input: LayoutTensor, other: LayoutTensor) -> Any:
    """`w * v` of one pattern, entry by entry."""
    if input.stored_values is None or not input.same_pattern(other):
        return NotImplemented
    return with_values(input, values_of(input) * values_of(other))


@route(torch.div, input=LayoutTensor)
def divide_by_scalar(input: LayoutTensor, other: Any, *, rounding_mode: str | None = None) -> Any:
    """`w / 2`:

    the stored entries; by zero, infinity or a dense tensor it is dense (0 / 0 is not 0).
    """
    if input.stored_values is None or not _is_scalar(other):
        return NotImplemented
    if not isinstance(other, Tensor) and (other == 0 or math.isnan(other)):
        return NotImplemented
    return with_values(input, torch.div(values_of(input), other, rounding_mode=rounding_mode))


@route(torch.add, input=LayoutTensor, other=LayoutTensor)
def add_entries(input: LayoutTensor, other: LayoutTensor, *, alpha: float = 1) -> Any:
    """`w + v` of one pattern; of two patterns it is dense."""
    if input.stored_values is None or not input.same_pattern(other):
        return NotImplemented
    return with_values(input, torch.add(values_of(input), values_of(other), alpha=alpha))


@route(torch.sub, input=LayoutTensor, other=LayoutTensor)
def subtract_entries(input: LayoutTensor, other: LayoutTensor, *, alpha: float = 1) -> Any:
    """`w - v` of one pattern; of two patterns it is dense."""
    if input.stored_values is None or not input.same_pattern(other):
        return NotImplemented
    return with_values(input, torch.sub(values_of(input), values_of(other), alpha=alpha))


@route(F.dropout, input=LayoutTensor)
def drop_entries(
    input: LayoutTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Dropout of the stored entries (zeros dropped are zeros)."""
    if input.stored_values is None or inplace:
        return NotImplemented
    return with_values(input, F.dropout(values_of(input), p, training))


@route(torch.sum, input=LayoutTensor)
def sum_entries(
    input: LayoutTensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The sum of all entries;

    along the last or last but one dimension a product with ones; other sums are dense.
    """
    if input.stored_values is None:
        return NotImplemented
    if dim is None or dim == ():
        total = values_of(input).sum(dtype=dtype)
        return total.reshape((1,) * input.dim()) if keepdim else total
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not isinstance(input, BSRTensor) or len(dims) != 1:
        return NotImplemented
    if dtype is not None:
        input = cast(BSRTensor, input.to(dtype))  # before adding up, as torch does
    axis = dims[0] % input.dim()
    if axis == input.dim() - 1:
        ones = input.inner_values.new_ones(input.shape[-1], 1)  # type: ignore[union-attr]
        out = torch.matmul(input, ones)
        out = out if keepdim else out.squeeze(-1)
    elif axis == input.dim() - 2:
        ones = input.inner_values.new_ones(1, input.shape[-2])  # type: ignore[union-attr]
        out = torch.matmul(ones, input)
        out = out if keepdim else out.squeeze(-2)
    else:
        return NotImplemented
    return out


@route(torch.norm, input=LayoutTensor)
@route(torch.Tensor.norm, input=LayoutTensor)
@route(torch.linalg.norm, input=LayoutTensor)
@route(torch.linalg.vector_norm, input=LayoutTensor)
def norm_of_entries(
    input: LayoutTensor, p: Any = None, dim: Any = None, keepdim: bool = False, **rest: Any
) -> Any:
    """A norm over all entries (Frobenius, or of an order above 0): zeros add nothing to it."""
    order = rest.pop("ord", p)
    order = 2 if order in (None, "fro") else order
    if (
        input.stored_values is None
        or dim is not None
        or keepdim
        or isinstance(order, str)
        or order <= 0
    ):
        return NotImplemented
    dtype = rest.pop("dtype", None)
    if any(value is not None for value in rest.values()):
        return NotImplemented
    values = values_of(input)
    if not values.numel() and input.numel():
        order = 2  # all zeros: torch has no maximum of nothing
    return torch.linalg.vector_norm(values, order, dtype=dtype)


def _softmax_densely(
    layout: LayoutTensor, dim: int, dtype: torch.dtype | None, log: bool
) -> LayoutTensor:
    """softmax over the stored entries of any layout, by densifying:

    what is not stored is -inf, and stays out of the result.
    """
    name = "log_softmax" if log else "softmax"
    values = layout.stored_values
    if values is None:
        raise TypeError(f"{name}: a mask layout has no values")
    cost = 3 * dense_bytes(layout)  # the scores, which of them are stored, the result
    kind = type(layout).__name__
    what = f"{name} of a {kind} has no kernel; computing it densely, over the stored entries."
    permit(what, cost, layout.device.type, name)
    record(name, "dense fallback", facts_of(values), cost)
    stored = layout.like_self(torch.ones_like(values)).to_dense_entries() != 0
    scores = layout.to_dense().masked_fill(~stored, -torch.inf)
    empty = ~stored.any(dim, keepdim=True)
    out = (torch.log_softmax if log else torch.softmax)(
        scores.masked_fill(empty, 0.0), dim, dtype=dtype
    )
    return sampled(out, layout)


@route(torch.softmax, input=LayoutTensor)
def softmax_of_entries(
    input: LayoutTensor, dim: int, dtype: torch.dtype | None = None
) -> LayoutTensor:
    """`torch.softmax(w, dim)` of any layout:

    over the stored entries, in the layout; dense inside.
    """
    return _softmax_densely(input, dim, dtype, False)


@route(torch.log_softmax, input=LayoutTensor)
def log_softmax_of_entries(
    input: LayoutTensor, dim: int, dtype: torch.dtype | None = None
) -> LayoutTensor:
    """`torch.log_softmax(w, dim)` of any layout, likewise."""
    return _softmax_densely(input, dim, dtype, True)


@route(torch.maximum, input=LayoutTensor, other=LayoutTensor, out=LayoutTensor)
def maximum_into(input: LayoutTensor, other: LayoutTensor, *, out: LayoutTensor) -> LayoutTensor:
    """`torch.maximum(w, v, out=u)` of one pattern: AMSGrad's running maximum."""
    if not (out.same_pattern(input) and out.same_pattern(other)):
        return NotImplemented
    torch.maximum(values_of(input), values_of(other), out=out.stored_values)
    return out
