"""Which tile the Triton kernels of attention take, and which gradients are theirs on Hopper, by how
alike neighbouring block rows are.
"""

from __future__ import annotations

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.kernels import block_attention, requirements
from sparse_layouts.kernels.block_attention.tile_schedule import (
    TILE_ROWS,
    fill_both_ways,
    tile_fill,
)
from sparse_layouts.kernels.block_attention.triton_backward_columns import COLUMN_TILES
from sparse_layouts.kernels.block_attention.triton_backward_rows import ROW_TILES
from sparse_layouts.kernels.block_attention.triton_common import (
    TileRow,
    choose,
    shared_memory_kb,
    variants,
)
from sparse_layouts.kernels.block_attention.triton_forward import FORWARD_TILES

TABLES = [FORWARD_TILES, COLUMN_TILES, ROW_TILES]


def random_mask(block: int, density: float = 0.1, blocks: int = 41) -> sl.BSRTensor:
    keep = torch.rand(2, blocks, blocks, generator=torch.Generator().manual_seed(0)) < density
    return sl.bsr_mask(keep, block)


def alike(block: int) -> sl.BSRTensor:
    return sl.sliding_window(1000, block_size=block, window=512)


def by_hand(p: BlockPattern) -> float:
    """The stored share of the blocks that tiles visit, block by block."""
    each, (mb, _) = TILE_ROWS // p.block_size[0], p.grid
    crow, columns = p.crow_indices.tolist(), p.col_indices.tolist()
    stored, visited = 0, 0
    for lists in crow:
        for first in range(0, mb, each):
            last = min(first + each, mb)
            found = [columns[lists[i] : lists[i + 1]] for i in range(first, last)]
            stored += sum(map(len, found))
            visited += each * len(set().union(*found))
    return stored / visited


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("make", [random_mask, alike])
def test_fill_is_the_stored_share(make: type[sl.BSRTensor], block: int) -> None:
    p: BlockPattern = make(block).block_pattern
    for pattern in (p, transpose_pattern(p)):
        assert tile_fill(pattern) == pytest.approx(by_hand(pattern))


def test_fill_of_blocks_as_high_as_a_tile_or_of_nothing_is_one() -> None:
    assert tile_fill(random_mask(64).block_pattern) == 1
    assert tile_fill(random_mask(128).block_pattern) == 1
    assert tile_fill(sl.bsr_mask(torch.zeros(4, 4, dtype=torch.bool), 16).block_pattern) == 1


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_unlike_rows_of_small_blocks_take_a_narrower_tile(
    table: list[TileRow], head_dim: int
) -> None:
    def tile(mask: sl.BSRTensor) -> int:
        p = mask.block_pattern
        found = choose(table, 2, head_dim, 16, 227, lambda: tile_fill(p))
        return found.columns if table is COLUMN_TILES else found.rows

    assert tile(random_mask(16)) < tile(alike(16))


@pytest.mark.parametrize("table", TABLES)
def test_where_no_row_asks_the_pattern_is_not_read(table: list[TileRow]) -> None:
    def fill() -> float:
        raise AssertionError("this waits for the device")

    for size in (2, 4):
        for head_dim in (16, 64, 128, 256):
            for block in (16, 32, 64, 128) if size == 4 else (32, 64, 128):
                for shared_kb in (99, 163, 227):
                    choose(table, size, head_dim, block, shared_kb, fill)


@pytest.mark.parametrize("table", TABLES)
def test_every_tile_is_compiled_ahead_of_time(table: list[TileRow]) -> None:
    compiled = {(case.dtype.itemsize, case.tiles_of(table)) for case in variants()}
    assert {(row.element_bytes, row.tiles) for row in table} == compiled


@pytest.mark.parametrize("table", TABLES)
def test_a_gpu_without_a_row_is_named(table: list[TileRow]) -> None:
    with pytest.raises(NotImplementedError, match="2-byte elements, head size 256, 64 KB"):
        choose(table, 2, 256, 64, 64, lambda: 1.0)
    assert shared_memory_kb(torch.device("cpu")) == 227


def test_fill_both_ways_counts_what_rows_and_columns_visit() -> None:
    pairs = torch.rand(20, 40, generator=torch.Generator().manual_seed(0)) < 0.1
    p = sl.bsr_mask(pairs.repeat_interleave(2, 0), 16).block_pattern  # rows alike, columns not
    rows, columns = tile_fill(p), tile_fill(transpose_pattern(p))
    assert rows > 1.5 * columns
    visited = p.num_blocks / rows + p.num_blocks / columns
    assert fill_both_ways(p) == pytest.approx(2 * p.num_blocks / visited)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("block", "make", "by_triton"),
    [
        (16, random_mask, True),
        (16, alike, False),
        (32, random_mask, True),
        (32, alike, False),
        (64, random_mask, False),
    ],
)
def test_on_hopper_unlike_small_blocks_have_their_gradients_from_triton(
    block: int,
    make: type[sl.BSRTensor],
    by_triton: bool,
    head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention, "capability_of", lambda device: (9, 0))
    p: BlockPattern = make(block).block_pattern
    q = torch.zeros(1, 2, p.shape[0], head_dim, dtype=torch.bfloat16)
    options = {"bias": False, "lengths": False}
    facts = block_attention.facts(q, q, q, p, **options, gradients=True)
    assert (facts.fill > 0) == (block < 64)
    # the forward and sequences do not ask
    assert block_attention.facts(q, q, q, p, **options).fill == 0
    lengths = options | {"lengths": True}
    assert block_attention.facts(q, q, q, p, **lengths, gradients=True).fill == 0
    on_gpu = facts._replace(device="cuda", capability=(9, 0), triton=(3, 6, 0))
    reason = requirements.hopper_attention_two_passes(on_gpu)
    assert (reason is not None) == by_triton, reason
    assert reason is None or f"not {facts.fill}" in reason
