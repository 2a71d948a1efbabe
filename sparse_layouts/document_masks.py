"""Masks of packed documents: `document`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, interval_tiles
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.closed_forms import Progression, Stripe, closed_form
from sparse_layouts.mask_factories import Device, square_block
from sparse_layouts.outside_graphs import outside_graphs


@outside_graphs
def document(
    cu_seqlens: Tensor | Sequence[int],
    *,
    block_size: int,
    causal: bool = True,
    device: Device = None,
) -> BSRTensor:
    """Packed documents that attend to themselves alone: `cu_seqlens` (n + 1,) from 0 to N, as for
    variable-length attention.

    (N, N); with cu_seqlens (B, n + 1), one packing a sample (pad with repeated N), (B, 1, N, N).
    One host sync.

    Raises `TypeError` for cu_seqlens that are no integers, `ValueError` if they do not begin at 0,
    decrease, or end differently.

    >>> import sparse_layouts as sl
    >>> sl.document([0, 30, 100], block_size=32).nnz == 30 * 31 // 2 + 70 * 71 // 2
    True
    """
    what = "document"
    b = square_block(block_size, what)
    bounds = torch.as_tensor(cu_seqlens, device=device)
    if bounds.dtype.is_floating_point or bounds.dtype == torch.bool or bounds.dtype.is_complex:
        raise TypeError(f"{what}: cu_seqlens are integers, got {bounds.dtype}")
    if bounds.dim() not in (1, 2) or bounds.shape[-1] < 1:
        raise ValueError(
            f"{what}: cu_seqlens is (n + 1,) or (B, n + 1), got shape {tuple(bounds.shape)}"
        )
    lead = () if bounds.dim() == 1 else (bounds.shape[0], 1)
    host = bounds.reshape(-1, bounds.shape[-1]).long().cpu().numpy()  # the one sync
    first, last = host[:, 0], host[:, -1]
    if first.any() or (np.diff(host) < 0).any() or (last != last[:1]).any():
        raise ValueError(
            f"{what}: cu_seqlens must begin at 0, not decrease, and end at one N for all "
            f"samples; got {host.tolist()}"
        )
    pattern = _document_pattern(host, b, causal, lead, bounds.device)
    return BSRTensor.on_pattern(None, pattern)


def _document_pattern(
    bounds: np.ndarray, b: int, causal: bool, lead: tuple[int, ...], device: torch.device
) -> BlockPattern:
    """The pattern of the documents between `bounds` (samples, n + 1)."""
    samples, n = bounds.shape[0], int(bounds[:1, -1].sum())
    nb = -(-n // b)
    bounds = np.where(bounds == n, nb * b, bounds)  # what lies over the edge is the last document's
    i = np.arange(nb)  # block rows, and block columns
    # Two blocks have at most one document in common: the last one of the upper left block, which is
    # the first one of the other. So a block off the diagonal stores a rectangle, cut where this
    # document begins or ends.
    begin, end = _document_around(bounds, i * b)  # each block's first document, (samples, nb)
    last_begin, last_end = _document_around(bounds, i * b + b - 1)
    first, last = begin // b, (last_end - 1) // b  # the blocks where these begin and end
    bottom, top = np.minimum(end - i * b, b), np.maximum(last_begin - i * b, 0)
    diagonal, diagonal_words = _diagonal_tiles(bounds, nb, b, causal)
    stripes = [
        Stripe(  # left of the diagonal, in the block column where the document begins
            Progression(first, first < i),
            Progression(i + 1, (last - i) * (last_begin >= i * b)),
            _rectangle(0, bottom, begin % b, b, b),
        ),
        Stripe(  # and from there to the diagonal
            Progression(first + 1, i - first - 1),
            Progression(i + 1, (last - i) * (last_begin < i * b)),
            _rectangle(0, bottom, 0, b, b),
        ),
        Stripe(Progression(i, 1), Progression(i, 1), diagonal),
    ]
    if not causal:
        stripes += [
            Stripe(  # right of the diagonal, before the block column where it ends
                Progression(i + 1, last - i - 1),
                Progression(first, (i - first) * (end > i * b + b)),
                _rectangle(top, b, 0, b, b),
            ),
            Stripe(  # and in that one
                Progression(last, last > i),
                Progression(first, (i - first) * (end <= i * b + b)),
                _rectangle(top, b, 0, (last_end - 1) % b + 1, b),
            ),
        ]
    # The tiles of the blocks that there are, each once. (A partial tile on the diagonal has its two
    # corners and so is no rectangle.)
    whole = _rectangle(0, b, 0, b, b)
    kinds = np.empty((len(stripes), samples, nb), dtype=np.int64)
    for s, stripe in enumerate(stripes):
        kinds[s] = np.where(np.greater(stripe.columns.length, 0), stripe.tile, whole)
    used = np.unique(kinds)
    partial = used != whole
    number = np.where(partial, np.cumsum(partial), 0)[np.searchsorted(used, kinds)]
    used = used[partial]
    words = [diagonal_words[-1 - used[used < 0]], _rectangle_tiles(used[used >= 0], b)]
    return closed_form(
        [stripe._replace(tile=number[s]) for s, stripe in enumerate(stripes)],
        patterns=samples,
        shape=(n, n),
        block_size=(b, b),
        device=device,
        lead=lead,
        tiles=np.concatenate(words) if used.size else None,
    )


def _document_around(bounds: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the document of each token begins and ends, (samples, tokens) each."""
    shape = (bounds.shape[0], tokens.size)
    after = [np.searchsorted(sample, tokens, side="right") for sample in bounds]
    at = np.array(after, dtype=np.int64).reshape(shape)
    return np.take_along_axis(bounds, at - 1, 1), np.take_along_axis(bounds, at, 1)


def _rectangle(top: Any, bottom: Any, left: Any, right: Any, b: int) -> np.ndarray:
    """A number, at least 0, for the tile that stores these rows and columns, first to last + 1."""
    return np.ravel_multi_index(np.broadcast_arrays(top, bottom, left, right), (b + 1,) * 4)


def _rectangle_tiles(rectangles: np.ndarray, b: int) -> np.ndarray:
    """The packed tiles of numbers from :func:`_rectangle`."""
    top, bottom, left, right = (t[:, None] for t in np.unravel_index(rectangles, (b + 1,) * 4))
    row = np.arange(b)
    return interval_tiles(
        np.broadcast_to(left, (rectangles.size, b)),
        np.where((top <= row) & (row < bottom), right, left),
        b,
    )


def _diagonal_tiles(
    bounds: np.ndarray, nb: int, b: int, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of every diagonal block (samples, nb) -1 - k, if its tile is the k-th of those returned, or
    the whole block's number.
    """
    sample, which = np.nonzero(bounds % b)  # documents that begin inside a block
    begins = bounds[sample, which]
    blocks, at = np.unique(sample * nb + begins // b, return_inverse=True)
    inside = np.zeros((1 + blocks.size, b), dtype=bool)  # first a block in which none begins
    inside[1 + at, begins % b] = True
    kinds: dict[bytes, int] = {}
    kind = [kinds.setdefault(line.tobytes(), len(kinds)) for line in np.packbits(inside, axis=1)]
    numbers = np.zeros(bounds.shape[0] * nb, dtype=np.int64)
    numbers[blocks] = kind[1:]
    inside = inside[np.unique(kind, return_index=True)[1]]
    row = np.arange(b)
    starts = np.maximum.accumulate(np.where(inside, row, 0), axis=1)
    stops = np.broadcast_to(row + 1, starts.shape)
    if not causal:  # up to where the next one begins
        following = np.where(inside, row, b)[:, ::-1]
        stops = np.full_like(starts, b)
        stops[:, :-1] = np.minimum.accumulate(following, axis=1)[:, -2::-1]
    numbers = -1 - numbers
    if not causal or b == 1:
        numbers[numbers == -1] = _rectangle(0, b, 0, b, b)
    return numbers.reshape(bounds.shape[0], nb), interval_tiles(starts, stops, b)
