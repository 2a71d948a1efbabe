"""Products of a layout and a dense matrix, for every kind of layout: checks, faces, autograd.

An op's folder says in a :class:`Family` how one kind multiplies; `product_routes.py` makes the
routes. `out = W @ x`, W (*batch, M, K) a layout, x dense; its gradients are, to x, `W.mT @ g`, and
to W the sampled product `g @ x.mT` at its stored entries, in its layout. Those of a sampled product
`S = a @ b` are `G @ b.mT` and `a.mT @ G`, G the gradient in the layout: products again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.dispatch import Use, current, restored
from sparse_layouts.layout_autograd import (
    apply,
    as_layout,
    check_version,
    differentiates,
    unwrapped,
    version_of,
)
from sparse_layouts.layout_routes import transpose_layout
from sparse_layouts.layout_tensor import LayoutTensor


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of layout multiplies.

    `multiply(layout, x, transposed_output)` is `W @ x` without autograd, x (*any, K, N) broadcast
    against the layout's leading dimensions; with `transposed_output` the storage of the result is
    that of a contiguous (..., N, M). `sample(a, b, mask)` is `a @ b` at the mask's stored entries
    without autograd, in its layout; the dimensions before the mask's own are the batch. `uses` and
    `uses_of_sample`, with the same operands, list the ops for `sl.explain`. `fused(layout, x,
    transposed_output, bias, activation)` is `activation(W @ x + bias)` in one kernel, where a kind
    has that.
    """

    multiply: Callable[[Any, Tensor, bool], Tensor]
    sample: Callable[[Tensor, Tensor, Any], Any]
    uses: Callable[[Any, Tensor, bool], list[Use]]
    uses_of_sample: Callable[[Tensor, Tensor, Any], list[Use]]
    fused: Callable[[Any, Tensor, bool, Tensor | None, str | None], Tensor] | None = None


class LayoutProduct(torch.autograd.Function):
    """`W @ x`; its gradients are products and sampled products again, and so can be
    differentiated.
    """

    @staticmethod
    def forward(family: Family, layout: LayoutTensor, x: Tensor, transposed_output: bool) -> Tensor:
        return family.multiply(layout, x, transposed_output)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.family = inputs[0]
        x = inputs[2]
        # the gradient to a frozen layout is all that reads x; a compiler looks for itself
        reads_x = ctx.needs_input_grad[1] or torch.compiler.is_compiling()
        ctx.save_for_backward(inputs[1], x if reads_x else None)
        ctx.shape = None if reads_x else x.shape
        ctx.settings, ctx.version = current(), version_of(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint gives them away
        family, layout, x = ctx.family, unwrapped(saved[0]), saved[1]
        dlayout = dx = None
        with restored(ctx.settings):
            if ctx.needs_input_grad[1]:
                dlayout = as_layout(sampled_and_summed(family, grad, x.mT, layout), layout)
            if ctx.needs_input_grad[2]:
                check_version(layout, ctx.version)
                shape = x.shape if ctx.shape is None else ctx.shape
                flipped = transposed(layout)
                dx = product(family, flipped, grad, by_columns(grad)).sum_to_size(shape)
        return None, dlayout, dx, None


def by_columns(x: Tensor) -> bool:
    """Whether a matrix lies by columns, as that of `F.linear` does, and so should its product."""
    return x.stride(-1) != 1 and x.stride(-2) == 1


def product(
    family: Family, layout: LayoutTensor, x: Tensor, transposed_output: bool = False
) -> Tensor:
    """`W @ x` of checked operands (x at least 2-D), differentiable."""
    if differentiates(x, layout):
        return apply(LayoutProduct, family, layout, x, transposed_output)
    return family.multiply(layout, x, transposed_output)


class SampledProduct(torch.autograd.Function):
    """`a @ b` at the entries that a mask stores."""

    @staticmethod
    def forward(family: Family, a: Tensor, b: Tensor, mask: LayoutTensor) -> LayoutTensor:
        return family.sample(a, b, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.family = inputs[0]
        ctx.save_for_backward(inputs[1], inputs[2], output)
        ctx.settings = current()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b, saved = ctx.saved_tensors
        gradient = as_layout(grad, unwrapped(saved))
        da = db = None
        with restored(ctx.settings):
            if ctx.needs_input_grad[1]:
                da = product(ctx.family, gradient, b.mT).sum_to_size(a.shape)
            if ctx.needs_input_grad[2]:
                flipped = product(ctx.family, transposed(gradient), a, True)
                db = flipped.mT.sum_to_size(b.shape)
        return None, da, db, None


def sampled_product(family: Family, a: Tensor, b: Tensor, mask: LayoutTensor) -> Any:
    """`a @ b` of checked operands at the mask's entries, differentiable."""
    if differentiates(a, b):
        return apply(SampledProduct, family, a, b, mask.detach())
    return family.sample(a, b, mask)


def sampled_and_summed(family: Family, a: Tensor, b: Tensor, layout: LayoutTensor) -> Any:
    """`a @ b` at the layout's entries, summed over the dimensions that the layout lacks or has with
    size 1: one product, and nothing to add.
    """
    return sampled_product(family, *fold_summed(a, b, tuple(layout.shape[:-2])), layout)


def transposed(layout: LayoutTensor) -> Any:
    """`layout.mT`, differentiable."""
    return transpose_layout(layout, -2, -1)


def broadcast_product(
    values: Tensor,
    entry_dims: int,
    lead: tuple[int, ...],
    rows: int,
    x: Tensor,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`multiply` over broadcast leading dimensions.

    values (*batch, *entries) with `entry_dims` entry dimensions, on patterns of their own for every
    index of `lead`; x (*any, K, N). `multiply` takes values (B, *entries) and x (B, P, K, N), P the
    product of `lead`, and returns (B, P, rows, N). Returns (*broadcast(batch + lead, any), rows,
    N).

    A pattern's leading indices are its own: x expands to them, never the other way round.
    """
    width = len(lead)
    batch: tuple[int, ...] = values.shape[: values.dim() - entry_dims]
    entries = values.shape[-entry_dims:]
    outer = x.shape[:-2]
    k, n = x.shape[-2:]
    if not batch and not width:
        flat = x.reshape(math.prod(outer), 1, k, n) if outer else x[None, None]
        out = multiply(values[None], flat)
        return out.reshape(*outer, rows, n) if outer else out[0, 0]
    if math.prod(lead) == 1 and width:  # one pattern broadcasts like any other dimension of size 1
        batch, width = (*batch, *lead), 0
        values = values.reshape(*batch, *entries)
        lead = ()
    try:
        whole = torch.broadcast_shapes(outer, (*batch, *lead))
    except RuntimeError:
        whole = torch.Size()
    if whole[len(whole) - width :] != lead or len(whole) < len(batch) + width:
        raise ValueError(
            f"matmul: leading dimensions {tuple(outer)} of the dense operand do not broadcast to "
            f"the layout's {(*batch, *lead)}"
        )
    own_batch = whole[: len(whole) - width]
    flat_x = x.expand(*whole, k, n).reshape(math.prod(own_batch), math.prod(lead), k, n)
    flat_values = values.expand(*own_batch, *entries).reshape(math.prod(own_batch), *entries)
    return multiply(flat_values, flat_x).reshape(*whole, rows, n)


def fold_summed(a: Tensor, b: Tensor, own: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Operands of a product `a @ b` (..., M, K) and (..., K, N) whose leading dimensions are `own`.

    Those that `own` lacks or has with size 1 are laid end to end along the contracted dimension:
    the product then is summed over them, in one product, with nothing to add.
    """
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    aligned = (1,) * (len(outer) - len(own)) + own
    folded = [i for i, size in enumerate(outer) if size != 1 and aligned[i] == 1]
    if not folded and len(outer) <= len(own):
        return a, b
    kept = [i for i in range(len(outer)) if i not in folded]
    end = len(outer)
    m, n = a.shape[-2], b.shape[-1]
    a = a.expand(*outer, *a.shape[-2:]).permute(*kept, end, *folded, end + 1)
    b = b.expand(*outer, *b.shape[-2:]).permute(*kept, *folded, end, end + 1)
    inner = a.shape[-1] * math.prod(outer[i] for i in folded)
    a = a.reshape(*own, m, inner)
    return a, b.reshape(*own, a.shape[-1], n)


def check(layout: LayoutTensor, dense: Any, contracted: int, own: int, what: str) -> None:
    """Raises for operands that do not fit: what was expected, what came, the way out."""
    if not isinstance(dense, Tensor):
        raise TypeError(f"{what}: expected a tensor, got {type(dense).__name__}")
    # a plain tensor: its properties cost nothing, the layout's 1.5 us each
    values = layout.stored_values
    if values is None:
        raise TypeError(
            f"{what}: a mask layout has no values to multiply; convert it first: "
            f"mask.to({dense.dtype})"
        )
    _check_strided(dense, what)
    if values.dtype != dense.dtype:
        raise TypeError(
            f"{what}: expected one dtype, got {values.dtype} and {dense.dtype}; convert one with "
            f".to(dtype)"
        )
    if values.device != dense.device:
        raise ValueError(
            f"{what}: the layout is on {values.device}, the dense operand on {dense.device}"
        )
    if dense.dim() == 0:
        raise ValueError(f"{what}: the dense operand has no dimension")
    size = dense.shape[contracted] if dense.dim() > 1 else dense.shape[0]
    wanted = layout.matrix_shape[own]
    if size != wanted:
        raise ValueError(
            f"{what}: shapes {tuple(layout.shape)} (layout) and {tuple(dense.shape)} do not fit: "
            f"{wanted} and {size} must be equal"
        )


def _check_strided(dense: Tensor, what: str) -> None:
    """Raises for one of torch's own sparse tensors, which kernels cannot read."""
    if dense.layout != torch.strided:
        raise TypeError(
            f"{what}: expected a dense operand beside the layout, got one of {dense.layout}; pass "
            "x.to_dense()"
        )


def check_sampled(a: Any, b: Any, mask: LayoutTensor) -> None:
    """Raises for operands of a sampled product that do not fit: what was expected, what came."""
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or isinstance(t, LayoutTensor):
            raise TypeError(f"sddmm: {name} is a dense tensor, got {type(t).__name__}")
        _check_strided(t, "sddmm")
        if not t.dtype.is_floating_point:
            raise TypeError(f"sddmm: {name} is floating, got {t.dtype}; convert it with .float()")
        if t.dim() < 2:
            raise ValueError(
                f"sddmm: {name} is at least 2-D, got shape {tuple(t.shape)}; a vector is x[:, None]"
            )
        if t.device != mask.device:
            raise ValueError(f"sddmm: {name} is on {t.device}, the mask on {mask.device}")
    if a.dtype != b.dtype:
        raise TypeError(f"sddmm: expected one dtype, got {a.dtype} and {b.dtype}")
    m, n = mask.matrix_shape
    if a.shape[-2] != m or b.shape[-1] != n or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"sddmm: expected a (..., {m}, K) and b (..., K, {n}) for a mask of {(m, n)}, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if mask.pattern_dims == 2:
        return
    lead = tuple(mask.shape[mask.dim() - mask.pattern_dims : -2])
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    whole = torch.broadcast_shapes(outer, lead)
    if tuple(whole[len(whole) - len(lead) :]) != lead:
        raise ValueError(f"sddmm: leading dimensions {tuple(outer)} do not fit the mask's {lead}")


def declines(layout: LayoutTensor, dense: Any) -> bool:
    """Whether a product of integers or complex numbers, which torch can do and no kernel here."""
    values = layout.stored_values
    return (
        values is not None
        and isinstance(dense, Tensor)
        and values.dtype == dense.dtype
        and not values.dtype.is_floating_point
    )


def autocast(layout: Any, *dense: Any) -> tuple[Any, ...]:
    """The operands in autocast's dtype, where it is on: intercepted above the dispatcher, its own
    rule does not run.
    """
    values = layout.stored_values
    device = (layout if values is None else values).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return (layout, *dense)
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return tuple(cast(t) for t in (layout, *dense))


def rows_as_columns(x: Tensor, flipped: LayoutTensor) -> Tensor:
    """x.mT for `flipped @ x.mT`: one matrix takes all of x's rows at once, several theirs each."""
    if x.dim() == 1:
        return x[:, None]
    if x.dim() > 2 and flipped.dim() == 2:
        return x.flatten(0, -2).mT
    return x.mT


def from_the_right(family: Family, x: Tensor, flipped: LayoutTensor) -> Tensor:
    """`x @ flipped.mT` of an x with at least two dimensions."""
    out = product(family, flipped, rows_as_columns(x, flipped), True).mT
    return out.reshape(*x.shape[:-1], flipped.matrix_shape[0]) if out.dim() < x.dim() else out


def tma_readable(x: Tensor) -> bool:
    """Whether the copy engine can read the matrices of x (*any, M, N), or their transposes: one
    dimension unbroken, the others in steps of 16 bytes or, but for the matrix's own, of none.
    """
    bytes_of = x.element_size()
    *outer, rows, columns = x.stride()
    if columns != 1 and rows != 1:
        return False
    step = rows if columns == 1 else columns
    return (
        x.numel() > 0
        and step > 0
        and step * bytes_of % 16 == 0
        and x.data_ptr() % 16 == 0
        and all(s * bytes_of % 16 == 0 for size, s in zip(x.shape, outer, strict=False) if size > 1)
    )


def power_of_two(size: int) -> int:
    """The smallest that is not less, 0 of 0: how sizes count as facts, so that lengths make no new
    choices.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0


# The smallest matrix of blocks that is worth writing out densely.
LARGE_ENTRIES = 2**22


def sixteenths_fact(pattern: BlockPattern) -> int:
    """Sixteenths of the entries of a pattern's matrices that stored blocks hold, rounded down; 0
    for small matrices.
    """
    entries, patterns = math.prod(pattern.shape), pattern.num_patterns
    if entries < LARGE_ENTRIES or patterns == 0:
        return 0
    stored = pattern.num_blocks * math.prod(pattern.block_size)
    return min(16, 16 * stored // (entries * patterns))


# A result of so few tiles of 64 rows and 128 columns leaves most of a GPU idle, and a block row
# that stores so many entries of a row of the matrix, in the mean, is worth cutting. Blocks of 64, a
# quarter stored, bf16, in graphs on an H200 (2026-11-27), us cut and, in an earlier run, by the
# Hopper kernel's tiles: 512 x 16384 times 256 columns 18.5 and 26, 1024 x 8192 times 128 13 and 15,
# 256 x 16384 times 128 14 and 19, half of 64 x 32768 times 128 14 and 48, a tenth of 512 x 65536
# times 256 21 and 36.
FEW_TILES = 16
LONG_ROW = 1024


def long_rows_fact(pattern: BlockPattern, x: Tensor) -> bool:
    """Whether a product with x (*any, K, N) has few block rows to share out, and long ones."""
    p = pattern
    matrices = max(p.num_patterns, math.prod(x.shape[:-2]))
    tiles = matrices * -(-p.shape[0] // 64) * -(-x.shape[-1] // 128)
    stored = p.num_blocks * p.block_size[1]
    return 0 < tiles <= FEW_TILES and stored >= LONG_ROW * p.num_patterns * p.grid[0]


def like_result(rows: int, x: Tensor, transposed_output: bool) -> Tensor:
    """A tensor without memory that lies as the product of a layout of so many rows and x, and as
    its gradient.
    """
    shape = (*x.shape[:-2], rows, x.shape[-1])
    if transposed_output:
        return torch.empty(*shape[:-2], shape[-1], rows, dtype=x.dtype, device="meta").mT
    return torch.empty(shape, dtype=x.dtype, device="meta")
