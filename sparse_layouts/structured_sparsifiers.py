"""Sparsifiers that keep a structure: n of every m, whole blocks, what another layout stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.bsr_tensor import block_size_pair
from sparse_layouts.dense_rows import check_dense, check_divides
from sparse_layouts.sparsifier_protocol import Chooser, Scope, Sparsifier, as_sparsifier
from sparse_layouts.sparsifiers import check_number
from sparse_layouts.stored_positions import Positions

_SORTED_FROM = 32  # group sizes from here on are sorted; below, all pairs are compared
_ENTRIES, _ENTRIES_GPU = 1 << 16, 1 << 26


class NM(Sparsifier):
    """Keeps the `n` largest magnitudes of every `m` along the last dimension; among equals the
    first ones.

    Of blocks (`sl.bsr(..., keep=sl.NM(1, 2))`): n of every m blocks of a block row, by Frobenius
    norm. NaN raises. Blocking: a group at a time.

    Raises `ValueError` unless 1 <= n <= m, and for a last dimension that m does not divide,
    `TypeError` for what is no int.

    >>> import torch, sparse_layouts as sl
    >>> sl.NM(2, 4).keep(torch.tensor([4.0, -7.0, 1.0, 5.0, 0.0, 0.0, 0.0, 3.0])).int()
    tensor([0, 1, 0, 1, 1, 0, 0, 1], dtype=torch.int32)
    """

    scope: Scope = "blocking"

    def __init__(self, n: int, m: int) -> None:
        for number, name in ((n, "n"), (m, "m")):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"NM: {name} is an int, got {type(number).__name__}")
        if not 1 <= n <= m:
            raise ValueError(f"NM: expected 1 <= n <= m, got n={n}, m={m}")
        self.n, self.m = n, m

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes` (..., N): n of every m. No host sync."""
        if not magnitudes.dim() or magnitudes.shape[-1] % self.m:
            width = magnitudes.shape[-1] if magnitudes.dim() else 1
            raise ValueError(
                f"NM: m={self.m} does not divide the last dimension {width} of "
                f"{tuple(magnitudes.shape)}; pad it with "
                f"torch.nn.functional.pad(x, (0, {-width % self.m}))"
            )
        groups = magnitudes.reshape(-1, self.m)
        kept = torch.empty(groups.shape, dtype=torch.bool, device=groups.device)
        step = max(1, (_ENTRIES if groups.device.type == "cpu" else _ENTRIES_GPU) // self.m)
        for into, part in zip(kept.split(step), groups.split(step), strict=True):
            into.copy_((self._ranks(part.T.contiguous()) < self.n).T)
        return kept.view(magnitudes.shape)

    def _ranks(self, found: Tensor) -> Tensor:
        """How many of its group come before each entry, of (m, groups)."""
        if self.m >= _SORTED_FROM:
            order = torch.argsort(found, dim=0, descending=True, stable=True)
            places = torch.arange(self.m, device=found.device)[:, None].expand(order.shape)
            return torch.empty_like(order).scatter_(0, order, places)
        # the first of a group has none before it, the second one, ... but for those it exceeds
        ranks = torch.arange(self.m, dtype=torch.int8, device=found.device)[:, None]
        ranks = ranks.repeat(1, found.shape[1])
        for i in range(self.m - 1):
            exceeds = (found[i + 1 :] > found[i]).view(torch.int8)
            ranks[i + 1 :] -= exceeds
            for later in exceeds:
                ranks[i] += later
        return ranks

    def __repr__(self) -> str:
        return f"NM({self.n}, {self.m})"


class Blockwise(Sparsifier):
    """Keeps whole blocks of `block_size`, int or (bm, bn): another sparsifier chooses among the
    blocks by a norm of their entries.

    For layouts of entries, such as CSR, and for blocks by another norm than Frobenius's: `norm` is
    the order p of `torch.linalg.vector_norm`, inf among them; 0 counts non-zeros. Used with
    `sl.bsr`, whose block has to divide this one. Blocking where the other sparsifier is streaming
    or blocking, else materialising: it sees all norms, never a copy of all entries.

    Raises `TypeError` for what is no sparsifier, `ValueError` for a negative or NaN norm, and where
    the block does not divide a matrix.

    >>> import torch, sparse_layouts as sl
    >>> half = sl.Blockwise(sl.Magnitude(0.5), block_size=(1, 2), norm=1)
    >>> half.keep(torch.tensor([[1.0, 1.0, 0.0, 3.0], [0.0, 4.0, 1.0, 1.0]])).int()
    tensor([[0, 0, 1, 1],
            [1, 1, 0, 0]], dtype=torch.int32)
    """

    def __init__(self, sparsifier: Any, block_size: int | tuple[int, int], norm: float = 2) -> None:
        self.among = as_sparsifier(sparsifier, "Blockwise", "sparsifier")
        self.block_size = block_size_pair(block_size, "Blockwise")
        self.norm = check_number(norm, "Blockwise", "norm")
        if not self.norm >= 0:
            raise ValueError(f"Blockwise: expected a norm of order 0 or above, got {norm}")
        self.scope = "materialising" if self.among.scope == "materialising" else "blocking"
        self.reads_values = self.among.reads_values

    @property
    def row_multiple(self) -> int:
        """Chunks start with a row of blocks."""
        return self.block_size[0] * self.among.row_multiple

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes` (*lead, M, N): True over the blocks to keep."""
        check_divides(tuple(magnitudes.shape), self.block_size, self.name)
        norms = self.norms(magnitudes, self.block_size, self.norm)
        return self._spread(self.among.checked(norms))

    def start(self, shape: tuple[int, ...], device: torch.device) -> Chooser:
        """Begins one pass, and one of the other sparsifier over the norms."""
        check_divides(shape, self.block_size, self.name)
        (bm, bn), (m, n) = self.block_size, shape[-2:]
        among = self.among.start((*shape[:-2], m // bm, n // bn), device)

        def choose_rows(found: Tensor, first_row: int) -> Tensor:
            norms = self.norms(found, self.block_size, self.norm)
            return self._spread(self.among.check(among(norms, first_row // bm), norms))

        return choose_rows

    def keep_together(
        self, tensors: Sequence[Tensor], done: Callable[[int], None] = lambda entries: None
    ) -> Iterator[Tensor]:
        """`keep` of each of several tensors, their blocks ranked together."""
        for blocks in self.blocks_together(tensors, done):
            yield self._spread(blocks)

    def blocks_together(
        self, tensors: Sequence[Tensor], done: Callable[[int], None] = lambda entries: None
    ) -> Iterator[Tensor]:
        """:meth:`keep_together` by blocks: bool (*lead, M / bm, N / bn) of each tensor."""
        for dense in tensors:
            check_divides(tuple(dense.shape), self.block_size, self.name)
        norms = []
        for dense in tensors:
            norms.append(self.norms(dense, self.block_size, self.norm))
            done(dense.numel())
        yield from self.among.keep_together(norms)

    def keep_blocks(self, dense: Tensor, block_size: tuple[int, int]) -> Tensor:
        """bool (*lead, M / bm, N / bn): the blocks of `block_size` that lie in blocks to keep."""
        dense = check_dense(dense, self.name)
        (bm, bn), (own_m, own_n) = block_size, self.block_size
        if own_m % bm or own_n % bn:
            raise ValueError(
                f"Blockwise: expected blocks that divide its own {self.block_size}, got "
                f"{block_size}; Blockwise(..., block_size={block_size}) chooses such blocks"
            )
        check_divides(tuple(dense.shape), self.block_size, self.name)
        kept = self.among.checked(self.norms(dense, self.block_size, self.norm))
        return spread(kept, (own_m // bm, own_n // bn))

    def _spread(self, blocks: Tensor) -> Tensor:
        return spread(blocks, self.block_size)

    def __repr__(self) -> str:
        return f"Blockwise({self.among!r}, block_size={self.block_size}, norm={self.norm:g})"


class SamePattern(Sparsifier):
    """Keeps what `like` stores: a layout, a `torch.sparse` matrix, or a bool tensor.

    Entry by entry, values not looked at: stored zeros count, and so does NaN. Of blocks
    (`sl.bsr(..., keep=...)`) those that hold a stored entry: the stored blocks of a BSRTensor of
    the same block; a bool tensor may also have the shape of the blocks. Leading dimensions that
    `like` lacks share its pattern. Streaming; it keeps the row lists of `like` (8 bytes a stored
    entry) while it is used.

    Raises `TypeError` for anything else (of a dense `x`, `x != 0` is a bool tensor), `ValueError`
    where the shapes differ.

    >>> import torch, sparse_layouts as sl
    >>> like = sl.bsr(torch.eye(4), block_size=2)
    >>> sl.SamePattern(like).keep(torch.ones(4, 4)).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    scope: Scope = "streaming"
    reads_values = False

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._positions = Positions(like, "SamePattern")

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes`, of which only shape and device are used."""
        shape = tuple(magnitudes.shape)
        rows = self._positions.rows(shape, magnitudes.device)
        total = magnitudes.numel() // max(1, shape[-1]) if shape else 1
        return rows(0, total).view(shape)

    def start(self, shape: tuple[int, ...], device: torch.device) -> Chooser:
        """Begins one pass over a tensor of the pattern's shape."""
        rows = self._positions.rows(shape, device)
        return lambda found, first_row: rows(first_row, found.shape[0])

    def keep_blocks(self, dense: Tensor, block_size: tuple[int, int]) -> Tensor:
        """bool (*lead, M / bm, N / bn): the blocks with an entry that `like` stores."""
        dense = check_dense(dense, self.name)
        check_divides(tuple(dense.shape), block_size, self.name)
        return self._positions.blocks(tuple(dense.shape), block_size, dense.device)

    def __repr__(self) -> str:
        return f"SamePattern({type(self.like).__name__} of shape {tuple(self.like.shape)})"


def spread(blocks: Tensor, block: tuple[int, int]) -> Tensor:
    """(*lead, Mb, Nb) -> (*lead, Mb * bm, Nb * bn): each element over its block."""
    (bm, bn), (mb, nb) = block, blocks.shape[-2:]
    wide = blocks[..., :, None, :, None].expand(*blocks.shape[:-1], bm, nb, bn)
    return wide.reshape(*blocks.shape[:-2], mb * bm, nb * bn)
