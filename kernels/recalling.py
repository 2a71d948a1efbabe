"""Which calls of a product are alike enough to be launched as an earlier one was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.dispatch.routes import matches
from sparse_layouts.dispatch.settings import current
from sparse_layouts.opaque import is_eager

# calls that a layout remembers before it forgets them all
MOST = 64
# of a call that was seen, and is not settled
ONCE = object()


def is_undisturbed(dtype: torch.dtype | None) -> bool:
    """Whether nothing is set under which calls on operands of a dtype differ from each other; None:
    of one that autocast leaves alone.
    """
    setting = current()
    return not (
        setting.choices
        or setting.trace is not None
        or torch.autograd.forward_ad._current_level >= 0
        or (
            dtype is not None
            and torch.is_autocast_enabled("cuda")
            and torch.get_autocast_dtype("cuda") != dtype
        )
    )


def may_recall(values: Tensor | None, x: Tensor) -> bool:
    """Whether a call with a layout of these values and a dense operand is a plain one: eager, on a
    GPU, of 16 bits (how float32 is read is a setting), with addresses that kernels take.
    """
    if not (type(x) is Tensor and x.is_cuda and is_eager(x) and type(values) is Tensor):
        return False
    if x.dtype.itemsize != 2 or (x.data_ptr() | values.data_ptr()) % 16:
        return False
    return is_undisturbed(x.dtype)


def is_capturing() -> bool:
    """Whether a CUDA graph is captured: lists that are made then are written when it is replayed,
    and a launch that is settled would keep them.
    """
    return torch.cuda.is_current_stream_capturing()


def known(
    layout: Any, key: Any, holds: Callable[[Any], bool], settle: Callable[[], Any]
) -> Any | None:
    """What an earlier call with the layout settled, where it still `holds`. `settle` makes it at
    the second such call: a layout that is made for one product never has one. None where there is
    nothing, and nothing is made while a CUDA graph is captured.
    """
    recalled = layout._recalled
    settled = None if recalled is None else recalled.get(key)
    if settled is not None and settled is not ONCE and holds(settled):
        return settled
    if is_capturing():
        return None
    if recalled is None or len(recalled) >= MOST:
        recalled = layout._recalled = {}
    if settled is None:
        recalled[key] = ONCE
        return None
    settled = settle()
    recalled[key] = ONCE if settled is None else settled
    return settled


def takes_own_route(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call's route is one of `product_routes.py`."""
    found = matches(function, args, {})
    own = "sparse_layouts.kernels.product_routes"
    return bool(found) and found[0].route.handler.__module__ == own
