"""Layouts under torch.export: their inner tensors are taken out by an operator that is recorded.

torch.export records operators on a module's parameters and buffers. Reading `w.inner_values` is
none: it would be kept as a constant, and the exported program would compute with the fake tensor of
that moment. So, while exporting, a layout that is traced as one tensor is first put together again
from `sparse_layouts::inner_tensor(w, 0)`, and so on. An exported program is to be run, not trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_layouts.dispatch import Layout
from sparse_layouts.stored_entries import handles

if TYPE_CHECKING:
    from sparse_layouts.layout_tensor import LayoutTensor


_library = torch.library.Library("sparse_layouts", "FRAGMENT")
_library.define("inner_tensor(Tensor layout, int field) -> Tensor")


def _without_gradient(layout: Tensor, field: int) -> Tensor:
    """Programs are exported to be run, not trained: kernels have their gradients above this."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sparse_layouts.inner_tensor.default(layout, field)


_library.impl("inner_tensor", _without_gradient, "Autograd")


@handles(torch.ops.sparse_layouts.inner_tensor.default)
def inner_tensor(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The tensor of one field, by its place in `fields`."""
    layout, field = args
    return layout.inner_tensors()[field].detach()


def is_recorded(layout: LayoutTensor) -> bool:
    """Whether a trace knows this layout as one tensor; in dynamo's, every one may be."""
    if torch.compiler.is_dynamo_compiling():
        return True
    from torch.fx.experimental import proxy_tensor  # not needed but here

    mode = proxy_tensor.get_proxy_mode()
    return mode is not None and layout in mode.tracer.tensor_tracker


def opened(value: Any) -> Any:
    """The same arguments, every layout that a trace knows as one tensor made of recorded ones."""
    if isinstance(value, Layout):
        layout: Any = value
        if not is_recorded(layout):
            return layout
        operator = torch.ops.sparse_layouts.inner_tensor.default
        with torch._C.DisableTorchFunctionSubclass():
            inner = [
                None if t is None else operator(layout, i)
                for i, t in enumerate(layout.inner_tensors())
            ]
            shape, dtype = layout.shape, layout.dtype
        return type(layout)(*inner, shape=shape, dtype=dtype, **layout.static())
    if isinstance(value, (tuple, list)):
        return type(value)(opened(v) for v in value)
    if isinstance(value, dict):
        return {name: opened(v) for name, v in value.items()}
    return value
