"""block_matmul on Hopper for a few columns of x, in Gluon: what limits it is the reading of the
blocks, which are cut evenly, whatever rows they belong to.

A step is 64 columns of a block. Of a program's steps, which follow each other, one warp brings the
weights and one the columns of x, by TMA, into a ring of STAGES buffers; a warpgroup multiplies. The
program has of each block row a stretch (`even_cuts.py`): the whole of it, or a piece, whose sum it
leaves to the last of the row's pieces to come.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sparse_layouts.kernels.hopper_common import (
    ROWS_LAYOUT,
    grid_dependency,
    wait_free,
)
from sparse_layouts.kernels.hopper_products import activated, multiply_steps

INTEGERS = ["M", "N", "block_rows", "block_columns", "blocks", "programs", "each", "more"]
INTEGERS += ["values_batch", "x_batch", "x_pattern"]


@gluon.jit
def _own_steps(programs, each, more):
    """This program's batch index, its place among those of the same one, and its steps: the first,
    and the one after the last.
    """
    batch = gl.program_id(0) // programs
    program = gl.program_id(0) - batch * programs
    first = program * each + gl.minimum(program, more)
    return batch, program, first, first + each + (program < more).to(gl.int32)


@gluon.jit
def _begin_early(
    values_ptr, blocks, programs, each, more, values_batch,
    BM: gl.constexpr, BK: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Lets the next kernel begin, and asks the L2 for the program's first weights.

    The kernel before may still run, and may have written anything that is read here: until it is
    done only the L2 is told what will be wanted, which sees all writes.
    """
    grid_dependency("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
    if values_ptr is not None:
        ASM: gl.constexpr = (
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; "
            "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
        )
        PARTS: gl.constexpr = BK // 64
        batch, _, first, end = _own_steps(programs, each, more)
        begin = first // PARTS
        steps = gl.minimum(((end + PARTS - 1) // PARTS - begin) * PARTS, EARLY)
        values_ptr += ((batch * values_batch).to(gl.int64) * blocks + begin) * (BM * BK)
        thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
        sizes = gl.where(thread < steps, BM * 128, 0)
        ptrs = values_ptr + thread * (BM * 64)
        gl.inline_asm_elementwise(ASM, "=r,l,r", [ptrs, sizes], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _listed(list_ptr, position, blocks):
    """32 entries of a list of blocks from `position` on, one a lane."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    positions = position + gl.arange(0, 32, layout=LANES)
    return gl.load(list_ptr + positions, mask=positions < blocks, other=0)


@gluon.jit
def _entry(entries, place):
    """The entry of a lane, in all of them."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    return gl.max(gl.where(gl.arange(0, 32, layout=LANES) == place, entries, 0), 0)


@gluon.jit
def _bring_values(
    values_desc, slots_ptr, shared, blocks, programs, each, more, values_batch,
    BM: gl.constexpr, BK: gl.constexpr, VALUES_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that brings weights: of every step BM rows and 64 columns."""
    w_s, _, full, free = shared
    PARTS: gl.constexpr = BK // 64
    batch, _, first, end = _own_steps(programs, each, more)
    begin = first // PARTS
    grid_dependency("griddepcontrol.wait; mov.u32 $0, 0;")
    if slots_ptr is not None:
        slots = _listed(slots_ptr, begin, blocks)
        later = _listed(slots_ptr, begin + 32, blocks)
    for turn in range(0, end - first):
        position = (first + turn) // PARTS
        part = (first + turn) % PARTS
        slot = position
        if slots_ptr is not None:
            place = position - begin
            if (place > 0) & (place % 32 == 0) & (part == 0):
                slots = later
                later = _listed(slots_ptr, position + 32, blocks)
            slot = _entry(slots, place % 32)
        stage = turn % STAGES
        bar = full.index(stage)
        wait_free(free, turn, STAGES)
        mbarrier.expect(bar, BM * 128)
        if VALUES_T:
            for c in gl.static_range(BM // 64):
                tma.async_copy_global_to_shared(
                    values_desc, [batch * values_batch, slot, part * 64, c * 64], bar,
                    w_s.index(stage).slice(c * 64, 64, dim=3),
                )  # fmt: skip
        else:
            tma.async_copy_global_to_shared(
                values_desc, [batch * values_batch, slot, 0, part * 64], bar, w_s.index(stage)
            )


@gluon.jit
def _bring_x(
    x_desc, columns_ptr, shared, block_columns, blocks, programs, each, more, x_batch, x_pattern,
    BK: gl.constexpr, TN: gl.constexpr, PATTERNS: gl.constexpr, X_T: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that brings what the weights of every step meet: 64 rows of x."""
    _, x_s, full, free = shared
    PARTS: gl.constexpr = BK // 64
    batch, _, first, end = _own_steps(programs, each, more)
    begin = first // PARTS
    grid_dependency("griddepcontrol.wait; mov.u32 $0, 0;")
    columns = _listed(columns_ptr, begin, blocks)
    later = _listed(columns_ptr, begin + 32, blocks)
    for turn in range(0, end - first):
        place = (first + turn) // PARTS - begin
        part = (first + turn) % PARTS
        if (place > 0) & (place % 32 == 0) & (part == 0):
            columns = later
            later = _listed(columns_ptr, begin + place + 32, blocks)
        column = _entry(columns, place % 32)
        pattern = column * 0
        if PATTERNS:
            pattern = column // block_columns
            column -= pattern * block_columns
        k = column * BK + part * 64
        stage = turn % STAGES
        bar = full.index(stage)
        wait_free(free, turn, STAGES)
        mbarrier.expect(bar, TN * 128)
        if X_T:
            where = [batch * x_batch, pattern * x_pattern, 0, k]
        else:
            where = [batch * x_batch, pattern * x_pattern, k, 0]
        tma.async_copy_global_to_shared(x_desc, where, bar, x_s.index(stage))


@gluon.jit
def _stretch(cuts_ptr, at, FIELDS: gl.constexpr):
    """Block row, steps, piece of the row, pieces of the row, place of its first piece's sum, and
    where the program's next stretch is.
    """
    ptr = cuts_ptr + at * FIELDS
    return (
        gl.load(ptr), gl.load(ptr + 1), gl.load(ptr + 2), gl.load(ptr + 3), gl.load(ptr + 4),
        gl.load(ptr + 5),
    )  # fmt: skip


@gluon.jit
def _consume(
    out_ptr, bias_ptr, cuts_ptr, sums_ptr, counters_ptr, shared, M, N, block_rows, programs, each,
    more, stride_out_batch, stride_out_pattern, stride_out_m, stride_out_n,
    BM: gl.constexpr, TN: gl.constexpr, FIELDS: gl.constexpr, TOGETHER: gl.constexpr,
    VALUES_T: gl.constexpr, X_T: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warpgroup that multiplies, stretch after stretch, and writes."""
    w_s, x_s, full, free = shared
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TN, 16])
    TILE: gl.constexpr = BM * TN
    batch, program, _, _ = _own_steps(programs, each, more)
    offs_m = gl.arange(0, BM, layout=gl.SliceLayout(1, ACC))
    offs_n = gl.arange(0, TN, layout=gl.SliceLayout(0, ACC))
    offs = offs_m[:, None] * TN + offs_n[None, :]
    first_place = (batch * (2 * programs)).to(gl.int64)
    grid_dependency("griddepcontrol.wait; mov.u32 $0, 0;")
    step = 0
    at = program
    row, steps, piece, pieces, place, following = _stretch(cuts_ptr, at, FIELDS)
    while at >= 0:
        # what comes after this stretch is on its way meanwhile
        later = _stretch(cuts_ptr, gl.maximum(following, 0), FIELDS)
        pattern = row // block_rows
        rows = (row - pattern * block_rows) * BM + offs_m
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + rows, mask=rows < M, other=0.0)
        acc = gl.zeros([BM, TN], gl.float32, ACC)
        acc = multiply_steps(
            acc, w_s, x_s, full, free, step, steps, 0, 1, 0, 1, VALUES_T, X_T, STAGES
        )
        step += steps
        is_last = pieces == 1
        if pieces > 1:
            sums = sums_ptr + (first_place + place) * TILE
            gl.store(sums + piece * TILE + offs, acc)
            tl.debug_barrier()  # every thread has stored before one of them counts
            counter = counters_ptr + first_place + place
            is_last = gl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1
            if is_last:
                tl.debug_barrier()
                gl.store(counter, 0)
                acc = gl.zeros([BM, TN], gl.float32, ACC)
                for k in range(0, pieces, TOGETHER):
                    for i in gl.static_range(TOGETHER):
                        is_there = gl.full([BM, TN], k + i, gl.int32, ACC) < pieces
                        acc += gl.load(
                            sums + (k + i) * TILE + offs, mask=is_there, other=0.0,
                            cache_modifier=".cg",
                        )  # fmt: skip
        if is_last:
            if bias_ptr is not None:
                acc += bias.to(gl.float32)[:, None]
            acc = activated(acc, ACTIVATION)
            out = out_ptr + batch.to(gl.int64) * stride_out_batch
            out += pattern.to(gl.int64) * stride_out_pattern
            out += (rows.to(gl.int64) * stride_out_m)[:, None]
            out += (offs_n.to(gl.int64) * stride_out_n)[None, :]
            inside = (rows < M)[:, None] & (offs_n < N)[None, :]
            gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
        at = following
        row, steps, piece, pieces, place, following = later


@gluon.jit(do_not_specialize=INTEGERS)
def hopper_few_columns(
    values_desc, x_desc, values_ptr, slots_ptr, columns_ptr, cuts_ptr, sums_ptr, counters_ptr,
    bias_ptr, out_ptr, M, N, block_rows, block_columns, blocks, programs, each, more, values_batch,
    x_batch, x_pattern, stride_out_batch, stride_out_pattern, stride_out_m, stride_out_n,
    BM: gl.constexpr, BK: gl.constexpr, TN: gl.constexpr, FIELDS: gl.constexpr,
    TOGETHER: gl.constexpr, PATTERNS: gl.constexpr, VALUES_T: gl.constexpr, X_T: gl.constexpr,
    ACTIVATION: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Program p of a batch index has steps `p * each + min(p, more)` on."""
    _begin_early(values_ptr, blocks, programs, each, more, values_batch, BM, BK, EARLY)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = values_desc.dtype
    if VALUES_T:
        w_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, BM], ROWS_LAYOUT)
    else:
        w_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, 64], ROWS_LAYOUT)
    if X_T:
        x_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TN, 64], x_desc.layout)
    else:
        x_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, TN], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # of weights and of x
        mbarrier.init(free.index(i), count=1)
    shared = (w_s, x_s, full, free)
    gl.warp_specialize([
        (_consume, (
            out_ptr, bias_ptr, cuts_ptr, sums_ptr, counters_ptr, shared, M, N, block_rows, programs,
            each, more, stride_out_batch, stride_out_pattern, stride_out_m, stride_out_n,
            BM, TN, FIELDS, TOGETHER, VALUES_T, X_T, ACTIVATION, STAGES,
        )),
        (_bring_values, (
            values_desc, slots_ptr, shared, blocks, programs, each, more, values_batch,
            BM, BK, VALUES_T, STAGES,
        )),
        (_bring_x, (
            x_desc, columns_ptr, shared, block_columns, blocks, programs, each, more, x_batch,
            x_pattern, BK, TN, PATTERNS, X_T, STAGES,
        )),
    ], [1, 1], [24, 24])  # fmt: skip
