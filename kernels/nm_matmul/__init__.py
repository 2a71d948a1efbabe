"""nm_matmul: an n:m layout times a dense matrix, either way round, with gradients to both.

`out = W @ x`, W (*batch, *lead, M, K) an NMTensor, x dense; the other products are made of this one
(`kernels/products.py`), those of a transposed layout with `transposed`. The gradient to W is
`nm_sddmm`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.dispatch import Facts, Use, choose, current, facts_of, register_kernel, run
from sparse_layouts.kernels import nm_sddmm, requirements
from sparse_layouts.kernels.nm_matmul import reference
from sparse_layouts.kernels.product_routes import register_products
from sparse_layouts.kernels.products import Family, broadcast_product, power_of_two
from sparse_layouts.nm_fragments import FRAGMENTS, ROWS, by_rows, has_fragments, row_indices
from sparse_layouts.nm_tensor import NMTensor

OP = "nm_matmul"
_HERE = "sparse_layouts.kernels.nm_matmul"
# those that take entries by fragments
BY_FRAGMENTS = (
    register_kernel(
        OP, "fragments", f"{_HERE}.hopper_fragments:nm_matmul", requirements.nm_by_fragments
    ),
    register_kernel(
        OP,
        "fragments_expand",
        f"{_HERE}.triton_expand_fragments:nm_matmul",
        requirements.expand_fragments,
    ),
)
for _name, _function, _requires in (
    ("semi_structured", "semi_structured:nm_matmul", requirements.semi_structured),
    ("triton_expand", "triton_expand:nm_matmul_in_scratch_memory", requirements.triton_expand_nm),
    ("triton", "triton_nm_matmul:nm_matmul", requirements.triton_floats),
    ("cpu_mkl", "cpu:nm_matmul_mkl", requirements.cpu_mkl_nm),
    ("cpu", "cpu:nm_matmul", requirements.cpu),
):
    register_kernel(OP, _name, f"{_HERE}.{_function}", requirements.row_by_row(_requires))


def facts(
    values: Tensor,
    n: int,
    m: int,
    columns: int,
    matrix: tuple[int, int],
    transposed: bool,
    order: str = ROWS,
) -> Facts:
    """What the choice of a kernel depends on: of entries by fragments what takes these, and else,
    as they are then brought into rows, what takes those.
    """
    found = facts_of(
        values,
        n_of_m=(n, m),
        columns=power_of_two(columns),
        transposed=transposed,
        divisor=math.gcd(*matrix, 64),
        order=order,
        fragments=has_fragments(n, m, *matrix),
    )
    return found if order == ROWS or _taken_as_it_lies(found) else found._replace(order=ROWS)


def _taken_as_it_lies(found: Facts) -> bool:
    """Whether a kernel for fragments is the one that is chosen."""
    asked = dict(current().choices).get(OP)
    takes = [row for row in BY_FRAGMENTS if asked in (None, row.name)]
    able = any(row.requires(found) is None for row in takes)
    return able and choose(OP, found) in BY_FRAGMENTS


def _launch(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    n: int,
    m: int,
    transposed: bool,
    transposed_output: bool,
    order: str,
) -> Tensor:
    matrix = (values.shape[-2], values.shape[-1] // n * m)
    batch = max(values.shape[0], x.shape[0]) if values.shape[0] and x.shape[0] else 0
    if batch == 0:
        values, x = values[:0], x[:0]
    own = facts(values, n, m, x.shape[-1], matrix, transposed, order)
    more = {}
    if own.order == FRAGMENTS:
        more = {"order": FRAGMENTS}
    elif order == FRAGMENTS:
        indices = row_indices(indices, n, m, matrix[1])
        values = by_rows(values, n, m)
    dense = values.shape[0] * values.shape[1] * math.prod(matrix) * values.element_size()
    return run(
        OP,
        own,
        reference.nm_matmul,
        dense,
        values,
        indices,
        x,
        n=n,
        m=m,
        transposed=transposed,
        transposed_output=transposed_output,
        **more,
    )


def _shape(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    n: int,
    m: int,
    transposed: bool,
    transposed_output: bool,
    order: str,
) -> Tensor:
    batch = torch.broadcast_shapes(values.shape[:1], x.shape[:1])[0]
    rows = values.shape[-1] // n * m if transposed else values.shape[-2]
    patterns, columns = x.shape[1], x.shape[-1]
    if transposed_output:
        return x.new_empty(batch, patterns, columns, rows).mT
    return x.new_empty(batch, patterns, rows, columns)


nm_matmul_op = opaque.define(
    OP,
    "Tensor values, Tensor indices, Tensor x, int n, int m, bool transposed, "
    "bool transposed_output, str order",
    _launch,
    _shape,
)


def multiply(layout: NMTensor, x: Tensor, transposed_output: bool = False) -> Tensor:
    """`W @ x` with broadcasting over the leading dimensions, without autograd."""
    values, lead = layout.inner_values, layout.lead
    assert values is not None
    patterns, indices = math.prod(lead), layout.inner_indices
    transposed = layout.axis == -2

    def product_of_one(flat_values: Tensor, flat_x: Tensor) -> Tensor:
        each = flat_values.reshape(flat_values.shape[0], patterns, *flat_values.shape[-2:])
        if each.shape[0] > 1 and each.stride(0) == 0:  # one batch for all: read once
            each = each[:1]
        return nm_matmul_op(
            each,
            indices,
            flat_x,
            layout.n,
            layout.m,
            transposed,
            transposed_output,
            layout.order,
        )

    rows = layout.columns if transposed else layout.rows
    return broadcast_product(values, len(lead) + 2, lead, rows, x, product_of_one)


def _uses(layout: NMTensor, x: Tensor, transposed_output: bool = False) -> list[Use]:
    values = layout.inner_values
    assert values is not None
    matrix = (layout.rows, layout.columns)

    def product(purpose: str, transposed: bool) -> Use:
        own = facts(values, layout.n, layout.m, x.shape[-1], matrix, transposed, layout.order)
        moved = own.order != layout.order
        return Use(purpose + ", entries brought into rows first" * moved, OP, own)

    transposed = layout.axis == -2
    uses = [product("forward", transposed)]
    if torch.is_grad_enabled() and x.requires_grad:
        uses.append(product("gradient of the dense operand", not transposed))
    if torch.is_grad_enabled() and layout.requires_grad:
        sampling = facts_of(values, n_of_m=(layout.n, layout.m))
        uses.append(Use("gradient of the layout's values", "nm_sddmm", sampling))
    return uses


def _uses_of_sample(a: Tensor, b: Tensor, mask: NMTensor) -> list[Use]:
    n, m, matrix, inner = mask.n, mask.m, (mask.rows, mask.columns), a.shape[-1]
    uses = [Use("forward", nm_sddmm.OP, nm_sddmm.facts(a, n, m))]
    for name, factor, transposed in (("a", a, mask.axis == -2), ("b", b, mask.axis == -1)):
        if torch.is_grad_enabled() and factor.requires_grad:
            own = facts(a, n, m, inner, matrix, transposed)
            uses.append(Use(f"gradient of {name}", OP, own))
    return uses


FAMILY = Family(multiply, nm_sddmm.sample, _uses, _uses_of_sample)
register_products(NMTensor, FAMILY)
