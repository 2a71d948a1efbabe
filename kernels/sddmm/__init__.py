"""sddmm: a dense product at the stored entries of a mask, `a @ b` sampled, in the mask's layout,
with gradients to both.

The gradient of a block layout's values in a product, and the scores of explicit sparse attention.
Gradients: `da = G @ b.mT`, `db = a.mT @ G`, G the gradient in the layout: block_matmul both times.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.block_pattern import BlockPattern, expand_heads
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
from sparse_layouts.kernels.products import fold_summed, product
from sparse_layouts.kernels.sddmm import reference
from sparse_layouts.layout_autograd import apply, as_layout, differentiates, unwrapped
from sparse_layouts.layout_routes import transpose_layout
from sparse_layouts.layout_tensor import LayoutTensor

L = TypeVar("L", bound=LayoutTensor)
OP = "sddmm"
register_kernel(
    OP, "triton", "sparse_layouts.kernels.sddmm.triton_sddmm:sddmm", requirements.triton_blocks
)
register_kernel(OP, "cpu", "sparse_layouts.kernels.sddmm.cpu:sddmm", requirements.cpu)


def facts(a: Tensor, block_size: tuple[int, int]) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(a, block_size=block_size)


def _launch(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    dense = a.shape[0] * pattern.num_patterns * math.prod(pattern.shape) * a.element_size()
    return run(OP, facts(a, pattern.block_size), reference.sddmm, dense, a, b, pattern)


def _shape(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    return a.new_empty(a.shape[0], pattern.num_blocks, *pattern.block_size)


sddmm_op = opaque.define(OP, "Tensor a, Tensor b, {pattern}", _launch, _shape)


def sampled_product(a: Tensor, b: Tensor, mask: BSRTensor) -> BSRTensor:
    """`a @ b` at the mask's entries, without autograd;

    the dimensions before the mask's own are the batch.
    """
    pattern = expand_heads(mask.block_pattern)
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    width = len(pattern.lead)
    if width:
        outer = torch.broadcast_shapes(outer, pattern.lead)
    batch = outer[: len(outer) - width]

    def flat(t: Tensor) -> Tensor:
        t = t.expand(*outer, *t.shape[-2:])
        return t.reshape(math.prod(batch), pattern.num_patterns, *t.shape[-2:])

    values = sddmm_op(flat(a), flat(b), pattern)
    values = values.view(*batch, *values.shape[1:])
    return mask.like_self(values)


class SDDMM(torch.autograd.Function):
    """`a @ b` sampled onto a mask."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, mask: BSRTensor) -> BSRTensor:
        return sampled_product(a, b, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output)
        ctx.settings = current()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sparse_layouts.kernels.block_matmul import FAMILY

        a, b, saved = ctx.saved_tensors
        output = unwrapped(saved)
        gradient: BSRTensor = as_layout(grad, output)
        da = db = None
        with restored(ctx.settings):
            if ctx.needs_input_grad[0]:
                da = product(FAMILY, gradient, b.mT).sum_to_size(a.shape)
            if ctx.needs_input_grad[1]:
                db = product(FAMILY, transpose_layout(gradient, -2, -1), a, True).mT.sum_to_size(
                    b.shape
                )
        return da, db, None


def check(a: Any, b: Any, mask: Any) -> None:
    """Raises for operands that do not fit."""
    if not isinstance(mask, BSRTensor):
        raise TypeError(
            f"sddmm: expected a block layout as the mask, got {type(mask).__name__}; "
            f"sl.mask_from makes one"
        )
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or isinstance(t, BSRTensor):
            raise TypeError(f"sddmm: {name} is a dense tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"sddmm: {name} is floating, got {t.dtype}")
        if t.dim() < 2:
            raise ValueError(f"sddmm: {name} is at least 2-D, got shape {tuple(t.shape)}")
        if t.device != mask.device:
            raise ValueError(f"sddmm: {name} is on {t.device}, the mask on {mask.device}")
    if a.dtype != b.dtype:
        raise TypeError(f"sddmm: expected one dtype, got {a.dtype} and {b.dtype}")
    m, n = mask.shape[-2:]
    if a.shape[-2] != m or b.shape[-1] != n or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"sddmm: expected a (..., {m}, K) and b (..., K, {n}) for a mask of {(m, n)}, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    lead = mask.block_pattern.lead
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    whole = torch.broadcast_shapes(outer, lead)
    if lead and tuple(whole[len(whole) - len(lead) :]) != tuple(lead):
        raise ValueError(
            f"sddmm: leading dimensions {tuple(outer)} do not fit the mask's {tuple(lead)}"
        )


def sddmm(a: Tensor, b: Tensor, mask: L) -> L:
    """The product `a @ b` at the entries that `mask` stores, in the mask's layout; differentiable
    in a and b.

    a (*batch, *lead, M, K), b (*batch, *lead, K, N), broadcast against each other; mask (*lead, M,
    N), a mask or a layout with values, of which only the pattern is used. Returns values (*batch,
    nnzb, bm, bn) in a's dtype. For scores pass `q, k.mT`.

    Raises `TypeError` and `ValueError` for operands that do not fit.

    >>> import torch, sparse_layouts as sl
    >>> q = k = torch.randn(2, 64, 8)
    >>> sl.sddmm(q, k.mT, sl.causal(64, block_size=16)).shape
    torch.Size([2, 64, 64])
    """
    if torch.compiler.is_dynamo_compiling() or not isinstance(mask, BSRTensor):
        if not isinstance(mask, LayoutTensor):
            raise TypeError(
                f"sddmm: expected a layout as the mask, got {type(mask).__name__}; sl.mask_from "
                f"makes one"
            )
        # A torch function stays one node of the graph; this one would be traced line by line. And
        # it finds the route of any layout.
        return torch.sparse.sampled_addmm(mask, a, b, beta=0)
    return _sddmm(a, b, mask)


def _sddmm(a: Tensor, b: Tensor, mask: BSRTensor) -> BSRTensor:
    check(a, b, mask)
    if differentiates(a, b):
        return apply(SDDMM, a, b, mask.detach())
    return sampled_product(a, b, mask)


def uses_of_sddmm(a: Tensor, b: Tensor, mask: LayoutTensor) -> Any:
    """For `sl.explain`."""
    if not isinstance(mask, BSRTensor):
        return torch.sparse.sampled_addmm, (mask, a, b), {"beta": 0}
    check(a, b, mask)
    own = facts(a, mask.block_size)
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        uses.append(Use("gradients of a and b", "block_matmul", own))
    return uses


sddmm.__explain__ = uses_of_sddmm  # type: ignore[attr-defined]


def sddmm_summed(a: Tensor, b: Tensor, layout: BSRTensor) -> BSRTensor:
    """`a @ b` at the layout's entries, summed over the dimensions that the layout lacks or has with
    size 1.

    Those are laid end to end along the contracted dimension: one product, and nothing to add.
    """
    a, b = fold_summed(a, b, tuple(layout.shape[:-2]))
    return _sddmm(a, b, layout)


def uses_of_sampled_addmm(
    input: BSRTensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> list[Use]:
    """For `sl.explain`."""
    return uses_of_sddmm(mat1, mat2, input)


@route(torch.sparse.sampled_addmm, input=BSRTensor, uses=uses_of_sampled_addmm)
def sampled_addmm(
    input: BSRTensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> BSRTensor:
    """`torch.sparse.sampled_addmm`: `beta * input + alpha * (mat1 @ mat2)` at input's entries."""
    out = _sddmm(mat1, mat2, input)
    scaled: Any = out if alpha == 1 else out * alpha
    if beta == 0 or input.is_mask:
        return scaled
    return scaled + (input if beta == 1 else input * beta)
