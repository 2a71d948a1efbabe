"""What another order of the rows of a block layout brings: counts, bytes and modelled times."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sparse_layouts.block_pattern import BlockPattern, entry_rows, tile_table
from sparse_layouts.block_values import slots_in_row_order
from sparse_layouts.derived import derived
from sparse_layouts.dispatch.text import readable_bytes, text_table

# The time of `W @ x` a column of x, in seconds: so much for every entry that there is room for, as
# much again for this many rows over the block's height (the columns' part of x is read once a
# block), so much for every row of the product, and once more to put the rows back in order. Fitted
# to one H200 in bf16, 2026-11-26, torch 2.11: 4096 x 4096 by 4096 columns, blocks 16 wide and 16,
# 32, 64 and 128 high, took 291, 169, 118 and 104 us at 25% of the blocks (this says 288, 180, 126,
# 99) and 83, 49, 42 and 39 at 5% (72, 51, 40, 35); to put the rows in another order took 21.
ENTRY_S = 3.1e-15
ROWS_AS_DEAR = 65
ROW_S = 1.1e-12
ORDER_S = 1.25e-12


class ReorderGain(NamedTuple):
    """What `sl.reorder` brings: blocks, fill-in, bytes and modelled time before and after.

    `block_before` and `block_after` are (bm, bn), `blocks_before` and `blocks_after` how many are
    stored, `entries` the stored entries, which stay the same; bytes are those of values and lists;
    seconds are modelled, of `W @ x` a column of x, for many columns in 16 bits on an H200 (the
    constants of this module): their ratio is what to look at. `print(w.gain)` shows a table.
    """

    block_before: tuple[int, int]
    block_after: tuple[int, int]
    blocks_before: int
    blocks_after: int
    entries: int
    bytes_before: int
    bytes_after: int
    seconds_before: float
    seconds_after: float

    @property
    def speedup(self) -> float:
        """How many times faster the product is by the model; below 1 it is slower. 1 where nothing
        is stored.
        """
        if not self.blocks_before:
            return 1.0
        return self.seconds_before / self.seconds_after

    @property
    def fill_in(self) -> float:
        """The share of the blocks' room that no entry has: zeros that are kept and multiplied."""
        room = self.blocks_after * math.prod(self.block_after)
        return 1 - self.entries / room if room else 0.0

    def __str__(self) -> str:
        room_before = self.blocks_before * math.prod(self.block_before)
        before = 1 - self.entries / room_before if room_before else 0.0
        rows = [
            ["block", *(f"{bm} x {bn}" for bm, bn in (self.block_before, self.block_after))],
            ["stored blocks", f"{self.blocks_before:,}", f"{self.blocks_after:,}"],
            ["fill-in", f"{before:.1%}", f"{self.fill_in:.1%}"],
            ["memory", readable_bytes(self.bytes_before), readable_bytes(self.bytes_after)],
            [
                "modelled time a column",
                *(f"{1e9 * s:,.3g} ns" for s in (self.seconds_before, self.seconds_after)),
            ],
        ]
        slower = "" if self.speedup >= 1 else ", slower than before"
        table = text_table(("", "before", "after"), rows)
        return f"{table}\nmodelled: {self.speedup:.2f}x as fast{slower}"


def modelled_seconds(
    blocks: int, block_size: tuple[int, int], rows: int, reordered: bool = False
) -> float:
    """The time of a product a column of x, for this many rows; see the constants above."""
    each = ENTRY_S * (1 + ROWS_AS_DEAR / block_size[0])
    more = ROW_S + ORDER_S if reordered else ROW_S
    return blocks * math.prod(block_size) * each + rows * more


def block_bytes(
    shape: tuple[int, int], blocks: int, block_size: tuple[int, int], itemsize: int
) -> int:
    """What a BSRTensor of full blocks takes."""
    edges = sum(-(-size // edge) for size, edge in zip(shape, block_size, strict=True))
    return blocks * (math.prod(block_size) * itemsize + 12) + 4 * (edges + 2)


def source_blocks(pattern: BlockPattern, block: tuple[int, int]) -> int:
    """How many blocks of the smaller size store an entry of a pattern of taller ones; once a
    pattern.
    """

    def build() -> int:
        p, (bm, _) = pattern, block
        height = p.block_size[0]
        table = tile_table(p)
        held = table.view(table.shape[0], height // bm, bm * p.block_size[1]).any(-1)
        last = p.grid[0] - 1
        inside = -(-(p.shape[0] - last * height) // bm)  # of the last row of blocks
        each, of_last = held.sum(1), held[:, :inside].sum(1)
        tiles = torch.zeros_like(p.col_indices) if p.block_tiles is None else p.block_tiles
        tiles = tiles[slots_in_row_order(p)].long()
        rows = entry_rows(p.crow_indices, p.num_blocks)
        return int(torch.where(rows == last, of_last[tiles], each[tiles]).sum())

    return derived(pattern, ("source_blocks", block), build)
