"""Masks by name: `bsr_mask`, `mask_from`, `causal`, `sliding_window`, `sink_window`, `document`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import (
    BlockPattern,
    build_pattern,
    entry_rows,
    from_progressions,
    interval_tiles,
    pack_tiles,
    send,
    send_together,
)
from sparse_layouts.bsr_tensor import BSRTensor, block_size_pair
from sparse_layouts.dense_blocks import pattern_from_dense
from sparse_layouts.dense_rows import dense_source
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.matrix_sources import is_scipy

Device = torch.device | str | None


def checked_length(value: object, name: str, what: str, low: int = 0) -> int:
    """An int of at least `low`; raises `TypeError` or `ValueError` that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what}: {name} is an int, got {value!r}")
    if value < low:
        raise ValueError(f"{what}: {name} must be at least {low}, got {value}")
    return int(value)


def square_block(block_size: object, what: str) -> int:
    """The edge of a square block; raises for a pair of different edges."""
    bm, bn = block_size_pair(block_size, what)  # type: ignore[arg-type]
    if bm != bn:
        raise ValueError(f"{what}: expected square blocks, got {block_size!r}")
    return bm


def bsr_mask(
    blocks: Any,
    block_size: int | tuple[int, int],
    *,
    shape: tuple[int, int] | None = None,
    causal: bool = False,
    device: Device = None,
) -> BSRTensor:
    """A mask from a matrix of blocks: bool, or integer counts (how often a block counts in a
    softmax).

    blocks (*lead, Mb, Nb), a tensor or numpy array, e.g. (H, Mb, Nb) for a pattern per head; equal
    heads are stored once.
    `shape` (M, N) in entries, by default (Mb * bm, Nb * bn), may cut the last blocks. `causal`
    removes, by token, what lies right of the diagonal from the upper left.

    Raises `TypeError` for blocks that are neither bool nor integers and for what is not dense (a
    mask of entries, in whatever layout, goes through `sl.mask_from`), `ValueError` for negative
    counts or a shape of other blocks.

    >>> import torch, sparse_layouts as sl
    >>> sl.bsr_mask(torch.ones(3, 3, dtype=torch.bool), 16, causal=True)
    BSRTensor([48, 48], bool, cpu, block 16, 6 blocks, density 51.04%)
    """
    what = "bsr_mask"
    bm, bn = block_size_pair(block_size, what)
    blocks = dense_source(blocks, what)
    known = isinstance(blocks, Tensor) and not isinstance(blocks, LayoutTensor)
    if not known or blocks.layout != torch.strided:
        kind = f"a tensor of {blocks.layout}" if known else type(blocks).__name__
        raise TypeError(
            f"{what}: blocks is a dense tensor (*lead, Mb, Nb), got {kind}; sl.mask_from takes a "
            "mask of entries, x.to_dense() a sparse matrix of blocks"
        )
    if blocks.dtype.is_floating_point or blocks.dtype.is_complex:
        raise TypeError(
            f"{what}: blocks are bool or integer counts, got {blocks.dtype}; write blocks != 0 "
            f"for a bool mask"
        )
    if blocks.dim() < 2:
        raise ValueError(f"{what}: blocks is (*lead, Mb, Nb), got shape {tuple(blocks.shape)}")
    blocks = blocks.to(device) if device is not None else blocks
    if blocks.dtype != torch.bool and blocks.numel() and int(blocks.min()) < 0:
        raise ValueError(f"{what}: counts must not be negative, got {int(blocks.min())}")
    mb, nb = blocks.shape[-2:]
    m, n = (mb * bm, nb * bn) if shape is None else (int(shape[0]), int(shape[1]))
    if (-(-m // bm), -(-n // bn)) != (mb, nb):
        raise ValueError(
            f"{what}: {mb} x {nb} blocks of {bm} x {bn} cover a shape up to "
            f"{(mb * bm, nb * bn)}, not {(m, n)}; "
            f"that takes {-(-m // bm)} x {-(-n // bn)} blocks"
        )
    if causal:
        # the last block column of every block row that is not all right of the diagonal
        (last,) = send_together([(np.arange(mb) * bm + bm - 1) // bn], blocks.device)
        blocks = blocks * (torch.arange(nb, device=blocks.device) <= last[:, None])
    pattern = pattern_from_dense(blocks, (bm, bn), (m, n))
    return BSRTensor.on_pattern(None, _causal_by_token(pattern) if causal else pattern)


def _causal_by_token(pattern: BlockPattern) -> BlockPattern:
    """A pattern of full blocks, none all right of the diagonal, without what is right of it."""
    (mb, nb), (bm, bn), device = pattern.grid, pattern.block_size, pattern.device
    # Block (i, j) sees rows i * bm + r and columns j * bn + c: only i * bm - j * bn matters, and
    # from bn - 1 on the block is full.
    row = np.arange(mb)[:, None]
    column = (row * bm + 1) // bn + np.arange((bm - 2) // bn + 2)  # the partial blocks of a row
    offset = row * bm - column * bn
    kinds = np.unique(offset[(column < nb) & (offset > -bm) & (offset < bn - 1)])
    if not kinds.size:
        return pattern
    stops = np.clip(kinds[:, None] + np.arange(bm) + 1, 0, bn)
    number = np.zeros(bm + bn - 1)
    number[kinds + bm - 1] = np.arange(1, kinds.size + 1)
    words = interval_tiles(np.zeros_like(stops), stops, bn)
    number, words = send_together([number, words], device)
    rows = entry_rows(pattern.crow_indices, pattern.num_blocks) % mb
    offsets = (rows * bm).sub_(pattern.col_indices, alpha=bn)
    ids = number.index_select(0, offsets.clamp_(max=bn - 1).add_(bm - 1))
    return pattern._replace(block_tiles=ids, tiles=words.clone())


def mask_from(
    dense_bool: Any, block_size: int | tuple[int, int], *, device: Device = None
) -> BSRTensor:
    """The exact block mask of a bool mask (*lead, M, N): full blocks, and bit tiles for the partial
    ones, each stored once.

    The mask is a dense tensor or numpy array, any mask layout (`sl.mask_from(w.pattern, 64)` is
    that of a layout's stored entries), a scipy matrix or a `torch.sparse` tensor of bool; only what
    is dense is read densely. A BSRTensor of these blocks is returned as it is, with its counts.

    Raises `TypeError` for what is no mask or not bool, `ValueError` for a mask whose counts other
    blocks could not keep, and for a vector.

    >>> import torch, sparse_layouts as sl
    >>> mask = sl.mask_from(torch.ones(40, 40, dtype=torch.bool).tril(), 16)
    >>> mask.nnz, torch.equal(mask.to_dense(), torch.ones(40, 40, dtype=torch.bool).tril())
    (820, True)
    """
    what = "mask_from"
    bm, bn = block_size_pair(block_size, what)
    dense_bool = dense_source(dense_bool, what)
    is_tensor = isinstance(dense_bool, Tensor)
    is_dense = is_tensor and dense_bool.layout == torch.strided
    if is_scipy(dense_bool) or (is_tensor and not is_dense) or isinstance(dense_bool, LayoutTensor):
        from sparse_layouts.conversions import mask_of

        made = mask_of(dense_bool, (bm, bn), what)
        return made if device is None else made.to(device)  # type: ignore[return-value]
    if not isinstance(dense_bool, Tensor) or dense_bool.dtype != torch.bool:
        kind = getattr(dense_bool, "dtype", type(dense_bool).__name__)
        raise TypeError(
            f"{what}: expected a bool tensor, got {kind}; write x != 0 for its non-zero entries"
        )
    if dense_bool.dim() < 2:
        raise ValueError(f"{what}: expected (*lead, M, N), got shape {tuple(dense_bool.shape)}")
    dense = dense_bool.to(device) if device is not None else dense_bool
    *lead, m, n = dense.shape
    mb, nb = -(-m // bm), -(-n // bn)
    pad = (0, nb * bn - n, 0, mb * bm - m)

    def blocked(value: bool) -> Tensor:  # [*lead, mb, bm, nb, bn]
        padded = torch.nn.functional.pad(dense, pad, value=value) if any(pad) else dense
        return padded.reshape(*lead, mb, bm, nb, bn)

    # as bytes: any() and all() of bools take 30 times longer on a CPU
    stored = blocked(False).view(torch.uint8).amax(-3).amax(-1).bool()
    # what lies over the edge is never read: True there lets an edge block be full
    true_edges = blocked(True)
    partial = stored & ~true_edges.view(torch.uint8).amin(-3).amin(-1).bool()
    ids = tiles = None
    index = partial.nonzero(as_tuple=True)
    if index[0].numel():
        bits = true_edges.transpose(-3, -2)[index]
        tiles, kind = torch.unique(pack_tiles(bits), dim=0, return_inverse=True)
        ids = torch.zeros_like(stored, dtype=torch.int32)
        ids[index] = kind.int() + 1
    return BSRTensor.on_pattern(None, pattern_from_dense(stored, (bm, bn), (m, n), ids, tiles))


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
    device = torch.device(device if device is not None else "cpu")
    nb = -(-seq_len // block)
    window = seq_len if window is None else min(window, seq_len)
    window = max(window, 1)
    sink_blocks = -(-sinks // block)

    def band(on: torch.device) -> tuple[Tensor, Tensor]:
        i = torch.arange(nb, device=on)[None, :]
        low = ((i * block - window + 1).div(block, rounding_mode="floor")).clamp_(min=0)
        if causal:
            return low, i
        return low, ((i * block + block - 1 + window - 1) // block).clamp_(max=max(nb - 1, 0))

    def segments(on: torch.device) -> list[tuple[Tensor, int, Tensor]]:
        low, high = band(on)
        parts = [(low, 1, high - low + 1)]
        if sinks:
            parts.insert(0, (torch.zeros_like(low), 1, low.clamp(max=sink_blocks)))
        return parts

    crow, col = from_progressions(segments, device=device)
    # A block's tile depends on its distance d = i - j and, with sinks, on whether column block j is
    # all, partly or not a sink.
    far = (window + block - 1) // block + 1
    distances = list(range(0 if causal else -far, far + 1))
    columns = np.arange(block)
    steps = np.arange(block)[:, None] - columns[None, :]
    table = np.zeros((3, len(distances)), np.int32)
    tiles: list[Tensor] = []
    known: dict[bytes, int] = {}
    for kind, sunk in enumerate((0, sinks % block, block)):
        for x, d in enumerate(distances):
            inside = abs(d) * block + block <= window and (d > 0 or not causal)
            if inside or (sunk == block and d > 0):
                continue  # all of it
            t = d * block + steps
            stored = (
                (t < window) & (t > -window)
                if not causal
                else (t >= 0) & ((t < window) | (columns < sunk))
            )
            if stored.all() or not stored.any():
                continue  # full, or a distance at which nothing is stored
            key = stored.tobytes()
            if key not in known:
                known[key] = len(tiles) + 1
                tiles.append(torch.from_numpy(stored))
            table[kind, x] = known[key]
    ids = packed = None
    if tiles:
        packed = send(pack_tiles(torch.stack(tiles)), device)
        row = entry_rows(crow, col.shape[0])
        distance = (row - col).clamp_(distances[0], distances[-1]) - distances[0]
        kinds = torch.zeros_like(distance)
        if sinks:
            kinds = torch.where(col < sinks // block, 2, torch.where(col < sink_blocks, 1, 0))
        ids = send(torch.from_numpy(table), device)[kinds, distance]
    pattern = build_pattern(
        crow,
        col,
        shape=(seq_len, seq_len),
        block_size=(block, block),
        block_tiles=ids,
        tiles=packed,
    )
    return BSRTensor.on_pattern(None, pattern)


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
    device = bounds.device
    lead = () if bounds.dim() == 1 else (bounds.shape[0], 1)
    host = bounds.reshape(-1, bounds.shape[-1]).long().cpu()  # the one sync
    ends = host[:, -1]
    if (
        bool((host[:, 0] != 0).any())
        or bool((host.diff(dim=1) < 0).any())
        or bool((ends != ends[:1]).any())
    ):
        raise ValueError(
            f"{what}: cu_seqlens must begin at 0, not decrease, and end at one N for all "
            f"samples; got {host.tolist()}"
        )
    n = int(ends[0]) if ends.numel() else 0
    nb = -(-n // b)
    blocked = (host.shape[0], nb, b)
    documents = _document_of_token(host, n, nb * b)  # (B, nb * b): over the edge, the last token's
    starts = host.gather(1, documents)
    stops = host.gather(1, documents + 1)
    first = starts.view(blocked)[:, :, 0] // b
    last = torch.arange(nb).expand_as(first)
    if not causal:
        last = (stops.view(blocked)[:, :, -1] - 1) // b

    def segments(on: torch.device) -> list[tuple[Tensor, int, Tensor]]:
        return [(first.to(on), 1, (last - first + 1).to(on))]

    crow, col = from_progressions(segments, device=device)
    ids, tiles = _document_tiles(crow, col, documents.to(device).view(blocked), b, causal)
    made = build_pattern(
        crow,
        col,
        shape=(n, n),
        block_size=(b, b),
        lead=lead,
        block_tiles=ids,
        tiles=tiles,
    )
    return BSRTensor.on_pattern(None, made)


def _document_of_token(bounds: Tensor, n: int, padded: int) -> Tensor:
    """(B, padded): the document of each token; empty documents have none, tokens over the edge the
    last one's.
    """
    token = torch.arange(padded).clamp_(max=max(n - 1, 0)).expand(bounds.shape[0], -1).contiguous()
    return (torch.searchsorted(bounds, token, right=True) - 1).clamp_(
        0, max(bounds.shape[1] - 2, 0)
    )


def _document_tiles(
    crow: Tensor, col: Tensor, documents: Tensor, b: int, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Tile ids and bit tiles of a document mask; `documents` (B, nb, b). Tiles are made a few
    thousand at a time.
    """
    nb = documents.shape[1]
    entry = entry_rows(crow, col.shape[0])
    sample, row = entry // max(nb, 1), entry % max(nb, 1)
    single = documents[:, :, 0] == documents[:, :, -1]
    full = single[sample, row] & single[sample, col.long()]
    full &= documents[sample, row, 0] == documents[sample, col.long(), 0]
    if causal:
        full &= row > col
    partial = (~full).nonzero().flatten()
    if not partial.numel():
        return None, None
    words = []
    triangle = torch.ones(b, b, dtype=torch.bool, device=col.device).tril()
    for part in partial.split(4096):
        rows = documents[sample[part], row[part]]
        columns = documents[sample[part], col[part].long()]
        stored = rows[:, :, None] == columns[:, None, :]
        if causal:
            stored &= triangle | (row[part] != col[part])[:, None, None]
        words.append(pack_tiles(stored))
    tiles, kind = torch.unique(torch.cat(words), dim=0, return_inverse=True)
    ids = torch.zeros(col.shape[0], dtype=torch.int32, device=col.device)
    ids[partial] = kind.int() + 1
    return ids, tiles
