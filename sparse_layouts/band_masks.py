"""Masks of bands of tokens: `causal`, `sliding_window`, `sink_window`."""

from __future__ import annotations

import numpy as np
import torch

from sparse_layouts.block_pattern import interval_tiles
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.closed_forms import Progression, Stripe, closed_form
from sparse_layouts.mask_factories import Device, checked_length, square_block
from sparse_layouts.outside_graphs import constant_in_graphs


def causal(seq_len: int, *, block_size: int, device: Device = None) -> BSRTensor:
    """The causal mask (N, N): token i attends to every j <= i.

    `seq_len` N in tokens, which `block_size` need not divide; bool, built on `device`.

    Raises `TypeError` for sizes that are no ints, `ValueError` for those out of range and for a
    block that is not square.

    >>> import sparse_layouts as sl
    >>> sl.causal(100, block_size=32).nnz == 100 * 101 // 2
    True
    """
    n, b = checked_length(seq_len, "seq_len", "causal"), square_block(block_size, "causal")
    return banded(n, b, None, causal=True, device=device)


def sliding_window(
    seq_len: int, *, block_size: int, window: int, causal: bool = True, device: Device = None
) -> BSRTensor:
    """A window of tokens (N, N): `i - window < j <= i`, or `|i - j| < window` if not causal.

    `seq_len` N and `window` in tokens, neither need be a multiple of `block_size`; bool, built on
    `device`.

    Raises `TypeError` for sizes that are no ints, `ValueError` for those out of range and for a
    block that is not square.

    >>> import sparse_layouts as sl
    >>> row = sl.sliding_window(1000, block_size=64, window=100).to_dense()[500]
    >>> row.nonzero().flatten()[[0, -1]].tolist()
    [401, 500]
    """
    what = "sliding_window"
    n, b = checked_length(seq_len, "seq_len", what), square_block(block_size, what)
    return banded(n, b, checked_length(window, "window", what, 1), causal=causal, device=device)


def sink_window(
    seq_len: int, *, block_size: int, window: int, sinks: int, device: Device = None
) -> BSRTensor:
    """A causal window of tokens, and the first `sinks` tokens for everybody (N, N): `j <= i and (i
    - j < window or j < sinks)`.

    `seq_len` N, `window` and `sinks` in tokens; bool, built on `device`.

    Raises `TypeError` for sizes that are no ints, `ValueError` for those out of range and for a
    block that is not square.

    Source: attention sinks, https://arxiv.org/abs/2309.17453.

    >>> import sparse_layouts as sl
    >>> row = sl.sink_window(1000, block_size=64, window=3, sinks=2).to_dense()[500]
    >>> row.nonzero().flatten().tolist()
    [0, 1, 498, 499, 500]
    """
    what = "sink_window"
    n, b = checked_length(seq_len, "seq_len", what), square_block(block_size, what)
    w, s = checked_length(window, "window", what, 1), checked_length(sinks, "sinks", what)
    return banded(n, b, w, causal=True, sinks=min(s, n), device=device)


@constant_in_graphs
def banded(
    seq_len: int,
    block: int,
    window: int | None,
    *,
    causal: bool,
    sinks: int = 0,
    device: Device = None,
) -> BSRTensor:
    """Tokens i, j with `i - j < window` (and `j <= i`, or `j - i < window`), or `j < sinks` (and `j
    <= i`); window None: all.
    """
    nb = -(-seq_len // block)
    window = nb * block if window is None or window >= seq_len else window
    # What is stored of block (i, j) depends on its distance i - j, and on how much of block column
    # j is sinks. Up to distance `full` it is all (but on a causal diagonal), beyond `far` nothing.
    full, far = window // block - 1, min((window + block - 2) // block, nb - 1)
    whole, sunk_at_all = sinks // block, -(-sinks // block)
    ranges = [(0, whole, block), (whole, sunk_at_all, sinks % block), (sunk_at_all, nb, 0)]
    ranges = [(first, last, sunk) for first, last, sunk in ranges if first < last]
    lines = np.arange(nb, dtype=np.int32)  # block rows, and block columns
    none, in_block = np.zeros(block, dtype=np.int64), np.arange(block)
    numbers = {interval_tiles(none, none + block, block).tobytes(): 0}

    def tile(distance: int, sunk: int) -> int:
        """The number of the tile of a block at this distance, `sunk` of whose columns are sinks."""
        t = distance * block + in_block  # i - j in every row's first column
        stops = np.clip(t + 1 if causal else t + window, 0, block)
        near = interval_tiles(np.clip(t - window + 1, 0, block), stops, block)
        bits = near | interval_tiles(none, np.minimum(stops, sunk), block)
        return numbers.setdefault(bits.tobytes(), len(numbers))

    def between(nearest: int, furthest: int, tile: np.ndarray | int = 0) -> Stripe:
        """The blocks at these distances."""
        left, right = np.maximum(lines - furthest, 0), np.minimum(lines - nearest, nb - 1)
        top, bottom = np.maximum(lines + nearest, 0), np.minimum(lines + furthest, nb - 1)
        columns, rows = Progression(left, right - left + 1), Progression(top, bottom - top + 1)
        return Stripe(columns, rows, tile)

    def at(distance: int) -> Stripe:
        """The blocks at one distance, at which some of them are partial."""
        number = np.zeros(nb, dtype=np.int32)
        for first, last, sunk in ranges:
            if first + distance < nb:
                number[max(first + distance, 0) : last + distance] = tile(distance, sunk)
        return between(distance, distance, number)

    stripes = []
    for first, last, sunk in ranges:
        if sunk and first + far + 1 < nb:  # there are rows whose window has left sinks behind
            behind = (nb - 1 - far - lines) * ((first <= lines) & (lines < last))
            stripes.append(
                Stripe(
                    Progression(first, np.minimum(last, lines - far) - first),
                    Progression(lines + far + 1, behind),
                    tile(nb + 1, sunk),
                )
            )
    edge = range(max(full, 0) + 1, far + 1)
    stripes += [at(distance) for distance in reversed(edge)]
    if full >= (1 if causal else 0):
        stripes.append(between(1 if causal else -full, full))
    if causal or full < 0:
        stripes.append(at(0))
    if not causal:
        stripes += [at(-distance) for distance in edge]
    words = np.frombuffer(b"".join(numbers), dtype=np.int32).reshape(len(numbers), block, -1)
    pattern = closed_form(
        stripes,
        patterns=1,
        shape=(seq_len, seq_len),
        block_size=(block, block),
        device=torch.device(device if device is not None else "cpu"),
        tiles=words[1:] if len(words) > 1 else None,
    )
    return BSRTensor.on_pattern(None, pattern)
