"""nm_matmul on sparse tensor cores by torch's semi-structured path, cuSPARSELt: 2:4, wide operands.

cuSPARSELt wants one buffer: the stored values, then its own metadata. The metadata says only where
the values are; it is made once for a pattern and kept with it. The values are copied in at every
call: half of a dense weight, little beside the product of a wide operand, and never those from
before an optimizer's step.

Source: `torch/sparse/semi_structured.py` (SparseSemiStructuredTensorCUSPARSELT) and
`aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp` in torch 2.13.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.derived import derived
from sparse_layouts.kernels.nm_matmul.cpu import empty_result
from sparse_layouts.nm_packing import pack_positions, scatter_entries

# Rows and columns of the dense operand come in multiples of 8 (16-bit dtypes).
COLUMN_MULTIPLE = 8
# A matrix large enough to show the order in which cuSPARSELt keeps values.
PROBE = 512
# Whole numbers up to this one are exact in bfloat16.
EXACT = 256


def nm_matmul(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]` as the reference's `nm_matmul` defines it, 2:4 and without
    `transposed`.
    """
    assert (n, m, transposed) == (2, 4, False), "the table chooses another kernel"
    (_, patterns, rows, _), batch = values.shape, max(values.shape[0], x.shape[0])
    batch = batch if min(values.shape[0], x.shape[0]) else 0
    columns = x.shape[-1]
    out = empty_result(x, batch, rows, transposed_output)
    if out.numel() == 0 or values.shape[-1] == 0:
        return out.zero_()
    # one product is the result itself, unless columns lie between its rows that are not wanted
    alone = patterns * batch == 1 and (transposed_output or columns % COLUMN_MULTIPLE == 0)
    for p in range(patterns):
        for b in range(batch):
            if b < values.shape[0]:
                compressed = _compressed(values[b, p], indices, p)
            dense = _operand(x[b % x.shape[0], p])
            made = torch._cslt_sparse_mm(compressed, dense, transpose_result=transposed_output)
            made = made.mT[:, :columns] if transposed_output else made[:, :columns]
            if alone:
                return made[None, None]
            out[b, p] = made
    return out


def _operand(x: Tensor) -> Tensor:
    """x (K, N) by rows or by columns without gaps, N padded to the multiple that is wanted."""
    rest = -x.shape[1] % COLUMN_MULTIPLE
    if rest:
        return F.pad(x, (0, rest))
    # what is not contiguous is read as the transpose of something that is
    aligned = x.data_ptr() % 16 == 0
    return x if aligned and (x.is_contiguous() or x.mT.is_contiguous()) else x.clone()


def _compressed(values: Tensor, indices: Tensor, p: int) -> Tensor:
    """cuSPARSELt's buffer of values (M, E) on the p-th pattern."""
    if not _values_come_first(values.device, values.dtype):
        return torch._cslt_compress(scatter_entries(values, indices[p], 2, 4, values.shape[1] * 2))

    def build() -> tuple[Tensor, torch.Size]:
        # of ones: an entry that is stored and zero has its place in the metadata all the same
        ones = torch.ones_like(values, memory_format=torch.contiguous_format)
        dense = scatter_entries(ones, indices[p], 2, 4, values.shape[1] * 2)
        packed = torch._cslt_compress(dense)
        return packed.flatten()[values.numel() :].clone(), packed.shape

    metadata, shape = derived((indices,), ("cusparselt", p, values.dtype), build)
    return torch.cat([values.reshape(-1), metadata]).view(shape)


@functools.cache
def _values_come_first(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt's buffer begins with the stored values, row by row; true as far as is
    known, and nowhere promised, so it is looked at, once a process.
    """
    entries = PROBE // 2
    order = torch.arange(PROBE * PROBE // 4, device=device).view(PROBE, -1)
    first, second = order % 3, (order % 3 + 1 + order // 3 % (3 - order % 3)).clamp(max=3)
    positions = torch.stack([first, second], -1).flatten(1)
    values = (torch.arange(PROBE * entries, device=device) % EXACT + 1).view(PROBE, entries)
    values = values.to(dtype)
    indices = pack_positions(positions, 4)
    packed = torch._cslt_compress(scatter_entries(values, indices, 2, 4, PROBE))
    return bool(torch.equal(packed.flatten()[: values.numel()], values.flatten()))
