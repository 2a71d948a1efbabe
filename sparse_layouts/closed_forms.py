"""Patterns that formulas give, listed by row and by column without sorting anything.

What a formula says of block rows and columns is computed on the host and sent in one copy; what is
O(stored blocks) is made on the device, which is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, send_together

Numbers = np.ndarray | int


class Progression(NamedTuple):
    """`start + step * t` for `0 <= t < length`, for every line (a block row, or a block column).

    `start` and `length` are integers that broadcast to (patterns, lines). Where the length is 0 or
    less there is nothing, whatever the start.
    """

    start: Numbers
    length: Numbers
    step: int = 1


class Stripe(NamedTuple):
    """Blocks that are one progression in every block row and one in every block column.

    `columns` are those of a block row, `rows` those of a block column, of the same blocks. `tile`
    broadcasts to (patterns, Mb): the bit tile of a block row's blocks, 0 where they are full.
    """

    columns: Progression
    rows: Progression
    tile: Numbers = 0


def closed_form(
    stripes: Sequence[Stripe],
    *,
    patterns: int,
    shape: tuple[int, int],
    block_size: tuple[int, int],
    device: torch.device,
    lead: tuple[int, ...] = (),
    head_map: np.ndarray | None = None,
    tiles: np.ndarray | None = None,
) -> BlockPattern:
    """The pattern of stripes that have no block in common, as BlockPattern describes it.

    They are given from the lower left to the upper right: from left to right in every block row,
    from the bottom to the top in every block column. `head_map` and `tiles` come from the host.
    """
    mb, nb = -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])
    number, upper_first = len(stripes), stripes[::-1]

    # A part (pattern, line, stripe) is what a stripe has in a line; its numbers are tables that
    # broadcast to all parts. A block's part by row is its part by column's `part_in_row_0`, and
    # `number` more for every row; `column_in_steps` says where in that part it is.
    by_row = _tables([s.columns for s in stripes])
    by_column = _tables([s.rows for s in upper_first])
    first_part = np.arange(patterns)[:, None] * (mb * number)
    part_in_row_0 = _table([first_part + s for s in reversed(range(number))])
    column_in_steps = _table([np.arange(nb) // s.columns.step for s in upper_first])
    lengths = by_row[1]
    total = int(lengths.sum(dtype=np.int64)) * (patterns * mb * number) // max(lengths.size, 1)
    if total >= 2**31:
        raise ValueError(
            f"a mask of {shape} in blocks of {block_size} would store {total} blocks; its int32 "
            f"lists hold less than {2**31}: take a larger block"
        )
    tiles = tiles if total else None
    tile = None if tiles is None else _table([s.tile for s in stripes])
    tables = [*by_row, tile, *by_column, part_in_row_0, column_in_steps]
    *sent, heads, words = send_together([*tables, head_map, tiles], device)

    def each_part(table: Tensor | None, lines: int) -> Any:
        return None if table is None else table.expand(patterns, lines, number).reshape(-1)

    def offsets(ends: Tensor, lines: int) -> Tensor:  # (P, lines + 1)
        return ends.as_strided((patterns, lines + 1), (lines * number, number)).contiguous()

    start, length, step, tile_of_part = (each_part(table, mb) for table in sent[:4])
    ends, columns, spread = _listed(start, length, step, total)
    crow, block_tiles = offsets(ends, mb), None if words is None else spread(tile_of_part)
    # a block's place in the row lists, but for its column in steps
    place = ends[:-1] - (start if step is None else start.div(step, rounding_mode="floor"))

    start, length, step, part, in_steps = (each_part(table, nb) for table in sent[4:])
    ends, rows, spread = _listed(start, length, step, total)
    slots = spread(part).add_(rows, alpha=number)  # the part by row
    slots = place.index_select(0, slots)
    slots.add_(spread(in_steps))
    return BlockPattern(
        crow_indices=crow,
        col_indices=columns,
        row_slots=None,
        ccol_indices=offsets(ends, nb),
        row_indices=rows,
        col_slots=slots,
        head_map=None if heads is None else heads.clone(),
        block_tiles=block_tiles,
        tiles=None if words is None else words.clone(),
        block_counts=None,
        shape=shape,
        block_size=block_size,
        lead=lead,
    )


def _table(numbers: Sequence[Numbers]) -> np.ndarray:
    """int32 (1 or P, 1 or lines, stripes) of a number a stripe."""
    shape = np.broadcast_shapes((1, 1), *(np.shape(n) for n in numbers))
    table = np.empty((*shape, len(numbers)), dtype=np.int32)
    for s, n in enumerate(numbers):
        table[..., s] = n
    return table


def _tables(progressions: Sequence[Progression]) -> tuple[np.ndarray, np.ndarray, Any]:
    """The starts, lengths and steps (None: all 1) of a progression a stripe."""
    starts, lengths, steps = (_table(numbers) for numbers in zip(*progressions, strict=True))
    return starts, np.maximum(lengths, 0, out=lengths), steps if (steps != 1).any() else None


def _listed(
    start: Tensor, length: Tensor, step: Tensor | None, total: int
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Of progressions, by part (step None: all 1): where each ends in the list (parts + 1, from 0),
    the list (total,), and the function that gives every entry its part's number. All int32.
    """
    ends = torch.nn.functional.pad(length, (1, 0)).cumsum(0, dtype=torch.int32)
    if length.device.type == "cpu":  # numpy repeats values 4x faster than torch gathers them
        repeats = length.numpy()

        def spread(numbers: Tensor) -> Tensor:
            return torch.from_numpy(np.repeat(numbers.numpy(), repeats))
    else:
        part = torch.repeat_interleave(length, output_size=total)

        def spread(numbers: Tensor) -> Tensor:
            return numbers.index_select(0, part)

    # start + step * (entry - the part's first entry)
    listed = torch.arange(total, dtype=torch.int32, device=length.device)
    if step is None:
        return ends, listed.add_(spread(start - ends[:-1])), spread
    # the int32 product may wrap around, and the sum then wraps back
    origin = torch.addcmul(start, step, ends[:-1], value=-1)
    return ends, listed.mul_(spread(step)).add_(spread(origin)), spread
