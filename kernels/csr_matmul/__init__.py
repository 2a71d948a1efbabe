"""csr_matmul: a CSR or CSC matrix times a dense one, either way round, with gradients to both.

`out = W @ x`, W (*batch, M, K) a CSRTensor or CSCTensor, x dense; the other products are made of
this one (`kernels/products.py`). A CSC is the transposed CSR of its transpose, so that every
product of either is this op, `transposed` or not. The gradient to W is `csr_sddmm`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.dispatch import Facts, Use, facts_of, register_kernel, run
from sparse_layouts.kernels import csr_sddmm, requirements
from sparse_layouts.kernels.csr_matmul import reference
from sparse_layouts.kernels.product_routes import register_products
from sparse_layouts.kernels.products import Family, broadcast_product, power_of_two

OP = "csr_matmul"
_HERE = "sparse_layouts.kernels.csr_matmul"
for _name, _function, _requires in (
    ("cusparse", "cusparse:csr_matmul", requirements.cusparse_csr),
    ("triton", "triton_csr_matmul:csr_matmul", requirements.triton_floats),
    ("mkl", "cpu:csr_matmul_mkl", requirements.mkl_csr),
    ("cpu", "cpu:csr_matmul", requirements.cpu),
):
    register_kernel(OP, _name, f"{_HERE}.{_function}", _requires)


def facts(
    values: Tensor, columns: int, entries: int, shape: tuple[int, int], transposed: bool
) -> Facts:
    """What the choice of a kernel depends on.

    `columns` of the dense operand and the mean entries of a row of the result count by powers of
    two; `entries` are those of the matrix of `shape` that is stored.
    """
    rows = shape[1 if transposed else 0]
    return facts_of(
        values,
        columns=power_of_two(columns),
        transposed=transposed,
        row_entries=power_of_two(-(-entries // max(1, rows))),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _launch(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    shape: tuple[int, int],
    transposed: bool,
    transposed_output: bool,
) -> Tensor:
    return run(
        OP,
        facts(values, x.shape[-1], values.shape[-1], shape, transposed),
        reference.csr_matmul,
        values.shape[0] * math.prod(shape) * values.element_size(),
        values.contiguous(),
        crow,
        col,
        x,
        shape=tuple(shape),
        transposed=transposed,
        transposed_output=transposed_output,
    )


def _shape(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    shape: tuple[int, int],
    transposed: bool,
    transposed_output: bool,
) -> Tensor:
    batch = torch.broadcast_shapes(values.shape[:1], x.shape[:1])[0]
    rows, n = shape[1 if transposed else 0], x.shape[-1]
    if transposed_output:
        return x.new_empty(batch, n, rows).mT
    return x.new_empty(batch, rows, n)


csr_matmul_op = opaque.define(
    OP,
    "Tensor values, Tensor crow, Tensor col, Tensor x, SymInt[] shape, bool transposed, "
    "bool transposed_output",
    _launch,
    _shape,
)


def multiply(layout: CompressedTensor, x: Tensor, transposed_output: bool = False) -> Tensor:
    """`W @ x` with broadcasting over the leading dimensions, without autograd."""
    values = layout.inner_values
    assert values is not None
    crow, col = layout.lists
    shape, transposed = layout.compressed_shape, not layout.by_rows
    if values.dim() == 1 and x.dim() == 2:  # the most frequent: 10 us of views less
        values, x = values.unsqueeze(0), x.unsqueeze(0)
        out = csr_matmul_op(values, crow, col, x, shape, transposed, transposed_output)
        return out.squeeze(0)

    def product_of_one(flat_values: Tensor, flat_x: Tensor) -> Tensor:
        x_of_one = flat_x[:, 0]
        out = csr_matmul_op(flat_values, crow, col, x_of_one, shape, transposed, transposed_output)
        return out.unsqueeze(1)

    return broadcast_product(values, 1, (), shape[1 if transposed else 0], x, product_of_one)


def _facts_with(
    layout: CompressedTensor, values: Tensor, columns: int, flipped: bool = False
) -> Facts:
    """The facts of a product with the layout of such values, or with its transpose."""
    entries, transposed = layout.lists[1].shape[0], layout.by_rows == flipped
    return facts(values, columns, entries, layout.compressed_shape, transposed)


def _uses(layout: CompressedTensor, x: Tensor, transposed_output: bool = False) -> list[Use]:
    assert layout.inner_values is not None
    own = _facts_with(layout, layout.inner_values, x.shape[-1])
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and x.requires_grad:
        back = _facts_with(layout, layout.inner_values, x.shape[-1], True)
        uses.append(Use("gradient of the dense operand", OP, back))
    if torch.is_grad_enabled() and layout.requires_grad:
        uses.append(Use("gradient of the layout's values", "csr_sddmm", facts_of(x)))
    return uses


def _uses_of_sample(a: Tensor, b: Tensor, mask: CompressedTensor) -> list[Use]:
    uses = [Use("forward", csr_sddmm.OP, facts_of(a))]
    if torch.is_grad_enabled() and a.requires_grad:
        uses.append(Use("gradient of a", OP, _facts_with(mask, a, a.shape[-1])))
    if torch.is_grad_enabled() and b.requires_grad:
        uses.append(Use("gradient of b", OP, _facts_with(mask, a, a.shape[-1], True)))
    return uses


FAMILY = Family(multiply, csr_sddmm.sample, _uses, _uses_of_sample)
register_products(CompressedTensor, FAMILY)
