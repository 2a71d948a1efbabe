"""TensorForm: the form that a tensor is to take, a sparsifier and a layout."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sparse_layouts.layout_autograd import apply, for_pattern, stored_part, unwrapped
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.sparsifier_protocol import Sparsifier, as_sparsifier
from sparse_layouts.stored_entries import short


class TensorForm(NamedTuple):
    """What a dense tensor becomes: `sparsifier` chooses entries, `layout` stores them.

    layout | the result
    ---|---
    None | a dense tensor, zero where nothing was chosen
    a function with a parameter `keep` | `layout(dense, keep=sparsifier)`
    another function | `layout(x)`, x the dense tensor, zero where nothing was chosen
    a layout class | that class's `from_dense`, as a function
    a layout | the chosen entries that this one stores, in its layout

    A sparsifier of None chooses all entries; a function is then called without `keep`.
    """

    sparsifier: Sparsifier | None
    layout: Callable[..., Any] | LayoutTensor | None

    def __call__(self, given: Tensor) -> Tensor:
        """`given` in this form, differentiable: stored entries pass their gradient, others get 0.

        A layout that is in this form already is returned as it is; another one is made dense first.
        """
        if isinstance(given, LayoutTensor):
            if self.sparsifier is None and self._is_form_of(given):
                return given
            given = given.to_dense()
        if isinstance(self.layout, LayoutTensor):
            if given.shape != self.layout.shape:
                raise ValueError(
                    f"sparsified: expected a tensor of the shape of {short(self.layout)}, whose "
                    f"pattern it is to take, got shape {tuple(given.shape)}"
                )
            return self._chosen(given).sparse_mask(self.layout)
        if self.layout is None:
            return self._chosen(given)
        if self.sparsifier is not None and not takes_keep(self.layout):
            return TensorForm(None, self.layout)(self._chosen(given))
        if torch.is_grad_enabled() and given.requires_grad:
            return apply(IntoForm, given, self)
        return self.made(given)

    def made(self, given: Tensor) -> LayoutTensor:
        """What the layout's function makes of a dense tensor, checked; not differentiable."""
        assert callable(self.layout)
        dense = given.detach()
        with torch.no_grad():
            if self.sparsifier is None:
                found = self.layout(dense)
            else:
                found = self.layout(dense, keep=self.sparsifier)
        name = name_of_layout(self.layout)
        if not isinstance(found, LayoutTensor):
            raise TypeError(
                f"sparsified: expected {name} to return a layout, got {short(found)}; for a dense "
                "tensor give None as the layout"
            )
        if found.shape != dense.shape or found.dtype != dense.dtype:
            raise ValueError(
                f"sparsified: expected {name} to return a layout of shape {tuple(dense.shape)} and "
                f"{dense.dtype}, as it was given, got {short(found)}"
            )
        return found

    def _chosen(self, dense: Tensor) -> Tensor:
        """`dense`, zero where the sparsifier chooses nothing."""
        if self.sparsifier is None:
            return dense
        # not a product with the mask: 0 * inf is not 0
        return torch.where(self.sparsifier.keep(dense.detach()), dense, 0)

    def _is_form_of(self, given: LayoutTensor) -> bool:
        if isinstance(self.layout, LayoutTensor):
            return given.same_pattern(self.layout)
        owner = getattr(self.layout, "__self__", None)  # the class that a from_dense belongs to
        return type(given) is owner


class IntoForm(torch.autograd.Function):
    """dense -> the layout that a form makes of it; what it stores passes its gradient."""

    @staticmethod
    def forward(dense: Tensor, form: TensorForm) -> Tensor:
        return form.made(dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(for_pattern(output))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return stored_part(grad, unwrapped(ctx.saved_tensors[0])), None


def takes_keep(factory: Callable[..., Any]) -> bool:
    """Whether a layout's function has a parameter `keep` that has not been given a value."""
    if isinstance(factory, functools.partial) and "keep" in factory.keywords:
        return False
    try:
        return "keep" in inspect.signature(factory).parameters
    except ValueError:  # a function without a signature, written in C
        return False


def name_of_layout(layout: Any) -> str:
    """A layout's function as a message names it."""
    if isinstance(layout, functools.partial):
        return f"{name_of_layout(layout.func)}(...)"
    return getattr(layout, "__qualname__", None) or short(layout)


def tensor_form(pair: Any, what: str) -> TensorForm | None:
    """A pair (sparsifier, layout), checked; None for a pair that leaves a tensor as it is.

    Raises `TypeError` for what is no pair, no sparsifier or no layout.
    """
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise TypeError(
            f"sparsified: expected {what} as a pair (sparsifier, layout), e.g. "
            f"(sl.Magnitude(0.1), functools.partial(sl.bsr, block_size=32)), got {short(pair)}"
        )
    sparsifier, layout = pair
    if sparsifier is None and layout is None:
        return None
    chooses = None if sparsifier is None else as_sparsifier(sparsifier, "sparsified")
    if isinstance(layout, type):
        maker = getattr(layout, "from_dense", None)
        if not issubclass(layout, LayoutTensor) or maker is None:
            raise TypeError(
                f"sparsified: expected a layout for {what}, got the class {layout.__qualname__}, "
                "which has no from_dense; give a function that makes one, e.g. "
                "functools.partial(sl.bsr, block_size=32), or None for a dense tensor"
            )
        layout = maker
    if isinstance(layout, LayoutTensor):
        return TensorForm(chooses, cast(LayoutTensor, layout.detach()))
    if layout is not None and (isinstance(layout, Tensor) or not callable(layout)):
        raise TypeError(
            f"sparsified: expected a layout for {what} (a layout class, a function that makes one, "
            f"a layout whose pattern is taken, or None for dense), got {short(layout)}"
        )
    if isinstance(layout, functools.partial) and "keep" in layout.keywords and chooses is not None:
        raise ValueError(
            f"sparsified: {what} names two sparsifiers, {short(sparsifier)} and the one in "
            f"{name_of_layout(layout)}; leave one of them out"
        )
    return TensorForm(chooses, layout)
