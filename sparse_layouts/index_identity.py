"""Whether two layouts hold the same index tensors: by memory, else by content, and in code that is
being compiled by a check that runs with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import effects

from sparse_layouts import opaque


def being_traced() -> bool:
    """Whether torch.compile or torch.export is at work: contents are unknown then.

    Behind dynamo, where operators of its graph are traced one by one, `is_compiling` is True in
    some versions of torch only.
    """
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both are one view of one storage: compiled code hands an index tensor back as another
    object.
    """
    return (
        a.dtype == b.dtype
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )


def same_index(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two index tensors hold the same; free where they share memory."""
    if a is b:
        return True
    if a is None or b is None or a.shape != b.shape or a.device != b.device:
        return False
    return same_memory(a, b) or bool(torch.equal(a, b))


def _launch(ours: list[Tensor], theirs: list[Tensor]) -> None:
    if not all(same_index(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(
            "compiled code takes two layouts of equal sizes for layouts of one pattern, and these "
            "are not. Make both from one mask, or keep this call out of torch.compile: there it "
            "is dense."
        )


def _no_result(ours: list[Tensor], theirs: list[Tensor]) -> None:
    return None


check_indices_op = opaque.define(
    "check_indices", "Tensor[] ours, Tensor[] theirs", _launch, _no_result, "()"
)
# without an effect the compiler would drop a call that returns nothing
effects._register_effectful_op(
    torch.ops.sparse_layouts.check_indices.default, effects._EffectType.ORDERED
)


def same_indices(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...]) -> bool:
    """Whether index tensors are the same, field by field.

    While torch.compile or torch.export traces, contents are unknown: tensors of equal shapes are
    taken to be the same, and the compiled code raises `ValueError` when it runs and they are not.
    """
    if not being_traced():
        return all(same_index(a, b) for a, b in zip(ours, theirs, strict=True))
    unknown = []
    for a, b in zip(ours, theirs, strict=True):
        if a is b:
            continue
        if a is None or b is None or a.shape != b.shape or a.device != b.device:
            return False
        unknown.append((a, b))
    if unknown:
        check_indices_op([a for a, _ in unknown], [b for _, b in unknown])
    return True
