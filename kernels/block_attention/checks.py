"""What attention's operands must be; every message says what was expected, what came and what to
do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_layouts.block_pattern import expand_heads
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.index_identity import same_index
from sparse_layouts.kernels.block_attention.length_checks import (
    Lengths,
    check_kinds,
    check_places,
)
from sparse_layouts.layout_tensor import LayoutTensor


def check_attention(
    what: str,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    *,
    bias: Any = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    exact_rows: bool = False,
    lengths: Lengths | None = None,
    scaled: bool = False,
) -> None:
    """Raises `TypeError` or `ValueError` for operands that do not fit; `exact_rows`: the mask has
    as many rows as q. With `lengths` the mask's size does not matter. `scaled`: operands of 8 bits
    have scales, which are not checked here.
    """
    if not isinstance(mask, BSRTensor):
        kind = type(mask).__name__
        raise TypeError(
            f"{what}: expected a block mask such as sl.causal(...), got {kind}; "
            f"sl.mask_from(dense, block_size) makes one"
        )
    if not mask.is_mask:
        raise TypeError(
            f"{what}: expected a bool mask layout, got {mask.dtype} values; add scores as bias=, "
            f"with mask=w.pattern"
        )
    if lengths is not None:
        check_kinds(what, lengths)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or isinstance(t, LayoutTensor):
            raise TypeError(f"{what}: {name} is a dense tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{what}: {name} must be floating, got {t.dtype}")
        if t.element_size() == 1 and not scaled:
            raise TypeError(
                f"{what}: {name} in {t.dtype} has no scale; q, k, v = sl.quantize_fp8(q, k, v) "
                f"makes operands in 8 bits of bfloat16, float16 or float32"
            )
        if lengths is not None:
            _check_dimensions(what, name, t, lengths)
        if not 2 <= t.dim() <= 4:
            raise ValueError(
                f"{what}: {name} is (B, H, N, D), (H, N, D) or (N, D), got shape {tuple(t.shape)}"
            )
        if t.device != mask.device:
            raise ValueError(
                f"{what}: {name} is on {t.device}, the mask on {mask.device}; move it with "
                f"mask.to({str(t.device)!r})"
            )
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(
            f"{what}: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; convert with "
            f".to(dtype)"
        )
    if not q.dim() == k.dim() == v.dim():
        raise ValueError(
            f"{what}: q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions; expected "
            f"the same"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{what}: dropout_p is at least 0 and below 1, got {dropout_p}")
    if scale is not None and (isinstance(scale, Tensor) or scale != scale):
        raise ValueError(f"{what}: scale is a number, got {scale!r}")
    sizes = _sizes(q, k, lengths)
    _check_shapes(what, q, k, v)
    if lengths is None:
        _check_rows(what, q, k, mask, exact_rows)
    else:
        check_places(what, lengths, q.device, sizes[0])
    kind = "sequences" if lengths is not None and lengths.packed else "samples"
    _check_heads(what, mask, *sizes, kind)
    if bias is not None:
        _check_bias(what, bias, mask, *sizes[:2], kind)


def _check_dimensions(what: str, name: str, t: Tensor, lengths: Lengths) -> None:
    shape = tuple(t.shape)
    if lengths.packed and t.dim() != 3:
        raise ValueError(
            f"{what}: with cu_seqlens {name} is (T, H, D), sequences one after another, got shape "
            f"{shape}; a padded batch (B, H, N, D) takes q_lens, kv_lens, kv_starts"
        )
    if not lengths.packed and t.dim() != 4:
        raise ValueError(
            f"{what}: with {', '.join(lengths.given)} {name} is (B, H, N, D), got shape {shape}; "
            f"packed sequences (T, H, D) take cu_seqlens_q and cu_seqlens_k"
        )


def _check_shapes(what: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{what}: q has head size {q.shape[-1]}, k {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{what}: k {tuple(k.shape)} and v {tuple(v.shape)} differ in batch, heads or length"
        )
    if q.dim() == 4 and k.shape[0] not in (1, q.shape[0]) and q.shape[0] != 1:
        raise ValueError(f"{what}: batch sizes {q.shape[0]} and {k.shape[0]} differ")


def _check_rows(what: str, q: Tensor, k: Tensor, mask: BSRTensor, exact_rows: bool) -> None:
    rows, columns = mask.block_pattern.shape
    if columns != k.shape[-2]:
        raise ValueError(
            f"{what}: the mask is for {columns} keys, there are {k.shape[-2]}; build it for this "
            f"length, or slice it at block edges"
        )
    if exact_rows and rows != q.shape[-2]:
        raise ValueError(
            f"{what}: the mask has {rows} rows, there are {q.shape[-2]} queries; sl.attention "
            f"takes the last rows"
        )
    if rows < q.shape[-2]:
        raise ValueError(f"{what}: the mask has {rows} rows, fewer than the {q.shape[-2]} queries")


def _check_heads(
    what: str, mask: BSRTensor, batches: int, heads: int, kv_heads: int, kind: str
) -> None:
    if heads % max(kv_heads, 1) or (heads and not kv_heads):
        raise ValueError(f"{what}: {kv_heads} KV heads do not divide {heads} query heads")
    lead = mask.block_pattern.lead
    if len(lead) > 2:
        raise ValueError(
            f"{what}: a mask has at most a batch and a head dimension, got {tuple(mask.shape)}"
        )
    if lead and lead[-1] not in (1, heads, kv_heads):
        raise ValueError(
            f"{what}: the mask has {lead[-1]} heads; expected {heads} (query heads), {kv_heads} "
            f"(KV heads) or 1"
        )
    if len(lead) == 2 and lead[0] not in (1, batches):
        raise ValueError(
            f"{what}: the mask is for a batch of {lead[0]}, there are {batches} {kind}"
        )


def _sizes(q: Tensor, k: Tensor, lengths: Lengths | None) -> tuple[int, int, int]:
    """Samples or packed sequences, query heads and KV heads."""
    if lengths is not None and lengths.packed:
        return lengths.cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1]
    batches = max(q.shape[0], k.shape[0]) if q.dim() == 4 else 1
    heads = q.shape[-3] if q.dim() >= 3 else 1
    kv_heads = k.shape[-3] if k.dim() >= 3 else 1
    return batches, heads, kv_heads


def _check_bias(what: str, bias: Any, mask: BSRTensor, batches: int, heads: int, kind: str) -> None:
    if not isinstance(bias, BSRTensor) or bias.is_mask:
        raise TypeError(
            f"{what}: bias is a block layout of scores such as sl.sddmm(a, b, mask), got "
            f"{type(bias).__name__}"
        )
    if not bias.dtype.is_floating_point:
        raise TypeError(f"{what}: bias must be floating, got {bias.dtype}")
    own, wanted = bias.block_pattern, expand_heads(mask.block_pattern)
    matching = (
        own.shape == wanted.shape
        and own.block_size == wanted.block_size
        and own.lead == wanted.lead
    )
    if not (
        matching
        and same_index(own.crow_indices, wanted.crow_indices)
        and same_index(own.col_indices, wanted.col_indices)
    ):
        raise ValueError(
            f"{what}: the bias is not on the mask's blocks; make it with sl.sddmm(a, b, mask) or "
            f"x.sparse_mask(mask)"
        )
    extra = bias.shape[: bias.dim() - 2]
    sizes = (batches, heads)
    fits = len(extra) <= 2 and all(
        e in (1, s) for e, s in zip(reversed(extra), reversed(sizes), strict=False)
    )
    if own.lead and len(extra) <= 2:  # its heads are the mask's, which have been checked
        fits = extra[-1] == own.lead[-1] and extra[:-1] in ((), (1,), (batches,))
    if not fits:
        raise ValueError(
            f"{what}: the bias {tuple(bias.shape)} does not broadcast to {sizes} {kind} and heads"
        )
