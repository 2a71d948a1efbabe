"""Block rows cut into items of about equally many stored blocks, and the counters of their pieces.

A product by items keeps a whole GPU busy where there are few block rows, or where one has most of
the blocks. A piece of a row that was cut leaves its sum in a workspace; the last piece to come adds
them up in the order of the row, so that the same inputs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.derived import derived

ITEM_FIELDS = 8  # int32, of which the last three are unused: an item is one sector of memory
# Launches that may be captured before a graph has to set its counters to zero itself.
GRAPHS = 16


def cut_rows(pattern: BlockPattern, limit: int) -> Tensor:
    """int32 (items, 8): block row (pattern * Mb + row), first stored block and the one after the
    last, the row's first item, the row's number of pieces.

    A row of c blocks is cut into round(c / limit) pieces, at least 1: an item has up to 3/2 *
    limit blocks. But no row is cut into more pieces than each then has blocks, about: adding them
    up would take longer than summing one. Made once for a pattern, without a host sync: the number
    of items is bounded, not read, and the items too many name the block row after the last.
    """

    def build() -> Tensor:
        p = pattern
        rows = p.num_patterns * p.grid[0]
        counts = p.crow_indices.diff(dim=-1).flatten().long()
        worth = (counts - 1).clamp(min=0).double().sqrt().long() + 1
        pieces = ((counts + limit // 2) // limit).clamp(min=1).minimum(worth)
        ends = pieces.cumsum(0)
        each = torch.arange(most_items(p, limit), device=p.device)
        row = torch.searchsorted(ends, each, right=True)
        columns = (counts, pieces, ends - pieces, p.crow_indices[:, :-1].flatten().long())
        of_row = torch.nn.functional.pad(torch.stack(columns, -1), (0, 0, 0, 1), value=1)[row]
        count, parts, first, start = of_row.unbind(-1)
        piece = each - first
        begin, end = (start + at * count // parts for at in (piece, piece + 1))
        unused = torch.zeros_like(row)
        fields = [row, begin, end, first, parts, *[unused] * (ITEM_FIELDS - 5)]
        assert row.shape[0] >= rows
        return torch.stack(fields, -1).int()

    return derived(pattern, ("row_cuts", limit), build)


def most_items(pattern: BlockPattern, limit: int) -> int:
    """How many items `cut_rows` makes, at most."""
    rows = pattern.num_patterns * pattern.grid[0]
    if (pattern.grid[1] + limit // 2) // limit <= 1:
        return rows  # no row can be cut
    return rows + pattern.num_blocks // limit


class Counters(NamedTuple):
    """Zeros that launches count in and leave as zeros: a tensor for every stream, and one for every
    captured launch, which may run beside any other.
    """

    by_stream: dict[int, Tensor]
    free: list[Tensor]
    captured: list[Tensor]


def row_counters(pattern: BlockPattern, size: int) -> Tensor:
    """int32 (size,), all 0 when a launch on the current stream begins, if all launches leave it so.

    Kept with the pattern's lists, which a captured graph reads too. A launch that is captured gets
    a tensor of its own, which was set to zero before, by an earlier call outside the capture;
    without one, or after :data:`GRAPHS` captures, the graph itself sets one to zero, every time.
    """
    device = pattern.device
    kept = derived(pattern, ("row_counters", size), lambda: Counters({}, [], []))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    if device.type != "cuda":
        return kept.by_stream.setdefault(0, zeros(size))
    if torch.cuda.is_current_stream_capturing():
        if not kept.free:
            return zeros(size)
        kept.captured.append(kept.free.pop())
        return kept.captured[-1]
    stream = torch.cuda.current_stream(device).cuda_stream
    if stream not in kept.by_stream:
        kept.by_stream[stream] = zeros(size)
        if not kept.free and not kept.captured:
            # each begins at 16 bytes, as launches were packed for
            kept.free.extend(zeros(GRAPHS, -(-size // 4) * 4)[:, :size].unbind())
    return kept.by_stream[stream]
