"""`a & b`, `a | b` and `~a` of CSR and CSC masks, without a dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sparse_layouts.compressed_tensor import CompressedTensor
from sparse_layouts.csr_conversions import recompressed
from sparse_layouts.csr_lists import places
from sparse_layouts.dispatch import route

C = TypeVar("C", bound=CompressedTensor)


def _check_masks(what: str, *operands: CompressedTensor) -> None:
    for mask in operands:
        if not mask.is_mask:
            raise TypeError(
                f"{what}: expected masks, got {mask.dtype} values; w.pattern is a tensor's mask"
            )


def _from_places(like: C, where: Tensor) -> C:
    """The mask of ascending places `line * width + index`, on lists as `like` has them."""
    lines, width = like.compressed_shape
    dtype = like.lists[0].dtype
    edges = torch.arange(lines + 1, device=where.device) * width
    offsets = torch.searchsorted(where, edges)
    if where.shape[0] > torch.iinfo(torch.int32).max:
        dtype = torch.int64
    indices = where % max(width, 1)
    return type(like).on_lists(None, offsets.to(dtype), indices.to(dtype), like.matrix_shape)


def _combined(
    input: C, other: CompressedTensor, combine: Callable[[Tensor, Tensor], Tensor], what: str
) -> C:
    _check_masks(what, input, other)
    if input.matrix_shape != other.matrix_shape:
        raise ValueError(
            f"{what}: expected masks of one shape, got {input.matrix_shape} and "
            f"{other.matrix_shape}"
        )
    if input.lists[0].device != other.lists[0].device:
        raise ValueError(
            f"{what}: the masks are on {input.lists[0].device} and {other.lists[0].device}; move "
            "one with .to(device)"
        )
    if type(other) is not type(input):
        other = recompressed(other)
    shape = input.compressed_shape
    return _from_places(input, combine(places(*input.lists, shape), places(*other.lists, shape)))


def _common(a: Tensor, b: Tensor) -> Tensor:
    """What two ascending lists have in common."""
    if not b.numel():
        return a[:0]
    return a[b[torch.searchsorted(b, a).clamp_(max=b.shape[0] - 1)] == a]


def _either(a: Tensor, b: Tensor) -> Tensor:
    """What is in one of two ascending lists, or in both, once."""
    return torch.unique_consecutive(torch.cat([a, b]).sort().values)


@route(torch.bitwise_and, input=CompressedTensor, other=CompressedTensor)
def intersect_masks(input: CompressedTensor, other: CompressedTensor) -> CompressedTensor:
    """`a & b` of masks: the entries that both store, in a's layout. One host sync."""
    return _combined(input, other, _common, "a & b")


@route(torch.bitwise_or, input=CompressedTensor, other=CompressedTensor)
def unite_masks(input: CompressedTensor, other: CompressedTensor) -> CompressedTensor:
    """`a | b` of masks: the entries that either stores, in a's layout. One host sync."""
    return _combined(input, other, _either, "a | b")


@route(torch.bitwise_not, input=CompressedTensor)
def complement_mask(input: CompressedTensor) -> CompressedTensor:
    """`~a` of a mask: every entry that it does not store, in its layout. Memory is that of the
    result, which of a sparse mask is many times larger. One host sync.
    """
    _check_masks("~a", input)
    lines, width = input.compressed_shape
    missing = torch.ones(lines * width, dtype=torch.bool, device=input.lists[0].device)
    missing[places(*input.lists, (lines, width))] = False
    return _from_places(input, missing.nonzero()[:, 0])
