"""Operators that torch sees as one step: kernels stay behind them under torch.compile, export and
fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparse_layouts.block_pattern import BlockPattern

_library = torch.library.Library("sparse_layouts", "DEF")

# How a pattern stands in a schema: its ten tensors, then its three sizes.
_PATTERN = (
    "Tensor crow_indices, Tensor col_indices, Tensor? row_slots, Tensor ccol_indices, Tensor "
    "row_indices, Tensor? col_slots, "
    "Tensor? head_map, Tensor? block_tiles, Tensor? tiles, Tensor? block_counts, "
    "SymInt[] shape, SymInt[] block_size, SymInt[] lead"
)
_WIDTH = 13


def is_eager(first: Any) -> bool:
    """Whether a call is plain eager work, which nobody traces: it then skips the dispatcher (30 us
    of boxed arguments).
    """
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be traced
        and type(first) is torch.Tensor
        and not first.is_meta  # then only the result's shape is wanted
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
    )


def define(
    name: str,
    arguments: str,
    launch: Callable[..., Any],
    shape: Callable[..., Any],
    returns: str = "Tensor",
) -> Callable[..., Any]:
    """Defines `sparse_layouts::name` and returns a function that calls it.

    `arguments` is a schema, with `{pattern}` where a BlockPattern stands, if one does; `launch`
    runs it on real tensors, `shape` makes empty results. Both get the BlockPattern whole. No
    autograd: ops have their own `autograd.Function`.
    """
    has_pattern = "{pattern}" in arguments
    at = arguments.split("{pattern}")[0].count(",")
    _library.define(f"{name}({arguments.format(pattern=_PATTERN)}) -> {returns}")

    def whole(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not has_pattern:
            return args
        flat = args[at : at + _WIDTH]
        pattern = BlockPattern._make((*flat[:10], *map(tuple, flat[10:])))
        return (*args[:at], pattern, *args[at + _WIDTH :])

    def implementation(*args: Any) -> Any:
        return launch(*whole(args))

    def fake(*args: Any) -> Any:
        return shape(*whole(args))

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_layouts::{name}", fake, lib=_library)
    operator = getattr(torch.ops.sparse_layouts, name).default

    def call(*args: Any) -> Any:
        if is_eager(args[0]):
            return launch(*args)
        if not has_pattern:
            return operator(*args)
        return operator(*args[:at], *args[at], *args[at + 1 :])

    call.__name__ = name
    call.__doc__ = f"Calls the operator `sparse_layouts::{name}`."
    return call
