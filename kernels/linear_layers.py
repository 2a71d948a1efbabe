"""`activation(x @ W.mT + bias)`: a linear layer whose weight is a layout, in one kernel where its
family has one, and `sl.linear`, which any weight may have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.dispatch import current, restored
from sparse_layouts.dispatch.routes import find_route
from sparse_layouts.kernels.activations import activated, check_activation
from sparse_layouts.kernels.products import (
    Family,
    by_columns,
    from_the_right,
    product,
    rows_as_columns,
    sampled_and_summed,
    transposed,
)
from sparse_layouts.layout_autograd import (
    apply,
    as_layout,
    check_version,
    differentiates,
    unwrapped,
    version_of,
)
from sparse_layouts.layout_tensor import LayoutTensor


class LayoutLinear(torch.autograd.Function):
    """`activation(W @ x + bias)` in one kernel, W (M, K), x (K, N), bias (M,) or None; `activation`
    "relu", whose gradient can be told from its result, or None.
    """

    @staticmethod
    def forward(
        family: Family, layout: LayoutTensor, x: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        assert family.fused is not None
        return family.fused(layout, x, True, bias, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.family, layout, x, _, ctx.activation = inputs
        # as in LayoutProduct
        reads_x = ctx.needs_input_grad[1] or torch.compiler.is_compiling()
        kept = output if ctx.activation is not None else None
        ctx.save_for_backward(layout, x if reads_x else None, kept)
        ctx.settings, ctx.version = current(), version_of(layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint gives them away
        family, layout, x, out = ctx.family, unwrapped(saved[0]), saved[1], saved[2]
        dlayout = dx = dbias = None
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        with restored(ctx.settings):
            if ctx.needs_input_grad[1]:
                dlayout = as_layout(sampled_and_summed(family, grad, x.mT, layout), layout)
            if ctx.needs_input_grad[2]:
                check_version(layout, ctx.version)
                dx = product(family, transposed(layout), grad, by_columns(grad))
            if ctx.needs_input_grad[3]:
                dbias = grad.sum(-1)
        return None, dlayout, dx, dbias, None


def linear_layer(
    family: Family,
    x: Tensor,
    weight: LayoutTensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """`activation(x @ weight.mT + bias)` of checked operands, weight (M, K) and x (..., K)."""
    if family.fused is None or (bias is None and activation is None):
        columns = x[:, None] if x.dim() == 1 else None
        if columns is None:
            out = from_the_right(family, x, weight)
        else:
            out = product(family, weight, columns)[..., 0]
        return activated(out if bias is None else out + bias, activation)
    columns = rows_as_columns(x, weight)
    if not differentiates(x, weight, bias):
        out = family.fused(weight, columns, True, bias, activation)
    elif activation in (None, "relu"):
        out = apply(LayoutLinear, family, weight, columns, bias, activation)
    else:  # the gradients of the others are told from what comes before them
        before = linear_layer(family, x, weight, bias, None)
        return activated(before, activation)
    return out[:, 0] if x.dim() == 1 else out.mT.reshape(*x.shape[:-1], weight.matrix_shape[0])


def check_bias(bias: Any, size: int, like: Tensor) -> None:
    """Raises for a bias that does not fit a product of `size` rows with `like`."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or isinstance(bias, LayoutTensor):
        raise TypeError(
            f"linear: expected a dense tensor as the bias, or None, got {type(bias).__name__}"
        )
    if tuple(bias.shape) != (size,):
        raise ValueError(f"linear: expected a bias of shape ({size},), got {tuple(bias.shape)}")
    if bias.dtype != like.dtype:
        raise TypeError(f"linear: expected a bias of {like.dtype}, got {bias.dtype}")
    if bias.device != like.device:
        raise ValueError(f"linear: the bias is on {bias.device}, the input on {like.device}")


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """`activation(F.linear(input, weight, bias))`, of a weight on blocks in one kernel.

    input (..., K), weight (M, K) dense or a layout, bias (M,). `activation`: None, "relu", "gelu"
    (exact), "gelu_tanh" or "silu". Differentiable. Returns (..., M).

    With a block layout as the weight the bias is added and the activation taken before the sum is
    rounded, and only the result is written. Where a gradient is needed, relu stays in the kernel
    (its gradient is told from the result), except in compiled code; gelu and silu are then torch's
    own, on the sum with its bias, which autograd keeps. With other weights the product, the bias
    and the activation come one after the other.

    Raises `ValueError` for another activation, and what `F.linear` raises for operands that do not
    fit.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> sl.linear(torch.full((2, 64), -1.0), w, torch.full((64,), 3.0), activation="relu").unique()
    tensor([2.])
    """
    check_activation(activation)
    if activation is not None and isinstance(weight, LayoutTensor) and not _is_traced():
        # a route of F.linear whose handler knows of activations
        row = find_route(F.linear, (input, weight, bias), {"activation": activation})
        if row is not None and row.is_own:
            out = row.handler(input, weight, bias, activation=activation)
            if out is not NotImplemented:
                return out
    return activated(F.linear(input, weight, bias), activation)


def _is_traced() -> bool:
    """Whether code is traced for which only torch's own functions will do: for export, and for a
    gradient.
    """
    if not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_exporting() or torch.is_grad_enabled()


def call_of_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Any:
    """For `sl.explain`: the call in whose place this one stands."""
    check_activation(activation)
    return F.linear, (input, weight, bias), {}


linear.__explain__ = call_of_linear  # type: ignore[attr-defined]
