"""block_attention forward on Hopper: how the Gluon kernel is tuned and launched."""

from __future__ import annotations

import math
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
    sequence_table,
    sequence_tiles,
)
from sparse_layouts.kernels.block_attention.hopper_forward_kernel import hopper_attention_forward
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.triton_common import (
    padded_head_dim,
    signature,
)
from sparse_layouts.kernels.block_attention.unit_schedule import unit_schedule
from sparse_layouts.kernels.block_attention_fp8.quantize import ROWS_PER_SCALE
from sparse_layouts.kernels.hopper_common import (
    bytes_descriptor,
    bytes_descriptor_type,
    multiprocessors,
    rows_descriptor,
    rows_descriptor_type,
    work_counter,
)
from sparse_layouts.kernels.launching import PassLaunch
from sparse_layouts.kernels.triton_common import DTYPE_NAMES


class Tuning(NamedTuple):
    """How a head size is worked on: warpgroups a program, keys a tile, buffers of keys and values
    and of queries, programs a multiprocessor, registers a thread at the start and, with two
    warpgroups, of the second one.
    """

    units: int
    keys: int
    stages: int
    queries: int
    programs: int
    max_registers: int
    registers: int = 240


# Padded head size: tuning. Measured on an H200 and an H100, 2026-11-26, in bf16 on local-stride
# masks (B 2, H 32, N 8192, D 128; B 4, H 16, N 4096, D 64), dense causal, BigBird (N 4096, D 64)
# and random blocks of 16 and 32 (N 8192, D 128). Tiles of 64 keys take 1.15 to 1.25 times as long
# at D 128; at D 64 two programs of one warpgroup and 128 keys took 139 us on local-stride and 93 on
# BigBird, three of 64 keys 132 and 106, one of two warpgroups 147 and 107. D 256 is not tuned.
#
# Floors at 740 TFLOP/s: local stride, N 8192, 480 us (measured 615), dense causal 1490 (1645); D 64
# is bound by exp2 and issue slots (54% of them used, tensor cores 39%). What gained nothing there:
# warpgroups taking turns at the tensor cores (items overlap by themselves); the wait for a tile's
# product behind the next softmax (ptxas moves it up to the last branch before; forced, 4% slower);
# three and four warpgroups, or four pairs of producer and consumer a program (166 us at D 64).
TUNINGS = {
    64: Tuning(1, 128, 2, 2, 2, 128),
    128: Tuning(2, 128, 2, 2, 1, 168),
    256: Tuning(2, 64, 2, 1, 1, 168),
}
# In 8 bits, by padded head size and keys of a tile. Measured on an H200, 2026-11-27, of quantised
# bf16, in graphs, us of this, of Triton's kernel in 8 bits and of this one in 16: local stride (B
# 2, H 32, N 8192, D 128) blocks of 128 542, 593, 607 and of 64 648, 701, 649; dense causal 1492,
# 1635, 1674; 8 KV heads 537, 596, 599; D 64 (B 4, H 16, N 4096) blocks of 128 183, 218, 191 and of
# 64 134, 156, 140. Programs of two warpgroups took 579, 657 and 1610 on the first three, tiles of
# 64 keys 661 on the first, a third buffer nothing. Adding up in the tensor cores, which is not
# exact enough, took 506, 601, 1410, 503, 181 and 131.
TUNINGS_8_BITS = {
    (64, 64): Tuning(1, 64, 2, 2, 3, 80),
    (64, 128): Tuning(1, 128, 2, 2, 2, 128),
    (128, 64): Tuning(1, 64, 3, 2, 2, 128),
    (128, 128): Tuning(1, 128, 2, 2, 2, 128),
}
# Keys and values of the heads that are worked on together; half of an H200's L2.
L2_BYTES = 32_000_000


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as `reference.block_attention` defines them, in bf16 or fp16, without a bias.

    After FlashAttention-3 (Shah et al., arXiv 2407.08608).
    """
    assert bias is None, "its requirement excludes a bias"
    value_dim = v.shape[-1]
    out = torch.empty_like(q) if value_dim == q.shape[-1] else q.new_empty(*q.shape[:-1], value_dim)
    lse = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
    nothing = lse.numel() == 0 or pattern.num_blocks == 0 or k.shape[2] == 0
    nothing = nothing or (sequences is not None and sequences.num_sequences == 0)
    if nothing or sequences is not None:  # rows of no sequence are not written
        out.zero_()
        lse.fill_(-math.inf)
    if not nothing:
        keep = (dropout_p, seed) if seed is not None and dropout_p > 0 else (0.0, None)
        with torch.cuda.device_of(q):
            forward_pass(q, k, v, out, lse, pattern, head_map, scale, *keep, sequences).run()
    return out, lse


class PreparedForward:
    """Calls on operands like these, without dropout and sequences: all but addresses is settled."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        pattern: BlockPattern,
        head_map: Tensor,
        scale: float,
    ) -> None:
        launch = forward_pass(q, k, v, out, lse, pattern, head_map, scale)
        self._programs, self._device = launch.programs, q.device
        self._packed = launch.pack("out_ptr", "lse_ptr", "counter_ptr")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, stream: int
    ) -> None:
        """Writes `out` and, if there is one, `lse`."""
        packed = self._packed
        with packed.lock:
            packed.describe("q_desc", q.data_ptr())
            packed.describe("k_desc", k.data_ptr())
            packed.describe("v_desc", v.data_ptr())
            address = out.data_ptr()
            packed.describe("out_desc", address)
            packed.point("out_ptr", address)
            packed.number("wants_lse", 0 if lse is None else 1)
            if lse is not None:
                packed.point("lse_ptr", lse.data_ptr())
            packed.point("counter_ptr", work_counter(self._device, stream).data_ptr())
            packed.launch(self._programs, stream)


def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequences: Sequences | None = None,
    scales: tuple[Tensor, Tensor, Tensor] | None = None,
) -> PassLaunch:
    """The launch of the kernel. With `scales` of q, k and v these are of 8 bits, without dropout
    and sequences, in blocks from 64 on.
    """
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    m, (bm, bn) = pattern.shape[0], pattern.block_size
    d = max(64, padded_head_dim(max(head_dim, value_dim)))
    tuning = TUNINGS[d] if scales is None else TUNINGS_8_BITS[d, min(bn, 128)]
    group = heads // kv_heads
    # two heads that read the same lists and keys share a program as two units would
    paired = tuning.units == 2 and sequences is None and group % 2 == 0
    paired = paired and shared_lists(pattern, head_map, 2)
    units = 1 if paired else tuning.units
    schedule = unit_schedule(pattern, units, tuning.keys)
    groups = schedule.rows.shape[1]
    first_group = 0 if sequences is not None else (m - nq) // (units * 64)
    samples = batch * heads // (2 if paired else 1)
    items = samples * (groups - first_group)
    table = None
    if sequences is not None:
        table = sequence_table(sequences, nq, nk, pattern, units * 64, q.device)
        tiles = nq // (units * 64) + 2
        extra = 2 * sequences.num_sequences if sequences.packed else 0
        items = heads * (tiles * batch + extra)
    piece = min(bn, tuning.keys)
    in_order = first_group == 0 and sequences is None
    arguments = pass_arguments(
        q, k, m, pattern.tiles, head_map, schedule, sequences, table, scale, dropout_p, seed
    )
    if scales is None:
        arguments["q_desc"] = rows_descriptor(q, 64)
        arguments["k_desc"] = rows_descriptor(k, piece)
        arguments["v_desc"] = rows_descriptor(v, piece)
    else:
        arguments["q_desc"] = bytes_descriptor(q, 64, d)
        arguments["k_desc"] = bytes_descriptor(k, piece, d)
        arguments["v_desc"] = bytes_descriptor(v.mT, d, piece)
    names = ("q_scale_ptr", "k_scale_ptr", "v_scale_ptr")
    arguments |= dict(zip(names, scales or (None,) * 3, strict=True))
    arguments |= {
        "out_desc": rows_descriptor(out, 64),
        "out_ptr": out,
        "lse_ptr": lse,
        "rows_ptr": schedule.heaviest_first if in_order else schedule.rows,
        "groups": groups - first_group,
        "bundle": bundle_size(samples, 2 * nk * d * q.element_size() // group, L2_BYTES),
        "samples": samples,
        "stride_rows": groups,
        "first_group": first_group,
        "stride_lse": nq,
        "wants_lse": 1,
    }
    options = {
        "BM": bm,
        "BN": bn,
        **_constants(tuning, d, piece),
        "SCALED": scale <= 0,
        "HEADS_EACH": 2 if paired else 1,
        "num_warps": 4,
        "maxnreg": tuning.max_registers,
    }
    most = multiprocessors(q.device) * tuning.programs
    return PassLaunch(hopper_attention_forward, min(most, items), arguments, options)


def _constants(tuning: Tuning, d: int, piece: int) -> dict[str, int]:
    return {
        "PIECE": piece,
        "TN": tuning.keys,
        "D": d,
        "NUM_UNITS": tuning.units,
        "STAGES": tuning.stages,
        "QUERIES": tuning.queries,
        "REGISTERS": tuning.registers,
        "ROWS_PER_SCALE": ROWS_PER_SCALE,
    }


def compilations() -> Iterator[Compilation]:
    """Every tuning on blocks of every kind, and every feature once."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for d in (128, 64, 256):
        yield _compilation(d, 64, bf16)
        for block in (16, 32, 128):
            yield _compilation(d, block, bf16)
    yield _compilation(128, 64, fp16)
    yield _compilation(128, 64, bf16, tiles=False, counts=True, paired=True)
    yield _compilation(64, 64, bf16, counts=True, dropout=True)
    yield _compilation(128, 64, bf16, dropout=True)
    yield _compilation(128, 64, bf16, sequences=True)
    yield _compilation(64, 16, fp16, sequences=True, dropout=True)
    yield _compilation(256, 64, bf16, sequences=True)
    yield _compilation(128, 64, bf16, scaled=True)
    for rows, keys in ((128, 128), (64, 128), (128, 64)):
        constexprs = {"TILE": rows, "BLOCK": 128, "KEY_TILE": keys, "q_starts_ptr": None}
        types, name = signature(sequence_tiles, {}, constexprs), f"tiles-{rows}-{keys}"
        yield Compilation(name, sequence_tiles, types, constexprs, {"num_warps": 4}, 90, 90)


def compilations_8_bits() -> Iterator[Compilation]:
    """Every tuning in 8 bits, and every feature once."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for d in (64, 128):
        for block in (64, 128):
            yield _compilation(d, block, bf16, fp8=True)
    yield _compilation(128, 64, fp16, tiles=False, counts=True, fp8=True)
    yield _compilation(64, 128, fp16, scaled=True, fp8=True)


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
    scaled: bool = False,
    fp8: bool = False,
) -> Compilation:
    tuning = TUNINGS_8_BITS[d, min(block, 128)] if fp8 else TUNINGS[d]
    piece = min(block, tuning.keys)
    constexprs = {
        "BM": block,
        "BN": block,
        **_constants(tuning, d, piece),
        "SCALED": scaled,
        "HEADS_EACH": 2 if paired else 1,
    }
    options = {"tiles": tiles, "log_counts": counts, "sequences": sequences, "seed": dropout}
    options |= dict.fromkeys(("q_scale", "k_scale", "v_scale"), fp8)
    constexprs |= {f"{name}_ptr": None for name, there in options.items() if not there}
    given = dict.fromkeys(("q_desc", "out_desc"), rows_descriptor_type(dtype, 64))
    given |= dict.fromkeys(("k_desc", "v_desc"), rows_descriptor_type(dtype, piece))
    if fp8:
        given["q_desc"] = bytes_descriptor_type(64, d)
        given["k_desc"] = bytes_descriptor_type(piece, d)
        given["v_desc"] = bytes_descriptor_type(d, piece)
    of_fp32 = ("lse_ptr", "log_counts_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr")
    given |= dict.fromkeys(of_fp32, "*fp32")
    given |= {"out_ptr": f"*{DTYPE_NAMES[dtype]}", "seed_ptr": "*i64"}
    on = [name for name, there in options.items() if there and not name.endswith("_scale")]
    on += ["scaled"] * scaled + ["fp8"] * fp8
    return Compilation(
        "-".join([f"block{block}", f"d{d}", DTYPE_NAMES[dtype], *on, *(["paired"] * paired)]),
        hopper_attention_forward,
        signature(hopper_attention_forward, given, constexprs),
        constexprs,
        {"num_warps": 4, "maxnreg": tuning.max_registers},
        90,
        90,
    )
