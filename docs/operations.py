"""What each layout can do, asked of the two tables: operations, the kernels that would take them on
a CPU and on a GPU, in fp32 and bf16, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch import Explanation
from sparse_layouts.dispatch.explain import OpPlan
from sparse_layouts.dispatch.faces import name_of
from sparse_layouts.dispatch.routes import ROUTES

GPU = (9, 0)
DENSE = "dense"
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

# a mask of every layout, square, and small: kernels are chosen by facts, not by size
MASKS: dict[str, Callable[[], Any]] = {
    "BSRTensor": lambda: sl.causal(512, block_size=64),
    "LocalStrideTensor": lambda: sl.local_stride(512, block_size=64, local_blocks=2, vert_stride=2),
    "BigBirdTensor": lambda: sl.bigbird(512, block_size=64, source="hf-eval"),
    "NMTensor": lambda: sl.nm(torch.randn(128, 128), 2, 4).pattern,
    "GroupedNMTensor": lambda: sl.grouped_nm(torch.randn(128, 128), 2, 4, 4).pattern,
    "ReorderedTensor": lambda: sl.reorder(sl.bsr(torch.eye(512), 16), 64).pattern,
    "CSRTensor": lambda: sl.csr(torch.eye(128)).pattern,
    "CSCTensor": lambda: sl.csc(torch.eye(128)).pattern,
}


class Operation(NamedTuple):
    """A row of a layout's table: the op that serves it, and the kernels on a CPU and a GPU, forward
    and for gradients; "dense" for the fallback.
    """

    written: str
    op: str
    cpu: str
    gpu: str
    gradients_cpu: str
    gradients_gpu: str


def calls(mask: Any, dtype: torch.dtype) -> dict[str, Call]:
    """What one does with a layout, by how it is written."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype)

    n = mask.shape[-1]
    w = ones(*mask.shape).sparse_mask(mask).requires_grad_()
    x, few, q = (ones(*s).requires_grad_() for s in ((n, 256), (n, 2), (1, 1, n, 64)))
    return {
        "w @ x, 256 columns": (torch.matmul, (w, x), {}),
        "w @ x, 2 columns": (torch.matmul, (w, few), {}),
        "x @ w": (torch.matmul, (x.mT, w), {}),
        "w.mT @ x": (torch.matmul, (w.mT, x), {}),
        "F.linear(x, w)": (F.linear, (x.mT, w), {}),
        "sl.sddmm(a, b, mask)": (sl.sddmm, (x, x.mT, mask), {}),
        "torch.softmax(w, -1)": (torch.softmax, (w, -1), {}),
        "F.scaled_dot_product_attention(q, k, v, mask)": (
            F.scaled_dot_product_attention,
            (q, q, q),
            {"attn_mask": mask},
        ),
        "w * 2": (torch.mul, (w, 2), {}),
        "w + w": (torch.add, (w, w), {}),
        "torch.relu(w)": (torch.relu, (w,), {}),
        "w.sum()": (torch.sum, (w,), {}),
        "mask & mask": (torch.bitwise_and, (mask, mask), {}),
        "torch.exp(w)": (torch.exp, (w,), {}),
    }


def _chosen(plans: list[OpPlan]) -> str:
    names = [next((v.kernel.name for v in p.verdicts if v.chosen), DENSE) for p in plans]
    return ", ".join(dict.fromkeys(names))


def _by_dtype(full: list[OpPlan], half: list[OpPlan]) -> str:
    """The kernels of both dtypes, told apart where they differ."""
    names = _chosen(full), _chosen(half)
    return names[0] if names[0] == names[1] else f"{names[1]} in bf16; {names[0]} in fp32"


def _row(written: str, said: Explanation, half: Explanation) -> Operation:
    if said.missing:
        return Operation(written, "", DENSE, DENSE, DENSE, DENSE)
    if not said.ops:  # the stored entries, by torch's own functions
        what = "the stored entries" if said.native else f"`{said.route.handler.__name__}`"  # type: ignore[union-attr]
        return Operation(written, what, "torch", "torch", "torch", "torch")

    def split(ops: list[OpPlan]) -> tuple[list[OpPlan], list[OpPlan]]:
        return [p for p in ops if p.purpose == "forward"], [
            p for p in ops if p.purpose != "forward"
        ]

    here, here_back = split(said.ops)
    (full, full_back), (low, low_back) = (split(e.on_gpu(GPU).ops) for e in (said, half))
    return Operation(
        written,
        ", ".join(dict.fromkeys(f"`{p.op}`" for p in here)),
        _chosen(here),
        _by_dtype(full, low),
        _chosen(here_back),
        _by_dtype(full_back, low_back),
    )


def operations(name: str) -> list[Operation]:
    """The table of a layout."""
    mask = MASKS[name]()
    full, half = (calls(mask, dtype) for dtype in (torch.float32, torch.bfloat16))
    return [
        _row(written, *(sl.explain(f, *args, **kwargs) for f, args, kwargs in pair))
        for written, *pair in ((each, full[each], half[each]) for each in full)
    ]


def routes_of(cls: type) -> list[tuple[str, str, str]]:
    """Torch function, operands and handler of the routes for a layout or its bases."""
    found = []
    for function, rows in ROUTES.rows.items():
        for row in rows:
            if any(issubclass(cls, operand) for _, operand in row.operands):
                operands = ", ".join(f"{n}={c.__name__}" for n, c in row.operands)
                found.append((name_of(function), operands, row.handler.__name__))
    return sorted(found)
