"""csr_sddmm: a dense product at the stored entries of a CSR or CSC mask, in its layout, with
gradients to both.

The gradient of such a layout's values in a product, and the scores of explicit sparse attention.
Of a CSC mask it is the transposed product at the CSR of its transpose. Gradients: `da = G @ b.mT`,
`db = a.mT @ G`, G the gradient in the layout: csr_matmul both times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.dispatch import (
    facts_of,
    register_kernel,
    run,
)
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.csr_sddmm import reference

OP = "csr_sddmm"
_HERE = "sparse_layouts.kernels.csr_sddmm"
register_kernel(OP, "triton", f"{_HERE}.triton_csr_sddmm:csr_sddmm", requirements.triton_floats)
register_kernel(OP, "cpu", f"{_HERE}.cpu:csr_sddmm", requirements.cpu)


def _launch(a: Tensor, b: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    dense = a.shape[0] * math.prod(shape) * a.element_size()
    return run(OP, facts_of(a), reference.csr_sddmm, dense, a, b, crow, col, shape=tuple(shape))


def _shape(a: Tensor, b: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    return a.new_empty(a.shape[0], col.shape[0])


csr_sddmm_op = opaque.define(
    OP, "Tensor a, Tensor b, Tensor crow, Tensor col, SymInt[] shape", _launch, _shape
)


def sample(a: Tensor, b: Tensor, mask: CompressedTensor) -> CompressedTensor:
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
