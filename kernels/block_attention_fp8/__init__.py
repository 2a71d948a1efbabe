"""block_attention_fp8: block_attention's forward with q, k and v in 8 bits (e4m3) and scales.

Reached through `sl.attention` with the operands that `sl.quantize_fp8` makes (`operands.py`);
`quantize.py` says how numbers are rounded. No bias, no dropout, no gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_layouts import opaque
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import (
    Facts,
    Use,
    capability_of,
    choose,
    facts_of,
    register_kernel,
    run,
)
from sparse_layouts.kernels import block_attention, requirements
from sparse_layouts.kernels.block_attention import heads
from sparse_layouts.kernels.block_attention.length_checks import Lengths
from sparse_layouts.kernels.block_attention.sequences import sequences_of
from sparse_layouts.kernels.block_attention_fp8 import reference
from sparse_layouts.kernels.block_attention_fp8.operands import FP8Operand

OP = "block_attention_fp8"
_HERE = "sparse_layouts.kernels.block_attention_fp8"
register_kernel(OP, "hopper", f"{_HERE}.hopper_forward:{OP}", requirements.hopper_attention_fp8)
register_kernel(OP, "triton", f"{_HERE}.triton_forward:{OP}", requirements.triton_attention_fp8)
register_kernel(OP, "dequantized", f"{_HERE}.dequantized:{OP}", requirements.dequantized_attention)


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    block_size: tuple[int, int],
    *,
    lengths: bool,
) -> Facts:
    """What the choice of a kernel depends on; the dtype is the result's."""
    own = facts_of(
        q,
        block_size=block_size,
        head_dim=max(q.shape[-1], v.shape[-1]),
        lengths=lengths,
        tma=capability_of(q.device) == (9, 0)
        and v.shape[-1] % 8 == 0  # the result's rows, of 16 bits
        and all(t.shape[-1] > 0 and block_attention.steps_fit(t) for t in (q, k, v.mT)),
    )
    return own._replace(dtype=dtype)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_shift: Tensor | None,
    pattern: BlockPattern,
    scale: float,
    dtype: torch.dtype,
    *lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sequences = sequences_of(*lengths)
    block_attention.check_lengths(q, k, pattern, sequences)
    out, lse = run(
        OP,
        facts(q, k, v, dtype, pattern.block_size, lengths=sequences is not None),
        reference.block_attention_fp8,
        block_attention.dense_bytes(q, k, pattern, sequences),
        q,
        k,
        v,
        q_scale,
        k_scale,
        v_scale,
        k_shift,
        pattern,
        heads.list_of_head(pattern, q.shape[1]),
        scale=scale,
        dtype=dtype,
        sequences=sequences,
    )
    return out.contiguous(), lse


def _shape(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = rest[6]  # of the scales, the shift, the pattern, the scale, ...
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=dtype)
    return out, q.new_empty(q.shape[:-1], dtype=accumulator)


block_attention_fp8_op = opaque.define(
    OP,
    "Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, "
    "Tensor? k_shift, {pattern}, float scale, ScalarType dtype, "
    f"{block_attention.LENGTHS_SCHEMA}",
    _launch,
    _shape,
    "(Tensor, Tensor)",
)


def attend_fp8(
    q: FP8Operand,
    k: FP8Operand,
    v: FP8Operand,
    mask: BSRTensor,
    scale: float | None,
    lengths: Lengths | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of checked operands; without `with_lse`, lse is that of the keys as they are
    kept.
    """
    scale = 1.0 / math.sqrt(max(q.data.shape[-1], 1)) if scale is None else float(scale)
    shape = q.data.shape[:-1]
    (q8, q_scale, _), (k8, k_scale, k_shift), (v8, v_scale, _) = (
        t.four_dimensional() for t in (q, k, v)
    )
    sizes = [q8.shape[0], k8.shape[0], v8.shape[0]]
    batch = max(sizes) if min(sizes) else 0

    def expanded(t: Tensor) -> Tensor:
        return t if t.shape[0] == batch else t.expand(batch, *t.shape[1:])

    given = (expanded(t) for t in (q8, k8, v8, q_scale, k_scale, v_scale))
    shift = expanded(k_shift) if with_lse and k_shift is not None else None
    sequences = block_attention.sequences_in(q8, k8, lengths)
    where = (None,) * 4 if sequences is None else sequences
    out, lse = block_attention_fp8_op(*given, shift, mask.block_pattern, scale, q.dtype, *where)
    if q.packed:
        return out[0].transpose(0, 1).contiguous(), lse[0]
    if len(shape) < 3:
        return out.view(*shape, out.shape[-1]), lse.view(shape)
    return out, lse


def uses_of_fp8(
    q: FP8Operand, k: FP8Operand, v: FP8Operand, mask: BSRTensor, lengths: Lengths | None
) -> list[Use]:
    """For `sl.explain`: the op and, where it only dequantises, the one that then attends."""
    from sparse_layouts.kernels.block_attention_fp8.dequantized import work_dtype

    q8, k8, v8 = block_attention.one_batch(*(t.four_dimensional()[0] for t in (q, k, v)))
    sequences = block_attention.sequences_in(q8, k8, lengths)
    block_attention.check_lengths(q8, k8, mask.block_pattern, sequences)
    own = facts(q8, k8, v8, q.dtype, mask.block_size, lengths=lengths is not None)
    found = [Use("forward", OP, own)]
    row = choose(OP, own)
    if row is not None and row.name == "dequantized":
        aligned = all(t.shape[-1] and t.shape[-1] % 8 == 0 for t in (q8, v8))
        tma = own.capability == (9, 0) and aligned
        then = own._replace(dtype=work_dtype(q.dtype), tma=tma)
        found.append(Use("its attention", block_attention.OP, then))
    return found
