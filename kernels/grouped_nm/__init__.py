"""grouped_nm_matmul and grouped_nm_sddmm: a grouped n:m layout times a dense matrix, either way
round, and a dense product at its stored entries, which is the gradient of its values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.dispatch import (
    Facts,
    Use,
    facts_of,
    register_kernel,
    run,
)
from sparse_layouts.grouped_nm_tensor import GroupedNMTensor
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.grouped_nm import reference
from sparse_layouts.kernels.product_routes import register_products
from sparse_layouts.kernels.products import Family, broadcast_product

OP, SDDMM = "grouped_nm_matmul", "grouped_nm_sddmm"
for _op in (OP, SDDMM):
    register_kernel(_op, "cpu", f"sparse_layouts.kernels.grouped_nm.cpu:{_op}", requirements.cpu)


def facts(values: Tensor, n: int, m: int) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(values, n_of_m=(n, m))


def _launch(
    values: Tensor,
    columns: Tensor,
    x: Tensor,
    n: int,
    m: int,
    g: int,
    shape: tuple[int, int],
    transposed: bool,
    transposed_output: bool,
) -> Tensor:
    dense = values.shape[0] * math.prod(shape) * values.element_size()
    own = facts(values, n, m)
    return run(
        OP,
        own,
        reference.grouped_nm_matmul,
        dense,
        values,
        columns,
        x,
        n=n,
        m=m,
        g=g,
        shape=tuple(shape),
        transposed=transposed,
        transposed_output=transposed_output,
    )


def _shape(
    values: Tensor,
    columns: Tensor,
    x: Tensor,
    n: int,
    m: int,
    g: int,
    shape: tuple[int, int],
    transposed: bool,
    transposed_output: bool,
) -> Tensor:
    batch = torch.broadcast_shapes(values.shape[:1], x.shape[:1])[0]
    rows, width = shape[1 if transposed else 0], x.shape[-1]
    if transposed_output:
        return x.new_empty(batch, width, rows).mT
    return x.new_empty(batch, rows, width)


grouped_nm_matmul_op = opaque.define(
    OP,
    "Tensor values, Tensor columns, Tensor x, int n, int m, int g, SymInt[] shape, "
    "bool transposed, bool transposed_output",
    _launch,
    _shape,
)


def _launch_sddmm(
    a: Tensor, b: Tensor, columns: Tensor, n: int, m: int, g: int, shape: tuple[int, int]
) -> Tensor:
    dense = a.shape[0] * math.prod(shape) * a.element_size()
    own = facts(a, n, m)
    return run(SDDMM, own, reference.grouped_nm_sddmm, dense, a, b, columns, n=n, m=m, g=g)


def _shape_sddmm(
    a: Tensor, b: Tensor, columns: Tensor, n: int, m: int, g: int, shape: tuple[int, int]
) -> Tensor:
    return a.new_empty(a.shape[0], *columns.shape, n)


grouped_nm_sddmm_op = opaque.define(
    SDDMM,
    "Tensor a, Tensor b, Tensor columns, int n, int m, int g, SymInt[] shape",
    _launch_sddmm,
    _shape_sddmm,
)


def multiply(layout: GroupedNMTensor, x: Tensor, transposed_output: bool = False) -> Tensor:
    """`W @ x` with broadcasting over the leading dimensions, without autograd."""
    values = layout.inner_values
    assert values is not None
    transposed = layout.axis == -1
    shape = (layout.rows, layout.cols)

    def product_of_one(flat_values: Tensor, flat_x: Tensor) -> Tensor:
        return grouped_nm_matmul_op(
            flat_values,
            layout.inner_columns,
            flat_x[:, 0],
            layout.n,
            layout.m,
            layout.g,
            shape,
            transposed,
            transposed_output,
        ).unsqueeze(1)

    rows = shape[1 if transposed else 0]
    return broadcast_product(values, 3, (), rows, x, product_of_one)


def sample(a: Tensor, b: Tensor, mask: GroupedNMTensor) -> GroupedNMTensor:
    """`a @ b` at the mask's entries, without autograd."""
    if mask.axis == -1:  # (a b)' = b' a'
        a, b = b.mT, a.mT
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])

    def flat(t: Tensor) -> Tensor:
        return t.expand(*outer, *t.shape[-2:]).reshape(math.prod(outer), *t.shape[-2:])

    shape = (mask.rows, mask.cols)
    columns = mask.inner_columns
    values = grouped_nm_sddmm_op(flat(a), flat(b), columns, mask.n, mask.m, mask.g, shape)
    return mask.like_self(values.view(*outer, *values.shape[1:]))


def _uses(layout: GroupedNMTensor, x: Tensor, transposed_output: bool = False) -> list[Use]:
    assert layout.inner_values is not None
    own = facts(layout.inner_values, layout.n, layout.m)
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and x.requires_grad:
        uses.append(Use("gradient of the dense operand", OP, own))
    if torch.is_grad_enabled() and layout.requires_grad:
        uses.append(Use("gradient of the layout's values", SDDMM, own))
    return uses


def _uses_of_sample(a: Tensor, b: Tensor, mask: GroupedNMTensor) -> list[Use]:
    own = facts(a, mask.n, mask.m)
    uses = [Use("forward", SDDMM, own)]
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        uses.append(Use("gradients of a and b", OP, own))
    return uses


FAMILY = Family(multiply, sample, _uses, _uses_of_sample)
register_products(GroupedNMTensor, FAMILY)
