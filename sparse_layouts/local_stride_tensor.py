"""LocalStrideTensor: local blocks and every n-th column, a different residue for each head
(phi-3-small's attention).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_layouts.block_pattern import build_pattern, causal_tile, from_progressions, send
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.mask_factories import Device, checked_length, square_block


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
    on = torch.device(device if device is not None else "cpu")
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

    def segments(where: torch.device) -> list[tuple[Tensor, Any, Tensor]]:
        return _segments(different, nb, local, stride, causal, where)

    crow, col = from_progressions(segments, device=on)
    ids = tiles = None
    if causal and n:
        tiles = causal_tile(b, b, on)
        # the diagonal block, the last of every row that has it
        ids = torch.zeros(col.shape[0], dtype=torch.int32, device=on)
        last = (crow[:, 1:] - 1).flatten().long()
        if local > 0:
            ids.index_fill_(0, last, 1)
        elif col.numel():  # without local blocks a row may end before its diagonal, or be empty
            row = torch.arange(nb, device=on).repeat(len(different))
            on_diagonal = (col[last.clamp(min=0)] == row) & (crow.diff(dim=1).flatten() > 0)
            ids.index_put_((last.clamp(min=0),), on_diagonal.int(), accumulate=True)
    lead = () if heads == 1 else (heads,)
    shared = None
    if lead and head_map != list(range(len(different))):
        shared = send(torch.tensor(head_map, dtype=torch.int32), on)
    pattern = build_pattern(
        crow,
        col,
        shape=(n, n),
        block_size=(b, b),
        lead=lead,
        head_map=shared,
        block_tiles=ids,
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


def _segments(
    residues: list[int], nb: int, local: int, stride: int, causal: bool, on: torch.device
) -> list[tuple[Tensor, Any, Tensor]]:
    """Every row as progressions: strided columns, the local range, and, if not causal, strided
    columns on the right.
    """
    residue = send(torch.tensor(residues), on)[:, None]
    i = torch.arange(nb, device=on)[None, :].expand(len(residues), -1)
    dense = residue < 0
    if causal:
        low = torch.where(dense, 0, (i - local + 1).clamp(min=0))
        first = ((-residue) % stride).expand_as(i)
        strided = ((low - first + stride - 1).div(stride, rounding_mode="floor")).clamp(min=0)
        strided = torch.where(dense, 0, strided)
        return [(first, stride, strided), (low, 1, i - low + 1)]
    # Relative: left of the window at distances L - 1 + V, L - 1 + 2V, ...; with local 0 the
    # distance 0 itself is not in the window.
    reach = max(local - 1, 0)
    low, high = (i - reach).clamp(min=0), (i + reach).clamp(max=nb - 1)
    if local == 0:
        return _relative_without_window(i, dense, nb, stride)
    left = torch.where(dense, 0, (i - reach).clamp(min=0) // stride)
    right = torch.where(dense, 0, (nb - 1 - i - reach).clamp(min=0) // stride)
    low, high = torch.where(dense, 0, low), torch.where(dense, nb - 1, high)
    return [
        (i - reach - left * stride, stride, left),
        (low, 1, high - low + 1),
        (i + reach + stride, stride, right),
    ]


def _relative_without_window(
    i: Tensor, dense: Tensor, nb: int, stride: int
) -> list[tuple[Tensor, Any, Tensor]]:
    """local_blocks 0: (|i-j| + 1, and 1 more on the diagonal) must be a multiple of the stride."""
    # distance d > 0 is stored when (d + 1) % V == 0; the diagonal when 2 % V == 0
    first = stride - 1 if stride > 1 else 1
    left = torch.where(dense, 0, torch.where(i >= first, (i - first) // stride + 1, 0))
    room = nb - 1 - i
    right = torch.where(dense, 0, torch.where(room >= first, (room - first) // stride + 1, 0))
    middle = torch.full_like(i, 1 if 2 % stride == 0 else 0)
    return [
        (i - first - (left - 1) * stride, stride, left),
        (torch.where(dense, 0, i), 1, torch.where(dense, nb, middle)),
        (i + first, stride, right),
    ]
