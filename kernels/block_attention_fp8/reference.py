"""block_attention_fp8, by definition: attention of what the operands in 8 bits stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_attention import reference as attention
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention_fp8.quantize import dequantize


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
    """`(out, lse)` of attention of `q * q_scale` to the keys `k * k_scale + k_shift` with the
    values `v * v_scale`.

    q (B, H, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv) in e4m3, any strides. Scales in fp32:
    q_scale (B, H, ceil(Nq / 128), 1) and k_scale (B, Hkv, ceil(Nk / 128), 1) of blocks of 128 rows
    of the tensor, wherever sequences begin; v_scale (B, Hkv, 1, Dv). k_shift (B, Hkv, 1, D) fp32 or
    None for 0: it does not change out, so that whoever wants no lse may leave it out. out (B, H,
    Nq, Dv) in `dtype`, lse in fp32 (fp64 for fp64). `pattern`, `head_map`, `scale` and `sequences`
    as in `block_attention`.

    A kernel may round the probabilities to e4m3 too, relative to the largest one of a row so far,
    and add up products as the tensor cores do.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    keys = dequantize(k, k_scale, work)
    if k_shift is not None:
        keys = keys + k_shift
    operands = (dequantize(q, q_scale, work), keys, dequantize(v, v_scale, work))
    out, lse = attention.block_attention(
        *operands, pattern, head_map, scale=scale, sequences=sequences
    )
    return out.to(dtype), lse
