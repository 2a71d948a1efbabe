"""Which lists of a pattern each query head reads, and where its bias blocks lie; derived once a
pattern.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, expand_heads
from sparse_layouts.derived import derived

if TYPE_CHECKING:
    from sparse_layouts.bsr_tensor import BSRTensor


def list_of_head(pattern: BlockPattern, heads: int) -> Tensor:
    """int32 (B or 1, H): the pattern's list set that each query head of each sample reads.

    `pattern.lead` is (), (Hm,), (Bm, Hm) with Hm 1, the KV heads or the query heads.
    """

    def build() -> Tensor:
        own = pattern.head_map
        if own is None:
            own = torch.arange(math.prod(pattern.lead), dtype=torch.int32, device=pattern.device)
        lead = (1,) * (2 - len(pattern.lead)) + pattern.lead
        table = own.view(lead)
        group = heads // max(lead[1], 1)
        return table.repeat_interleave(group, 1, output_size=lead[1] * group).contiguous()

    return derived(pattern, ("list_of_head", heads), build)


def shared_lists(pattern: BlockPattern, head_map: Tensor, size: int) -> bool:
    """Whether every `size` query heads that stand together read the same lists, in every sample.

    Known from the shapes where :func:`list_of_head` made the map, of a list a KV head or one for
    all; else it takes one host sync, once a map.
    """
    samples, heads = head_map.shape
    if size == 1 or pattern.num_patterns <= 1:
        return True
    if heads % size:
        return False
    lead = pattern.lead[-1] if pattern.lead else 1
    if heads % lead == 0 and head_map is list_of_head(pattern, heads):
        if heads // lead % size == 0:
            return True
        if pattern.head_map is None:
            return False

    def build() -> bool:
        table = head_map.view(samples, heads // size, size)
        return bool((table == table[..., :1]).all())

    return derived((head_map,), ("shared_lists", size), build)


class OwnSlots(NamedTuple):
    """Slots that no head and no sample shares: `base` (B or 1, H) int64, and how many there are."""

    base: Tensor | None
    blocks: int


def own_slots(pattern: BlockPattern, heads: int) -> OwnSlots:
    """Slots of its own for every query head (and every sample that has its own pattern); one host
    sync, once a pattern.
    """

    def build() -> OwnSlots:
        table = list_of_head(pattern, heads)
        expanded = expand_heads(pattern._replace(head_map=table.flatten(), lead=(table.numel(),)))
        base = expanded.crow_indices[:, 0].long().view(table.shape)
        return OwnSlots(base, expanded.num_blocks)

    return derived(pattern, ("own_slots", heads), build)


def bias_arguments(
    bias: BSRTensor | None, mask: BSRTensor, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """A bias as kernels take it: values (B or 1, Sb, bm, bn) in row order and `bias_base` (B or 1,
    H).
    """
    if bias is None:
        return None, None
    values = bias.inner_values
    assert values is not None
    p = bias.block_pattern
    if p.row_slots is not None:
        values = values.index_select(-3, p.row_slots.long())
    batch = values.shape[:-3]
    blocks = values.shape[-3]
    # The dimensions before (M, N) are (B, H) from the right; those that the pattern lacks are the
    # values' batch.
    if len(p.lead) == 0:
        per_head = batch[-1] if batch else 1
        base = torch.arange(per_head, device=values.device)[None] * blocks
        samples = math.prod(batch[:-1])
        values = values.reshape(samples, per_head * blocks, *p.block_size)
    else:
        base = p.crow_indices[:, 0].long().view(-1, p.lead[-1])
        values = values.reshape(math.prod(batch), blocks, *p.block_size)
    return values, base.repeat_interleave(heads // base.shape[1], 1)


def bias_gradient(dbias: Tensor, bias: BSRTensor) -> BSRTensor:
    """The gradient in the bias's own layout, from values as `bias_arguments` made them."""
    assert bias.inner_values is not None
    p = bias.block_pattern
    values = dbias.reshape(bias.inner_values.shape)
    if p.row_slots is not None:
        values = torch.empty_like(values).index_copy(-3, p.row_slots.long(), values)
    return bias.like_self(values)


def sum_shared(
    dbias: Tensor, bias: Tensor, bias_base: Tensor, pattern: BlockPattern, heads: int
) -> Tensor:
    """Adds up, in a fixed order, what heads and samples that share a bias gave it; bias's shape."""
    # where the slots of a bias of this shape begin follows from its shape and the pattern alone
    key = ("shared_slots", heads, tuple(bias.shape[:2]), tuple(bias_base.shape))
    order = derived(pattern, key, lambda: _shared_slots(bias.shape[1], bias_base, pattern, heads))
    total = dbias[:, order[0]]
    for slots in order[1:]:
        total = total + dbias[:, slots]
    if bias.shape[0] == 1 and dbias.shape[0] > 1:
        total = total.sum(0, keepdim=True)
    return total.to(bias.dtype).reshape(bias.shape)


def _shared_slots(
    blocks: int, bias_base: Tensor, pattern: BlockPattern, heads: int
) -> tuple[Tensor, ...]:
    """Of every slot of a bias with `blocks` slots, the own slots that add to it; a tensor each."""
    own = own_slots(pattern, heads)
    assert own.base is not None
    lengths = (pattern.crow_indices[:, -1] - pattern.crow_indices[:, 0]).long()
    lengths = lengths[list_of_head(pattern, heads).long()].flatten()
    owner = torch.arange(own.base.numel(), device=bias_base.device).repeat_interleave(
        lengths, output_size=own.blocks
    )
    shift = (bias_base.expand(own.base.shape) - own.base).flatten()
    target = torch.arange(own.blocks, device=bias_base.device) + shift[owner]
    order = torch.argsort(target, stable=True)
    return order.view(blocks, own.blocks // max(blocks, 1)).unbind(1) if blocks else (order,)
