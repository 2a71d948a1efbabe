"""nm_matmul on Hopper's tensor cores, in Gluon, from entries that lie by fragments.

A program multiplies TILES tiles of 16 rows. Its warps share the contracted dimension: in a phase
each takes a unit of every tile (`sparse_layouts/nm_fragments.py`), which the copy engine has
brought by then, STAGES phases ahead, and the columns of x that belong to it. What the warps have
added up is summed once, at the end.

2:4 goes to `mma.sp` as it lies. Entries of the others are put in their places in registers, as a
dense operand: halves of a word that are not a column's are masked out.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sparse_layouts.kernels.nm_matmul.fragment_assembly import (
    dense_products,
    expansion,
    operands,
    pairing,
    sparse_products,
)

# Copies to and from shared memory, of tiles of int32: their layouts there
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3))
HIGH = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=3))
X_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4))
# the bytes of a unit: entries, positions, their high bits (m = 8), and of 64 columns of 8 rows of x
UNIT_BYTES, WORD_BYTES, HIGH_BYTES, X_BYTES = map(gl.constexpr, (1024, 128, 64, 1024))
# ascending places of a group whose entries are all 0: a word of those beyond the matrix
NO_ENTRIES = gl.constexpr(0x44444444)

synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def _bases(first: int, number: int, rank: int, dim: int) -> list[list[int]]:
    """Steps of first, 2 first, 4 first, ... along one dimension."""
    return [[first << i if d == dim else 0 for d in range(rank)] for i in range(number)]


@gluon.constexpr_function
def _log2(number: int) -> int:
    return number.bit_length() - 1


@gluon.constexpr_function
def _own(WARPS: int) -> gl.BlockedLayout:
    """[32 * WARPS, 8]: 8 words, or sums, of every thread."""
    return gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def _entry_layout(WARPS: int) -> gl.DistributedLinearLayout:
    """[1, 8 * WARPS, 32]: two times four neighbouring words of every lane."""
    registers = [*_bases(1, 2, 3, 2), [0, 4, 0]]
    lanes = [*_bases(4, 3, 3, 2), *_bases(1, 2, 3, 1)]
    warps = _bases(8, _log2(WARPS), 3, 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [1, 8 * WARPS, 32])


@gluon.constexpr_function
def _word_layout(WARPS: int) -> gl.DistributedLinearLayout:
    """[1, WARPS, 32]: a word a lane."""
    warps = _bases(1, _log2(WARPS), 3, 1)
    return gl.DistributedLinearLayout([], _bases(1, 5, 3, 2), warps, [], [1, WARPS, 32])


@gluon.constexpr_function
def _high_layout(WARPS: int) -> gl.DistributedLinearLayout:
    """[1, WARPS, 16, 2]: a word for two lanes."""
    lanes = [*_bases(1, 1, 4, 3), *_bases(1, 4, 4, 2)]
    warps = _bases(1, _log2(WARPS), 4, 1)
    return gl.DistributedLinearLayout([], lanes, warps, [], [1, WARPS, 16, 2])


@gluon.constexpr_function
def _x_layout(WARPS: int, SPARSE: bool) -> gl.DistributedLinearLayout:
    """[WARPS, 1, 8, 32], 64 columns of 8 rows: lane 4 g + t has of row g every fourth word from t
    on, or (not SPARSE) the t-th four of each half.
    """
    rows = _bases(1, 3, 4, 2)
    if SPARSE:
        registers, lanes = _bases(4, 3, 4, 3), [*_bases(1, 2, 4, 3), *rows]
    else:
        registers, lanes = [*_bases(1, 2, 4, 3), *_bases(16, 1, 4, 3)], [*_bases(4, 2, 4, 3), *rows]
    warps = _bases(1, _log2(WARPS), 4, 0)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [WARPS, 1, 8, 32])


@gluon.constexpr_function
def _kind(dtype: gl.dtype) -> str:
    return "bf16" if dtype == gl.bfloat16 else "f16"


@gluon.jit
def _bring_entries(
    values_desc, words_desc, high_desc, values, words, high, bars, tile, phase, pred,
    TILES: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Asks for the units of a phase."""
    stage = phase % STAGES
    bar = bars.index(stage)
    PAIRS: gl.constexpr = TILES * WARPS
    if high_desc is None:
        mbarrier.expect(bar, PAIRS * (UNIT_BYTES + WORD_BYTES), pred)
    else:
        mbarrier.expect(bar, PAIRS * (UNIT_BYTES + WORD_BYTES + HIGH_BYTES), pred)
    unit = phase * WARPS
    # positions first: they are few, and nothing can be multiplied without them
    tma.async_copy_global_to_shared(words_desc, [tile, unit, 0], bar, words.index(stage), pred=pred)
    if high_desc is not None:
        to = high.index(stage)
        tma.async_copy_global_to_shared(high_desc, [tile, unit, 0], bar, to, pred=pred)
    to = values.index(stage)
    tma.async_copy_global_to_shared(values_desc, [tile, unit * 8, 0], bar, to, pred=pred)


@gluon.jit
def _bring_x(
    x_desc, x, bars, turn, pred,
    WARPS: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, NT: gl.constexpr,
):  # fmt: skip
    """Asks for 64 columns of x for every warp, those of a turn: a part of the units of a phase."""
    stage = turn % STAGES
    bar = bars.index(stage)
    mbarrier.expect(bar, NT * WARPS * X_BYTES, pred)
    for j in gl.static_range(NT):
        at = [turn // CHUNKS * WARPS, turn % CHUNKS, j * 8, 0]
        to = x.index(stage * NT + j)
        tma.async_copy_global_to_shared(x_desc, at, bar, to, pred=pred)


@gluon.jit
def _to_l2(ptr, size):
    """Asks the L2 for `size` bytes, a multiple of 16, by one thread; it keeps them coherent."""
    ASM: gl.constexpr = (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    )
    gl.inline_asm_elementwise(ASM, "=r,l,r", [ptr, size], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _grid_dependency(ASM: gl.constexpr):
    gl.inline_asm_elementwise(ASM, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _a_thread_each(words, LAYOUT: gl.constexpr, SIZE: gl.constexpr):
    """[SIZE, 8] of words, one a thread: the same eight times."""
    flat = gl.reshape(words, (SIZE,))
    flat = gl.convert_layout(flat, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    return gl.expand_dims(flat, 1) | gl.zeros([SIZE, 8], gl.int32, LAYOUT)


@gluon.jit
def _unit(values, t: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The entries of the t-th tile: 8 words a thread."""
    a = values.slice(t, 1, dim=0).load(_entry_layout(WARPS))
    a = gl.permute(gl.reshape(a, (WARPS, 2, 32, 4)), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(a, (32 * WARPS, 8)), LAYOUT, assert_trivial=True)


@gluon.jit
def _high_bits(high, t: gl.constexpr, parity, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The words of high bits of the t-th tile, shifted to what is this lane's."""
    SHARED: gl.constexpr = _high_layout(WARPS)
    h = high.slice(t, 1, dim=0).load(gl.SliceLayout(3, SHARED))
    h = gl.expand_dims(h, 3) | gl.zeros([1, WARPS, 16, 2], gl.int32, SHARED)
    return _a_thread_each(h, LAYOUT, 32 * WARPS) << parity


@gluon.jit
def _x_words(x, SPARSE: gl.constexpr, OF: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """64 columns of 8 rows of x as operands: 8 words a thread."""
    v = gl.reshape(x.load(_x_layout(WARPS, SPARSE)), (WARPS, 8, 2, 4, 4))
    if SPARSE:
        v = gl.permute(v, (0, 1, 4, 2, 3))
    else:
        v = gl.permute(v, (0, 1, 3, 2, 4))
    v = gl.convert_layout(gl.reshape(v, (32 * WARPS, 8)), LAYOUT, assert_trivial=True)
    if not SPARSE:  # one column of two groups in a word
        ASM: gl.constexpr = pairing(OF)
        REGISTERS: gl.constexpr = operands("=&r", 1, "r", 1)
        v = gl.inline_asm_elementwise(ASM, REGISTERS, [v], gl.int32, is_pure=True, pack=8)
    return v


@gluon.jit
def _multiply(
    a, e, high, xs, sums,
    STORED: gl.constexpr, OF: gl.constexpr, c: gl.constexpr, NT: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """The sums of a tile with the products of the c-th 64 columns of its unit added."""
    SPARSE: gl.constexpr = STORED == 2 and OF == 4
    WIDTH: gl.constexpr = 2 if NT > 1 else 1
    ASM: gl.constexpr = sparse_products(WIDTH, KIND) if SPARSE else dense_products(WIDTH, KIND)
    INPUTS: gl.constexpr = 2 + WIDTH
    REGISTERS: gl.constexpr = operands("=&f", 1, "r", INPUTS, "f", 1)
    if SPARSE:
        left = (a, e)
    else:
        EXPAND: gl.constexpr = expansion(STORED, OF, c)
        if OF == 4:
            IN_2: gl.constexpr = operands("=&r", 2, "r", 2)
            left = gl.inline_asm_elementwise(
                EXPAND, IN_2, [a, e], (gl.int32, gl.int32), is_pure=True, pack=8
            )
        else:
            IN_3: gl.constexpr = operands("=&r", 2, "r", 3)
            left = gl.inline_asm_elementwise(
                EXPAND, IN_3, [a, e, high], (gl.int32, gl.int32), is_pure=True, pack=8
            )
    new = ()
    for p in gl.static_range(NT // WIDTH):
        if WIDTH == 1:
            args = [left[0], left[1], xs[p], sums[p]]
        else:
            args = [left[0], left[1], xs[2 * p], xs[2 * p + 1], sums[p]]
        made = gl.inline_asm_elementwise(ASM, REGISTERS, args, gl.float32, is_pure=True, pack=8)
        new = new + (made,)
    return new


@gluon.jit(do_not_specialize=["M", "N", "units", "phases"])
def nm_fragments_kernel(
    values_desc,
    words_desc,
    high_desc,
    x_desc,
    out_ptr,
    values_ptr,
    words_ptr,
    M,
    N,
    units,
    phases,
    stride_words_tile,
    stride_out_m,
    stride_out_n,
    STORED: gl.constexpr,
    OF: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,
    NT: gl.constexpr,
    EARLY: gl.constexpr,
):
    SPARSE: gl.constexpr = STORED == 2 and OF == 4
    CHUNKS: gl.constexpr = 32 // STORED * OF // 64  # of 64 columns, in a unit
    PAIRS: gl.constexpr = NT // 2 if NT > 1 else 1
    KIND: gl.constexpr = _kind(out_ptr.dtype.element_ty)
    OWN: gl.constexpr = _own(WARPS)
    tile = gl.program_id(0) * TILES

    values = gl.allocate_shared_memory(gl.int32, [STAGES, TILES, 8 * WARPS, 32], WORDS)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, TILES, WARPS, 32], WORDS)
    high = words
    if high_desc is not None:
        high = gl.allocate_shared_memory(gl.int32, [STAGES, TILES, WARPS, 16], HIGH)
    x = gl.allocate_shared_memory(gl.int32, [X_STAGES * NT, WARPS, 1, 8, 32], X_WORDS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)

    if EARLY:
        # The kernel before may still run, and may have written anything that is read here: until it
        # is done only the L2 is told what will be wanted, which sees all writes.
        _grid_dependency("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
        for i in gl.static_range(STAGES):
            for t in gl.static_range(TILES):
                here = gl.minimum(units - i * WARPS, WARPS)
                here = gl.where((tile + t) * 16 < M, here, 0)
                if here > 0:
                    unit = i * WARPS
                    whole = (tile + t).to(gl.int64)
                    _to_l2(words_ptr + whole * stride_words_tile + unit * 32, here * WORD_BYTES)
                    _to_l2(values_ptr + (whole * units + unit) * 512, here * UNIT_BYTES)
        _grid_dependency("griddepcontrol.wait; mov.u32 $0, 0;")

    turns = phases * CHUNKS
    _bring_x(x_desc, x, x_full, 0, True, WARPS, X_STAGES, CHUNKS, NT)
    for i in gl.static_range(STAGES):
        _bring_entries(
            values_desc, words_desc, high_desc, values, words, high, full, tile, i, i < phases,
            TILES, WARPS, STAGES,
        )  # fmt: skip
        if i + 1 < X_STAGES:
            _bring_x(x_desc, x, x_full, i + 1, i + 1 < turns, WARPS, X_STAGES, CHUNKS, NT)
    for i in gl.static_range(STAGES + 1, X_STAGES):
        _bring_x(x_desc, x, x_full, i, i < turns, WARPS, X_STAGES, CHUNKS, NT)

    parity = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, OWN)) % 2 * 4
    parity = gl.expand_dims(parity, 1) | gl.zeros([32 * WARPS, 8], gl.int32, OWN)
    all_sums = ()  # of every tile, of every two eights of columns, [32 * WARPS, 8]
    for _ in gl.static_range(TILES * PAIRS):
        all_sums = all_sums + (gl.zeros([32 * WARPS, 8], gl.float32, OWN),)

    for phase in range(phases):
        stage = phase % STAGES
        mbarrier.wait(full.index(stage), (phase // STAGES) & 1)
        synchronize()  # every warp has read what the phase before brought
        ahead = phase + STAGES - 1
        _bring_entries(
            values_desc, words_desc, high_desc, values, words, high, full, tile, ahead,
            (phase > 0) & (ahead < phases), TILES, WARPS, STAGES,
        )  # fmt: skip
        entries, codes, tops = (), (), ()
        for t in gl.static_range(TILES):
            entries = entries + (_unit(values.index(stage), t, WARPS, OWN),)
            e = words.index(stage).slice(t, 1, dim=0).load(_word_layout(WARPS))
            if SPARSE:
                e = gl.where(e == 0, NO_ENTRIES, e)
            codes = codes + (_a_thread_each(e, OWN, 32 * WARPS),)
            if high_desc is not None:
                tops = tops + (_high_bits(high.index(stage), t, parity, WARPS, OWN),)
            else:
                tops = tops + (parity,)
        for c in gl.static_range(CHUNKS):
            turn = phase * CHUNKS + c
            x_stage = turn % X_STAGES
            mbarrier.wait(x_full.index(x_stage), (turn // X_STAGES) & 1)
            if c > 0:
                synchronize()  # every warp has read the columns before
            ahead = turn + X_STAGES - 1
            wanted = (turn > 0) & (ahead < turns)
            _bring_x(x_desc, x, x_full, ahead, wanted, WARPS, X_STAGES, CHUNKS, NT)
            xs = ()
            for j in gl.static_range(NT):
                xs = xs + (_x_words(x.index(x_stage * NT + j), SPARSE, OF, WARPS, OWN),)
            new = ()
            for t in gl.static_range(TILES):
                sums = ()
                for p in gl.static_range(PAIRS):
                    sums = sums + (all_sums[t * PAIRS + p],)
                new = new + _multiply(
                    entries[t], codes[t], tops[t], xs, sums, STORED, OF, c, NT, KIND
                )
            all_sums = new

    # the sums of all warps, tile by tile
    SIZE: gl.constexpr = 128 * NT
    PART: gl.constexpr = SIZE // PAIRS
    LINES: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    shared = gl.allocate_shared_memory(gl.float32, [WARPS, SIZE], PLAIN)
    offs = gl.arange(0, SIZE, layout=gl.SliceLayout(0, LINES))
    if NT == 1:
        eight = offs * 0
        lane = offs // 4
    else:
        eight = offs // 256 * 2 + offs // 4 % 2
        lane = offs // 8 % 32
    offs_n = eight * 8 + lane % 4 * 2 + offs % 2
    row = lane // 4 + offs // 2 % 2 * 8
    for t in gl.static_range(TILES):
        for p in gl.static_range(PAIRS):
            sums = all_sums[t * PAIRS + p]
            if NT == 1:  # two chains of sums
                sums = gl.sum(gl.reshape(sums, (32 * WARPS, 2, 4)), 1)
            shared.slice(p * PART, PART, dim=1).store(gl.reshape(sums, (WARPS, PART)))
        total = gl.sum(shared.load(LINES), 0)
        rows = (tile + t) * 16 + row
        place = rows.to(gl.int64) * stride_out_m + offs_n.to(gl.int64) * stride_out_n
        inside = (rows < M) & (offs_n < N)
        gl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)
