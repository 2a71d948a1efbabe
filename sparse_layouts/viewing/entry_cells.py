"""The cells of a plot, of any size and with a weight: counted from single entries."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from sparse_layouts.block_pattern import expand_heads
from sparse_layouts.block_values import (
    block_entries,
    entries_per_pattern,
    slots_in_row_order,
    special_blocks,
)
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.entry_lists import Entries, lead_of, picked
from sparse_layouts.layout_tensor import LayoutTensor

# Listing a block's entries takes some 100 bytes for each.
MOST_ENTRIES = 2**22


class Grid(NamedTuple):
    """The cells of one head: stored entries and all entries of each, and the sum of the stored
    entries' weights (their number where nothing else is asked for).
    """

    stored: np.ndarray
    entries: np.ndarray
    weight: np.ndarray

    @property
    def mean_weight(self) -> np.ndarray:
        """float64: the mean weight of a cell's stored entries, NaN where nothing is stored."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.stored > 0, self.weight / self.stored, np.nan)


def listed_entries(layout: LayoutTensor) -> int:
    """How many entries listing those of one sample takes, each different head once."""
    if isinstance(layout, BSRTensor):
        return int(entries_per_pattern(layout.block_pattern).sum())
    batch = layout.shape[: layout.dim() - layout.pattern_dims]
    return layout.nnz // max(1, math.prod(batch))


def pattern_of_heads(layout: LayoutTensor) -> list[int]:
    """Which pattern each leading index has; heads that are the same share one."""
    if isinstance(layout, BSRTensor) and layout.block_pattern.head_map is not None:
        return layout.block_pattern.head_map.tolist()
    return list(range(math.prod(lead_of(layout))))


def magnitudes(layout: LayoutTensor, entries: Entries) -> np.ndarray:
    """float64 (S,): the magnitude of every listed entry, its mean over a batch."""
    with torch.no_grad():
        values = picked(layout, entries).abs().double()
        batch = values.shape[:-1]
        values = values.reshape(math.prod(batch), values.shape[-1]).mean(0)
    return values.cpu().numpy()


def counts(layout: BSRTensor, entries: Entries) -> np.ndarray | None:
    """float64 (S,): how often every listed entry counts in a softmax; None where all count once."""
    found = layout.block_pattern.block_counts
    if found is None:
        return None
    bm, bn = layout.block_size
    assert entries.slots is not None
    return found[entries.slots // (bm * bn)].double().cpu().numpy()


def grids(
    entries: Entries, patterns: list[int], cell: tuple[int, int], weight: np.ndarray | None
) -> list[Grid]:
    """The cells of these patterns, each of `cell` entries."""
    (m, n), (a, b) = entries.shape, cell
    rows_of_cells, columns_of_cells = -(-m // a), -(-n // b)
    rows, columns = entries.rows.cpu().numpy(), entries.columns.cpu().numpy()
    areas = np.outer(_lengths(m, a), _lengths(n, b))
    found = []
    for which in patterns:
        low, high = np.searchsorted(rows, [which * m, (which + 1) * m])
        place = (rows[low:high] - which * m) // a * columns_of_cells + columns[low:high] // b
        size = rows_of_cells * columns_of_cells
        shape = (rows_of_cells, columns_of_cells)
        stored = np.bincount(place, minlength=size).reshape(shape)
        own = None if weight is None else weight[low:high]
        total = stored if own is None else np.bincount(place, own, size).reshape(shape)
        found.append(Grid(stored, areas, total))
    return found


def block_grids(
    layout: BSRTensor, patterns: list[int], group: tuple[int, int], show: str
) -> list[Grid]:
    """The same from whole blocks, several to a cell, for what is too much to be listed: `show` is
    "pattern", "count" (a block's weight is how often it counts) or "magnitude" (the sum of its
    values' magnitudes, their mean over a batch). Time and memory are those of the blocks.
    """
    p = expand_heads(layout.block_pattern) if show == "magnitude" else layout.block_pattern
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    entries = np.full(p.num_blocks, bm * bn)
    special = special_blocks(p)
    entries[special] = block_entries(p, special)[2]
    slots = slots_in_row_order(p)
    weight = entries
    if show == "count":
        assert p.block_counts is not None
        weight = entries * p.block_counts[slots].cpu().numpy()
    elif show == "magnitude":
        values = layout.stored_values
        assert values is not None
        with torch.no_grad():
            sums = values.detach().abs().sum((-2, -1), dtype=torch.float64)
            sums = sums.reshape(-1, p.num_blocks).mean(0)[slots]
        weight = sums.cpu().numpy()
    crow, columns = p.crow_indices.cpu().numpy(), p.col_indices.cpu().numpy()
    shape = (-(-mb // group[0]), -(-nb // group[1]))
    areas = np.outer(_lengths(m, group[0] * bm), _lengths(n, group[1] * bn))
    found = []
    for which in patterns:
        here = slice(int(crow[which, 0]), int(crow[which, -1]))
        rows = np.repeat(np.arange(mb) // group[0], np.diff(crow[which]))
        place = rows * shape[1] + columns[here] // group[1]
        size = shape[0] * shape[1]
        stored = np.bincount(place, entries[here], size).reshape(shape)
        found.append(Grid(stored, areas, np.bincount(place, weight[here], size).reshape(shape)))
    return found


def _lengths(total: int, step: int) -> np.ndarray:
    return np.minimum(total - np.arange(0, total, step), step)
