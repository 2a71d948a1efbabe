"""Unit schedules visit what a pattern stores, once, and say truly where no mask is needed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.kernels.block_attention.heads import list_of_head, shared_lists
from sparse_layouts.kernels.block_attention.unit_schedule import (
    DEAD,
    OFFSET,
    PLAIN,
    RUN_BEGIN,
    RUN_END,
    START,
    TILES,
    UNIT,
    UNITS,
    UnitSchedule,
    gradient_schedules,
    unit_schedule,
)
from tests.kernels.cases import Stored, make_pattern, random_source

PATTERNS = {
    "blocks_16": Stored((150, 130), (16, 16), 2, tiles=True, counts=True),
    "blocks_32": Stored((200, 170), (32, 32), 3, blocks="gaps"),
    "blocks_64": Stored((330, 260), (64, 64), 2, tiles=True),
    "blocks_128": Stored((300, 400), (128, 128), 2, tiles=True, counts=True),
    "blocks_256": Stored((600, 500), (256, 256)),
    "tall": Stored((260, 100), (128, 16), 2, tiles=True),
    "wide": Stored((100, 520), (16, 256), 2, tiles=True),
    "causal": Stored((450, 450), (64, 64), blocks="causal"),
    "none": Stored((130, 130), (64, 64), blocks="none"),
    "all": Stored((128, 192), (64, 64), blocks="all"),
    "transposed": Stored((200, 150), (32, 64), 2, tiles=True, transposed=True),
}


def bits_of(p: BlockPattern, tile: int) -> Tensor:
    """int (bm, bn): what a block with this tile stores; 0 means all."""
    bm, bn = p.block_size
    if tile == 0:
        return torch.ones(bm, bn, dtype=torch.int)
    assert p.tiles is not None
    columns = torch.arange(bn)
    return (p.tiles[tile - 1][:, columns // 32] >> (columns % 32)) & 1


def entries_of(p: BlockPattern) -> Tensor:
    """int (P, M, N): how often each entry is stored, from the lists."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    out = torch.zeros(p.num_patterns, mb * bm, nb * bn, dtype=torch.int)
    for pattern, starts in enumerate(p.crow_indices.tolist()):
        for row in range(mb):
            for at in range(starts[row], starts[row + 1]):
                slot = at if p.row_slots is None else int(p.row_slots[at])
                column = int(p.col_indices[at])
                tile = 0 if p.block_tiles is None else int(p.block_tiles[slot])
                count = 1 if p.block_counts is None else int(p.block_counts[slot])
                block = out[pattern, row * bm : (row + 1) * bm, column * bn : (column + 1) * bn]
                block += bits_of(p, tile) * count
    return out[:, :m, :n]


def visited(p: BlockPattern, s: UnitSchedule, units: int, tile: int) -> Tensor:
    """int (P, M, N): how often the units visit each entry; checks the flags."""
    (m, n), (bm, bn) = p.shape, p.block_size
    piece, sub = min(bn, tile), max(1, UNIT // bm)
    slots = tile // piece
    out = torch.zeros(p.num_patterns, -(-m // UNIT) * UNIT, n + tile + bn, dtype=torch.int)
    for pattern, group in ((i, g) for i in range(p.num_patterns) for g in s.rows[i].tolist()):
        assert group[TILES] >= 1
        for u in range(units):
            unit = group[UNITS + u]
            assert 0 <= group[RUN_BEGIN + u] < group[RUN_END + u] <= group[TILES]
            for t in range(group[START] + group[RUN_BEGIN + u], group[START] + group[RUN_END + u]):
                seen = torch.zeros(UNIT, tile, dtype=torch.int)
                for slot in range(slots):
                    column = int(s.columns[t * slots + slot])
                    for j in range(sub):
                        which = int(s.block_tiles[t * slots + slot, u * sub + j])
                        if column < 0 or which < 0:
                            continue
                        r, c = (unit * UNIT) % bm if bm > UNIT else 0, (column * piece) % bn
                        height = min(bm, UNIT)
                        bits = bits_of(p, which)[r : r + height, c : c + piece]
                        if s.log_counts is not None:
                            log = float(s.log_counts[t * slots + slot, u * sub + j])
                            bits = bits * round(2.0**log)
                        rows = slice(j * height, (j + 1) * height)
                        seen[rows, slot * piece : (slot + 1) * piece] = bits
                        first = unit * UNIT
                        place = out[pattern, first : first + UNIT, column * piece :]
                        place[rows, :piece] += bits
                flag = (int(s.flags[t]) >> (2 * u)) & 3
                columns = s.columns[t * slots : (t + 1) * slots]
                if flag == PLAIN:
                    assert (seen[: max(0, m - unit * UNIT)] == 1).all()
                    assert ((columns >= 0) & ((columns + 1) * piece <= n)).all()
                if flag == DEAD:
                    assert not seen.any()
                    # tiles of one piece: a run is unbroken, or the one tile of a unit without any
                    assert slots > 1 or group[RUN_END + u] - group[RUN_BEGIN + u] == 1
                assert unit >= 0 or flag == DEAD
    return out[:, :m, :n]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("by_length", [False, True])
def test_visits_are_the_entries(name: str, units: int, tile: int, by_length: bool) -> None:
    p = make_pattern(PATTERNS[name], random_source(name))
    s = unit_schedule(p, units, tile, pair_by_length=by_length)
    assert torch.equal(visited(p, s, units, tile), entries_of(p))
    members = s.rows[..., UNITS : UNITS + units].flatten(1).sort(1).values
    expected = torch.arange(members.shape[1]) - (members.shape[1] - -(-p.shape[0] // UNIT))
    assert (members == expected.clamp(min=-1)).all()  # every unit once
    assert s.flags.numel() <= p.num_blocks * 16 + s.rows.shape[:2].numel() + 1


@pytest.mark.parametrize("name", PATTERNS)
def test_heaviest_first(name: str) -> None:
    p = make_pattern(PATTERNS[name], random_source(name))
    s = unit_schedule(p, 2, 128)
    tiles = s.heaviest_first[..., TILES]
    assert (tiles.diff(dim=1) <= 0).all()
    for rows, sorted_rows in zip(s.rows.tolist(), s.heaviest_first.tolist(), strict=True):
        assert sorted(rows) == sorted(sorted_rows)


@pytest.mark.parametrize("name", ["blocks_64", "blocks_128", "blocks_256", "causal", "none"])
@pytest.mark.parametrize("by_length", [False, True])
def test_what_one_pass_writes_the_other_finds(name: str, by_length: bool) -> None:
    p = make_pattern(PATTERNS[name], random_source(name))
    found = gradient_schedules(p, 2, pair_by_length=by_length)
    columns, rows = found.by_column, found.by_row
    owners = {}  # of a place in a pattern: query unit and key unit
    for pattern, groups in enumerate(columns.rows.tolist()):
        for group in groups:
            for i in range(group[TILES]):
                for u in range(2):
                    place = (group[OFFSET] + i) * 2 + u
                    assert place < found.num_places
                    query = int(columns.columns[group[START] + i])
                    owners[pattern, place] = (query, group[UNITS + u])
    needed = 0
    for pattern, groups in enumerate(rows.rows.tolist()):
        for group in groups:
            for t in range(group[START], group[START] + group[TILES]):
                for u in range(2):
                    live = group[UNITS + u] >= 0 and int(rows.block_tiles[t, u]) >= 0
                    place = int(found.places[t * 2 + u])
                    assert (place >= 0) == live
                    if live:
                        own = (group[UNITS + u], int(rows.columns[t]))
                        assert owners[pattern, place] == own
                        needed += 1
    transposed = transpose_pattern(p)
    halves = [math.prod(max(1, edge // UNIT) for edge in p.block_size)]
    assert needed <= transposed.num_blocks * halves[0]


def test_heads_that_share_their_lists() -> None:
    p = make_pattern(Stored((128, 128), (64, 64), 4), random_source("shared"))
    by_head = p._replace(lead=(4,))
    assert not shared_lists(by_head, list_of_head(by_head, 4), 2)
    assert shared_lists(by_head, list_of_head(by_head, 8), 2)  # a list a KV head
    assert not shared_lists(by_head, list_of_head(by_head, 8), 4)
    alike = by_head._replace(head_map=torch.tensor([1, 1, 3, 3], dtype=torch.int32))
    assert shared_lists(alike, list_of_head(alike, 4), 2)
    by_sample = torch.tensor([[0, 0], [1, 2]], dtype=torch.int32)
    assert not shared_lists(p, by_sample, 2)
    assert shared_lists(p, by_sample, 1)
    assert not shared_lists(p, torch.zeros(1, 3, dtype=torch.int32), 2)
