"""block_softmax: softmax and log_softmax of a block layout over the stored entries of each row, in
the layout.

A missing score is -inf, not 0; a block that counts c times enters c times. Gradient: `out * (g -
sum(g * out))`, for the logarithm `g - exp(out) * sum(g)`, over stored entries, in the layout.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_layouts import opaque
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import (
    Facts,
    Use,
    current,
    facts_of,
    register_kernel,
    restored,
    route,
    run,
)
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.block_softmax import reference
from sparse_layouts.layout_autograd import apply, as_layout, differentiates, unwrapped
from sparse_layouts.layout_routes import transpose_layout

OP, BACKWARD = "block_softmax", "block_softmax_backward"
_TRITON = "sparse_layouts.kernels.block_softmax.triton_block_softmax"
for _op in (OP, BACKWARD):
    register_kernel(_op, "triton", f"{_TRITON}:{_op}", requirements.triton_blocks)
    register_kernel(_op, "cpu", f"sparse_layouts.kernels.block_softmax.cpu:{_op}", requirements.cpu)


def facts(values: Tensor, block_size: tuple[int, int]) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(values, block_size=block_size)


def _dense_bytes(values: Tensor, pattern: BlockPattern) -> int:
    return values.shape[0] * pattern.num_patterns * math.prod(pattern.shape) * values.element_size()


def _launch(values: Tensor, pattern: BlockPattern, log: bool) -> Tensor:
    own = facts(values, pattern.block_size)
    cost = _dense_bytes(values, pattern)
    return run(OP, own, reference.block_softmax, cost, values, pattern, log=log)


def _launch_backward(grad: Tensor, out: Tensor, pattern: BlockPattern, log: bool) -> Tensor:
    own = facts(grad, pattern.block_size)
    cost = _dense_bytes(grad, pattern)
    return run(BACKWARD, own, reference.block_softmax_backward, cost, grad, out, pattern, log=log)


def _shape(values: Tensor, pattern: BlockPattern, log: bool) -> Tensor:
    return values.new_empty(values.shape)


def _shape_backward(grad: Tensor, out: Tensor, pattern: BlockPattern, log: bool) -> Tensor:
    return grad.new_empty(grad.shape)


block_softmax_op = opaque.define(OP, "Tensor values, {pattern}, bool log", _launch, _shape)
block_softmax_backward_op = opaque.define(
    BACKWARD, "Tensor grad, Tensor out, {pattern}, bool log", _launch_backward, _shape_backward
)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(math.prod(values.shape[:-3]), *values.shape[-3:])


class BlockSoftmax(torch.autograd.Function):
    """softmax over the stored entries of each row."""

    @staticmethod
    def forward(layout: BSRTensor, log: bool) -> BSRTensor:
        values = layout.inner_values
        assert values is not None
        out = block_softmax_op(_flat(values), layout.block_pattern, log)
        return layout.like_self(out.view(values.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)
        ctx.log, ctx.settings = inputs[1], current()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        out = unwrapped(ctx.saved_tensors[0])
        gradient: Any = as_layout(grad, out)
        with restored(ctx.settings):
            dx = block_softmax_backward_op(
                _flat(gradient.inner_values), _flat(out.inner_values), out.block_pattern, ctx.log
            )
        return out.like_self(dx.view(out.inner_values.shape)), None


def _softmax(layout: BSRTensor, dim: int, dtype: torch.dtype | None, log: bool) -> Any:
    what = "log_softmax" if log else "softmax"
    if layout.is_mask:
        raise TypeError(
            f"{what}: a mask layout has no values; scores come from sl.sddmm(q, k.mT, mask)"
        )
    if dim is None:
        raise TypeError(f"{what}: dim is needed, -1 for the softmax of each row")
    if not layout.dtype.is_floating_point and dtype is None:
        raise TypeError(f"{what}: expected a floating dtype, got {layout.dtype}")
    if not -layout.dim() <= dim < layout.dim():
        raise IndexError(f"{what}: expected a dimension of {layout.dim()}, got {dim}")
    axis = dim % layout.dim()
    if axis < layout.dim() - 2:
        raise ValueError(
            f"{what}: over the rows or columns of the matrix (dim -1 or -2), got {dim} of "
            f"{layout.dim()}"
        )
    if dtype is not None:
        layout = cast(BSRTensor, layout.to(dtype))
    if axis == layout.dim() - 2:
        return transpose_layout(_softmax(transpose_layout(layout, -2, -1), -1, None, log), -2, -1)
    if differentiates(layout):
        return apply(BlockSoftmax, layout, log)
    return BlockSoftmax.forward(layout, log)


def uses_of_softmax(
    input: BSRTensor, dim: int | None = None, dtype: torch.dtype | None = None
) -> list[Use]:
    """For `sl.explain`."""
    values = input.inner_values
    if values is None:
        raise TypeError(
            "softmax: a mask layout has no values; scores come from sl.sddmm(q, k.mT, mask)"
        )
    own = facts(values, input.block_size)._replace(dtype=dtype or values.dtype)
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and input.requires_grad:
        uses.append(Use("gradient", BACKWARD, own))
    return uses


@route(torch.softmax, input=BSRTensor, uses=uses_of_softmax)
def softmax(input: BSRTensor, dim: int, dtype: torch.dtype | None = None) -> BSRTensor:
    """`torch.softmax(w, -1)`: over each row's stored entries, in the layout."""
    return _softmax(input, dim, dtype, False)


@route(torch.log_softmax, input=BSRTensor, uses=uses_of_softmax)
def log_softmax(input: BSRTensor, dim: int, dtype: torch.dtype | None = None) -> BSRTensor:
    """`torch.log_softmax(w, -1)`: over each row's stored entries, in the layout; what is not stored
    stays 0.
    """
    return _softmax(input, dim, dtype, True)
