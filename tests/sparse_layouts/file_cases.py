"""Helpers of the tests on files: a layout with every kind of static field, and exact comparison."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import sparse_layouts as sl


class Facts(sl.LayoutTensor):
    """A diagonal with every kind of static field that a file can hold."""

    fields = ("entries", "spare")
    static_fields: ClassVar[tuple[str, ...]] = ("facts", "count", "scale", "label")
    facts: Any
    count: int
    scale: float
    label: str | None

    def to_dense_entries(self) -> Tensor:
        return torch.diag(self.inner_entries)


def facts(values: Tensor, **static: object) -> Facts:
    given = {"facts": None, "count": 1, "scale": 1.0, "label": None, **static}
    return Facts(values, None, shape=(values.shape[0],) * 2, **given)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same class, sizes, metadata and inner tensors, bit for bit; never a gradient."""
    assert not actual.requires_grad
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if not isinstance(expected, sl.LayoutTensor):
        assert type(actual) is Tensor
        torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0, equal_nan=True)
        return
    assert type(actual) is type(expected)
    assert actual.static() == expected.static()
    for a, b in zip(actual.inner_tensors(), expected.inner_tensors(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same(a, b)
