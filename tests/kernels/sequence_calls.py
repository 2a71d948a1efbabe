"""A call of attention over sequences, as plain calls over one sequence each, and their results put
together: what `sequences` means, said without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, build_pattern, entry_rows
from sparse_layouts.kernels.block_attention.sequences import Sequences

Results = tuple["Tensor | None", ...]


class Span(NamedTuple):
    """Where a sequence lies: rows of q and k of a sample, and the pattern's row of its first
    query.
    """

    sample: int
    queries: range
    keys: range
    first_row: int


def spans(sequences: Sequences, q_rows: int, k_rows: int, mask: tuple[int, int]) -> list[Span]:
    """Of every sequence what is in the tensors and in the pattern, a query at a time."""

    def rows(starts: Tensor | None, lens: Tensor, b: int, size: int) -> range:
        start = 0 if starts is None else min(max(int(starts[b]), 0), size)
        return range(start, min(start + max(int(lens[b]), 0), size))

    found = []
    for b in range(sequences.num_sequences):
        queries = rows(sequences.q_starts, sequences.q_lens, b, q_rows)
        keys = rows(sequences.k_starts, sequences.k_lens, b, k_rows)
        past = len(keys) - len(queries)
        seen = [r for r in range(len(queries)) if 0 <= past + r < mask[0]]
        within = range(queries[seen[0]], queries[seen[-1]] + 1) if seen else range(0)
        first = past + seen[0] if seen else 0
        found.append(Span(0 if sequences.packed else b, within, keys[: mask[1]], first))
    return found


def corner(pattern: BlockPattern, rows: int, columns: int) -> tuple[BlockPattern, Tensor]:
    """The first rows and columns of every list set, and which entries of the row lists they are."""
    p, (bm, bn), mb = pattern, pattern.block_size, pattern.grid[0]
    row = entry_rows(p.crow_indices, p.num_blocks)
    which, row = row // max(mb, 1), row % max(mb, 1)
    few = -(-rows // bm)
    taken = ((row < few) & (p.col_indices < -(-columns // bn))).nonzero()[:, 0]
    counts = torch.bincount(which[taken] * few + row[taken], minlength=p.num_patterns * few)
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    first = torch.arange(p.num_patterns, device=p.device)[:, None] * few
    slots = taken if p.row_slots is None else p.row_slots[taken].long()
    cut = build_pattern(
        ends[first + torch.arange(few + 1, device=p.device)],
        p.col_indices[taken],
        shape=(rows, columns),
        block_size=p.block_size,
        lead=(p.num_patterns,),
        block_tiles=None if p.block_tiles is None else p.block_tiles[slots],
        tiles=p.tiles,
        block_counts=None if p.block_counts is None else p.block_counts[slots],
    )
    return cut, taken


class Part(NamedTuple):
    """One sequence of a call: its place, and the pattern, head_map, bias and slots of a plain call.

    `slots`, a tensor a head: of the pattern's entries of that head, their positions in its lists.
    """

    number: int
    span: Span
    pattern: BlockPattern
    head_map: Tensor
    slots: list[Tensor]
    base: Tensor

    def blocks_of(self, values: Tensor, base: Tensor) -> Tensor:
        """(1, S, bm, bn): the blocks at this part's entries, a head after another."""
        own = values[self.number % values.shape[0]]
        starts = base[self.number % base.shape[0]]
        parts = [own[start + slots] for start, slots in zip(starts, self.slots, strict=True)]
        return torch.cat(parts)[None]


def parts_of(
    sequences: Sequences, q_rows: int, k_rows: int, pattern: BlockPattern, head_map: Tensor
) -> Iterator[Part]:
    """The sequences that have a query in the pattern and a key."""
    where = spans(sequences, q_rows, k_rows, pattern.shape)
    for b, span in enumerate(where):
        if not len(span.queries) or not len(span.keys):
            continue
        cut, taken = corner(pattern, span.first_row + len(span.queries), len(span.keys))
        own = head_map[b % head_map.shape[0]][None]
        slots = []
        for which in own[0].long():
            first, last = (int(cut.crow_indices[which, i]) for i in (0, -1))
            slots.append(taken[first:last] - int(pattern.crow_indices[which, 0]))
        lengths = torch.tensor([len(s) for s in slots], device=head_map.device)
        yield Part(b, span, cut, own, slots, (lengths.cumsum(0) - lengths)[None])


def forward_alone(
    function: Callable[..., Results],
    whole: Results,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    sequences: Sequences,
    **options: Any,
) -> Results:
    """`whole`, (B, H, Nq, ...) each or None, with the results of `function`, a plain call for every
    sequence, in the rows of its queries.

    `function` gets the number of the sequence as `first_sample`.
    """
    for part in parts_of(sequences, q.shape[2], k.shape[2], pattern, head_map):
        s, rows, keys = place(part)
        operands = (q[s, :, rows], k[s, :, keys], v[s, :, keys])
        results = function(*operands, *part[2:4], **own_options(part, options))
        for target, result in zip(whole, results, strict=True):
            if target is not None:
                target[s, :, rows] = result
    return whole


def backward_alone(
    function: Callable[..., Results],
    whole: Results,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    sequences: Sequences,
    dbias_base: Tensor | None = None,
    dbias_blocks: int = 0,
    **options: Any,
) -> Results:
    """As `forward_alone`; `whole` are of dq, dk, dv and, (B or 1, dbias_blocks, bm, bn) or None,
    dbias.
    """
    *gradients, dbias = whole
    for part in parts_of(sequences, q.shape[2], k.shape[2], pattern, head_map):
        s, rows, keys = place(part)
        own = own_options(part, options)
        if dbias_base is not None:
            own |= {"dbias_base": part.base, "dbias_blocks": sum(map(len, part.slots))}
        of_rows = (None if x is None else x[s, :, rows] for x in (dout, dlse, q))
        of_keys = (x[s, :, keys] for x in (k, v))
        results = (x[s, :, rows] for x in (out, lse))
        *found, found_bias = function(*of_rows, *of_keys, *results, *part[2:4], **own)
        for target, at, result in zip(gradients, (rows, keys, keys), found, strict=True):
            assert target is not None
            target[s, :, at] = result
        if dbias is not None:
            assert dbias_base is not None
            assert found_bias is not None
            starts = dbias_base[part.number % dbias_base.shape[0]]
            slots = [start + x for start, x in zip(starts, part.slots, strict=True)]
            dbias[part.number % dbias.shape[0], torch.cat(slots)] = found_bias[0]
    return whole


def place(part: Part) -> tuple[slice, slice, slice]:
    """Slices of samples, rows of q and rows of k."""
    sample, queries, keys, _ = part.span
    return (
        slice(sample, sample + 1),
        slice(queries.start, queries.stop),
        slice(keys.start, keys.stop),
    )


def own_options(part: Part, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a part: its number, its blocks of the bias."""
    own = {**options, "first_sample": part.number}
    if (bias := options.get("bias")) is not None:
        own["bias"] = part.blocks_of(bias, options["bias_base"])
        own["bias_base"] = part.base
    return own
