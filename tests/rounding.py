"""Equality up to rounding: the tolerance follows from the dtype and the size of the result."""

from __future__ import annotations

import torch
from torch import Tensor

import sparse_layouts as sl


def assert_close(actual: Tensor, expected: Tensor, *, scale: float | None = None) -> None:
    """Equal up to a few roundings: 8 eps times the norm of what was expected, or `scale`."""
    assert type(actual) is Tensor or isinstance(actual, sl.LayoutTensor)
    actual = actual.to_dense() if isinstance(actual, sl.LayoutTensor) else actual
    expected = expected.to_dense() if isinstance(expected, sl.LayoutTensor) else expected
    assert actual.dtype == expected.dtype
    tolerance = 0.0
    if expected.is_floating_point():
        norm = expected.detach().nan_to_num(0, 0, 0).norm().item() if scale is None else scale
        tolerance = 8 * torch.finfo(expected.dtype).eps * norm
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=True)
