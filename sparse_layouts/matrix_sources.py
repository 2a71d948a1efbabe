"""What a factory is given, and what other libraries are given back: scipy's matrices, torch's
sparse tensors, numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.dense_rows import dense_source
from sparse_layouts.dispatch import Layout

WIDENED = (torch.bfloat16, torch.float16)  # scipy has neither


def is_scipy(source: Any) -> bool:
    """Whether this is a matrix or array of `scipy.sparse`; scipy is not imported for it."""
    if not type(source).__module__.startswith("scipy.sparse"):
        return False
    import scipy.sparse

    return scipy.sparse.issparse(source)


def plain_matrix(source: Any, what: str) -> Tensor:
    """A strided tensor of what a factory takes, for factories that read every entry: layouts and
    sparse matrices are made dense, differentiably where they are tensors.

    Raises `TypeError` for anything else.
    """
    if is_scipy(source):
        source = source.toarray()
    source = dense_source(source, what)
    if not isinstance(source, Tensor):
        raise TypeError(
            f"{what}: expected a tensor, a numpy array or a scipy matrix, got "
            f"{type(source).__name__}"
        )
    if isinstance(source, Layout) or source.layout != torch.strided:
        return source.to_dense()
    return source


def scipy_data(values: Tensor) -> np.ndarray:
    """Values as a numpy array that scipy takes, on their memory where that is possible: the CPU's;
    bfloat16 and float16 become float32.

    Raises `TypeError` for a dtype that numpy lacks.
    """
    exact = values.detach()
    exact = exact.float() if exact.dtype in WIDENED else exact
    try:
        return exact.cpu().numpy()
    except TypeError as error:
        raise TypeError(
            f"to_scipy: expected a dtype that scipy has, got {values.dtype}; convert the tensor "
            "first, e.g. with w.float()"
        ) from error


def each_matrix(stack: Tensor, make: Callable[[Tensor], Any]) -> Any:
    """`make` of every matrix of a tensor (*lead, M, N), as nested lists over `lead`."""
    if stack.dim() < 2:
        raise ValueError(f"expected a matrix, got shape {tuple(stack.shape)}")
    if stack.dim() == 2:
        return make(stack)
    return [each_matrix(part, make) for part in stack]


def nested_lists(items: list[Any], sizes: tuple[int, ...]) -> Any:
    """Items in row-major order as lists of these sizes; without sizes the one item itself."""
    if not sizes:
        return items[0]
    step = len(items) // max(sizes[0], 1)
    return [nested_lists(items[i * step : (i + 1) * step], sizes[1:]) for i in range(sizes[0])]
