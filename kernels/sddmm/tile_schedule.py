"""Tiles of sddmm: the stored blocks of a block row, side by side, cut into equal widths."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.derived import derived


def tile_schedule(pattern: BlockPattern, tile_columns: int) -> tuple[Tensor, Tensor]:
    """The block row (pattern * Mb + row) of each tile of stored columns, and its number in the row.

    Both (tiles,) int32, made once for a pattern, without a host sync: the number of tiles is
    bounded, not read, and the tiles too many name the block row after the last.
    """

    def build() -> tuple[Tensor, Tensor]:
        bn, nnzb = pattern.block_size[1], pattern.num_blocks
        stored = pattern.crow_indices.diff(dim=-1).flatten().long() * bn
        tiles = (stored + tile_columns - 1).div(tile_columns, rounding_mode="floor")
        ends = tiles.cumsum(0)
        bound = nnzb * bn // tile_columns
        if bn < tile_columns:  # every block row may end in a tile that is not full
            bound += min(nnzb, stored.shape[0])
        each = torch.arange(bound, device=pattern.device)
        rows = torch.searchsorted(ends, each, right=True)
        first = torch.nn.functional.pad(ends - tiles, (0, 1))
        return rows.int(), (each - first[rows]).int()

    return derived(pattern, ("sddmm_tiles", tile_columns), build)
