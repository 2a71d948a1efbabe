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
    capability_of,
    facts_of,
    register_kernel,
    run,
)
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.operand_copies import reads_well, uses_of_each
from sparse_layouts.kernels.products import power_of_two, sixteenths_fact
from sparse_layouts.kernels.sddmm import reference
from sparse_layouts.layout_tensor import LayoutTensor

L = TypeVar("L", bound=LayoutTensor)
OP = "sddmm"
register_kernel(
    OP,
    "dense_scratch",
    "sparse_layouts.kernels.sddmm.triton_dense_scratch:sddmm",
    requirements.dense_sddmm,
)
register_kernel(
    OP, "hopper", "sparse_layouts.kernels.sddmm.hopper_sddmm:sddmm", requirements.hopper_sddmm
)
register_kernel(
    OP, "triton", "sparse_layouts.kernels.sddmm.triton_sddmm:sddmm", requirements.triton_blocks
)
register_kernel(OP, "cpu", "sparse_layouts.kernels.sddmm.cpu:sddmm", requirements.cpu)


def facts(a: Tensor, b: Tensor, pattern: BlockPattern) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(
        a,
        block_size=pattern.block_size,
        columns=power_of_two(a.shape[-1]),
        tma=capability_of(a.device) == (9, 0) and tma_fact(a, b, pattern),
        partial=is_partial(pattern),
        sixteenths=sixteenths_fact(pattern),
    )


def tma_fact(a: Tensor, b: Tensor, pattern: BlockPattern) -> bool:
    """Whether the copy engine can read the operands, or copies that pay."""
    p, (bm, bn) = pattern, pattern.block_size
    columns = uses_of_each(p.num_blocks * bn, p.num_patterns * p.grid[0])
    rows = uses_of_each(p.num_blocks * bm, p.num_patterns * p.grid[1])
    return reads_well(a, columns) and reads_well(b, rows)


def is_partial(pattern: BlockPattern) -> bool:
    """Whether there may be blocks that are stored in part, or reach over the matrix's edge."""
    (m, n), (bm, bn) = pattern.shape, pattern.block_size
    return pattern.tiles is not None or m % bm != 0 or n % bn != 0


def _launch(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    dense = a.shape[0] * pattern.num_patterns * math.prod(pattern.shape) * a.element_size()
    return run(OP, facts(a, b, pattern), reference.sddmm, dense, a, b, pattern)


def _shape(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    return a.new_empty(a.shape[0], pattern.num_blocks, *pattern.block_size)


sddmm_op = opaque.define(OP, "Tensor a, Tensor b, {pattern}", _launch, _shape)


def sample(a: Tensor, b: Tensor, mask: BSRTensor) -> BSRTensor:
    """`a @ b` at the mask's entries, without autograd; the dimensions before the mask's own are the
    batch.
    """
    return mask.like_self(sampled_blocks(a, b, expand_heads(mask.block_pattern)))


def sampled_blocks(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """The values (*batch, S, bm, bn) of `a @ b` on a pattern without a head map."""
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    width = len(pattern.lead)
    if width:
        outer = torch.broadcast_shapes(outer, pattern.lead)
    batch = outer[: len(outer) - width]

    def flat(t: Tensor) -> Tensor:
        t = t.expand(*outer, *t.shape[-2:])
        return t.reshape(math.prod(batch), pattern.num_patterns, *t.shape[-2:])

    values = sddmm_op(flat(a), flat(b), pattern)
    return values.view(*batch, *values.shape[1:])


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
    if not isinstance(mask, LayoutTensor):
        raise TypeError(
            f"sddmm: expected a layout as the mask, got {type(mask).__name__}; sl.mask_from makes "
            f"one"
        )
    for name, t in (("a", a), ("b", b)):  # a layout there would find no route
        if not isinstance(t, Tensor) or isinstance(t, LayoutTensor):
            raise TypeError(f"sddmm: {name} is a dense tensor, got {type(t).__name__}")
    # A torch function: it finds the route of any layout, and stays one node of a compiled graph.
    return torch.sparse.sampled_addmm(mask, a, b, beta=0)


def call_of_sddmm(a: Tensor, b: Tensor, mask: LayoutTensor) -> Any:
    """For `sl.explain`: the call in whose place this one stands."""
    return torch.sparse.sampled_addmm, (mask, a, b), {"beta": 0}


sddmm.__explain__ = call_of_sddmm  # type: ignore[attr-defined]
