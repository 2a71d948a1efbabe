"""`~a`, `a & b`, `a | b` and `mask[h]`, slices at block edges: on the stored blocks alone, exact by
token.

Each takes one host sync (how many blocks the result stores) and O(stored blocks of operands and
result).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.block_pattern import (
    BlockPattern,
    build_pattern,
    entry_rows,
    line_offsets,
    pack_tiles,
    tile_table,
)
from sparse_layouts.block_values import slots_in_row_order
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import route

# A block's code: 0 nothing stored, 1 full, 2 + t the bit tile t.


def _codes(pattern: BlockPattern, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the patterns listed in `which` (K,): sorted keys (k * Mb + row) * Nb + column, each
    block's code and its slot.
    """
    p = pattern
    mb, nb = p.grid
    starts, ends = p.crow_indices[which, 0].long(), p.crow_indices[which, -1].long()
    lengths = ends - starts
    bases = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    k = torch.arange(which.numel(), device=p.device).repeat_interleave(lengths)
    source = torch.arange(k.numel(), device=p.device) - bases[k] + starts[k]
    row = (entry_rows(p.crow_indices, p.num_blocks) % max(mb, 1))[source]
    slots = slots_in_row_order(p)[source]
    codes = torch.ones_like(slots) if p.block_tiles is None else p.block_tiles[slots].long() + 1
    return (k * mb + row) * nb + p.col_indices[source], codes, slots


def _code_table(pattern: BlockPattern) -> Tensor:
    """bool (T + 2, bm, bn): the block of every code."""
    table = tile_table(pattern)
    return torch.cat([torch.zeros_like(table[:1]), table])


def _looked_up(keys: Tensor, among: Tensor, values: Tensor) -> Tensor:
    """The value of each key, 0 where it is not among the (sorted) ones."""
    if not among.numel():
        return torch.zeros_like(keys)
    at = torch.searchsorted(among, keys).clamp_(max=among.numel() - 1)
    return torch.where(among[at] == keys, values[at], 0)


def _from_codes(
    keys: Tensor, codes: Tensor, table: Tensor, like: BlockPattern, patterns: int
) -> tuple[Tensor, dict[str, Any]]:
    """Which of `keys` are stored, and `build_pattern`'s arguments, from codes into a table of
    blocks.
    """
    used, codes = torch.unique(codes, return_inverse=True)
    blocks, same = torch.unique(pack_tiles(table[used]), dim=0, return_inverse=True)
    words = blocks[same]  # equal blocks under different codes become one
    dense = table[used].flatten(1)
    empty, full = ~dense.any(1), dense.all(1)
    partial = ~(empty | full)
    kinds = torch.unique(same[partial])
    number = torch.zeros(used.numel(), dtype=torch.long, device=keys.device)
    number[partial] = torch.searchsorted(kinds, same[partial]) + 1
    first = (
        torch.stack([(same == kind).nonzero()[0, 0] for kind in kinds]) if kinds.numel() else None
    )
    stored = ~empty[codes]
    keys, ids = keys[stored], number[codes][stored]
    mb, nb = like.grid
    edges = torch.arange(patterns * mb + 1, device=keys.device) * nb
    starts = torch.searchsorted(keys, edges)
    first_row = torch.arange(patterns, device=keys.device)[:, None] * mb
    return stored, {
        "crow_indices": starts[first_row + torch.arange(mb + 1, device=keys.device)].int(),
        "col_indices": (keys % max(nb, 1)).int(),
        "shape": like.shape,
        "block_size": like.block_size,
        "block_tiles": None if first is None else ids.int(),
        "tiles": None if first is None else words[first],
    }


def combine(
    a: BSRTensor, b: BSRTensor, operation: Callable[[Tensor, Tensor], Tensor], name: str
) -> BSRTensor:
    """`operation(a, b)` of two masks, blockwise; `name` is for messages."""
    for mask in (a, b):
        if not mask.is_mask:
            raise TypeError(
                f"{name}: expected masks, got {mask.dtype} values; w.pattern is a tensor's mask"
            )
    p, q = a.block_pattern, b.block_pattern
    if p.shape != q.shape or p.block_size != q.block_size:
        raise ValueError(
            f"{name}: expected masks of one shape and block size, got {p.shape} by "
            f"{p.block_size} and {q.shape} by {q.block_size}"
        )
    if p.device != q.device:
        raise ValueError(f"{name}: the masks are on {p.device} and {q.device}")
    if p.block_counts is not None and q.block_counts is not None:
        raise ValueError(
            f"{name}: both masks count blocks; drop the counts of one: sl.without_counts(mask)"
        )
    if (p.block_counts is not None or q.block_counts is not None) and operation is torch.logical_or:
        raise ValueError(
            f"{name}: counts have no meaning in a union; drop them: sl.without_counts(mask)"
        )
    lead = tuple(torch.broadcast_shapes(p.lead, q.lead))

    def patterns_of(pattern: BlockPattern) -> Tensor:
        own = pattern.head_map
        if own is None:
            own = torch.arange(math.prod(pattern.lead), device=pattern.device)
        return own.long().view(pattern.lead).expand(lead).reshape(-1)

    pairs, head_map = torch.unique(
        torch.stack([patterns_of(p), patterns_of(q)], 1), dim=0, return_inverse=True
    )
    keys_a, codes_a, slots_a = _codes(p, pairs[:, 0])
    keys_b, codes_b, slots_b = _codes(q, pairs[:, 1])
    keys = torch.unique(torch.cat([keys_a, keys_b]))
    table_a, table_b = _code_table(p), _code_table(q)
    width = table_b.shape[0]
    both = _looked_up(keys, keys_a, codes_a) * width + _looked_up(keys, keys_b, codes_b)
    used, codes = torch.unique(both, return_inverse=True)
    table = operation(table_a[used // width], table_b[used % width])
    stored, arguments = _from_codes(keys, codes, table, p, pairs.shape[0])
    counts = None
    if p.block_counts is not None:
        counts = p.block_counts[_looked_up(keys[stored], keys_a, slots_a)]
    elif q.block_counts is not None:
        counts = q.block_counts[_looked_up(keys[stored], keys_b, slots_b)]
    shared = lead != () and pairs.shape[0] < math.prod(lead)
    order = None if shared or lead == () else head_map
    if order is not None and not torch.equal(
        order, torch.arange(order.numel(), device=order.device)
    ):
        shared = True
    made = build_pattern(
        **arguments, lead=lead, head_map=head_map.int() if shared else None, block_counts=counts
    )
    return BSRTensor.on_pattern(None, made)


@route(torch.bitwise_and, input=BSRTensor, other=BSRTensor)
def intersect_masks(input: BSRTensor, other: BSRTensor) -> BSRTensor:
    """`a & b`: what both store; keeps the counts of the one that has them."""
    return combine(input, other, torch.logical_and, "a & b")


@route(torch.bitwise_or, input=BSRTensor, other=BSRTensor)
def unite_masks(input: BSRTensor, other: BSRTensor) -> BSRTensor:
    """`a | b`: what either stores."""
    return combine(input, other, torch.logical_or, "a | b")


@route(torch.bitwise_not, input=BSRTensor)
def complement_mask(input: BSRTensor) -> BSRTensor:
    """`~a`: what it does not store; costs what the result stores."""
    if not input.is_mask:
        raise TypeError(
            f"~a: expected a mask, got {input.dtype} values; ~w.pattern is the complement of a "
            f"tensor's mask"
        )
    p = input.block_pattern
    if p.block_counts is not None:
        raise ValueError(
            "~a: counts have no meaning in a complement; drop them: sl.without_counts(mask)"
        )
    mb, nb = p.grid
    keys_a, codes_a, _ = _codes(p, torch.arange(p.num_patterns, device=p.device))
    keys = torch.arange(p.num_patterns * mb * nb, device=p.device)
    codes = _looked_up(keys, keys_a, codes_a)
    _, arguments = _from_codes(keys, codes, ~_code_table(p), p, p.num_patterns)
    return BSRTensor.on_pattern(None, build_pattern(**arguments, lead=p.lead, head_map=p.head_map))


def without_counts(mask: BSRTensor) -> BSRTensor:
    """The same mask (*lead, M, N) with every block counted once, as a BSRTensor; of a layout with
    values the pattern's counts alone are dropped. Nothing is copied.

    Raises `TypeError` for what is no block layout.

    >>> import torch, sparse_layouts as sl
    >>> mask = sl.bsr_mask(torch.tensor([[2, 0], [1, 3]]), 16)
    >>> mask.block_counts().tolist(), sl.without_counts(mask).block_counts()
    ([2, 1, 3], None)
    """
    if not isinstance(mask, BSRTensor):
        raise TypeError(f"without_counts: expected a block layout, got {type(mask).__name__}")
    return BSRTensor.on_pattern(mask.inner_values, mask.block_pattern._replace(block_counts=None))


def select(layout: BSRTensor, index: Any) -> BSRTensor | None:
    """`layout[index]` for integers and slices, rows and columns cut at block edges; None for any
    other index.
    """
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (layout.dim() - len(index) + 1), *index[at + 1 :])
    if len(index) > layout.dim() or not all(isinstance(i, (int, slice)) for i in index):
        return None
    if any(isinstance(i, bool) for i in index):
        return None
    index = (*index, *[slice(None)] * (layout.dim() - len(index)))
    p = layout.block_pattern
    batch, lead, cut = index[: -2 - layout.lead_dims], index[-2 - layout.lead_dims : -2], index[-2:]
    rows = _block_range(cut[0], p.shape[0], p.block_size[0])
    columns = _block_range(cut[1], p.shape[1], p.block_size[1])
    if rows is None or columns is None:
        return None
    own = p.head_map
    if own is None:
        own = torch.arange(math.prod(p.lead), dtype=torch.int32, device=p.device)
    chosen = own.view(p.lead)[lead] if lead else own.view(())
    which, head_map = torch.unique(chosen.reshape(-1).long(), return_inverse=True)
    if layout.inner_values is not None:  # every head has values of its own: no sharing
        which, head_map = chosen.reshape(-1).long(), torch.arange(chosen.numel(), device=p.device)
    keys, _, slots = _codes(p, which)
    mb, nb = p.grid
    row, column = keys // max(nb, 1) % max(mb, 1), keys % max(nb, 1)
    inside = (row >= rows[0]) & (row < rows[1]) & (column >= columns[0]) & (column < columns[1])
    keys, slots, row, column = keys[inside], slots[inside], row[inside], column[inside]
    height = rows[1] - rows[0]
    k = keys // max(mb * nb, 1)
    counts = torch.zeros(which.numel() * height, dtype=torch.int32, device=p.device)
    counts.index_add_(0, k * height + row - rows[0], torch.ones_like(k, dtype=torch.int32))
    shared = which.numel() < chosen.numel() or not torch.equal(
        head_map, torch.arange(head_map.numel(), device=p.device)
    )
    made = build_pattern(
        line_offsets(counts.view(which.numel(), height)),
        (column - columns[0]).int(),
        shape=(
            min(rows[1] * p.block_size[0], p.shape[0]) - rows[0] * p.block_size[0],
            min(columns[1] * p.block_size[1], p.shape[1]) - columns[0] * p.block_size[1],
        ),
        block_size=p.block_size,
        lead=tuple(chosen.shape),
        head_map=head_map.int() if shared else None,
        block_tiles=None if p.block_tiles is None else p.block_tiles[slots],
        tiles=p.tiles,
        block_counts=None if p.block_counts is None else p.block_counts[slots],
    )
    if layout.inner_values is None:
        return BSRTensor.on_pattern(None, made)
    from sparse_layouts.layout_autograd import values_of, with_values

    values = values_of(layout)[batch].index_select(-3, slots)
    return with_values(BSRTensor.on_pattern(values.detach(), made), values)  # type: ignore[return-value]


def _block_range(cut: Any, size: int, block: int) -> tuple[int, int] | None:
    """(first, last + 1) block of a slice that lies on block edges; None for any other index."""
    if not isinstance(cut, slice):
        return None
    start, stop, step = cut.indices(size)
    stop = max(start, stop)
    if step != 1 or start % block or (stop % block and stop != size):
        return None
    return start // block, -(-stop // block)
