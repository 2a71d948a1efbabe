"""What code of an optimizer may do to a layout that other code may not: everything on the stored
entries.

An optimizer works entry by entry, and what it computes goes back into the entries of its parameter,
in place. What an entry that is not stored would have become on the way (`exp_avg_sq.sqrt() + eps`
is eps there) is never kept. So arithmetic that an optimizer does out of place acts on the stored
entries, as it does in the foreach and fused forms, where the same steps are in place: Adagrad's
`full_like`, Adadelta's `add(eps)` and Rprop's comparisons keep the layout. For all other code an
entry that is not stored is 0, and `w + eps` is dense.

Whose code it is, the caller's frame tells: a module of `torch.optim`, or a method of a user's own
`torch.optim.Optimizer`. A closure that an optimizer calls is other code. The question is asked only
where a layout would be densified or an error raised, and costs nothing elsewhere.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_layouts.dispatch import Layout
from sparse_layouts.dispatch.fallback import _LIBRARY as LIBRARY_FOLDERS
from sparse_layouts.dispatch.fallback import layouts_in
from sparse_layouts.index_identity import being_traced

if TYPE_CHECKING:
    from sparse_layouts.layout_tensor import LayoutTensor

# Between an optimizer's line and the library: Python-written methods of Tensor, decorators.
_BETWEEN = ("sparse_layouts", "torch._tensor", "torch.overrides", "torch.functional")
_TORCH = str(Path(torch.__file__).parent)
_BETWEEN_FILES = (
    *LIBRARY_FOLDERS,
    *(f"{_TORCH}/{name}" for name in ("_tensor.py", "overrides.py", "functional.py", "_dynamo/")),
)
_OPTIM = f"{_TORCH}/optim/"
_FILLED = frozenset({torch.full_like, torch.ones_like, torch.rand_like, torch.randn_like})


def called_by_optimizer() -> bool:
    """Whether an optimizer's own code makes the call."""
    if being_traced():
        return traced_from_optimizer()
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not any(module == name or module.startswith(name + ".") for name in _BETWEEN):
            break
        frame = frame.f_back
    if frame is None:
        return False
    if module == "torch.optim" or module.startswith("torch.optim."):
        return True
    code = frame.f_code
    if not code.co_argcount:
        return False
    return isinstance(frame.f_locals.get(code.co_varnames[0]), torch.optim.Optimizer)


def traced_from_optimizer() -> bool:
    """Whether the code that is being compiled is torch.optim's: there is no caller to look at, but
    a list of the lines that are being traced.
    """
    context = torch._guards.TracingContext.try_get()
    files = [] if context is None else [line.filename for line in context.extract_stack()]
    if not files:  # behind dynamo, an operator of its graph at a time
        written = torch.fx.traceback.get_current_meta().get("stack_trace") or ""
        files = re.findall(r'File "([^"]+)"', written)
    for file in reversed(files):
        if not file.startswith(_BETWEEN_FILES):
            return file.startswith(_OPTIM)
    return False


def is_pointwise(function: Callable[..., Any]) -> bool:
    """Whether torch's own function computes every entry from those at the same place."""
    if function in _FILLED:
        return True
    if isinstance(function, torch._ops.OpOverload):
        return torch.Tag.pointwise in function.tags
    written = getattr(function, "__name__", "")
    if written.endswith("_") and not written.endswith("__"):
        return False  # in place
    name = written.strip("_")
    names = [name, name.removeprefix("r"), name.replace("truediv", "div").removeprefix("r")]
    for each in names if written.startswith("__") else names[:1]:
        packet = getattr(torch.ops.aten, each, None)
        if packet is not None:
            overloads = [getattr(packet, overload) for overload in packet.overloads()]
            return any(torch.Tag.pointwise in operator.tags for operator in overloads)
    return False


# These run while code is traced, and their answers become part of what is traced. The decorator
# torch._dynamo.assume_constant_result does no more than this, and importing it takes seconds.
traced_from_optimizer._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_pointwise._dynamo_marked_constant = True  # type: ignore[attr-defined]


def on_entries(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function` on the stored entries, in the layout; NotImplemented where it is not pointwise or
    a dense operand takes part.
    """
    if not is_pointwise(function) or "out" in kwargs:
        return NotImplemented
    for value in (*args, *kwargs.values()):
        if isinstance(value, (tuple, list)) and layouts_in(value):
            return NotImplemented
        if isinstance(value, Tensor) and not isinstance(value, Layout) and value.dim():
            return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def dense_operand(value: Tensor, layout: LayoutTensor, what: Any) -> Tensor:
    """The entries of an optimizer's dense operand that `layout` stores, as its values.

    LBFGS keeps one flat dense direction and Adafactor a dense estimate; both are 0 where the
    gradient is. Raises `TypeError` where the operand is not: Muon mixes entries.
    """
    if torch.broadcast_shapes(value.shape, layout.shape) != layout.shape:
        raise ValueError(
            f"{what}: expected an operand of shape {tuple(layout.shape)}, got {tuple(value.shape)}"
        )
    whole = value.expand(layout.shape)
    taken = layout.sample(whole)
    if not torch.equal(taken.to_dense_entries(), whole.to(taken.dtype)):
        raise TypeError(
            f"{what}: the optimizer's update is not 0 at entries that {layout.one_line()} does "
            "not store. An optimizer that mixes entries (Muon) cannot train a layout: use one that "
            "works entry by entry, such as torch.optim.AdamW, or keep the weight dense."
        )
    values = taken.stored_values
    assert values is not None
    return values
