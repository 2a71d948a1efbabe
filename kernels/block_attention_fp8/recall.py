"""Attention in 8 bits called again: what a call with a mask settled is kept with the mask, as
`block_attention/recall.py` keeps that of 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch.kernel_table import KERNELS, choose
from sparse_layouts.dispatch.routes import ROUTES
from sparse_layouts.kernels.block_attention import heads
from sparse_layouts.kernels.block_attention.recall import known, prepared
from sparse_layouts.kernels.block_attention_fp8 import OP, facts
from sparse_layouts.kernels.block_attention_fp8.operands import FP8Operand
from sparse_layouts.kernels.recalling import is_undisturbed
from sparse_layouts.opaque import is_eager


class Settled:
    """What calls on operands like the first ones share."""

    def __init__(
        self,
        forward: Any,
        q: FP8Operand,
        k: FP8Operand,
        v: FP8Operand,
        mask: BSRTensor,
        scale: float,
    ) -> None:
        self.pattern = mask.block_pattern
        self.tables = (ROUTES.changes, KERNELS.changes)
        self.index = q.data.device.index
        self.shape = (*q.data.shape[:-1], v.data.shape[-1])
        head_map = heads.list_of_head(self.pattern, q.data.shape[1])
        out = torch.empty(self.shape, dtype=q.dtype, device=q.data.device)
        operands = (q.data, k.data, v.data, (q.scale, k.scale, v.scale), out)
        self.forward = forward(*operands, self.pattern, head_map, scale)

    def __call__(self, q: FP8Operand, k: FP8Operand, v: FP8Operand) -> Tensor:
        """out (B, H, Nq, Dv)."""
        out = torch.empty(self.shape, dtype=q.dtype, device=q.data.device)
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        self.forward(q.data, k.data, v.data, q.scale, k.scale, v.scale, out, stream)
        return out


def recall_fp8(
    q: Any,
    k: Any,
    v: Any,
    mask: BSRTensor,
    scale: Any,
    settle: Callable[[], Settled | None] | None = None,
) -> Any:
    """The result of a call like an earlier one, or NotImplemented. Where there was no such call,
    `settle` makes what is then kept.
    """
    if not (type(q) is type(k) is type(v) is FP8Operand and is_eager(q.data)):
        return NotImplemented
    if q.packed or k.packed or v.packed or (mask._recalled is None and settle is None):
        return NotImplemented
    if (scale is not None and type(scale) is not float) or not is_undisturbed(None):
        return NotImplemented
    tensors = (q.data, k.data, v.data, q.scale, k.scale, v.scale)
    key: list[Any] = ["fp8", scale, q.dtype, k.dtype, v.dtype]
    addresses = 0
    for t in tensors:
        if type(t) is not Tensor or not t.is_cuda or t.requires_grad:
            return NotImplemented
        key += (t.shape, t.stride(), t.dtype, t.device)
        addresses |= t.data_ptr()
    shift = k.shift
    if shift is not None:  # which changes no result, but has to be one that is allowed
        if type(shift) is not Tensor or shift.requires_grad:
            return NotImplemented
        key += (shift.shape, shift.dtype, shift.device)
    if q.shift is not None or v.shift is not None:
        return NotImplemented
    if addresses % 16:
        return NotImplemented
    settled = known(mask, tuple(key), settle)
    return NotImplemented if settled is None else settled(q, k, v)


def recall_or_settle_fp8(
    q: FP8Operand, k: FP8Operand, v: FP8Operand, mask: BSRTensor, scale: float | None
) -> Any:
    """The result of a call whose operands are checked, which later ones recall; NotImplemented
    where the usual way has to be taken.
    """
    return recall_fp8(q, k, v, mask, scale, lambda: _settle(q, k, v, mask, scale))


def _settle(
    q: FP8Operand, k: FP8Operand, v: FP8Operand, mask: BSRTensor, scale: float | None
) -> Settled | None:
    q8, k8, v8 = q.data, k.data, v.data
    if q8.dim() != 4 or q8.shape[0] != k8.shape[0] or q8.shape[0] != v8.shape[0]:
        return None
    if not all(t.is_contiguous() for t in (q.scale, k.scale, v.scale)):
        return None
    p = mask.block_pattern
    if q8.numel() == 0 or k8.numel() == 0 or v8.numel() == 0 or p.num_blocks == 0:
        return None
    forward = prepared(
        choose(OP, facts(q8, k8, v8, q.dtype, p.block_size, lengths=False)), "PreparedForward"
    )
    if forward is None or torch._C._cuda_getDevice() != q8.device.index:
        return None
    if not forward.takes(q8, k8, v8):
        return None
    scale = 1.0 / math.sqrt(q8.shape[-1]) if scale is None else scale
    return Settled(forward, q, k, v, mask, scale)
