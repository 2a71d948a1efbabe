"""BigBirdTensor: global, neighbouring and random blocks, random ones counted as often as drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from sparse_layouts.block_pattern import BlockPattern, send_together
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.mask_factories import Device, checked_length, square_block
from sparse_layouts.outside_graphs import constant_in_graphs

# Lengths whose random blocks come from one table over the maximum length, and that table's reach.
TABLE_LENGTHS = {
    "hf-train": (1024, 3072, 4096),
    "hf-eval": (),
    "google": (1024, 2048, 3072, 4096),
}
TABLE_REACH = 1024


class BigBirdTensor(BSRTensor):
    """A BSRTensor whose pattern is BigBird's: the first and last block, neighbours, random blocks.

    Made by `sl.bigbird`. A 6 x 6 example, blocks of 1, source "hf-eval", 1 random block (which is
    block 0 there and so counts twice)::

        1 1 1 1 1 1
        2 1 1 . . 1
        2 1 1 1 . 1
        2 . 1 1 1 1
        2 . . 1 1 1
        1 1 1 1 1 1

    field | shape | dtype | invariant
    ---|---|---|---
    those of BSRTensor | | | full blocks; the first and last block row store all
    `num_random_blocks` | static | int | as made
    `source` | static | str | as made

    Whether blocks count more than once is `block_counts()`. The seed is no field: it is in the
    lists, and compiled code would be compiled anew for the layers' seeds.

    Memory: 12 bytes a stored block of each different head, 16 where blocks are counted; at most
    2 * nb + (nb - 2) * (5 + num_random_blocks) blocks a head, nb = N / block_size.

    >>> import sparse_layouts as sl
    >>> sl.bigbird(6, block_size=1, num_random_blocks=1, source="hf-eval").block_counts()[6:11]
    tensor([2, 1, 1, 1, 2], dtype=torch.int32)
    """

    static_fields: ClassVar[tuple[str, ...]] = (
        *BSRTensor.static_fields,
        "num_random_blocks",
        "source",
    )
    num_random_blocks: int
    source: str

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        return [f"{self.source}, {self.num_random_blocks} random blocks", *super().describe()]


@constant_in_graphs
def bigbird(
    seq_len: int,
    *,
    block_size: int = 64,
    num_random_blocks: int = 3,
    num_heads: int = 1,
    seed: int = 0,
    source: str = "hf-train",
    max_seq_len: int = 4096,
    device: Device = None,
) -> BigBirdTensor:
    """The BigBird mask (num_heads, N, N), or (N, N) for one head; not causal.

    With nb = seq_len / block_size: block rows 0 and nb-1 attend to everything, every row i to
    blocks 0, i-1, i, i+1 and nb-1, and rows 1..nb-2 to `num_random_blocks` more, drawn for each
    head. A block that is there k times counts k times in a softmax (`block_counts()`), as if it
    stood k times among the keys. `source` says who draws:

    - ``"hf-train"``: transformers' block-sparse attention in training; `seed` is the layer's index.
      Lengths 1024, 3072 and 4096 take the first rows of a table drawn for `max_seq_len` tokens
      (`config.max_position_embeddings`); other lengths have a plan of their own.
    - ``"hf-eval"``: the same in evaluation, where nothing is drawn: all random blocks are block 0.
      One pattern for all heads, built on `device` without a host sync.
    - ``"google"``: the original, which draws at inference too, and from the table for 2048 as well.

    Drawn patterns are made on the host in O(stored blocks) and sent. Sizes in tokens.

    Raises `TypeError` for arguments of another kind, `ValueError` for a length that the block does
    not divide or that has fewer than 4 blocks, for too few blocks to draw from, an unknown source,
    or numbers out of range. transformers itself attends to everything up to
    (5 + 2 * num_random_blocks) * block_size tokens; drawing mostly needs more than that.

    Source: https://arxiv.org/abs/2007.14062; transformers 5.23 `BigBirdBlockSparseAttention`;
    https://github.com/google-research/bigbird, bigbird/core/attention.py.

    >>> import sparse_layouts as sl
    >>> mask = sl.bigbird(4096, num_heads=12, seed=3)
    >>> mask.shape, mask.block_pattern.num_patterns
    (torch.Size([12, 4096, 4096]), 12)
    >>> sl.bigbird(256, block_size=32, source="hf-eval").block_counts()[8:12].tolist()
    [4, 1, 1, 1]
    """
    what = "bigbird"
    n, b = checked_length(seq_len, "seq_len", what), square_block(block_size, what)
    random_blocks = checked_length(num_random_blocks, "num_random_blocks", what)
    heads = checked_length(num_heads, "num_heads", what, 1)
    layer = checked_length(seed, "seed", what)
    longest = checked_length(max_seq_len, "max_seq_len", what, 1)
    if source not in TABLE_LENGTHS:
        raise ValueError(f"{what}: source is one of {', '.join(TABLE_LENGTHS)}, got {source!r}")
    if layer >= 2**32:
        raise ValueError(f"{what}: seed must be below 2**32, got {seed}")
    if n % b:
        raise ValueError(
            f"{what}: block_size {b} does not divide seq_len {n}; pad the sequence to "
            f"{-(-n // b) * b} tokens and mask the padding, or take a smaller block"
        )
    if n // b < 4:
        raise ValueError(
            f"{what}: {n} tokens are {n // b} blocks of {b}; BigBird needs at least 4 (two global "
            f"rows, two beside them): take a smaller block, or attend to everything without a mask"
        )
    on = torch.device(device if device is not None else "cpu")
    rng = np.random.RandomState(layer)  # the sources' generator: the draws are theirs
    if source == "hf-eval" or not random_blocks:
        drawn = np.zeros((heads, n // b - 2, random_blocks), dtype=np.int64)
    elif n in TABLE_LENGTHS[source]:
        drawn = _draw_from_table(rng, heads, n // b, longest // b, b, random_blocks)
    else:
        drawn = _draw_by_plan(rng, heads, n // b, random_blocks)
    pattern = _merged(drawn, n, b, on)
    return BigBirdTensor.on_pattern(None, pattern, num_random_blocks=random_blocks, source=source)


def _merged(drawn: np.ndarray, n: int, b: int, on: torch.device) -> BlockPattern:
    """The pattern of random blocks `drawn` (heads, nb - 2, r), with counts; equal heads once."""
    heads, nb = drawn.shape[0], n // b
    seen: dict[bytes, int] = {}  # different heads, numbered as they first appear
    head_map = np.array([seen.setdefault(head.tobytes(), len(seen)) for head in drawn])
    kinds = drawn[np.unique(head_map, return_index=True)[1]]

    i = np.arange(1, nb - 1)[:, None]
    beside = np.concatenate([np.zeros_like(i), i - 1, i, i + 1, np.full_like(i, nb - 1)], 1)
    # blocks 0 and nb - 1 beside rows 1 and nb - 2 are not there twice
    once = np.ones(beside.shape, dtype=bool)
    once[0, 1] = once[-1, 3] = False
    everything = np.arange(nb)
    shared = [everything, (i * nb + beside)[once], (nb - 1) * nb + everything]
    each = np.concatenate(shared)[None, :]  # keys row * nb + column that all heads store
    own = (i * nb + kinds).reshape(len(kinds), -1)
    head = np.arange(len(kinds), dtype=np.int64)[:, None] * nb * nb
    keys = np.concatenate([np.broadcast_to(each, (len(kinds), each.size)), own], 1) + head
    keys, counts = np.unique(keys, return_counts=True)

    rows, columns = np.divmod(keys, nb)  # rows, and below columns, of all patterns
    rows_of_columns = rows // nb * nb + columns
    by_column = np.argsort(rows_of_columns, kind="stable")

    def offsets(lines: np.ndarray) -> np.ndarray:
        """(patterns, nb + 1): where each pattern's lines begin in a sorted list."""
        ends = np.zeros(len(kinds) * nb + 1, dtype=np.int64)
        np.cumsum(np.bincount(lines, minlength=len(kinds) * nb), out=ends[1:])
        return ends[np.arange(len(kinds))[:, None] * nb + np.arange(nb + 1)]

    lists = [
        offsets(rows),
        columns,
        offsets(rows_of_columns),
        rows[by_column] % nb,
        by_column,
        head_map if len(kinds) < heads else None,
        counts if (counts > 1).any() else None,
    ]
    sent: list[Any] = [None if t is None else t.clone() for t in send_together(lists, on)]
    crow, col, ccol, row, slots, shared_by, block_counts = sent
    return BlockPattern(
        crow_indices=crow,
        col_indices=col,
        row_slots=None,
        ccol_indices=ccol,
        row_indices=row,
        col_slots=slots,
        head_map=shared_by,
        block_tiles=None,
        tiles=None,
        block_counts=block_counts,
        shape=(n, n),
        block_size=(b, b),
        lead=() if heads == 1 else (heads,),
    )


def _first_of(count: int, legal: int) -> np.ndarray:
    """(count,): which of a row's `legal` blocks, in the order drawn, it stores; a single one fills
    the row, as in the sources.
    """
    if min(count, legal) not in (1, count):
        raise ValueError(
            f"bigbird: a row draws {count} random blocks and has {legal} to draw from; "
            f"take fewer random blocks, a smaller block_size, source='hf-eval', or attend to "
            f"everything without a mask (transformers does so for short sequences)"
        )
    return np.minimum(np.arange(count), legal - 1)


def _draw_from_table(
    rng: Any, heads: int, nb: int, table_blocks: int, b: int, r: int
) -> np.ndarray:
    """(heads, nb - 2, r): the first rows of a table of `table_blocks` blocks, head by head."""
    if table_blocks < nb:
        raise ValueError(
            f"bigbird: max_seq_len {table_blocks * b} is shorter than seq_len {nb * b}; it is the "
            f"model's max_position_embeddings"
        )
    middle = np.arange(1, table_blocks - 1)
    last = TABLE_REACH // b - 1 if 2 * b < TABLE_REACH else table_blocks - 1
    pools = []
    for i in range(1, table_blocks - 1):
        before = middle[: min(i - 2, last)] if i > 2 else middle[:0]
        if i <= 2:
            pool = middle[i + 1 : last]
        elif i >= table_blocks - 3:
            pool = middle[:last]
        elif i - 2 > last or i + 1 == last:
            pool = before
        else:
            pool = np.concatenate([before, middle[i + 1 : last]])
        pools.append(pool)
    sizes = [pool.size for pool in pools]
    ends = np.cumsum(sizes)
    chosen = [end - size + _first_of(r, size) for end, size in zip(ends, sizes, strict=True)]
    in_order = np.concatenate(pools)
    shuffled = in_order.copy()
    rows = np.split(shuffled, ends[:-1])  # views
    table = np.empty((heads, table_blocks - 2, r), dtype=np.int64)
    for h in range(heads):
        shuffled[:] = in_order
        for row in rows:
            rng.shuffle(row)
        table[h] = shuffled[chosen]
    drawn = table[:, : nb - 2]
    if int(drawn.max()) >= nb:
        raise ValueError(
            f"bigbird: for blocks of {b} the table over {table_blocks * b} tokens holds block "
            f"{int(drawn.max())}, and {nb * b} tokens have {nb}; take a smaller block_size"
        )
    return drawn


def _draw_by_plan(rng: Any, heads: int, nb: int, r: int) -> np.ndarray:
    """(heads, nb - 2, r): some random blocks from each segment of the columns."""
    if 2 * r + 5 < nb:
        ends, counts = [2 * r + 5, nb], [r, 0]
    elif r + 5 < nb:
        ends, counts = [r + 5, nb], [r // 2, r - r // 2]
    else:
        ends, counts = [nb], [r]
    starts = [0, *ends[:-1]]

    def turns() -> Iterator[tuple[range, int]]:
        """Which rows draw from which segment, in the order in which the generator is used."""
        for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if s:
                yield range(1, start), s
            for earlier in range(s):
                yield range(start, end), earlier
            yield range(max(start, 1), end), s

    drawn = np.zeros((heads, nb, r), dtype=np.int64)
    for rows, s in turns():
        if not counts[s]:
            continue
        start, end = starts[s], ends[s]
        place = slice(sum(counts[:s]), sum(counts[: s + 1]))
        shuffled = np.empty((heads, end - start), dtype=np.int64)
        for i in rows:
            # no neighbours, no end of the segment, and no block that is global from there
            illegal = [i - 1, i, i + 1, 0, end - 1]
            illegal += [end - 2] if i == 1 else []
            illegal += [1] if i == end - 2 else []
            shuffled[:] = np.arange(start, end)
            for head in shuffled:
                rng.shuffle(head)
            legal = np.ones(nb + 1, dtype=bool)
            legal[illegal] = False
            number = int(legal[start:end].sum())
            in_order = shuffled[legal[shuffled]].reshape(heads, number)
            drawn[:, i, place] = in_order[:, _first_of(counts[s], number)]
    return drawn[:, 1:-1]
