"""dq of block_attention on Hopper: how the Gluon kernel is tuned and launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.heads import shared_lists
from sparse_layouts.kernels.block_attention.hopper_common import (
    bundle_size,
    pass_arguments,
)
from sparse_layouts.kernels.block_attention.hopper_dq_kernel import hopper_attention_dq
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.triton_common import (
    padded_head_dim,
    signature,
)
from sparse_layouts.kernels.block_attention.unit_schedule import UNIT, unit_schedule
from sparse_layouts.kernels.hopper_common import (
    multiprocessors,
    rows_descriptor,
    rows_descriptor_type,
)
from sparse_layouts.kernels.launching import PassLaunch
from sparse_layouts.kernels.triton_common import DTYPE_NAMES


class Tuning(NamedTuple):
    """How a head size is worked on: warpgroups a program, keys a tile, buffers of keys and of
    values, buffers of queries and their gradients, programs a multiprocessor, registers a thread at
    the start and, with two warpgroups, of the second one.
    """

    units: int
    keys: int
    stages: int
    queries: int
    programs: int
    max_registers: int
    registers: int = 240


# Padded head size: tuning. Two warpgroups' queries and their gradients take 64 and 128 KB a buffer
# at D 128 and 256, so that at 256 there is room for one, and for three tiles of 32 keys.
#
# Microseconds of this pass on an H200, local stride, H 16, N 8192, bf16, blocks of 64 and of 16
# (2026-11-26; in parentheses the rate of its three products): D 64 139 and 152 (493 TFLOP/s; two
# warpgroups 148 and 167, with tiles of 64 keys 160 and 176), D 128 215 and 233 (636; two stages 222
# and 257), D 256 484 and 518 (566; two stages 502 and 584).
TUNINGS = {
    64: Tuning(1, 128, 2, 2, 2, 128),
    128: Tuning(2, 64, 3, 2, 1, 168),
    256: Tuning(2, 32, 3, 1, 1, 168),
}
# Keys and values of the heads that are worked on together; half of an H200's L2.
L2_BYTES = 32_000_000


def queries_pass(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Tensor,
    dq: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    sequences: Sequences | None,
    table: Tensor | None,
) -> PassLaunch:
    """The launch that writes `dq`, in bf16 or fp16; where there are sequences, only the rows that
    belong to one.

    `terms` (B, H, Nq, 2) fp32, contiguous: of every query the logsumexp in base 2, +inf for a row
    without entries, and rowsum(dout * out) less the gradient of the logsumexp. The pattern stores a
    block, and there are keys. `table` is that of the sequences, for :func:`rows_of_an_item`.
    """
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    tuning, d = _tuning(head_dim, value_dim)
    rows = tuning.units * UNIT
    group = heads // kv_heads
    # two heads that read the same lists and keys share a program as two units would
    paired = tuning.units == 2 and sequences is None and group % 2 == 0
    paired = paired and shared_lists(pattern, head_map, 2)
    units = 1 if paired else tuning.units
    schedule = unit_schedule(pattern, units, tuning.keys)
    groups = schedule.rows.shape[1]
    first_group = 0 if sequences is not None else (m - nq) // (units * UNIT)
    samples = batch * heads // (2 if paired else 1)
    items = samples * (groups - first_group)
    if sequences is not None:
        extra = 2 * sequences.num_sequences if sequences.packed else 0
        items = heads * ((nq // rows + 2) * batch + extra)
    piece = min(bn, tuning.keys)
    in_order = first_group == 0 and sequences is None
    arguments = pass_arguments(
        q, k, m, pattern.tiles, head_map, schedule, sequences, table, scale, dropout_p, seed
    ) | {
        "q_desc": rows_descriptor(q, UNIT),
        "k_desc": rows_descriptor(k, piece),
        "v_desc": rows_descriptor(v, piece),
        "dout_desc": rows_descriptor(dout, UNIT),
        "dq_desc": rows_descriptor(dq, UNIT),
        "dq_ptr": dq,
        "terms_ptr": terms,
        "rows_ptr": schedule.heaviest_first if in_order else schedule.rows,
        "groups": groups - first_group,
        "bundle": bundle_size(samples, 2 * nk * d * q.element_size() // group, L2_BYTES),
        "samples": samples,
        "stride_rows": groups,
        "first_group": first_group,
    }
    options = {
        "BM": bm,
        "BN": bn,
        **_constants(tuning, d, piece),
        "HEADS_EACH": 2 if paired else 1,
        "num_warps": 4,
        "maxnreg": tuning.max_registers,
    }
    programs = min(multiprocessors(q.device) * tuning.programs, items)
    return PassLaunch(hopper_attention_dq, programs, arguments, options)


def rows_of_an_item(head_dim: int, value_dim: int) -> int:
    """Rows of the mask that a program works on at a time, where there are sequences."""
    return _tuning(head_dim, value_dim)[0].units * UNIT


def _tuning(head_dim: int, value_dim: int) -> tuple[Tuning, int]:
    """And the padded head size."""
    d = max(64, padded_head_dim(max(head_dim, value_dim)))
    return TUNINGS[d], d


def _constants(tuning: Tuning, d: int, piece: int) -> dict[str, int]:
    return {
        "PIECE": piece,
        "TN": tuning.keys,
        "D": d,
        "NUM_UNITS": tuning.units,
        "STAGES": tuning.stages,
        "QUERIES": tuning.queries,
        "REGISTERS": tuning.registers,
    }


def compilations() -> Iterator[Compilation]:
    """Every tuning on blocks of every kind, and every feature once."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for d in (128, 64, 256):
        for block in (64, 16, 32, 128):
            yield _compilation(d, block, bf16)
    yield _compilation(128, 64, fp16)
    yield _compilation(128, 64, bf16, tiles=False, counts=True, paired=True)
    yield _compilation(64, 64, bf16, counts=True, dropout=True)
    yield _compilation(128, 64, bf16, dropout=True)
    yield _compilation(128, 64, bf16, sequences=True)
    yield _compilation(64, 16, fp16, sequences=True, dropout=True)
    yield _compilation(256, 64, bf16, sequences=True)
    yield _compilation(256, 16, bf16, counts=True, dropout=True)


def _compilation(
    d: int,
    block: int,
    dtype: torch.dtype,
    *,
    tiles: bool = True,
    counts: bool = False,
    dropout: bool = False,
    sequences: bool = False,
    paired: bool = False,
) -> Compilation:
    tuning = TUNINGS[d]
    piece = min(block, tuning.keys)
    constexprs = {
        "BM": block,
        "BN": block,
        **_constants(tuning, d, piece),
        "HEADS_EACH": 2 if paired else 1,
    }
    options = {"tiles": tiles, "log_counts": counts, "sequences": sequences, "seed": dropout}
    constexprs |= {f"{name}_ptr": None for name, there in options.items() if not there}
    given = dict.fromkeys(("q_desc", "dout_desc", "dq_desc"), rows_descriptor_type(dtype, UNIT))
    given |= dict.fromkeys(("k_desc", "v_desc"), rows_descriptor_type(dtype, piece))
    given |= dict.fromkeys(("terms_ptr", "log_counts_ptr"), "*fp32")
    given |= {"dq_ptr": f"*{DTYPE_NAMES[dtype]}", "seed_ptr": "*i64"}
    on = [name for name, there in options.items() if there]
    return Compilation(
        "-".join([f"block{block}", f"d{d}", DTYPE_NAMES[dtype], *on, *(["paired"] * paired)]),
        hopper_attention_dq,
        signature(hopper_attention_dq, given, constexprs),
        constexprs,
        {"num_warps": 4, "maxnreg": tuning.max_registers},
        90,
        90,
    )
