"""What attention's operands in 8 bits must be, beside what `check_attention` asks of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_layouts.kernels.block_attention.checks import check_attention
from sparse_layouts.kernels.block_attention.length_checks import Lengths
from sparse_layouts.kernels.block_attention_fp8.operands import (
    DTYPES,
    FP8Operand,
    check_no_gradient,
)
from sparse_layouts.kernels.block_attention_fp8.quantize import E4M3, ROWS_PER_SCALE

Operands = tuple[FP8Operand, FP8Operand, FP8Operand]


def check_fp8(
    what: str,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    *,
    bias: Any = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    lengths: Lengths | None = None,
) -> Operands:
    """The operands; raises `TypeError`, `ValueError` or `NotImplementedError` where they do not
    fit.
    """
    operands = {"q": q, "k": k, "v": v}
    for name, t in operands.items():
        if not isinstance(t, FP8Operand):
            raise TypeError(
                f"{what}: expected q, k and v all in 8 bits or none, got {name} as "
                f"{type(t).__name__}; q, k, v = sl.quantize_fp8(q, k, v) makes all three, and "
                f"leaves alone what is one already"
            )
        _check_fields(what, name, t)
    given = "a bias" if bias is not None else "dropout" if dropout_p else ""
    if given:
        raise NotImplementedError(
            f"{what}: operands in 8 bits take no {given.removeprefix('a ')}, got {given}; pass q, "
            f"k and v in bfloat16"
        )
    packed = lengths is not None and lengths.packed
    for name, t in operands.items():
        if t.packed != packed:
            how = "with cu_seqlens_q and cu_seqlens_k" if packed else "without cu_seqlens"
            raise ValueError(
                f"{what}: expected {name} quantised with packed={packed} {how}, got "
                f"packed={t.packed}; sl.quantize_fp8(q, k, v, packed={packed})"
            )
    check_attention(what, q.data, k.data, v.data, mask, scale=scale, lengths=lengths, scaled=True)
    for name, t in operands.items():
        _check_scales(what, name, t)
    return q, k, v


def _check_fields(what: str, name: str, t: FP8Operand) -> None:
    tensors = {"data": t.data, "scale": t.scale}
    if t.shift is not None:
        tensors["shift"] = t.shift
    for field, tensor in tensors.items():
        wanted = E4M3 if field == "data" else torch.float32
        if not isinstance(tensor, Tensor) or tensor.dtype != wanted:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{what}: {name}.{field} is {wanted}, got {got}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{what}: {name}.dtype is bfloat16, float16 or float32, got {t.dtype}")
    if t.shift is not None and name != "k":
        raise ValueError(f"{what}: {name} has a shift, which only k may have")
    check_no_gradient(what, name, t.scale, t.shift)


def _check_scales(what: str, name: str, t: FP8Operand) -> None:
    data, scale, shift = t.four_dimensional()
    batch, heads, rows, columns = data.shape
    by_row = (batch, heads, -(-rows // ROWS_PER_SCALE), 1)
    by_column = (batch, heads, 1, columns)
    for field, tensor in (("scale", scale), ("shift", shift)):
        wanted = by_row if field == "scale" and name != "v" else by_column
        if tensor is None:
            continue
        if tensor.shape != wanted:
            raise ValueError(
                f"{what}: expected {name}.{field} to be, with all four dimensions, {wanted}, got "
                f"{tuple(tensor.shape)}: q and k have a scale for {ROWS_PER_SCALE} rows, v one for "
                f"each column; sl.quantize_fp8 makes them"
            )
        if tensor.device != data.device:
            raise ValueError(
                f"{what}: {name}.{field} is on {tensor.device}, {name}.data on {data.device}"
            )
