"""Routes that need no kernel: views, arithmetic that keeps the layout, sums; for every layout or
for block layouts.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import Use, dense_bytes, facts_of, permit, record, route
from sparse_layouts.dispatch.routes import find_route, matches
from sparse_layouts.layout_autograd import (
    aligned,
    apply,
    as_layout,
    sampled,
    values_of,
    with_values,
)
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.mask_algebra import select


class Transpose(torch.autograd.Function):
    """The transposed layout; its values are a view of the argument's."""

    @staticmethod
    def forward(layout: LayoutTensor) -> LayoutTensor:
        flipped = layout.transposed()
        assert flipped is not None
        return flipped

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        layout, output = ctx.saved_tensors
        flipped = transpose_layout(as_layout(grad, output), -2, -1)
        if type(flipped) is type(layout):
            return flipped
        return with_values(layout, values_of(flipped))  # the slots are the same


def if_taken(takes: Callable[..., bool]) -> Callable[..., list[Use]]:
    """For `sl.explain`: no op where `takes(*args, **kwargs)` holds, and a declined call else."""

    def uses(*args: Any, **kwargs: Any) -> Any:
        return [] if takes(*args, **kwargs) else NotImplemented

    return uses


def can_transpose(input: LayoutTensor, dim0: int, dim1: int) -> bool:
    """Whether a layout has a transpose of its own, and these are its last two dimensions."""
    with torch._C.DisableTorchFunctionSubclass():
        dims = input.dim()
    own = type(input).transposed is not LayoutTensor.transposed
    inside = -dims <= min(dim0, dim1) and max(dim0, dim1) < dims
    return own and inside and {dim0 % dims, dim1 % dims} == {dims - 1, dims - 2}


@route(torch.transpose, input=LayoutTensor, uses=if_taken(can_transpose))
def transpose_layout(input: Any, dim0: int, dim1: int) -> Any:
    """`w.mT` shares the values (of a block layout row and column lists change places); the last two
    dimensions only, and only of layouts that have a transpose.
    """
    if not can_transpose(input, dim0, dim1):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        differentiable = torch.is_grad_enabled() and input.requires_grad
    if not differentiable:
        return input.transposed()
    out = apply(Transpose, input)
    if not torch.compiler.is_compiling():
        out._shares_values = True
        if not input.is_leaf:
            input._shares_values = True
    return out


@route(torch.Tensor.__getitem__, input=BSRTensor)
def select_blocks(input: BSRTensor, index: Any) -> Any:
    """`w[h]`, `w[:, 64:128]`: heads, samples, and rows and columns cut at block edges; any other
    index is dense. The result is a copy: writing to it (`w[0:64].zero_()`) does not change w, write
    to `w.values()` instead.
    """
    found = select(input, index)
    return NotImplemented if found is None else found


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or (
        value.dim() == 0 and not isinstance(value, LayoutTensor)
    )


def can_scale(layout: LayoutTensor, other: Any) -> bool:
    """Whether `layout * other` keeps the layout, for a number or a dense tensor."""
    mask = layout.stored_values is None
    if _is_scalar(other):
        # infinity or NaN times an entry that is not stored would not be 0
        return not mask and (isinstance(other, Tensor) or cmath.isfinite(other))
    if mask:
        tail = layout.pattern_dims
        return tuple(other.shape[-tail:]) == tuple(layout.shape[-tail:])
    if other.dim() > layout.dim():
        return False
    return torch.broadcast_shapes(other.shape, layout.shape) == layout.shape


def _times(layout: LayoutTensor, other: Any) -> Any:
    if not can_scale(layout, other):
        return NotImplemented
    if _is_scalar(other):
        return with_values(layout, values_of(layout) * other)
    if layout.stored_values is None:
        return sampled(other, layout)
    picked = sampled(other.expand(layout.shape), layout)
    return with_values(layout, values_of(layout) * values_of(picked))


@route(torch.mul, input=LayoutTensor, uses=if_taken(can_scale))
def scale_or_sample(input: LayoutTensor, other: Any) -> Any:
    """`w * 2` scales the stored entries; `w * dense` takes the dense entries that w stores, times
    w.
    """
    return _times(input, other)


@route(torch.mul, other=LayoutTensor, uses=if_taken(lambda input, other: can_scale(other, input)))
def scale_or_sample_right(input: Any, other: LayoutTensor) -> Any:
    """`2 * w` and `dense * w`, as above."""
    return _times(other, input)


def share_entries(input: LayoutTensor, other: LayoutTensor, **options: Any) -> bool:
    """Whether two layouts have values, of the same entries."""
    if input.stored_values is None or other.stored_values is None:
        return False
    return input.same_pattern(other)


def _pairs(input: LayoutTensor, other: LayoutTensor) -> tuple[Tensor, Tensor]:
    """The values of both, entry for entry."""
    return values_of(input), values_of(aligned(other, input))


@route(torch.mul, input=LayoutTensor, other=LayoutTensor, uses=if_taken(share_entries))
def multiply_entries(input: LayoutTensor, other: LayoutTensor) -> Any:
    """`w * v` of one pattern, entry by entry."""
    if not share_entries(input, other):
        return NotImplemented
    return with_values(input, torch.mul(*_pairs(input, other)))


def can_divide(input: LayoutTensor, other: Any, **options: Any) -> bool:
    """Whether `input / other` keeps the layout."""
    if input.stored_values is None or not _is_scalar(other):
        return False
    return isinstance(other, Tensor) or not (other == 0 or cmath.isnan(other))


@route(torch.div, input=LayoutTensor, uses=if_taken(can_divide))
def divide_by_scalar(input: LayoutTensor, other: Any, *, rounding_mode: str | None = None) -> Any:
    """`w / 2`: the stored entries; by zero, infinity or a dense tensor it is dense (0 / 0 is not
    0).
    """
    if not can_divide(input, other):
        return NotImplemented
    return with_values(input, torch.div(values_of(input), other, rounding_mode=rounding_mode))


@route(torch.add, input=LayoutTensor, other=LayoutTensor, uses=if_taken(share_entries))
def add_entries(input: LayoutTensor, other: LayoutTensor, *, alpha: float = 1) -> Any:
    """`w + v` of one pattern; of two patterns it is dense."""
    if not share_entries(input, other):
        return NotImplemented
    return with_values(input, torch.add(*_pairs(input, other), alpha=alpha))


@route(torch.sub, input=LayoutTensor, other=LayoutTensor, uses=if_taken(share_entries))
def subtract_entries(input: LayoutTensor, other: LayoutTensor, *, alpha: float = 1) -> Any:
    """`w - v` of one pattern; of two patterns it is dense."""
    if not share_entries(input, other):
        return NotImplemented
    return with_values(input, torch.sub(*_pairs(input, other), alpha=alpha))


def can_drop(
    input: LayoutTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> bool:
    """Whether dropout keeps the layout."""
    return input.stored_values is not None and not inplace


@route(F.dropout, input=LayoutTensor, uses=if_taken(can_drop))
def drop_entries(
    input: LayoutTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Dropout of the stored entries (zeros dropped are zeros)."""
    if not can_drop(input, p, training, inplace):
        return NotImplemented
    return with_values(input, F.dropout(values_of(input), p, training))


def summed_axis(input: LayoutTensor, dim: Any, dtype: torch.dtype | None) -> int | None:
    """-1 or -2 where a sum is along the last or last but one dimension and a product with ones."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    added = input.dtype if dtype is None else dtype
    values = input.stored_values
    if values is None or len(dims) != 1 or not added.is_floating_point:
        return None
    if find_route(torch.matmul, (input, values), {}) is None:
        return None
    if not -input.dim() <= dims[0] < input.dim():
        return None
    axis = dims[0] % input.dim() - input.dim()
    return axis if axis >= -2 else None


def _ones_to_sum(
    input: LayoutTensor, axis: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The two factors of a product that is the sum along `axis`, -1 or -2."""
    if dtype is not None:
        input = cast(LayoutTensor, input.to(dtype))  # before adding up, as torch does
    values = input.stored_values
    assert values is not None
    if axis == -1:
        return input, values.new_ones(input.shape[-1], 1)
    return values.new_ones(1, input.shape[-2]), input


def uses_of_sum(
    input: LayoutTensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """For `sl.explain`: a sum along a dimension is a product with ones."""
    if input.stored_values is None:
        return NotImplemented
    if dim is None or dim == ():
        return []
    axis = summed_axis(input, dim, dtype)
    if axis is None:
        return NotImplemented
    factors = _ones_to_sum(input, axis, dtype)
    for match in matches(torch.matmul, factors, {}):
        if match.route.uses is not None:
            return match.route.uses(*match.reading.args, **match.reading.kwargs)
    return NotImplemented


@route(torch.sum, input=LayoutTensor, uses=uses_of_sum)
def sum_entries(
    input: LayoutTensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The sum of all entries; along the last or last but one dimension a product with ones; other
    sums are dense.
    """
    if input.stored_values is None:
        return NotImplemented
    if dim is None or dim == ():
        total = values_of(input).sum(dtype=dtype)
        return total.reshape((1,) * input.dim()) if keepdim else total
    axis = summed_axis(input, dim, dtype)
    if axis is None:
        return NotImplemented
    out = torch.matmul(*_ones_to_sum(input, axis, dtype))
    return out if keepdim else out.squeeze(axis)


def order_of_norm(input: LayoutTensor, order: Any, dim: Any, keepdim: bool) -> float | None:
    """The order of a norm over all entries, to which zeros add nothing; None for another norm."""
    order = 2 if order in (None, "fro") else order
    if input.stored_values is None or dim is not None or keepdim or isinstance(order, str):
        return None
    return order if order > 0 else None


def can_take_norm(
    input: LayoutTensor, p: Any = None, dim: Any = None, keepdim: bool = False, **rest: Any
) -> bool:
    """Whether a norm is over all stored entries."""
    return order_of_norm(input, rest.get("ord", p), dim, keepdim) is not None


@route(torch.norm, input=LayoutTensor, uses=if_taken(can_take_norm))
@route(torch.Tensor.norm, input=LayoutTensor, uses=if_taken(can_take_norm))
@route(torch.linalg.vector_norm, input=LayoutTensor, uses=if_taken(can_take_norm))
def norm_of_entries(
    input: LayoutTensor,
    p: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    ord: Any = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A norm over all entries (Frobenius, or of an order above 0): zeros add nothing to it."""
    order = order_of_norm(input, p if ord is None else ord, dim, keepdim)
    if order is None:
        return NotImplemented
    values = values_of(input)
    if not values.numel() and input.numel():
        order = 2  # all zeros: torch has no maximum of nothing
    return torch.linalg.vector_norm(values, order, dtype=dtype)


def is_frobenius(
    input: LayoutTensor, ord: Any = None, dim: Any = None, keepdim: bool = False, **options: Any
) -> bool:
    """Whether `torch.linalg.norm` is over all entries; with another order it is a matrix norm."""
    if ord is not None and not (ord == "fro" and input.dim() == 2):
        return False
    return order_of_norm(input, None, dim, keepdim) is not None


@route(torch.linalg.norm, input=LayoutTensor, uses=if_taken(is_frobenius))
def frobenius_norm(
    input: LayoutTensor,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """`torch.linalg.norm(w)`: over all entries; its other orders are matrix norms, and dense."""
    if not is_frobenius(input, ord, dim, keepdim):
        return NotImplemented
    return torch.linalg.vector_norm(values_of(input), 2, dtype=dtype)


def _softmax_densely(
    layout: LayoutTensor, dim: int, dtype: torch.dtype | None, log: bool
) -> LayoutTensor:
    """softmax over the stored entries of any layout, by densifying: what is not stored is -inf, and
    stays out of the result.
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
    ones = layout.like_self(torch.ones_like(values))
    ones.clear_unstored()
    stored = ones.to_dense_entries() != 0
    scores = layout.to_dense().masked_fill(~stored, -torch.inf)
    empty = ~stored.any(dim, keepdim=True)
    out = (torch.log_softmax if log else torch.softmax)(
        scores.masked_fill(empty, 0.0), dim, dtype=dtype
    )
    return sampled(out, layout)


dense_inside = if_taken(lambda *args, **kwargs: False)  # for `sl.explain`: the dense fallback


@route(torch.softmax, input=LayoutTensor, uses=dense_inside)
def softmax_of_entries(
    input: LayoutTensor, dim: int, dtype: torch.dtype | None = None
) -> LayoutTensor:
    """`torch.softmax(w, dim)` of any layout: over stored entries, in the layout; dense inside."""
    return _softmax_densely(input, dim, dtype, False)


@route(torch.log_softmax, input=LayoutTensor, uses=dense_inside)
def log_softmax_of_entries(
    input: LayoutTensor, dim: int, dtype: torch.dtype | None = None
) -> LayoutTensor:
    """`torch.log_softmax(w, dim)` of any layout, likewise."""
    return _softmax_densely(input, dim, dtype, True)


@route(torch.sparse.sampled_addmm, input=LayoutTensor, uses=dense_inside)
def sampled_addmm_densely(
    input: Any, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> LayoutTensor:
    """`sl.sddmm(a, b, w)` and `torch.sparse.sampled_addmm(w, a, b)` of any layout: the dense
    product, sampled.
    """
    kind = type(input).__name__
    what = f"sampled_addmm of a {kind} has no kernel; computing the whole product."
    permit(what, 2 * dense_bytes(input), input.device.type, "sampled_addmm")
    record("sampled_addmm", "dense fallback", facts_of(mat1), 2 * dense_bytes(input))
    scaled = sampled(mat1 @ mat2 if alpha == 1 else alpha * (mat1 @ mat2), input)
    if beta == 0 or input.stored_values is None:
        return scaled
    return cast(LayoutTensor, scaled + (input if beta == 1 else input * beta))


@route(torch.maximum, input=LayoutTensor, other=LayoutTensor, out=LayoutTensor)
def maximum_into(input: LayoutTensor, other: LayoutTensor, *, out: LayoutTensor) -> LayoutTensor:
    """`torch.maximum(w, v, out=u)` of one pattern: AMSGrad's running maximum."""
    if not (out.same_pattern(input) and out.same_pattern(other)):
        return NotImplemented
    first, second = (values_of(aligned(t, out)) for t in (input, other))
    torch.maximum(first, second, out=out.stored_values)
    return out
