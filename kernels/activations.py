"""The activations that a product can apply to its result, as torch computes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def check_activation(activation: str | None) -> None:
    """Raises `ValueError` for a name that there is not."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"linear: expected an activation of {', '.join(ACTIVATIONS)} or None, got "
            f"{activation!r}; apply any other to the result"
        )


def activated(x: Tensor, activation: str | None) -> Tensor:
    """The activation of that name of x; x itself for None."""
    return x if activation is None else ACTIVATIONS[activation](x)


def finish(out: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """`activation(out + bias)`, bias (M,) along the rows of out (..., M, N), in out's dtype."""
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None]
    return activated(out, activation)


def finish_nothing(out: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """out (..., M, N) where there is nothing to multiply: `activation(bias)`, which is 0 without
    one.
    """
    if bias is None:
        return out.zero_()
    accumulate = torch.promote_types(out.dtype, torch.float32)
    return out.copy_(activated(bias.to(accumulate), activation)[:, None])
