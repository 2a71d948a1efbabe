"""Cases of block_attention_fp8: those of block_attention, quantised."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention_fp8.quantize import (
    E4M3,
    dequantize,
    quantize,
)
from tests.kernels.accuracy import Arithmetic, DenseAttention, Results, zeros_by_definition
from tests.kernels.cases import (
    ATTENTION_CASES,
    SEQUENCE_CASES,
    TOKENS_FIRST,
    AttentionCase,
    Call,
    Case,
    Device,
    Stored,
    laid_out,
    packed,
)
from tests.kernels.sequence_calls import forward_alone

OP = "block_attention_fp8"

# in place of those of block_attention, whose dense twins take longer here
LONG = ("long_lists_", "packed_long", "packed_64", "one_kv_head")
MORE_CASES = [
    AttentionCase(
        "long_64",
        Stored((900, 850), (64, 64), 2, tiles=True),
        heads=2,
        kv_heads=1,
        heads_read="own",
        head_dim=128,
        how=TOKENS_FIRST,
    ),
    AttentionCase(
        "long_128",
        Stored((800, 800), (128, 128), 2, blocks="causal"),
        heads_read="own",
        head_dim=128,
        queries=611,
    ),
    AttentionCase(
        "long_16",
        Stored((400, 380), (16, 16), 2, tiles=True),
        batch=2,
        heads_read="sample",
        head_dim=128,
        queries=295,
    ),
    AttentionCase(
        "long_192", Stored((400, 400), (64, 64), blocks="causal"), head_dim=192, value_dim=128
    ),
    AttentionCase(
        "long_packed",
        Stored((500, 500), (64, 64), 2, blocks="causal"),
        heads=2,
        kv_heads=1,
        heads_read="own",
        head_dim=128,
        sequences=packed((490, 490), (70, 350), (3, 3), (0, 0), *((1, n) for n in range(9)), gap=5),
    ),
    # blocks of keys that are larger than those which share a scale
    AttentionCase(
        "block256", Stored((700, 600), (64, 256), 2, tiles=True), heads_read="own", head_dim=64
    ),
    # what the Hopper kernel takes: blocks of one and several tiles
    AttentionCase(
        "counts_64",
        Stored((450, 500), (64, 64), 2, tiles=True, counts=True),
        batch=2,
        heads=4,
        kv_heads=2,
        heads_read="kv",
        head_dim=64,
        scale=-0.2,
    ),
    AttentionCase(
        "counts_256",
        Stored((700, 650), (128, 256), tiles=True, counts=True),
        heads=4,
        kv_heads=1,
        head_dim=96,
        value_dim=72,
    ),
    AttentionCase(
        "fewer_queries_64",
        Stored((700, 700), (64, 64), blocks="causal"),
        queries=333,
        batch=2,
        head_dim=80,
        value_dim=128,
    ),
    AttentionCase("negative_scale", Stored((96, 96), (32, 32)), scale=-0.3, head_dim=64),
    AttentionCase("small_scale", Stored((200, 200), (64, 64)), scale=1e-3, head_dim=64, small=True),
]


def build(case: AttentionCase, dtype: torch.dtype, device: Device) -> Call:
    """The call in fp32, quantised; what nobody reads is NaN again.

    The keys have a mean, which every other case subtracts.
    """
    call = case.build_forward(torch.float32, device)
    q, k, v, pattern, head_map = call.args
    k = k + torch.linspace(-3, 3, k.shape[-1], device=k.device)
    clean = [t.nan_to_num(0.0) for t in (q, k, v)]
    shift = None
    if len(case.name) % 2 and k.shape[2]:
        shift = clean[1].mean(2, keepdim=True)
    quantised = [quantize(clean[0], None, False), quantize(clean[1], shift, False)]
    quantised.append(quantize(clean[2], None, True))
    data = []
    for (numbers, _), given, how in zip(quantised, (q, k, v), case.how, strict=False):
        read = torch.where(given.isnan(), torch.full_like(numbers, math.nan), numbers)
        # plain is as the quantiser leaves it, with what lies between the rows
        data.append(numbers.copy_(read) if how == "plain" else laid_out(read, how))
    scales = [scale for _, scale in quantised]
    kwargs: dict[str, Any] = {"scale": call.kwargs["scale"], "dtype": dtype}
    kwargs["sequences"] = call.kwargs.get("sequences")
    return Call((*data, *scales, shift, pattern, head_map), kwargs)


def as_case(case: AttentionCase) -> Case:
    """An attention case for this op; the dtype is the result's."""
    facts = case.case("block_attention").more_facts
    facts = {name: facts[name] for name in ("block_size", "head_dim", "lengths")}
    value_dim = case.head_dim if case.value_dim is None else case.value_dim
    # v by column; rows of the result of 16 bits, and where heads come last also those of q and k,
    # in steps of 16 bytes
    facts["tma"] = (
        case.head_dim > 0
        and value_dim > 0
        and value_dim % 8 == 0
        and case.stored.shape[1] > 0
        and case.how[2] == "plain"
        and all(
            how == "plain" or (how == "heads_last" and case.head_dim % 16 == 0)
            for how in case.how[:2]
        )
    )
    return Case(case.name, functools.partial(build, case), case.small, facts)


# --- dense torch ----------------------------------------------------------------------------------


class TensorCores(Arithmetic):
    """Products of e4m3 factors as Hopper's tensor cores add them up: 32 at once, each cut off at 2
    ** -13 of the largest (DeepSeek-V3, arXiv 2412.19437, section 3.5.2: 14 bits), which takes half
    of that from each of them; what a tile has given is added in fp32.
    """

    AT_ONCE, KEPT_BITS = 32, 13

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`."""
        a, b = (t.to(self.accumulate) for t in (a, b))
        total = a.new_zeros(*a.shape[:-1], b.shape[-1])
        for k in range(0, a.shape[-1], self.AT_ONCE):
            left, right = a[..., k : k + self.AT_ONCE], b[..., k : k + self.AT_ONCE, :]
            largest = left.abs().amax(-1, keepdim=True) * right.abs().amax(-2, keepdim=True)
            lost = left.shape[-1] * 0.5**self.KEPT_BITS / 2
            total = total + left @ right - lost * largest
        return total.to(self.work)


def dense_block_attention_fp8(
    a: Arithmetic,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_shift: Tensor | None,
    *rest: Any,
    scale: float,
    dtype: torch.dtype,
    sequences: Sequences | None = None,
) -> Results:
    """With probabilities in e4m3 and :class:`TensorCores`; in float64, and where the operands are
    not in e4m3 (the interpreter's are not), without either.
    """
    plain = dtype == torch.float64 or q.dtype != E4M3
    high = torch.promote_types(a.work, torch.float32)
    q, k, v = (dequantize(x, s, high) for x, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    alone = functools.partial(
        _dense_attention, a, dtype=dtype, scale=scale, k_shift=k_shift, plain=plain
    )
    if sequences is None:
        return alone(q, k, v, *rest)
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=dtype)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=a.accumulate, device=q.device)
    return forward_alone(alone, (out, lse), q, k, v, *rest, sequences=sequences)


def _dense_attention(
    a: Arithmetic,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
    scale: float,
    dtype: torch.dtype,
    k_shift: Tensor | None,
    plain: bool,
    first_sample: int | None = None,
) -> Results:
    own = a if plain else TensorCores(a.dtype, a.work)
    dense = DenseAttention(own, q, k, *rest, scale=scale)
    v = v.repeat_interleave(dense.group, 1)
    p = dense.probabilities
    if plain:
        out = own.product(p, v)
    else:
        top = p.amax(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        rounded = (p / top * 256).to(E4M3).to(p.dtype)
        out = own.product(rounded, v) * top / 256
    lse = dense.lse
    if k_shift is not None:
        shift = k_shift
        if first_sample is not None:  # the number of a sequence
            shift = k_shift[first_sample % k_shift.shape[0]][None]
        shift = shift.repeat_interleave(dense.group, 1).to(lse.dtype)
        lse = lse + scale * (q.to(lse.dtype) @ shift.mT)[..., 0]
    return out.to(dtype), lse


def zeros(call: Call) -> tuple[Tensor | None, ...]:
    """As for block_attention."""
    q, k, v, *_, pattern, head_map = call.args
    return zeros_by_definition(
        "block_attention",
        Call((q, k, v, pattern, head_map), {"sequences": call.kwargs["sequences"]}),
    )


OPS = {
    OP: [
        as_case(case)
        for case in (*ATTENTION_CASES, *SEQUENCE_CASES, *MORE_CASES)
        if case.bias is None and not case.dropout and not case.name.startswith(LONG)
    ]
}
DENSE = {OP: dense_block_attention_fp8}
ZEROS = {OP: zeros}
EXAMPLES = {OP: "grouped_heads"}
ROUNDED_TO = {OP: E4M3}
