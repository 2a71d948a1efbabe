"""Attention called again: what a call with a mask settled is kept with the mask.

A GPU of today attends faster than Python checks operands, chooses a kernel and launches it: 250 to
320 us of one server's CPU, 600 to 1000 for gradients, where the kernels of local-stride attention
over 4096 tokens take 140 and 390 (2026-11-26). A call like an earlier one, in plain eager mode, is
therefore launched as that one was, of which only the addresses change.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch.kernel_table import KERNELS, Kernel, choose
from sparse_layouts.dispatch.routes import ROUTES
from sparse_layouts.dispatch.settings import Settings, current, restored
from sparse_layouts.kernels.block_attention import (
    BACKWARD,
    OP,
    block_attention_backward_op,
    facts,
    heads,
)
from sparse_layouts.kernels.launching import can_pack
from sparse_layouts.kernels.recalling import MOST, is_capturing, is_undisturbed
from sparse_layouts.layout_autograd import apply
from sparse_layouts.opaque import is_eager


def prepared(row: Kernel | None, name: str) -> Any:
    """The class of that name in the file of one of the library's kernels, where it has one and the
    driver allows; else None. Such a class settles launches (`launching.PreparedLaunches`).
    """
    # a function that wraps one of the library's has its name, and has to be called
    if row is None or not isinstance(row.implementation, str) or not can_pack():
        return None
    return getattr(importlib.import_module(row.source.partition(":")[0]), name, None)


class Settled:
    """What calls on operands like the first ones share."""

    def __init__(
        self, forward: Any, q: Tensor, k: Tensor, v: Tensor, mask: BSRTensor, scale: float
    ) -> None:
        self.pattern: BlockPattern = mask.block_pattern
        self.tables = (ROUTES.changes, KERNELS.changes)
        self.scale = scale
        self.index = q.device.index
        self.head_map = heads.list_of_head(self.pattern, q.shape[1])
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        self.strides = (q.stride(), k.stride(), v.stride(), out.stride())
        self.shapes = (q.shape, k.shape, v.shape)
        self.forward = forward(q, k, v, out, lse, self.pattern, self.head_map, scale)
        own = facts(q, k, v, self.pattern, bias=False, lengths=False, gradients=True)
        row = choose(BACKWARD, own)
        self.prepare_backward = prepared(row, "PreparedBackward")
        self.backward: Any = None

    def stream(self) -> int:
        """The current CUDA stream."""
        return torch._C._cuda_getCurrentRawStream(self.index)

    def gradients(
        self,
        settings: Settings,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, ...]:
        """`(dq, dk, dv)`, of an `out` that :attr:`forward` wrote."""
        strides = (q.stride(), k.stride(), v.stride(), dout.stride())
        addresses = q.data_ptr() | k.data_ptr() | v.data_ptr() | dout.data_ptr()
        addresses |= out.data_ptr() | lse.data_ptr()
        if (
            self.prepare_backward is not None
            and is_eager(dout)
            and dout.dtype == out.dtype == q.dtype
            and lse.dtype == torch.float32
            and lse.is_contiguous()
            and strides == self.strides  # a hook for saved tensors may have laid them out anew
            and (q.shape, k.shape, v.shape) == self.shapes
            and q.dtype == k.dtype == v.dtype
            and (self.backward is not None or not torch.cuda.is_current_stream_capturing())
            and out.stride() == self.strides[3]
            and addresses % 16 == 0
            and self.tables == (ROUTES.changes, KERNELS.changes)
            and torch._C._cuda_getDevice() == self.index
        ):
            if self.backward is None:
                operands = (dout, q, k, v, out, lse, self.pattern, self.head_map, self.scale)
                self.backward = self.prepare_backward(*operands)
            return self.backward(dout, q, k, v, out, lse, self.stream())
        rest = (self.pattern, self.scale, 0.0, None, None, None, False, *(None,) * 4)
        with restored(settings):
            return block_attention_backward_op(dout, None, q, k, v, out, lse, *rest)[:3]


class SettledAttention(torch.autograd.Function):
    """out; of the old form, whose `apply` costs 14 us less. Saves what `BlockAttention` saves:
    activation checkpointing may recompute one by the other.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BSRTensor, settled: Settled
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        settled.forward(q, k, v, out, lse, settled.stream())
        ctx.save_for_backward(q, k, v, None, mask, None, out, lse, None, None, None, None)
        ctx.settled, ctx.settings = settled, current()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, _, _, _, out, lse, *_ = ctx.saved_tensors
        return *ctx.settled.gradients(ctx.settings, dout, q, k, v, out, lse), None, None


def known(mask: BSRTensor, key: Any, settle: Callable[[], Any] | None) -> Any:
    """What an earlier call with the mask settled, or what `settle` makes, which is kept; None where
    there is neither, or another GPU is the current one.
    """
    kept = mask._recalled
    settled = None if kept is None else kept.get(key)
    if (
        settled is None
        or settled.pattern is not mask._pattern
        or settled.tables != (ROUTES.changes, KERNELS.changes)
    ):
        # lists that are made while a graph is captured are written when it is replayed
        if settle is None or is_capturing():
            return None
        settled = settle()
        if settled is None:
            return None
        if kept is None or len(kept) >= MOST:
            kept = mask._recalled = {}
        kept[key] = settled
    return settled if torch._C._cuda_getDevice() == settled.index else None


def recall(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    scale: Any,
    call: Any,
    settle: Callable[[], Settled | None] | None = None,
) -> Any:
    """The result of a call like an earlier one, or NotImplemented.

    `call` tells apart the ways to call attention, which check differently. Where there was no such
    call, `settle` makes what is then kept.
    """
    if not (type(q) is type(k) is type(v) is Tensor and q.is_cuda and is_eager(q)):
        return NotImplemented
    if scale is not None and type(scale) is not float:
        return NotImplemented
    if mask._recalled is None and settle is None:
        return NotImplemented
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 or not is_undisturbed(q.dtype):
        return NotImplemented
    key = (
        *(q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype),
        *(q.device, k.device, v.device, scale, call),
    )
    settled = known(mask, key, settle)
    if settled is None:
        return NotImplemented
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return apply(SettledAttention, q, k, v, mask, settled)
    out = torch.empty_like(q)
    settled.forward(q, k, v, out, None, settled.stream())
    return out


def recall_or_settle(
    q: Tensor, k: Tensor, v: Tensor, mask: BSRTensor, scale: float | None, call: Any
) -> Any:
    """The result of a call whose operands are checked, which later ones recall; NotImplemented
    where the usual way has to be taken.
    """
    return recall(q, k, v, mask, scale, call, lambda: _settle(q, k, v, mask, scale))


def _settle(
    q: Tensor, k: Tensor, v: Tensor, mask: BSRTensor, scale: float | None
) -> Settled | None:
    p = mask.block_pattern
    if q.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
        return None
    if v.shape[-1] != q.shape[-1] or q.numel() == 0 or k.numel() == 0 or p.num_blocks == 0:
        return None
    row = choose(OP, facts(q, k, v, p, bias=False, lengths=False))
    forward = prepared(row, "PreparedForward")
    if forward is None or torch._C._cuda_getDevice() != q.device.index:
        return None
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return Settled(forward, q, k, v, mask, scale)


def recall_sdpa(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of `scaled_dot_product_attention`, with its arguments as they came."""
    if not 3 <= len(args) <= 4:
        return NotImplemented
    given = len(args) + len(kwargs)
    q, k, v = args[:3]
    mask = args[3] if len(args) == 4 else kwargs.get("attn_mask")
    if not isinstance(mask, BSRTensor) or mask._recalled is None:
        return NotImplemented
    scale, gqa = kwargs.get("scale"), kwargs.get("enable_gqa", False)
    usual = kwargs.get("dropout_p", 0.0) == 0.0 and kwargs.get("is_causal", False) is False
    names = ("attn_mask", "scale", "enable_gqa", "dropout_p", "is_causal")
    if not usual or given != len(args) + sum(name in kwargs for name in names):
        return NotImplemented
    return recall(q, k, v, mask, scale, gqa)
