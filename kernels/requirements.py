"""What kernels require, as pure functions of a call's facts:

None, or one line why not. Imports neither Triton nor a GPU.
"""

from __future__ import annotations

import torch

from sparse_layouts.dispatch import Facts

TRITON_OLDEST = (3, 6)
MAX_HEAD_DIM = 256


def cpu(facts: Facts) -> str | None:
    """Tensors on the CPU, in any floating dtype."""
    if facts.device != "cpu":
        return f"works on cpu tensors, these are on {facts.device}"
    if not facts.dtype.is_floating_point:
        return f"takes floating dtypes, not {facts.dtype}"
    return None


def triton(facts: Facts) -> str | None:
    """An NVIDIA GPU of compute capability 8.0 or newer, with Triton installed."""
    if facts.device != "cuda":
        return f"works on cuda tensors, these are on {facts.device}"
    if not facts.triton:
        return "needs Triton, which is not installed (pip install triton)"
    if facts.triton[:2] < TRITON_OLDEST:
        found = ".".join(map(str, facts.triton))
        return f"needs Triton {'.'.join(map(str, TRITON_OLDEST))} or newer, found {found}"
    if facts.capability < (8, 0):
        return (
            f"needs compute capability 8.0 or newer, found {'.'.join(map(str, facts.capability))}"
        )
    return None


def _power_of_two_blocks(facts: Facts) -> str | None:
    for edge in facts.block_size:
        if edge < 16 or edge & (edge - 1):
            return f"takes blocks whose edges are powers of two from 16, not {facts.block_size}"
    return None


def triton_blocks(facts: Facts) -> str | None:
    """As `triton`, and blocks that are powers of two from 16, in fp16, bf16, fp32 or fp64."""
    if facts.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"takes float16, bfloat16, float32 and float64, not {facts.dtype}"
    return triton(facts) or _power_of_two_blocks(facts)


def triton_attention(facts: Facts) -> str | None:
    """As `triton`, and blocks that are powers of two from 16, in fp16, bf16 or fp32, head sizes up
    to 256.
    """
    if facts.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, not {facts.dtype}"
    if facts.head_dim > MAX_HEAD_DIM:
        return f"takes head sizes up to {MAX_HEAD_DIM}, not {facts.head_dim}"
    return triton(facts) or _power_of_two_blocks(facts)
