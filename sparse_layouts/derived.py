"""What is derived from a pattern's index tensors, kept for as long as these live: schedules,
transposed lists, counts.

What depends on values is not kept: it would go stale after an optimizer's step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

_derived: WeakIdKeyDictionary = WeakIdKeyDictionary()


def derived(pattern: tuple[Any, ...], key: Any, build: Callable[[], T]) -> T:
    """Returns `build()`, made once for this pattern's index tensors and dropped with them.

    `pattern` is a tuple of index tensors (a BlockPattern, or `(crow_indices, col_indices)`), the
    first one a tensor; what is no tensor in it does not count. `key` names what is derived and with
    which parameters; it must be hashable. `build` must depend on the index tensors alone, never on
    values. What is built while a CUDA graph is captured is not kept: its memory is the graph's, and
    is written when that is replayed.
    """
    first, *others = pattern
    store = _derived.get(first)
    if store is None:
        store = _derived[first] = {}
    # Two patterns may share their first tensor and differ elsewhere (counts dropped, a transpose):
    # the identities of the rest are part of the key. They are alive as long as the entry can be
    # found, because `pattern` holds them, and an entry whose tensors died is replaced.
    rest = tuple(id(t) if isinstance(t, Tensor) else None for t in others)
    found = store.get((key, rest))
    if found is not None and all(r is None or r() is not None for r in found[1]):
        return found[0]
    value = build()
    if _is_captured(first):
        return value
    kept = tuple(weakref.ref(t) if isinstance(t, Tensor) else None for t in others)
    store[key, rest] = (value, kept)
    return value


def _is_captured(first: Any) -> bool:
    """Whether work on this tensor's device goes into a CUDA graph."""
    if torch.compiler.is_compiling() or not first.is_cuda:
        return False
    return torch.cuda.is_current_stream_capturing()


def derived_bytes(pattern: tuple[Any, ...]) -> int:
    """Bytes of all that :func:`derived` keeps for this pattern."""

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.untyped_storage().nbytes()
        if isinstance(value, np.ndarray):
            return value.nbytes
        if isinstance(value, dict):
            return sum(count(v) for v in value.values())
        if isinstance(value, (tuple, list)):
            return sum(count(v) for v in value)
        return 0

    store = _derived.get(pattern[0])
    own = {id(t) for t in pattern if isinstance(t, Tensor)}
    if store is None:
        return 0
    return sum(count(v) for v, _ in store.values() if id(v) not in own)
