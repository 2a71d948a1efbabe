"""q, k and v in 8 bits: what `sl.quantize_fp8` makes and `sl.attention` takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_layouts.kernels.block_attention_fp8.quantize import by_row, quantize_op
from sparse_layouts.layout_autograd import differentiates
from sparse_layouts.layout_tensor import LayoutTensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class FP8Operand(NamedTuple):
    """A q, k or v of attention in 8 bits: `data * scale + shift` is about what it was made of.

    Made by `sl.quantize_fp8`, taken by `sl.attention`. Of a tensor (B, H, N, D), or (H, N, D) or
    (N, D); rows come first where it is packed, (N, H, D), here too:

    field | shape | dtype | invariant
    ---|---|---|---
    `data` | the tensor's | float8_e4m3fn | rows of q and k, columns of v contiguous (else copied)
    `scale` | q, k: (B, H, ceil(N / 128), 1); v: (B, H, 1, D) | float32 | powers of two are exact
    `shift` | (B, H, 1, D) or None | float32 | of k: the mean over rows, which `data` is without
    `dtype` | | | the tensor's; attention's result has q's
    `packed` | | bool | whether `data` is (N, H, D)

    Memory: a byte an entry, of D (in v of N) rounded up to a multiple of 16, and the scales.

    >>> import torch, sparse_layouts as sl
    >>> x = torch.randn(1, 2, 100, 16)
    >>> q, k, v = sl.quantize_fp8(x, x, x)
    >>> q.data.dtype, q.scale.shape, k.shift.shape
    (torch.float8_e4m3fn, torch.Size([1, 2, 1, 1]), torch.Size([1, 2, 1, 16]))
    >>> bool(((q.dequantize() - x).abs() <= x.abs() / 16 + q.scale / 1024).all())
    True
    """

    data: Tensor
    scale: Tensor
    shift: Tensor | None = None
    dtype: torch.dtype = torch.bfloat16
    packed: bool = False

    def dequantize(self) -> Tensor:
        """What the operand stands for, in `dtype` and with the shape of `data`."""
        data, scale, shift = self.four_dimensional()
        x = data.float() * by_row(scale, data.shape[2])
        x = (x if shift is None else x + shift).to(self.dtype)
        return x[0].transpose(0, 1) if self.packed else x.reshape(self.data.shape)

    def four_dimensional(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`data`, `scale` and `shift` as (B, H, rows, columns), without a copy."""
        data, scale = (as_batch(t, self.packed) for t in (self.data, self.scale))
        return data, scale, None if self.shift is None else as_batch(self.shift, self.packed)


def as_batch(t: Tensor, packed: bool) -> Tensor:
    """(B, H, N, D) of a tensor of fewer dimensions, or (1, H, N, D) of one (N, H, D)."""
    if packed:
        t = t.transpose(0, 1)
    return t[(None,) * (4 - t.dim())]


def quantize_fp8(
    q: Tensor | FP8Operand,
    k: Tensor | FP8Operand,
    v: Tensor | FP8Operand,
    *,
    smooth_k: bool = True,
    packed: bool = False,
) -> tuple[FP8Operand, FP8Operand, FP8Operand]:
    """q, k and v of attention in 8 bits (e4m3), for `sl.attention(q, k, v, mask)`: for GPUs
    whose tensor cores multiply them (compute capability 8.9 or newer); some 25 times less exact
    than bf16. Elsewhere attention multiplies what they stand for in bf16 or more.

    q (B, H, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv) in bf16, fp16 or fp32, any strides,
    leading dimensions may be left out; with `packed` (T, H, D), rows of sequences one after
    another, for `cu_seqlens_q` and `cu_seqlens_k`. What is an `sl.FP8Operand` already comes back
    as it is: keys and values of a prompt are quantised once, the queries of every step anew.

    Scales are powers of two that bring the largest magnitude down to 448: of q and k one for 128
    rows of a head; of v one for each column (channel) of a head, which the result is multiplied by
    once. That is as exact as finer ones: e4m3 keeps the digits of a number whatever its size, 2 **
    -4 of it at least, down to 2 ** -15 of the block's largest. `smooth_k` subtracts from the keys
    their mean over all rows, after SageAttention (Zhang et al., arXiv 2410.02367, section 4.2):
    every score of a query changes by the same, the probabilities not at all, and `attention` gives
    the logsumexp of the keys as they were.

    Relative error of attention (Frobenius norm, against fp64; dense causal, 4 heads, N 1024, D 128,
    bf16 operands, 2026-11-26, on the CPU with probabilities rounded to e4m3 as the kernel does;
    bf16: 0.2% in all rows). `python benchmarks/attention.py --only FP8` measures it on a GPU:

    q, k and v | 8 bits | without `smooth_k`
    ---|---|---
    normal | 4.6% | 4.7%
    channels of k with means of N(0, 1) / N(0, 9) | 4.6% / 4.6% | 5.2% / 8.2%
    4 of the channels of k 8 times as large | 7.8% | 8.0%

    Each scale is computed in fp32. NaN and infinities make NaN of all that shares their scale, in k
    with `smooth_k` of the whole head. Rows that belong to no sequence must be finite too.

    Raises `TypeError` for other dtypes, `ValueError` for other shapes, and `NotImplementedError`
    where a gradient is asked for: 8 bits have no backward here.

    >>> import torch, sparse_layouts as sl
    >>> q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    >>> mask = sl.causal(300, block_size=64)
    >>> out = sl.attention(*sl.quantize_fp8(q, k, v), mask)
    >>> exact = sl.attention(q, k, v, mask)
    >>> bool((out - exact).norm() < 0.1 * exact.norm())
    True
    """
    given = {"q": q, "k": k, "v": v}
    for name, t in given.items():
        _check(name, t, packed)
    return (
        _quantized(q, packed, smooth=False, by_column=False),
        _quantized(k, packed, smooth=smooth_k, by_column=False),
        _quantized(v, packed, smooth=False, by_column=True),
    )


def _check(name: str, t: Any, packed: bool) -> None:
    what = "quantize_fp8"
    if isinstance(t, FP8Operand):
        if t.packed != packed:
            raise ValueError(
                f"{what}: {name} was quantised with packed={t.packed}, expected packed={packed}"
            )
        return
    if not isinstance(t, Tensor) or isinstance(t, LayoutTensor):
        raise TypeError(f"{what}: {name} is a dense tensor or FP8Operand, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{what}: {name} is bfloat16, float16 or float32, got {t.dtype}; convert with "
            f".to(dtype)"
        )
    if packed and t.dim() != 3:
        raise ValueError(
            f"{what}: packed {name} is (T, H, D), sequences one after another, got shape "
            f"{tuple(t.shape)}"
        )
    if not 2 <= t.dim() <= 4:
        raise ValueError(
            f"{what}: {name} is (B, H, N, D), (H, N, D) or (N, D), got shape {tuple(t.shape)}"
        )
    check_no_gradient(what, name, t)


def check_no_gradient(what: str, name: str, *tensors: Tensor | None) -> None:
    """Raises `NotImplementedError` where the call would have to be differentiated."""
    if differentiates(*tensors):
        raise NotImplementedError(
            f"{what}: {name} asks for a gradient, and operands in 8 bits have none; pass bfloat16 "
            f"to sl.attention to train, or quantise under torch.no_grad()"
        )


def _quantized(
    t: Tensor | FP8Operand, packed: bool, *, smooth: bool, by_column: bool
) -> FP8Operand:
    if isinstance(t, FP8Operand):
        return t
    x = as_batch(t, packed)
    shift = None
    if smooth and x.shape[2]:
        shift = x.mean(2, keepdim=True, dtype=torch.float32)
    data, scale = quantize_op(x, shift, by_column)

    missing = 4 - t.dim()

    def as_given(made: Tensor) -> Tensor:
        if packed:
            return made[0].transpose(0, 1)
        return made[(0,) * missing] if missing else made

    shift = None if shift is None else as_given(shift)
    return FP8Operand(as_given(data), as_given(scale), shift, t.dtype, packed)
