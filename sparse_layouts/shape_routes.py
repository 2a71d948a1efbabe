"""Routes that look at a layout's shape, dtype and device alone, and writing through a layout's own
bool index: nothing there needs the dense form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.dispatch import route
from sparse_layouts.layout_routes import if_taken
from sparse_layouts.layout_tensor import LayoutTensor


def _plain_like(input: LayoutTensor) -> Tensor:
    """A plain empty tensor of a layout's dtype and device."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty(0, dtype=input.dtype, device=input.device)


@route(torch.Tensor.new_empty, input=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def new_empty(input: LayoutTensor, *size: Any, **options: Any) -> Tensor:
    """`w.new_empty(2, 3)`: a plain tensor of w's dtype on w's device, as the next three."""
    return _plain_like(input).new_empty(*size, **options)


@route(torch.Tensor.new_zeros, input=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def new_zeros(input: LayoutTensor, *size: Any, **options: Any) -> Tensor:
    """`w.new_zeros(2, 3)`, likewise."""
    return _plain_like(input).new_zeros(*size, **options)


@route(torch.Tensor.new_ones, input=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def new_ones(input: LayoutTensor, *size: Any, **options: Any) -> Tensor:
    """`w.new_ones(2, 3)`, likewise."""
    return _plain_like(input).new_ones(*size, **options)


@route(torch.Tensor.new_full, input=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def new_full(input: LayoutTensor, *size: Any, **options: Any) -> Tensor:
    """`w.new_full((2, 3), 1.5)`, likewise."""
    return _plain_like(input).new_full(*size, **options)


@route(torch.Tensor.new_tensor, input=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def new_tensor(input: LayoutTensor, data: Any, **options: Any) -> Tensor:
    """`w.new_tensor([1, 2])`, likewise."""
    return _plain_like(input).new_tensor(data, **options)


def _shape_of(other: LayoutTensor) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        return other.shape


@route(torch.Tensor.view_as, other=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def view_as(input: Tensor, other: LayoutTensor) -> Tensor:
    """`x.view_as(w)` of a dense x: a view of w's shape."""
    return input.view(_shape_of(other))


@route(torch.Tensor.reshape_as, other=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def reshape_as(input: Tensor, other: LayoutTensor) -> Tensor:
    """`x.reshape_as(w)` of a dense x."""
    return input.reshape(_shape_of(other))


@route(torch.Tensor.expand_as, other=LayoutTensor, uses=if_taken(lambda *a, **k: True))
def expand_as(input: Tensor, other: LayoutTensor) -> Tensor:
    """`x.expand_as(w)` of a dense x."""
    return input.expand(_shape_of(other))


def picks_entries(input: LayoutTensor, index: Any, value: Any) -> bool:
    """Whether `input[index] = value` fills some of the stored entries with a number."""
    with torch._C.DisableTorchFunctionSubclass():
        number = not isinstance(value, Tensor) or value.dim() == 0
        return number and index.dtype == torch.bool and index.same_pattern(input)


@route(
    torch.Tensor.__setitem__,
    input=LayoutTensor,
    index=LayoutTensor,
    uses=if_taken(picks_entries),
)
def fill_chosen(input: LayoutTensor, index: LayoutTensor, value: Any) -> Any:
    """`w[chosen] = 0.5` with a bool layout of w's own pattern: `w.masked_fill_(chosen, 0.5)`."""
    if not picks_entries(input, index, value):
        return NotImplemented
    fill: Callable[..., Any] = input.masked_fill_
    fill(index, value)
    return None
