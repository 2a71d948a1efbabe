"""Every invariant of a block pattern, checked one by one; used by `validate()`, never on the way of
a call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, column_lists
from sparse_layouts.block_values import slots_in_row_order


def check_pattern(pattern: BlockPattern) -> None:
    """Raises `ValueError` naming the first broken invariant, with what was expected and what is
    there.
    """
    p = pattern
    (mb, nb), nnzb = p.grid, p.num_blocks
    for name, tensor in zip(p._fields[:10], p[:10], strict=True):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name}: expected int32, got {tensor.dtype}")
        if tensor.device != p.device:
            raise ValueError(f"{name} is on {tensor.device}, col_indices on {p.device}")
    _check_lists("crow_indices", "col_indices", p.crow_indices, p.col_indices, mb, nb)
    _check_lists("ccol_indices", "row_indices", p.ccol_indices, p.row_indices, nb, mb)
    if p.ccol_indices.shape[0] != p.num_patterns:
        raise ValueError(
            f"ccol_indices holds {p.ccol_indices.shape[0]} patterns, crow_indices {p.num_patterns}"
        )
    leads = math.prod(p.lead)
    if p.head_map is None:
        if p.num_patterns != leads:
            raise ValueError(
                f"expected {leads} patterns for leading dimensions {p.lead}, got {p.num_patterns}"
            )
    else:
        if tuple(p.head_map.shape) != (leads,):
            raise ValueError(f"head_map: expected shape ({leads},), got {tuple(p.head_map.shape)}")
        _check_range("head_map", p.head_map, 0, p.num_patterns)
    for name, slots in (("row_slots", p.row_slots), ("col_slots", p.col_slots)):
        if slots is not None and not torch.equal(
            slots.sort().values, torch.arange(nnzb, dtype=torch.int32, device=p.device)
        ):
            raise ValueError(f"{name}: expected a permutation of 0..{nnzb - 1}")
    ccol, rows, position = column_lists(p.crow_indices, p.col_indices, nb)
    own_slots = torch.arange(nnzb, device=p.device) if p.col_slots is None else p.col_slots.long()
    same_lists = torch.equal(ccol, p.ccol_indices) and torch.equal(rows, p.row_indices)
    if not same_lists or not torch.equal(slots_in_row_order(p)[position.long()], own_slots):
        raise ValueError("the column lists do not hold the blocks of the row lists")
    _check_tiles(p)
    if p.block_counts is not None:
        if tuple(p.block_counts.shape) != (nnzb,):
            raise ValueError(
                f"block_counts: expected shape ({nnzb},), got {tuple(p.block_counts.shape)}"
            )
        _check_range("block_counts", p.block_counts, 1, 2**31 - 1)


def _check_tiles(p: BlockPattern) -> None:
    if p.block_tiles is None:
        return
    if tuple(p.block_tiles.shape) != (p.num_blocks,):
        raise ValueError(
            f"block_tiles: expected shape ({p.num_blocks},), got {tuple(p.block_tiles.shape)}"
        )
    count = 0 if p.tiles is None else p.tiles.shape[0]
    _check_range("block_tiles", p.block_tiles, 0, count + 1)
    if p.tiles is not None:
        words = -(-p.block_size[1] // 32)
        if tuple(p.tiles.shape[1:]) != (p.block_size[0], words):
            raise ValueError(
                f"tiles: expected (T, {p.block_size[0]}, {words}) words, got {tuple(p.tiles.shape)}"
            )


def _check_lists(
    offsets_name: str, indices_name: str, offsets: Tensor, indices: Tensor, rows: int, columns: int
) -> None:
    if offsets.dim() != 2 or offsets.shape[1] != rows + 1:
        raise ValueError(
            f"{offsets_name}: expected (patterns, {rows + 1}), got {tuple(offsets.shape)}"
        )
    if indices.dim() != 1:
        raise ValueError(f"{indices_name}: expected one dimension, got {tuple(indices.shape)}")
    if offsets.shape[0] == 0 and indices.shape[0] == 0:
        return  # no head, and nothing stored
    flat = offsets.flatten()
    ends = torch.cat([offsets[:, -1], offsets[:, -1].new_tensor([indices.shape[0]])])
    starts = torch.cat([offsets[:, 0], offsets[:, -1][-1:]])
    if flat.numel() == 0 or int(offsets[0, 0]) != 0 or int(offsets[-1, -1]) != indices.shape[0]:
        raise ValueError(
            f"{offsets_name}: expected offsets from 0 to {indices.shape[0]}, the length of "
            f"{indices_name}"
        )
    if bool((offsets.diff(dim=1) < 0).any()):
        raise ValueError(f"{offsets_name}: expected offsets that do not decrease")
    if not torch.equal(starts[1:], ends[:-1]):
        raise ValueError(f"{offsets_name}: expected every pattern to begin where the last one ends")
    _check_range(indices_name, indices, 0, columns)
    inside = torch.ones(max(indices.shape[0] - 1, 0), dtype=torch.bool, device=indices.device)
    boundary = flat[(flat > 0) & (flat < indices.shape[0])].long()
    inside[boundary - 1] = (
        False  # the first of a row may be smaller than the last of the row before
    )
    if bool(((indices.diff() <= 0) & inside).any()):
        raise ValueError(
            f"{indices_name}: expected strictly ascending indices within a row (sorted, none twice)"
        )


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.numel() and (int(tensor.min()) < low or int(tensor.max()) >= high):
        raise ValueError(
            f"{name}: expected values from {low} to {high - 1}, got {int(tensor.min())} to "
            f"{int(tensor.max())}"
        )
