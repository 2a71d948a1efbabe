"""Triton kernels that tests need of their own: philox as Triton draws it, what a program on
sequences finds, and two that must not pass the compile check.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_layouts.kernels.block_attention.triton_sequences import (
    chunk_at,
    chunks_between,
    find_tile,
)


@triton.jit
def philox_words(out_ptr, seed_ptr, N: tl.constexpr):
    """Writes the four words of counters (i, 2 i, 3 i, i + 2^31) for i < N, int32 (N, 4)."""
    i = tl.arange(0, N)
    words = tl.philox(tl.load(seed_ptr), i, 2 * i, 3 * i, i + 2147483647 + 1)
    for w in tl.static_range(4):
        tl.store(out_ptr + i * 4 + w, words[w].to(tl.int32, bitcast=True))


@triton.jit
def tiles_found(
    out_ptr, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences, num_queries,
    num_keys, mask_rows, mask_columns, TILE: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Writes the sequence and the tile of every program, int32 (programs, 2)."""
    rank = tl.program_id(0)
    sequence, tile = find_tile(
        rank, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr, num_sequences, num_queries,
        num_keys, mask_rows, mask_columns, TILE, BY_KEY,
    )  # fmt: skip
    tl.store(out_ptr + rank * 2, sequence)
    tl.store(out_ptr + rank * 2 + 1, tile)


@triton.jit
def chunks_found(
    out_ptr, columns_ptr, start, plain, total, first, end, BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):  # fmt: skip
    """Writes how many chunks need no mask, how many there are, and which they are, int32."""
    plain, total, lead, jump = chunks_between(
        columns_ptr, start, plain, total, first, end, BLOCK, GATHER
    )
    tl.store(out_ptr, plain)
    tl.store(out_ptr + 1, total)
    for j in range(total):
        tl.store(out_ptr + 2 + j, chunk_at(j, plain, lead, jump, 1, True))


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
