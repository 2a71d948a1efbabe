"""The differentiable steps between a layout, its values and its dense form."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from sparse_layouts.layout_tensor import LayoutTensor

L = TypeVar("L", bound=LayoutTensor)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without the 20 us in which torch binds default arguments.

    Functions with a `setup_context` have their signature inspected at every call; ours take all
    their arguments by position. Under torch.func and torch.compile the usual way is taken.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def differentiates(*tensors: Any) -> bool:
    """Whether a call on these must go through an `autograd.Function`.

    In forward mode always: without it the tangent would silently be zero, with it torch says that
    the function has none.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return torch.autograd.forward_ad._current_level >= 0


def unwrapped(layout: Any) -> Any:
    """A saved layout as itself: torch.func hands it back inside a plain tensor of its own."""
    if layout is None or isinstance(layout, LayoutTensor):
        return layout
    while torch._C._functorch.is_functorch_wrapped_tensor(layout):
        layout = torch._C._functorch.get_unwrapped(layout)
    return layout


def as_layout(grad: Tensor, like: L) -> L:
    """A gradient to a layout, in that layout: what is dense or of another pattern is sampled."""
    if isinstance(grad, LayoutTensor):
        if grad.same_pattern(like):
            return cast(L, aligned(grad, like))
        grad = grad.to_dense_entries()
    return like.sample(grad)


class Reordered(torch.autograd.Function):
    """A layout with its values in another order, by `move`; the gradient in the order it had."""

    @staticmethod
    def forward(layout: LayoutTensor, move: Callable[[Any], Any]) -> LayoutTensor:
        return move(layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(for_pattern(inputs[0]), for_pattern(output))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        before, after = map(unwrapped, ctx.saved_tensors)
        moved = aligned(as_layout(grad, after), before)
        if torch.is_grad_enabled():
            return moved, None
        # on the tensors of the layout itself, which an optimizer then need not compare
        return before.like_self(moved.stored_values), None


def reordered(layout: L, move: Callable[[L], L]) -> L:
    """`move(layout)`, which changes the order of its values alone, differentiable."""
    return apply(Reordered, layout, move) if differentiates(layout) else move(layout)


def aligned(layout: L, like: LayoutTensor) -> L:
    """The layout with its values in the order of `like`'s, differentiable."""
    one_order = type(layout).in_order_of is LayoutTensor.in_order_of
    if one_order or layout.static() == like.static():
        return layout
    return reordered(layout, lambda moved: moved.in_order_of(like))


class Version(NamedTuple):
    """How often a saved layout's values had been written to, through whatever shares them."""

    values: weakref.ref[Tensor]
    writes: int


def version_of(layout: Any) -> Version | None:
    """To be kept beside a layout whose values backward reads; None while code is traced."""
    values = unwrapped(layout).stored_values
    if type(values) is not Tensor or values.is_inference() or torch.compiler.is_compiling():
        return None
    return Version(weakref.ref(values), values._version)


def check_version(layout: LayoutTensor, saved: Version | None) -> None:
    """Raises where a saved layout's values were written to since, which autograd sees for the
    layout itself, not for its transpose, its slices and `w.values()`.
    """
    values = layout.stored_values
    # a saved tensor hook (offloading) brings back a copy from before the write
    if saved is None or values is None or values is not saved.values():
        return
    if values._version == saved.writes:
        return
    raise RuntimeError(
        f"backward: expected the values that {layout.one_line()} had in the forward pass, got a "
        "layout that was written to since, through its transpose, a slice or w.values(); write "
        "before the forward pass, after backward, or to a copy: w.clone()"
    )


class ToDense(torch.autograd.Function):
    """layout -> its dense form; the gradient is sampled onto the layout."""

    @staticmethod
    def forward(layout: LayoutTensor) -> Tensor:
        return layout.to_dense_entries()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        layout = unwrapped(ctx.saved_tensors[0])
        return apply(FromDense, grad, layout)


class FromDense(torch.autograd.Function):
    """dense -> its entries that `like` stores, in that layout; their gradient is made dense."""

    @staticmethod
    def forward(dense: Tensor, like: LayoutTensor) -> LayoutTensor:
        return like.sample(dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(for_pattern(inputs[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return stored_part(grad, unwrapped(ctx.saved_tensors[0])), None


class Values(torch.autograd.Function):
    """layout -> its values, as they lie in memory."""

    @staticmethod
    def forward(layout: LayoutTensor) -> Tensor:
        values = layout.stored_values
        assert values is not None
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        layout = unwrapped(ctx.saved_tensors[0])
        return apply(FromValues, grad, layout)


class FromValues(torch.autograd.Function):
    """values -> the layout that has them on `like`'s pattern."""

    @staticmethod
    def forward(values: Tensor, like: LayoutTensor) -> LayoutTensor:
        out = like.like_self(values.detach().clone())
        out.clear_unstored()
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        like = unwrapped(ctx.saved_tensors[0])
        return apply(Values, as_layout(grad, like)), None


def values_of(layout: LayoutTensor) -> Tensor:
    """The stored values, differentiable."""
    if differentiates(layout):
        return apply(Values, layout)
    values = layout.stored_values
    assert values is not None
    return values


def with_values(layout: LayoutTensor, values: Tensor) -> LayoutTensor:
    """The layout with other values, differentiable in them."""
    if differentiates(values):
        return apply(FromValues, values, layout)
    out = layout.like_self(values)
    out.clear_unstored()
    return out


def sampled(dense: Tensor, like: LayoutTensor) -> LayoutTensor:
    """The entries of `dense` that `like` stores, in its layout, differentiable in `dense`."""
    if differentiates(dense):
        return apply(FromDense, dense, like)
    return like.sample(dense)


def for_pattern(layout: L) -> L:
    """The layout as another tensor, saved for its pattern: it may be written to before backward."""
    return layout if layout.stored_values is None else layout.like_self(layout.stored_values)


def stored_part(grad: Tensor, like: LayoutTensor) -> Tensor:
    """A gradient to what a layout has taken from a dense tensor, as that tensor's: dense, and 0
    where nothing is stored. Of a mask, a layout comes on the mask's own entries.
    """
    if isinstance(grad, LayoutTensor):
        if like.stored_values is None or grad.same_pattern(like):
            return grad.to_dense()
        grad = grad.to_dense()
    return sampled(grad, like).to_dense()
