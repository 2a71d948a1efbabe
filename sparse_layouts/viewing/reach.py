"""What follows from an attention mask for a model: which tokens can influence a token after some
layers, and how many keys decoding has to keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sparse_layouts.block_pattern import BlockPattern, tile_table
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.mask_factories import mask_from

# Entries of bit tiles that are unpacked at a time.
CHUNK = 2**22
BLOCK = 64  # in which a mask that is no block layout is read


def block_mask(mask: LayoutTensor, what: str) -> BSRTensor:
    """The stored entries of a layout as a square mask of blocks, a pattern a head.

    Raises `TypeError` for what is no layout, `ValueError` for what is not square or has more than
    one leading dimension.
    """
    if not isinstance(mask, LayoutTensor):
        raise TypeError(f"{what}: expected layouts, got {type(mask).__name__}")
    m, n = mask.matrix_shape
    if m != n:
        raise ValueError(f"{what}: expected square masks, got {m} queries and {n} keys")
    blocks = mask.pattern if isinstance(mask, BSRTensor) else mask_from(_pattern_of(mask), BLOCK)
    if len(blocks.block_pattern.lead) > 1:
        raise ValueError(
            f"{what}: expected (N, N) or (H, N, N), got shape {tuple(mask.shape)}; take one "
            "sample: mask[0]"
        )
    return blocks


def _pattern_of(mask: LayoutTensor) -> LayoutTensor:
    pattern = getattr(mask, "pattern", None)
    if pattern is not None:
        return pattern
    return mask_from(mask.to_dense() != 0, BLOCK)


def influences(mask: LayoutTensor, token: int, layers: int) -> np.ndarray:
    """bool (layers, N): which tokens can influence `token` after 1, 2, ... layers of attention with
    this mask; the token itself always can (the residual stream), and heads are mixed after every
    layer.

    Costs O(stored blocks) a layer. Raises `ValueError` for a token or a number of layers out of
    range, and for masks as :func:`block_mask` does.

    >>> import sparse_layouts as sl
    >>> from sparse_layouts.viewing.reach import influences
    >>> window = sl.sliding_window(100, block_size=16, window=10)
    >>> influences(window, token=99, layers=3).sum(1).tolist()
    [10, 19, 28]
    """
    p = block_mask(mask, "influences").block_pattern
    n = p.shape[0]
    if not 0 <= token < n:
        raise ValueError(f"influences: expected a token from 0 to {n - 1}, got {token}")
    if layers < 1:
        raise ValueError(f"influences: expected at least 1 layer, got {layers}")
    bm, bn = p.block_size
    mb, nb = p.grid
    lists = [_Lists(p, which) for which in range(p.num_patterns)]
    reached = np.zeros(n, bool)
    reached[token] = True
    new = reached
    found = []
    for _ in range(layers):
        queries = np.zeros(mb * bm, bool)
        queries[:n] = new
        keys = np.zeros((nb, bn), bool)
        for each in lists:
            each.attended(queries.reshape(mb, bm), keys)
        attended = keys.reshape(-1)[:n]
        new = attended & ~reached  # what was reached before has told all it can
        reached = reached | attended
        found.append(reached)
    return np.stack(found)


def kept_keys(mask: LayoutTensor) -> list[int]:
    """How many keys each head has to keep at once when the queries come one after another.

    A key lives from its own position, or from the first query that attends to it if that comes
    before, to the last query that attends to it. For a sliding window that is its width, for a
    causal mask N. Costs O(stored blocks). Raises `ValueError` as :func:`block_mask` does.

    >>> import sparse_layouts as sl
    >>> from sparse_layouts.viewing.reach import kept_keys
    >>> kept_keys(sl.sliding_window(1000, block_size=16, window=100))
    [100]
    """
    p = block_mask(mask, "kept_keys").block_pattern
    n = p.shape[0]
    of_pattern = []
    for which in range(p.num_patterns):
        first, last = _Lists(p, which).first_and_last_queries()
        read = last >= 0
        begins = np.minimum(np.arange(n), first)[read]
        alive = np.zeros(n + 1, np.int64)
        np.add.at(alive, begins, 1)
        np.add.at(alive, last[read] + 1, -1)
        of_pattern.append(int(alive.cumsum().max(initial=0)))
    head_map = range(math.prod(p.lead)) if p.head_map is None else p.head_map.tolist()
    return [of_pattern[which] for which in head_map]


class _Lists:
    """The blocks of one pattern on the host: block row, block column, and the tile of each."""

    def __init__(self, p: BlockPattern, which: int) -> None:
        self.shape, self.block, self.grid = p.shape, p.block_size, p.grid
        crow = p.crow_indices[which].cpu().numpy()
        first, last = int(crow[0]), int(crow[-1])
        self.rows = np.repeat(np.arange(p.grid[0]), np.diff(crow))
        self.columns = p.col_indices[first:last].cpu().numpy().astype(np.int64)
        slots = np.arange(first, last)
        if p.row_slots is not None:
            slots = p.row_slots[first:last].cpu().numpy()
        self.tiles = np.zeros_like(slots)
        if p.block_tiles is not None:
            self.tiles = p.block_tiles.cpu().numpy()[slots]
        self.table = tile_table(p).cpu().numpy()

    def _partial(self, among: np.ndarray) -> Iterator[np.ndarray]:
        """The partial blocks of a choice of blocks, some at a time."""
        partial = among[self.tiles[among] != 0]
        step = max(1, CHUNK // (self.block[0] * self.block[1]))
        for start in range(0, partial.size, step):
            yield partial[start : start + step]

    def attended(self, queries: np.ndarray, keys: np.ndarray) -> None:
        """Sets in `keys` (Nb, bn) what any of `queries` (Mb, bm) attends to."""
        active = np.flatnonzero(np.asarray(queries.any(1))[self.rows])
        keys[self.columns[active[self.tiles[active] == 0]]] = True
        for at in self._partial(active):
            blocks = self.table[self.tiles[at]]  # (n, bm, bn)
            found = (blocks & queries[self.rows[at]][:, :, None]).any(1)
            np.logical_or.at(keys, self.columns[at], found)

    def first_and_last_queries(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 (N,) each: the first and the last query that attends to each key; N and -1 for a
        key that nobody attends to.
        """
        (m, n), (bm, bn) = self.shape, self.block
        nb = self.grid[1]
        first, last = np.full((nb, bn), m), np.full((nb, bn), -1)
        whole = np.flatnonzero(self.tiles == 0)
        first_block, last_block = np.full(nb, self.grid[0]), np.full(nb, -1)
        np.minimum.at(first_block, self.columns[whole], self.rows[whole])
        np.maximum.at(last_block, self.columns[whole], self.rows[whole])
        has = last_block >= 0
        first[has] = (first_block * bm)[has, None]
        last[has] = np.minimum((last_block + 1) * bm, m)[has, None] - 1
        row = np.arange(bm)[:, None]
        for at in self._partial(np.arange(self.tiles.size)):
            query = (self.rows[at] * bm)[:, None, None] + row  # (n, bm, 1)
            stored = self.table[self.tiles[at]] & (query < m)
            np.minimum.at(first, self.columns[at], np.where(stored, query, m).min(1))
            np.maximum.at(last, self.columns[at], np.where(stored, query, -1).max(1))
        return first.reshape(-1)[:n], last.reshape(-1)[:n]
