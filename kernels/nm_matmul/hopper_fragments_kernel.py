"""nm_matmul on Hopper's tensor cores, in Gluon, from entries that lie by fragments.

A program multiplies TILES tiles of 16 rows. Its WARPS warps share the contracted dimension: in a
phase each takes a unit of every tile (`sparse_layouts/nm_fragments.py`) and the columns of x that
belong to it, which two more warps have brought by TMA, STAGES phases ahead. What the warps have
added up is summed once, at the end.

2:4 goes to `mma.sp` as it lies. Of the others a word of entries goes to as many products as a group
has twos of columns, with the entries masked out that are of other columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparse_layouts.kernels.hopper_common import grid_dependency, wait_free, wait_full
from sparse_layouts.kernels.nm_matmul.fragment_assembly import expansion, operands, products

# Copies to and from shared memory, of tiles of int32: their layouts there
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3))
HIGH = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=3))
X_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4))
# the bytes of a unit: entries, positions, their high bits (m = 8), and of 64 columns of 8 rows of x
UNIT_BYTES, WORD_BYTES, HIGH_BYTES, X_BYTES = map(gl.constexpr, (1024, 128, 64, 1024))
# ascending places of a group whose entries are all 0: a word of those beyond the matrix
NO_ENTRIES = gl.constexpr(0x44444444)
# where a word has the lowest bits of positions, and what makes of these metadata of `mma.sp`: that
# the second entry of a group is one of its last two columns
LOWEST, SECOND = gl.constexpr(0x55555555), gl.constexpr(0x88888888 - (1 << 32))

INTEGERS = ["M", "N", "units", "phases", "parts"]


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
def _entry_layout(TILES: int, WARPS: int) -> gl.DistributedLinearLayout:
    """[TILES, 8 * WARPS, 32]: two times four neighbouring words of every lane, of every tile."""
    registers = [*_bases(1, 2, 3, 2), [0, 4, 0], *_bases(1, _log2(TILES), 3, 0)]
    lanes = [*_bases(4, 3, 3, 2), *_bases(1, 2, 3, 1)]
    warps = _bases(8, _log2(WARPS), 3, 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [TILES, 8 * WARPS, 32])


@gluon.constexpr_function
def _word_layout(TILES: int, WARPS: int) -> gl.DistributedLinearLayout:
    """[TILES, WARPS, 32]: a word a lane, of every tile."""
    tiles, warps = _bases(1, _log2(TILES), 3, 0), _bases(1, _log2(WARPS), 3, 1)
    return gl.DistributedLinearLayout(tiles, _bases(1, 5, 3, 2), warps, [], [TILES, WARPS, 32])


@gluon.constexpr_function
def _high_layout(TILES: int, WARPS: int) -> gl.DistributedLinearLayout:
    """[TILES, WARPS, 16, 2]: a word for two lanes, of every tile."""
    tiles, warps = _bases(1, _log2(TILES), 4, 0), _bases(1, _log2(WARPS), 4, 1)
    lanes = [*_bases(1, 1, 4, 3), *_bases(1, 4, 4, 2)]
    return gl.DistributedLinearLayout(tiles, lanes, warps, [], [TILES, WARPS, 16, 2])


@gluon.constexpr_function
def _x_layout(WARPS: int, OF: int) -> gl.DistributedLinearLayout:
    """[WARPS, 1, 8, 32], 64 columns of 8 rows: lane 4 g + t has of row g every fourth word from t
    on (OF 2: of 2:4), else the t-th eight.
    """
    rows = _bases(1, 3, 4, 2)
    if OF == 2:
        registers, lanes = _bases(4, 3, 4, 3), [*_bases(1, 2, 4, 3), *rows]
    else:
        registers, lanes = _bases(1, 3, 4, 3), [*_bases(8, 2, 4, 3), *rows]
    warps = _bases(1, _log2(WARPS), 4, 0)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [WARPS, 1, 8, 32])


@gluon.constexpr_function
def _kind(dtype: gl.dtype) -> str:
    return "bf16" if dtype == gl.bfloat16 else "f16"


@gluon.jit
def _to_l2(ptr, size):
    """Asks the L2 for `size` bytes, a multiple of 16, by one lane; it keeps them coherent."""
    ASM: gl.constexpr = (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    )
    gl.inline_asm_elementwise(ASM, "=r,l,r", [ptr, size], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _bring_entries(
    values_desc, words_desc, high_desc, shared, values_ptr, words_ptr, M, units, phases, parts,
    stride_words_tile,
    TILES: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The warp that brings the units of every phase."""
    values, words, high, _, full, free, _, _ = shared
    PAIRS: gl.constexpr = TILES * WARPS
    tile = gl.program_id(0) // parts * TILES
    if EARLY:
        # The kernel before may still run, and may have written anything that is read here: until it
        # is done only the L2 is told what will be wanted, which sees all writes.
        grid_dependency("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
        for i in gl.static_range(STAGES):
            for t in gl.static_range(TILES):
                here = gl.minimum(units - i * WARPS, WARPS)
                here = gl.where((tile + t) * 16 < M, here, 0)
                if here > 0:
                    unit = i * WARPS
                    whole = (tile + t).to(gl.int64)
                    _to_l2(words_ptr + whole * stride_words_tile + unit * 32, here * WORD_BYTES)
                    _to_l2(values_ptr + (whole * units + unit) * 512, here * UNIT_BYTES)
        grid_dependency("griddepcontrol.wait; mov.u32 $0, 0;")
    for phase in range(phases):
        stage = phase % STAGES
        unit = phase * WARPS
        bar = full.index(stage)
        wait_free(free, phase, STAGES)
        if high_desc is None:
            mbarrier.expect(bar, PAIRS * (UNIT_BYTES + WORD_BYTES))
        else:
            mbarrier.expect(bar, PAIRS * (UNIT_BYTES + WORD_BYTES + HIGH_BYTES))
        # positions first: they are few, and nothing can be multiplied without them
        tma.async_copy_global_to_shared(words_desc, [tile, unit, 0], bar, words.index(stage))
        if high_desc is not None:
            tma.async_copy_global_to_shared(high_desc, [tile, unit, 0], bar, high.index(stage))
        tma.async_copy_global_to_shared(values_desc, [tile, unit * 8, 0], bar, values.index(stage))


@gluon.jit
def _bring_x(
    x_desc, shared, phases, parts,
    WARPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, EACH: gl.constexpr,
    NT: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The warp that brings EACH times 64 columns of x for every warp that multiplies, those of a
    turn, of which a phase has TURNS.
    """
    x, full, free = shared[3], shared[6], shared[7]
    first = gl.program_id(0) % parts * (8 * NT)
    if EARLY:
        grid_dependency("griddepcontrol.wait; mov.u32 $0, 0;")
    for turn in range(phases * TURNS):
        stage = turn % STAGES
        bar = full.index(stage)
        wait_free(free, turn, STAGES)
        mbarrier.expect(bar, EACH * NT * WARPS * X_BYTES)
        for c in gl.static_range(EACH):
            for j in gl.static_range(NT):
                at = [turn // TURNS * WARPS, turn % TURNS * EACH + c, first + j * 8, 0]
                to = x.index((stage * EACH + c) * NT + j)
                tma.async_copy_global_to_shared(x_desc, at, bar, to)


@gluon.jit
def _release(free):
    """Gives a buffer back to the copy engine.

    Without the fence it overtook loads from shared memory that were still on their way: of 1:8 and
    16 columns nearly every call was wrong in some rows, of 2:4 one in fifty.
    """
    fence_async_shared()
    mbarrier.arrive(free, count=1)


@gluon.jit
def _each_tile(words, TILES: gl.constexpr, SIZE: gl.constexpr):
    """TILES times SIZE words as a tuple of [SIZE], where a thread has as many of every tile."""
    gl.static_assert(TILES == 1 or TILES == 2 or TILES == 4)
    if TILES == 1:
        return (gl.reshape(words, (SIZE,)),)
    elif TILES == 2:
        return gl.split(gl.permute(gl.reshape(words, (2, SIZE)), (1, 0)))
    else:
        by_tile = gl.permute(gl.reshape(words, (2, 2, SIZE)), (2, 0, 1))
        even, odd = gl.split(by_tile)
        even, odd = gl.split(even), gl.split(odd)
        return even[0], odd[0], even[1], odd[1]


@gluon.jit
def _a_thread_each(words, LAYOUT: gl.constexpr, SIZE: gl.constexpr):
    """[SIZE, 8] of words [SIZE], one a thread: the same eight times."""
    flat = gl.convert_layout(words, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    return gl.expand_dims(flat, 1) | gl.zeros([SIZE, 8], gl.int32, LAYOUT)


@gluon.jit
def _unit(a, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The entries of a tile as 8 words a thread."""
    a = gl.permute(gl.reshape(a, (WARPS, 2, 32, 4)), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(a, (32 * WARPS, 8)), LAYOUT, assert_trivial=True)


@gluon.jit
def _x_words(x, OF: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """64 columns of 8 rows of x as operands: 8 words a thread."""
    v = x.load(_x_layout(WARPS, OF))
    if OF == 2:
        v = gl.permute(gl.reshape(v, (WARPS, 8, 8, 4)), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(v, (32 * WARPS, 8)), LAYOUT, assert_trivial=True)


@gluon.jit
def _x_of_turn(
    x, stage, OF: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr, EACH: gl.constexpr,
    NT: gl.constexpr, SPAN: gl.constexpr, FIRST: gl.constexpr, J: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """What a product of WIDTH eights of columns from the J-th is multiplied by: SPAN times 64
    columns from the FIRST of each.
    """
    xs = ()
    for j in gl.static_range(WIDTH):
        for s in gl.static_range(SPAN):
            at = (stage * EACH + FIRST + s) * NT + J + j
            xs = xs + (_x_words(x.index(at), OF, WARPS, LAYOUT),)
    return xs


@gluon.jit
def _expand(a, e, OF: gl.constexpr, place: gl.constexpr):
    """The operands of the products of four words of entries."""
    ASM: gl.constexpr = expansion(OF, place)
    REGISTERS: gl.constexpr = operands("=&r", OF // 4, "r", 2)
    if OF == 4:
        made = gl.inline_asm_elementwise(ASM, REGISTERS, [a, e], gl.int32, is_pure=True, pack=8)
        return (made,)
    else:
        return gl.inline_asm_elementwise(
            ASM, REGISTERS, [a, e], (gl.int32, gl.int32), is_pure=True, pack=8
        )


@gluon.jit
def _multiply(
    left, metadata, xs, sums, OF: gl.constexpr, place: gl.constexpr, KIND: gl.constexpr
):  # fmt: skip
    """Sums of a tile and 8 or 16 columns with the products of an operand added; xs are what it is
    multiplied by, of m = 8 two for 8 columns.
    """
    PARTS: gl.constexpr = 1 if OF == 2 else OF // 4
    ASM: gl.constexpr = products(OF, place, len(xs) // PARTS, KIND)
    REGISTERS: gl.constexpr = operands("=&f", 1, "r", PARTS + 1 + len(xs), "f", 1)
    return gl.inline_asm_elementwise(
        ASM, REGISTERS, left + (metadata,) + xs + (sums,), gl.float32, is_pure=True, pack=8
    )


@gluon.jit
def _consume(
    out_ptr, shared, M, N, phases, parts, stride_out_m, stride_out_n,
    STORED: gl.constexpr, OF: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, X_STAGES: gl.constexpr, X_EACH: gl.constexpr, NT: gl.constexpr,
):  # fmt: skip
    """The warps that multiply."""
    values, words, high, x, full, free, x_full, x_free = shared
    KIND: gl.constexpr = _kind(out_ptr.dtype.element_ty)
    GROUP: gl.constexpr = 2 if STORED == 2 and OF == 4 else OF  # 2 means 2:4
    TURNS: gl.constexpr = 32 // STORED * OF // 64 // X_EACH  # of a phase
    SPAN: gl.constexpr = 2 if OF == 8 else 1  # times 64 columns that an operand is multiplied by
    PLACES: gl.constexpr = 2 if STORED == 2 and OF == 8 else 1  # operands with the same columns
    WIDTH: gl.constexpr = 2 if NT > 1 else 1  # eights of columns of a product
    PAIRS: gl.constexpr = NT // WIDTH
    # tiles that are expanded at a time, and whether registers hold all x of a turn
    AT_ONCE: gl.constexpr = TILES if TILES * NT * SPAN <= 32 else TILES // 2
    FEW: gl.constexpr = NT * X_EACH <= 4
    OWN: gl.constexpr = _own(WARPS)
    SHARED: gl.constexpr = _high_layout(TILES, WARPS)
    tile = gl.program_id(0) // parts * TILES

    parity = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, OWN)) % 2
    parity = gl.expand_dims(parity, 1) | gl.zeros([32 * WARPS, 8], gl.int32, OWN)
    # [32 * WARPS, 8] of AT_ONCE tiles, of every two eights of columns of these, of all tiles
    all_sums = ()
    for _ in gl.static_range(TILES * PAIRS):
        all_sums = all_sums + (gl.zeros([32 * WARPS, 8], gl.float32, OWN),)

    for phase in range(phases):
        stage = phase % STAGES
        wait_full(full, phase, STAGES)
        wait_full(x_full, phase * TURNS, X_STAGES)
        w, a = words.index(stage), values.index(stage)
        own = _each_tile(w.load(_word_layout(TILES, WARPS)), TILES, 32 * WARPS)
        loaded = _each_tile(a.load(_entry_layout(TILES, WARPS)), TILES, 256 * WARPS)
        tops = own
        if OF == 8:
            h = high.index(stage).load(gl.SliceLayout(3, SHARED))
            h = gl.expand_dims(h, 3) | gl.zeros([TILES, WARPS, 16, 2], gl.int32, SHARED)
            tops = _each_tile(h, TILES, 32 * WARPS)
        entries, codes, metadata = (), (), ()
        for t in gl.static_range(TILES):
            entries = entries + (_unit(loaded[t], WARPS, OWN),)
            code = _a_thread_each(own[t], OWN, 32 * WARPS)
            codes = codes + (code,)
            if GROUP == 2:
                code = gl.where(code == 0, NO_ENTRIES, code)
            elif GROUP == 4:
                code = (code & LOWEST) | SECOND
            else:
                top = _a_thread_each(tops[t], OWN, 32 * WARPS)
                code = ((top >> parity) & LOWEST) | SECOND
            metadata = metadata + (code,)
        for u in gl.static_range(TURNS):
            turn = phase * TURNS + u
            x_stage = turn % X_STAGES
            if u > 0:
                wait_full(x_full, turn, X_STAGES)
            few = ()
            if FEW:
                for c in gl.static_range(0, X_EACH, SPAN):
                    for p in gl.static_range(PAIRS):
                        xs = _x_of_turn(
                            x, x_stage, GROUP, WARPS, OWN, X_EACH, NT, SPAN, c, p * WIDTH, WIDTH
                        )  # fmt: skip
                        few = few + (xs,)
                _release(x_free.index(x_stage))
            if u == 0:
                _release(free.index(stage))
            for c in gl.static_range(0, X_EACH, SPAN):
                for k in gl.static_range(PLACES):
                    new = ()
                    for first in gl.static_range(0, TILES, AT_ONCE):
                        lefts = ()
                        for t in gl.static_range(first, first + AT_ONCE):
                            if GROUP == 2:
                                lefts = lefts + ((entries[t],),)
                            else:
                                lefts = lefts + (
                                    _expand(entries[t], codes[t], OF, (u * X_EACH + c) // SPAN + k),
                                )
                        for p in gl.static_range(PAIRS):
                            if FEW:
                                xs = few[c // SPAN * PAIRS + p]
                            else:
                                xs = _x_of_turn(
                                    x, x_stage, GROUP, WARPS, OWN, X_EACH, NT, SPAN, c, p * WIDTH,
                                    WIDTH,
                                )  # fmt: skip
                            for t in gl.static_range(AT_ONCE):
                                sums = _multiply(
                                    lefts[t], metadata[first + t], xs,
                                    all_sums[first * PAIRS + p * AT_ONCE + t],
                                    GROUP, (u * X_EACH + c) // SPAN + k, KIND,
                                )  # fmt: skip
                                new = new + (sums,)
                    all_sums = new
            if not FEW:
                _release(x_free.index(x_stage))

    # the sums of all warps, of a tile and a product's columns at a time
    SIZE: gl.constexpr = 128 * WIDTH
    LINES: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    buffer = gl.allocate_shared_memory(gl.float32, [WARPS, SIZE], PLAIN)
    offs = gl.arange(0, SIZE, layout=gl.SliceLayout(0, LINES))  # of lanes, eights, rows, columns
    lane, eight = offs // (4 * WIDTH), offs // 4 % WIDTH
    offs_n = gl.program_id(0) % parts * (8 * NT) + eight * 8 + lane % 4 * 2 + offs % 2
    row = lane // 4 + offs // 2 % 2 * 8
    for t in gl.static_range(TILES):
        for p in gl.static_range(PAIRS):
            sums = all_sums[t // AT_ONCE * AT_ONCE * PAIRS + p * AT_ONCE + t % AT_ONCE]
            if WIDTH == 1:  # two chains of sums
                sums = gl.sum(gl.reshape(sums, (32 * WARPS, 2, 4)), 1)
            buffer.store(gl.reshape(sums, (WARPS, SIZE)))
            total = gl.sum(buffer.load(LINES), 0)
            rows = (tile + t) * 16 + row
            columns = offs_n + p * (8 * WIDTH)
            place = rows.to(gl.int64) * stride_out_m + columns.to(gl.int64) * stride_out_n
            inside = (rows < M) & (columns < N)
            gl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=INTEGERS)
def nm_fragments_kernel(
    values_desc, words_desc, high_desc, x_desc, out_ptr, values_ptr, words_ptr,
    M, N, units, phases, parts, stride_words_tile, stride_out_m, stride_out_n,
    STORED: gl.constexpr, OF: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, X_STAGES: gl.constexpr, X_EACH: gl.constexpr, NT: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """TILES tiles of 16 rows and 8 NT columns of the output, one of so many parts of these rows."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    TURNS: gl.constexpr = 32 // STORED * OF // 64 // X_EACH
    values = gl.allocate_shared_memory(gl.int32, [STAGES, TILES, 8 * WARPS, 32], WORDS)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, TILES, WARPS, 32], WORDS)
    high = words
    if high_desc is not None:
        high = gl.allocate_shared_memory(gl.int32, [STAGES, TILES, WARPS, 16], HIGH)
    x = gl.allocate_shared_memory(gl.int32, [X_STAGES * X_EACH * NT, WARPS, 1, 8, 32], X_WORDS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], bar)
    x_free = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_free.index(i), count=1)
    shared = (values, words, high, x, full, free, x_full, x_free)
    gl.warp_specialize([
        (_consume, (
            out_ptr, shared, M, N, phases, parts, stride_out_m, stride_out_n,
            STORED, OF, TILES, WARPS, STAGES, X_STAGES, X_EACH, NT,
        )),
        (_bring_entries, (
            values_desc, words_desc, high_desc, shared, values_ptr, words_ptr, M, units, phases,
            parts, stride_words_tile, TILES, WARPS, STAGES, EARLY,
        )),
        (_bring_x, (x_desc, shared, phases, parts, WARPS, X_STAGES, TURNS, X_EACH, NT, EARLY)),
    ], [1, 1], [24, 24])  # fmt: skip
