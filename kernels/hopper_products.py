"""What the Gluon kernels of products share: the main loop, activations, halves of a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_layouts.kernels.hopper_common import wait_full


@gluon.jit
def multiply_steps(
    acc, a_s, b_s, full, free, first, steps,
    a_part: gl.constexpr, A_PARTS: gl.constexpr, b_part: gl.constexpr, B_PARTS: gl.constexpr,
    A_T: gl.constexpr, B_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc [WM, WN] plus `steps` products, 64 entries of the contracted dimension each, of the
    buffers of turns `first` on, every one of which is released.

    Buffers of a are [1, 1, WM, 64], those of b [1, 1, 64, WN], or, with `A_T` and `B_T`, their
    transposes; the parts of a stage follow each other.
    """
    WM: gl.constexpr = acc.shape[0]
    WN: gl.constexpr = acc.shape[1]
    for j in range(0, steps):
        stage = (first + j) % STAGES
        wait_full(full, first + j, STAGES)
        if A_T:
            a = a_s.index(stage * A_PARTS + a_part).reshape([64, WM]).permute((1, 0))
        else:
            a = a_s.index(stage * A_PARTS + a_part).reshape([WM, 64])
        if B_T:
            b = b_s.index(stage * B_PARTS + b_part).reshape([WN, 64]).permute((1, 0))
        else:
            b = b_s.index(stage * B_PARTS + b_part).reshape([64, WN])
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # the product before this one is done with its buffers
        before = (first + j + STAGES - 1) % STAGES
        mbarrier.arrive(free.index(before), count=1, pred=j > 0)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    last = (first + steps + STAGES - 1) % STAGES
    mbarrier.arrive(free.index(last), count=1, pred=steps > 0)
    return acc


@gluon.jit
def columns_of(x, which: gl.constexpr, SIZE: gl.constexpr):
    """Columns `which * SIZE` .. of x [64, SIZE or 2 * SIZE], in registers."""
    if x.shape[1] == SIZE:
        part = x
    else:
        low, high = x.reshape([64, 2, SIZE]).permute((0, 2, 1)).split()
        part = low if which == 0 else high
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    return gl.convert_layout(part, LAYOUT)


@gluon.jit
def activated(x, ACTIVATION: gl.constexpr):
    """relu, gelu (by erf), gelu_tanh or silu of x in float32; x itself for None."""
    if ACTIVATION == "relu":
        x = gl.where(x < 0, 0.0, x)  # NaN stays, as torch has it
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh by exp2: 1 - 2 / (1 + e^2x), which overflows to what it should be
        x = 0.5 * x * (2.0 - 2.0 / (1.0 + gl.exp2(inner * 2.8853900817779268)))
    if ACTIVATION == "silu":
        x = x / (1.0 + gl.exp2(-x * 1.4426950408889634))
    return x
