"""block_attention backward on Hopper in two passes without a workspace, both in Gluon: by row for
dq, by column for dk and dv.

Each pass computes the scores, seven products of tiles where a workspace makes it five, so that
nothing has to match between them: any blocks from 16 on, head sizes up to 256, sequences of several
lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.derived import derived
from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention import hopper_dkdv, hopper_dkdv_wide, hopper_dq
from sparse_layouts.kernels.block_attention.hopper_common import (
    sequence_table,
    terms_strides,
)
from sparse_layouts.kernels.block_attention.sequences import Sequences, padded_sequences
from sparse_layouts.kernels.block_attention.triton_common import padded_head_dim, readied, signature
from sparse_layouts.kernels.hopper_common import work_counter
from sparse_layouts.kernels.launching import PassLaunch, PreparedLaunches

# rows that a program of `attention_terms` takes, by padded head size of v
TERMS_ROWS = {128: 64, 64: 64, 256: 32, 32: 64, 16: 64}


@triton.jit(do_not_specialize=["heads", "num_queries", "row_blocks", "value_dim"])
def attention_terms(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, terms_ptr,
    stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_lb, stride_lh, stride_lm, stride_db, stride_dh, stride_dm,
    heads, num_queries, row_blocks, value_dim, ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Of every row of q lse in base 2, then rowsum(dout * out) - dlse: (B, H, Nq, 2).

    A row without entries has lse +inf, so that exp2 of anything less gives 0, and 0.
    """
    pid = tl.program_id(0)
    block = pid % row_blocks
    sample = pid // row_blocks
    head = (sample % heads).to(tl.int64)
    batch = (sample // heads).to(tl.int64)
    query = block * ROWS + tl.arange(0, ROWS)
    mask_m = query < num_queries
    query = query.to(tl.int64)
    offs_d = tl.arange(0, DV)
    mask = mask_m[:, None] & (offs_d < value_dim)[None, :]
    out_ptrs = out_ptr + batch * stride_ob + head * stride_oh + query[:, None] * stride_om
    dout_ptrs = dout_ptr + batch * stride_gb + head * stride_gh + query[:, None] * stride_gm
    out = tl.load(out_ptrs + (offs_d * stride_od)[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptrs + (offs_d * stride_gd)[None, :], mask=mask, other=0.0).to(tl.float32)
    lse_ptrs = lse_ptr + batch * stride_lb + head * stride_lh + query * stride_lm
    lse = tl.load(lse_ptrs, mask=mask_m, other=float("-inf"))
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        dlse_ptrs = dlse_ptr + batch * stride_db + head * stride_dh + query * stride_dm
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    empty = lse == float("-inf")
    terms = terms_ptr + (sample.to(tl.int64) * num_queries + query) * 2
    tl.store(terms, tl.where(empty, float("inf"), lse * 1.4426950408889634), mask=mask_m)
    tl.store(terms + 1, tl.where(empty, 0.0, delta), mask=mask_m)


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

    Takes 8 bytes a query and head beside the results.
    """
    assert bias is None, "its requirement excludes a bias"
    sequences = without_missing_rows(q, k, pattern, sequences)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    nothing = pattern.num_blocks == 0 or any(t.numel() == 0 for t in (q, k, v))
    nothing = nothing or (sequences is not None and sequences.num_sequences == 0)
    if nothing or sequences is not None:  # rows of no sequence are not written
        for gradient in (dq, dk, dv):
            gradient.zero_()
    if nothing:
        return dq, dk, dv, None
    if seed is None or dropout_p <= 0:
        dropout_p, seed = 0.0, None
    dout, terms = readied(dout), terms_room(out)
    with torch.cuda.device_of(q):
        operands = (dout, dlse, q, k, v, out, lse, terms, dq, dk, dv, pattern, head_map)
        table = None if sequences is None else _table(q, k, v, pattern, sequences)
        for launch in _launches(*operands, scale, dropout_p, seed, sequences, table):
            launch.run()
    return dq, dk, dv, None


class PreparedBackward:
    """Backward passes on operands like these, without dropout, sequences and a gradient of lse: all
    but addresses is settled.
    """

    MOVING = ("q", "k", "v", "dout", "out", "lse", "terms", "dq", "dk", "dv", "counter")

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
        sequences = without_missing_rows(q, k, pattern, None)
        table = None
        if sequences is not None:
            # with the pattern, as its schedules are: a graph that captures the call reads it
            key = ("table_of_samples", q.shape, k.shape, v.shape)
            table = derived(pattern, key, lambda: _table(q, k, v, pattern, sequences))
        self._partly, self._device = sequences is not None, q.device
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        operands = (dout, None, q, k, v, out, lse, terms_room(out), *gradients, pattern, head_map)
        launches = _launches(*operands, scale, 0.0, None, sequences, table)
        self._launches = PreparedLaunches(launches, self.MOVING)

    def __call__(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, stream: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dq, dk, dv)`; `dout` has out's strides."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if self._partly:
            for gradient in (dq, dk, dv):
                gradient.zero_()
        terms, counter = terms_room(out), work_counter(self._device, stream)
        moving = (q, k, v, dout, out, lse, terms, dq, dk, dv, counter)
        self._launches.launch(moving, stream)
        return dq, dk, dv


def without_missing_rows(
    q: Tensor, k: Tensor, pattern: BlockPattern, sequences: Sequences | None
) -> Sequences | None:
    """The samples as sequences where the mask has rows before the first query: of sequences tiles
    without a query are left out, and what they would read of k and v.
    """
    rows, columns = pattern.shape
    if sequences is None and q.shape[2] < rows == columns == k.shape[2]:
        return padded_sequences(q, k, q.shape[0], None, None, None)
    return sequences


def terms_room(out: Tensor) -> Tensor:
    """Room for what both passes need of every row of q: lse in base 2 and delta (B, H, Nq, 2)."""
    return torch.empty(*out.shape[:-1], 2, device=out.device, dtype=torch.float32)


def _launches(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    sequences: Sequences | None,
    table: Tensor | None,
) -> tuple[PassLaunch, PassLaunch, PassLaunch]:
    """Of the terms, by column, by row. `table` is that of the sequences."""
    columns = _columns(q, v)
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
    options |= {"sequences": sequences, "table": table}
    return (
        terms_pass(out, dout, lse, dlse, terms),
        columns.keys_pass(dout, q, k, v, terms, dk, dv, pattern, head_map, **options),
        hopper_dq.queries_pass(dout, q, k, v, terms, dq, pattern, head_map, **options),
    )


def _columns(q: Tensor, v: Tensor) -> Any:
    """The module of the pass by column for these head sizes."""
    wide = max(q.shape[-1], v.shape[-1]) > hopper_dkdv.MOST_HEAD_DIM
    return hopper_dkdv_wide if wide else hopper_dkdv


def _table(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, sequences: Sequences) -> Tensor:
    """What both passes read of the sequences."""
    rows = hopper_dq.rows_of_an_item(q.shape[-1], v.shape[-1])
    sizes = (q.shape[2], k.shape[2], pattern, rows, q.device)
    return sequence_table(sequences, *sizes, keys=_columns(q, v).ITEM_KEYS)


def terms_pass(
    out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, terms: Tensor
) -> PassLaunch:
    batch, heads, nq, value_dim = out.shape
    width = padded_head_dim(value_dim)
    rows = TERMS_ROWS[width]
    blocks = -(-nq // rows)
    arguments: dict[str, Any] = {"out_ptr": out, "dout_ptr": dout, "lse_ptr": lse}
    arguments |= {"dlse_ptr": dlse, "terms_ptr": terms}
    arguments |= terms_strides(out, dout, lse, dlse)
    arguments |= {"heads": heads, "num_queries": nq, "row_blocks": blocks, "value_dim": value_dim}
    options = {"ROWS": rows, "DV": width, "num_warps": 4}
    return PassLaunch(attention_terms, batch * heads * blocks, arguments, options)


def compilations() -> Iterator[Compilation]:
    """Every head size of the terms; the passes list their own."""
    given = {name: "*fp32" for name in ("lse_ptr", "dlse_ptr", "terms_ptr")}
    given |= {"out_ptr": "*bf16", "dout_ptr": "*bf16"}
    for width, rows in TERMS_ROWS.items():
        constexprs = {"ROWS": rows, "DV": width} | ({} if width == 64 else {"dlse_ptr": None})
        types = signature(attention_terms, given, constexprs)
        options = {"num_warps": 4}
        yield Compilation(f"terms-d{width}", attention_terms, types, constexprs, options, 90, 90)
