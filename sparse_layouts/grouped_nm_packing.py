"""Where the entries of a grouped n:m layout lie, and the way between its values and a matrix."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def choices(n: int, m: int, device: torch.device) -> Tensor:
    """int64 (C, n): every choice of n of m rows, in lexicographic order."""
    return torch.tensor(list(itertools.combinations(range(m), n)), device=device)


def absolute_columns(columns: Tensor, chunk: int) -> Tensor:
    """int64 (Mb, S): columns within their chunk, counted from the matrix's first."""
    slot = torch.arange(columns.shape[1], device=columns.device)
    return columns.long() + slot.div(chunk, rounding_mode="floor") * chunk


def slot_rows(slots: int, n: int, m: int, g: int, device: torch.device) -> Tensor:
    """int64 (S, n): the rows within its block that every slot keeps."""
    table = choices(n, m, device)
    slot = torch.arange(slots, device=device)
    return table[slot.div(g, rounding_mode="floor") % table.shape[0]]


def entry_rows(columns: Tensor, n: int, m: int, g: int) -> Tensor:
    """int64 (Mb, S, n): the row of every entry."""
    blocks, slots = columns.shape
    first = torch.arange(blocks, device=columns.device) * m
    return first[:, None, None] + slot_rows(slots, n, m, g, columns.device)


def positions(columns: Tensor, n: int, m: int, g: int) -> Tensor:
    """int64 (Mb, S * n): where every entry lies in its block's m rows of S columns."""
    blocks, slots = columns.shape
    chunk = math.comb(m, n) * g
    rows = slot_rows(slots, n, m, g, columns.device)
    return (rows * slots + absolute_columns(columns, chunk)[..., None]).view(blocks, slots * n)


def densify(
    values: Tensor, columns: Tensor, n: int, m: int, g: int, shape: tuple[int, int]
) -> Tensor:
    """(B, M, K): the matrices of values (B, Mb, S, n)."""
    (blocks, slots), batch = columns.shape, values.shape[0]
    at = positions(columns, n, m, g).expand(batch, -1, -1)
    out = values.new_zeros(batch, blocks, m * slots)
    out.scatter_(2, at, values.reshape(batch, blocks, slots * n))
    return out.view(batch, blocks * m, slots)[:, : shape[0], : shape[1]].contiguous()


def gather(dense: Tensor, columns: Tensor, n: int, m: int, g: int) -> Tensor:
    """Values (B, Mb, S, n): the stored entries of dense (B, M, K), 0 over the edge."""
    (blocks, slots), (batch, rows, cols) = columns.shape, dense.shape
    padded = torch.nn.functional.pad(dense, (0, slots - cols, 0, blocks * m - rows))
    at = positions(columns, n, m, g).expand(batch, -1, -1)
    return padded.reshape(batch, blocks, m * slots).gather(2, at).view(batch, blocks, slots, n)
