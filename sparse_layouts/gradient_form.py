"""A call whose result's gradient takes a form of its own in the backward pass.

The gradient, in its layout, goes on to the operands by one of `RULES` where the function has one:
products multiply it by the layout's own routes, sums pass it on. Any other function gets it dense,
which is a dense fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.dispatch import current, dense_bytes, facts_of, permit, record, restored
from sparse_layouts.dispatch.faces import Function, canonical, name_of
from sparse_layouts.layout_autograd import apply, as_layout, for_pattern, unwrapped
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.optimizer_entries import called_by_optimizer
from sparse_layouts.stored_entries import handles, pointwise, short
from sparse_layouts.tensor_form import TensorForm

Grads = Sequence["Tensor | None"]
Rule = Callable[[Tensor, Sequence[Tensor], Sequence[bool], float], Grads]


class FormedCall(NamedTuple):
    """A call by one of `RULES`: its operands are passed beside it, `leaves` says which are leaves
    of the graph, whose gradient may stay a layout.
    """

    function: Function
    options: dict[str, Any]
    form: TensorForm
    rule: Rule
    leaves: tuple[bool, ...]


def _matmul(grad: Tensor, operands: Sequence[Tensor], needed: Sequence[bool], _: float) -> Grads:
    a, b = operands
    return grad @ b.mT if needed[0] else None, a.mT @ grad if needed[1] else None


def _linear(grad: Tensor, operands: Sequence[Tensor], needed: Sequence[bool], _: float) -> Grads:
    x, weight = operands[:2]
    dx = grad @ weight if needed[0] else None
    dw = grad.mT @ x if needed[1] else None
    return (dx, dw, *(grad.sum(0) if n else None for n in needed[2:]))


def _add(grad: Tensor, operands: Sequence[Tensor], needed: Sequence[bool], alpha: float) -> Grads:
    scaled = grad if alpha == 1 or not needed[1] else grad * alpha
    return grad, scaled


def _sub(grad: Tensor, operands: Sequence[Tensor], needed: Sequence[bool], alpha: float) -> Grads:
    return grad, grad * -alpha if needed[1] else None


def _neg(grad: Tensor, operands: Sequence[Tensor], needed: Sequence[bool], _: float) -> Grads:
    return (-grad,)


def _same(grad: Tensor, operands: Sequence[Tensor], needed: Sequence[bool], _: float) -> Grads:
    return (grad,)


RULES: dict[Function, Rule] = {
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    F.linear: _linear,
    torch.add: _add,
    torch.sub: _sub,
    torch.neg: _neg,
    torch.negative: _neg,
    torch.Tensor.neg: _neg,
    torch.positive: _same,
    torch.Tensor.positive: _same,
}


def rule_of(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule | None:
    """The rule that takes such a call: operands by position, shapes that do not broadcast."""
    rule = RULES.get(canonical(function)) if _hashable(function) else None
    if rule is None or not all(isinstance(t, Tensor) for t in args):
        return None
    shapes = [tuple(t.shape) for t in args]
    if rule in (_add, _sub):
        plain = len(args) == 2 and shapes[0] == shapes[1] and set(kwargs) <= {"alpha"}
        return rule if plain and isinstance(kwargs.get("alpha", 1), (int, float)) else None
    if kwargs:
        return None
    if rule in (_neg, _same):
        return rule if len(args) == 1 else None
    # the gradient of a product to a layout is its own op: only its stored entries are computed
    plain = not any(isinstance(t, LayoutTensor) for t in args) and len({t.dtype for t in args}) == 1
    if not plain or torch.is_autocast_enabled(args[0].device.type):
        return None
    if rule is _linear:
        biased = len(args) < 3 or len(shapes[2]) == 1
        return rule if len(shapes[0]) == len(shapes[1]) == 2 and biased else None
    same = len(args) == 2 and len(shapes[0]) >= 2 and shapes[0][:-2] == shapes[1][:-2]
    return rule if same else None


def _hashable(function: Any) -> bool:
    return type(function).__hash__ is not None


def call_with_form(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], form: TensorForm, rule: Rule
) -> Tensor:
    """`function(*args, **kwargs)`, the gradient of its result in the form and on by the rule."""
    leaves = tuple(t.is_leaf for t in args)
    return apply(CallWithForm, FormedCall(function, kwargs, form, rule, leaves), *args)


def with_form(output: Tensor, form: TensorForm, what: str) -> Tensor:
    """`output`, its gradient in the form, and dense on to whatever made it."""
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output
    return apply(OutputWithForm, output, form, what)


class CallWithForm(torch.autograd.Function):
    """A call by a rule; its backward puts the gradient in the form first."""

    @staticmethod
    def forward(call: FormedCall, *operands: Tensor) -> Tensor:
        out = call.function(*operands, **call.options)
        return shared(out) if any(out is t for t in operands) else out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, *operands = inputs
        ctx.settings = current()
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call, operands = ctx.call, [unwrapped(t) for t in ctx.saved_tensors]
        needed = ctx.needs_input_grad[1:]
        with restored(ctx.settings):
            formed = call.form(grad)
            alpha = call.options.get("alpha", 1)
            found = call.rule(formed, operands, needed, alpha)
            what = f"gradient of {name_of(call.function)}"
            return (
                None,
                *(
                    on_to(g, t, leaf, what) if n else None
                    for g, t, leaf, n in zip(found, operands, call.leaves, needed, strict=True)
                ),
            )


def shared(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, for an autograd function to return."""
    return tensor.detach() if isinstance(tensor, LayoutTensor) else tensor.view_as(tensor)


class OutputWithForm(torch.autograd.Function):
    """An output as it is; its backward puts the gradient in the form."""

    @staticmethod
    def forward(output: Tensor, form: TensorForm, what: str) -> Tensor:
        return shared(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.form, ctx.what = inputs
        ctx.settings = current()
        ctx.is_layout = isinstance(output, LayoutTensor)
        ctx.save_for_backward(*([for_pattern(output)] if ctx.is_layout else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with restored(ctx.settings):
            formed = ctx.form(grad)
            if ctx.is_layout:
                return as_layout(formed, unwrapped(ctx.saved_tensors[0])), None, None
            return made_dense(formed, ctx.what), None, None


def on_to(grad: Tensor | None, operand: Tensor, leaf: bool, what: str) -> Tensor | None:
    """A gradient as an operand takes it: a layout in its own layout; a dense leaf as it comes;
    what made any other dense tensor, dense.
    """
    if grad is None:
        return None
    if isinstance(operand, LayoutTensor):
        return as_layout(grad, operand)
    return grad if leaf else made_dense(grad, what)


def made_dense(grad: Tensor, what: str) -> Tensor:
    """A gradient in a layout, dense, as the fallback policy allows."""
    if not isinstance(grad, LayoutTensor):
        return grad
    count = dense_bytes(grad)
    permit(
        f"{what} goes on dense: what comes before takes no {type(grad).__name__}. To choose its "
        "entries alone, give None as the layout: grad=(sparsifier, None).",
        count,
        grad.device.type,
        what,
    )
    record(what, "dense fallback", facts_of(grad), count)
    return grad.to_dense()


@handles(torch.ops.aten.add.Tensor)
def add_gradients(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`w + x` below autograd, which adds up the gradients that one tensor gets: of one pattern they
    keep the layout, else (of a dense leaf) the sum is dense.
    """
    if any(not isinstance(t, Tensor) or t.dim() == 0 for t in args):
        return pointwise(func, args, kwargs)
    layouts: list[Any] = [t for t in args if isinstance(t, LayoutTensor)]
    both = len(layouts) == 2
    # of an optimizer's code an operand is its stored entries
    if (both and layouts[0].same_pattern(layouts[1])) or called_by_optimizer():
        return pointwise(func, args, kwargs)
    if both and not torch.compiler.is_compiling():
        what, count = "sum of gradients", sum(map(dense_bytes, layouts))
        names = " and ".join(map(short, layouts))
        permit(
            f"{what}: {names} store different entries; their sum is dense.",
            count,
            layouts[0].device.type,
            what,
        )
        record(what, "dense fallback", facts_of(layouts[0]), count)
    dense = [t.to_dense_entries() if isinstance(t, LayoutTensor) else t for t in args]
    return func(*dense, **kwargs)


@handles(torch.ops.aten.new_empty_strided.default)
def room_for_gradient(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Where autograd copies a gradient that it must not keep itself: an empty layout of its pattern
    to copy into.
    """
    layout, size, *_ = args
    values, device = layout.stored_values, kwargs.get("device")
    elsewhere = device is not None and torch.device(device) != layout.device
    if tuple(size) != tuple(layout.shape) or values is None or elsewhere:
        raise NotImplementedError(
            f"{func}: expected the shape and device of {short(layout)}, which has values, got "
            f"{tuple(size)} on {device}; another layout is made by its factory"
        )
    return layout.like_self(torch.zeros_like(values, dtype=kwargs.get("dtype")))
