"""block_attention backward on Hopper: row terms, workspace and launches of the Gluon kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.heads import shared_lists
from sparse_layouts.kernels.block_attention.hopper_backward_kernel import (
    TERMS_LAYOUT,
    hopper_attention_backward,
)
from sparse_layouts.kernels.block_attention.hopper_common import (
    bundle_size,
    terms_strides,
)
from sparse_layouts.kernels.block_attention.reference import dropout_threshold
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_attention.triton_common import (
    kept_scale,
    padded_head_dim,
    readied,
    signature,
)
from sparse_layouts.kernels.block_attention.unit_schedule import (
    GradientSchedules,
    gradient_schedules,
)
from sparse_layouts.kernels.hopper_common import (
    multiprocessors,
    rows_descriptor,
    rows_descriptor_type,
    work_counter,
)
from sparse_layouts.kernels.launching import PackedLaunch, PassLaunch
from sparse_layouts.kernels.triton_common import DTYPE_NAMES

# Keys, values, queries and their gradients of the heads worked on together: an H200's L2. Local
# stride, B 2, H 32, N 8192, D 128: 1346 us by column, with half of it 1400 (2026-11-26).
L2_BYTES = 64_000_000
# The workspace: what fits is worked on at once, else it has two halves, one written and one read.
WORKSPACE_BYTES = 600_000_000
# Of a launch the longest column takes long: there is this much other work to do meanwhile, if the
# workspace's upper limit, HOPPER_WORKSPACE_BYTES, allows. Backward on an H200, 2026-11-26, in us,
# by both halves' GB (0.3, 0.6, 1.2, 2.4, all at once) and, in parentheses, the first that satisfies
# this: A1 2813, 2051, 2099, 2085, 2058 (0.75); A2 2851, 1956, 2026, 2036, 2013; A3 26770, 14116,
# 7867, 5731, 5766 (2.5); four query heads a key head 13008, 5244, -, 2207 (all); dense causal, N
# 8192, 7710, 5660, -, 5365 (0.9). A1 to A3: local stride, B 2, N 8192, blocks of 64 and 128, and B
# 1, N 32768; H 32, D 128.
WORK_BESIDE = 1.5
# The share of the programs that begin with items by row, where there are both kinds: those are
# bound by reading, the others by multiplying. A1 2094 us for 2118 without it, A2 2057 for 2077, A3
# 5811 for 5873; with a quarter these programs run out of work early: 2170, 2133, 6039 (H200,
# 2026-11-27). Half of a unit's keys or values in registers at D 128 spilled: 2517 and 2537 us.
ROW_PROGRAMS = 0.15
# Of A1's 2050 us the row terms take 83, the pass by column 1350 and that by row 580, which overlap
# where there are several launches; at 740 TFLOP/s it would be 1200. Claiming items one by one
# gained 2 to 6% over fixed shares.
# buffers of queries, by padded head size; at D 128 there is room for two
STAGES = {64: 3, 128: 2}
MAX_REGISTERS = 168


@triton.jit(do_not_specialize=["heads", "num_queries", "row_offset", "units", "value_dim"])
def attention_unit_terms(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, terms_ptr,
    stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_lb, stride_lh, stride_lm, stride_db, stride_dh, stride_dm,
    heads, num_queries, row_offset, units, value_dim, DV: tl.constexpr,
):  # fmt: skip
    """Of a unit's 64 rows: lse in base 2, then rowsum(dout * out) - dlse.

    A row without entries, or without a query, has lse +inf, so that exp2 of anything less gives 0.
    """
    pid = tl.program_id(0)
    unit = pid % units
    head = pid // units % heads
    batch = (pid // units // heads).to(tl.int64)
    query = unit * 64 + tl.arange(0, 64) - row_offset
    mask_m = (query >= 0) & (query < num_queries)
    query64, head64 = query.to(tl.int64), head.to(tl.int64)
    offs_d = tl.arange(0, DV)
    mask = mask_m[:, None] & (offs_d < value_dim)[None, :]
    out_ptrs = out_ptr + batch * stride_ob + head64 * stride_oh + query64[:, None] * stride_om
    dout_ptrs = dout_ptr + batch * stride_gb + head64 * stride_gh + query64[:, None] * stride_gm
    out = tl.load(out_ptrs + (offs_d * stride_od)[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptrs + (offs_d * stride_gd)[None, :], mask=mask, other=0.0).to(tl.float32)
    lse_ptrs = lse_ptr + batch * stride_lb + head64 * stride_lh + query64 * stride_lm
    lse = tl.load(lse_ptrs, mask=mask_m, other=float("-inf"))
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        dlse_ptrs = dlse_ptr + batch * stride_db + head64 * stride_dh + query64 * stride_dm
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    empty = lse == float("-inf")
    terms = terms_ptr + pid.to(tl.int64) * 128 + tl.arange(0, 64)
    tl.store(terms, tl.where(empty, float("inf"), lse * 1.4426950408889634))
    tl.store(terms + 64, tl.where(empty, 0.0, delta))


class Plan(NamedTuple):
    """The launches of one backward: their arguments by name, first all that they share, then each
    launch's programs and own arguments; constants; slots of 64 x 64 in the workspace; row units.
    """

    shared: dict[str, Any]
    launches: list[tuple[int, dict[str, int]]]
    options: dict[str, Any]
    slots: int
    units: int


def block_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    dbias_base: Tensor | None = None,
    dbias_blocks: int = 0,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, None)` as the reference defines them, in bf16 or fp16, without a bias.

    Takes a workspace of 2 bytes a stored pair of query and key: of all heads where these are
    WORKSPACE_BYTES or less, else of as many as two launches of :func:`workspace_share` have.
    """
    assert bias is None, "its requirement excludes a bias"
    assert sequences is None, "its requirement excludes sequences"
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if lse.numel() == 0 or pattern.num_blocks == 0 or q.shape[-1] == 0 or v.shape[-1] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), None
    keep = (dropout_p, seed) if seed is not None and dropout_p > 0 else (0.0, None)
    plan = _plan(q, k, v, pattern, head_map, scale, *keep)
    dout = readied(dout)
    terms, workspace = _scratch(plan, q)
    own_terms = _terms_pass(out, dout, lse, dlse, terms, pattern, plan.units)
    arguments = plan.shared | _described(q, k, v, dout, terms, workspace, dq, dk, dv)
    with torch.cuda.device_of(q):
        own_terms.run()
        for programs, own in plan.launches:
            hopper_attention_backward[(programs,)](**arguments, **own, **plan.options)
    return dq, dk, dv, None


class PreparedBackward:
    """Backward passes on operands like these, without dropout, sequences and a gradient of lse: all
    but addresses is settled.
    """

    def __init__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        pattern: BlockPattern,
        head_map: Tensor,
        scale: float,
    ) -> None:
        plan = _plan(q, k, v, pattern, head_map, scale, 0.0, None)
        self._plan, self._device = plan, q.device
        terms, workspace = _scratch(plan, q)
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        own_terms = _terms_pass(out, dout, lse, None, terms, pattern, plan.units)
        self._terms_programs = own_terms.programs
        self._terms = own_terms.pack("out_ptr", "dout_ptr", "lse_ptr", "terms_ptr")
        arguments = plan.shared | plan.launches[0][1]
        arguments |= _described(q, k, v, dout, terms, workspace, *gradients)
        self._packed = PackedLaunch(
            hopper_attention_backward, arguments, plan.options, ("dq_ptr", "counter_ptr")
        )

    def __call__(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, stream: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dq, dk, dv)`; `dout` has out's strides."""
        terms, workspace = _scratch(self._plan, q)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        rows, packed = self._terms, self._packed
        with rows.lock:
            rows.point("out_ptr", out.data_ptr())
            rows.point("dout_ptr", dout.data_ptr())
            rows.point("lse_ptr", lse.data_ptr())
            rows.point("terms_ptr", terms.data_ptr())
            rows.launch(self._terms_programs, stream)
        with packed.lock:
            for name, tensor in zip(
                _DESCRIBED, (q, k, v, dout, terms, workspace, dq, dk, dv), strict=True
            ):
                packed.describe(name, tensor.data_ptr())
            packed.point("dq_ptr", dq.data_ptr())
            packed.point("counter_ptr", work_counter(self._device, stream).data_ptr())
            for programs, own in self._plan.launches:
                for name, value in own.items():
                    packed.number(name, value)
                packed.launch(programs, stream)
        return dq, dk, dv


_DESCRIBED = ("q_desc", "k_desc", "v_desc", "dout_desc", "terms_desc", "ds_desc")
_DESCRIBED += ("dq_desc", "dk_desc", "dv_desc")


def _described(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    terms: Tensor,
    workspace: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> dict[str, Any]:
    tensors = (q, k, v, dout, terms, workspace, dq, dk, dv)
    found = {
        name: rows_descriptor(t, 64)
        for name, t in zip(_DESCRIBED, tensors, strict=True)
        if name != "terms_desc"
    }
    box = [1, 128]
    found["terms_desc"] = TensorDescriptor(
        terms, list(terms.shape), [128, 1], box, TERMS_LAYOUT.value
    )
    return found | {"dq_ptr": dq}


def _scratch(plan: Plan, q: Tensor) -> tuple[Tensor, Tensor]:
    """Row terms and the workspace for the gradients of scores."""
    rows = q.shape[0] * q.shape[1] * plan.units
    terms = torch.empty(rows, 128, device=q.device, dtype=torch.float32)
    return terms, torch.empty(1, 1, plan.slots * 64, 64, device=q.device, dtype=q.dtype)


def _terms_pass(
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    terms: Tensor,
    pattern: BlockPattern,
    units: int,
) -> PassLaunch:
    batch, heads, nq, value_dim = out.shape
    arguments = {"out_ptr": out, "dout_ptr": dout, "lse_ptr": lse, "dlse_ptr": dlse}
    arguments["terms_ptr"] = terms
    arguments |= terms_strides(out, dout, lse, dlse)
    arguments |= {"heads": heads, "num_queries": nq, "row_offset": pattern.shape[0] - nq}
    arguments |= {"units": units, "value_dim": value_dim}
    options = {"DV": padded_head_dim(value_dim), "num_warps": 4}
    return PassLaunch(attention_unit_terms, batch * heads * units, arguments, options)


def workspace_share(
    schedules: GradientSchedules, group: int, key_heads: int, itemsize: int, programs: int
) -> int:
    """How many of the batch's key heads one launch works on.

    A key head's part of the workspace has a tile of 64 x 64 for each place and query head.
    """
    each = max(1, schedules.num_places * group * 64 * 64 * itemsize)
    if key_heads * each <= WORKSPACE_BYTES:
        return key_heads
    work = max(1.0, schedules.mean_tiles / programs)  # of a key head, for each program
    beside = math.ceil(WORK_BESIDE * schedules.longest / work)
    share = max(WORKSPACE_BYTES // 2 // each, beside)
    share = max(1, min(share, key_heads, requirements.HOPPER_WORKSPACE_BYTES // 2 // each))
    return -(-key_heads // -(-key_heads // share))


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Plan:
    (batch, heads, nq, head_dim), (kv_heads, nk), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    (m, _), (bm, bn) = pattern.shape, pattern.block_size
    d = max(64, padded_head_dim(max(head_dim, value_dim)))
    group, key_heads = heads // kv_heads, batch * kv_heads
    # the query heads of a key head visit its columns together: their lists have to be paired alike
    alike = shared_lists(pattern, head_map, group)
    schedules = gradient_schedules(pattern, 2, pair_by_length=alike)
    by_column, by_row, places, num_places = schedules[:4]
    column_groups, row_groups = by_column.rows.shape[1], by_row.rows.shape[1]
    first_group = (m - nq) // 128
    units = -(-m // 64)
    programs = multiprocessors(q.device)
    share = workspace_share(schedules, group, key_heads, q.element_size(), programs)
    share_by_row = ROW_PROGRAMS * (row_groups - first_group) / row_groups
    halves = min(2, -(-key_heads // share))
    shared = {
        "counter_ptr": work_counter(q.device, torch.cuda.current_stream(q.device).cuda_stream),
        "head_map_ptr": head_map,
        "column_rows_ptr": by_column.heaviest_first if alike else by_column.rows,
        "column_columns_ptr": by_column.columns,
        "column_flags_ptr": by_column.flags,
        "column_tiles_ptr": by_column.block_tiles,
        "column_counts_ptr": by_column.log_counts,
        "row_rows_ptr": by_row.heaviest_first if first_group == 0 else by_row.rows,
        "row_columns_ptr": by_row.columns,
        "row_flags_ptr": by_row.flags,
        "places_ptr": places,
        "tiles_ptr": transpose_pattern(pattern).tiles,
        "seed_ptr": seed,
        "heads": heads,
        "group": group,
        "column_groups": column_groups,
        "row_groups": row_groups - first_group,
        "stride_rows": row_groups,
        "first_group": first_group,
        "stride_map": 0 if head_map.shape[0] == 1 else head_map.stride(0),
        "places": num_places,
        "units": units,
        "row_offset": m - nq,
        "num_queries": nq,
        "num_keys": nk,
        "num_rows": m,
        "scale": scale,
        "threshold": dropout_threshold(dropout_p),
        "keep_scale": kept_scale(dropout_p),
    }
    launches = []
    bytes_each = group * 4 * nq * d * q.element_size()
    for number in range(-(-key_heads // share) + 1):
        columns = max(0, min(share, key_heads - number * share))
        rows = 0 if number == 0 else min(share, key_heads - (number - 1) * share) * group
        items = columns * column_groups + rows * (row_groups - first_group)
        launched = min(programs, items)
        own = {
            "first_column": number * share,
            "column_samples": columns,
            "bundle": bundle_size(max(columns, 1), bytes_each, L2_BYTES),
            "first_row": max(0, number - 1) * share * group,
            "row_samples": rows,
            "row_programs": int(share_by_row * launched) if columns and rows else 0,
            "column_slot": number % halves * share * group,
            "row_slot": (number - 1) % halves * share * group,
        }
        launches.append((launched, own))
    options = {"BM": bm, "BN": bn, "D": d, "STAGES": STAGES[d]}
    options |= {"num_warps": 4, "maxnreg": MAX_REGISTERS}
    return Plan(shared, launches, options, halves * share * group * num_places, units)


def compilations() -> Iterator[Compilation]:
    """Both head sizes on blocks of both kinds, and every feature once."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for d in (128, 64):
        yield _compilation(d, 64, bf16)
        yield _compilation(d, 128, bf16)
        yield _compilation(d, 64, fp16, tiles=False, counts=True)
        yield _compilation(d, 64, bf16, dropout=True)
    given = {name: "*fp32" for name in ("lse_ptr", "dlse_ptr", "terms_ptr")}
    given |= {"out_ptr": "*bf16", "dout_ptr": "*bf16"}
    for constexprs in ({"DV": 128, "dlse_ptr": None}, {"DV": 64}):
        yield Compilation(
            f"terms-d{constexprs['DV']}",
            attention_unit_terms,
            signature(attention_unit_terms, given, constexprs),
            constexprs,
            {"num_warps": 4},
            90,
            90,
        )


def _compilation(
    d: int,
    block: int,
    dtype: torch.dtype,
    *,
    tiles: bool = True,
    counts: bool = False,
    dropout: bool = False,
) -> Compilation:
    constexprs = {"BM": block, "BN": block, "D": d, "STAGES": STAGES[d]}
    options = {"tiles": tiles, "column_counts": counts, "seed": dropout}
    constexprs |= {f"{name}_ptr": None for name, there in options.items() if not there}
    given = dict.fromkeys(hopper_attention_backward.arg_names[:9], rows_descriptor_type(dtype, 64))
    given["terms_desc"] = f"tensordesc<fp32[1, 128],{TERMS_LAYOUT.value!r}>"
    given |= {"dq_ptr": f"*{DTYPE_NAMES[dtype]}", "column_counts_ptr": "*fp32", "seed_ptr": "*i64"}
    on = [name for name, there in options.items() if there]
    return Compilation(
        "-".join([f"block{block}", f"d{d}", DTYPE_NAMES[dtype], *on]),
        hopper_attention_backward,
        signature(hopper_attention_backward, given, constexprs),
        constexprs,
        {"num_warps": 4, "maxnreg": MAX_REGISTERS},
        90,
        90,
    )
