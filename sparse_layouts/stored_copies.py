"""What torch does to a whole layout below autograd: views and copies of it, other dtypes and
devices, layouts of its pattern with other values.

Importing this registers the handlers; `stored_entries` has those of pointwise work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from sparse_layouts.dispatch import Layout, dense_bytes, facts_of, permit, record
from sparse_layouts.index_identity import being_traced
from sparse_layouts.stored_entries import aten, count_write, handles, short


@handles(aten.detach.default, aten.alias.default, aten.view_as.default)
def share(func: Any, args: Any, kwargs: Any) -> Any:
    """Another layout on the same tensors."""
    layout = args[0]
    values = layout.stored_values
    out = layout.like_self(None if values is None else aten.alias(values))
    return return_and_correct_aliasing(func, args, kwargs, out)


@handles(aten.clone.default, aten.lift_fresh.default, aten.contiguous.default)
def clone(func: Any, args: Any, kwargs: Any) -> Any:
    """A layout with values of its own on the same pattern."""
    values = args[0].stored_values
    return args[0].like_self(None if values is None else values.clone())


@handles(aten._to_copy.default)
def to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    """`.to(...)`: the dtype is the values', the device everything's."""
    layout = args[0]
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    values = layout.stored_values
    if dtype == torch.bool and values is not None:
        raise TypeError(
            "a layout's values cannot become bool; w.pattern is the mask of its stored entries"
        )
    if values is None and dtype not in (None, torch.bool):
        values = layout.ones(dtype)
    elif values is not None:
        values = values.to(dtype=dtype, copy=True)
    if device is None or torch.device(device) == layout.device:
        return layout.like_self(values)
    move = {"device": device, "non_blocking": kwargs.get("non_blocking", False)}
    values = None if values is None else values.to(**move)
    return layout.map_inner(lambda t: t.to(**move), values)


@handles(aten._pin_memory.default)
def pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    """Pinned host memory for everything."""
    values = args[0].stored_values
    return args[0].map_inner(
        lambda t: t.pin_memory(), None if values is None else values.pin_memory()
    )


@handles(aten.is_pinned.default)
def is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether every inner tensor is pinned."""
    return all(t.is_pinned() for t in args[0].inner_tensors() if t is not None)


@handles(aten.zeros_like.default, aten.empty_like.default)
def zeros_like(func: Any, args: Any, kwargs: Any) -> Any:
    """A layout of the same pattern, its values all zero (empty_like too: room that is not stored
    must be zero).
    """
    layout = args[0]
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    values = layout.stored_values
    if values is None:
        raise TypeError("zeros_like: a mask layout has no values; an empty mask is mask & ~mask")
    out = layout.like_self(torch.zeros_like(values, dtype=dtype))
    return out if device is None else out.to(device)


@handles(
    aten.full_like.default,
    aten.ones_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
)
def filled_like(func: Any, args: Any, kwargs: Any) -> Any:
    """A layout of the same pattern with other values: where an optimizer asks for it, or autograd;
    for other code `full_like` is dense.
    """
    layout, *rest = args
    device = kwargs.get("device")
    if layout.stored_values is None:
        raise TypeError(f"{func}: a mask layout has no values")
    options = {"dtype": kwargs.get("dtype")}
    out = layout.like_self(func(layout.stored_values, *rest, **options))
    out.clear_unstored()
    return out if device is None else out.to(device)


@handles(aten.is_same_size.default)
def is_same_size(func: Any, args: Any, kwargs: Any) -> bool:
    """By shape."""
    return args[0].shape == args[1].shape


@handles(aten.copy_.default)
def copy_(func: Any, args: Any, kwargs: Any) -> Any:
    """`w.copy_(x)`: takes x's stored entries; raises if anything non-zero would be dropped."""
    target, source = args[0], args[1]
    if not isinstance(target, Layout):
        return func(target, source.to_dense_entries())
    into: Any = target
    if isinstance(source, Layout):
        other: Any = source
        if not into.same_pattern(other):
            raise ValueError(
                f"copy_: {short(other)} stores other entries than {short(into)}. To take its "
                "pattern too, replace the tensor "
                "(load_state_dict(..., assign=True)); to keep this pattern, sample: "
                "x.to_dense().sparse_mask(w)."
            )
        if into.stored_values is None:
            return target
        if other.stored_values is None:
            raise TypeError(
                f"copy_: the mask {short(other)} has no values to copy; take "
                f"mask.to({into.dtype}) first"
            )
        into.stored_values.copy_(other.in_order_of(into).stored_values)
        count_write(into)
        return target
    if into.stored_values is None:
        if source.dtype == torch.bool and torch.equal(
            source.expand(into.shape).to(into.device), into.to_dense_entries()
        ):
            return target  # DistributedDataParallel brings buffers back as they were sent
        raise TypeError("copy_: a mask layout has no values to copy into")
    if source.dim() == 0:
        into.stored_values.copy_(source)
        into.clear_unstored()
        count_write(into)
        return target
    if being_traced():
        raise NotImplementedError(
            f"copy_: expected a layout, got {short(source)}; whether it is 0 wherever "
            f"{type(into).__name__} stores nothing cannot be seen while code is compiled. Sample "
            "it: w.copy_(x.sparse_mask(w)); an optimizer: fused=True, as in "
            "torch.optim.AdamW(parameters, fused=True)."
        )
    taken = into.sample(source.expand(into.shape))
    kept, whole = taken.to_dense_entries(), source.expand(into.shape).to(taken.device)
    # NaN equals nothing, so that it is asked for only where something differs
    if not torch.equal(kept, whole) and not bool(((kept == whole) | kept.isnan()).all()):
        raise ValueError(
            f"copy_: the dense tensor has non-zero entries that {short(into)} does not store. Drop "
            f"them knowingly: "
            "w.copy_(x.sparse_mask(w))."
        )
    into.stored_values.copy_(taken.stored_values)
    count_write(into)
    return target


@handles(aten.view.default)
def flatten(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`view(-1)` below autograd: all entries in a row, as a copy.

    So DistributedDataParallel sends parameters, and gradients, which it brings back by `copy_`.
    """
    layout, size = args
    if list(size) not in ([-1], [layout.shape.numel()]):
        raise NotImplementedError(
            f"{func}: below autograd a {type(layout).__name__} is only flattened, not made "
            f"{tuple(size)}; pass w.to_dense()."
        )
    kind = type(layout).__name__
    what = f"A {kind} is sent between processes, or flattened, as a dense tensor."
    permit(what, dense_bytes(layout), layout.device.type, "view")
    dense = layout.to_dense_entries().reshape(-1)
    record("view", "dense fallback", facts_of(dense), dense_bytes(layout))
    return dense
