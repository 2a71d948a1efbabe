"""The checks of n:m layouts: numbers n and m, and what `NMTensor.validate` looks at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sparse_layouts.nm_fragments import (
    AXES,
    FRAGMENTS,
    ORDERS,
    TILE_ROWS,
    has_fragments,
    unit_columns,
    words_per_unit,
)
from sparse_layouts.nm_packing import pack_positions, words_per_row

if TYPE_CHECKING:
    from sparse_layouts.nm_tensor import NMTensor

MAX_M = 16


def check_nm(n: object, m: object, what: str) -> None:
    """Raises unless n and m are ints with 1 <= n < m <= 16."""
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{what}: {name} is an int, got {value!r}")
    assert isinstance(n, int)
    assert isinstance(m, int)
    if not 1 <= n < m <= MAX_M:
        raise ValueError(f"{what}: expected 1 <= n < m <= {MAX_M}, got n={n}, m={m}")


def check_fragments(n: int, m: int, rows: int, columns: int) -> None:
    """Raises `ValueError` unless matrices (rows, columns) of n:m have the order of fragments."""
    if (n, m) not in AXES:
        known = ", ".join(f"{a}:{b}" for a, b in AXES)
        raise ValueError(f"fragments: expected one of {known}, got {n}:{m}")
    if not has_fragments(n, m, rows, columns):
        raise ValueError(
            f"fragments: expected rows of groups in a multiple of {TILE_ROWS} and of a length that "
            f"{unit_columns(n, m)} divides for {n}:{m}, got {rows} of length {columns}"
        )


def check_layout(layout: NMTensor) -> None:
    """Raises `ValueError` that names the first broken invariant of indices or values."""
    check_nm(layout.n, layout.m, "NMTensor")
    if layout.axis not in (-1, -2):
        raise ValueError(f"axis: expected -1 or -2, got {layout.axis}")
    indices, columns, values = layout.inner_indices, layout.columns, layout.inner_values
    if columns % layout.m:
        raise ValueError(f"shape: expected rows that m={layout.m} divides, got {columns}")
    rows, lead = layout.matrix_shape[-3 - layout.axis], layout.lead
    size = (math.prod(lead), rows, words_per_row(layout.entries, layout.m))
    if layout.order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {layout.order!r}")
    if layout.order == FRAGMENTS:
        check_fragments(layout.n, layout.m, rows, columns)
        units = columns // unit_columns(layout.n, layout.m)
        size = (size[0], rows // TILE_ROWS, units * words_per_unit(layout.m))
    if indices.dtype != torch.int32 or tuple(indices.shape) != size:
        raise ValueError(
            f"indices: expected int32 of shape {size}, got {indices.dtype} of shape "
            f"{tuple(indices.shape)}"
        )
    positions = layout.positions()
    if bool((positions >= layout.m).any()):
        raise ValueError(
            f"indices: expected positions 0..{layout.m - 1}, got {int(positions.max())}"
        )
    groups = positions.unflatten(-1, (columns // layout.m, layout.n))
    if bool((groups[..., 1:] <= groups[..., :-1]).any()):
        raise ValueError("indices: expected ascending positions within every group")
    packed = pack_positions(positions, layout.m)
    if not torch.equal(packed.view(layout.row_indices().shape), layout.row_indices()):
        raise ValueError("indices: expected unused bits of a word to be 0")
    if values is None:
        return
    if tuple(values.shape[values.dim() - layout.lead_dims - 2 :]) != (*lead, rows, layout.entries):
        raise ValueError(
            f"values: expected (*batch, {', '.join(map(str, (*lead, rows, layout.entries)))}), "
            f"got {tuple(values.shape)}"
        )
    if values.device != indices.device:
        raise ValueError(f"values are on {values.device}, the indices on {indices.device}")
