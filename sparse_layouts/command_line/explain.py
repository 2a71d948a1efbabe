"""`python -m sparse_layouts explain`: a call in words, and what `sl.explain` says of it."""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.command_line.errors import UsageError
from sparse_layouts.dispatch import Explanation
from sparse_layouts.viewing.families import Values, family_of, sizes_that_fit

OPERATIONS = ("matmul", "rmatmul", "linear", "softmax", "sddmm", "attention")


def explained(options: argparse.Namespace) -> tuple[str, Explanation]:
    """The line of code that builds the layout, and the explanation.

    Raises `UsageError` with one line for what makes no sense.
    """
    dtype = getattr(torch, options.dtype)
    for name in ("dense_columns", "batch", "head_dim"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option}: at least 1, got {getattr(options, name)}")
    capability = None if options.gpu is None else _capability(options.gpu)
    code, layout = _built(options.layout, _parsed(options.parameters))
    try:
        with sizes_that_fit("the operands"):
            function, args, kwargs = _call(options, layout, dtype)
        said = sl.explain(function, *args, **kwargs)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{options.operation}: {error}") from error
    return code, said if capability is None else said.on_gpu(capability)


def _capability(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.(\d)", text) or re.fullmatch(r"(?:sm_?)(\d+)(\d)", text)
    if match is None:
        raise UsageError(f"--gpu: expected a compute capability such as 9.0 or sm_90, got {text!r}")
    return int(match[1]), int(match[2])


def _parsed(parameters: list[str]) -> Values:
    found: Values = {}
    for each in parameters:
        name, equals, value = each.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"expected NAME=VALUE, got {each!r}")
        if name in found:
            raise UsageError(f"{name} is given twice")
        found[name] = value
    return found


def _built(name: str, given: Values) -> tuple[str, sl.LayoutTensor]:
    try:
        family = family_of(name)
        values = family.values(given)
        return family.code(values), family.built(values)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _function(name: str) -> Any:
    """A function of torch's by the name that a person writes."""
    module, _, last = name.rpartition(".")
    places = {
        "torch": torch,
        "F": F,
        "torch.nn.functional": F,
        "torch.linalg": torch.linalg,
        "torch.special": torch.special,
        "Tensor": torch.Tensor,
        "torch.Tensor": torch.Tensor,
    }
    function = getattr(places.get(module), last, None) if last.isidentifier() else None
    if not callable(function):
        raise UsageError(
            f"no operation {name!r}; there are {', '.join(OPERATIONS)}, and functions such as "
            "torch.cumsum"
        )
    return function


def _call(
    options: argparse.Namespace, layout: Any, dtype: torch.dtype
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    name, columns, gradients = options.operation, options.dense_columns, options.gradients

    def dense(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=gradients)

    m, n = layout.shape[-2:]
    mask = layout.pattern
    heads = layout.shape[:-2]
    if name == "attention":
        count = heads[0] if heads else 1
        q, k, v = (dense(options.batch, count, size, options.head_dim) for size in (m, n, n))
        return F.scaled_dot_product_attention, (q, k, v), {"attn_mask": mask}
    if name == "sddmm":
        a, b = dense(*heads, m, options.head_dim), dense(*heads, options.head_dim, n)
        return sl.sddmm, (a, b, mask), {}
    # what a mask stores, as ones: the kernels do not mind the values
    w = (layout if layout.dtype != torch.bool else mask).to(dtype).detach()
    w.requires_grad_(gradients)
    if name == "matmul":
        return torch.matmul, (w, dense(*heads, n, columns)), {}
    if name == "rmatmul":
        return torch.matmul, (dense(*heads, columns, m), w), {}
    if name == "linear":
        if heads:
            raise UsageError("linear: takes a matrix, not one a head; num_heads=1 makes one")
        return F.linear, (dense(columns, n), w), {}
    if name == "softmax":
        return torch.softmax, (w, -1), {}
    return _function(name), (w,), {}
