"""What kernels require, as pure functions of a call's facts: None, or one line why not. Imports
neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sparse_layouts.dispatch import Facts
from sparse_layouts.nm_fragments import AXES, FRAGMENTS, unit_columns

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


def triton_floats(facts: Facts) -> str | None:
    """As `triton`, in fp16, bf16, fp32 or fp64."""
    if facts.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"takes float16, bfloat16, float32 and float64, not {facts.dtype}"
    return triton(facts)


def _power_of_two_blocks(facts: Facts) -> str | None:
    for edge in facts.block_size:
        if edge < 16 or edge & (edge - 1):
            return f"takes blocks whose edges are powers of two from 16, not {facts.block_size}"
    return None


def triton_blocks(facts: Facts) -> str | None:
    """As `triton`, and blocks that are powers of two from 16, in fp16, bf16, fp32 or fp64."""
    return triton_floats(facts) or _power_of_two_blocks(facts)


# Columns of the dense operand up to which reading the blocks takes longer than multiplying them.
FEW_COLUMNS = 64


def triton_few_columns(facts: Facts) -> str | None:
    """As `triton_blocks`, for up to 64 columns of the dense operand, or few and long block rows."""
    if facts.columns > FEW_COLUMNS and not facts.long_rows:
        return (
            f"takes up to {FEW_COLUMNS} columns of the dense operand, not {facts.columns}, but for "
            "few and long block rows"
        )
    return triton_blocks(facts)


def triton_attention(facts: Facts) -> str | None:
    """As `triton`, and blocks that are powers of two from 16, in fp16, bf16 or fp32, head sizes up
    to 256.
    """
    if facts.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, not {facts.dtype}"
    if facts.head_dim > MAX_HEAD_DIM:
        return f"takes head sizes up to {MAX_HEAD_DIM}, not {facts.head_dim}"
    return triton(facts) or _power_of_two_blocks(facts)


def triton_fp8(facts: Facts) -> str | None:
    """As `triton`, of compute capability 8.9 or newer, whose tensor cores multiply e4m3."""
    reason = triton(facts)
    if reason is None and facts.capability < (8, 9):
        found = ".".join(map(str, facts.capability))
        return f"needs compute capability 8.9 or newer, which multiplies 8 bits, found {found}"
    return reason


def triton_attention_fp8(facts: Facts) -> str | None:
    """As `triton_attention`, of which facts.dtype is the result's, and `triton_fp8`."""
    return triton_attention(facts) or triton_fp8(facts)


def hopper_attention_fp8(facts: Facts) -> str | None:
    """As `triton_attention_fp8`, with a result in fp16 or bf16, blocks of at least 64, head sizes
    up to 128 and the plain batch, on a GPU of compute capability 9.0, whose copy engine can read
    the operands.
    """
    # smaller blocks would put several scales into a tile of keys
    reason = triton_attention_fp8(facts) or hopper_16_bits(facts)
    if reason is not None:
        return reason
    if min(facts.block_size) < 64:
        return f"takes blocks whose edges are at least 64, not {facts.block_size}"
    if facts.head_dim > 128:
        return f"takes head sizes up to 128, not {facts.head_dim}"
    if facts.lengths:
        return "takes no sequences of several lengths"
    if not facts.tma:
        return (
            "takes q and k by rows and v by columns, whose other strides and addresses are "
            "multiples of 16 bytes, as sl.quantize_fp8 makes them, and v of whole groups of 8 "
            "columns"
        )
    return None


def dequantized_attention(facts: Facts) -> str | None:
    """A result in a dtype in which there is a kernel for what the operands stand for."""
    if facts.device == "cuda" and facts.dtype == torch.float64:
        return "has no kernel to hand float64 to on a GPU"
    return None


def hopper_16_bits(facts: Facts) -> str | None:
    """fp16 or bf16 on a GPU of compute capability 9.0."""
    if facts.capability != (9, 0):
        found = ".".join(map(str, facts.capability))
        return f"is for compute capability 9.0 (H100, H200), found {found}"
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {facts.dtype}"
    return None


def hopper_attention(facts: Facts) -> str | None:
    """As `triton_attention`, in fp16 or bf16, without a bias, on a GPU of compute capability 9.0,
    whose copy engine can read the operands.
    """
    reason = triton_attention(facts) or hopper_16_bits(facts)
    if reason is not None:
        return reason
    if facts.bias:
        return "takes no bias"
    if not facts.tma:
        return (
            "takes q, k and v whose last dimension is contiguous, with the other strides, the head "
            "sizes and the addresses multiples of 16 bytes"
        )
    return None


# Largest head size, padded to a power of two, whose gradients' sums two warpgroups can hold.
HOPPER_GRADIENT_HEAD_DIM = 128
# The Hopper backward's workspace takes no more: of two key heads, 2 bytes for every pair of a query
# and a key that they store. One head of dense causal attention over 46,000 tokens takes half of it.
HOPPER_WORKSPACE_BYTES = 4_300_000_000


def hopper_attention_backward(facts: Facts) -> str | None:
    """As `hopper_attention`, for blocks whose edges are multiples of 64, head sizes up to 128, the
    plain batch, and key heads whose workspace stays within HOPPER_WORKSPACE_BYTES.
    """
    reason = hopper_attention(facts)
    if reason is not None:
        return reason
    if min(facts.block_size) < 64:
        return f"takes blocks whose edges are at least 64, not {facts.block_size}"
    if facts.head_dim > HOPPER_GRADIENT_HEAD_DIM:
        return f"takes head sizes up to {HOPPER_GRADIENT_HEAD_DIM}, not {facts.head_dim}"
    if facts.lengths:
        return "takes no sequences of several lengths"
    if facts.head_bytes > HOPPER_WORKSPACE_BYTES // 2:
        return (
            f"takes a workspace of at most {HOPPER_WORKSPACE_BYTES:,} bytes, twice what the scores "
            f"that a key head stores take; here these are up to {facts.head_bytes:,}"
        )
    return None


# Tiles of 64 rows or columns compute all that they visit, Triton's of 16 what is stored. From how
# many sixteenths of fill on the Hopper kernels are the faster ones, by the block's edge and head
# sizes up to a number. Triton's time over theirs, bf16, H 16, N 8192, one H200 (2026-11-27), with
# the fill; random blocks of 16 are 2 to 10% stored at 0.26 to 0.29, 40% at 0.46:
# - forward, blocks of 16: D 64 0.68 (0.27), 0.68 (0.29), 1.02 (0.46); D 128 0.87 to 0.93 (0.26 to
#   0.29), 1.46 (0.46), 1.21 (0.53, pairs of equal rows); D 256 1.02 (0.29). Blocks of 32 at 0.53:
#   1.23 and 1.10.
# - backward, blocks of 16: D 64 0.61 (0.29), 0.98 (0.46); D 128 0.79 (0.26), 0.71 (0.29), 0.83
#   (0.37), 1.25 (0.46), 1.71 (0.96, local stride); D 96 and 256 0.73 (0.29). Blocks of 32: D 64
#   0.78, D 128 0.92 (0.53).
FORWARD_FILL = {(16, 64): 7, (16, 128): 5}
TWO_PASSES_FILL = {(16, 64): 7, (16, 256): 6, (32, 64): 10, (32, 256): 9}


def _unlike(facts: Facts, least: dict[tuple[int, int], int]) -> str | None:
    """Why small blocks' neighbours are too unlike for tiles of 64, from the first line of the table
    that holds the block and the head size.
    """
    for (edge, head_dim), fill in least.items():
        if min(facts.block_size) == edge and facts.head_dim <= head_dim:
            if 0 < facts.fill < fill:
                return (
                    f"takes small blocks whose neighbours are alike: {fill} sixteenths stored of "
                    f"what tiles of 64 visit, not {facts.fill}"
                )
            return None
    return None


def hopper_attention_forward(facts: Facts) -> str | None:
    """As `hopper_attention`; blocks of 16 whose neighbouring rows are alike."""
    return hopper_attention(facts) or _unlike(facts, FORWARD_FILL)


def hopper_attention_two_passes(facts: Facts) -> str | None:
    """As `hopper_attention`: blocks from 16 on, head sizes up to 256, sequences of several lengths,
    and no workspace; blocks of 16 and 32 whose neighbouring rows and columns are alike.
    """
    # It stands below `hopper_attention_backward`, which takes less but is the faster one where it
    # does: by two passes the scores and their gradients are computed twice, seven products of tiles
    # instead of five. Local stride, H 16, N 8192, D 128, bf16, blocks of 64, one H200 (2026-11-26):
    # 0.55 ms, that one 0.51, Triton's 0.64. Triton's backward took 1.36 times as long as this at D
    # 192 and 256, and 1.3 to 1.5 with blocks of 16 and 32 and over sequences.
    return hopper_attention(facts) or _unlike(facts, TWO_PASSES_FILL)


# Columns of the dense operand, as powers of two count. One H200, bf16, a quarter of the blocks of
# 64 stored, us of `hopper` and of `triton_few_columns` (2026-11-26): 128 columns 11.3 and 16.7
# (4096 x 4096), 20.8 and 27.6 (8192 x 8192). With 33 to 64 columns `hopper_few_columns` is the
# fastest one for blocks of 64, and as fast as the others for 128; with fewer it is not: see there.
HOPPER_COLUMNS = 128
HOPPER_FEW_COLUMNS = 64
# Rows of a block whose sums a warpgroup's registers hold.
HOPPER_FEW_COLUMNS_ROWS = 256


def _hopper_products(facts: Facts) -> str | None:
    """As `triton_blocks`, for blocks whose edges are at least 64, in fp16 or bf16, on a GPU of
    compute capability 9.0, whose copy engine can read the operands, or copies that pay.
    """
    reason = triton_blocks(facts) or hopper_16_bits(facts)
    if reason is not None:
        return reason
    if min(facts.block_size) < 64:
        return f"takes blocks whose edges are at least 64, not {facts.block_size}"
    if not facts.tma:
        return (
            "takes operands and results with one contiguous dimension, whose other strides and "
            "addresses are multiples of 16 bytes, and operands of which copies pay"
        )
    return None


def hopper_block_matmul(facts: Facts) -> str | None:
    """As `_hopper_products`, for enough columns of the dense operand to fill tiles."""
    if facts.columns < HOPPER_COLUMNS and facts.device == "cuda":
        return (
            f"takes more than {HOPPER_COLUMNS // 2} columns of the dense operand, not "
            f"{facts.columns}"
        )
    if facts.long_rows:
        return "cuts no block rows, of which these are few and long"
    return _hopper_products(facts)


def hopper_few_columns(facts: Facts) -> str | None:
    """As `_hopper_products`, for 33 to 64 columns of the dense operand, and blocks of up to 256
    rows, which are not few and long.
    """
    if facts.columns != HOPPER_FEW_COLUMNS:
        few = f"{HOPPER_FEW_COLUMNS // 2 + 1} to {HOPPER_FEW_COLUMNS}"
        return f"takes {few} columns of the dense operand, not {facts.columns}"
    reason = _hopper_products(facts)
    if reason is None and facts.block_size[0] > HOPPER_FEW_COLUMNS_ROWS:
        reason = f"takes blocks of up to {HOPPER_FEW_COLUMNS_ROWS} rows, not {facts.block_size[0]}"
    if reason is None and facts.long_rows:
        # half of 64 x 32768 times 64 columns, us of this and of `triton_few_columns`: 17.2 and
        # 14.3, a quarter of 256 x 16384 times 48 13.1 and 11.5 (one H200, 2026-11-27)
        reason = "takes no few and long block rows"
    return reason


def hopper_sddmm(facts: Facts) -> str | None:
    """As `_hopper_products`, for blocks that are stored as a whole."""
    reason = _hopper_products(facts)
    if reason is None and facts.partial:
        reason = "takes blocks that are stored as a whole"
    return reason


# Where the kernels on blocks lose to cuBLAS on a dense matrix in scratch memory: sixteenths of the
# matrix that are stored, by the rows of a block. Microseconds in bf16, 4096^3, one H200, of the
# former and of this at 10, 25 and 50%, where cuBLAS alone takes 178 (2026-11-26): blocks of 16, W @
# x 140, 298, 552 and 228, 243, 261; F.linear, whose x is copied, 162, 319, - and 241, 255, 273;
# sddmm likewise 161, 316, - and 187, 190, 195; blocks of 32, W @ x 79, 167, 313 and 223, 236, 255;
# sddmm 75, 153, 317 and 185, 188, 192; of 64 at 50% W @ x 140 and 241, sddmm 136 and 190.
DENSE_MATMUL_SIXTEENTHS = {16: 3, 32: 7}
DENSE_SDDMM_SIXTEENTHS = {16: 3, 32: 5}
# From here on (1025 columns, rounded up) multiplying the matrix takes longer than moving it.
DENSE_SCRATCH_COLUMNS = 2048


def _dense_scratch(facts: Facts, least: dict[int, int]) -> str | None:
    reason = triton_floats(facts)
    if reason is not None or _power_of_two_blocks(facts) is not None:
        return reason  # for such blocks there is no other kernel
    way = "computes densely in scratch memory"
    if facts.capability != (9, 0) or facts.dtype not in (torch.float16, torch.bfloat16):
        return (
            f"{way}: beside other kernels only where it was measured, in float16 and bfloat16 at "
            "compute capability 9.0 (H100, H200)"
        )
    rows = facts.block_size[0]
    if rows not in least:
        return f"{way}: not known to be the faster one for blocks of {rows} rows"
    if facts.sixteenths < least[rows]:
        return (
            f"{way}: the faster one where {least[rows]}/16 of a large matrix are stored in blocks "
            f"of {rows} rows, here it is {facts.sixteenths}/16"
        )
    if facts.columns < DENSE_SCRATCH_COLUMNS:
        return (
            f"{way}: the faster one for {DENSE_SCRATCH_COLUMNS} or more columns of the dense "
            f"operand, not for {facts.columns}"
        )
    return None


def dense_matmul(facts: Facts) -> str | None:
    """As `triton_floats`, for blocks that no other kernel takes, and where so much of a large
    matrix is stored in small blocks that cuBLAS is the faster one in spite of the zeros.
    """
    return _dense_scratch(facts, DENSE_MATMUL_SIXTEENTHS)


def dense_sddmm(facts: Facts) -> str | None:
    """As `dense_matmul`, of the matrix that is sampled."""
    return _dense_scratch(facts, DENSE_SDDMM_SIXTEENTHS)


# Columns of the dense operand from which another way of reading W wins. MKL's CSR product reads W
# once, but computes slowly: 4096 x 4096 at 2:4 in fp32, two cores of an EPYC 9004, 2026-11-21.
MKL_COLUMNS = 32
# cuSPARSELt is for very wide operands: a call costs 480 us of CPU, and its kernel is hardly faster.
# One H200, bf16, 2026-11-21, microseconds of it and of W expanded in scratch memory, called one
# after the other: 4096 x 4096 and 4096 columns 549 and 217, 8192 columns 549 and 426; 8192 x 8192
# and 4096 columns 741 and 905, 8192 columns 1421 and 1706 (by F.linear, whose operand lies by
# columns, 1691 and 1703). In a CUDA graph, 4096 x 4096 and 4096 columns: 216 and 192.
SEMI_STRUCTURED_COLUMNS = 16384
# From here on (17 columns, rounded up) it is worth writing W out densely for cuBLAS, which reads it
# at the speed of memory: 4096 x 4096 at 2:4 in bfloat16 and 16 columns took the kernel that
# expands in registers 30 us, cuBLAS 14; writing moves 50 MB, some 15 us; at 512 columns 164 and 24
# us (one H200, 2026-11-21).
EXPAND_COLUMNS = 32


def cpu_mkl_nm(facts: Facts) -> str | None:
    """As `cpu`, for few columns, with a torch that has MKL."""
    if facts.transposed:
        return "takes the stored matrix, not its transpose"
    if facts.columns > MKL_COLUMNS:
        return f"takes up to {MKL_COLUMNS} columns of the dense operand, not {facts.columns}"
    if facts.device == "cpu" and not torch.backends.mkl.is_available():
        return "needs MKL, which this torch is built without"
    return cpu(facts)


def semi_structured(facts: Facts) -> str | None:
    """2:4 in fp16 or bf16 on an NVIDIA GPU with sparse tensor cores, many columns, and a torch with
    cuSPARSELt.
    """
    if facts.n_of_m != (2, 4):
        return f"takes 2:4, not {':'.join(map(str, facts.n_of_m))}"
    if facts.device != "cuda":
        return f"works on cuda tensors, these are on {facts.device}"
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {facts.dtype}"
    if facts.transposed:
        return "takes the stored matrix, not its transpose, which is not 2:4 along its rows"
    if facts.columns < SEMI_STRUCTURED_COLUMNS:
        return (
            f"takes {SEMI_STRUCTURED_COLUMNS} or more columns of the dense operand, not "
            f"{facts.columns}"
        )
    if facts.divisor < 64:
        return f"takes matrices whose sizes 64 divides, here it is {facts.divisor}"
    if facts.capability < (8, 0):
        return (
            f"needs compute capability 8.0 or newer, found {'.'.join(map(str, facts.capability))}"
        )
    if not facts.cusparselt:
        return "needs cuSPARSELt, which this torch is built without"
    return None


def triton_expand_nm(facts: Facts) -> str | None:
    """As `triton_floats`, for columns that repay writing the matrix out densely in scratch."""
    if facts.columns < EXPAND_COLUMNS:
        return (
            f"expands the matrix in scratch memory, for {EXPAND_COLUMNS} or more columns of the "
            f"dense operand, not {facts.columns}"
        )
    return triton_floats(facts)


# Columns of the dense operand up to which a product by fragments reads the matrix once.
FRAGMENT_COLUMNS = 64


def nm_by_fragments(facts: Facts) -> str | None:
    """2:4, 1:4, 2:8 and 1:8 in fp16 or bf16, prepacked, few columns, on a GPU of compute capability
    9.0.
    """
    ratios = [f"{n}:{m}" for n, m in AXES]
    if facts.n_of_m not in AXES:
        given = ":".join(map(str, facts.n_of_m))
        return f"takes {', '.join(ratios[:-1])} and {ratios[-1]}, not {given}"
    reason = triton(facts)
    if reason is not None:
        return reason
    if facts.capability != (9, 0):
        found = ".".join(map(str, facts.capability))
        return f"is for compute capability 9.0 (H100, H200), found {found}"
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {facts.dtype}"
    if facts.transposed:
        return "takes the stored matrix, not its transpose"
    if facts.columns > FRAGMENT_COLUMNS:
        return f"takes up to {FRAGMENT_COLUMNS} columns of the dense operand, not {facts.columns}"
    if not facts.fragments:
        return (
            f"takes matrices whose rows 16 and whose columns {unit_columns(*facts.n_of_m)} divides"
        )
    if facts.order != FRAGMENTS:
        return "takes entries in the order of fragments: call w.prepack() once"
    return None


def expand_fragments(facts: Facts) -> str | None:
    """As `triton`, of 2:4, 1:4, 2:8 and 1:8 in fp16 or bf16, prepacked."""
    if facts.order != FRAGMENTS:
        return "takes entries in the order of fragments"
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {facts.dtype}"
    return triton(facts)


Requires = Callable[[Facts], "str | None"]


def row_by_row(requires: Requires) -> Requires:
    """As `requires`, for n:m entries that lie row by row."""

    @functools.wraps(requires)
    def also(facts: Facts) -> str | None:
        if facts.order == FRAGMENTS:
            return "takes entries that lie row by row, not by fragments"
        return requires(facts)

    return also


# Bytes of a row of x up to which MKL's product of a CSR matrix is the fastest: 64 columns in fp32,
# 32 in fp64 (DLMC matrices, one core of an EPYC 9004, 2026-11-21).
MKL_ROW_BYTES = 256


def mkl_csr(facts: Facts) -> str | None:
    """As `cpu`, for few columns of the dense operand, with a torch that has MKL; fp16 and bf16 are
    multiplied in fp32.
    """
    most = MKL_ROW_BYTES // max(4, facts.dtype.itemsize)
    if facts.columns > most:
        return f"takes up to {most} columns of the dense operand, not {facts.columns}"
    if facts.device == "cpu" and not torch.backends.mkl.is_available():
        return "needs MKL, which this torch is built without"
    return cpu(facts)


# Where cuSPARSE is the faster one: short rows, neither few nor many columns. Microseconds of ours
# and of it in fp32, 4096 x 4096, one H200, 2026-11-21, at 64, 128, 256 and 512 columns: density
# 0.01 (42 entries a row) 17 and 20, 25 and 22, 34 and 32, 51 and 55; a power law (26) 17 and 15, 23
# and 17, 30 and 25, 43 and 41; density 0.1 (411): ours everywhere, by 1.2 to 3.
CUSPARSE_COLUMNS = (128, 256)
CUSPARSE_ROW_ENTRIES = 64


def cusparse_csr(facts: Facts) -> str | None:
    """An NVIDIA GPU, in fp32 or fp64; in 16 bits cuSPARSE errs five times as much as dense torch.

    Where Triton's kernel could take the call, only what cuSPARSE does faster. Its sums have no
    promised order: not under `torch.use_deterministic_algorithms(True)`.
    """
    if facts.device != "cuda":
        return f"works on cuda tensors, these are on {facts.device}"
    if facts.dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, not {facts.dtype}: in 16 bits it is inexact"
    if triton_floats(facts) is not None:
        return None  # else there would be no kernel
    if facts.deterministic:
        return "promises no order of sums, and torch.use_deterministic_algorithms is set"
    if facts.transposed:
        return "is the faster one with the stored matrix, not with its transpose"
    if facts.dtype == torch.float64:
        return "is the faster one in float32, not in torch.float64"
    low, high = CUSPARSE_COLUMNS
    if not low <= facts.columns <= high:
        return (
            f"is the faster one from {low} to {high} columns of the dense operand, not with "
            f"{facts.columns}"
        )
    if facts.row_entries > CUSPARSE_ROW_ENTRIES:
        return (
            f"is the faster one up to {CUSPARSE_ROW_ENTRIES} entries a row, not with "
            f"{facts.row_entries}"
        )
    return None
