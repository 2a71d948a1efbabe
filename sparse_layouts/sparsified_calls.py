"""`sl.sparsified`: a function whose outputs, and their gradients, come in chosen layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from sparse_layouts.dispatch.faces import name_of
from sparse_layouts.gradient_form import call_with_form, rule_of, with_form
from sparse_layouts.tensor_form import TensorForm, tensor_form

Forms = tuple["TensorForm | None", ...]


class Plan(NamedTuple):
    """The forms of a function's outputs and of their gradients; None where nothing is asked for.

    `one` says that the function returns a single tensor.
    """

    name: str
    out: Forms | None
    grad: Forms | None
    one: bool

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls the function and gives its outputs their forms."""
        if self.one:
            return self._call_for_one(function, args, kwargs)
        made = function(*args, **kwargs)
        count = len(self.out or self.grad or ())
        if not isinstance(made, (tuple, list)) or len(made) != count:
            raise ValueError(
                f"sparsified: expected {count} outputs from {self.name}, one for each pair, got "
                f"{_kind(made)}"
            )
        outs, grads = self.out or (None,) * count, self.grad or (None,) * count
        formed = [
            _formed(each, out, grad, f"output {i} of {self.name}")
            for i, (each, out, grad) in enumerate(zip(made, outs, grads, strict=True))
        ]
        # torch's own return types are made of one sequence, as lists are; named tuples are not
        return type(made)(*formed) if hasattr(made, "_fields") else type(made)(formed)

    def _call_for_one(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = None if self.out is None else self.out[0]
        grad = None if self.grad is None else self.grad[0]
        if grad is not None and grad.layout is not None and torch.is_grad_enabled():
            rule = rule_of(function, args, kwargs)
            if rule is not None and any(t.requires_grad for t in args):
                made = call_with_form(function, args, kwargs, grad, rule)
                return _formed(made, out, None, f"the output of {self.name}")
        made = function(*args, **kwargs)
        if isinstance(made, (tuple, list)):
            raise ValueError(
                f"sparsified: expected one tensor from {self.name}, got {_kind(made)}; give a pair "
                "or None for each: out=((sparsifier, layout), None)"
            )
        return _formed(made, out, grad, f"the output of {self.name}")


def _formed(output: Any, out: TensorForm | None, grad: TensorForm | None, what: str) -> Any:
    if out is None and grad is None:
        return output
    if not isinstance(output, Tensor):
        raise TypeError(
            f"sparsified: expected a tensor as {what}, got {type(output).__name__}; leave it as it "
            "is with None in place of its pair"
        )
    if grad is not None:
        output = with_form(output, grad, f"gradient of {what}")
    return output if out is None else out(output)


class SparsifiedModule(nn.Module):
    """What :func:`sparsified` makes of a module, which it keeps as `module`."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.module = module
        self.plan = plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, its outputs and their gradients in their forms."""
        return self.plan.call(self.module, args, kwargs)

    def extra_repr(self) -> str:
        """The forms."""
        asked = {"out": self.plan.out, "grad": self.plan.grad}
        return ", ".join(f"{name}={forms}" for name, forms in asked.items() if forms is not None)


@overload
def sparsified(fn: nn.Module, out: Any = None, grad: Any = None) -> nn.Module: ...
@overload
def sparsified(fn: Callable[..., Any], out: Any = None, grad: Any = None) -> Callable[..., Any]: ...
def sparsified(fn: Callable[..., Any], out: Any = None, grad: Any = None) -> Callable[..., Any]:
    """`fn` with its outputs, and the gradients of its outputs, in chosen layouts.

    `fn`: a torch function, any other callable on tensors, or a module (the result is then a module
    that holds it). `out` and `grad` are each a pair (sparsifier, layout) for a function that
    returns one tensor; a tuple of such pairs, one for each output, for one that returns several;
    None, there or in place of a pair, leaves as it is.

    A pair: the sparsifier (None: all) chooses entries of the dense result; `layout` stores them:

    layout | the result
    ---|---
    None | a dense tensor, zero where nothing was chosen
    a function with a parameter `keep` | `layout(dense, keep=sparsifier)`
    another function | `layout(x)`, x zero where nothing was chosen
    a layout class | the class's `from_dense`, as a function: your own layout
    a layout or mask | the chosen entries that it stores, in its layout: the pattern stays

    Functions are factories, their other arguments given: `sl.csr` and
    `functools.partial(sl.bsr, block_size=32)` take `keep`, `functools.partial(sl.nm, n=2, m=4)`
    does not.

    `out`: the output is made dense, if it is another layout, and then takes its form. It is
    differentiable as `Tensor.to_sparse()` is: what is stored passes its gradient, the rest gets 0.

    `grad`: in the backward pass the gradient of the output takes its form when it arrives (with
    `out` too: what that stores of it), before it goes on to the operands of `fn`.
    In its layout it goes on where `fn` is `torch.matmul`, `mm`, `bmm` (`@`) or `F.linear` of dense
    matrices: it is multiplied, by the layout's routes. Where `fn` is `torch.add`, `sub`, `neg` or
    `positive` without broadcasting it is passed on: to a dense leaf as it is, so that `x.grad` is a
    layout; `sl.sparsified(torch.positive, grad=...)(x)` does that to any leaf. Anything else gets
    it dense, which is a dense fallback under the policy in force in the forward pass; with None as
    the layout it was dense all along. The gradient of a layout comes in that layout, always.

    Gradients of one leaf add up: of different patterns in the graph they become dense; a second
    backward pass whose choice differs raises `TypeError`, so clear the gradient before or take the
    pattern of a layout.

    Raises `TypeError` for what is no pair, sparsifier or layout, and, in the call, for a layout's
    function that returns something else; `ValueError` for neither `out` nor `grad`, for another
    number of outputs than pairs, and for a layout of another shape or dtype. What sparsifiers and
    factories raise (for NaN, for a size that a block does not divide) comes in the call for `out`,
    in the backward pass for `grad`.

    Source: the sparse operators of STen, https://arxiv.org/abs/2304.07613, section 3, whose
    "external" sparsifiers and formats these are.

    >>> import functools, torch, sparse_layouts as sl
    >>> blocks = functools.partial(sl.bsr, block_size=16)
    >>> add = sl.sparsified(torch.add, out=(sl.Magnitude(0.25), blocks), grad=(None, blocks))
    >>> x = torch.randn(64, 64, requires_grad=True)
    >>> z = add(x, torch.randn(64, 64))
    >>> z
    BSRTensor([64, 64], float32, cpu, block 16, 4 blocks, density 25.00%, requires_grad)
    >>> z.sum().backward()
    >>> type(x.grad).__name__, x.grad.density
    ('BSRTensor', 0.25)
    """
    if not callable(fn):
        raise TypeError(f"sparsified: expected a function or a module, got {type(fn).__name__}")
    if out is None and grad is None:
        raise ValueError(
            "sparsified: expected out=(sparsifier, layout) or grad=(sparsifier, layout), got "
            "neither"
        )
    outs, one_out = _forms(out, "out")
    grads, one_grad = _forms(grad, "grad")
    if outs is not None and grads is not None and (one_out, len(outs)) != (one_grad, len(grads)):
        raise ValueError(
            f"sparsified: expected as many pairs in out as in grad, got {len(outs)} and "
            f"{len(grads)}; write None for an output that stays as it is"
        )
    name = type(fn).__name__ if isinstance(fn, nn.Module) else name_of(fn)
    plan = Plan(name, outs, grads, one_out if outs is not None else one_grad)
    if isinstance(fn, nn.Module):
        return SparsifiedModule(fn, plan)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return plan.call(fn, args, kwargs)

    call.__sparsified__ = fn  # type: ignore[attr-defined]  # what sl.explain looks at
    return call


def _forms(pairs: Any, what: str) -> tuple[Forms | None, bool]:
    """The forms of an argument, and whether it is a single pair."""
    several = isinstance(pairs, (tuple, list)) and len(pairs) > 0
    if pairs is None or (several and all(each is None for each in pairs)):
        return None, True
    if not several or not any(isinstance(each, (tuple, list)) for each in pairs):
        return (tensor_form(pairs, what),), True
    made = [
        None if each is None else tensor_form(each, f"{what}[{i}]") for i, each in enumerate(pairs)
    ]
    return tuple(made), False


def _kind(made: Any) -> str:
    if isinstance(made, (tuple, list)):
        return f"{len(made)} ({', '.join(type(each).__name__ for each in made)})"
    return f"one {type(made).__name__}"
