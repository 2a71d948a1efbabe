"""Tile schedules: for every tile of rows, which block columns a kernel visits, and in what order.

A pattern knows nothing of kernel tiles. A tile of rows may cover several block rows, which store
different columns; a tile of columns may gather several stored blocks that are not neighbours. The
schedule is the union of the block rows' lists, split into what needs no mask and what does. It
costs O(stored blocks), is built on the pattern's device without waiting for it, and cached with it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_layouts.block_pattern import BlockPattern, entry_rows, transpose_pattern
from sparse_layouts.derived import derived

Lists = Literal["rows", "columns"]


class TileSchedule(NamedTuple):
    """The columns of every group of `rows_per_group` (R) block rows, gathered `gather` at a time.

    field | shape | dtype | meaning
    ---|---|---|---
    `starts` | (P, G) | int32 | first slot of the group, of `gather * chunks`
    `plain_chunks` | (P, G) | int32 | first chunks, no mask: full, once, in all rows, inside N
    `chunks` | (P, G) | int32 | all chunks
    `order` | (P, G) | int32 | the groups of a pattern, most chunks first
    `columns` | (S,) | int32 | block column of a slot, ascending in each part; -1: nothing
    `block_tiles` | (S, R) | int32 | by block row: -1 not stored, 0 full, t > 0 bit tile t - 1
    `log_counts` | (S, R) or None | fp32 | log2 of the block's count; None where nothing counts
    `positions` | (S, R) or None | int32 | the block's place in its pattern's lists, -1 not stored

    S is at most `nnzb + (gather - 1) * P * G`; `columns` has room for one chunk more, because a
    kernel may read, and then drop, the chunk after its last.
    """

    starts: Tensor
    plain_chunks: Tensor
    chunks: Tensor
    order: Tensor
    columns: Tensor
    block_tiles: Tensor
    log_counts: Tensor | None
    positions: Tensor | None


def tile_schedule(
    pattern: BlockPattern, rows_per_group: int, gather: int, *, positions: Lists | None = None
) -> TileSchedule:
    """The schedule of a pattern, built once; `transpose_pattern(p)` has that of tiles of columns.

    A tile smaller than a block row takes `rows_per_group` 1, several tiles then share a group.
    `positions` is for kernels that read or write one block of values a stored block, and says
    which lists number those: of a transposed pattern, "columns" are the row lists of the original.
    """
    key = ("tile_schedule", rows_per_group, gather, positions)
    return derived(pattern, key, lambda: _build(pattern, rows_per_group, gather, positions))


# rows of the tiles that `tile_fill` is about
TILE_ROWS = 64


def tile_fill(pattern: BlockPattern) -> float:
    """How alike neighbouring block rows are: of the blocks that tiles of 64 rows visit, the stored
    share. 1 where a block row is as high; with blocks of 16 1 / 4 where no two store a column.

    Waits for the device, once a pattern; where it cannot, while a CUDA graph is captured, a fill
    that no earlier call asked for is taken for 1.
    """
    each = TILE_ROWS // pattern.block_size[0]
    if each <= 1 or pattern.num_blocks == 0:
        return 1.0
    return derived(pattern, "tile_fill", lambda: _tile_fill(pattern, each))


def fill_both_ways(pattern: BlockPattern) -> float:
    """The stored share of all that tiles of 64 rows and tiles of 64 columns visit."""
    by_row, by_column = tile_fill(pattern), tile_fill(transpose_pattern(pattern))
    return 2 / (1 / by_row + 1 / by_column)


def _tile_fill(p: BlockPattern, each: int) -> float:
    if p.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return 1.0
    (mb, nb), entries = p.grid, p.num_blocks
    rows = entry_rows(p.crow_indices, entries)
    which = rows.div(max(mb, 1), rounding_mode="floor")
    group = which * -(-mb // each) + (rows - which * mb).div(each, rounding_mode="floor")
    visited = torch.unique(group * nb + p.col_indices.long()).numel()
    return entries / (visited * each)


def _build(
    p: BlockPattern, rows_per_group: int, gather: int, positions: Lists | None
) -> TileSchedule:
    device, nnzb, patterns = p.device, p.num_blocks, p.num_patterns
    (mb, nb), bn = p.grid, p.block_size[1]
    groups = -(-mb // rows_per_group)
    total = patterns * groups
    bound = nnzb + (gather - 1) * total

    # every stored block: its group, its row inside the group, its column, its slot in values
    listed = torch.arange(nnzb, device=device)
    slots = listed if p.row_slots is None else p.row_slots.long()
    rows = entry_rows(p.crow_indices, nnzb)
    which = rows.div(max(mb, 1), rounding_mode="floor")
    rows = rows - which * mb
    group = which * groups + rows.div(rows_per_group, rounding_mode="floor")
    sub_row = rows % rows_per_group
    columns = p.col_indices.long()
    tile = torch.zeros_like(slots) if p.block_tiles is None else p.block_tiles.long()[slots]
    counts = None if p.block_counts is None else p.block_counts[slots]
    place_in_lists = None
    if positions == "rows":
        place_in_lists = listed - p.crow_indices[:, 0].long()[which]
    elif positions == "columns":
        place_in_lists = slots
        if p.col_slots is not None:
            place_in_lists = torch.empty_like(listed).index_copy_(0, p.col_slots.long(), listed)
            place_in_lists = place_in_lists[slots]
        place_in_lists = place_in_lists - p.ccol_indices[:, 0].long()[which]

    # block rows of a group that store the same column become one entry
    key = group * nb + columns
    if rows_per_group > 1:
        key, source = key.sort(stable=True)
        group, sub_row, columns, tile = (t[source] for t in (group, sub_row, columns, tile))
        counts = None if counts is None else counts[source]
        place_in_lists = None if place_in_lists is None else place_in_lists[source]
    entry = pad((key[1:] != key[:-1]).long(), (1, 0)).cumsum(0) if nnzb else listed

    # entries are at most nnzb; the unused ones belong to group `total`, which is cut off
    entry_group = torch.full((nnzb,), total, device=device).index_copy_(0, entry, group)
    entry_column = torch.zeros_like(listed).index_copy_(0, entry, columns)
    simple = (tile == 0) & ((columns + 1) * bn <= p.shape[1])
    if counts is not None:
        simple &= counts == 1
    live_rows = torch.zeros_like(listed).index_add_(0, entry, simple.long())
    group_rows = mb - (entry_group % max(groups, 1)) * rows_per_group
    plain = live_rows == group_rows.clamp(max=rows_per_group)
    used = entry_group < total
    plain &= used

    def per_group(flags: Tensor) -> Tensor:
        return torch.zeros(total + 1, dtype=torch.long, device=device).index_add_(
            0, entry_group, flags.long()
        )

    def before(sizes: Tensor) -> Tensor:
        return sizes.cumsum(0) - sizes

    num_plain = per_group(plain)
    plain_chunks = num_plain.div(gather, rounding_mode="floor")
    # plain entries that do not fill a chunk go with the masked ones
    rank = before(plain.long()) - before(num_plain)[entry_group]
    leading = plain & (rank < (plain_chunks * gather)[entry_group])
    rest = used & ~leading
    num_rest = per_group(rest)
    rest_rank = before(rest.long()) - before(num_rest)[entry_group]
    chunks = plain_chunks + (num_rest + gather - 1).div(gather, rounding_mode="floor")
    starts = before(chunks) * gather
    place = torch.where(leading, rank, (plain_chunks * gather)[entry_group] + rest_rank)
    place = torch.where(used, starts[entry_group] + place, bound)

    def table(values: Tensor, missing: float) -> Tensor:
        out = torch.full(
            ((bound + 1) * rows_per_group,), missing, dtype=values.dtype, device=device
        )
        out[place[entry] * rows_per_group + sub_row] = values
        return out.view(-1, rows_per_group)[:bound]

    slot_columns = torch.full((bound + gather,), -1, dtype=torch.int32, device=device)
    slot_columns[place] = entry_column.int()
    chunks = chunks[:total].view(patterns, groups)
    return TileSchedule(
        starts[:total].view(patterns, groups).int(),
        plain_chunks[:total].view(patterns, groups).int(),
        chunks.int(),
        chunks.argsort(dim=-1, descending=True, stable=True).int(),
        slot_columns,
        table(tile.int(), -1),
        None if counts is None else table(counts.float().log2(), 0.0),
        None if place_in_lists is None else table(place_in_lists.int(), -1),
    )
