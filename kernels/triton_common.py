"""What the Triton kernels on block lists share: bit tiles, precision, memory, signatures."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

DTYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
# What is compiled ahead of time, the most used one first.
BLOCK_SIZES = [(64, 64), (16, 16), (32, 32), (128, 128), (16, 64), (64, 16), (128, 32), (256, 256)]
# For what uses one configuration whatever the block, or is rarely met: the shapes that differ most.
FEW_BLOCK_SIZES = [(64, 64), (16, 16), (128, 32)]


@triton.jit
def stored_bits(tiles_ptr, tile, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a block stores (rows, columns); `tile` is 0 for a full block, else one of `tiles`."""
    WORDS: tl.constexpr = (BN + 31) // 32
    words = ((tile.to(tl.int64) - 1) * BM + rows) * WORDS + columns // 32
    words = tl.load(tiles_ptr + words, mask=tile > 0, other=-1)
    return ((words >> (columns % 32)) & 1) != 0


@triton.jit
def finished(acc, bias, ACTIVATION: tl.constexpr):
    """`activation(acc + bias)` in acc's dtype, which is float32 or float64; `bias` or `ACTIVATION`
    may be None. The names are those of `kernels/activations.py`.
    """
    if bias is not None:
        acc += bias.to(acc.dtype)
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0.0, 0.0, acc)  # NaN stays
    elif ACTIVATION == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        u = 1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)
        acc = acc / (1.0 + tl.exp(-u))
    elif ACTIVATION == "silu":
        acc = acc / (1.0 + tl.exp(-acc))
    else:
        tl.static_assert(ACTIVATION is None, "no such activation")
    return acc


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` reads its operands: float32 as tf32 only where torch's own matmul may. Triton
    cuts entries off to tf32 where cuBLAS rounds them: its errors are 2.6 times as large.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def fitting_stages(
    stages: int, stages_per_buffer: int, buffer_bytes: int, device: torch.device
) -> int:
    """`stages`, or as many as the device's shared memory (99 to 227 KiB a program) has room for."""
    if device.type != "cuda":
        return stages
    room = (_shared_bytes(device) - 1024) // buffer_bytes
    return max(1, min(stages, room * stages_per_buffer))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def kernel_signature(
    kernel: Any, pointers: dict[str, str], constexprs: dict[str, Any]
) -> dict[str, str]:
    """The type of every argument to compile for: pointers as given, strides int64, sizes int32."""

    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name in pointers:
            return pointers[name]
        if name.endswith("_ptr"):
            return "*i32"
        return "i64" if name.startswith("stride") else "i32"

    return {name: kind(name) for name in kernel.arg_names}
