"""Times on this machine: a layout's product or attention and the dense one, in turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import explain, fallback
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.measuring import Timing, interleaved, synchronize
from sparse_layouts.viewing.causality import is_causal
from sparse_layouts.viewing.work import Work, attention_work, product_work

HEAD_DIM, COLUMNS = 64, 256


class Call(NamedTuple):
    """Something to do with a layout: `what` it is, the layout's way and the dense one, its work."""

    what: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dense: Callable[[], Any]
    dense_is: str
    work: Work
    device: torch.device

    def run(self) -> Any:
        """The call on the layout."""
        return self.function(*self.args, **self.kwargs)


class Measured(NamedTuple):
    """Both times, the kernel that ran, and what was measured."""

    what: str
    kernel: str
    sparse: Timing
    dense: Timing
    dense_is: str

    @property
    def ratio(self) -> float:
        """How many times faster the layout is; below 1 it is slower."""
        return self.dense.median_s / self.sparse.median_s


def typical_work(layout: LayoutTensor) -> Work:
    """The work of :func:`typical_call`, whose operands are not made."""
    if layout.dtype != torch.bool:
        return product_work(layout, COLUMNS)
    heads = math.prod(layout.shape[:-2])
    return attention_work(layout, 1, heads, HEAD_DIM, 4)


def typical_call(layout: LayoutTensor) -> Call:
    """What one does with such a layout: attention with a mask (batch 1, its heads, head size 64), a
    product with 256 columns of a matrix with values.
    """
    draw = torch.Generator().manual_seed(0)
    work, device = typical_work(layout), layout.device
    if isinstance(layout, BSRTensor) and layout.is_mask:
        heads = math.prod(layout.shape[:-2])
        m, n = layout.matrix_shape
        q, k, v = (
            torch.randn(1, heads, size, HEAD_DIM, generator=draw).to(device) for size in (m, n, n)
        )
        causal = m == n and is_causal(layout)
        mask = layout if layout.dim() < 4 else layout[0]
        return Call(
            f"attention, batch 1, {heads} heads of {HEAD_DIM}, fp32",
            F.scaled_dot_product_attention,
            (q, k, v),
            {"attn_mask": mask},
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            "dense causal attention" if causal else "dense attention",
            work,
            device,
        )
    if layout.dtype == torch.bool:
        raise NotImplementedError(
            f"typical_call: a mask in a {type(layout).__name__} is for no call that is timed; "
            "make blocks of it with sl.mask_from(mask, 64)"
        )
    w, dense = layout.detach(), layout.detach().to_dense()
    x = torch.randn(layout.shape[-1], COLUMNS, generator=draw).to(device, layout.dtype)
    return Call(
        f"w @ x, {COLUMNS} columns, {str(layout.dtype).removeprefix('torch.')}",
        torch.matmul,
        (w, x),
        {},
        lambda: torch.matmul(dense, x),
        "dense matmul",
        work,
        device,
    )


def measure(layout: LayoutTensor, *, budget_s: float = 0.5, repeats: int = 9) -> Measured:
    """Times the typical call of a layout and the dense one in turns, after a first run of each,
    within about `budget_s` seconds but at least once.

    >>> import torch, sparse_layouts as sl
    >>> from sparse_layouts.viewing.measured import measure
    >>> measure(sl.bsr(torch.eye(64), block_size=16), repeats=1).kernel
    'cpu'
    """
    call = typical_call(layout)
    with fallback("allow"), torch.no_grad():
        times = interleaved(
            {"sparse": call.run, "dense": call.dense},
            repeats=repeats,
            budget_s=budget_s,
            at_least=1,
            device=call.device,
        )
        kernel = explain(call.function, *call.args, **call.kwargs).kernel
    return Measured(call.what, kernel, times["sparse"], times["dense"], call.dense_is)


def machine_limits(
    dtype: torch.dtype, device: torch.device, size: int = 1024
) -> tuple[float, float]:
    """FLOP/s of a dense product of `size`^3 and bytes/s of a copy of 64 MiB, measured now: the best
    of a few.
    """
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.empty(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved(
        {"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, repeats=5, device=device
    )
    synchronize(device)
    return 2.0 * size**3 / times["product"].low_s, 2.0 * source.numel() / times["copy"].low_s
