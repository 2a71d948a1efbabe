"""Sparsifiers: they decide which entries, or blocks, of a dense tensor to keep.

`Sparsifier` (the protocol, in sparsifier_protocol.py) says how a factory asks them; a factory
passes its `keep=` through `as_sparsifier`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.dense_rows import flat_shape, magnitude_dtype, row_chunks
from sparse_layouts.selection import SMALL, find_cut, largest, order_keys, passes, take
from sparse_layouts.sparsifier_protocol import Chooser, Scope, Sparsifier, as_sparsifier

__all__ = [
    "KeepAll",
    "Magnitude",
    "Random",
    "Sparsifier",
    "Threshold",
    "as_sparsifier",
]


class Magnitude(Sparsifier):
    """Keeps the largest part, `density` of all: of entries by absolute value, of blocks by
    Frobenius norm.

    Exactly `round(density * number)` are kept, over all leading dimensions together; among equals
    the first ones. Infinity is the largest; NaN raises. Materialising: it sees all, but on the CPU
    in chunks, several times, so that `keep` needs no copy of the magnitudes.

    Raises `ValueError` for a density outside [0, 1], `TypeError` for what is no number.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.randn(64, 64), block_size=16, keep=sl.Magnitude(density=0.25))
    >>> w.density
    0.25
    """

    def __init__(self, density: float) -> None:
        self.density = check_density(density, "Magnitude")

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes` (non-negative, without NaN): which to keep. No host sync
        on a GPU, where NaN counts as the largest.
        """
        return largest(magnitudes, round(self.density * magnitudes.numel()))

    def keep_together(
        self, tensors: Sequence[Tensor], done: Callable[[int], None] = lambda entries: None
    ) -> Iterator[Tensor]:
        """`keep` of each of several tensors, ranked together; equals: the first tensor's first.

        On the CPU, and of several tensors, by a histogram over chunks: extra memory is a chunk's.
        """
        if len(tensors) == 1 and tensors[0].device.type != "cpu":
            yield from self._materialised(tensors, done)
            return
        count = round(self.density * sum(dense.numel() for dense in tensors))
        dtype = _common_dtype(tensors)
        key_dtype = order_keys(torch.zeros(1, dtype=dtype)).dtype

        def keys_of(dense: Tensor) -> Iterator[tuple[int, Tensor]]:
            for first, rows in row_chunks(dense):
                found = self.magnitudes(rows).to(dtype)
                done(rows.numel())
                yield first, order_keys(found)

        cut = find_cut(
            lambda: (keys for dense in tensors for _, keys in keys_of(dense)), count, key_dtype
        )
        for dense in tensors:
            kept = torch.empty(dense.shape, dtype=torch.bool, device=dense.device)
            flat = kept.view(flat_shape(tuple(dense.shape)))
            for first, keys in keys_of(dense):
                flat[first : first + keys.shape[0]], cut = take(keys, cut)
            yield kept

    def passes(self, tensors: Sequence[Tensor]) -> int:
        """How often :meth:`keep_together` looks at each entry."""
        if len(tensors) == 1 and tensors[0].device.type != "cpu":
            return 1
        return passes(order_keys(torch.zeros(1, dtype=_common_dtype(tensors))).dtype) + 1

    def __repr__(self) -> str:
        return f"Magnitude(density={self.density})"


class Threshold(Sparsifier):
    """Keeps what is larger than `value`: entries with `abs(x) > value`, blocks by Frobenius norm.

    `Threshold(0)` keeps the non-zeros. The comparison is torch's own, `x.abs() > value`: in the
    tensor's dtype. NaN, which compares with nothing, raises. Streaming.

    Raises `ValueError` for a negative or NaN value, `TypeError` for what is no number.

    >>> import torch, sparse_layouts as sl
    >>> sl.Threshold(2.0).keep(torch.tensor([1.0, -2.0, -3.0]))
    tensor([False, False,  True])
    """

    scope: Scope = "streaming"

    def __init__(self, value: float) -> None:
        self.value = check_number(value, "Threshold", "value")
        if not self.value >= 0:
            raise ValueError(
                f"Threshold: expected a value of at least 0, got {value}; sl.KeepAll() keeps all"
            )

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes`: which are larger than the value. No host sync."""
        return magnitudes > self.value

    def __repr__(self) -> str:
        return f"Threshold({self.value})"


class Random(Sparsifier):
    """Keeps entries (or blocks) at random, exactly `round(density * number)` of them, whatever
    their values. Streaming.

    An entry's place and a seed give it a number, and the largest numbers are kept: the same seed
    gives the same choice whatever the chunks, the strides and the device. The seed is drawn from
    `generator` (None: torch's default one) at every use, so that one `Random` keeps other entries
    of each tensor, and the same again after `manual_seed`. The data is read once; the numbers are
    computed three times rather than stored.

    Raises `ValueError` for a density outside [0, 1], `TypeError` for what is no number or no
    `torch.Generator`. Source of the numbers: SplitMix64 (Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014).

    >>> import torch, sparse_layouts as sl
    >>> seeded = torch.Generator().manual_seed(0)
    >>> sl.Random(0.25, generator=seeded).keep(torch.ones(100, 100)).sum()
    tensor(2500)
    """

    scope: Scope = "streaming"
    reads_values = False

    def __init__(self, density: float, generator: torch.Generator | None = None) -> None:
        self.density = check_density(density, "Random")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                "Random: generator is a torch.Generator or None, got "
                f"{type(generator).__name__}; torch.Generator().manual_seed(0) makes one"
            )
        self.generator = generator

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes`, of which only shape and device are used. No host sync
        on a GPU.
        """
        number, device = magnitudes.numel(), magnitudes.device
        if device.type != "cpu":
            keys = random_keys(0, number, self._seed(device), device)
            return largest(keys, round(self.density * number)).view(magnitudes.shape)
        return self._drawer(number, device)(0, number).view(magnitudes.shape)

    def start(self, shape: tuple[int, ...], device: torch.device) -> Chooser:
        """Begins one pass: draws a seed and finds which numbers are kept."""
        draw = self._drawer(math.prod(shape), device)

        def choose_rows(found: Tensor, first_row: int) -> Tensor:
            return draw(first_row * found.shape[-1], found.numel()).view(found.shape)

        return choose_rows

    def keep_together(
        self, tensors: Sequence[Tensor], done: Callable[[int], None] = lambda entries: None
    ) -> Iterator[Tensor]:
        """`keep` of each of several tensors; the count is exact over all together."""
        device = tensors[0].device if tensors else torch.device("cpu")
        draw, first = self._drawer(sum(dense.numel() for dense in tensors), device), 0
        for dense in tensors:
            kept = draw(first, dense.numel()).view(dense.shape)
            first += dense.numel()
            done(dense.numel())
            yield kept.to(dense.device)

    def _seed(self, device: torch.device) -> Tensor:
        from_device = "cpu" if self.generator is None else self.generator.device
        seed = torch.randint(-(2**63), 2**63 - 1, (), generator=self.generator, device=from_device)
        return seed if seed.device.type == "cpu" else seed.to(device)

    def _drawer(self, total: int, device: torch.device) -> Callable[[int, int], Tensor]:
        """What gives bool (n,) for the next n of `total` entries, from a first one on, in order."""
        seed, step = self._seed(device), _KEYS if device.type == "cpu" else _KEYS_GPU
        count = round(self.density * total)
        if total <= SMALL:
            all_kept = largest(random_keys(0, total, seed, device), count)
            return lambda first, number: all_kept[first : first + number]

        def keys_from(first: int, number: int) -> Iterator[Tensor]:
            for at in range(first, first + number, step):
                yield random_keys(at, min(step, first + number - at), seed, device)

        cut = find_cut(lambda: keys_from(0, total), count, torch.int32)

        def draw(first: int, number: int) -> Tensor:
            nonlocal cut
            kept = torch.empty(number, dtype=torch.bool, device=device)
            for into, keys in zip(kept.split(step), keys_from(first, number), strict=False):
                chosen, cut = take(keys, cut)
                into.copy_(chosen)
            return kept

        return draw

    def __repr__(self) -> str:
        return f"Random(density={self.density})"


# Numbers at a time: in cache with what SplitMix64 makes of them; few launches on a GPU.
_KEYS, _KEYS_GPU = 1 << 15, 1 << 24


def random_keys(
    first: int, number: int, seed: Tensor, device: torch.device | None = None
) -> Tensor:
    """int32 (number,), 31 random bits each: those of the places from `first` on, by SplitMix64.

    `seed`: int64, no dimension. A place's bits depend on nothing but the place and the seed.
    """
    device = seed.device if device is None else device
    z = torch.arange(first, first + number, dtype=torch.int64, device=device)
    z.mul_(0x9E3779B97F4A7C15 - 2**64).add_(seed)
    z.bitwise_xor_((z >> 30).bitwise_and_(2**34 - 1)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    z.bitwise_xor_((z >> 27).bitwise_and_(2**37 - 1)).mul_(0x94D049BB133111EB - 2**64)
    return (z >> 33).bitwise_and_(2**31 - 1).int()


class KeepAll(Sparsifier):
    """Keeps every entry, every block; zeros and NaN too. Streaming.

    >>> import torch, sparse_layouts as sl
    >>> sl.bsr(torch.zeros(64, 64), block_size=16, keep=sl.KeepAll()).density
    1.0
    """

    scope: Scope = "streaming"
    reads_values = False

    def choose(self, magnitudes: Tensor) -> Tensor:
        """bool, the shape of `magnitudes`: all True. No host sync."""
        return torch.ones(magnitudes.shape, dtype=torch.bool, device=magnitudes.device)

    def __repr__(self) -> str:
        return "KeepAll()"


def check_number(value: Any, who: str, name: str) -> float:
    """A real number as float, or `TypeError`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = "; take x.item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{who}: {name} is a number, got {type(value).__name__}{hint}")
    return float(value)


def check_density(density: Any, who: str) -> float:
    """A density in [0, 1] as float; raises for others and for NaN."""
    number = check_number(density, who, "density")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{who}: density is between 0 and 1, got {density}")
    return number


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which magnitudes of all of these compare exactly."""
    found = torch.float16 if not tensors else magnitude_dtype(tensors[0].dtype)
    for dense in tensors[1:]:
        found = torch.promote_types(found, magnitude_dtype(dense.dtype))
    return found
