"""What the tests of sparsifiers share: one of each, numbers with many equals, Python's order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sparse_layouts as sl

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.complex64,
    torch.complex128,
]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Few different values of either sign, so that many magnitudes are equal."""
    low = 0 if dtype == torch.uint8 else -8
    drawn = torch.randint(low, 9, shape)
    if dtype.is_complex:
        return torch.complex(drawn.double(), torch.randint(-3, 4, shape).double()).to(dtype)
    return (drawn / 8 if dtype.is_floating_point else drawn).to(dtype)


def size_of(dense: Tensor) -> Tensor:
    """Magnitudes as the tests see them: in float64."""
    return dense.to(torch.complex128).abs() if dense.is_complex() else dense.double().abs()


def ranked(magnitudes: Tensor) -> Tensor:
    """Places from the largest to the smallest, equals in order: sorted by Python."""
    flat = magnitudes.flatten().tolist()
    return torch.tensor(sorted(range(len(flat)), key=lambda i: -flat[i]), dtype=torch.long)


def largest(magnitudes: Tensor, count: int) -> Tensor:
    kept = torch.zeros(magnitudes.numel(), dtype=torch.bool)
    kept[ranked(magnitudes)[:count]] = True
    return kept.view(magnitudes.shape)


def seeded(density: float) -> sl.Random:
    return sl.Random(density, generator=torch.Generator().manual_seed(7))


BY_ROWS: dict[str, Callable[[], sl.Sparsifier]] = {
    "threshold": lambda: sl.Threshold(0.5),
    "random": lambda: seeded(0.3),
    "all": sl.KeepAll,
    "nm": lambda: sl.NM(2, 4),
    "same": lambda: sl.SamePattern(sl.bsr(numbers(12, 16), 4, keep=sl.Magnitude(0.4))),
    "same-bool": lambda: sl.SamePattern(numbers(3, 12, 16) > 0),
    "blocks-threshold": lambda: sl.Blockwise(sl.Threshold(1.2), (3, 4)),
    "blocks-random": lambda: sl.Blockwise(seeded(0.4), (2, 8)),
    "blocks-nm": lambda: sl.Blockwise(sl.NM(1, 2), (3, 4), norm=1),
    "blocks-same": lambda: sl.Blockwise(sl.SamePattern(numbers(6, 4) > 0), (2, 4)),
    "blocks-of-blocks": lambda: sl.Blockwise(sl.Blockwise(sl.Threshold(2.9), 2), (3, 2)),
}
WHOLE: dict[str, Callable[[], sl.Sparsifier]] = {
    "magnitude": lambda: sl.Magnitude(0.3),
    "blocks-magnitude": lambda: sl.Blockwise(sl.Magnitude(0.3), (3, 4)),
}
ALL = BY_ROWS | WHOLE
