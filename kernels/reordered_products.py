"""Products of matrices that store their rows in another order: products of blocks, before which the
rows of the dense operand, or after which those of the result, change places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import transpose_pattern
from sparse_layouts.dispatch import Use
from sparse_layouts.kernels import block_matmul, sddmm
from sparse_layouts.kernels.product_routes import register_products
from sparse_layouts.kernels.products import Family, by_columns, like_result
from sparse_layouts.reordered_tensor import ReorderedTensor


def rows_taken(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of x (..., M, N) in another order, in memory as x: by rows or by columns."""
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return x.mT.index_select(-1, rows).mT
    return x.index_select(-2, rows)


def multiply(
    layout: ReorderedTensor,
    x: Tensor,
    transposed_output: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`activation(W @ x + bias)` with broadcasting over the leading dimensions, without autograd;
    bias (M,).
    """
    values, pattern = layout.inner_values, layout.block_pattern
    assert values is not None
    flip, more = transposed_output, (bias, activation)
    if layout.axis == -1:
        x = rows_taken(x, layout.inner_row_order)
        return block_matmul.multiply_blocks(values.mT, transpose_pattern(pattern), x, flip, *more)
    if bias is not None:
        more = (bias.index_select(0, layout.inner_row_order), activation)
    out = block_matmul.multiply_blocks(values, pattern, x, flip, *more)
    places = layout.inner_row_places
    if transposed_output:
        return out.mT.index_select(-1, places).mT
    return out.index_select(-2, places)


def sample(a: Tensor, b: Tensor, mask: ReorderedTensor) -> ReorderedTensor:
    """`a @ b` at the mask's entries, without autograd."""
    if mask.axis == -1:  # (a b)' = b' a'
        a, b = b.mT, a.mT
    a = rows_taken(a, mask.inner_row_order)
    return mask.like_self(sddmm.sampled_blocks(a, b, mask.block_pattern))


def _uses(layout: ReorderedTensor, x: Tensor, transposed_output: bool = False) -> list[Use]:
    values, pattern = layout.inner_values, layout.block_pattern
    assert values is not None
    flipped = transpose_pattern(pattern)
    if layout.axis == -1:
        values, pattern, flipped = values.mT, flipped, pattern
    own = block_matmul.facts(values, pattern, x, transposed_output)
    grad = like_result(pattern.shape[0], x, transposed_output)
    uses = [Use("forward", block_matmul.OP, own)]
    if torch.is_grad_enabled() and x.requires_grad:
        turned = block_matmul.facts(values.mT, flipped, grad, by_columns(grad))
        uses.append(Use("gradient of the dense operand", block_matmul.OP, turned))
    if torch.is_grad_enabled() and layout.requires_grad:
        a, b = (x, grad.mT) if layout.axis == -1 else (grad, x.mT)
        sampled = own._replace(
            block_size=layout.block_size,
            partial=sddmm.is_partial(layout.block_pattern),
            tma=own.capability == (9, 0) and sddmm.tma_fact(a, b, layout.block_pattern),
        )
        uses.append(Use("gradient of the layout's values", sddmm.OP, sampled))
    return uses


def _uses_of_sample(a: Tensor, b: Tensor, mask: ReorderedTensor) -> list[Use]:
    pattern = mask.block_pattern
    own = sddmm.facts(a, b, pattern)
    if mask.axis == -1:
        pattern = transpose_pattern(pattern)
    uses = [Use("forward", sddmm.OP, own)]
    for name, factor, gradient in block_matmul.gradients_of_sample(own, a, b, pattern):
        if torch.is_grad_enabled() and factor.requires_grad:
            uses.append(Use(f"gradient of {name}", block_matmul.OP, gradient))
    return uses


FAMILY = Family(multiply, sample, _uses, _uses_of_sample, multiply)
register_products(ReorderedTensor, FAMILY)
