"""csr_softmax: softmax and log_softmax of a CSR or CSC layout over the stored entries of its rows
or columns, in the layout.

A missing score is -inf, not 0. Along the compressed dimension the entries of a line lie side by
side; along the other one the values go through the other compression and back. Gradient: `out * (g
- sum(g * out))`, for the logarithm `g - exp(out) * sum(g)`, over stored entries, in the layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_layouts import opaque
from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.csr_lists import transposed_lists, transposed_slots
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
from sparse_layouts.kernels.csr_softmax import reference
from sparse_layouts.layout_autograd import apply, as_layout, differentiates, unwrapped

OP, BACKWARD = "csr_softmax", "csr_softmax_backward"
_HERE = "sparse_layouts.kernels.csr_softmax"
for _op in (OP, BACKWARD):
    register_kernel(_op, "triton", f"{_HERE}.triton_csr_softmax:{_op}", requirements.triton_floats)
    register_kernel(_op, "cpu", f"{_HERE}.cpu:{_op}", requirements.cpu)


def _launch(
    values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int], across: bool, log: bool
) -> Tensor:
    """Over the rows of the lists, or with `across` over their columns."""
    cost = values.shape[0] * math.prod(shape) * values.element_size()
    if not across:
        return run(OP, facts_of(values), reference.csr_softmax, cost, values, crow, log=log)
    ccol, _, order = transposed_lists(crow, col, (shape[0], shape[1]))
    values = values.index_select(1, order)
    out = run(OP, facts_of(values), reference.csr_softmax, cost, values, ccol, log=log)
    return out.index_select(1, transposed_slots(crow, col, (shape[0], shape[1])))


def _launch_backward(
    grad: Tensor,
    out: Tensor,
    crow: Tensor,
    col: Tensor,
    shape: tuple[int, int],
    across: bool,
    log: bool,
) -> Tensor:
    cost = grad.shape[0] * math.prod(shape) * grad.element_size()
    backward = reference.csr_softmax_backward
    if not across:
        return run(BACKWARD, facts_of(grad), backward, cost, grad, out, crow, log=log)
    ccol, _, order = transposed_lists(crow, col, (shape[0], shape[1]))
    grad, out = grad.index_select(1, order), out.index_select(1, order)
    dx = run(BACKWARD, facts_of(grad), backward, cost, grad, out, ccol, log=log)
    return dx.index_select(1, transposed_slots(crow, col, (shape[0], shape[1])))


def _shape(values: Tensor, *rest: Any) -> Tensor:
    return values.new_empty(values.shape)


_LISTS = "Tensor crow, Tensor col, SymInt[] shape, bool across, bool log"
csr_softmax_op = opaque.define(OP, f"Tensor values, {_LISTS}", _launch, _shape)
csr_softmax_backward_op = opaque.define(
    BACKWARD, f"Tensor grad, Tensor out, {_LISTS}", _launch_backward, _shape
)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


class CSRSoftmax(torch.autograd.Function):
    """softmax over the stored entries of each row of the lists, or of each column."""

    @staticmethod
    def forward(layout: CompressedTensor, across: bool, log: bool) -> CompressedTensor:
        values = layout.inner_values
        assert values is not None
        shape = layout.compressed_shape
        out = csr_softmax_op(_flat(values), *layout.lists, shape, across, log)
        return layout.like_self(out.view(values.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)
        ctx.across, ctx.log, ctx.settings = inputs[1], inputs[2], current()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        out = unwrapped(ctx.saved_tensors[0])
        gradient: Any = as_layout(grad, out)
        with restored(ctx.settings):
            dx = csr_softmax_backward_op(
                _flat(gradient.inner_values),
                _flat(out.inner_values),
                *out.lists,
                out.compressed_shape,
                ctx.across,
                ctx.log,
            )
        return out.like_self(dx.view(out.inner_values.shape)), None, None


def _across(layout: CompressedTensor, dim: int | None, what: str) -> bool:
    """Whether `dim` adds up over the columns of the lists; raises for other dimensions."""
    if layout.is_mask:
        raise TypeError(
            f"{what}: a mask layout has no values; scores come from sl.sddmm(q, k.mT, mask)"
        )
    dims = layout.dim()
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{what}: expected dim=-1 or dim=-2, got {dim!r}")
    if not -dims <= dim < dims:
        raise IndexError(f"{what}: expected a dimension of {dims}, got {dim}")
    axis = dim % dims - dims
    if axis < -2:
        raise NotImplementedError(
            f"{what}: over rows or columns of the matrix (dim -1 or -2), got {dim} of {dims}; over "
            f"the batch take torch.{what}(w.values(), {dim})"
        )
    return (axis == -1) != layout.by_rows


def _softmax(layout: Any, dim: int, dtype: torch.dtype | None, log: bool) -> Any:
    across = _across(layout, dim, "log_softmax" if log else "softmax")
    if dtype is not None:
        layout = layout.to(dtype)
    if differentiates(layout):
        return apply(CSRSoftmax, layout, across, log)
    return CSRSoftmax.forward(layout, across, log)


def uses_of_softmax(
    input: CompressedTensor, dim: int | None = None, dtype: torch.dtype | None = None
) -> list[Use]:
    """For `sl.explain`."""
    _across(input, dim, "softmax")
    assert input.inner_values is not None
    own: Facts = facts_of(input.inner_values)
    own = own if dtype is None else own._replace(dtype=dtype)
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and input.requires_grad:
        uses.append(Use("gradient", BACKWARD, own))
    return uses


@route(torch.softmax, input=CompressedTensor, uses=uses_of_softmax)
def softmax(
    input: CompressedTensor, dim: int, dtype: torch.dtype | None = None
) -> CompressedTensor:
    """`torch.softmax(w, -1)`: over each row's stored entries, in the layout; or each column's."""
    return _softmax(input, dim, dtype, False)


@route(torch.log_softmax, input=CompressedTensor, uses=uses_of_softmax)
def log_softmax(
    input: CompressedTensor, dim: int, dtype: torch.dtype | None = None
) -> CompressedTensor:
    """`torch.log_softmax(w, -1)`: likewise; what is not stored stays 0."""
    return _softmax(input, dim, dtype, True)
