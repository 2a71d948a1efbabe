"""The dense fallback: what it costs, whether it is allowed, and running it."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.dispatch import settings
from sparse_layouts.dispatch.faces import Function, name_of
from sparse_layouts.dispatch.kernel_table import facts_of
from sparse_layouts.dispatch.layout import Layout, dense_bytes
from sparse_layouts.dispatch.routes import operands_by_name, stub
from sparse_layouts.dispatch.text import readable_bytes
from sparse_layouts.dispatch.tracing import record

_HERE = Path(__file__).resolve().parent.parent
_LIBRARY = tuple(str(_HERE / name) for name in ("dispatch", "kernels", "sparse_layouts"))


class DenseFallbackWarning(UserWarning):
    """A call on a layout had no sparse kernel and was computed densely; given once a call site.

    The message names the missing route and the stub to paste. `sl.fallback("allow")` is silent.

    >>> import warnings, torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> with warnings.catch_warnings(record=True) as given, sl.fallback("warn"):
    ...     warnings.simplefilter("always")
    ...     y = torch.cumsum(w, 0)
    >>> [each.category.__name__ for each in given]
    ['DenseFallbackWarning']
    """


class DenseFallbackError(RuntimeError):
    """A call on a layout had no sparse kernel, and computing it densely is not allowed or does not
    fit.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> with sl.fallback("error"):
    ...     torch.cumsum(w, 0)
    Traceback (most recent call last):
        ...
    sparse_layouts.dispatch.fallback.DenseFallbackError: torch.cumsum has no sparse ...
    """


def free_bytes(device: str) -> int | None:
    """Memory that can be had on the current device of that type, None where nobody says."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    if device != "cpu":
        return None
    free: int | None = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free if free is not None else int(limit), int(limit) - used)
    except OSError:
        return free  # not Linux, or no control group
    return free


def _user_frame() -> types.FrameType:
    """The innermost frame outside this library and torch: whose line makes the call."""
    frame: types.FrameType = sys._getframe(1)
    torch_folder = str(Path(torch.__file__).parent)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARY) and not name.startswith(torch_folder):
            break
        frame = frame.f_back
    return frame


def _initialises() -> bool:
    """Whether a function of torch.nn.init makes the call."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "torch.nn.init"


def permit(message: str, count: int, device: str, what: str) -> None:
    """Lets a computation densify `count` bytes, as the policy says: returns, warns, or raises
    `DenseFallbackError`.
    """
    free = free_bytes(device)
    if free is not None and count > free:
        raise DenseFallbackError(
            f"{message}\nDensifying needs {readable_bytes(count)}, and {readable_bytes(free)} "
            f"are free on {device}."
        )
    policy = settings.current().policy
    if policy == "error":
        raise DenseFallbackError(
            f"{message}\nDensifying would cost {readable_bytes(count)}; sl.fallback('warn') or "
            f"'allow' permits it."
        )
    if policy == "allow":
        return
    frame = _user_frame()
    # once a call site, and again where somebody changed the filters (pytest.warns, catch_warnings)
    seen = frame.f_globals.setdefault("__sparse_layouts_warned__", {})
    if seen.get((frame.f_lineno, what)) is warnings.filters:
        return
    seen[frame.f_lineno, what] = warnings.filters
    warnings.warn_explicit(
        f"{message}\nDensifying costs {readable_bytes(count)} here; silence this with "
        f"sl.fallback('allow').",
        DenseFallbackWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
    )


def route_missing(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """That no route serves the call, and the stub of one that would."""
    operands = operands_by_name(function, args, kwargs)
    copied = "\nThe result is a copy: writing to it does not change the layout."
    given = ", ".join(f"{n}={c.__name__}" for n, c in operands.items()) or "layouts in a list"
    text = f"{name_of(function)} has no sparse implementation for {given}; computing it densely."
    if is_view(function):
        text += copied
    if operands:
        text += f"\nTo add one:\n{stub(function, operands)}"
    return text


def is_view(function: Function) -> bool:
    """Whether torch's result shares memory with the argument, so that code may write through it."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") in _VIEWS
    return name in _VIEWS


def layouts_in(value: Any) -> list[Any]:
    """Every layout among arguments, lists and dicts searched."""
    if isinstance(value, Layout):
        return [value]
    if isinstance(value, (tuple, list)):
        return [layout for v in value for layout in layouts_in(v)]
    if isinstance(value, dict):
        return [layout for v in value.values() for layout in layouts_in(v)]
    return []


def densified(value: Any) -> Any:
    """The same arguments with every layout dense."""
    if isinstance(value, Layout):
        return value.to_dense()
    if isinstance(value, (tuple, list)) and layouts_in(value):
        return type(value)(densified(v) for v in value)
    if isinstance(value, dict):
        return {k: densified(v) for k, v in value.items()}
    return value


def is_in_place(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call would write into a layout: its first argument, or `out=`."""
    if layouts_in(kwargs.get("out")):
        return True
    target = first_argument(args, kwargs)
    name = getattr(function, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    writes = writes or (name.startswith("__i") and name.endswith("__") and name[3:-2] in _IN_PLACE)
    writes = writes or kwargs.get("inplace") is True
    return writes and isinstance(target, Layout)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an in-place function writes to: its first argument, under whichever name."""
    if args:
        return args[0]
    return next((kwargs[name] for name in ("input", "tensor", "self") if name in kwargs), None)


_IN_PLACE = frozenset(
    "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift div".split()
)
_VIEWS = frozenset(
    "T H mT mH real imag __getitem__ adjoint as_strided chunk diagonal expand expand_as flatten "
    "hsplit movedim moveaxis narrow permute ravel reshape reshape_as select split "
    "split_with_sizes squeeze swapaxes swapdims t tensor_split transpose unbind unflatten unfold "
    "unsafe_chunk unsafe_split unsqueeze view view_as vsplit dsplit".split()
)


def fall_back(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs torch's own function on densified operands, if policy and free memory allow it."""
    if is_in_place(function, args, kwargs):
        target = (layouts_in(kwargs.get("out")) or [first_argument(args, kwargs)])[0]
        raise TypeError(
            f"{name_of(function)} would change which entries of a {type(target).__name__} are "
            f"stored, which an in-place operation "
            "cannot. Assign the result instead (w = w + x is dense), sample a dense operand onto "
            "the layout first "
            "(x.sparse_mask(w)), or write to w.values()."
        )
    layouts = layouts_in(args) + layouts_in(kwargs)
    if is_view(function) and not torch.compiler.is_compiling() and _initialises():
        raise TypeError(
            f"{name_of(function)}: this torch.nn.init function writes through a view, and a "
            f"{type(layouts[0]).__name__} has none. Initialise a dense tensor and take its stored "
            "entries: w.copy_(dense.sparse_mask(w))"
        )
    count = sum(dense_bytes(layout) for layout in layouts)
    if not torch.compiler.is_compiling():
        first: Tensor = layouts[0]
        permit(route_missing(function, args, kwargs), count, first.device.type, name_of(function))
        record(name_of(function), "dense fallback", facts_of(first), count)
    elif settings.current().policy == "error":
        raise DenseFallbackError(route_missing(function, args, kwargs))
    args, kwargs = densified(args), densified(kwargs)
    if args and isinstance(layouts[0], Tensor) and getattr(function, "__name__", "") == "view":
        args = (args[0].contiguous(), *args[1:])  # as the layout says that it is
    return function(*args, **kwargs)
