"""What the Triton kernels on lists of blocks share: bit tiles, precision, what they require."""

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


@triton.jit
def stored_bits(tiles_ptr, tile, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a block stores (rows, columns); `tile` is 0 for a full block, else one of `tiles`."""
    WORDS: tl.constexpr = (BN + 31) // 32
    words = ((tile.to(tl.int64) - 1) * BM + rows) * WORDS + columns // 32
    words = tl.load(tiles_ptr + words, mask=tile > 0, other=-1)
    return ((words >> (columns % 32)) & 1) != 0


def block_requirements(
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    block_size: tuple[int, int],
) -> str | None:
    """Why these kernels cannot run, or None; `capability` is a CUDA device's (major, minor)."""
    if device_type != "cuda":
        return f"needs a CUDA device, got {device_type}"
    if capability is None or tuple(capability) < (8, 0):
        return f"needs compute capability 8.0 or newer, got {capability}"
    if dtype not in DTYPE_NAMES:
        return f"needs bfloat16, float16, float32 or float64, got {dtype}"
    if any(size < 16 or size & (size - 1) for size in block_size):
        return f"needs block sizes that are powers of two from 16, got {tuple(block_size)}"
    return None


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` reads its operands: float32 as tf32 only where torch's own matmul may."""
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
