"""Lists of blocks cut evenly: every step once, in the order of the lists, and a row's pieces in the
order of the row.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_matmul.even_cuts import (
    columns_of_all,
    most_programs,
    steps_of,
    stretches,
)
from tests.kernels.cases import Stored, make_pattern, random_source

PATTERNS = {
    "some": Stored((640, 1200), (64, 64), 3),
    "power": Stored((640, 4160), (64, 128), 2, blocks="power"),
    "all": Stored((192, 6400), (64, 64), blocks="all"),
    "one": Stored((128, 128), (128, 128), blocks="all"),
    "gaps": Stored((640, 1200), (128, 64), 2, blocks="gaps"),
    "transposed": Stored((1200, 4160), (128, 64), 2, blocks="power", transposed=True),
}


class Stretch(NamedTuple):
    """One as it is met, and the step with which it begins."""

    begin: int
    row: int
    steps: int
    piece: int
    pieces: int
    place: int


def pattern_of(name: str) -> BlockPattern:
    return make_pattern(PATTERNS[name], random_source(name))


def met(p: BlockPattern, programs: int) -> list[list[Stretch]]:
    """What every program comes to."""
    made = stretches(p, programs).tolist()
    found: list[list[Stretch]] = []
    begin = 0
    for at in range(programs):
        own: list[Stretch] = []
        while at >= 0:
            row, steps, piece, pieces, place, at, *_ = made[at]
            own.append(Stretch(begin, row, steps, piece, pieces, place))
            begin += steps
        found.append(own)
    return found


@pytest.mark.parametrize("programs", [1, 2, 3, 17, 132, 1000])
@pytest.mark.parametrize("name", PATTERNS)
def test_stretches_are_the_rows_in_pieces(name: str, programs: int) -> None:
    p = pattern_of(name)
    parts = p.block_size[1] // 64
    programs = min(programs, steps_of(p))
    by_program = met(p, programs)
    each, more = divmod(steps_of(p), programs)
    shares = [sum(s.steps for s in own) for own in by_program]
    assert shares == [each + (at < more) for at in range(programs)]
    crow = [[edge * parts for edge in of_one] for of_one in p.crow_indices.tolist()]
    rows = [edges for of_one in crow for edges in itertools.pairwise(of_one)]
    in_order = [s for own in by_program for s in own]
    places: list[int] = []
    for row, (start, end) in enumerate(rows):
        own = [s for s in in_order if s.row == row]
        assert [s.piece for s in own] == list(range(len(own)))
        assert {s.pieces for s in own} == {len(own)}
        if start == end:
            assert [s.steps for s in own] == [0]
            continue
        assert [s.begin for s in own] == [start, *(s.begin + s.steps for s in own[:-1])]
        assert own[-1].begin + own[-1].steps == end
        assert all(s.steps for s in own)
        if len(own) > 1:
            assert len({s.place for s in own}) == 1
            places.extend(s.place + s.piece for s in own)
    assert len(set(places)) == len(places)
    assert all(0 <= place < 2 * programs for place in places)
    assert len(in_order) <= len(rows) + programs - 1


def test_rows_without_blocks_are_shared_out() -> None:
    p = make_pattern(Stored((64 * 400, 640), (64, 64), blocks="power"), random_source("empty"))
    programs = min(50, steps_of(p))
    most = max(sum(s.steps == 0 for s in own) for own in met(p, programs))
    assert most <= -(-400 // programs)


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("blocks", [1, 2, 5, 64])
def test_rows_are_cut_into_no_more_pieces_than_each_has_steps(rows: int, blocks: int) -> None:
    p = sl.bsr_mask(torch.ones(rows, blocks, dtype=torch.bool), 64).block_pattern
    pieces, rest = divmod(most_programs(p), rows)
    assert rest == 0
    assert pieces <= math.ceil(blocks / pieces) + 1
    assert pieces >= math.isqrt(blocks)


def test_stretches_are_made_once() -> None:
    p = pattern_of("power")
    assert stretches(p, 3) is stretches(p, 3)
    assert stretches(p, 3) is not stretches(p, 4)


def test_stretches_without_a_host_sync() -> None:
    p = pattern_of("power")
    on_meta = BlockPattern._make((*(None if t is None else t.to("meta") for t in p[:10]), *p[10:]))
    assert stretches(on_meta, 17).shape == stretches(p, 17).shape
    assert columns_of_all(on_meta).shape == p.col_indices.shape


@pytest.mark.parametrize("name", PATTERNS)
def test_columns_count_on(name: str) -> None:
    p = pattern_of(name)
    pattern = torch.arange(p.num_patterns).repeat_interleave(
        (p.crow_indices[:, -1] - p.crow_indices[:, 0]).long()
    )
    assert torch.equal(columns_of_all(p).long(), pattern * p.grid[1] + p.col_indices.long())
