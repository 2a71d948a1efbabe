"""A block list cut into equally many steps a program, whatever rows they belong to.

A step is 64 columns of a block. What a program has of a block row is a stretch; a row that several
programs have is in pieces, whose sums are added up in the order of the row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.derived import derived

STEP_COLUMNS = 64
STRETCH_FIELDS = 8  # int32, of which the last two are unused: a stretch is one sector of memory


def steps_of(pattern: BlockPattern) -> int:
    """Steps of all blocks."""
    return pattern.num_blocks * (pattern.block_size[1] // STEP_COLUMNS)


def most_programs(pattern: BlockPattern) -> int:
    """How many are worth it: a row of the mean length is then in as many pieces as each has steps.
    With more, adding the pieces up would take longer than summing one.
    """
    rows = max(1, pattern.num_patterns * pattern.grid[0])
    return rows * (1 + math.isqrt(max(0, steps_of(pattern) // rows - 1)))


def stretches(pattern: BlockPattern, programs: int) -> Tensor:
    """int32 (programs + block rows - 1, 8): block row (pattern * Mb + row), steps, the piece of the
    row that it is, the row's number of pieces, where the first of them has its sum, the program's
    next stretch, or -1.

    Program p has `steps // programs` steps, one more if p is less than the remainder, and begins
    with stretch p. Rows without blocks are stretches without steps, shared out evenly. Of rows in
    several pieces these have places of their own, one after the other, less than `2 * programs` in
    all. There may be stretches too many, which no program comes to. Made once for a pattern,
    without a host sync; `programs` is at most the number of steps.
    """

    def build() -> Tensor:
        p, device = pattern, pattern.device
        parts, rows = p.block_size[1] // STEP_COLUMNS, p.num_patterns * p.grid[0]
        each, more = divmod(steps_of(p), programs)
        starts, ends = (
            lines.flatten().long() * parts
            for lines in (p.crow_indices[:, :-1], p.crow_indices[:, 1:])
        )
        numbers = torch.arange(programs + 1, device=device)
        cuts = numbers * each + numbers.clamp(max=more)  # a program's first step
        inner = cuts[1:-1].contiguous()
        all_rows = torch.arange(rows, device=device)
        empty = starts == ends
        first_program = torch.searchsorted(cuts, starts, right=True) - 1
        last_program = torch.searchsorted(cuts, ends, right=False) - 1
        pieces = torch.where(empty, 1, last_program - first_program + 1)
        sums = torch.where(pieces > 1, pieces, 0)
        sums = sums.cumsum(0) - sums

        # one that begins where its row does, for every row, and one for every cut within a row
        cut_row = torch.searchsorted(ends, inner, right=True)
        row = torch.cat([all_rows, cut_row])
        begin = torch.cat([starts, inner])
        owner = torch.cat(
            [
                torch.where(empty, all_rows * programs // rows, first_program),
                torch.where(starts[cut_row] == inner, programs, numbers[1:-1]),
            ]
        )
        last = torch.minimum(ends[row], cuts[(owner + 1).clamp(max=programs)])
        steps = torch.where(empty[row], 0, last - begin)
        piece = torch.where(empty[row], 0, owner - first_program[row])
        owner, order = torch.sort(owner * rows + row)
        owner = owner // rows
        # the first one of every program comes first
        rank = torch.arange(row.shape[0], device=device)
        same = owner[1:] == owner[:-1]
        goes_on = torch.nn.functional.pad(same, (0, 1)) & (owner < programs)
        is_first = ~torch.nn.functional.pad(same, (1, 0))
        at = torch.where(is_first, owner, programs + rank - owner - 1)
        at = torch.where(owner == programs, rank, at)
        following = torch.where(goes_on, programs + rank - owner, -1)
        of_row = (t[row] for t in (pieces, sums))
        fields = torch.stack([row, steps, piece, *of_row], -1)[order]
        fields = torch.cat([fields, following[:, None]], -1).int()
        made = fields.new_zeros(row.shape[0], STRETCH_FIELDS)
        made[:, : fields.shape[1]].index_copy_(0, at, fields)
        return made

    return derived(pattern, ("stretches", programs), build)


def columns_of_all(pattern: BlockPattern) -> Tensor:
    """int32 (nnzb,): the block column of every block of the row lists, counted on from pattern to
    pattern (pattern * Nb + column).
    """
    p = pattern
    if p.num_patterns == 1:
        return p.col_indices

    def build() -> Tensor:
        bases = torch.arange(p.num_patterns, dtype=torch.int32, device=p.device) * p.grid[1]
        lengths = p.crow_indices[:, -1] - p.crow_indices[:, 0]
        return p.col_indices + bases.repeat_interleave(lengths, output_size=p.num_blocks)

    return derived(p, "columns_of_all", build)
