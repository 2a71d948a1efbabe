"""block_attention: softmax(scale * q @ k.mT + bias, over the entries that a mask stores) @ v,
without the scores in memory.

Reached through `F.scaled_dot_product_attention(attn_mask=mask)` and, for what that has no argument
for, `sl.attention`. Gradients to q, k, v and the bias; the logsumexp is an output with a gradient
of its own. Backward recomputes the probabilities tile by tile. Several sequences in one call,
packed or padded, are an argument of every kernel (`sequences.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_layouts import opaque
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.derived import derived
from sparse_layouts.dispatch import (
    Facts,
    capability_of,
    current,
    facts_of,
    register_kernel,
    restored,
    run,
)
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.block_attention import heads, reference
from sparse_layouts.kernels.block_attention.length_checks import (
    Lengths,
    check_values,
)
from sparse_layouts.kernels.block_attention.sequences import (
    Sequences,
    packed_sequences,
    padded_sequences,
    sequences_of,
)
from sparse_layouts.kernels.block_attention.tile_schedule import (
    TILE_ROWS,
    fill_both_ways,
    tile_fill,
)
from sparse_layouts.layout_autograd import apply, differentiates, unwrapped

OP, BACKWARD = "block_attention", "block_attention_backward"
_HERE = "sparse_layouts.kernels.block_attention"
register_kernel(OP, "hopper", f"{_HERE}.hopper_forward:{OP}", requirements.hopper_attention_forward)
register_kernel(OP, "triton", f"{_HERE}.triton_forward:{OP}", requirements.triton_attention)
register_kernel(OP, "cpu", f"{_HERE}.cpu:{OP}", requirements.cpu)
register_kernel(
    BACKWARD,
    "hopper",
    f"{_HERE}.hopper_backward:{BACKWARD}",
    requirements.hopper_attention_backward,
)
register_kernel(
    BACKWARD,
    "hopper_two_passes",
    f"{_HERE}.hopper_two_passes:{BACKWARD}",
    requirements.hopper_attention_two_passes,
)
register_kernel(
    BACKWARD, "triton", f"{_HERE}.triton_backward:{BACKWARD}", requirements.triton_attention
)
register_kernel(BACKWARD, "cpu", f"{_HERE}.cpu_backward:{BACKWARD}", requirements.cpu)


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    bias: bool,
    lengths: bool,
    gradients: bool = False,
) -> Facts:
    """What the choice of a kernel depends on, for the `gradients` or else for out; operands are 2-D
    to 4-D.
    """
    hopper = capability_of(q.device) == (9, 0)
    fill = 0.0
    if hopper and not lengths:
        block = max(pattern.block_size)
        if gradients and block < TILE_ROWS:
            fill = fill_both_ways(pattern)
        elif not gradients and block < TILE_ROWS // 2:
            fill = tile_fill(pattern)
    return facts_of(
        q,
        block_size=pattern.block_size,
        head_dim=max(q.shape[-1], v.shape[-1]),
        bias=bias,
        lengths=lengths,
        tma=hopper and all(map(_tma_readable, (q, k, v))),
        head_bytes=_head_bytes(q, k, pattern) if hopper else 0,
        fill=int(16 * fill),
    )


def _head_bytes(q: Tensor, k: Tensor, p: BlockPattern) -> int:
    """Bytes of the scores that a key head stores at most, blocks counted whole; 0 where all lists
    together have so few blocks that it does not matter.
    """
    group = 1 if q.dim() < 3 else q.shape[-3] // max(1, k.shape[-3])
    each = group * math.prod(p.block_size) * q.element_size()
    if p.num_blocks * each <= requirements.HOPPER_WORKSPACE_BYTES // 2:
        return 0

    def most_blocks() -> int:
        return int((p.crow_indices[:, -1] - p.crow_indices[:, 0]).amax())

    return derived(p, "most_blocks", most_blocks) * each


def _tma_readable(x: Tensor) -> bool:
    """Whether Hopper's copy engine can read x (B, H, N, D), and write a result like it."""
    return x.shape[-1] > 0 and x.shape[-1] * x.element_size() % 16 == 0 and steps_fit(x)


def steps_fit(x: Tensor) -> bool:
    """Whether Hopper's copy engine can read x (B, H, N, D): rows unbroken, in steps of 16 bytes."""
    *outer, last = x.stride()
    steps = [step for size, step in zip(x.shape, outer, strict=False) if size > 1]
    bytes_of = x.element_size()
    return (
        last == 1
        and all(step > 0 and step * bytes_of % 16 == 0 for step in steps)
        and x.data_ptr() % 16 == 0
    )


def dense_bytes(q: Tensor, k: Tensor, p: BlockPattern, sequences: Sequences | None) -> int:
    """What the reference makes dense: scores and probabilities, in fp32 (fp64 for fp64)."""
    batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
    if sequences is not None:
        batch, (rows, columns) = sequences.num_sequences, p.shape
    return 2 * batch * q.shape[1] * rows * columns * max(4, q.element_size())


def check_lengths(q: Tensor, k: Tensor, pattern: BlockPattern, sequences: Sequences | None) -> None:
    """Raises `ValueError` for lengths on the CPU that do not fit; in the op, so that compiled code
    checks too.
    """
    if sequences is not None and q.device.type == "cpu":
        check_values("attention", sequences, q.shape[2], k.shape[2], pattern.shape)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    bias: Tensor | None = None,
    sequences: Sequences | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` by the first kernel whose requirements hold; arguments as the reference's."""
    return run(
        OP,
        facts(q, k, v, pattern, bias=bias is not None, lengths=sequences is not None),
        reference.block_attention,
        dense_bytes(q, k, pattern, sequences),
        q,
        k,
        v,
        pattern,
        head_map,
        bias=bias,
        sequences=sequences,
        **options,
    )


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
    check_lengths(q, k, pattern, sequences)
    out, lse = run_forward(
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
        facts(
            q,
            k,
            v,
            pattern,
            bias=bias is not None,
            lengths=sequences is not None,
            gradients=True,
        ),
        reference.block_attention_backward,
        2 * dense_bytes(q, k, pattern, sequences),
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
LENGTHS_SCHEMA = "Tensor? q_starts, Tensor? q_lens, Tensor? k_starts, Tensor? k_lens"
block_attention_op = opaque.define(
    OP,
    "Tensor q, Tensor k, Tensor v, {pattern}, float scale, float dropout_p, Tensor? seed, "
    f"Tensor? bias, Tensor? bias_base, {LENGTHS_SCHEMA}",
    _launch,
    _shape,
    "(Tensor, Tensor)",
)
block_attention_backward_op = opaque.define(
    BACKWARD,
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {pattern}, "
    "float scale, float dropout_p, "
    f"Tensor? seed, Tensor? bias, Tensor? bias_base, bool bias_gradient, {LENGTHS_SCHEMA}",
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
    q, k, v = (as_batch(t, lengths) for t in (q, k, v))
    q, k, v = one_batch(q, k, v)
    sequences = sequences_in(q, k, lengths)
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


def one_batch(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands (B or 1, H, N, D), those of batch 1 expanded to the others'."""
    sizes = [t.shape[0] for t in operands]
    batch = max(sizes) if min(sizes) else 0
    return tuple(t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in operands)


def as_batch(t: Tensor, lengths: Lengths | None) -> Tensor:
    """An operand as (B, H, N, D), without a copy; packed ones have batch 1."""
    if lengths is not None and lengths.packed:
        t = t.transpose(0, 1)
    return t[(None,) * (4 - t.dim())]


def sequences_in(q: Tensor, k: Tensor, lengths: Lengths | None) -> Sequences | None:
    """What the kernels take, of 4-D operands."""
    if lengths is None:
        return None
    if lengths.packed:
        return packed_sequences(lengths.cu_seqlens_q, lengths.cu_seqlens_k)
    return padded_sequences(q, k, max(q.shape[0], k.shape[0]), *lengths[2:])
