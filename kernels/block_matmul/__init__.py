"""block_matmul: a block layout times a dense matrix, either way round, with gradients to both.

`out = W @ x`, W (*batch, *lead, M, K) a BSRTensor, x dense; the other products are made of this one
(`kernels/products.py`), a transposed W by its column lists. The gradient to W is `sddmm`. A linear
layer's bias and activation are part of it: `activation(W @ x + bias)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
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
    by_columns,
    like_result,
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
    columns = x.shape[-1]
    hopper = capability_of(values.device) == (9, 0)
    return facts_of(
        values,
        block_size=pattern.block_size,
        columns=power_of_two(columns),
        tma=hopper and tma_fact(values, pattern, x, transposed_output),
        sixteenths=sixteenths_fact(pattern),
        long_rows=long_rows_fact(pattern, x),
    )


def tma_fact(
    values: Tensor, pattern: BlockPattern, x: Tensor, transposed_output: bool = False
) -> bool:
    """Whether the copy engine can read the operands, or copies that pay, and write the result."""
    p, columns = pattern, x.shape[-1]
    rows = uses_of_each(p.num_blocks * p.block_size[0], p.num_patterns * p.grid[1])
    unbroken = p.shape[0] if transposed_output else columns
    written = unbroken * values.element_size() % 16 == 0
    return written and reads_well(values, columns) and reads_well(x, rows)


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
    values, pattern = layout.inner_values, layout.block_pattern
    own = facts(values, pattern, x, transposed_output)
    grad = like_result(pattern.shape[0], x, transposed_output)
    flipped = facts(values.mT, transpose_pattern(pattern), grad, by_columns(grad))
    sampled = own._replace(
        partial=sddmm.is_partial(pattern),
        tma=capability_of(x.device) == (9, 0) and sddmm.tma_fact(grad, x.mT, pattern),
    )
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and x.requires_grad:
        uses.append(Use("gradient of the dense operand", OP, flipped))
    if torch.is_grad_enabled() and layout.requires_grad:
        uses.append(Use("gradient of the layout's values", "sddmm", sampled))
    return uses


def _uses_of_sample(a: Tensor, b: Tensor, mask: BSRTensor) -> list[Use]:
    own = sddmm.facts(a, b, mask.block_pattern)
    uses = [Use("forward", sddmm.OP, own)]
    for name, factor, gradient in gradients_of_sample(own, a, b, mask.block_pattern):
        if torch.is_grad_enabled() and factor.requires_grad:
            uses.append(Use(f"gradient of {name}", OP, gradient))
    return uses


def gradients_of_sample(
    own: Facts, a: Tensor, b: Tensor, pattern: BlockPattern
) -> Iterator[tuple[str, Tensor, Facts]]:
    """The factors of `a @ b`, sampled by a pattern, and the facts of the products that are their
    gradients; `own` are those of the sampled product.
    """
    values = torch.empty(pattern.num_blocks, *pattern.block_size, dtype=a.dtype, device="meta")
    flipped = transpose_pattern(pattern)
    for name, factor, g, p, x, turned in (
        ("a", a, values, pattern, b.mT, False),
        ("b", b, values.mT, flipped, a, True),
    ):
        gradient = own._replace(
            block_size=p.block_size,
            columns=power_of_two(x.shape[-1]),
            partial=False,
            tma=capability_of(a.device) == (9, 0) and tma_fact(g, p, x, turned),
            long_rows=long_rows_fact(p, x),
        )
        yield name, factor, gradient


FAMILY = Family(multiply, sddmm.sample, _uses, _uses_of_sample, multiply)
register_products(BSRTensor, FAMILY)
