"""The calls that attention is reached by: torch's `scaled_dot_product_attention` and
`sl.attention`, with what they check and what they tell `sl.explain`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import Use, route
from sparse_layouts.dispatch.routes import find_route, shortcut
from sparse_layouts.kernels.block_attention import (
    BACKWARD,
    OP,
    as_batch,
    attend,
    check_lengths,
    facts,
    one_batch,
    sequences_in,
)
from sparse_layouts.kernels.block_attention.checks import check_attention
from sparse_layouts.kernels.block_attention.length_checks import lengths_of
from sparse_layouts.kernels.block_attention.recall import recall, recall_or_settle, recall_sdpa
from sparse_layouts.kernels.block_attention_fp8 import attend_fp8, uses_of_fp8
from sparse_layouts.kernels.block_attention_fp8.checks import check_fp8
from sparse_layouts.kernels.block_attention_fp8.operands import FP8Operand
from sparse_layouts.kernels.block_attention_fp8.recall import recall_fp8, recall_or_settle_fp8


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = q.device.type
    if not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _uses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BSRTensor,
    *,
    bias: bool = False,
    lengths: bool = False,
) -> list[Use]:
    p = mask.block_pattern
    if q.dim() == 4:
        q, k, v = one_batch(q, k, v)  # an expanded operand cannot be read by every kernel
    uses = [Use("forward", OP, facts(q, k, v, p, bias=bias, lengths=lengths))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        own = facts(q, k, v, p, bias=bias, lengths=lengths, gradients=True)
        uses.append(Use("gradients", BACKWARD, own))
    return uses


def attention(
    q: Tensor | FP8Operand,
    k: Tensor | FP8Operand,
    v: Tensor | FP8Operand,
    mask: BSRTensor,
    *,
    scale: float | None = None,
    bias: BSRTensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
) -> Any:
    """Attention of q to the keys that `mask` stores, with what torch's
    `scaled_dot_product_attention` has no argument for.

    q (B, H, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv), any strides; Hkv divides H, query head h
    reads KV head h // (H // Hkv). Leading dimensions may be left out ((H, N, D), (N, D)). `mask`
    (M, Nk), (H, M, Nk), (Hkv, M, Nk) or with a leading (B) or 1, M >= Nq: fewer queries than the
    mask has rows are its last ones. `scale`: 1 / sqrt(D) by default. `bias`: a layout of scores on
    the mask's blocks, e.g. `sl.sddmm(a, b, mask)`, added after scaling, with gradient. `dropout_p`
    drops probabilities, by torch's generator.

    Returns out (B, H, Nq, Dv) in q's dtype, with `return_lse` also the natural logsumexp (B, H,
    Nq), fp32 (fp64 for fp64), differentiable. A query that attends to nothing gives 0 and -inf.
    Deterministic. Raises `TypeError` and `ValueError` for operands that do not fit.

    **Sequences of several lengths.** The pattern is laid over each sequence from its own first key:
    its key c stands in column c, and its query r in row `k_len - q_len + r`, so that fewer queries
    than keys are the last ones (a chunk of a prompt, a step of decoding) and a query before the
    first key attends to nothing. `mask`, as above with B sequences for a pattern a sample, is as
    long as the longest sequence and need not match the operands. Lengths are int32 or int64, on q's
    device, and give the same results as every sequence alone:

    - packed, one after another: q (Tq, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv) with both
      `cu_seqlens_q` and `cu_seqlens_k` (B + 1,): 0, then where each sequence ends. Returns out (Tq,
      H, Dv), contiguous, and lse (H, Tq).
    - padded: q, k, v as above with any of `q_lens` (B,), whose queries are a sample's first rows
      (default: all), `kv_starts` (B,), where a sample's keys begin (left padding; default 0), and
      `kv_lens` (B,), how many there are (default: to the end).

    Rows that belong to no sequence are not read, NaN or not: they give 0 and -inf, and have zero
    gradient. A bias lies on the pattern too. Dropout draws by sequence, head, row and column of the
    pattern: packed and padded the same. Lengths on the CPU are checked (`ValueError` where they
    decrease or leave the tensors or the mask); on a GPU they are not read by the host but clamped
    to the tensors, and what lies beyond the mask is not attended to.

    **In 8 bits.** q, k and v may be what `sl.quantize_fp8(q, k, v)` made (all three): out is in the
    dtype that q had, to a few percent. Lengths as above; a bias, dropout and gradients raise
    `NotImplementedError`.

    >>> import torch, sparse_layouts as sl
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> out, lse = sl.attention(q, k, v, sl.causal(100, block_size=32), return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 2, 100, 16]), torch.Size([1, 2, 100]))
    >>> q = k = v = torch.randn(130, 2, 16)  # a sequence of 100 tokens, one of 30
    >>> ends = torch.tensor([0, 100, 130])
    >>> mask = sl.causal(100, block_size=32)
    >>> sl.attention(q, k, v, mask, cu_seqlens_q=ends, cu_seqlens_k=ends).shape
    torch.Size([130, 2, 16])
    """
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, q_lens, kv_lens, kv_starts)
    plain = bias is None and lengths is None and not dropout_p and not return_lse
    plain = plain and isinstance(mask, BSRTensor)
    if isinstance(q, FP8Operand) or isinstance(k, FP8Operand) or isinstance(v, FP8Operand):
        result = recall_fp8(q, k, v, mask, scale) if plain else NotImplemented
        if result is not NotImplemented:
            return result
        operands = check_fp8(
            "attention", q, k, v, mask, bias=bias, dropout_p=dropout_p, scale=scale, lengths=lengths
        )
        result = recall_or_settle_fp8(*operands, mask, scale) if plain else NotImplemented
        if result is not NotImplemented:
            return result
        out, lse = attend_fp8(*operands, mask, scale, lengths, return_lse)
        return (out, lse) if return_lse else out
    if plain:
        result = recall(q, k, v, mask, scale, "attention")
        if result is not NotImplemented:
            return result
    check_attention(
        "attention", q, k, v, mask, bias=bias, dropout_p=dropout_p, scale=scale, lengths=lengths
    )
    q, k, v = _autocast(q, k, v)
    if plain:
        result = recall_or_settle(q, k, v, mask, scale, "attention")
        if result is not NotImplemented:
            return result
    if bias is not None and bias.dtype != q.dtype:
        bias = cast(BSRTensor, bias.to(q.dtype))
    out, lse = attend(q, k, v, mask, scale, dropout_p, bias, lengths)
    return (out, lse) if return_lse else out


def uses_of_attention(
    q: Tensor | FP8Operand,
    k: Tensor | FP8Operand,
    v: Tensor | FP8Operand,
    mask: BSRTensor,
    *,
    scale: float | None = None,
    bias: BSRTensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
) -> list[Use]:
    """For `sl.explain`."""
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, q_lens, kv_lens, kv_starts)
    if isinstance(q, FP8Operand) or isinstance(k, FP8Operand) or isinstance(v, FP8Operand):
        operands = check_fp8(
            "attention", q, k, v, mask, bias=bias, dropout_p=dropout_p, scale=scale, lengths=lengths
        )
        return uses_of_fp8(*operands, mask, lengths)
    check_attention(
        "attention", q, k, v, mask, bias=bias, dropout_p=dropout_p, scale=scale, lengths=lengths
    )
    whole_q, whole_k = (as_batch(t, lengths) for t in (q, k))
    check_lengths(whole_q, whole_k, mask.block_pattern, sequences_in(whole_q, whole_k, lengths))
    q, k, v = _autocast(q, k, v)
    return _uses(q, k, v, mask, bias=bias is not None, lengths=lengths is not None)


attention.__explain__ = uses_of_attention  # type: ignore[attr-defined]


def uses_of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: BSRTensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """For `sl.explain`."""
    if not attn_mask.is_mask:
        return NotImplemented
    _check_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _uses(*_autocast(query, key, value), attn_mask)


def _check_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BSRTensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    what = "scaled_dot_product_attention"
    if is_causal:
        raise ValueError(
            f"{what}: attn_mask and is_causal=True exclude each other; make the mask causal: "
            f"mask & sl.causal(N, block_size=...)"
        )
    check_attention(what, q, k, v, mask, dropout_p=dropout_p, scale=scale, exact_rows=True)
    if not enable_gqa and q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        raise ValueError(
            f"{what}: {q.shape[-3]} query heads and {k.shape[-3]} KV heads need enable_gqa=True"
        )


@route(F.scaled_dot_product_attention, attn_mask=BSRTensor, uses=uses_of_sdpa)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: BSRTensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """SDPA with a block mask; a layout of floats is an additive mask whose missing entries are 0,
    as dense: the fallback.
    """
    if not attn_mask.is_mask:
        return NotImplemented
    _check_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    query, key, value = _autocast(query, key, value)
    if not dropout_p and _is_first(attn_mask):
        result = recall_or_settle(query, key, value, attn_mask, scale, enable_gqa)
        if result is not NotImplemented:
            return result
    return attend(query, key, value, attn_mask, scale, dropout_p)[0]


def _is_first(mask: BSRTensor) -> bool:
    """Whether no route of the mask's own class comes before the one here."""
    row = find_route(F.scaled_dot_product_attention, (), {"attn_mask": mask})
    return row is not None and row.handler is scaled_dot_product_attention


shortcut(F.scaled_dot_product_attention)(recall_sdpa)
