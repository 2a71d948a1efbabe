"""Python's operators on a layout, as calls of torch functions.

torch's own operator slots swallow a `TypeError`: `w @ x.double()` would say no more than
"unsupported operand types", and `w += dense` would silently become `w = w + dense`, which is dense.
"""

from __future__ import annotations

from typing import Any

import torch


class Operators:
    """Mixed into :class:`~sparse_layouts.layout_tensor.LayoutTensor`."""

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __and__(self, other: Any) -> Any:
        return torch.bitwise_and(self, other)  # type: ignore[call-overload]

    def __or__(self, other: Any) -> Any:
        return torch.bitwise_or(self, other)  # type: ignore[call-overload]

    def __iadd__(self, other: Any) -> Any:
        return self.add_(other)  # type: ignore[attr-defined]

    def __isub__(self, other: Any) -> Any:
        return self.sub_(other)  # type: ignore[attr-defined]

    def __imul__(self, other: Any) -> Any:
        return self.mul_(other)  # type: ignore[attr-defined]

    def __itruediv__(self, other: Any) -> Any:
        return self.div_(other)  # type: ignore[attr-defined]

    def __ipow__(self, other: Any) -> Any:
        return self.pow_(other)  # type: ignore[attr-defined]

    def __ifloordiv__(self, other: Any) -> Any:
        return self.floor_divide_(other)  # type: ignore[attr-defined]

    def __imod__(self, other: Any) -> Any:
        return self.remainder_(other)  # type: ignore[attr-defined]
