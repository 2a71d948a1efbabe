"""nm_sddmm: a dense product at the entries that an n:m mask stores, with gradients to both factors.

The gradient of an n:m layout's values in a product, and the scores of n:m attention. Gradients: `da
= G @ b.mT`, `db = a.mT @ G`, G the gradient in the layout: nm_matmul both times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.dispatch import (
    Facts,
    facts_of,
    register_kernel,
    run,
)
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.nm_sddmm import reference
from sparse_layouts.nm_fragments import FRAGMENTS, by_fragments
from sparse_layouts.nm_tensor import NMTensor

OP = "nm_sddmm"
_HERE = "sparse_layouts.kernels.nm_sddmm"
for _name, _function, _requires in (
    ("triton_dense", "triton_dense:nm_sddmm_in_scratch_memory", requirements.triton_floats),
    ("triton", "triton_nm_sddmm:nm_sddmm", requirements.triton_floats),
    ("cpu", "cpu:nm_sddmm", requirements.cpu),
):
    register_kernel(OP, _name, f"{_HERE}.{_function}", _requires)


def facts(a: Tensor, n: int, m: int) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(a, n_of_m=(n, m))


def _launch(a: Tensor, b: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    dense = a.shape[0] * a.shape[1] * a.shape[-2] * b.shape[-1] * a.element_size()
    return run(OP, facts(a, n, m), reference.nm_sddmm, dense, a, b, indices, n=n, m=m)


def _shape(a: Tensor, b: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1] // m * n)


nm_sddmm_op = opaque.define(OP, "Tensor a, Tensor b, Tensor indices, int n, int m", _launch, _shape)


def sample(a: Tensor, b: Tensor, mask: NMTensor) -> NMTensor:
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

    values = nm_sddmm_op(flat(a), flat(b), mask.row_indices(), mask.n, mask.m)
    if mask.order == FRAGMENTS:
        values = by_fragments(values, mask.n, mask.m)
    return mask.like_self(values.view(*outer, *values.shape[-2:]))
