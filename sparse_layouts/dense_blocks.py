"""A pattern from a matrix of blocks, bool or counts: what is stored, and which heads are equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, build_pattern, line_offsets, send_together

HASH_FACTOR = 0x5851F42D4C957F2D  # an odd number of 63 random bits; products wrap around


def pattern_from_dense(
    blocks: Tensor,
    block_size: tuple[int, int],
    shape: tuple[int, int],
    block_tiles: Tensor | None = None,
    tiles: Tensor | None = None,
) -> BlockPattern:
    """A pattern from a matrix of blocks (*lead, Mb, Nb), bool or integer counts. One host sync;
    equal heads are stored once.

    `block_tiles` (*lead, Mb, Nb) int32 names the bit tile of each stored block (0: full), and is 0
    where none is stored.
    """
    lead = tuple(blocks.shape[:-2])
    heads, (mb, nb), device = math.prod(lead), blocks.shape[-2:], blocks.device
    tables = [t.reshape(heads, mb * nb) for t in (blocks, block_tiles) if t is not None]
    stored = tables[0] if blocks.dtype == torch.bool else tables[0] != 0
    counts = stored.reshape(heads, mb, nb).sum(-1, dtype=torch.int32)
    first = _first_equal_head(tables)
    first_list, stored_list = torch.stack([first, counts.sum(1)]).tolist()  # the one sync
    different = sorted(set(first_list))
    head_map = None
    if len(different) < heads:
        kind = {h: p for p, h in enumerate(different)}
        own = np.array([kind[h] for h in first_list])
        head_map, which = send_together([own, np.array(different)], device)
        head_map = head_map.clone()
        stored, counts = stored.index_select(0, which), counts.index_select(0, which)
        tables = [t.index_select(0, which) for t in tables]
    total = sum(stored_list[h] for h in different)
    where = _stored_places(stored, total)
    return build_pattern(
        line_offsets(counts),
        where.remainder(max(nb, 1)).int(),
        shape=shape,
        block_size=block_size,
        lead=lead,
        head_map=head_map,
        block_tiles=None if block_tiles is None else tables[1].reshape(-1)[where].int(),
        tiles=tiles,
        block_counts=None if blocks.dtype == torch.bool else tables[0].reshape(-1)[where].int(),
    )


def _stored_places(stored: Tensor, number: int) -> Tensor:
    """int64 (number,): where a bool tensor that is True `number` times is True, in its flat order;
    no host sync.
    """
    if stored.device.type == "cpu":  # numpy is 10x faster than torch here
        return torch.from_numpy(np.flatnonzero(stored.numpy()))
    return torch.nonzero_static(stored.flatten(), size=number)[:, 0]


def _first_equal_head(tables: Sequence[Tensor]) -> Tensor:
    """int64 (H,), without a host sync: the first head with the same rows in all tables (H, K).

    Hashes choose it, and the rows are compared: heads that differ are never taken for equal.
    """
    heads = torch.arange(tables[0].shape[0], device=tables[0].device)
    if heads.numel() < 2 or not tables[0].numel():
        return torch.zeros_like(heads)
    digest, words = torch.zeros_like(heads), []
    for table in tables:
        data = table.contiguous().view(torch.uint8)
        if data.shape[1] % 8 or data.storage_offset() % 8:
            data = torch.nn.functional.pad(data, (0, -data.shape[1] % 8))
        words.append(data.view(torch.int64))
        weights = torch.arange(1, words[-1].shape[1] + 1, device=heads.device).mul_(HASH_FACTOR)
        weights = weights.bitwise_xor_(weights >> 29).mul_(HASH_FACTOR)
        digest = digest.mul_(HASH_FACTOR).add_((words[-1] * weights).sum(1))
    first = (digest[:, None] == digest).byte().argmax(1)
    for data in words:
        equal = (data == data.index_select(0, first)).all(1)
        first = torch.where(equal, first, heads)
    return first
