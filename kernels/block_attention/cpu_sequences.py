"""Schedules of several sequences for the CPU kernels, made for every call from their lengths.

The tiles of all sequences and heads are stacked together, so that many short sequences cost what
they attend to. A pattern's tiles are those of its own schedule (`cpu_schedule`), made once; a
sequence takes the rows in which it has queries, and of their columns those that hold its keys.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.derived import derived
from sparse_layouts.kernels.block_attention.sequences import Sequences, places
from sparse_layouts.kernels.cpu_common import Scratch
from sparse_layouts.kernels.cpu_schedule import (
    STEP_SCORES,
    Schedule,
    SequenceTiles,
    Step,
    best_group,
    kinds_of,
    pattern_tiles,
)

# Fewest rows for which a step's columns are counted: a step of single queries would gather hundreds
# of megabytes.
FEWEST_ROWS = 16


class Spans(NamedTuple):
    """Runs of rows of x (B, H, N, D), and where they lie in a buffer (H, total, D).

    `runs`: (sample, first row, first row in the buffer, rows), which are at least one.
    """

    runs: list[list[int]]
    total: int

    def laid_out(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """The buffer; `fill` where no run lies."""
        out = torch.empty(x.shape[1], self.total, x.shape[3], dtype=dtype)
        end = 0
        for sample, row, target, rows in self.runs:
            out[:, end:target] = fill
            end = target + rows
            out[:, target:end] = x[sample, :, row : row + rows]
        out[:, end:] = fill
        return out

    def put_back(self, buffer: Tensor, x: Tensor) -> None:
        """Writes the runs of a buffer into x."""
        for sample, row, target, rows in self.runs:
            x[sample, :, row : row + rows] = buffer[:, target : target + rows]


class BlocksInPlace:
    """Blocks of keys or values x (B, Hkv, N, D) read where they lie, for calls that read few of
    them.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, places: BlockPlaces, key_blocks: int) -> None:
        width = x.shape[3]
        strides = [s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True)][:3]
        assert lies_in_rows(x)
        self.steps = [s // width for s in strides]
        last = sum(step * (n - 1) for step, n in zip(self.steps, x.shape, strict=False))
        self.rows = x.as_strided((last + 1, width), (width, 1))
        self.dtype, self.places, self.key_blocks = dtype, places, key_blocks

    def gather(self, scratch: Scratch, name: str, step: Step, bn: int) -> Tensor:
        """A step's blocks (T, L * bn, D); the last key again in rows that are none."""
        head = step.columns.div(self.key_blocks, rounding_mode="floor")
        block = step.columns - head * self.key_blocks
        sample, first, rows = (t[block][:, None] for t in self.places)
        row = first + torch.minimum(torch.arange(bn), rows - 1)
        of_sample, of_head, of_row = self.steps
        index = (sample * of_sample + head[:, None] * of_head + row * of_row).flatten()
        found = scratch.gather(name, self.rows, index, index.shape[0], -1)
        found = scratch.cast(name, found, self.dtype)
        return found.view(step.tiles.shape[0], -1, self.rows.shape[1])


def lies_in_rows(x: Tensor) -> bool:
    """Whether x (B, H, N, D) is rows of D, a whole number of rows apart."""
    *sizes, width = x.shape
    apart = (s for s, n in zip(x.stride(), sizes, strict=False) if n > 1)
    return x.numel() > 0 and (width == 1 or x.stride(3) == 1) and all(s % width == 0 for s in apart)


class BlockPlaces(NamedTuple):
    """Where every block of keys of a KV head lies in k and v, (blocks,) int64: `sample`, `first`
    row, and how many `rows` from there on are keys.
    """

    sample: Tensor
    first: Tensor
    rows: Tensor


class SequencePlan(NamedTuple):
    """A schedule, where the queries and keys lie for it, and where the blocks of keys come from."""

    schedule: Schedule
    queries: Spans
    keys: Spans
    blocks: BlockPlaces

    def reads_few(self, num_kv_heads: int) -> bool:
        """Whether the steps read no more blocks of keys than there are: they need no copy then."""
        own = self.schedule.sequences
        assert own is not None
        read = sum(step.columns.shape[0] for step in self.schedule.steps)
        return read <= num_kv_heads * own.key_blocks


class _Entries(NamedTuple):
    """The block columns of all tiles, each an entry: its tile (head * num_tiles + tile), column,
    kind a block row (E, group), and entry of the pattern's tiles; masked ones last in a tile.
    """

    target: np.ndarray
    column: np.ndarray
    kinds: np.ndarray
    source: np.ndarray


def sequence_schedule(
    pattern: BlockPattern,
    head_map: Tensor,
    num_kv_heads: int,
    sequences: Sequences,
    q_rows: int,
    k_rows: int,
    dtype: torch.dtype,
    with_positions: bool,
) -> SequencePlan:
    """The schedule of all sequences and heads, and where their queries and keys lie for it.

    `head_map` (B or 1, H) int32; tensors of `q_rows` and `k_rows` rows a sample; masks in `dtype`.
    """
    p, (bm, bn) = pattern, pattern.block_size
    where = places(sequences, q_rows, k_rows, p)
    q_origin, first_row, end_row, k_start, num_keys = (t.numpy() for t in where)
    sample = np.zeros_like(num_keys) if sequences.packed else np.arange(num_keys.size)
    longest = int((end_row - first_row).max(initial=0))
    group = 1 if longest <= bm else best_group(p)
    height = rows = group * bm
    if longest < bm and not with_positions:
        # A few queries: only their rows are computed. A bias is added by whole blocks.
        rows = max(longest, 1)

    # tiles begin at the block rows of a group, those of a few queries at their first
    first_group = first_row // height
    count = np.where(end_row > first_row, -(-end_row // height) - first_group, 0)
    owner = np.repeat(np.arange(count.size), count)  # the sequence of each tile
    groups = _ranges(count) + first_group[owner]
    start = np.clip(first_row[owner], groups * height, (groups + 1) * height - rows)
    begin = np.maximum(start, first_row[owner])
    q_spans = _spans(
        sample[owner],
        q_origin[owner] + begin,
        np.arange(owner.size) * rows + begin - start,
        np.minimum(start + rows, end_row[owner]) - begin,
        owner.size * rows,
    )
    key_blocks = np.where(count > 0, -(-num_keys // bn), 0)
    key_starts = np.cumsum(key_blocks) - key_blocks
    rows_of_keys = np.where(count > 0, num_keys, 0)
    k_spans = _spans(sample, k_start, key_starts * bn, rows_of_keys, int(key_blocks.sum()) * bn)

    terms = derived(p, ("cpu_terms", dtype), lambda: kinds_of(p)[0].to(dtype))
    cut = np.where(num_keys < p.shape[1], num_keys % bn, 0)
    lists = head_map.numpy()[owner % max(head_map.shape[0], 1)].T.astype(np.int64)  # (H, tiles)
    entries, terms = _entries(p, group, lists, groups, key_blocks[owner], cut[owner], terms)
    own = SequenceTiles(
        torch.from_numpy(owner),
        torch.from_numpy(start),
        torch.from_numpy(key_starts[owner]),
        int(key_blocks.sum()),
        bm,
        terms.flatten(0, 1),
    )
    plan = Schedule(group, rows, 0, 0, owner.size, (), (), own)
    steps = _steps(p, plan, entries, lists.shape[0], num_kv_heads, with_positions)
    block_owner = np.repeat(np.arange(count.size), key_blocks)
    block = _ranges(key_blocks) * bn
    blocks = BlockPlaces(
        torch.from_numpy(sample[block_owner]),
        torch.from_numpy(k_start[block_owner] + block),
        torch.from_numpy(np.minimum(num_keys[block_owner] - block, bn)),
    )
    return SequencePlan(plan._replace(steps=steps), q_spans, k_spans, blocks)


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., count - 1 of every count, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - counts, counts)


def _spans(
    sample: np.ndarray, source: np.ndarray, target: np.ndarray, count: np.ndarray, total: int
) -> Spans:
    """Runs, neighbours that are one run in both places put together."""
    runs = np.stack([sample, source, target, count])[:, count > 0]
    sample, source, target, count = runs
    joins = (
        (sample[1:] == sample[:-1])
        & (source[1:] == (source + count)[:-1])
        & (target[1:] == (target + count)[:-1])
    )
    first = np.flatnonzero(np.concatenate([[True], ~joins])[: count.size])
    rows = np.add.reduceat(count, first) if first.size else count
    return Spans(np.stack([sample[first], source[first], target[first], rows], 1).tolist(), total)


def _entries(
    p: BlockPattern,
    group: int,
    lists: np.ndarray,
    groups: np.ndarray,
    key_blocks: np.ndarray,
    cut: np.ndarray,
    terms: Tensor,
) -> tuple[_Entries, Tensor]:
    """The entries of the tiles of `lists` (H, T), and `terms` (kinds, bm, bn) with more kinds.

    By tile (T,): `groups`, its group of block rows; `key_blocks`, how many blocks hold keys; `cut`,
    how many keys the last of them holds, 0: all, or as many as the pattern has columns there.
    """
    tiles, bn = pattern_tiles(p, group), p.block_size[1]
    own = (lists * -(-p.grid[0] // group) + groups).ravel()
    lengths = tiles.starts[own + 1] - tiles.starts[own]
    target = np.repeat(np.arange(own.size), lengths)
    source = np.repeat(tiles.starts[own], lengths) + _ranges(lengths)
    tile = target % max(groups.size, 1)
    held = tiles.columns[source] < key_blocks[tile]
    if not held.all():
        target, source, tile = target[held], source[held], tile[held]
    column, kinds = tiles.columns[source], tiles.kinds[source].astype(np.int64)

    # a block that the sequence ends in is a kind of its own
    ending = np.flatnonzero((column == key_blocks[tile] - 1) & (cut[tile] > 0))
    if ending.size:
        pairs = kinds[ending] * bn + cut[tile[ending]][:, None]
        found, inverse = np.unique(pairs, return_inverse=True)
        kinds[ending] = terms.shape[0] + inverse.reshape(pairs.shape)
        beyond = torch.arange(bn) >= torch.from_numpy(found % bn)[:, None, None]
        more = terms[torch.from_numpy(found // bn)].masked_fill(beyond, -torch.inf)
        terms = torch.cat([terms, more])
    order = np.argsort(target * 2 + (kinds != 0).any(1), kind="stable")
    return _Entries(target[order], column[order], kinds[order], source[order]), terms


def _steps(
    p: BlockPattern,
    plan: Schedule,
    entries: _Entries,
    heads: int,
    num_kv_heads: int,
    with_positions: bool,
) -> tuple[Step, ...]:
    """Tiles of equal length, stacked; those with equally many masked columns are neighbours."""
    own, num_tiles = plan.sequences, plan.num_tiles
    assert own is not None
    lengths = np.bincount(entries.target, minlength=heads * num_tiles)
    masked = np.bincount(entries.target[(entries.kinds != 0).any(1)], minlength=heads * num_tiles)
    first = np.cumsum(lengths) - lengths
    order = np.lexsort((masked, lengths))
    order = order[lengths[order] > 0]
    sorted_lengths = lengths[order]
    key_starts = own.key_starts.numpy()
    positions = pattern_tiles(p, plan.group).positions
    most = STEP_SCORES // max(plan.rows, FEWEST_ROWS) // p.block_size[1]
    steps = []
    at = 0
    while at < order.size:
        length = int(sorted_lengths[at])
        same = int(np.searchsorted(sorted_lengths, length, side="right"))
        tiles = order[at : min(same, at + max(1, most // length))]
        at += tiles.size
        taken = first[tiles][:, None] + np.arange(length)  # (T, L)
        kv_head = tiles // num_tiles // (heads // num_kv_heads)
        begin = kv_head * own.key_blocks + key_starts[tiles % num_tiles]
        width = int(masked[tiles].max())
        kinds = place = None
        if width:
            kinds = entries.kinds[taken[:, length - width :]].transpose(0, 2, 1)
            kinds = torch.from_numpy(kinds.copy())
        if with_positions:
            place = positions[entries.source[taken]].transpose(0, 2, 1)
            place = torch.from_numpy(place.copy())
        columns = torch.from_numpy((entries.column[taken] + begin[:, None]).ravel())
        steps.append(Step(torch.from_numpy(tiles), columns, length, (), place, None, kinds))
    return tuple(steps)
