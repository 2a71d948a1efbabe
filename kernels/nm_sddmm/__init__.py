"""nm_sddmm: a dense product at the entries that an n:m mask stores, with gradients to both factors.

The gradient of an n:m layout's values in a product, and the scores of n:m attention. Gradients: `da
= G @ b.mT`, `db = a.mT @ G`, G the gradient in the layout: nm_matmul both times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_layouts import opaque
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
from sparse_layouts.kernels.nm_sddmm import reference
from sparse_layouts.kernels.products import fold_summed, product
from sparse_layouts.layout_autograd import apply, as_layout, differentiates, unwrapped
from sparse_layouts.layout_routes import transpose_layout
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.nm_tensor import NMTensor

OP = "nm_sddmm"
_HERE = "sparse_layouts.kernels.nm_sddmm"
register_kernel(OP, "triton", f"{_HERE}.triton_nm_sddmm:nm_sddmm", requirements.triton_nm)
register_kernel(OP, "cpu", f"{_HERE}.cpu:nm_sddmm", requirements.cpu)


def facts(a: Tensor, n: int, m: int) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(a, n_of_m=(n, m))


def _launch(a: Tensor, b: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    dense = a.shape[0] * a.shape[1] * a.shape[-2] * b.shape[-1] * a.element_size()
    return run(OP, facts(a, n, m), reference.nm_sddmm, dense, a, b, indices, n=n, m=m)


def _shape(a: Tensor, b: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1] // m * n)


nm_sddmm_op = opaque.define(OP, "Tensor a, Tensor b, Tensor indices, int n, int m", _launch, _shape)


def sampled_product(a: Tensor, b: Tensor, mask: NMTensor) -> NMTensor:
    """`a @ b` at the mask's entries, without autograd; the dimensions before the mask's own are the
    batch.
    """
    if mask.axis == -2:  # (a b)' = b' a'
        a, b = b.mT, a.mT
    lead, patterns = mask.lead, math.prod(mask.lead)
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2], lead)
    batch = outer[: len(outer) - len(lead)]

    def flat(t: Tensor) -> Tensor:
        t = t.expand(*outer, *t.shape[-2:])
        return t.reshape(math.prod(batch), patterns, *t.shape[-2:])

    values = nm_sddmm_op(flat(a), flat(b), mask.inner_indices, mask.n, mask.m)
    return mask.like_self(values.view(*outer, *values.shape[-2:]))


class SampledNM(torch.autograd.Function):
    """`a @ b` at the entries that an n:m mask stores."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, mask: NMTensor) -> NMTensor:
        return sampled_product(a, b, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output)
        ctx.settings = current()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sparse_layouts.kernels.nm_matmul import FAMILY

        a, b, saved = ctx.saved_tensors
        gradient = as_layout(grad, unwrapped(saved))
        da = db = None
        with restored(ctx.settings):
            if ctx.needs_input_grad[0]:
                da = product(FAMILY, gradient, b.mT).sum_to_size(a.shape)
            if ctx.needs_input_grad[1]:
                flipped = transpose_layout(gradient, -2, -1)
                db = product(FAMILY, flipped, a, True).mT.sum_to_size(b.shape)
        return da, db, None


def check(a: Any, b: Any, mask: NMTensor) -> None:
    """Raises for operands that do not fit: what was expected, what came."""
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or isinstance(t, LayoutTensor):
            raise TypeError(f"sddmm: {name} is a dense tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"sddmm: {name} is floating, got {t.dtype}")
        if t.dim() < 2:
            raise ValueError(f"sddmm: {name} is at least 2-D, got shape {tuple(t.shape)}")
        if t.device != mask.device:
            raise ValueError(f"sddmm: {name} is on {t.device}, the mask on {mask.device}")
    if a.dtype != b.dtype:
        raise TypeError(f"sddmm: expected one dtype, got {a.dtype} and {b.dtype}")
    rows, columns = mask.matrix_shape
    if a.shape[-2] != rows or b.shape[-1] != columns or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"sddmm: expected a (..., {rows}, K) and b (..., K, {columns}) for a mask of "
            f"{(rows, columns)}, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    lead = mask.lead
    if lead and tuple(torch.broadcast_shapes(outer, lead)[-len(lead) :]) != lead:
        raise ValueError(f"sddmm: leading dimensions {tuple(outer)} do not fit the mask's {lead}")


def sampled(a: Tensor, b: Tensor, mask: NMTensor) -> NMTensor:
    """`a @ b` of checked operands at the mask's entries, differentiable."""
    if differentiates(a, b):
        return apply(SampledNM, a, b, mask.detach())
    return sampled_product(a, b, mask)


def sampled_and_summed(a: Tensor, b: Tensor, layout: NMTensor) -> NMTensor:
    """`a @ b` at the layout's entries, summed over the dimensions that the layout lacks or has with
    size 1.
    """
    a, b = fold_summed(a, b, tuple(layout.shape[:-2]))
    return sampled(a, b, layout)


def uses_of_sampled_addmm(
    input: NMTensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> list[Use]:
    """For `sl.explain`."""
    check(mat1, mat2, input)
    uses = [Use("forward", OP, facts(mat1, input.n, input.m))]
    if torch.is_grad_enabled() and (mat1.requires_grad or mat2.requires_grad):
        from sparse_layouts.kernels import nm_matmul

        inner = mat1.shape[-1]
        matrix = (input.rows, input.columns)
        for name, wanted, transposed in (
            ("a", mat1.requires_grad, input.axis == -2),
            ("b", mat2.requires_grad, input.axis == -1),
        ):
            if wanted:
                own = nm_matmul.facts(mat1, input.n, input.m, inner, matrix, transposed)
                uses.append(Use(f"gradient of {name}", nm_matmul.OP, own))
    return uses


@route(torch.sparse.sampled_addmm, input=NMTensor, uses=uses_of_sampled_addmm)
def sampled_addmm(
    input: Any, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Any:
    """`sl.sddmm(a, b, w)`, and `torch.sparse.sampled_addmm`: `beta * input + alpha * (mat1 @ mat2)`
    at input's entries.
    """
    check(mat1, mat2, input)
    out: Any = sampled(mat1, mat2, input.pattern)
    scaled = out if alpha == 1 else out * alpha
    if beta == 0 or input.stored_values is None:
        return scaled
    return scaled + (input if beta == 1 else input * beta)
