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


def by_triton(p: BlockPattern, head_dim: int, *, gradients: bool) -> bool:
    """Whether the Hopper kernel leaves a call there to Triton."""
    q = torch.zeros(1, 2, p.shape[0], head_dim, dtype=torch.bfloat16)
    facts = block_attention.facts(q, q, q, p, bias=False, lengths=False, gradients=gradients)
    facts = facts._replace(device="cuda", capability=(9, 0), triton=(3, 6, 0))
    forward = requirements.hopper_attention_forward
    requires = requirements.hopper_attention_two_passes if gradients else forward
    reason = requires(facts)
    assert reason is None or f"not {facts.fill}" in reason
    return reason is not None


@pytest.mark.parametrize(
    ("block", "forward", "backward"),
    [(16, (64, 128), (64, 128, 256)), (32, (), (64, 128, 256)), (64, (), ())],
)
def test_on_hopper_unlike_small_blocks_are_left_to_triton(
    block: int,
    forward: tuple[int, ...],
    backward: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention, "capability_of", lambda device: (9, 0))
    unlike, others = random_mask(block).block_pattern, alike(block).block_pattern
    for head_dim in (64, 128, 256):
        assert by_triton(unlike, head_dim, gradients=False) == (head_dim in forward)
        assert by_triton(unlike, head_dim, gradients=True) == (head_dim in backward)
        assert not by_triton(others, head_dim, gradients=False)
        assert not by_triton(others, head_dim, gradients=True)


def test_how_alike_rows_are_is_asked_only_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(block: int, capability: tuple[int, int], **options: bool) -> int:
        monkeypatch.setattr(block_attention, "capability_of", lambda device: capability)
        p = random_mask(block).block_pattern
        q = torch.zeros(1, 2, p.shape[0], 64, dtype=torch.bfloat16)
        given = {"bias": False, "lengths": False} | options
        return block_attention.facts(q, q, q, p, **given).fill

    assert fill(16, (9, 0)) > 0
    assert fill(32, (9, 0), gradients=True) > 0
    assert fill(32, (9, 0)) == 0
    assert fill(64, (9, 0), gradients=True) == 0
    assert fill(16, (8, 0)) == 0
    assert fill(16, (9, 0), lengths=True) == 0
