"""Triton kernels that tests need of their own: philox as Triton draws it, and two that must not
pass the compile check.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(out_ptr, seed_ptr, N: tl.constexpr):
    """Writes the four words of counters (i, 2 i, 3 i, i + 2^31) for i < N, int32 (N, 4)."""
    i = tl.arange(0, N)
    words = tl.philox(tl.load(seed_ptr), i, 2 * i, 3 * i, i + 2147483647 + 1)
    for w in tl.static_range(4):
        tl.store(out_ptr + i * 4 + w, words[w].to(tl.int32, bitcast=True))


@triton.jit
def does_not_compile(x_ptr, N: tl.constexpr):
    """Multiplies matrices whose sizes do not fit."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    wide = tl.load(x_ptr + tl.arange(0, 2 * N)[:, None] * N + i[None, :])
    tl.store(x_ptr + i[:, None] * N + i[None, :], tl.dot(x, wide))


@triton.jit
def product(x_ptr, steps, N: tl.constexpr):
    """Squares a matrix again and again; large N take more shared memory than there is."""
    i = tl.arange(0, N)
    acc = tl.zeros([N, N], tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + step * N * N + i[:, None] * N + i[None, :])
        y = tl.load(x_ptr + step * N * N + i[None, :] * N + i[:, None])
        acc = tl.dot(x, y, acc)
    tl.store(x_ptr + i[:, None] * N + i[None, :], acc.to(tl.bfloat16))
