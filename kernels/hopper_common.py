"""What all Gluon kernels share: rings of buffers, items of work, rows of tensors by TMA.

`turn` counts the uses of a ring: its place in the ring is `turn % SIZE`, and its barriers flip with
`turn // SIZE`.

A buffer that TMA fills again is released (`mbarrier.arrive`) behind `fence_async_shared` where
plain loads have read it, since the copy engine may overtake them; products from shared memory only
have to be waited for.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_layouts.kernels.triton_common import DTYPE_NAMES

# 64 columns of two bytes are what a swizzle of 128 bytes spans
ROWS_LAYOUT = gl.constexpr(
    gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
)
# by how many columns of one byte a swizzle spans
BYTES_LAYOUTS = {
    width: gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8, rank=4)
    for width in (64, 128)
}


@gluon.jit
def wait_full(bars, turn, SIZE: gl.constexpr, pred=True):
    """Waits until the buffer of this turn is filled."""
    mbarrier.wait(bars.index(turn % SIZE), (turn // SIZE) & 1, pred=pred)


@gluon.jit
def wait_free(bars, turn, SIZE: gl.constexpr):
    """Waits until the buffer of this turn is released by those that read it a round before."""
    mbarrier.wait(bars.index(turn % SIZE), ((turn // SIZE) & 1) ^ 1)


@gluon.jit
def grid_dependency(ASM: gl.constexpr):
    """Of a launch that may begin while the kernel before it ends: lets the next one begin, or waits
    for the one before.
    """
    gl.inline_asm_elementwise(ASM, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def field(items, place, which: gl.constexpr):
    """One number of an item, the same in every thread of a warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(items.index(place).slice(which, 1).load(layout), 0)


@gluon.jit
def finish(counter_ptr, SECOND: gl.constexpr = False):
    """The last producer to come here makes the counter ready for the next launch; so too a second
    one, where the kernel has it.
    """
    done = gl.atomic_add(counter_ptr + 1, 1, sem="acq_rel")
    if done == gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)
        if SECOND:
            gl.store(counter_ptr + 2, 0)


# --- on the host ----------------------------------------------------------------------------------


def rows_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of (B, H, N, D) that moves `rows` rows of 64 columns."""
    return _descriptor(x, [1, 1, rows, 64], ROWS_LAYOUT.value)


def rows_descriptor_type(dtype: torch.dtype, rows: int) -> str:
    """The type of :func:`rows_descriptor` in a kernel's signature."""
    return f"tensordesc<{DTYPE_NAMES[dtype]}[1, 1, {rows}, 64],{ROWS_LAYOUT.value!r}>"


def bytes_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of (B, H, N, D) in e4m3 that moves `rows` rows of `columns`, 64 or 128."""
    return _descriptor(x, [1, 1, rows, columns], BYTES_LAYOUTS[columns])


def bytes_descriptor_type(rows: int, columns: int) -> str:
    """The type of :func:`bytes_descriptor` in a kernel's signature."""
    return f"tensordesc<fp8e4nv[1, 1, {rows}, {columns}],{BYTES_LAYOUTS[columns]!r}>"


def _descriptor(x: Tensor, box: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    # the stride of a dimension of one is never used, but has to be a multiple of 16 bytes
    strides = [16 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    strides[-1] = 1
    return TensorDescriptor(x, list(x.shape), strides, box, layout)


@functools.cache
def _counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(3, dtype=torch.int32, device=device)


def work_counter(device: torch.device, stream: int) -> Tensor:
    """The counter that programs claim items from: 0 before a launch and, by its last program, too
    after it.

    Launches on one stream follow each other and share it; a captured graph, which may run beside
    them, has its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(3, dtype=torch.int32, device=device)
    return _counter(device, stream)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has: a program each, or a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def broadcasts(x: Tensor) -> tuple[Tensor, int, int]:
    """x (B, P, M, N) without what only repeats in the first two dimensions, and for each of them 1,
    or 0 where it has one index for all.
    """
    batch, pattern = (int(x.shape[i] > 1 and x.stride(i) != 0) for i in range(2))
    return x[: None if batch else 1, : None if pattern else 1], batch, pattern
