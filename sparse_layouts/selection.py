"""The largest of many numbers, exact in count, the first of equals: at once, or over chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_KEY_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGIT_BITS = 16
_CHUNK = 1 << 17  # numbers at a time, in cache with their keys
SMALL = 1 << 14  # so many are sorted, which costs less than histograms


class Cut(NamedTuple):
    """A selection: every key above `key`, and the first `equal` of those that equal it."""

    key: int
    equal: int


def order_keys(magnitudes: Tensor) -> Tensor:
    """Non-negative integers in the order of `magnitudes`, which are floats >= 0 and contain no NaN.

    The bits of such a float, read as an integer, are in the order of the floats (IEEE 754).
    """
    return magnitudes.contiguous().view(_KEY_DTYPES[magnitudes.dtype.itemsize])


def find_cut(parts: Callable[[], Iterable[Tensor]], count: int, dtype: torch.dtype) -> Cut:
    """The cut that leaves the `count` largest of all keys (of the integer `dtype`, >= 0).

    `parts()` goes through all keys and is called :func:`passes` times; memory is one part's and
    that of a histogram of 512 KB. A radix selection: each pass counts the next digit of those keys
    that share the digits found so far.
    """
    if count == 0:
        return Cut(torch.iinfo(dtype).max, 0)
    prefix, left = 0, count
    shift = torch.iinfo(dtype).bits - 1
    while shift:
        above = shift
        shift = (above - 1) // _DIGIT_BITS * _DIGIT_BITS
        digits = 1 << (above - shift)
        histogram = torch.zeros(digits, dtype=torch.int64)
        for keys in parts():
            keys = keys.flatten()
            if above < torch.iinfo(dtype).bits - 1:
                keys = keys[(keys >> above) == prefix]
            found = torch.bincount((keys >> shift) & (digits - 1), minlength=digits)
            histogram += found.cpu()
        from_above = histogram.flip(0).cumsum(0)
        at = int(torch.searchsorted(from_above, left))
        left -= int(from_above[at - 1]) if at else 0
        prefix = prefix << (above - shift) | (digits - 1 - at)
    return Cut(prefix, left)


def passes(dtype: torch.dtype) -> int:
    """How often :func:`find_cut` goes through keys of this dtype."""
    return -(-(torch.iinfo(dtype).bits - 1) // _DIGIT_BITS)


def take(keys: Tensor, cut: Cut) -> tuple[Tensor, Cut]:
    """bool: which keys of the next part are above the cut; and the cut for the part after it."""
    kept = keys > cut.key
    if not cut.equal:
        return kept, cut
    flat, equal = kept.view(-1), (keys == cut.key).flatten().nonzero()[: cut.equal, 0]
    flat[equal] = True
    return kept, Cut(cut.key, cut.equal - equal.numel())


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """bool, the shape of `magnitudes` (floats >= 0, or integer keys): the `count` largest, the
    first of equals. Without a host sync on a GPU.
    """
    flat = magnitudes.flatten()
    if flat.device.type != "cpu" or flat.numel() <= SMALL:
        kept = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
        order = torch.argsort(flat, descending=True, stable=True)
        # indexing with `= True` would copy the value to a GPU, and wait
        return kept.index_fill_(0, order[:count], True).view(magnitudes.shape)
    keys = order_keys(flat) if flat.dtype.is_floating_point else flat
    cut = find_cut(lambda: keys.split(_CHUNK), count, keys.dtype)
    kept = torch.empty(flat.numel(), dtype=torch.bool)
    for into, part in zip(kept.split(_CHUNK), keys.split(_CHUNK), strict=True):
        chosen, cut = take(part, cut)
        into.copy_(chosen)
    return kept.view(magnitudes.shape)
