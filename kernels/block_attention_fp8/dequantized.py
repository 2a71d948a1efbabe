"""block_attention_fp8 where no tensor core multiplies 8 bits: by attention in 16 bits or more."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_attention import run_forward
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention_fp8.quantize import dequantize


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what attention is computed whose result is in `dtype`: fp16 has too few exponents for what
    e4m3 and a scale stand for.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype


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
    """`(out, lse)` as the reference defines them, by the kernel that `block_attention` chooses."""
    work = work_dtype(dtype)
    queries = dequantize(q, q_scale, work)
    operands = (queries, dequantize(k, k_scale, work), dequantize(v, v_scale, work))
    out, lse = run_forward(*operands, pattern, head_map, scale=scale, sequences=sequences)
    if k_shift is not None:
        # added to the keys it would need their digits: it goes to the logsumexp alone
        group = q.shape[1] // k.shape[1]
        shift = k_shift.repeat_interleave(group, 1).to(lse.dtype)
        added = scale * (queries.to(lse.dtype) @ shift.mT)[..., 0]
        lse = torch.where(lse.isneginf(), lse, lse + added)
    return out.to(dtype), lse
