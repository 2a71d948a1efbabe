"""What training a linear layer keeps in memory: weight, gradient and AdamW's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from benchmarks.matmul_variants import Operands
from sparse_layouts.dispatch.text import readable_bytes


class Memory(NamedTuple):
    """Bytes; what several tensors share, such as lists, counts once, where it comes first."""

    weight: int
    gradient: int
    state: int
    schedules: int  # what kernels derived from the lists

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def training_memory(given: Operands, weight: Any) -> Memory:
    """After one step of AdamW on `F.linear`; what is allocated, not what a formula says."""
    parameter = torch.nn.Parameter(weight.detach().clone())
    optimizer = torch.optim.AdamW([parameter])
    F.linear(given.others[0], parameter).float().square().mean().backward()
    optimizer.step()
    seen: set[int] = set()
    state = [t for t in optimizer.state[parameter].values() if isinstance(t, Tensor)]
    return Memory(
        own_bytes([parameter], seen),
        own_bytes([parameter.grad], seen),
        own_bytes(state, seen),
        parameter.cached_bytes if isinstance(parameter, sl.LayoutTensor) else 0,
    )


def own_bytes(tensors: list[Any], seen: set[int]) -> int:
    """Bytes of the storages that are not among the `seen`, to which they are added."""
    total = 0
    for tensor in tensors:
        layout = isinstance(tensor, sl.LayoutTensor)
        for part in tensor.inner_tensors() if layout else (tensor,):
            if part is None:
                continue
            storage = part.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def memory_notes(given: Operands) -> tuple[list[str], dict[str, Any]]:
    """Lines for a row, and the numbers by whose they are."""
    found = {
        "sparse_layouts": training_memory(given, given.layout),
        "dense": training_memory(given, given.dense),
    }
    mine, dense = found.values()
    notes = [
        f"{whose}: weight {readable_bytes(m.weight)}, gradient {readable_bytes(m.gradient)}, AdamW "
        f"{readable_bytes(m.state)}"
        + (f", schedules {readable_bytes(m.schedules)}" if m.schedules else "")
        for whose, m in found.items()
    ]
    notes.append(f"in all {mine.total / dense.total:.0%} of the dense layer's bytes")
    return notes, {whose: {**m._asdict(), "total": m.total} for whose, m in found.items()}
