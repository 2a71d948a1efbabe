"""The routes of a layout's products: faces of torch's, read as the one product of its family.

`x @ W` is `(W.mT @ x.mT).mT`, `F.linear(x, W)` is `(W @ x.mT).mT`; nothing is copied for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.dispatch import Use, route
from sparse_layouts.kernels.linear_layers import check_bias, linear_layer
from sparse_layouts.kernels.products import (
    Family,
    autocast,
    check,
    check_sampled,
    declines,
    from_the_right,
    product,
    rows_as_columns,
    sampled_product,
    transposed,
)
from sparse_layouts.layout_tensor import LayoutTensor


def register_products(layout_class: type[LayoutTensor], family: Family) -> None:
    """Registers the routes of `w @ x`, `x @ w`, `F.linear(x, w)` and `torch.sparse.sampled_addmm`,
    which `sl.sddmm` calls, for a layout; the other faces (`mm`, `bmm`, `addmm`, `einsum`, ...) are
    served by these.
    """

    def uses_of_layout_dense(input: Any, other: Tensor) -> Any:
        if declines(input, other):
            return NotImplemented
        input, other = autocast(input, other)
        check(input, other, -2, -1, "matmul")
        return family.uses(input, other[:, None] if other.dim() == 1 else other, False)

    @route(torch.matmul, input=layout_class, uses=uses_of_layout_dense)
    def layout_times_dense(input: Any, other: Tensor) -> Any:
        if declines(input, other):
            return NotImplemented
        input, other = autocast(input, other)
        check(input, other, -2, -1, "matmul")
        if other.dim() == 1:
            return product(family, input, other[:, None])[..., 0]
        return product(family, input, other)

    def uses_of_dense_layout(input: Tensor, other: Any) -> Any:
        if declines(other, input):
            return NotImplemented
        other, input = autocast(other, input)
        check(other, input, -1, -2, "matmul")
        flipped = transposed(other)
        return family.uses(flipped, rows_as_columns(input, flipped), True)

    @route(torch.matmul, other=layout_class, uses=uses_of_dense_layout)
    def dense_times_layout(input: Tensor, other: Any) -> Any:
        if declines(other, input):
            return NotImplemented
        other, input = autocast(other, input)
        check(other, input, -1, -2, "matmul")
        flipped = transposed(other)
        if input.dim() == 1:
            return product(family, flipped, input[:, None])[..., 0]
        return from_the_right(family, input, flipped)

    def uses_of_linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
        if declines(weight, input):
            return NotImplemented
        weight, input, bias = autocast(weight, input, bias)
        check(weight, input, -1, -1, "linear")
        check_bias(bias, weight.matrix_shape[0], input)
        return family.uses(weight, rows_as_columns(input, weight), True)

    @route(F.linear, weight=layout_class, uses=uses_of_linear)
    def linear(
        input: Tensor, weight: Any, bias: Tensor | None = None, *, activation: str | None = None
    ) -> Any:
        if declines(weight, input):
            return NotImplemented
        weight, input, bias = autocast(weight, input, bias)
        if weight.dim() != 2:
            raise ValueError(f"linear: expected a 2-D weight, got shape {tuple(weight.shape)}")
        check(weight, input, -1, -1, "linear")
        check_bias(bias, weight.matrix_shape[0], input)
        return linear_layer(family, input, weight, bias, activation)

    def uses_of_sampled_addmm(
        input: Any, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0
    ) -> list[Use]:
        check_sampled(mat1, mat2, input)
        return family.uses_of_sample(mat1, mat2, input)

    @route(torch.sparse.sampled_addmm, input=layout_class, uses=uses_of_sampled_addmm)
    def sampled_addmm(
        input: Any, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0
    ) -> Any:
        check_sampled(mat1, mat2, input)
        out = sampled_product(family, mat1, mat2, input)
        scaled = out if alpha == 1 else out * alpha
        if beta == 0 or input.stored_values is None:
            return scaled
        return scaled + (input if beta == 1 else input * beta)
