"""LocalStrideTensor: local blocks and every n-th column, a different residue for each head
(phi-3-small's attention).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch

from sparse_layouts.block_pattern import interval_tiles
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.closed_forms import Progression, Stripe, closed_form
from sparse_layouts.mask_factories import Device, checked_length, square_block
from sparse_layouts.outside_graphs import constant_in_graphs


class LocalStrideTensor(BSRTensor):
    """A BSRTensor whose pattern is local blocks and vertical strides; made by `sl.local_stride`.

    A 4 x 4 example, blocks of 1, local_blocks 1, vert_stride 2, heads 0 and 1::

        x . . .      x . . .
        x x . .      . x . .
        x . x .      . x x .
        x . x x      . x . x

    field | shape | dtype | invariant
    ---|---|---|---
    those of BSRTensor | | | at most `vert_stride` patterns and a dense one
    `local_blocks`, `vert_stride`, `head_offset`, `num_dense_heads` | static | int | as made
    `homo_head`, `is_causal` | static | bool | as made

    Memory: 12 bytes a stored block of each different head.

    >>> import sparse_layouts as sl
    >>> mask = sl.local_stride(4, block_size=1, local_blocks=1, vert_stride=2, num_heads=2)
    >>> mask[1].to_dense().int().tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """

    static_fields: ClassVar[tuple[str, ...]] = (
        *BSRTensor.static_fields,
        "local_blocks",
        "vert_stride",
        "head_offset",
        "num_dense_heads",
        "homo_head",
        "is_causal",
    )
    local_blocks: int
    vert_stride: int
    head_offset: int
    num_dense_heads: int
    homo_head: bool
    is_causal: bool

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        return [f"local {self.local_blocks}, stride {self.vert_stride}", *super().describe()]


@constant_in_graphs
def local_stride(
    seq_len: int,
    *,
    block_size: int,
    local_blocks: int,
    vert_stride: int,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    homo_head: bool = False,
    num_dense_heads: int = 0,
    head_offset: int = 0,
    causal: bool = True,
    device: Device = None,
) -> LocalStrideTensor:
    """The local-stride mask (num_heads, N, N), or (N, N) for one head: near blocks, and every
    `vert_stride`-th block column.

    With i, j block row and column, V = vert_stride and h the KV head (each repeated for its group
    of query heads), causal::

        step = max(1, V // num_heads)
        stored = j <= i and (i - j < local_blocks or (j + h * step + head_offset) % V == 0)

    Diagonal blocks are causal by token. Not causal: the stride counts from the window's edge,
    ``(max(i-j-L+1, 0) + max(j-i-L+1, 0)) % V == 0``, the same for all heads. The last
    `num_dense_heads` KV heads attend to everything; `homo_head` gives all heads the pattern of head
    0. `head_offset=1` is phi-3-small's published attention. Sizes in blocks, but seq_len in tokens
    (any, also one that the block does not divide).

    Built on `device` in O(stored blocks) without a host sync; equal heads are stored once. Raises
    `ValueError` for sizes out of range or heads that do not divide. Source:
    https://github.com/linxihui/dkernel and phi-3-small, https://arxiv.org/abs/2404.14219 section 2.

    >>> import sparse_layouts as sl
    >>> mask = sl.local_stride(8192, block_size=64, local_blocks=16, vert_stride=8, num_heads=32)
    >>> mask.block_pattern.num_patterns
    8
    """
    what = "local_stride"
    n, b = checked_length(seq_len, "seq_len", what), square_block(block_size, what)
    local = checked_length(local_blocks, "local_blocks", what)
    stride = checked_length(vert_stride, "vert_stride", what, 1)
    heads = checked_length(num_heads, "num_heads", what, 1)
    kv_heads = (
        heads if num_kv_heads is None else checked_length(num_kv_heads, "num_kv_heads", what, 1)
    )
    dense_heads = checked_length(num_dense_heads, "num_dense_heads", what)
    offset = checked_length(head_offset, "head_offset", what)
    if heads % kv_heads:
        raise ValueError(f"{what}: num_kv_heads {kv_heads} must divide num_heads {heads}")
    if dense_heads > kv_heads:
        raise ValueError(
            f"{what}: num_dense_heads {dense_heads} is more than the {kv_heads} KV heads"
        )
    nb = -(-n // b)

    # The residue (head offset modulo V) that each KV head adds to the column; -1 for a dense head.
    step = max(1, stride // heads)
    sparse_heads = range(kv_heads - dense_heads)
    residues = [
        ((0 if homo_head else h) * step + offset) % stride if causal else 0 for h in sparse_heads
    ]
    residues += [-1] * dense_heads
    different = list(dict.fromkeys(residues))
    index_of = {residue: i for i, residue in enumerate(different)}
    head_map = [index_of[r] for r in residues for _ in range(heads // kv_heads)]

    tiles = None
    if causal:
        stripes = _causal_stripes(different, nb, local, stride)
        if b > 1:  # the diagonal of blocks of 1 is full
            tiles = interval_tiles(np.zeros((1, b), np.int32), np.arange(1, b + 1)[None], b)
    else:
        stripes = _relative_stripes(different, nb, local, stride)
    pattern = closed_form(
        stripes,
        patterns=len(different),
        shape=(n, n),
        block_size=(b, b),
        device=torch.device(device if device is not None else "cpu"),
        lead=() if heads == 1 else (heads,),
        head_map=None if head_map == list(range(len(different))) else np.array(head_map),
        tiles=tiles,
    )
    return LocalStrideTensor.on_pattern(
        None,
        pattern,
        local_blocks=local,
        vert_stride=stride,
        head_offset=offset,
        num_dense_heads=dense_heads,
        homo_head=homo_head,
        is_causal=causal,
    )


def _each_pattern(numbers: Iterable[int]) -> np.ndarray:
    """int32 (P, 1), or (1, 1) where all patterns agree."""
    column = np.array(list(numbers), dtype=np.int32)[:, None]
    return column[:1] if (column == column[0]).all() else column


def _causal_stripes(residues: list[int], nb: int, local: int, stride: int) -> list[Stripe]:
    """Every `stride`-th column below the window, the window, and the diagonal."""
    i = np.arange(nb, dtype=np.int32)  # block rows, and block columns
    reach = _each_pattern(nb if r < 0 else min(max(local, 1), nb) for r in residues)
    first = _each_pattern(min(-r % stride, nb) for r in residues)
    stride = min(stride, nb + 1)  # longer ones reach no second column either
    low = np.maximum(i - reach + 1, 0)
    strided = i % stride == first
    on_diagonal = strided | (local > 0) | _each_pattern(r < 0 for r in residues).astype(bool)
    diagonal = Progression(i, on_diagonal)
    return [
        Stripe(
            Progression(first, (low + (stride - 1) - first) // stride, stride),
            Progression(i + reach, (nb - i - reach) * strided),
        ),
        Stripe(Progression(low, i - low), Progression(i + 1, np.minimum(nb - 1 - i, reach - 1))),
        Stripe(diagonal, diagonal, tile=1),
    ]


def _relative_stripes(residues: list[int], nb: int, local: int, stride: int) -> list[Stripe]:
    """Every `stride`-th block left of the window, the window, every `stride`-th right of it."""
    if local:  # |i - j| up to `reach` is the window; the next that is stored is at distance `far`
        reach, far = local - 1, local - 1 + stride
    else:  # |i - j| + 1 is a multiple of the stride, on the diagonal, which counts twice, 2
        reach, far = (0 if 2 % stride == 0 else -1), max(stride - 1, 1)
    i = np.arange(nb, dtype=np.int32)  # block rows, and block columns
    reach_of = _each_pattern(nb if r < 0 else min(reach, nb) for r in residues)
    far_of = _each_pattern(nb if r < 0 else min(far, nb) for r in residues)
    stride = min(stride, nb + 1)  # longer ones reach no second block either
    low, high = np.maximum(i - reach_of, 0), np.minimum(i + reach_of, nb - 1)
    near = Progression(low, high - low + 1)
    before = Progression((i - far_of) % stride, (i - far_of) // stride + 1, stride)
    after = Progression(i + far_of, (nb - 1 - i - far_of) // stride + 1, stride)
    return [Stripe(before, after), Stripe(near, near), Stripe(after, before)]
