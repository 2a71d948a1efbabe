"""Unit schedules: which block columns the warpgroups of a Hopper program visit.

A unit is 64 rows of the mask, what one warpgroup multiplies. The units of a group share a stream of
tiles, gathered from stored blocks, in an order in which each unit needs one unbroken run of tiles:
what only the first needs comes first, what all need is in the middle. Like
:mod:`~sparse_layouts.kernels.block_attention.tile_schedule` it costs O(stored blocks), is built on
the pattern's device without waiting for it, and cached with the pattern.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_layouts.block_pattern import BlockPattern, entry_rows, transpose_pattern
from sparse_layouts.derived import derived

UNIT = 64
FIELDS = 16
# columns of a row of `rows`; the last three have a place for each of up to four units
START, TILES, OFFSET, UNITS, RUN_BEGIN, RUN_END = 0, 1, 2, 4, 8, 12
PLAIN, MASKED, DEAD = 0, 1, 2


class UnitSchedule(NamedTuple):
    """The tiles of every group of `units` (U) units; a tile has `slots` (S) pieces of columns.

    field | shape | dtype | meaning
    ---|---|---|---
    `rows` | (P, G, 16) | int32 | a group: `START` its first tile, `TILES` how many (from 1), \
`OFFSET` that first tile in its pattern, then by unit `UNITS` (-1: none) and the run of tiles that \
it needs, from `RUN_BEGIN` to `RUN_END`, counted from the first
    `heaviest_first` | (P, G, 16) | int32 | the same, most tiles first
    `columns` | (T * S,) | int32 | a slot's piece of the columns; -1: nothing
    `flags` | (T,) | int32 | two bits a unit: 0 all stored, once; 1 masked; 2 nothing stored
    `block_tiles` | (T * S, U * sub) | int32 | by block row: -1 absent, 0 full, t > 0 bit tile t - 1
    `log_counts` | (T * S, U * sub) or None | fp32 | log2 of the block's count

    A piece is a block's width, or the tile's where that is less; `sub` block rows make a unit, or
    one where a block row is longer. T is at most `pieces / S + P * G + 1`.
    """

    rows: Tensor
    heaviest_first: Tensor
    columns: Tensor
    flags: Tensor
    block_tiles: Tensor
    log_counts: Tensor | None


def unit_schedule(
    pattern: BlockPattern, units: int, tile: int, *, pair_by_length: bool = False
) -> UnitSchedule:
    """The schedule for groups of `units` units and tiles of `tile` columns, built once.

    `pair_by_length`: units with lists of about one length stand together, instead of neighbours.
    """
    key = ("unit_schedule", units, tile, pair_by_length)
    return derived(pattern, key, lambda: _build(pattern, units, tile, pair_by_length))


class _Pieces(NamedTuple):
    """Every stored block, cut into pieces of one unit and one piece of the columns."""

    pattern: Tensor
    unit: Tensor
    sub_row: Tensor
    column: Tensor
    tile: Tensor
    counts: Tensor | None


def _pieces(p: BlockPattern, piece: int) -> _Pieces:
    (mb, _), (bm, bn) = p.grid, p.block_size
    high, sub, wide = max(1, bm // UNIT), max(1, UNIT // bm), bn // piece
    slots = torch.arange(p.num_blocks, device=p.device)
    if p.row_slots is not None:
        slots = p.row_slots.long()
    rows = entry_rows(p.crow_indices, p.num_blocks)
    pattern = rows.div(max(mb, 1), rounding_mode="floor")
    rows = rows - pattern * mb
    column = p.col_indices.long()
    tile = torch.zeros_like(slots) if p.block_tiles is None else p.block_tiles.long()[slots]
    counts = None if p.block_counts is None else p.block_counts.long()[slots]
    unit, sub_row = rows.div(sub, rounding_mode="floor"), rows % sub
    if high * wide > 1:
        part = torch.arange(high * wide, device=p.device)

        def cut(values: Tensor) -> Tensor:
            return values[:, None].expand(-1, high * wide).reshape(-1)

        unit = (unit[:, None] * high + part // wide).reshape(-1)
        column = (column[:, None] * wide + part % wide).reshape(-1)
        pattern, sub_row, tile = cut(pattern), cut(sub_row), cut(tile)
        counts = None if counts is None else cut(counts)
    return _Pieces(pattern, unit, sub_row, column, tile, counts)


def _build(p: BlockPattern, units: int, tile: int, pair_by_length: bool) -> UnitSchedule:
    device, patterns = p.device, p.num_patterns
    (mb, nb), (bm, bn), (m, n) = p.grid, p.block_size, p.shape
    high, sub, piece = max(1, bm // UNIT), max(1, UNIT // bm), min(bn, tile)
    slots_per_tile = tile // piece
    all_units = -(-m // UNIT)
    groups = -(-all_units // units)
    total, width = patterns * groups, units * sub
    pieces = _pieces(p, piece)
    entries = pieces.unit.numel()
    # what lies wholly outside the matrix, of a block that its edge cuts, is left out
    inside = (pieces.unit < all_units) & (pieces.column * piece < n)

    # which units stand together
    seats = torch.arange(all_units, device=device).expand(patterns, all_units)
    order = seats
    if pair_by_length and units > 1:
        lengths = torch.zeros(patterns * all_units + 1, dtype=torch.long, device=device)
        owner = torch.where(inside, pieces.pattern * all_units + pieces.unit, lengths.numel() - 1)
        lengths.index_add_(0, owner, torch.ones_like(owner))
        order = lengths[:-1].view(patterns, all_units).argsort(dim=1, descending=True, stable=True)
        seats = torch.empty_like(order).scatter_(1, order, seats.contiguous())
    members = pad(order, (0, groups * units - all_units), value=-1).reshape(total, units)
    last_unit = max(all_units - 1, 0)
    seat = seats.reshape(-1)[pieces.pattern * all_units + pieces.unit.clamp(max=last_unit)]
    group = torch.where(inside, pieces.pattern * groups + seat // units, total)

    # pieces of a group in one column become one entry; entries that are not used belong to `total`
    key = torch.where(inside, group * (nb * (bn // piece)) + pieces.column, total * nb * bn)
    key, source = key.sort(stable=True)
    entry = pad((key[1:] != key[:-1]).long(), (1, 0)).cumsum(0) if entries else key
    owner = torch.full((entries,), total, device=device).index_copy_(0, entry, group[source])
    column = torch.zeros(entries, dtype=torch.long, device=device)
    column.index_copy_(0, entry, pieces.column[source])
    place = entry * width + (seat[source] % units) * sub + pieces.sub_row[source]
    tiles = torch.full((entries * width,), -1, dtype=torch.int32, device=device)
    tiles[place] = pieces.tile[source].int()
    tiles = tiles.view(entries, units, sub)
    counts = None
    if pieces.counts is not None:
        counts = torch.ones(entries * width, dtype=torch.int32, device=device)
        counts[place] = pieces.counts[source].int()
        counts = counts.view(entries, units, sub)

    # what each unit needs of an entry; block rows that the matrix has not do not matter
    simple = (tiles == 0) & ((column + 1) * piece <= n)[:, None, None]
    if counts is not None:
        simple &= counts == 1
    own = members[owner.clamp(max=max(total - 1, 0))]  # (entries, units)
    block_row = own[..., None] // high if high > 1 else own[..., None] * sub
    block_row = block_row + torch.arange(sub, device=device)
    absent = (own[..., None] < 0) | (block_row >= mb)
    live = (tiles >= 0).any(2)
    plain = (simple | absent).all(2) & live

    # the first unit's alone, then what more share, then the last unit's alone; masked ones outside
    number = torch.arange(units, device=device)
    middle = (2 * (live * number).sum(1)).div(live.sum(1).clamp(min=1), rounding_mode="floor")
    inner = (plain | ~live).all(1).long()
    kind = middle * 2 + torch.where(middle < units - 1, inner, 1 - inner)
    ranked = (owner * (4 * units) + kind).argsort(stable=True)
    used = owner < total
    sizes = torch.zeros(total + 1, dtype=torch.long, device=device)
    sizes.index_add_(0, owner, used.long())
    num_tiles = (sizes[:total] + slots_per_tile - 1).div(slots_per_tile, rounding_mode="floor")
    num_tiles.clamp_(min=1)
    starts = num_tiles.cumsum(0) - num_tiles
    bound = entries // slots_per_tile + total + 1
    first_entry = sizes.cumsum(0) - sizes
    rank = torch.arange(entries, device=device) - first_entry[owner[ranked]]
    slot = pad(starts, (0, 1))[owner[ranked]] * slots_per_tile + rank
    slot = torch.where(owner[ranked] < total, slot, bound * slots_per_tile)

    def by_slot(values: Tensor, missing: float) -> Tensor:
        values = values.view(entries, math.prod(values.shape[1:]))
        out = values.new_full((bound * slots_per_tile + 1, values.shape[1]), missing)
        out[slot] = values[ranked]
        return out[:-1]

    live_tile = by_slot(live, False).view(bound, slots_per_tile, units).any(1)
    plain_tile = by_slot(plain, False).view(bound, slots_per_tile, units).all(1)
    flag = torch.where(live_tile, torch.where(plain_tile, PLAIN, MASKED), DEAD)
    runs = _runs(live_tile, starts, num_tiles)
    pattern_starts = starts.view(patterns, groups)[:, :1].expand(patterns, groups).reshape(-1)
    numbers = torch.stack([starts, num_tiles, starts - pattern_starts, torch.zeros_like(starts)], 1)
    by_unit = [pad(t, (0, 4 - units), value=v) for t, v in ((members, -1), *((r, 0) for r in runs))]
    rows = torch.cat([numbers, *by_unit], 1).view(patterns, groups, FIELDS).int()
    heaviest = num_tiles.view(patterns, groups).argsort(dim=1, descending=True, stable=True)
    return UnitSchedule(
        rows,
        rows.gather(1, heaviest[..., None].expand(-1, -1, FIELDS)),
        by_slot(column.int(), -1).flatten(),
        (flag << (2 * number)).sum(1).int(),
        by_slot(tiles, -1),
        None if counts is None else by_slot(counts.float().log2(), 0.0),
    )


def tile_groups(starts: Tensor, tiles: int) -> Tensor:
    """The group of every tile, int64 (tiles,), from the groups' first tiles; no host sync."""
    marks = torch.zeros(tiles + 1, dtype=torch.long, device=starts.device)
    marks.index_add_(0, starts.clamp(max=tiles), torch.ones_like(starts))
    return (marks[:tiles].cumsum(0) - 1).clamp_(0, max(starts.numel() - 1, 0))


def _runs(live: Tensor, starts: Tensor, num_tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of every group and unit the first of its tiles and the one after the last; (0, 1) for none.

    `live` (tiles, U): whether the unit needs the tile.
    """
    tiles, units = live.shape
    group = tile_groups(starts, tiles)
    place = torch.arange(tiles, device=live.device) - starts[group]
    live = live & (place < num_tiles[group])[:, None]
    index = group[:, None].expand(tiles, units)
    far = torch.iinfo(torch.int32).max
    begin = torch.full((starts.numel(), units), far, device=live.device)
    begin.scatter_reduce_(0, index, torch.where(live, place[:, None], far), "amin")
    end = torch.zeros_like(begin)
    end.scatter_reduce_(0, index, torch.where(live, place[:, None] + 1, 0), "amax")
    return torch.where(end == 0, 0, begin), end.clamp_(min=1)


class GradientSchedules(NamedTuple):
    """The two passes of a backward by units of 64 x 64, and where one finds what the other wrote.

    `by_column` is the schedule of the transposed pattern: groups of keys, tiles of queries.
    Its tile t of unit u leaves the gradient of the scores at place `(t - first tile of the
    pattern) * U + u`; `places` (T * U,) int32 has, for each tile and unit of `by_row`, that place,
    -1 where nothing is stored. `num_places`: of the pattern that has most. Of `by_column`:
    `mean_tiles` of a pattern, and the `longest` group's.
    """

    by_column: UnitSchedule
    by_row: UnitSchedule
    places: Tensor
    num_places: int
    mean_tiles: float
    longest: int


def gradient_schedules(
    pattern: BlockPattern, units: int, *, pair_by_length: bool
) -> GradientSchedules:
    """Schedules for a backward, of blocks whose edges are multiples of 64; one host sync, once."""
    key = ("gradient_schedules", units, pair_by_length)
    return derived(pattern, key, lambda: _gradient_schedules(pattern, units, pair_by_length))


def _gradient_schedules(p: BlockPattern, units: int, pair_by_length: bool) -> GradientSchedules:
    by_column = unit_schedule(transpose_pattern(p), units, UNIT, pair_by_length=pair_by_length)
    by_row = unit_schedule(p, units, UNIT)
    heights = (-(-p.shape[0] // UNIT), -(-p.shape[1] // UNIT))
    written, offset = _unit_pairs(by_column, units, heights, transposed=True)
    wanted, _ = _unit_pairs(by_row, units, heights, transposed=False)
    places = (offset[:, None] * units + torch.arange(units, device=p.device)).flatten()
    written, order = written.flatten().sort()
    found = torch.searchsorted(written, wanted.flatten()).clamp_(max=max(written.numel() - 1, 0))
    places = torch.where(wanted.flatten() >= 0, places[order][found], -1).int()
    tiles = by_column.rows[..., TILES].flatten(1)
    if tiles.numel() == 0:
        return GradientSchedules(by_column, by_row, places, 0, 0.0, 0)
    of_pattern = tiles.sum(1)
    counted = torch.stack([of_pattern.amax(), of_pattern.sum(), tiles.amax()]).tolist()
    most, total, longest = counted
    return GradientSchedules(
        by_column, by_row, places, most * units, total / tiles.shape[0], longest
    )


def _unit_pairs(
    s: UnitSchedule, units: int, heights: tuple[int, int], *, transposed: bool
) -> tuple[Tensor, Tensor]:
    """A number for (pattern, query unit, key unit) of every tile and unit, -1 where nothing is
    stored; and every tile's place in its pattern.
    """
    groups, tiles = s.rows.shape[1], s.flags.numel()
    rows = s.rows.view(-1, FIELDS).long()
    group = tile_groups(rows[:, START], tiles)
    unit = rows[group, UNITS : UNITS + units]
    column = s.columns.long()[:, None].expand(tiles, units)
    live = (s.block_tiles.view(tiles, units) >= 0) & (unit >= 0)
    query, key = (column, unit) if transposed else (unit, column)
    number = (group // max(groups, 1))[:, None] * heights[0] * heights[1]
    number = number + query * heights[1] + key
    offset = torch.arange(tiles, device=group.device) - rows[group, START] + rows[group, OFFSET]
    return torch.where(live, number, -1), offset
