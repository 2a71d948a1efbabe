"""Handlers of routes from outside this library: shown in the trace, and differentiable.

A handler that leaves torch (scipy, a library's C code, a kernel of one's own) returns a tensor that
autograd knows nothing of. Returned as it is, training would go on without that gradient and say
nothing. Forward and backward choose separately: the handler's forward is kept, and backward is the
dense fallback, under the fallback policy, with the gradient to a layout in that layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sparse_layouts.dispatch import settings
from sparse_layouts.dispatch.faces import Function, Reading, name_of
from sparse_layouts.dispatch.fallback import densified, fall_back, permit
from sparse_layouts.dispatch.kernel_table import facts_of
from sparse_layouts.dispatch.layout import Layout, dense_bytes
from sparse_layouts.dispatch.routes import Route
from sparse_layouts.dispatch.tracing import Step, described, record


def run_outside(row: Route, reading: Reading) -> Any:
    """What the handler returns, with a gradient; a step of the trace in force, before those of the
    handler's own calls.
    """
    found = settings.current().trace
    steps_before = 0 if found is None else len(found.steps)
    result = row.handler(*reading.args, **reading.kwargs)
    if result is NotImplemented:
        return result
    if found is not None:
        given = tree_flatten((reading.args, reading.kwargs))[0]
        layout: Any = next(value for value in given if isinstance(value, Layout))
        name = getattr(row.handler, "__qualname__", repr(row.handler))
        step = Step(name_of(row.function), name, *described(facts_of(layout)), 0)
        found.steps.insert(steps_before, step)
    if lacks_gradient(result, reading.args, reading.kwargs):
        return differentiable(reading.function, reading.args, reading.kwargs, result)
    return result


class Call(NamedTuple):
    """A call of a torch function, its tensors taken out: `rest` has None in their places."""

    function: Function
    rest: list[Any]
    places: list[int]
    spec: TreeSpec

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs with these tensors in the places."""
        flat = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            flat[place] = tensor
        return tree_unflatten(flat, self.spec)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def lacks_gradient(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a handler's result should be differentiable by autograd and is not."""
    if not torch.is_grad_enabled():
        return False
    with torch._C.DisableTorchFunctionSubclass():
        made = [t for t in tree_flatten(result)[0] if _differentiable(t)]
        if not made or any(t.requires_grad for t in made):
            return False
        given = tree_flatten((args, kwargs))[0]
        return any(isinstance(t, Tensor) and t.requires_grad for t in given)


class DenseGradient(torch.autograd.Function):
    """What a handler computed; the gradient is that of torch's function on densified operands."""

    @staticmethod
    def forward(call: Call, num_made: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in tensors[:num_made])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.num_made, *tensors = inputs
        ctx.settings = settings.current()
        ctx.save_for_backward(*tensors[ctx.num_made :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        operands = list(ctx.saved_tensors)
        needed = ctx.needs_input_grad[2 + ctx.num_made :]
        again = torch.is_grad_enabled()  # a gradient of the gradient is wanted
        with settings.restored(ctx.settings), torch.enable_grad():
            if not again:
                operands = [
                    t.detach().requires_grad_(n) for t, n in zip(operands, needed, strict=True)
                ]
            _permit(ctx.call, operands)
            args, kwargs = ctx.call.arguments(operands)
            made = ctx.call.function(*densified(args), **densified(kwargs))
            made = [t for t in tree_flatten(made)[0] if _differentiable(t)]
            pairs = [
                (out, densified(grad))
                for out, grad in zip(made, grads, strict=True)
                if grad is not None and out.requires_grad
            ]
            wanted = [t for t, n in zip(operands, needed, strict=True) if n]
            found: Any = [None] * len(wanted)
            if pairs and wanted:
                outs, seeds = [out for out, _ in pairs], [seed for _, seed in pairs]
                found = torch.autograd.grad(
                    outs, wanted, seeds, create_graph=again, allow_unused=True
                )
        each = iter(found)
        none = [None] * (2 + ctx.num_made)
        return (*none, *(next(each) if n else None for n in needed))


def _permit(call: Call, operands: list[Tensor]) -> None:
    """Lets a backward pass be dense, as the policy says, and records it."""
    layouts: list[Any] = [t for t in operands if isinstance(t, Layout)]
    # the layouts, and as much again for their gradients
    count = 2 * sum(dense_bytes(layout) for layout in layouts)
    what = f"gradient of {name_of(call.function)}"
    given = ", ".join(dict.fromkeys(type(t).__name__ for t in layouts))
    message = (
        f"{what}: the route for {given} computes none; computing it densely.\n"
        "To add one: let the handler return the result of a torch.autograd.Function, whose "
        "backward may return the layout's gradient as w.sample(dense) or w.like_self(values)."
    )
    device = layouts[0].device.type if layouts else operands[0].device.type
    permit(message, count, device, what)
    record(what, "dense fallback", facts_of(layouts[0] if layouts else operands[0]), count)


def differentiable(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """A handler's result that :func:`lacks_gradient`, with the dense fallback's gradient.

    Compiled code takes the dense fallback for the forward too, which is differentiable as it is.
    """
    if torch.compiler.is_compiling():
        return fall_back(function, args, kwargs)
    flat, spec = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    operands = [flat[i] for i in places]
    rest = [None if i in set(places) else value for i, value in enumerate(flat)]
    made, form = tree_flatten(result)
    which = [i for i, value in enumerate(made) if _differentiable(value)]
    call = Call(function, rest, places, spec)
    wrapped = DenseGradient.apply(call, len(which), *(made[i] for i in which), *operands)
    for i, tensor in zip(which, wrapped, strict=True):
        made[i] = tensor
    return tree_unflatten(made, form)
