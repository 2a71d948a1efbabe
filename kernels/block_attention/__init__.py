"""block_attention: softmax(scale * q @ k.mT + bias, over the entries that a mask stores) @ v,
without the scores in memory.

Reached through `F.scaled_dot_product_attention(attn_mask=mask)` and, for what that has no argument
for, `sl.attention`. Gradients to q, k, v and the bias; the logsumexp is an output with a gradient
of its own. Backward recomputes the probabilities tile by tile. Several sequences in one call,
packed or padded, are an argument of every kernel (`sequences.py`).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_layouts import opaque
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.dispatch import (
    Facts,
    Use,
    current,
    facts_of,
    register_kernel,
    restored,
    route,
    run,
)
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.block_attention import heads, reference
from sparse_layouts.kernels.block_attention.checks import check_attention
from sparse_layouts.kernels.block_attention.length_checks import (
    Lengths,
    check_values,
    lengths_of,
)
from sparse_layouts.kernels.block_attention.sequences import (
    Sequences,
    packed_sequences,
    padded_sequences,
    sequences_of,
)
from sparse_layouts.layout_autograd import apply, differentiates, unwrapped

OP, BACKWARD = "block_attention", "block_attention_backward"
_HERE = "sparse_layouts.kernels.block_attention"
register_kernel(OP, "triton", f"{_HERE}.triton_forward:{OP}", requirements.triton_attention)
register_kernel(OP, "cpu", f"{_HERE}.cpu:{OP}", requirements.cpu)
register_kernel(
    BACKWARD, "triton", f"{_HERE}.triton_backward:{BACKWARD}", requirements.triton_attention
)
register_kernel(BACKWARD, "cpu", f"{_HERE}.cpu_backward:{BACKWARD}", requirements.cpu)


def facts(q: Tensor, v: Tensor, block_size: tuple[int, int]) -> Facts:
    """What the choice of a kernel depends on."""
    return facts_of(q, block_size=block_size, head_dim=max(q.shape[-1], v.shape[-1]))


def _dense_bytes(q: Tensor, k: Tensor, p: BlockPattern, sequences: Sequences | None) -> int:
    # the scores and the probabilities, in fp32 (fp64 for fp64)
    batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
    if sequences is not None:
        batch, (rows, columns) = sequences.num_sequences, p.shape
    return 2 * batch * q.shape[1] * rows * columns * max(4, q.element_size())


def _check_on_cpu(q: Tensor, k: Tensor, pattern: BlockPattern, sequences: Sequences | None) -> None:
    # in the op, so that compiled code checks too
    if sequences is not None and q.device.type == "cpu":
        check_values("attention", sequences, q.shape[2], k.shape[2], pattern.shape)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    bias_base: Tensor | None,
    *lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sequences = sequences_of(*lengths)
    _check_on_cpu(q, k, pattern, sequences)
    out, lse = run(
        OP,
        facts(q, v, pattern.block_size),
        reference.block_attention,
        _dense_bytes(q, k, pattern, sequences),
        q,
        k,
        v,
        pattern,
        heads.list_of_head(pattern, q.shape[1]),
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        bias=bias,
        bias_base=bias_base,
        sequences=sequences,
    )
    return _laid_out_as(out, q if q.shape[-1] == v.shape[-1] else _empty_output(q, v, "meta")), lse


def _empty_output(q: Tensor, v: Tensor, device: str | None = None) -> Tensor:
    """The output before it is written: laid out in memory as q is, where the head sizes allow."""
    if q.shape[-1] == v.shape[-1]:
        return torch.empty_like(q, device=device)
    return q.new_empty(*q.shape[:-1], v.shape[-1], device=device)


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of `torch.empty_like(like)`; kernels may return others, compiled code
    relies on these.
    """
    if x.shape == like.shape and x.stride() == like.stride():
        return x  # x is new and so without gaps: like has none either
    strides = torch.empty_like(like, device="meta").stride()
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _shape(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_output(q, v), q.new_empty(q.shape[:-1], dtype=dtype)


def _launch_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    bias_base: Tensor | None,
    bias_gradient: bool,
    *lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = sequences_of(*lengths)
    own = heads.OwnSlots(None, 0)
    if bias is not None and bias_gradient:
        own = heads.own_slots(pattern, q.shape[1])
    dq, dk, dv, dbias = run(
        BACKWARD,
        facts(q, v, pattern.block_size),
        reference.block_attention_backward,
        2 * _dense_bytes(q, k, pattern, sequences),
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        pattern,
        heads.list_of_head(pattern, q.shape[1]),
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        bias=bias,
        bias_base=bias_base,
        dbias_base=own.base,
        dbias_blocks=own.blocks,
        sequences=sequences,
    )
    dq, dk, dv = _laid_out_as(dq, q), _laid_out_as(dk, k), _laid_out_as(dv, v)
    if dbias is None or bias is None:
        return dq, dk, dv, q.new_empty(0)
    assert bias_base is not None
    return dq, dk, dv, heads.sum_shared(dbias, bias, bias_base, pattern, q.shape[1])


def _shape_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, wanted = rest[6], rest[8]  # of out, lse, the pattern, ..., bias_gradient
    dbias = torch.empty_like(bias) if bias is not None and wanted else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


# how sequences stand in a schema: what `sequences_of` takes
_LENGTHS = "Tensor? q_starts, Tensor? q_lens, Tensor? k_starts, Tensor? k_lens"
block_attention_op = opaque.define(
    OP,
    "Tensor q, Tensor k, Tensor v, {pattern}, float scale, float dropout_p, Tensor? seed, "
    f"Tensor? bias, Tensor? bias_base, {_LENGTHS}",
    _launch,
    _shape,
    "(Tensor, Tensor)",
)
block_attention_backward_op = opaque.define(
    BACKWARD,
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {pattern}, "
    "float scale, float dropout_p, "
    f"Tensor? seed, Tensor? bias, Tensor? bias_base, bool bias_gradient, {_LENGTHS}",
    _launch_backward,
    _shape_backward,
    "(Tensor, Tensor, Tensor, Tensor)",
)


class BlockAttention(torch.autograd.Function):
    """`(out, lse)`; q, k, v are 4-D, the bias a layout on the mask's blocks or None, the lengths
    what `sequences_of` takes.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: BSRTensor | None,
        mask: BSRTensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        q_starts: Tensor | None,
        q_lens: Tensor | None,
        k_starts: Tensor | None,
        k_lens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        pattern = mask.block_pattern
        values, base = heads.bias_arguments(bias, mask, q.shape[1])
        lengths = (q_starts, q_lens, k_starts, k_lens)
        return block_attention_op(q, k, v, pattern, scale, dropout_p, seed, values, base, *lengths)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, bias, mask, ctx.scale, ctx.dropout_p, seed, *lengths = inputs
        ctx.save_for_backward(q, k, v, bias, mask, seed, *output, *lengths)
        ctx.set_materialize_grads(False)
        ctx.settings = current()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, bias, mask, seed, out, lse, *lengths = ctx.saved_tensors
        bias, mask = unwrapped(bias), unwrapped(mask)
        if dout is None and dlse is None:
            return (None,) * 12
        if dout is None:
            dout = torch.zeros_like(out)
        wants_bias = bias is not None and ctx.needs_input_grad[3]
        with restored(ctx.settings):
            values, base = heads.bias_arguments(bias, mask, q.shape[1])
            dq, dk, dv, dbias = block_attention_backward_op(
                dout,
                dlse,
                q,
                k,
                v,
                out,
                lse,
                mask.block_pattern,
                ctx.scale,
                ctx.dropout_p,
                seed,
                values,
                base,
                wants_bias,
                *lengths,
            )
            grad_bias = heads.bias_gradient(dbias, bias) if wants_bias else None
        return dq, dk, dv, grad_bias, *(None,) * 8


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BSRTensor,
    scale: float | None,
    dropout_p: float,
    bias: BSRTensor | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of checked operands, 2-D to 4-D, differentiable."""
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    shape = q.shape[:-1]
    q, k, v = (_as_batch(t, lengths) for t in (q, k, v))
    batch = (
        max(q.shape[0], k.shape[0], v.shape[0]) if min(q.shape[0], k.shape[0], v.shape[0]) else 0
    )
    q, k, v = (t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in (q, k, v))
    sequences = _sequences(q, k, lengths)
    where = (None,) * 4 if sequences is None else sequences
    seed = None
    if dropout_p:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if differentiates(q, k, v, bias):
        out, lse = apply(BlockAttention, q, k, v, bias, mask, scale, dropout_p, seed, *where)
    else:
        out, lse = BlockAttention.forward(q, k, v, bias, mask, scale, dropout_p, seed, *where)
    if lengths is not None and lengths.packed:
        return out[0].transpose(0, 1).contiguous(), lse[0]
    if len(shape) < 3:
        return out.view(*shape, v.shape[-1]), lse.view(shape)
    return out, lse


def _as_batch(t: Tensor, lengths: Lengths | None) -> Tensor:
    """An operand as (B, H, N, D), without a copy; packed ones have batch 1."""
    if lengths is not None and lengths.packed:
        t = t.transpose(0, 1)
    return t[(None,) * (4 - t.dim())]


def _sequences(q: Tensor, k: Tensor, lengths: Lengths | None) -> Sequences | None:
    """What the kernels take, of 4-D operands."""
    if lengths is None:
        return None
    if lengths.packed:
        return packed_sequences(lengths.cu_seqlens_q, lengths.cu_seqlens_k)
    return padded_sequences(q, k, max(q.shape[0], k.shape[0]), *lengths[2:])


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = q.device.type
    if not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _uses(q: Tensor, k: Tensor, v: Tensor, mask: BSRTensor) -> list[Use]:
    own = facts(q, v, mask.block_size)
    uses = [Use("forward", OP, own)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        uses.append(Use("gradients", BACKWARD, own))
    return uses


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    check_attention(
        "attention", q, k, v, mask, bias=bias, dropout_p=dropout_p, scale=scale, lengths=lengths
    )
    q, k, v = _autocast(q, k, v)
    if bias is not None and bias.dtype != q.dtype:
        bias = cast(BSRTensor, bias.to(q.dtype))
    out, lse = attend(q, k, v, mask, scale, dropout_p, bias, lengths)
    return (out, lse) if return_lse else out


def uses_of_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    check_attention(
        "attention", q, k, v, mask, bias=bias, dropout_p=dropout_p, scale=scale, lengths=lengths
    )
    whole_q, whole_k = (_as_batch(t, lengths) for t in (q, k))
    _check_on_cpu(whole_q, whole_k, mask.block_pattern, _sequences(whole_q, whole_k, lengths))
    return _uses(*_autocast(q, k, v), mask)


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
    return attend(query, key, value, attn_mask, scale, dropout_p)[0]
