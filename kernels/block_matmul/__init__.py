"""block_matmul: a block layout times a dense matrix, either way round, with gradients to both.

`out = W @ x`, W (*batch, *lead, M, K) a BSRTensor, x dense; the other products are made of this one
(`kernels/products.py`), a transposed W by its column lists. The gradient to W is `sddmm`. A linear
layer's bias and activation are part of it: `activation(W @ x + bias)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import (
    Facts,
    Use,
    capability_of,
    facts_of,
    register_kernel,
    run,
)
from sparse_layouts.kernels import requirements, sddmm
from sparse_layouts.kernels.block_matmul import reference
from sparse_layouts.kernels.operand_copies import reads_well, uses_of_each
from sparse_layouts.kernels.product_routes import register_products
from sparse_layouts.kernels.products import (
    Family,
    broadcast_product,
    long_rows_fact,
    power_of_two,
    sixteenths_fact,
)

OP = "block_matmul"
_HERE = "sparse_layouts.kernels.block_matmul"
for _name, _module, _requires in (
    ("dense_scratch", "triton_dense_scratch", requirements.dense_matmul),
    ("hopper", "hopper_block_matmul", requirements.hopper_block_matmul),
    ("hopper_few_columns", "hopper_few_columns", requirements.hopper_few_columns),
    ("triton_few_columns", "triton_few_columns", requirements.triton_few_columns),
    ("triton", "triton_block_matmul", requirements.triton_blocks),
    ("cpu", "cpu", requirements.cpu),
):
    register_kernel(OP, _name, f"{_HERE}.{_module}:block_matmul", _requires)


def facts(
    values: Tensor, pattern: BlockPattern, x: Tensor, transposed_output: bool = False
) -> Facts:
    """What the choice of a kernel depends on."""
    columns, p = x.shape[-1], pattern
    rows = uses_of_each(p.num_blocks * p.block_size[0], p.num_patterns * p.grid[1])
    unbroken = pattern.shape[0] if transposed_output else columns
    return facts_of(
        values,
        block_size=pattern.block_size,
        columns=power_of_two(columns),
        tma=capability_of(values.device) == (9, 0)
        and reads_well(values, columns)
        and reads_well(x, rows)
        and unbroken * values.element_size() % 16 == 0,
        sixteenths=sixteenths_fact(pattern),
        long_rows=long_rows_fact(pattern, x, columns),
    )


def _launch(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    transposed_output: bool,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    batch = max(values.shape[0], x.shape[0]) if values.shape[0] and x.shape[0] else 0
    patterns = pattern.num_patterns
    dense = values.shape[0] * patterns * math.prod(pattern.shape) * values.element_size()
    own = facts(values, pattern, x, transposed_output)
    if values.shape[0] != batch:
        values = values.expand(batch, -1, -1, -1)
    if x.shape[0] != batch:
        x = x.expand(batch, -1, -1, -1)
    # a user's own kernel of products alone need not know of these
    more = {} if bias is None and activation is None else {"bias": bias, "activation": activation}
    return run(
        OP,
        own,
        reference.block_matmul,
        dense,
        values,
        pattern,
        x,
        transposed_output=transposed_output,
        **more,
    )


def _shape(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    transposed_output: bool,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    batch = max(values.shape[0], x.shape[0])
    m, n = pattern.shape[0], x.shape[-1]
    if transposed_output:
        return x.new_empty(batch, pattern.num_patterns, n, m).mT
    return x.new_empty(batch, pattern.num_patterns, m, n)


block_matmul_op = opaque.define(
    OP,
    "Tensor values, {pattern}, Tensor x, bool transposed_output, Tensor? bias, str? activation",
    _launch,
    _shape,
)


def multiply(
    layout: BSRTensor,
    x: Tensor,
    transposed_output: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`activation(W @ x + bias)` with broadcasting over the leading dimensions, without autograd;
    bias (M,).
    """
    assert layout.inner_values is not None
    pattern = layout.block_pattern
    return multiply_blocks(layout.inner_values, pattern, x, transposed_output, bias, activation)


def multiply_blocks(
    values: Tensor,
    pattern: BlockPattern,
    x: Tensor,
    transposed_output: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The same of `values` (*batch, S, bm, bn) on a pattern."""

    def product_of_one(flat_values: Tensor, flat_x: Tensor) -> Tensor:
        return block_matmul_op(flat_values, pattern, flat_x, transposed_output, bias, activation)

    return broadcast_product(values, 3, pattern.lead, pattern.shape[0], x, product_of_one)


def _uses(layout: BSRTensor, x: Tensor, transposed_output: bool = False) -> list[Use]:
    assert layout.inner_values is not None
    pattern = layout.block_pattern
    own = facts(layout.inner_values, pattern, x, transposed_output)
    flipped = _flipped(own, pattern, x, x.shape[-1])
    sampled = own._replace(partial=sddmm.is_partial(pattern))
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and x.requires_grad:
        uses.append(Use("gradient of the dense operand", OP, flipped))
    if torch.is_grad_enabled() and layout.requires_grad:
        uses.append(Use("gradient of the layout's values", "sddmm", sampled))
    return uses


def _flipped(own: Facts, pattern: BlockPattern, operand: Tensor, columns: int) -> Facts:
    """The facts of a product with the transpose."""
    long_rows = long_rows_fact(pattern, operand, columns, transposed=True)
    return own._replace(block_size=own.block_size[::-1], long_rows=long_rows)


def _uses_of_sample(a: Tensor, b: Tensor, mask: BSRTensor) -> list[Use]:
    own = sddmm.facts(a, b, mask.block_pattern)
    columns, pattern = a.shape[-1], mask.block_pattern
    long_rows = long_rows_fact(pattern, a, columns)
    product = own._replace(partial=False, long_rows=long_rows)
    flipped = _flipped(product, pattern, a, columns)
    uses = [Use("forward", sddmm.OP, own)]
    for name, factor, gradient in (("a", a, product), ("b", b, flipped)):
        if torch.is_grad_enabled() and factor.requires_grad:
            uses.append(Use(f"gradient of {name}", OP, gradient))
    return uses


FAMILY = Family(multiply, sddmm.sample, _uses, _uses_of_sample, multiply)
register_products(BSRTensor, FAMILY)
