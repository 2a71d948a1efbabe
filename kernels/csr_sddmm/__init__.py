"""csr_sddmm: a dense product at the stored entries of a CSR or CSC mask, in its layout, with
gradients to both.

The gradient of such a layout's values in a product, and the scores of explicit sparse attention.
Of a CSC mask it is the transposed product at the CSR of its transpose. Gradients: `da = G @ b.mT`,
`db = a.mT @ G`, G the gradient in the layout: csr_matmul both times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.dispatch import (
    Use,
    current,
    facts_of,
    register_kernel,
    restored,
    route,
    run,
)
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.csr_matmul import FAMILY
from sparse_layouts.kernels.csr_matmul import OP as MATMUL
from sparse_layouts.kernels.csr_matmul import facts as matmul_facts
from sparse_layouts.kernels.csr_sddmm import reference
from sparse_layouts.kernels.products import fold_summed, product
from sparse_layouts.layout_autograd import apply, as_layout, differentiates, unwrapped
from sparse_layouts.layout_routes import transpose_layout
from sparse_layouts.layout_tensor import LayoutTensor

OP = "csr_sddmm"
_HERE = "sparse_layouts.kernels.csr_sddmm"
register_kernel(OP, "triton", f"{_HERE}.triton_csr_sddmm:csr_sddmm", requirements.triton_csr)
register_kernel(OP, "cpu", f"{_HERE}.cpu:csr_sddmm", requirements.cpu)


def _launch(a: Tensor, b: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    dense = a.shape[0] * math.prod(shape) * a.element_size()
    return run(OP, facts_of(a), reference.csr_sddmm, dense, a, b, crow, col, shape=tuple(shape))


def _shape(a: Tensor, b: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    return a.new_empty(a.shape[0], col.shape[0])


csr_sddmm_op = opaque.define(
    OP, "Tensor a, Tensor b, Tensor crow, Tensor col, SymInt[] shape", _launch, _shape
)


def _sampled_product(a: Tensor, b: Tensor, mask: CompressedTensor) -> CompressedTensor:
    """`a @ b` at the mask's entries, without autograd; leading dimensions are the batch."""
    if not mask.by_rows:  # (a b)' = b' a'
        a, b = b.mT, a.mT
    if a.dim() == b.dim() == 2:
        return mask.like_self(csr_sddmm_op(a[None], b[None], *mask.lists, mask.compressed_shape)[0])
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])

    def flat(t: Tensor) -> Tensor:
        return t.expand(*outer, *t.shape[-2:]).reshape(math.prod(outer), *t.shape[-2:])

    values = csr_sddmm_op(flat(a), flat(b), *mask.lists, mask.compressed_shape)
    return mask.like_self(values.view(*outer, values.shape[-1]))


class CSRSampled(torch.autograd.Function):
    """`a @ b` at the entries that a CSR or CSC mask stores."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, mask: CompressedTensor) -> CompressedTensor:
        return _sampled_product(a, b, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output)
        ctx.settings = current()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
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


def check(a: Any, b: Any, mask: CompressedTensor) -> None:
    """Raises for operands that do not fit."""
    device = mask.lists[0].device
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or isinstance(t, LayoutTensor):
            raise TypeError(f"sddmm: {name} is a dense tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"sddmm: {name} is floating, got {t.dtype}; convert it with .float()")
        if t.dim() < 2:
            raise ValueError(
                f"sddmm: {name} is at least 2-D, got shape {tuple(t.shape)}; a vector is x[:, None]"
            )
        if t.device != device:
            raise ValueError(f"sddmm: {name} is on {t.device}, the mask on {device}")
    if a.dtype != b.dtype:
        raise TypeError(f"sddmm: expected one dtype, got {a.dtype} and {b.dtype}")
    m, k = mask.matrix_shape
    if a.shape[-2] != m or b.shape[-1] != k or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"sddmm: expected a (..., {m}, D) and b (..., D, {k}) for a mask of {(m, k)}, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )


def sampled_product(a: Tensor, b: Tensor, mask: CompressedTensor) -> CompressedTensor:
    """`a @ b` of checked operands at the mask's entries, differentiable in a and b."""
    if differentiates(a, b):
        return apply(CSRSampled, a, b, mask.detach())
    return _sampled_product(a, b, mask)


def sampled_and_summed(a: Tensor, b: Tensor, layout: CompressedTensor) -> CompressedTensor:
    """`a @ b` at the layout's entries, summed over the dimensions that the layout lacks or has with
    size 1: one product, and nothing to add.
    """
    a, b = fold_summed(a, b, tuple(layout.shape[:-2]))
    return sampled_product(a, b, layout)


def uses_of_sampled_addmm(
    input: CompressedTensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> list[Use]:
    """For `sl.explain`."""
    check(mat1, mat2, input)
    uses = [Use("forward", OP, facts_of(mat1))]
    if torch.is_grad_enabled() and (mat1.requires_grad or mat2.requires_grad):
        uses.append(Use("gradients of a and b", MATMUL, matmul_facts(mat1, mat1.shape[-1])))
    return uses


@route(torch.sparse.sampled_addmm, input=CompressedTensor, uses=uses_of_sampled_addmm)
def sampled_addmm(
    input: CompressedTensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Any:
    """`sl.sddmm(a, b, w)` and `torch.sparse.sampled_addmm(w, a, b)`: `beta * w + alpha * (a @ b)`
    at w's entries.
    """
    check(mat1, mat2, input)
    out: Any = sampled_product(mat1, mat2, input)
    scaled = out if alpha == 1 else out * alpha
    if beta == 0 or input.is_mask:
        return scaled
    return scaled + (input if beta == 1 else input * beta)
