"""dk and dv of block_attention on Hopper for head sizes over 128: how the kernel is launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
from sparse_layouts.kernels.block_attention.hopper_dkdv_wide_kernel import (
    hopper_attention_wide_columns,
)
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.triton_common import signature
from sparse_layouts.kernels.block_attention.unit_schedule import UNIT, unit_schedule
from sparse_layouts.kernels.hopper_common import multiprocessors, rows_descriptor_type
from sparse_layouts.kernels.launching import PassLaunch
from sparse_layouts.kernels.triton_common import DTYPE_NAMES


class Tuning(NamedTuple):
    """Buffers of queries; registers a thread at the start, of each warpgroup that multiplies, of
    the producer.
    """

    stages: int = 2
    max_registers: int = 168
    registers: int = 224
    load_registers: int = 56


# With these, only dropout spills registers to speak of. Local stride, H 16, N 8192, blocks of 64,
# bf16, one H200 (2026-11-26): 677 us, 539 TFLOP/s; both passes 1.19 ms, Triton's 1.63.
TUNING = Tuning()
D = 256
# keys of an item
ITEM_KEYS = UNIT
# Queries and their gradients of the heads worked on together; half of an H200's L2.
L2_BYTES = 32_000_000


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
    """The launch that writes dk and dv, of operands whose head sizes are at most 256, in bf16 or
    fp16.

    `terms` (B, H, Nq, 2) fp32, contiguous: of every query lse in base 2 (+inf: no entries) and
    rowsum(dout * out) - dlse. The operands are such that TMA can read them, and none is empty. With
    sequences, rows of dk and dv that belong to none are left as they are; `table` is theirs, for
    items of ITEM_KEYS.
    """
    (batch, heads, nq, _), (kv_heads, nk) = q.shape, k.shape[1:3]
    (m, _), (bm, bn) = pattern.shape, pattern.block_size
    transposed = transpose_pattern(pattern)
    schedule = unit_schedule(transposed, 1, UNIT)
    groups = schedule.rows.shape[1]
    group, samples = heads // kv_heads, batch * kv_heads
    # a key head's columns are dealt out by length only where its query heads read the same lists
    alike = sequences is None and shared_lists(pattern, head_map, group)
    items = samples * groups
    if sequences is not None:
        extra = sequences.num_sequences if sequences.packed else 0
        items = kv_heads * ((nk // ITEM_KEYS + 1) * batch + extra)
    bytes_each = group * 2 * nq * D * q.element_size()
    arguments = pass_arguments(
        q, k, m, transposed.tiles, head_map, schedule, sequences, table, scale, dropout_p, seed
    )
    arguments |= keys_operands(dout, q, k, v, terms, dk, dv, min(bm, UNIT))
    arguments |= {
        "rows_ptr": schedule.heaviest_first if alike else schedule.rows,
        "groups": groups,
        "bundle": bundle_size(samples, bytes_each, L2_BYTES),
        "samples": samples,
    }
    options = _constants(bm, bn) | {"num_warps": 4, "maxnreg": TUNING.max_registers}
    programs = min(multiprocessors(q.device), items)
    return PassLaunch(hopper_attention_wide_columns, programs, arguments, options)


def _constants(bm: int, bn: int) -> dict[str, int]:
    return {
        "BM": bm,
        "BN": bn,
        "PIECE": min(bm, UNIT),
        "D": D,
        "STAGES": TUNING.stages,
        "REGISTERS": TUNING.registers,
        "LOAD_REGISTERS": TUNING.load_registers,
    }


def compilations() -> Iterator[Compilation]:
    """Blocks of every kind, and every feature once."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for blocks in ((64, 64), (16, 16), (32, 32), (128, 128), (16, 64), (128, 32)):
        yield _compilation(*blocks, bf16)
    yield _compilation(64, 64, fp16, tiles=False, counts=True)
    yield _compilation(64, 64, bf16, dropout=True)
    yield _compilation(64, 64, bf16, sequences=True)
    yield _compilation(16, 16, fp16, counts=True, dropout=True, sequences=True)


def _compilation(
    bm: int,
    bn: int,
    dtype: torch.dtype,
    *,
    tiles: bool = True,
    counts: bool = False,
    dropout: bool = False,
    sequences: bool = False,
) -> Compilation:
    constexprs = _constants(bm, bn)
    options = {"tiles": tiles, "log_counts": counts, "sequences": sequences, "seed": dropout}
    constexprs |= {f"{name}_ptr": None for name, there in options.items() if not there}
    given = dict.fromkeys(("q_desc", "dout_desc"), rows_descriptor_type(dtype, min(bm, UNIT)))
    keys = ("k_desc", "v_desc", "dk_desc", "dv_desc")
    given |= dict.fromkeys(keys, rows_descriptor_type(dtype, UNIT))
    given |= dict.fromkeys(("dk_ptr", "dv_ptr"), f"*{DTYPE_NAMES[dtype]}")
    given |= {"terms_ptr": "*fp32", "log_counts_ptr": "*fp32", "seed_ptr": "*i64"}
    on = [name for name, there in options.items() if there]
    return Compilation(
        "-".join([f"block{bm}x{bn}", f"d{D}", DTYPE_NAMES[dtype], *on]),
        hopper_attention_wide_columns,
        signature(hopper_attention_wide_columns, given, constexprs),
        constexprs,
        {"num_warps": 4, "maxnreg": TUNING.max_registers},
        90,
        90,
    )
