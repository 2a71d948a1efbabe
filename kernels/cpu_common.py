"""What the CPU kernels share: scratch memory, dtypes, padding, masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, entry_rows
from sparse_layouts.derived import derived
from sparse_layouts.kernels.cpu_schedule import Schedule, SequenceTiles, Step

LOG2_E = math.log2(math.e)


class Scratch:
    """Buffers that a call reuses from step to step.

    Fresh memory would cost more in page faults than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous tensor that holds what was last written under this name, if it fits."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None:
            buffer = self._buffers[name, dtype] = torch.empty(shape, dtype=dtype)
            return buffer
        if buffer.shape == shape:
            return buffer
        if buffer.numel() < size:
            # Room to grow: the steps' sizes differ a little, and each new buffer is new memory.
            buffer = torch.empty(max(size, buffer.numel() * 5 // 4), dtype=dtype)
            self._buffers[name, dtype] = buffer
        return buffer.view(-1)[:size].view(shape)

    def gather(self, name: str, source: Tensor, index: Tensor, *shape: int) -> Tensor:
        """Rows `index` of a matrix, as `shape`."""
        out = self.take(name, source.dtype, index.shape[0], source.shape[1])
        return torch.index_select(source, 0, index, out=out).view(shape)

    def cast(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """`source` in `dtype`, itself where it is that already."""
        if source.dtype == dtype:
            return source
        return self.take(name, dtype, *source.shape).copy_(source)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype scores and sums are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype operands enter a product: the CPU has products in bf16, none in fp16."""
    return dtype if dtype == torch.bfloat16 else score_dtype(dtype)


def pad_rows(x: Tensor, before: int, total: int, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """x (H, N, D) as contiguous (H, total, D) in `dtype` after `before` rows of `fill`; maybe x."""
    heads, rows, width = x.shape
    padded = rows != total
    if not padded and (x.dtype != dtype or x.stride(2) == 1):
        return x.to(dtype).contiguous()
    out = torch.empty(heads, total, width, dtype=dtype)
    if padded:
        out.fill_(fill)
    for own, source in zip(out, x, strict=True):  # torch transposes fast in two dimensions only
        own[before : before + rows] = source
    return out


def dense_blocks(values: Tensor) -> Tensor:
    """values (S, bm, bn) with each block in one piece of memory, by rows or by columns."""
    return values if values.mT.is_contiguous() else values.contiguous()


def gather_blocks(
    scratch: Scratch, name: str, values: Tensor, step: Step, dtype: torch.dtype
) -> Tensor:
    """The blocks of a step of block rows, side by side: (T, bm, L * bn).

    `values` (S, bm, bn) come from :func:`dense_blocks`; the result is contiguous if they are.
    """
    assert step.slots is not None
    _, bm, bn = values.shape
    tiles, by_rows = step.tiles.shape[0], values.is_contiguous()
    source = values if by_rows else values.mT
    blocks = scratch.take(name + " blocks", values.dtype, step.slots.shape[0], *source.shape[1:])
    torch.index_select(source, 0, step.slots, out=blocks)
    if not by_rows:
        return scratch.cast(name, blocks.view(tiles, -1, bm), dtype).mT
    out = scratch.take(name, dtype, tiles, bm, step.length, bn)
    return out.copy_(blocks.view(tiles, -1, bm, bn).transpose(1, 2)).flatten(2)


def add_masks(scores: Tensor, plan: Schedule, step: Step, scratch: Scratch) -> None:
    """Adds to scores (T, R, C) what is -inf where nothing is stored, and log2 of the counts."""
    tiles, rows, columns = scores.shape
    if plan.sequences is not None and step.kinds is not None:
        terms = scratch.gather("terms", *_mask_rows(plan, step, plan.sequences), tiles, rows, -1)
        scores[:, :, columns - terms.shape[2] :].add_(terms)
    by_block_row = scores.view(tiles, plan.group, rows // plan.group, columns)
    for first, last, start, end, mask in step.runs:
        by_block_row[first:last, :, :, start:end].add_(plan.masks[mask])


def _mask_rows(plan: Schedule, step: Step, own: SequenceTiles) -> tuple[Tensor, Tensor]:
    """The terms, and which of them (T * R * L',) the rows of a step's last L' blocks take."""
    assert step.kinds is not None
    bm = own.block_rows
    first = own.rows[step.tiles % plan.num_tiles] % (plan.group * bm)
    row = first[:, None] + torch.arange(plan.rows)  # (T, R) in the tile's block rows
    block_row = row.div(bm, rounding_mode="floor")
    kinds = step.kinds.gather(1, block_row[..., None].expand(-1, -1, step.kinds.shape[2]))
    return own.terms, (kinds * bm + (row % bm)[..., None]).flatten()


def clear_masked(scores: Tensor, plan: Schedule, step: Step) -> None:
    """Sets to 0 what scores (T, R, C) hold where nothing is stored."""
    tiles, rows, columns = scores.shape
    by_block_row = scores.view(tiles, plan.group, rows // plan.group, columns)
    for first, last, start, end, mask in step.runs:
        unstored = plan.masks[mask].isneginf()
        by_block_row[first:last, :, :, start:end].masked_fill_(unstored, 0.0)


def store_blocks(values: Tensor, rows: Tensor, step: Step) -> None:
    """Writes rows (T, bm, L * bn), blocks side by side, into values (S, bm, bn)."""
    assert step.slots is not None
    _, bm, bn = values.shape
    blocks = rows.view(-1, bm, step.length, bn).transpose(1, 2).to(values.dtype)
    values.index_copy_(0, step.slots, blocks.reshape(-1, bm, bn))


def clear_edge(values: Tensor, pattern: BlockPattern) -> None:
    """Sets to 0 what values (B, S, bm, bn) hold below the matrix's last row."""
    p, bm = pattern, pattern.block_size[0]
    inside = p.shape[0] - (p.grid[0] - 1) * bm
    if inside == bm:
        return

    def build() -> Tensor:
        rows = entry_rows(p.crow_indices, p.num_blocks)
        entries = (rows % p.grid[0] == p.grid[0] - 1).nonzero()[:, 0]
        return entries if p.row_slots is None else p.row_slots[entries].long()

    values[:, derived(p, "cpu_last_row", build), inside:] = 0
