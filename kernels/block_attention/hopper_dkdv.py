"""dk and dv of block_attention on Hopper: how the columns pass is tuned and launched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.heads import shared_lists
from sparse_layouts.kernels.block_attention.hopper_common import (
    bundle_size,
    keys_operands,
    pass_arguments,
)
from sparse_layouts.kernels.block_attention.hopper_dkdv_kernel import hopper_attention_dkdv
from sparse_layouts.kernels.block_attention.hopper_dkdv_load import NUM_UNITS
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.triton_common import (
    padded_head_dim,
    signature,
)
from sparse_layouts.kernels.block_attention.unit_schedule import UNIT, unit_schedule
from sparse_layouts.kernels.hopper_common import multiprocessors, rows_descriptor_type
from sparse_layouts.kernels.launching import PassLaunch
from sparse_layouts.kernels.triton_common import DTYPE_NAMES

# Queries and their gradients of the heads that are worked on together; as the pass that keeps a
# workspace has it.
L2_BYTES = 64_000_000
# Buffers of queries, by padded head size. Microseconds on an H200, local stride, H 16, N 8192,
# bf16, blocks of 64 (2026-11-26): D 64 198 (461 TFLOP/s; 3 and 6 buffers 201 and 198), D 128 317
# (575; 2 buffers 328). With blocks of 16 it is 487 and 765, since all 64 keys of a unit are
# multiplied with queries that one block of 16 stores: where such blocks lie at random (10%), half
# of a tile or more is nothing, and both passes together take 1.73 ms, Triton's, whose tiles are
# smaller, 1.53.
STAGES = {64: 4, 128: 3}
MAX_REGISTERS = 168
# the sums of one more power of two do not fit a warpgroup's registers
MOST_HEAD_DIM = 128
# keys of an item
ITEM_KEYS = NUM_UNITS.value * UNIT


def keys_pass(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Tensor,
    dk: Tensor,
    dv: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    sequences: Sequences | None,
    table: Tensor | None,
) -> PassLaunch:
    """The launch that writes `dk` and `dv`, with sequences only rows that belong to one; head sizes
    up to 128.

    `terms` is what `hopper_two_passes.attention_terms` writes, `table` that of the sequences, for
    items of ITEM_KEYS; the pattern stores something, and the copy engine can read the other
    operands and write the results.
    """
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    (m, _), (bm, bn) = pattern.shape, pattern.block_size
    d = max(64, padded_head_dim(max(head_dim, value_dim)))
    group, samples = heads // kv_heads, batch * kv_heads
    # The query heads of a key head visit its keys together: their lists are paired alike. Of
    # sequences both units of an item lie in one, as neighbours do.
    alike = sequences is None and shared_lists(pattern, head_map, group)
    transposed = transpose_pattern(pattern)
    schedule = unit_schedule(transposed, NUM_UNITS.value, UNIT, pair_by_length=alike)
    groups = schedule.rows.shape[1]
    items = samples * groups
    if sequences is not None:
        items = kv_heads * (batch * (nk // ITEM_KEYS + 1) + sequences.num_sequences)
    piece = min(bm, UNIT)
    streamed = group * 4 * nq * d * q.element_size()
    arguments = pass_arguments(
        q, k, m, transposed.tiles, head_map, schedule, sequences, table, scale, dropout_p, seed
    )
    arguments |= keys_operands(dout, q, k, v, terms, dk, dv, piece)
    arguments |= {
        "rows_ptr": schedule.heaviest_first if alike else schedule.rows,
        "groups": groups,
        "bundle": bundle_size(samples, streamed, L2_BYTES),
        "samples": samples,
        "num_rows": m,
    }
    options = {"BM": bm, "BN": bn, "PIECE": piece, "D": d, "STAGES": STAGES[d]}
    options |= {"num_warps": 4, "maxnreg": MAX_REGISTERS}
    programs = min(multiprocessors(q.device), items)
    return PassLaunch(hopper_attention_dkdv, programs, arguments, options)


def compilations() -> Iterator[Compilation]:
    """Both head sizes on blocks of every kind, and every feature once."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for d in (128, 64):
        for block in ((64, 64), (16, 16), (32, 32), (128, 128), (16, 128), (128, 32)):
            yield _compilation(d, block, bf16)
        yield _compilation(d, (64, 64), fp16, tiles=False, counts=True)
        yield _compilation(d, (64, 64), bf16, dropout=True)
        yield _compilation(d, (64, 64), bf16, sequences=True)
        yield _compilation(d, (16, 16), fp16, sequences=True, dropout=True)


def _compilation(
    d: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    *,
    tiles: bool = True,
    counts: bool = False,
    dropout: bool = False,
    sequences: bool = False,
) -> Compilation:
    bm, bn = block
    piece = min(bm, UNIT)
    constexprs = {"BM": bm, "BN": bn, "PIECE": piece, "D": d, "STAGES": STAGES[d]}
    features = {"tiles": tiles, "log_counts": counts, "sequences": sequences, "seed": dropout}
    constexprs |= {f"{name}_ptr": None for name, there in features.items() if not there}
    given = dict.fromkeys(("q_desc", "dout_desc"), rows_descriptor_type(dtype, piece))
    given |= dict.fromkeys(
        ("k_desc", "v_desc", "dk_desc", "dv_desc"), rows_descriptor_type(dtype, UNIT)
    )
    given |= dict.fromkeys(("terms_ptr", "log_counts_ptr"), "*fp32")
    given |= dict.fromkeys(("dk_ptr", "dv_ptr"), f"*{DTYPE_NAMES[dtype]}")
    given["seed_ptr"] = "*i64"
    on = [name for name, there in features.items() if there]
    return Compilation(
        "-".join([f"block{bm}x{bn}", f"d{d}", DTYPE_NAMES[dtype], *on]),
        hopper_attention_dkdv,
        signature(hopper_attention_dkdv, given, constexprs),
        constexprs,
        {"num_warps": 4, "maxnreg": MAX_REGISTERS},
        90,
        90,
    )
