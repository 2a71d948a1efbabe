"""block_attention_fp8 on Hopper, by the Gluon kernel of block_attention: both products of e4m3
factors, values by column, a scale of every row and of every tile of keys in the softmax's exponent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.hopper_forward import compilations_8_bits, forward_pass
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention_fp8.quantize import dequantize
from sparse_layouts.kernels.hopper_common import work_counter
from sparse_layouts.kernels.launching import PreparedLaunches


def block_attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_shift: Tensor | None,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as `reference.block_attention_fp8` defines them, in bf16 or fp16."""
    assert sequences is None, "its requirement excludes sequences"
    out = torch.empty(*q.shape[:-1], v.shape[-1], device=q.device, dtype=dtype)
    lse = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
    if lse.numel() == 0 or pattern.num_blocks == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    scales = (q_scale.contiguous(), k_scale.contiguous(), v_scale.contiguous())
    with torch.cuda.device_of(q):
        forward_pass(q, k, v, out, lse, pattern, head_map, scale, scales=scales).run()
    if k_shift is not None:
        # a number for each row, which changes no probability
        queries, group = dequantize(q, q_scale, torch.float32), q.shape[1] // k.shape[1]
        shift = k_shift.repeat_interleave(group, 1)
        added = scale * (queries * shift).sum(-1)
        lse = torch.where(lse.isneginf(), lse, lse + added)
    return out, lse


class PreparedForward:
    """Calls on operands like these, contiguous scales too: all but addresses is settled."""

    MOVING = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "out", "counter")

    @staticmethod
    def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether the operands are read where they are."""
        return True

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        pattern: BlockPattern,
        head_map: Tensor,
        scale: float,
    ) -> None:
        lse = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
        launch = forward_pass(q, k, v, out, lse, pattern, head_map, scale, scales=scales)
        launch.arguments["wants_lse"] = 0
        self._launches, self._device = PreparedLaunches([launch], self.MOVING), q.device

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_scale: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        out: Tensor,
        stream: int,
    ) -> None:
        """Writes `out`."""
        counter = work_counter(self._device, stream)
        self._launches.launch((q, k, v, q_scale, k_scale, v_scale, out, counter), stream)


def compilations() -> Iterator[Compilation]:
    """What the kernel's own file lists for 8 bits."""
    yield from compilations_8_bits()
