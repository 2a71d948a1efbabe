"""Schedules of the CPU kernels: which tiles gather which block columns, and what masks they need.

A tile is `group` neighbouring block rows of one head (or pattern): it gathers the union of their
block columns once. Tiles with equally many columns are stacked into one batched product, a step.
Within a tile the columns that need no mask come first, then those where whole blocks are dead or
counted, then those that are masked by token.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, entry_rows, tile_table
from sparse_layouts.derived import derived

# Scores of one step, 2 MB in fp32: what stays in the caches of two cores (EPYC 9004, attention of
# 8 heads, 4096 tokens, head size 64, local-stride in blocks of 64, 2026-11-20).
STEP_SCORES = 2**19


class MaskRun(NamedTuple):
    """Adds `masks[mask]` to the scores of a step's tiles [first, last), columns [start, end)."""

    first: int
    last: int
    start: int
    end: int
    mask: int


class Step(NamedTuple):
    """T tiles with `length` = L block columns each.

    field | shape, all int64 | meaning
    ---|---|---
    `tiles` | (T,) | head * num_tiles + tile
    `columns` | (T * L,) | kv_head * Nb + block column
    `positions` | (T, group, L) or None | place in the pattern's own row lists; -1: a dead block
    `slots` | (T * L,) or None | of a schedule of block rows: where the blocks lie in `values`
    `kinds` | (T, group, L') or None | of a schedule of sequences: masks of the last L' columns
    """

    tiles: Tensor
    columns: Tensor
    length: int
    runs: tuple[MaskRun, ...]
    positions: Tensor | None = None
    slots: Tensor | None = None
    kinds: Tensor | None = None


class SequenceTiles(NamedTuple):
    """What the tiles of several sequences have of their own, `num_tiles` of them a head.

    field | shape | meaning
    ---|---|---
    `samples` | (num_tiles,) int64 | the tile's sequence
    `rows` | (num_tiles,) int64 | the pattern's row in which the tile begins
    `key_starts` | (num_tiles,) int64 | the block in which the sequence's keys begin
    `key_blocks` | int | blocks of keys that a KV head has
    `block_rows` | int | bm
    `terms` | (kinds * bm, bn) | of every kind of block what its rows add to scores in base 2
    """

    samples: Tensor
    rows: Tensor
    key_starts: Tensor
    key_blocks: int
    block_rows: int
    terms: Tensor


class Schedule(NamedTuple):
    """All steps of the heads of one sample, or of several sequences.

    A tile has `rows` rows, the mask's rows from `(first_tile + tile) * group * bm + crop` on.
    `masks` are terms of the scores in base 2, (group, bm or 1, columns): -inf where nothing is
    stored, log2(count) elsewhere. With `sequences` a tile lies where that says, and its masks are
    the steps' `kinds`.
    """

    group: int
    rows: int
    crop: int
    first_tile: int
    num_tiles: int
    steps: tuple[Step, ...]
    masks: tuple[Tensor, ...]
    sequences: SequenceTiles | None = None


class _Tiles(NamedTuple):
    """The tiles of all patterns, P * tiles_per_pattern of them, before heads are known."""

    starts: np.ndarray  # (tiles + 1,) into columns
    columns: np.ndarray  # (U,) block columns, those without a mask first
    positions: np.ndarray  # (U, group)
    kinds: np.ndarray  # (U, group) int32 kinds of block
    by_token: np.ndarray  # (tiles,) columns that are masked by token, the last ones
    mask_ids: np.ndarray  # (tiles,) equal where the masks are equal; -1: none
    codes: list[
        np.ndarray
    ]  # by mask id: (columns, group) kinds of block, of all columns with a mask


def attention_schedule(
    pattern: BlockPattern,
    head_map: Tensor,
    num_kv_heads: int,
    num_queries: int,
    dtype: torch.dtype,
    with_positions: bool,
) -> Schedule:
    """The schedule of one sample's attention; `head_map` (H,) int32, masks in `dtype`."""
    p, heads = pattern, head_map.numpy()

    def build() -> Schedule:
        bm, mb = p.block_size[0], p.grid[0]
        group = 1 if num_queries <= bm else best_group(p)
        offset = p.shape[0] - num_queries
        first = offset // (group * bm)
        plan = Schedule(group, group * bm, 0, first, -(-mb // group) - first, (), ())
        if plan.num_tiles == group == 1 and not with_positions:
            # A few queries inside one block row: only their rows are computed.
            # A bias is added by whole blocks.
            plan = plan._replace(rows=num_queries, crop=offset - first * bm)
        kv_group = len(heads) // num_kv_heads
        return _add_steps(p, plan, heads, kv_group, STEP_SCORES // plan.rows, dtype, with_positions)

    key = ("cpu_attention", heads.tobytes(), num_kv_heads, num_queries, dtype, with_positions)
    return derived(p, key, build)


def row_schedule(
    pattern: BlockPattern, columns_per_step: int, dtype: torch.dtype = torch.float32
) -> Schedule:
    """The schedule of a layout with values: tiles are block rows, and steps know their slots.

    A step gathers up to `columns_per_step` columns, or one tile. Masks in `dtype`.
    """
    p = pattern
    # Rounded down to a power of two: few schedules, however many widths an operand has in turn.
    columns_per_step = 1 << max(columns_per_step.bit_length() - 1, 0)

    def build() -> Schedule:
        mb = p.grid[0]
        plan = Schedule(1, p.block_size[0], 0, 0, mb, (), ())
        plan = _add_steps(p, plan, np.arange(p.num_patterns), 1, columns_per_step, dtype, True)
        steps = []
        for step in plan.steps:
            assert step.positions is not None
            first = p.crow_indices[step.tiles.div(mb, rounding_mode="floor"), 0].long()
            entries = (step.positions[:, 0] + first[:, None]).flatten()
            slots = entries if p.row_slots is None else p.row_slots[entries].long()
            steps.append(step._replace(positions=None, slots=slots))
        return plan._replace(steps=tuple(steps))

    return derived(p, ("cpu_rows", columns_per_step, dtype), build)


def _add_steps(
    p: BlockPattern,
    plan: Schedule,
    heads: np.ndarray,
    kv_group: int,
    columns_per_step: int,
    dtype: torch.dtype,
    with_positions: bool,
) -> Schedule:
    """`plan` with the steps of the tiles of `heads` (H,), the pattern of each head."""
    bn, (mb, nb), num_tiles = p.block_size[1], p.grid, plan.num_tiles
    tiles = pattern_tiles(p, plan.group)
    own = np.arange(plan.first_tile, plan.first_tile + num_tiles)
    source = (heads.astype(np.int64)[:, None] * -(-mb // plan.group) + own).ravel()
    target = np.arange(source.size)
    lengths = tiles.starts[source + 1] - tiles.starts[source]
    order = np.lexsort((target, tiles.mask_ids[source], tiles.by_token[source], lengths))
    order = order[lengths[order] > 0]
    source, target, lengths = source[order], target[order], lengths[order]

    masks: list[Tensor] = []
    made: dict[tuple[int, bool], int] = {}
    steps = []
    at = 0
    while at < len(order):
        length = int(lengths[at])
        same = int(np.searchsorted(lengths, length, side="right"))
        end = min(same, at + max(1, columns_per_step // (length * bn)))
        which, heads_and_tiles = source[at:end], target[at:end]
        entries = tiles.starts[which][:, None] + np.arange(length)  # (T, L)
        columns = tiles.columns[entries] + (heads_and_tiles // num_tiles // kv_group * nb)[:, None]
        ids = tiles.mask_ids[which]
        edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        runs = []
        for first, last in itertools.pairwise(edges):
            if ids[first] < 0:
                continue
            codes = tiles.codes[ids[first]]
            by_token = int(tiles.by_token[which[first]])
            for start, stop, token in (
                (len(codes), by_token, False),
                (by_token, 0, True),
            ):
                if start == stop:
                    continue
                name = (int(ids[first]), token)
                if name not in made:
                    made[name] = len(masks)
                    part = codes[len(codes) - start : len(codes) - stop]
                    masks.append(_mask(p, torch.from_numpy(part), token, dtype, plan))
                runs.append(
                    MaskRun(first, last, (length - start) * bn, (length - stop) * bn, made[name])
                )
        positions = None
        if with_positions:
            positions = torch.from_numpy(tiles.positions[entries].transpose(0, 2, 1).copy())
        steps.append(
            Step(
                torch.from_numpy(heads_and_tiles),
                torch.from_numpy(columns.ravel()),
                length,
                tuple(runs),
                positions,
            )
        )
        at = end
    return plan._replace(steps=tuple(steps), masks=tuple(masks))


def _mask(
    p: BlockPattern, codes: Tensor, by_token: bool, dtype: torch.dtype, plan: Schedule
) -> Tensor:
    """The mask (group, bm or 1, columns * bn) of kinds `codes` (columns, group), by tile rows."""
    table, _ = kinds_of(p)
    blocks = table[codes.T] if by_token else table[codes.T, :1]  # (group, columns, bm or 1, bn)
    mask = blocks.transpose(1, 2).flatten(2)
    if by_token and plan.group == 1:
        mask = mask[:, plan.crop : plan.crop + plan.rows]
    return mask.to(dtype).contiguous()


def kinds_of(p: BlockPattern) -> tuple[Tensor, np.ndarray]:
    """What :func:`_kinds` finds, once a pattern."""
    return derived(p, "cpu_kinds", lambda: _kinds(p))


def _kinds(p: BlockPattern) -> tuple[Tensor, np.ndarray]:
    """What each kind of block adds to scores in base 2, (kinds, bm, bn) fp64, and kinds by entry.

    Entries are those of the row lists. Kind 0 adds nothing, the last kind is a dead block.
    """
    (_, n), (_, bn), (_, nb) = p.shape, p.block_size, p.grid
    entries = p.num_blocks
    slots = torch.arange(entries) if p.row_slots is None else p.row_slots.long()
    zeros = torch.zeros(entries, dtype=torch.long)
    tile = zeros if p.block_tiles is None else p.block_tiles[slots].long()
    count = zeros + 1 if p.block_counts is None else p.block_counts[slots].long()
    over_edge = n % bn != 0
    edge = (p.col_indices == nb - 1).long() if over_edge else zeros
    what = torch.stack([tile, count - 1, edge], 1)
    kinds, codes = torch.cat([torch.zeros(1, 3, dtype=torch.long), what]).unique(
        dim=0, return_inverse=True
    )  # sorted, so that the row of zeros, a full block that counts once, is kind 0
    stored = tile_table(p)[kinds[:, 0]]
    inside = torch.arange(bn) < (n - (nb - 1) * bn)
    stored = stored & (inside | (kinds[:, 2, None, None] == 0))
    term = (kinds[:, 1] + 1).double().log2()[:, None, None].expand(stored.shape)
    table = torch.where(stored, term, -torch.inf)
    return torch.cat([table, torch.full_like(table[:1], -torch.inf)]), codes[1:].numpy()


def pattern_tiles(p: BlockPattern, group: int) -> _Tiles:
    """The tiles of `group` block rows, once a pattern."""
    return derived(p, ("cpu_tiles", group), lambda: _build_tiles(p, group))


def _build_tiles(p: BlockPattern, group: int) -> _Tiles:
    (mb, nb), patterns = p.grid, p.num_patterns
    per_pattern = -(-mb // group)
    num_tiles = patterns * per_pattern
    table, kind = kinds_of(p)
    dead = table.shape[0] - 1
    token_kinds = (table != table[:, :1, :1]).flatten(1).any(1).numpy()

    row = entry_rows(p.crow_indices, p.num_blocks).numpy()
    which, row = row // mb if mb else row, row % mb if mb else row
    tile = which * per_pattern + row // group
    keys, place = np.unique(tile * nb + p.col_indices.numpy(), return_inverse=True)
    codes = np.full((len(keys), group), dead)
    codes[place, row % group] = kind
    positions = np.full((len(keys), group), -1)
    positions[place, row % group] = np.arange(len(row)) - p.crow_indices[:, 0].numpy()[which]
    union_tile, columns = keys // max(nb, 1), keys % max(nb, 1)
    # Rows of the last tile that lie over the edge are computed and dropped: they need no mask.
    past = (union_tile % per_pattern)[:, None] * group + np.arange(group) >= mb
    codes[past] = 0

    klass = np.where((codes == 0).all(1), 0, np.where(token_kinds[codes].any(1), 2, 1))
    order = np.lexsort((columns, klass, union_tile))
    codes, positions, columns, klass = codes[order], positions[order], columns[order], klass[order]
    starts = np.searchsorted(union_tile, np.arange(num_tiles + 1))
    clean = np.bincount(union_tile[klass == 0], minlength=num_tiles)
    by_token = np.bincount(union_tile[klass == 2], minlength=num_tiles)
    mask_ids = np.full(num_tiles, -1)
    distinct: list[np.ndarray] = []
    seen: dict[tuple[bytes, int], int] = {}
    for t in np.flatnonzero(np.diff(starts) > clean):
        own = codes[starts[t] + clean[t] : starts[t + 1]]
        key = (own.tobytes(), int(by_token[t]))
        if key not in seen:
            seen[key] = len(distinct)
            distinct.append(own)
        mask_ids[t] = seen[key]
    kinds = codes.astype(np.int32)
    return _Tiles(starts, columns, positions, kinds, by_token, mask_ids, distinct)


def best_group(p: BlockPattern) -> int:
    """How many block rows share a tile, chosen once a pattern."""
    return derived(p, "cpu_group", lambda: _choose_group(p))


def _choose_group(p: BlockPattern) -> int:
    """How many block rows share a tile: what makes the forward cheapest, by measured costs."""
    (bm, bn), (mb, nb) = p.block_size, p.grid
    row = entry_rows(p.crow_indices, p.num_blocks).numpy()
    which, row = row // max(mb, 1), row % max(mb, 1)
    columns = p.col_indices.numpy()
    best, best_cost, group = 1, np.inf, 1
    while group == 1 or group * bm <= 256:
        tiles = which * -(-mb // group) + row // group
        union = len(np.unique(tiles * nb + columns))
        cost = union * bn * _column_ns(group * bm) + len(np.unique(tiles)) * 1000
        if cost < best_cost:
            best, best_cost = group, cost
        group *= 2
    return best


def _column_ns(rows: int) -> float:
    """Nanoseconds for one column of a tile with `rows` rows: gathering it, and its scores.

    Fitted on two cores of an EPYC 9004, fp32, head size 64, 2026-11-20.
    """
    return 15.0 + 1.8 * rows
