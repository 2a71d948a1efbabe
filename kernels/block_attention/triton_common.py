"""What the Triton attention kernels share: schedules, masks from bit tiles, dropout, operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_layouts.kernels.ahead_of_time import Compilation
from sparse_layouts.kernels.block_attention.tile_schedule import TileSchedule
from sparse_layouts.kernels.block_attention.triton_sequences import SEQUENCE_NAMES, SEQUENCE_SIZES

MAX_HEAD_DIM = 256
# Arguments that follow lengths or head counts, or that users slice: a kernel is not compiled anew
# where one is 1 or divisible by 16.
LENGTHS = [
    "num_queries",
    "num_keys",
    "num_rows",
    "row_offset",
    "num_tiles",
    "first_tile",
    "num_groups",
]
LENGTHS += ["heads", "group", "threshold", "stride_terms", "stride_lb", "stride_lh", "stride_db"]
LENGTHS += ["stride_dh", *SEQUENCE_NAMES, *SEQUENCE_SIZES]


class Tiles(NamedTuple):
    """A tile of `rows` queries x `columns` keys, its warps, and the stages of its loads."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@triton.jit
def slot_blocks(columns_ptr, first, offs, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The stored block of a tile's entries `offs`: one, or a vector where it gathers several."""
    if BLOCK >= TILE:
        blocks = tl.load(columns_ptr + first)
    else:
        blocks = tl.load(columns_ptr + first + offs // BLOCK)
    return blocks


@triton.jit
def slot_positions(blocks, part, offs, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Where the tile's entries lie in the matrix; negative where the chunk holds no block."""
    if BLOCK >= TILE:
        positions = blocks * BLOCK + part * TILE + offs
    else:
        positions = blocks * BLOCK + offs % BLOCK
    return positions


@triton.jit
def stored_entries(
    block_tiles_ptr, tiles_ptr, first, part, offs_r, offs_c,
    ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ROW_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Which entries of a tile the pattern stores, bool [ROW_TILE, TILE].

    `offs_r` are matrix rows modulo a multiple of ROW_TILE and ROW_BLOCK, `offs_c` `arange(TILE)`.
    One word is loaded a row and 32 columns, not one a pair: the rest is shifts.
    """
    ROWS: tl.constexpr = ROW_TILE // ROW_BLOCK if ROW_TILE > ROW_BLOCK else 1
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    PER_BLOCK: tl.constexpr = (BLOCK if BLOCK < TILE else TILE) // 32
    sub_row = (offs_r // ROW_BLOCK) % ROWS
    in_block = offs_r % ROW_BLOCK
    words = tl.zeros([ROW_TILE, TILE], tl.int32)
    for w in tl.static_range(TILE // 32):
        if BLOCK < 32:
            word = _row_word(
                block_tiles_ptr, tiles_ptr, (first + 2 * w) * ROWS + sub_row, in_block, 0,
                ROW_BLOCK, WORDS,
            ) & 0xFFFF  # fmt: skip
            high = _row_word(
                block_tiles_ptr, tiles_ptr, (first + 2 * w + 1) * ROWS + sub_row, in_block, 0,
                ROW_BLOCK, WORDS,
            )  # fmt: skip
            word = word | (high << 16)
        else:
            slot = first + w // PER_BLOCK
            column_word = part * (TILE // 32) + w % PER_BLOCK
            word = _row_word(
                block_tiles_ptr, tiles_ptr, slot * ROWS + sub_row, in_block, column_word,
                ROW_BLOCK, WORDS,
            )  # fmt: skip
        words = tl.where((offs_c // 32 == w)[None, :], word[:, None], words)
    return ((words >> (offs_c % 32)[None, :]) & 1) != 0


@triton.jit
def _row_word(
    block_tiles_ptr, tiles_ptr, where, in_block, column_word,
    ROW_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """32 bits of every row of a block: all of a full block, none of one that is not stored."""
    tile = tl.load(block_tiles_ptr + where)  # [ROW_TILE]
    word = tl.where(tile == 0, -1, 0)
    if tiles_ptr is not None:
        offs = ((tile - 1) * ROW_BLOCK + in_block).to(tl.int64) * WORDS + column_word
        word = word | tl.load(tiles_ptr + offs, mask=tile > 0, other=0)
    return word


@triton.jit
def slot_index(
    first, offs_r, offs_c,
    ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ROW_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[ROW_TILE, TILE] indices into a schedule's tables of (slot, block row)."""
    ROWS: tl.constexpr = ROW_TILE // ROW_BLOCK if ROW_TILE > ROW_BLOCK else 1
    sub_row = (offs_r // ROW_BLOCK) % ROWS
    slot = first + (offs_c // BLOCK if BLOCK < TILE else offs_c * 0)
    return slot[None, :] * ROWS + sub_row[:, None]


@triton.jit
def dropout_keep(
    seed, threshold, batch, head, rows, columns4, ROW_TILE: tl.constexpr, TILE: tl.constexpr
):
    """bool [ROW_TILE, TILE], as the reference's; `columns4` [TILE // 4]: columns divided by 4."""
    zero = tl.zeros([ROW_TILE, TILE // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + columns4[None, :], zero + rows[:, None], zero + head, zero + batch
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROW_TILE, TILE // 4, 2, 2]
    return words.reshape([ROW_TILE, TILE]) >= threshold.to(tl.uint32)


def kept_scale(dropout_p: float) -> float:
    """What a kept probability is multiplied by; 0 where dropout drops everything."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


ANY = 1 << 30


class TileRow(NamedTuple):
    """A row of a table of tiles: what it is for, at most (KB of shared memory: at least), and the
    tile.

    `fill` is the class of the pattern, see :func:`~.tile_schedule.tile_fill`: 1 is any.
    """

    element_bytes: int
    head_dim: int
    block: int
    shared_kb: int
    fill: float
    tiles: Tiles


def choose(
    table: list[TileRow],
    element_bytes: int,
    head_dim: int,
    block: int,
    shared_kb: int,
    fill: Callable[[], float],
) -> Tiles:
    """The first tile of a table that fits. `fill` is called only where the table asks for it."""
    for row in table:
        fits = head_dim <= row.head_dim and block <= row.block and row.shared_kb <= shared_kb
        if fits and row.element_bytes == element_bytes and (row.fill >= 1 or fill() <= row.fill):
            return row.tiles
    raise NotImplementedError(
        f"no tile for {element_bytes}-byte elements, head size {head_dim}, "
        f"{shared_kb} KB of shared memory"
    )


def shared_memory_kb(device: torch.device) -> int:
    """The class of the tile tables, by KB of shared memory that a block of threads may have.

    On a CPU (interpreter) Hopper's. Compute capability 10.0 has as much, but the compiler takes
    more of it for the same tile (257 KB at head size 256): it counts as 163.
    """
    if device.type != "cuda":
        return 227
    if torch.cuda.get_device_capability(device) >= (10, 0):
        return 163
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a tile holds for a head size."""
    return max(16, triton.next_power_of_2(head_dim))


def precision(dtype: torch.dtype) -> str:
    """How the tensor cores take a product of fp32: as three of tf32, with fp32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def backward_precision(dtype: torch.dtype, padded_dim: int) -> str:
    """As `precision`, but plain fp32 where sums are so long that three of tf32 lose too much.

    At head size 256 dq erred 4.7 times as much as dense torch in fp32 (H200, 2026-11-20).
    """
    return "ieee" if dtype == torch.float32 and padded_dim > 128 else precision(dtype)


def tma_ready(x: Tensor) -> bool:
    """Whether descriptors can read `x` (B, H, N, D): Hopper, whole rows, 16-byte strides."""
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    bytes_of = x.element_size()
    strides_fit = all(
        size == 1 or (stride > 0 and stride * bytes_of % 16 == 0)
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )
    return x.stride(-1) == 1 and strides_fit and x.data_ptr() % 16 == 0


def readied(x: Tensor) -> Tensor:
    """x, or a copy of it, as TMA can read it. A contiguous x may begin at any address."""
    return x if tma_ready(x) else x.clone(memory_format=torch.contiguous_format)


def tile_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of (B, H, N, D) that loads [1, 1, rows, columns]; zeros lie outside."""
    # the stride of a dimension of one is never used, but has to be a multiple of 16 bytes
    strides = [
        16 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    strides[-1] = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns])


def terms_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of (B, H, N) fp32, contiguous rows 16 bytes apart, that loads [1, 1, rows]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows])


def shared_strides(
    head_map: Tensor, bias: Tensor | None, bias_base: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """Strides over samples of head_map and bias_base, all four of bias; 0 where samples share."""
    sample = [
        0 if t is None or t.shape[0] == 1 else t.stride(0) for t in (head_map, bias_base, bias)
    ]
    slots = (0, 0, 0) if bias is None else bias.stride()[1:]
    return (*sample, *slots)


def schedule_operands(schedule: TileSchedule, ordered: bool = True) -> tuple[Tensor | None, ...]:
    """The tensors of a schedule in the order in which every kernel takes them."""
    return (
        schedule.starts,
        schedule.plain_chunks,
        schedule.chunks,
        schedule.order if ordered else None,
        schedule.columns,
        schedule.block_tiles,
        schedule.log_counts,
        schedule.positions,
    )


def signature(kernel: Any, given: dict[str, str], constexprs: dict[str, Any]) -> dict[str, str]:
    """The type of every argument of a kernel: `given`, else by name; a None is a constexpr."""
    usual = {"scale": "fp32", "keep_scale": "fp32", "threshold": "i64"}
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name in given:
            types[name] = given[name]
        else:
            types[name] = usual.get(name, "*i32" if name.endswith("_ptr") else "i32")
    return types


class Variant(NamedTuple):
    """A case that the attention kernels are compiled for ahead of time."""

    block: int
    head_dim: int
    dtype: torch.dtype
    tma: bool = False
    tiles: bool = True
    counts: bool = False
    bias: bool = False
    dropout: bool = False
    sequences: str = ""  # "packed" or "padded"
    shared_kb: int = 163
    fill: float = 1.0  # see `TileRow`

    @property
    def min_capability(self) -> int:
        """The first compute capability that has the descriptors or the shared memory."""
        return 90 if self.tma or self.shared_kb > 163 else 80

    @property
    def max_capability(self) -> int:
        """The last one: see `shared_memory_kb`."""
        return 90 if self.shared_kb > 163 else 100

    @property
    def name(self) -> str:
        """As `block64-d128-bf16-tma`."""
        on = [w for w in ("tma", "tiles", "counts", "bias", "dropout") if getattr(self, w)]
        on += [self.sequences] if self.sequences else []
        on += ["unlike"] if self.fill < 1 else []
        kind = TYPE_NAMES[self.dtype]
        return "-".join(
            [f"block{self.block}", f"d{self.head_dim}", kind, *on, f"{self.shared_kb}kb"]
        )

    def tiles_of(self, table: list[TileRow]) -> Tiles:
        """What the table has for this case."""
        d = padded_head_dim(self.head_dim)
        size = self.dtype.itemsize
        return choose(table, size, d, self.block, self.shared_kb, lambda: self.fill)

    def absent(self) -> dict[str, None]:
        """The arguments that this case passes None for."""
        names = [] if self.tiles else ["tiles_ptr"]
        names += [] if self.counts else ["log_counts_ptr"]
        names += [] if self.bias else ["bias_ptr", "bias_base_ptr", "positions_ptr"]
        names += [] if self.dropout else ["seed_ptr"]
        names += {
            "": [*SEQUENCE_NAMES, *SEQUENCE_SIZES],
            "packed": ["order_ptr"],
            "padded": ["order_ptr", "q_starts_ptr", "k_starts_ptr"],
        }[self.sequences]
        return dict.fromkeys(names)


TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def variants() -> Iterator[Variant]:
    """The cases to compile: every tile of the tables, and every feature once."""
    bf16, fp16, fp32 = TYPE_NAMES
    yield Variant(64, 128, bf16, tma=True, shared_kb=227)
    for block in (16, 32, 64, 128):
        for head_dim in (16, 64, 128):
            yield Variant(block, head_dim, bf16)
            yield Variant(block, head_dim, bf16, tma=True)
        yield Variant(block, 64, fp16)
        yield Variant(block, 64, fp32)
    for block in (16, 64):
        yield Variant(block, 256, bf16)
        yield Variant(block, 256, bf16, tma=True)
        yield Variant(block, 256, bf16, tma=True, shared_kb=227)
        for head_dim in (128, 256):
            yield Variant(block, head_dim, fp32)
            yield Variant(block, head_dim, fp32, shared_kb=227)
    for head_dim in (64, 128, 256):
        yield Variant(16, head_dim, bf16, fill=0.3)
    yield Variant(16, 64, fp16, counts=True, bias=True, dropout=True, fill=0.3)
    yield Variant(64, 32, bf16)
    yield Variant(64, 80, bf16, tma=True)
    yield Variant(64, 80, fp16)
    yield Variant(64, 128, fp32, tma=True)
    yield Variant(64, 128, fp32, tma=True, shared_kb=227)
    yield Variant(64, 64, bf16, tiles=False, counts=True)
    yield Variant(64, 64, bf16, tma=True, bias=True)
    yield Variant(64, 64, bf16, tma=True, dropout=True)
    yield Variant(16, 64, fp16, counts=True, bias=True, dropout=True)
    for head_dim in (64, 128, 256):
        yield Variant(64, head_dim, bf16, sequences="packed")
    yield Variant(64, 128, bf16, tiles=False, sequences="padded")
    yield Variant(128, 128, bf16, sequences="padded")
    yield Variant(16, 64, fp32, sequences="packed")
    yield Variant(16, 64, fp16, counts=True, bias=True, dropout=True, sequences="packed")
    for head_dim in (128, 256):
        yield Variant(64, head_dim, bf16, shared_kb=99)
    yield Variant(64, 256, fp32, shared_kb=99)


def backward_compilations(
    kernel: Any,
    table: list[TileRow],
    streamed: tuple[str, str],
    streamed_length: Callable[[Tiles], int],
) -> Iterator[Compilation]:
    """Every tile of one backward kernel's table, and every feature once.

    `streamed` names the two operands that come tile by tile, `streamed_length` their tile's length.
    """
    for case in variants():
        d, kind = padded_head_dim(case.head_dim), TYPE_NAMES[case.dtype]
        tiles = case.tiles_of(table)
        length = streamed_length(tiles)
        if case.tma and case.block < length:
            continue
        constexprs = case.absent() | {
            "BM": case.block,
            "BN": case.block,
            "D": d,
            "DV": d,
            "PRECISION": backward_precision(case.dtype, d),
            "TMA": case.tma,
            "STAGES": tiles.num_stages,
            "TM": tiles.rows,
            "TN": tiles.columns,
        }
        if not case.bias and "dbias_ptr" in kernel.arg_names:
            constexprs |= {"dbias_ptr": None, "dbias_base_ptr": None}
        descriptor = f"tensordesc<{kind}[1, 1, {length}, {d}]>" if case.tma else f"*{kind}"
        terms = f"tensordesc<fp32[1, 1, {length}]>" if case.tma and "q" in streamed else "*fp32"
        plain = ("q_ptr", "k_ptr", "v_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
        given = dict.fromkeys((*plain, "bias_ptr", "dbias_ptr"), f"*{kind}")
        given |= dict.fromkeys(streamed, descriptor)
        given |= {"lse2": terms, "delta": terms, "log_counts_ptr": "*fp32"}
        given |= dict.fromkeys(("bias_base_ptr", "dbias_base_ptr", "seed_ptr"), "*i64")
        yield Compilation(
            f"{kernel.__name__}-{case.name}",
            kernel,
            signature(kernel, given, constexprs),
            constexprs,
            {"num_warps": tiles.num_warps},
            case.min_capability,
            case.max_capability,
        )
