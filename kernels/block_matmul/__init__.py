"""block_matmul: a block layout times a dense matrix, either way round, with gradients to both.

`out = W @ x`, W (*batch, *lead, M, K) a BSRTensor, x dense. `x @ W` is `(W.mT @ x.mT).mT` on the
column lists, `F.linear(x, W)` is `(W @ x.mT).mT`; nothing is copied for it. Gradients: to x, `W.mT
@ g`; to W, `g @ x.mT` at its stored blocks (`sddmm`), in its layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
from sparse_layouts.kernels.block_matmul import reference
from sparse_layouts.layout_autograd import apply, as_layout, differentiates, unwrapped
from sparse_layouts.layout_routes import transpose_blocks

OP = "block_matmul"
register_kernel(
    OP,
    "triton",
    "sparse_layouts.kernels.block_matmul.triton_block_matmul:block_matmul",
    requirements.triton_blocks,
)
register_kernel(OP, "cpu", "sparse_layouts.kernels.block_matmul.cpu:block_matmul", requirements.cpu)


def facts(values: Tensor, block_size: tuple[int, int]) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(values, block_size=block_size)


def _launch(values: Tensor, pattern: BlockPattern, x: Tensor, transposed_output: bool) -> Tensor:
    batch = max(values.shape[0], x.shape[0]) if values.shape[0] and x.shape[0] else 0
    patterns = pattern.num_patterns
    dense = values.shape[0] * patterns * math.prod(pattern.shape) * values.element_size()
    if values.shape[0] != batch:
        values = values.expand(batch, -1, -1, -1)
    if x.shape[0] != batch:
        x = x.expand(batch, -1, -1, -1)
    return run(
        OP,
        facts(values, pattern.block_size),
        reference.block_matmul,
        dense,
        values,
        pattern,
        x,
        transposed_output=transposed_output,
    )


def _shape(values: Tensor, pattern: BlockPattern, x: Tensor, transposed_output: bool) -> Tensor:
    batch = max(values.shape[0], x.shape[0])
    m, n = pattern.shape[0], x.shape[-1]
    if transposed_output:
        return x.new_empty(batch, pattern.num_patterns, n, m).mT
    return x.new_empty(batch, pattern.num_patterns, m, n)


block_matmul_op = opaque.define(
    OP, "Tensor values, {pattern}, Tensor x, bool transposed_output", _launch, _shape
)


def multiply(
    values: Tensor,
    pattern: BlockPattern,
    batch: tuple[int, ...],
    x: Tensor,
    transposed_output: bool = False,
) -> Tensor:
    """`W @ x` with broadcasting over the leading dimensions, without autograd.

    values (*batch, S, bm, bn), x (*any, K, N); returns (*broadcast(batch + lead, any), M, N).
    """
    lead = pattern.lead
    width = len(lead)
    outer = x.shape[:-2]
    k, n = x.shape[-2:]
    m = pattern.shape[0]
    if not batch and not width:
        flat = x.reshape(math.prod(outer), 1, k, n) if outer else x[None, None]
        out = block_matmul_op(values[None], pattern, flat, transposed_output)
        return out.reshape(*outer, m, n) if outer else out[0, 0]
    if math.prod(lead) == 1 and width:  # one pattern broadcasts like any other dimension of size 1
        batch, width = (*batch, *lead), 0
        values = values.reshape(*batch, *values.shape[-3:])
        lead = ()
    try:
        whole = torch.broadcast_shapes(outer, (*batch, *lead))
    except RuntimeError:
        whole = outer
    # A pattern's leading indices are its own; x expands to them, never the other way round.
    if whole[len(whole) - width :] != lead or len(whole) < len(batch) + width:
        raise ValueError(
            f"matmul: leading dimensions {tuple(outer)} of the dense operand do not broadcast to "
            f"the layout's {(*batch, *lead)}"
        )
    own_batch = whole[: len(whole) - width]
    flat_x = x.expand(*whole, k, n).reshape(math.prod(own_batch), math.prod(lead), k, n)
    flat_values = values.expand(*own_batch, *values.shape[-3:]).reshape(
        math.prod(own_batch), *values.shape[-3:]
    )
    out = block_matmul_op(flat_values, pattern, flat_x, transposed_output)
    return out.reshape(*whole, m, n)


class BlockMatmul(torch.autograd.Function):
    """`W @ x`; its gradients are products and `sddmm` again, and so can be differentiated."""

    @staticmethod
    def forward(layout: BSRTensor, x: Tensor, transposed_output: bool) -> Tensor:
        assert layout.inner_values is not None
        batch = tuple(layout.inner_values.shape[:-3])
        return multiply(layout.inner_values, layout.block_pattern, batch, x, transposed_output)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.settings = current()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sparse_layouts.kernels.sddmm import sddmm_summed

        saved = ctx.saved_tensors  # once: a checkpoint gives them away
        layout, x = unwrapped(saved[0]), saved[1]
        dlayout = dx = None
        with restored(ctx.settings):
            if ctx.needs_input_grad[0]:
                dlayout = as_layout(sddmm_summed(grad, x.mT, layout), layout)
            if ctx.needs_input_grad[1]:
                dx = product(transpose_blocks(layout, -2, -1), grad).sum_to_size(x.shape)
        return dlayout, dx, None


def check(layout: BSRTensor, dense: Any, contracted: int, own: int, what: str) -> None:
    """Raises for operands that do not fit: what was expected, what came, the way out."""
    if not isinstance(dense, Tensor):
        raise TypeError(f"{what}: expected a tensor, got {type(dense).__name__}")
    # a plain tensor: its properties cost nothing, the layout's 1.5 us each
    values = layout.inner_values
    if values is None:
        raise TypeError(
            f"{what}: a mask layout has no values to multiply; convert it first: "
            f"mask.to({dense.dtype})"
        )
    if values.dtype != dense.dtype:
        raise TypeError(
            f"{what}: expected one dtype, got {values.dtype} and {dense.dtype}; convert one with "
            f".to(dtype)"
        )
    if values.device != dense.device:
        raise ValueError(
            f"{what}: the layout is on {values.device}, the dense operand on {dense.device}"
        )
    if dense.dim() == 0:
        raise ValueError(f"{what}: the dense operand has no dimension")
    size = dense.shape[contracted] if dense.dim() > 1 else dense.shape[0]
    wanted = layout.block_pattern.shape[own]
    if size != wanted:
        raise ValueError(
            f"{what}: shapes {tuple(layout.shape)} (layout) and {tuple(dense.shape)} do not fit: "
            f"{wanted} and {size} must be equal"
        )


def declines(layout: BSRTensor, dense: Any) -> bool:
    """Whether a product of integers or complex numbers, which torch can do and no kernel here."""
    values = layout.inner_values
    return (
        values is not None
        and isinstance(dense, Tensor)
        and values.dtype == dense.dtype
        and not values.dtype.is_floating_point
    )


def autocast(layout: Any, *dense: Any) -> tuple[Any, ...]:
    """The operands in autocast's dtype, where it is on:

    intercepted above the dispatcher, its own rule does not run.
    """
    device = layout.block_pattern.device.type
    if not torch.is_autocast_enabled(device):
        return (layout, *dense)
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return tuple(cast(t) for t in (layout, *dense))


def product(layout: BSRTensor, x: Tensor, transposed_output: bool = False) -> Tensor:
    """`W @ x` of checked operands (x at least 2-D), differentiable."""
    if differentiates(x, layout):
        return apply(BlockMatmul, layout, x, transposed_output)
    return BlockMatmul.forward(layout, x, transposed_output)


def _uses(layout: BSRTensor, x: Tensor) -> list[Use]:
    assert layout.inner_values is not None
    own = facts(layout.inner_values, layout.block_size)
    flipped = own._replace(block_size=own.block_size[::-1])
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and x.requires_grad:
        uses.append(Use("gradient of the dense operand", OP, flipped))
    if torch.is_grad_enabled() and layout.requires_grad:
        uses.append(Use("gradient of the layout's values", "sddmm", own))
    return uses


def uses_of_layout_dense(input: BSRTensor, other: Tensor) -> Any:
    """For `sl.explain`."""
    if declines(input, other):
        return NotImplemented
    input, other = autocast(input, other)
    check(input, other, -2, -1, "matmul")
    return _uses(input, other)


@route(torch.matmul, input=BSRTensor, uses=uses_of_layout_dense)
def layout_times_dense(input: BSRTensor, other: Tensor) -> Any:
    """`w @ x`."""
    if declines(input, other):
        return NotImplemented
    input, other = autocast(input, other)
    check(input, other, -2, -1, "matmul")
    if other.dim() == 1:
        return product(input, other[:, None])[..., 0]
    return product(input, other)


def uses_of_dense_layout(input: Tensor, other: BSRTensor) -> Any:
    """For `sl.explain`."""
    if declines(other, input):
        return NotImplemented
    other, input = autocast(other, input)
    check(other, input, -1, -2, "matmul")
    return _uses(transpose_blocks(other, -2, -1), input)


@route(torch.matmul, other=BSRTensor, uses=uses_of_dense_layout)
def dense_times_layout(input: Tensor, other: BSRTensor) -> Any:
    """`x @ w`."""
    if declines(other, input):
        return NotImplemented
    other, input = autocast(other, input)
    check(other, input, -1, -2, "matmul")
    if input.dim() == 1:
        return product(transpose_blocks(other, -2, -1), input[:, None])[..., 0]
    return _from_the_right(input, transpose_blocks(other, -2, -1))


def _from_the_right(x: Tensor, flipped: BSRTensor) -> Tensor:
    """`x @ flipped.mT`: one matrix takes all of x's rows at once, several theirs each."""
    if x.dim() > 2 and flipped.dim() == 2:
        out = product(flipped, x.reshape(-1, x.shape[-1]).mT, True).mT
        return out.reshape(*x.shape[:-1], flipped.shape[0])
    return product(flipped, x.mT, True).mT


def uses_of_linear(input: Tensor, weight: BSRTensor, bias: Tensor | None = None) -> Any:
    """For `sl.explain`."""
    if declines(weight, input):
        return NotImplemented
    weight, input = autocast(weight, input)
    check(weight, input, -1, -1, "linear")
    return _uses(weight, input)


@route(F.linear, weight=BSRTensor, uses=uses_of_linear)
def linear(input: Tensor, weight: BSRTensor, bias: Tensor | None = None) -> Any:
    """`F.linear(x, w, bias)`: `x @ w.mT + bias`."""
    if declines(weight, input):
        return NotImplemented
    weight, input, bias = autocast(weight, input, bias)
    if weight.lead_dims or weight.dim() != 2:
        raise ValueError(f"linear: expected a 2-D weight, got shape {tuple(weight.shape)}")
    check(weight, input, -1, -1, "linear")
    if input.dim() == 1:
        out = product(weight, input[:, None])[..., 0]
    else:
        out = _from_the_right(input, weight)
    if bias is None:
        return out
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"linear: expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    if bias.dtype != out.dtype:
        raise TypeError(f"linear: expected a bias of {out.dtype}, got {bias.dtype}")
    return out + bias
