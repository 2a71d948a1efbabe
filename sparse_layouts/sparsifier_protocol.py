"""Sparsifier: the protocol of what decides which entries, or blocks, of a dense tensor to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparse_layouts.dense_rows import (
    block_norms,
    check_dense,
    check_divides,
    flat_shape,
    magnitudes,
    refuse_nan,
    row_chunks,
)
from sparse_layouts.stored_entries import short

Scope = Literal["streaming", "blocking", "materialising"]
Chooser = Callable[[Tensor, int], Tensor]


class Sparsifier:
    """Decides which entries of a dense tensor to keep, or which blocks; the base class.

    A layout's factory takes one as `keep=`. The values that are kept stay differentiable; the
    choice itself is not. `scope` says what it has to see:

    scope | a decision needs | in chunks
    ---|---|---
    `"streaming"` | the entry alone: one pass, any size | yes
    `"blocking"` | one block or group at a time | yes, cut between blocks
    `"materialising"` | everything at once | no: :meth:`chunks` raises

    Write your own by one method, :meth:`choose`; set `scope` where it is not the careful default,
    and `reads_values = False` where it looks at no magnitude (it is then given zeros, and NaN is
    no error). Every result is checked: bool, the shape and device of what came in, else
    `TypeError` or `ValueError`. An object of another class with a method `choose` does as well.

    A layout's factory calls, where `keep` is what its user passed::

        keep = as_sparsifier(keep, "csr")                  # TypeError for what is no sparsifier
        kept = keep.keep(dense)                            # bool, dense's shape: always works
        for first_row, kept in keep.chunks(dense): ...     # bool (r, N): scope != "materialising"
        blocks = keep.keep_blocks(dense, (bm, bn))         # bool (*lead, M / bm, N / bn)

    >>> import torch, sparse_layouts as sl
    >>> class AboveMean(sl.Sparsifier):
    ...     scope = "materialising"
    ...     def choose(self, magnitudes):
    ...         return magnitudes > magnitudes.mean()
    >>> AboveMean().keep(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    tensor([[False, False],
            [ True,  True]])
    >>> sl.bsr(torch.eye(64), block_size=16, keep=AboveMean()).density
    0.25
    """

    scope: Scope = "materialising"
    reads_values: bool = True

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape and device of `magnitudes`: which to keep.

        `magnitudes` are absolute values of entries or norms of blocks: non-negative, floating, of
        any shape; rows are the last dimension. Of a streaming or blocking sparsifier they may be
        some rows (r, N) of a larger matrix.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected a method choose(magnitudes) that returns a bool "
            "tensor of the same shape"
        )

    @property
    def row_multiple(self) -> int:
        """Chunks start at multiples of so many rows."""
        return 1

    def start(self, shape: tuple[int, ...], device: torch.device) -> Chooser:
        """Begins one pass over a tensor of this shape: what it returns maps the magnitudes (r, N)
        of some rows and the number of the first to bool (r, N).

        Rows are counted over all leading dimensions together; chunks come in order, from the first
        row to the last.
        """
        return lambda found, first_row: self.choose(found)

    def keep(self, dense: Tensor) -> Tensor:
        """bool, the shape and device of `dense` (any shape and dtype but bool): the entries to
        keep.

        Extra memory is a chunk's for streaming and blocking sparsifiers and `Magnitude`, else the
        magnitudes of all. Raises `TypeError` for what is not a dense tensor of numbers,
        `ValueError` for NaN where values are read.
        """
        dense = check_dense(dense, self.name)
        return next(self.keep_together([dense]))

    def keep_together(
        self, tensors: Sequence[Tensor], done: Callable[[int], None] = lambda entries: None
    ) -> Iterator[Tensor]:
        """`keep` of each of several tensors, chosen as if they were one.

        Streaming and blocking sparsifiers choose for each by itself. One of your own that
        materialises gets all magnitudes in one vector. `done` is told how many entries have been
        looked at, for a progress bar; of each :meth:`passes` times.
        """
        if self.scope == "materialising":
            yield from self._materialised(tensors, done)
            return
        for dense in tensors:
            kept = torch.empty(dense.shape, dtype=torch.bool, device=dense.device)
            flat = kept.view(flat_shape(tuple(dense.shape)))
            for first, chunk in self._chunks(dense, None, None):
                flat[first : first + chunk.shape[0]] = chunk
                done(chunk.numel())
            yield kept

    def passes(self, tensors: Sequence[Tensor]) -> int:
        """How often :meth:`keep_together` tells `done` of each entry."""
        return 1

    def _materialised(
        self, tensors: Sequence[Tensor], done: Callable[[int], None]
    ) -> Iterator[Tensor]:
        found = [self.magnitudes(dense) for dense in tensors]
        if len(found) == 1:
            kept = self.checked(found[0])
            done(kept.numel())
            yield kept
            return
        kept = self.checked(torch.cat([f.flatten().to(found[0].device) for f in found]))
        parts = kept.split([dense.numel() for dense in tensors])
        for dense, part in zip(tensors, parts, strict=True):
            done(part.numel())
            yield part.view(dense.shape).to(dense.device)

    def keep_blocks(self, dense: Tensor, block_size: tuple[int, int]) -> Tensor:
        """bool (*lead, M / bm, N / bn): the blocks of `dense` (*lead, M, N) to keep, chosen by
        their Frobenius norms (float32 at least).

        Extra memory is a chunk's and that of the norms, whatever the scope. Raises as
        :meth:`keep`, and `ValueError` where blocks do not divide the matrix.
        """
        dense = check_dense(dense, self.name)
        check_divides(tuple(dense.shape), block_size, self.name)
        return self.checked(self.norms(dense, block_size))

    def chunks(
        self, dense: Tensor, *, rows: int | None = None, chunk_bytes: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, bool (r, N)) for some rows of `dense` (*lead, M, N) after the other, in
        order, all leading dimensions together: `keep`, in memory that does not grow with M.

        `rows` a chunk, else as many as fit `chunk_bytes` bytes of `dense` (by default what a CPU's
        cache holds), and at least one row, or one row of blocks. Raises `ValueError` for a
        materialising sparsifier, for a vector, for `rows` that cut a block.

        >>> import torch, sparse_layouts as sl
        >>> for first, kept in sl.Threshold(1.5).chunks(torch.arange(6.0).view(3, 2), rows=2):
        ...     print(first, kept.tolist())
        0 [[False, False], [True, True]]
        2 [[True, True]]
        """
        if self.scope == "materialising":
            raise ValueError(
                f"{self.name}: chunks need a sparsifier that decides row by row (scope "
                f"'streaming' or 'blocking'), this one sees all at once; choose with "
                "keep(dense), which takes a byte an entry, or by a value: sl.Threshold(value)"
            )
        dense = check_dense(dense, self.name)
        if dense.dim() < 2:
            raise ValueError(
                f"{self.name}: chunks are rows of a tensor (*lead, M, N), got shape "
                f"{tuple(dense.shape)}; x.view(-1, k) makes rows of a vector"
            )
        for number, name in ((rows, "rows"), (chunk_bytes, "chunk_bytes")):
            if number is not None and number < 1:
                raise ValueError(f"{self.name}: {name} is at least 1, got {number}")
        if rows is not None and rows % self.row_multiple:
            raise ValueError(
                f"{self.name}: rows is a multiple of the block's {self.row_multiple}, got {rows}"
            )
        return self._chunks(dense, rows, chunk_bytes)

    def _chunks(
        self, dense: Tensor, rows: int | None, chunk_bytes: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        chooser = self.start(tuple(dense.shape), dense.device)
        multiple = self.row_multiple
        for first, part in row_chunks(dense, rows=rows, multiple=multiple, chunk_bytes=chunk_bytes):
            found = self.magnitudes(part)
            yield first, self.check(chooser(found, first), found)

    def magnitudes(self, dense: Tensor) -> Tensor:
        """What :meth:`choose` is given for entries: absolute values, or zeros that take no memory
        where it reads none. Raises for NaN.
        """
        if not self.reads_values:
            return torch.zeros((), device=dense.device).expand(dense.shape)
        found = magnitudes(dense)
        refuse_nan(found, self.name)
        return found

    def norms(self, dense: Tensor, block_size: tuple[int, int], norm: float = 2) -> Tensor:
        """What :meth:`choose` is given for blocks. Raises for NaN."""
        if not self.reads_values:
            (bm, bn), (m, n) = block_size, dense.shape[-2:]
            grid = (*dense.shape[:-2], m // bm, n // bn)
            return torch.zeros((), device=dense.device).expand(grid)
        found = block_norms(dense, block_size, norm)
        refuse_nan(found, self.name)
        return found

    def checked(self, found: Tensor) -> Tensor:
        """:meth:`choose`, its result checked."""
        return self.check(self.choose(found), found)

    def check(self, kept: Any, found: Tensor) -> Tensor:
        """What a choice among `found` gave, where it is bool and of its shape; else raises."""
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            got = kept.dtype if isinstance(kept, Tensor) else short(kept)
            raise TypeError(
                f"{self.name}: choose returns a bool tensor of the magnitudes' shape, got {got}; "
                "compare, e.g. magnitudes > 0.5"
            )
        if kept.shape != found.shape or kept.device != found.device:
            raise ValueError(
                f"{self.name}: choose returns a bool tensor of the magnitudes' shape "
                f"{tuple(found.shape)} on {found.device}, got {tuple(kept.shape)} on {kept.device}"
            )
        return kept

    @property
    def name(self) -> str:
        """What errors call it."""
        return type(self).__name__


class _Own(Sparsifier):
    """An object of another class that has a method `choose`."""

    def __init__(self, chooser: Any, scope: Scope) -> None:
        self.chooser = chooser
        self.scope = scope
        self.reads_values = bool(getattr(chooser, "reads_values", True))

    def choose(self, magnitudes: Tensor) -> Tensor:
        return self.chooser.choose(magnitudes)

    @property
    def name(self) -> str:
        return type(self.chooser).__name__

    def __repr__(self) -> str:
        return repr(self.chooser)


def as_sparsifier(keep: Any, what: str, argument: str = "keep") -> Sparsifier:
    """`keep` as a :class:`Sparsifier`: one, or an object with a method `choose`.

    `what` is the factory's name and `argument` what it calls it, for errors. Raises `TypeError` for
    anything else (a class that was not called among them), `ValueError` for a scope that is none.
    """
    if isinstance(keep, type) or not callable(getattr(keep, "choose", None)):
        called = ""
        if isinstance(keep, type) and hasattr(keep, "choose"):
            called = f"; call it: {keep.__name__}(...)"
        raise TypeError(
            f"{what}: {argument} is a sparsifier such as sl.Magnitude(density=0.25), got "
            f"{short(keep)}{called}"
        )
    scope: Any = getattr(keep, "scope", "materialising")
    if scope not in get_args(Scope):
        raise ValueError(
            f"{what}: a sparsifier's scope is one of {get_args(Scope)}, got {scope!r} from "
            f"{type(keep).__name__}"
        )
    return keep if isinstance(keep, Sparsifier) else _Own(keep, scope)
