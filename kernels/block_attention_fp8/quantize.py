"""Rounding q, k and v to e4m3 with scales: in plain torch, which defines what a kernel must give,
and the choice between the two.

e4m3 has a sign, four bits of exponent and three of mantissa: numbers from 2 ** -6 to 448 are kept
to 2 ** -4 of themselves, below that to 2 ** -10. That is 15 powers of two, so that the rows which
share a scale hardly matter to the error. Scales are powers of two: dividing by them and multiplying
again is exact.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_layouts import opaque
from sparse_layouts.dispatch import facts_of
from sparse_layouts.kernels import requirements

E4M3 = torch.float8_e4m3fn
# Rows of q and of k that share a scale: a tile of 64 or 128 rows lies within one such block.
ROWS_PER_SCALE = 128
# What is smaller than this times 448 in a whole block is not scaled up further: products of two
# scales stay normal numbers of fp32.
SMALLEST_SCALE = 2.0**-60
# Rows of q and k and columns of v begin at multiples of 16 bytes, as copies of whole words want.
ALIGNED = 16
# bits of fp32 numbers
_MANTISSA_BITS, _MANTISSA, _BIAS = 23, 0x7FFFFF, 127
# 448 = 1.75 * 2 ** 8: the mantissa up to which 2 ** 8 is room enough
_LARGEST_MANTISSA, _LARGEST_EXPONENT = 0x600000, 8


def scale_of(peak: Tensor) -> Tensor:
    """The smallest power of two, at least `SMALLEST_SCALE`, that brings magnitudes up to `peak`
    (fp32, not negative) down to 448; NaN for what is infinite or NaN.
    """
    bits = peak.view(torch.int32)
    exponent = (bits >> _MANTISSA_BITS) - _LARGEST_EXPONENT
    exponent = exponent + ((bits & _MANTISSA) > _LARGEST_MANTISSA).int()
    scale = (exponent.clamp(min=_BIAS - 60) << _MANTISSA_BITS).view(torch.float32)
    return torch.where(peak < torch.inf, scale, torch.nan)  # by number: NaN may have a sign


def empty_data(x: Tensor, by_column: bool) -> Tensor:
    """Room for x (B, H, N, D) in e4m3, each row, or with `by_column` each column, contiguous and
    aligned; what lies between one's end and the next begin is there to be zero.
    """
    batch, heads, n, d = x.shape
    if by_column:
        columns = x.new_empty(batch, heads, d, n + -n % ALIGNED, dtype=E4M3)
        return columns[..., :n].mT
    return x.new_empty(batch, heads, n, d + -d % ALIGNED, dtype=E4M3)[..., :d]


def quantize(x: Tensor, shift: Tensor | None, by_column: bool) -> tuple[Tensor, Tensor]:
    """`(data, scale)` of x (B, H, N, D): data in e4m3, laid out as :func:`empty_data` says, with
    `data * scale` what was `x - shift`.

    scale, fp32: (B, H, S, 1), one for `ROWS_PER_SCALE` rows; `by_column`: (B, H, 1, D). `shift`
    (B, H, 1, D) fp32 or None. Computed in fp32.
    """
    x = x.float()
    if shift is not None:
        x = x - shift
    n, d = x.shape[2:]
    if by_column:
        # a row of zeros, because there may be none
        scale = scale_of(pad(x.abs(), (0, 0, 0, 1)).amax(2, keepdim=True))
        scaled = pad((x / scale).mT, (0, -n % ALIGNED)).contiguous()
        return scaled.to(E4M3)[..., :n].mT, scale
    blocks = pad(x.abs(), (0, 1, 0, -n % ROWS_PER_SCALE)).unflatten(2, (-1, ROWS_PER_SCALE))
    scale = scale_of(blocks.amax((3, 4)))[..., None]
    scaled = pad(x / by_row(scale, n), (0, -d % ALIGNED)).contiguous()
    return scaled.to(E4M3)[..., :d], scale


def by_row(scale: Tensor, rows: int) -> Tensor:
    """The scales (B, H, S, 1) of blocks of rows as (B, H, rows, 1); those of columns (B, H, 1, D)
    as they are.
    """
    if scale.shape[2] == 1:
        return scale
    return scale.repeat_interleave(ROWS_PER_SCALE, 2)[:, :, :rows]


def dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`data * scale` in `dtype`, contiguous, with scales of blocks of rows or of columns.

    Exact in bf16, fp32 and fp64 where scales are powers of two.
    """
    x = data.to(dtype, memory_format=torch.contiguous_format)
    return x * by_row(scale, data.shape[2]).to(dtype)


def _launch(x: Tensor, shift: Tensor | None, by_column: bool) -> tuple[Tensor, Tensor]:
    if requirements.triton_fp8(facts_of(x)) is None:
        module = "sparse_layouts.kernels.block_attention_fp8.triton_quantize"
        quantized: tuple[Tensor, Tensor] = importlib.import_module(module).quantize(
            x, shift, by_column
        )
        return quantized
    return quantize(x, shift, by_column)


def _shape(x: Tensor, shift: Tensor | None, by_column: bool) -> tuple[Tensor, Tensor]:
    batch, heads, n, d = x.shape
    shape = (1, d) if by_column else (-(-n // ROWS_PER_SCALE), 1)
    return empty_data(x, by_column), x.new_empty(batch, heads, *shape, dtype=torch.float32)


quantize_op = opaque.define(
    "quantize_fp8", "Tensor x, Tensor? shift, bool by_column", _launch, _shape, "(Tensor, Tensor)"
)
