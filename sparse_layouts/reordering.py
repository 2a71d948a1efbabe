"""`sl.reorder`: the rows of a block layout in an order in which like ones share taller blocks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, build_pattern, expand_heads
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.layout_autograd import values_of, with_values
from sparse_layouts.reorder_gain import modelled_seconds
from sparse_layouts.reordered_tensor import ReorderedTensor
from sparse_layouts.row_clustering import in_groups, similar_rows
from sparse_layouts.stored_entries import short

HEIGHTS = (16, 32, 64, 128)  # of the blocks that GPU kernels take, and are the faster for


def reorder(w: Any, block_rows: int | None = None) -> ReorderedTensor:
    """The same matrix with block rows that store the same columns brought together, in taller
    blocks, which kernels multiply faster; `w.gain` and the repr say what that brings.

    w (*batch, M, N): a BSRTensor with values, one pattern; M need not be a multiple of the block.
    `block_rows`: the height of the new blocks, a multiple of w's; None takes the one of 16, 32, 64
    and 128 that the model of `w.gain` finds fastest (or 1, 2, 4 and 8 times w's, where w's divides
    none). The blocks stay as wide as they are. Keeps the dtype; differentiable in w.

    The result is w outside: `to_dense`, products, gradients and arithmetic are in w's own order.
    Entries that w does not store are zeros in the taller blocks and stay so in training; there, as
    in a dense matrix, NaN of the other operand is seen. Worth it for small blocks, 16 x k or 1 x k,
    of matrices whose rows come in kinds (pruned by groups, banded and shuffled, adjacency of
    communities), and for products with many columns.

    What a row stores is compared on the host, once; call it when the pattern is made, not in a
    training step. The rows are grouped greedily by the Jaccard similarity of their columns, and
    left as they are where that needs no more blocks; equal patterns give equal orders. Time:
    O(block rows ** 2 + stored blocks * rows of a column), 1.3 s for 4,096 block rows of 41 blocks.

    Where the best height is modelled as slower than w itself, the result is the same matrix all the
    same and a `UserWarning` says to keep w; a height that is asked for is taken without one. Raises
    `TypeError` for what is no BSRTensor with values and a `block_rows` that is no int, `ValueError`
    for several patterns and for a height that is no multiple of w's blocks.

    Source: that rows be brought together by similarity, to be multiplied as dense blocks, is the
    idea of Sylos Labini et al., Blocking Techniques for Sparse Matrix Multiplication on Tensor
    Accelerators, 2022, https://arxiv.org/abs/2202.05868; here groups have one size.

    >>> import torch, sparse_layouts as sl
    >>> kinds = torch.block_diag(*4 * [torch.ones(64, 1024)]).view(16, 16, 4096)
    >>> w = sl.bsr(kinds[torch.arange(16) * 5 % 16].view(256, 4096), 16)  # mixed block rows
    >>> r = sl.reorder(w)
    >>> r.block_size, len(w.values()), len(r.values()), torch.equal(r.to_dense(), w.to_dense())
    ((64, 16), 1024, 256, True)
    >>> f"{r.gain.fill_in:.0%} fill-in, {r.gain.speedup:.1f}x as fast by the model"
    '0% fill-in, 2.0x as fast by the model'
    """
    _check(w, block_rows)
    pattern = expand_heads(w.block_pattern)
    source = _Lists.of(pattern)
    height, order = source.best(block_rows)
    made, room = source.stacked(order, height)
    device = pattern.device
    rows = torch.from_numpy(source.entry_order(order)).int()
    places = torch.empty_like(rows)
    places[rows.long()] = torch.arange(len(rows), dtype=torch.int32)
    block = pattern.block_size
    moved = BlockPattern._make([t.to(device) if isinstance(t, Tensor) else t for t in made])
    orders = (rows.to(device), places.to(device))
    mask = ReorderedTensor.on_order(None, moved, *orders, source_block=block)
    values = values_of(w)
    batch, parts = values.shape[:-3], made.num_blocks * (height // block[0])
    filled = values.new_zeros(*batch, parts, *block)
    filled = filled.index_copy(-3, torch.from_numpy(room).to(device), values)
    out = with_values(mask, filled.view(*batch, made.num_blocks, height, block[1]))
    assert isinstance(out, ReorderedTensor)
    if block_rows is None and out.gain.speedup < 1:
        warnings.warn(
            f"reorder: {short(w)} is modelled as the faster one, the result as "
            f"{out.gain.speedup:.2f} times as fast: too few of its block rows store the same "
            "columns. Keep w as it is.",
            stacklevel=2,
        )
    return out


def _check(w: Any, block_rows: Any) -> None:
    if not isinstance(w, BSRTensor):
        kind = short(w) if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(
            f"reorder: expected a BSRTensor, got {kind}; sl.bsr(x, block_size) makes one, with "
            "block_size=(1, 16) of single rows"
        )
    if w.inner_values is None:
        raise TypeError(f"reorder: expected a layout with values, got the mask {short(w)}")
    if w.block_pattern.block_counts is not None:
        raise ValueError(
            f"reorder: {short(w)} counts blocks several times, which taller blocks cannot; make "
            "one that does not: sl.bsr(w.to_dense(), w.block_size)"
        )
    if w.lead_dims:
        raise ValueError(
            f"reorder: expected a matrix of one pattern, got {short(w)} with one for each of "
            f"{w.block_pattern.lead}; reorder each for itself: sl.reorder(w[0])"
        )
    if block_rows is None:
        return
    if not isinstance(block_rows, (int, np.integer)) or isinstance(block_rows, bool):
        raise TypeError(f"reorder: block_rows is an int or None, got {block_rows!r}")
    own = w.block_size[0]
    if block_rows < 1 or block_rows % own:
        raise ValueError(
            f"reorder: expected block_rows that is a multiple of the block's {own} rows, got "
            f"{block_rows}"
        )


class _Lists:
    """A pattern's row lists on the host: offsets, columns, slots, and what of each block is stored
    (0 full, t > 0: bit tile t - 1).
    """

    def __init__(
        self,
        pattern: BlockPattern,
        crow: np.ndarray,
        col: np.ndarray,
        slots: np.ndarray,
        kinds: np.ndarray,
    ) -> None:
        self.pattern, self.crow, self.col, self.slots = pattern, crow, col, slots
        self.kinds = kinds

    @classmethod
    def of(cls, p: BlockPattern) -> _Lists:
        """The lists of a pattern of one matrix."""
        crow, col = (t.cpu().numpy().astype(np.int64) for t in (p.crow_indices[0], p.col_indices))
        slots = np.arange(len(col)) if p.row_slots is None else p.row_slots.cpu().numpy()
        kinds = np.zeros(len(col), np.int64)
        if p.block_tiles is not None:
            kinds = p.block_tiles.cpu().numpy().astype(np.int64)[slots]
        return cls(p, crow, col, slots.astype(np.int64), kinds)

    def best(self, block_rows: int | None) -> tuple[int, np.ndarray]:
        """The height of the new blocks, and the order of the block rows for it."""
        own = self.pattern.block_size[0]
        heights = [h for h in HEIGHTS if h % own == 0]
        heights = heights or [own * f for f in (1, 2, 4, 8) if f == 1 or own * f <= HEIGHTS[-1]]
        if block_rows is not None:
            heights = [int(block_rows)]
        found = []
        for height in heights:
            size = height // own
            for order in (np.arange(self.pattern.grid[0]), self.order(size)):
                blocks = len(in_groups(self.crow, self.col, self.pattern.grid[1], order, size)[0])
                new = (height, self.pattern.block_size[1])
                cost = modelled_seconds(blocks, new, self.pattern.shape[0], reordered=True)
                found.append((cost, height, order))
        _, height, order = min(found, key=lambda each: each[0])  # the first of equal ones
        return height, order

    def order(self, size: int) -> np.ndarray:
        """int64 (Mb,): the block rows, `size` after `size` a group. A last one that reaches over
        the edge stays the last.
        """
        (m, _), (bm, _), (mb, nb) = self.pattern.shape, self.pattern.block_size, self.pattern.grid
        whole = mb if m % bm == 0 else mb - 1
        crow = self.crow[: whole + 1]
        order = similar_rows(crow, self.col[: crow[-1]], nb, size)
        return np.concatenate([order, np.arange(whole, mb)])

    def entry_order(self, order: np.ndarray) -> np.ndarray:
        """int64 (M,): the rows of these block rows."""
        m, bm = self.pattern.shape[0], self.pattern.block_size[0]
        rows = (order[:, None] * bm + np.arange(bm)).reshape(-1)
        return rows[rows < m]

    def stacked(self, order: np.ndarray, height: int) -> tuple[BlockPattern, np.ndarray]:
        """The pattern of blocks of this height of the block rows in this order, and int64 (S,), by
        slot: which part of which new block each block is, block * parts + part.
        """
        (m, n), (bm, bn), (mb, nb) = self.pattern.shape, self.pattern.block_size, self.pattern.grid
        size = height // bm
        cells, which, part = in_groups(self.crow, self.col, self.pattern.grid[1], order, size)
        groups = -(-mb // size)
        crow = np.searchsorted(cells, np.arange(groups + 1) * nb)
        room = np.empty(len(which), np.int64)
        room[self.slots] = which * size + part
        # of every part: 0 nothing is stored, else 1 and the kind of block
        kinds = np.zeros((len(cells), size), np.int32)
        kinds[which, part] = 1 + self.kinds
        if mb % size:  # what lies below the edge does not make a block partial
            kinds[crow[groups - 1] :, mb % size :] = 1
        block_tiles, tiles = self._tiles(kinds)
        made = build_pattern(
            torch.from_numpy(crow)[None],
            torch.from_numpy(cells % max(nb, 1)),
            shape=(m, n),
            block_size=(height, bn),
            block_tiles=block_tiles,
            tiles=tiles,
        )
        return made, room

    def _tiles(self, kinds: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        """The bit tiles of blocks whose parts are of these kinds (S, size), and which each has;
        None where every block is full.
        """
        partial = (kinds != 1).any(1)
        if not partial.any():
            return None, None
        rows = np.ascontiguousarray(kinds[partial])
        keys = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
        _, first, number = np.unique(keys, return_index=True, return_inverse=True)
        bm, words = self.pattern.block_size[0], -(-self.pattern.block_size[1] // 32)
        table = np.zeros((2, bm, words), np.int32)
        table[1] = -1  # every bit
        if self.pattern.tiles is not None:
            table = np.concatenate([table, self.pattern.tiles.cpu().numpy()])
        tiles = table[rows[first]].reshape(len(first), -1, words)
        block_tiles = np.zeros(len(kinds), np.int32)
        block_tiles[partial] = 1 + number.reshape(-1)
        return torch.from_numpy(block_tiles), torch.from_numpy(tiles)
