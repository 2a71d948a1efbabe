"""The attention rows: patterns by formula, sizes, rivals and bars.

A pattern says by a formula of its own how often an entry counts; the float64 reference, the masks
of the rivals and, in tests, the library's mask are held to that formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import sparse_layouts as sl

OURS = "sparse_layouts"
CUDNN, FLEX, DKERNEL = "cuDNN dense", "FlexAttention", "dkernel"
FLASH2, FLASH4 = "FlashAttention-2 dense", "FlashAttention-4"
BEST = "the best rival"
DIRECTIONS = ("forward", "backward")

Entry = Callable[[Any, Any, Any], Any]  # head, row, column: bool, or how often the entry counts


@dataclasses.dataclass(frozen=True)
class Case:
    """A pattern, the operands' sizes, who else computes it, and what is promised.

    `bars`: direction -> (ratio, over whom). `flex`: (sparse block, kernel options) of FlexAttention
    to try, the likeliest first.
    """

    name: str
    pattern: Pattern
    batch: int
    heads: int
    seq_len: int
    head_dim: int
    block: int
    kv_heads: int | None = None
    dtype: torch.dtype = torch.bfloat16
    rivals: Sequence[str] = (CUDNN, FLEX, FLASH4)
    bars: Mapping[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    flex: Sequence[tuple[Any, dict[str, Any] | None]] = ()

    @property
    def keys(self) -> int:
        """KV heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.keys

    @property
    def dense_pairs(self) -> float:
        """Pairs of query and key that dense attention computes, causal or all."""
        n = self.seq_len
        return self.batch * self.heads * (n * (n + 1) / 2 if self.pattern.causal else n * n)

    def pairs(self, mask: sl.BSRTensor) -> int:
        """Stored pairs of query and key, by token."""
        return mask.nnz * self.batch * (self.heads if mask.dim() == 2 else 1)

    def density(self, mask: sl.BSRTensor) -> float:
        """Stored pairs over those of dense attention."""
        return self.pairs(mask) / self.dense_pairs

    def flop(self, pairs: float, direction: str) -> float:
        """Operations for so many pairs: two products forward, five backward."""
        return 4.0 * self.head_dim * pairs * (1.0 if direction == "forward" else 2.5)

    def describe(self) -> str:
        """The sizes, for a note."""
        heads = f"{self.heads}" if self.group == 1 else f"{self.heads} over {self.keys} KV heads"
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"B {self.batch}, H {heads}, N {self.seq_len}, D {self.head_dim}, {kind}, "
            f"block {self.block}, {self.pattern}"
        )


# --- patterns -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What is stored. `causal`: nothing right of the diagonal; `by_head`: heads differ."""

    causal: ClassVar[bool] = False
    by_head: ClassVar[bool] = True

    def mask(self, case: Case, device: str) -> sl.BSRTensor:
        """The library's mask."""
        raise NotImplementedError

    def entry(self, case: Case, device: str) -> Entry:
        """A function of query head, row and column in tokens (broadcastable tensors, the head also
        an int): whether the entry is stored, or how often it counts.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LocalStride(Pattern):
    """Local blocks and every n-th column, `dense_heads` KV heads dense."""

    local: int
    stride: int
    dense_heads: int = 0
    causal: ClassVar[bool] = True

    def mask(self, case: Case, device: str) -> sl.BSRTensor:
        """`sl.local_stride`."""
        return sl.local_stride(
            case.seq_len,
            block_size=case.block,
            local_blocks=self.local,
            vert_stride=self.stride,
            num_heads=case.heads,
            num_kv_heads=case.keys,
            num_dense_heads=self.dense_heads,
            device=device,
        )

    def entry(self, case: Case, device: str) -> Entry:
        """By the definition of the pattern."""
        step, sparse_heads = max(1, self.stride // case.heads), case.keys - self.dense_heads
        block, group = case.block, case.group

        def stored(h: Any, i: Any, j: Any) -> Any:
            own = h // group
            near = i // block - j // block < self.local
            strided = (j // block + own * step) % self.stride == 0
            return (j <= i) & (near | strided | (own >= sparse_heads))

        return stored


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """Every key up to the query's own."""

    causal: ClassVar[bool] = True
    by_head: ClassVar[bool] = False

    def mask(self, case: Case, device: str) -> sl.BSRTensor:
        """`sl.causal`."""
        return sl.causal(case.seq_len, block_size=case.block, device=device)

    def entry(self, case: Case, device: str) -> Entry:
        """By the definition of the pattern."""
        return lambda h, i, j: j <= i


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
    """The last `window` keys."""

    window: int
    causal: ClassVar[bool] = True
    by_head: ClassVar[bool] = False

    def mask(self, case: Case, device: str) -> sl.BSRTensor:
        """`sl.sliding_window`."""
        return sl.sliding_window(
            case.seq_len, block_size=case.block, window=self.window, device=device
        )

    def entry(self, case: Case, device: str) -> Entry:
        """By the definition of the pattern."""
        return lambda h, i, j: (j <= i) & (i - j < self.window)


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Pattern):
    """A share of the blocks, drawn for each head, and the diagonal, so that no row is empty."""

    share: float

    def table(self, case: Case) -> Tensor:
        """bool (H, nb, nb), on the CPU: the same on every device."""
        blocks = case.seq_len // case.block
        draw = torch.Generator().manual_seed(0)
        drawn = torch.rand(case.heads, blocks, blocks, generator=draw) < self.share
        return drawn | torch.eye(blocks, dtype=torch.bool)

    def mask(self, case: Case, device: str) -> sl.BSRTensor:
        """`sl.bsr_mask`."""
        return sl.bsr_mask(self.table(case), case.block, device=device)

    def entry(self, case: Case, device: str) -> Entry:
        """From the drawn table."""
        table, block = self.table(case).to(device), case.block
        return lambda h, i, j: table[h, i // block, j // block]


@dataclasses.dataclass(frozen=True)
class BigBird(Pattern):
    """BigBird's blocks: in training drawn for each head, in evaluation block 0 as often as that."""

    random_blocks: int
    source: str = "hf-train"

    def mask(self, case: Case, device: str) -> sl.BSRTensor:
        """`sl.bigbird`."""
        return sl.bigbird(
            case.seq_len,
            block_size=case.block,
            num_random_blocks=self.random_blocks,
            num_heads=case.heads,
            source=self.source,
            device=device,
        )

    def entry(self, case: Case, device: str) -> Entry:
        """From the mask's lists: who draws is held to the original elsewhere."""
        mask, block = self.mask(case, "cpu"), case.block
        blocks = case.seq_len // block
        table = torch.zeros(case.heads, blocks, blocks, dtype=torch.int32)
        columns, counts = mask.col_indices().long(), mask.block_counts()
        if counts is None:  # no block was drawn twice
            counts = torch.ones_like(columns, dtype=torch.int32)
        for h, crow in enumerate(mask.crow_indices().long()):
            own = slice(int(crow[0]), int(crow[-1]))
            rows = torch.arange(blocks).repeat_interleave(crow.diff())
            table[h, rows, columns[own]] = counts[own]
        table = table.to(device)
        return lambda h, i, j: table[h, i // block, j // block]


def rows_of(case: Case, heads: Sequence[int], device: str) -> Callable[[int, int], Tensor]:
    """`stored(start, stop)`: rows of the dense mask of some query heads, (heads, rows, N)."""
    entry = case.pattern.entry(case, device)
    h = torch.tensor(list(heads), device=device)[:, None, None]
    j = torch.arange(case.seq_len, device=device)

    def stored(start: int, stop: int) -> Tensor:
        i = torch.arange(start, stop, device=device)[:, None]
        return entry(h, i, j).expand(len(heads), -1, -1)

    return stored


def tiles_of(
    case: Case, rows: int, columns: int, device: str, rows_at_once: int = 1024
) -> tuple[Tensor, Tensor]:
    """Which tiles of `rows` x `columns` tokens store something, and which everything: bool (H, N /
    rows, N / columns), with one head for a pattern that all share.
    """
    entry, n = case.pattern.entry(case, device), case.seq_len
    if n % rows or n % columns:
        raise ValueError(f"{case.name}: tiles of {rows} x {columns} do not divide {n} tokens")
    at_once = max(1, rows_at_once // rows) * rows
    j = torch.arange(n, device=device)
    some, all_of = [], []
    for h in range(case.heads if case.pattern.by_head else 1):
        for start in range(0, n, at_once):
            i = torch.arange(start, min(start + at_once, n), device=device)[:, None]
            stored = entry(h, i, j) != 0
            tiled = stored.view(-1, rows, n // columns, columns)
            some.append(tiled.any(3).any(1))
            all_of.append(tiled.all(3).all(1))
    shape = (-1, n // rows, n // columns)
    return torch.cat(some).view(shape), torch.cat(all_of).view(shape)


# --- the rows -------------------------------------------------------------------------------------

# FlexAttention's candidates, by what was fastest on an H200 (2026-11).
_TALL: tuple[Any, dict[str, Any]] = ((128, 64), {"BLOCK_M": 128, "BLOCK_N": 64})
_SMALL: tuple[Any, dict[str, Any]] = (64, {"BLOCK_M": 64, "BLOCK_N": 64})
_SMALL_32: tuple[Any, dict[str, Any]] = (64, {"BLOCK_M": 64, "BLOCK_N": 32})
_DEFAULT: tuple[Any, None] = (128, None)
_WIDE: tuple[Any, dict[str, Any]] = (
    128,
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "num_warps": 8},
)
_TMA: tuple[Any, dict[str, Any]] = (128, {"USE_TMA": True})
FLEX_64 = (_TALL, _DEFAULT, _WIDE, _SMALL, _TMA, _SMALL_32)
FLEX_128 = (_DEFAULT, _WIDE, _TMA)
FLEX_RANDOM = (_SMALL, _TALL, _DEFAULT)
LOCAL = (CUDNN, FLEX, DKERNEL, FLASH4)
STRIDE_8 = LocalStride(16, 8)


def _case(name: str, pattern: Pattern, sizes: tuple[int, int, int, int, int], **more: Any) -> Case:
    """`sizes`: batch, heads, tokens, head size, block."""
    return Case(name, pattern, *sizes, **more)


# dkernel stands only where it is right: not for GQA, where it reads the wrong KV head, nor for head
# sizes that are no power of two, where it writes out of bounds.
CASES = (
    _case(
        "A1",
        STRIDE_8,
        (2, 32, 8192, 128, 64),
        rivals=LOCAL,
        bars={"forward": (1.35, BEST), "backward": (1.7, DKERNEL)},
        flex=FLEX_64,
    ),
    _case(
        "A2",
        LocalStride(8, 8),
        (2, 32, 8192, 128, 128),
        rivals=LOCAL,
        bars={"forward": (1.05, FLASH4), "backward": (1.03, FLASH4)},
        flex=FLEX_128,
    ),
    _case(
        "A3",
        LocalStride(16, 16),
        (1, 32, 32768, 128, 64),
        rivals=LOCAL,
        bars={"forward": (1.45, DKERNEL), "backward": (1.6, DKERNEL)},
        flex=FLEX_64[:2],
    ),
    _case(
        "A4",
        LocalStride(8, 8),
        (4, 16, 4096, 64, 64),
        rivals=LOCAL,
        bars={"forward": (1.2, DKERNEL), "backward": (1.4, DKERNEL)},
        flex=FLEX_64,
    ),
    _case(
        "causal",
        Causal(),
        (2, 32, 8192, 128, 64),
        bars={"forward": (0.95, CUDNN), "backward": (0.95, CUDNN)},
        flex=FLEX_128,
    ),
    _case(
        "bigbird training",
        BigBird(3),
        (4, 12, 4096, 64, 64),
        bars={"forward": (1.3, FLEX)},
        flex=FLEX_RANDOM,
    ),
    _case(
        "bigbird counts",
        BigBird(3, "hf-eval"),
        (4, 12, 4096, 64, 64),
        bars={"forward": (1.3, FLEX)},
        flex=FLEX_RANDOM,
    ),
    _case(
        "random 10% block 16",
        RandomBlocks(0.1),
        (2, 16, 8192, 128, 16),
        rivals=(CUDNN, FLEX),
        bars={"forward": (1.5, CUDNN)},
        flex=(_DEFAULT,),
    ),
    _case(
        "random 10% block 32",
        RandomBlocks(0.1),
        (2, 16, 8192, 128, 32),
        rivals=(CUDNN, FLEX),
        bars={"forward": (2.5, CUDNN)},
        flex=(_DEFAULT,),
    ),
    _case(
        "random 20% block 64",
        RandomBlocks(0.2),
        (2, 16, 8192, 128, 64),
        flex=FLEX_RANDOM[:2],
    ),
    _case("window 4096", Window(4096), (1, 16, 65536, 128, 64), flex=FLEX_128[:2]),
    _case("GQA", STRIDE_8, (2, 32, 8192, 128, 64), kv_heads=8, flex=FLEX_64[:2]),
    _case(
        "dense heads",
        LocalStride(16, 8, dense_heads=8),
        (2, 32, 8192, 128, 64),
        rivals=LOCAL,
        flex=FLEX_64[:2],
    ),
    _case(
        "fp16",
        STRIDE_8,
        (2, 32, 8192, 128, 64),
        dtype=torch.float16,
        rivals=LOCAL,
        flex=FLEX_64[:2],
    ),
    _case("D 96", STRIDE_8, (2, 16, 8192, 96, 64), flex=FLEX_64[:2]),
    _case("D 192", STRIDE_8, (2, 16, 8192, 192, 64), flex=FLEX_64[1:2]),
    _case("D 256", STRIDE_8, (2, 8, 8192, 256, 64), flex=FLEX_64[1:2]),
    # Packed variable lengths and dropout belong here, once a case says more than a mask: the call
    # is `attention_rivals.ours`, the reference in `attention.check`.
)
QUICK_CASES = (
    _case("A0", LocalStride(2, 4), (1, 4, 512, 64, 64), rivals=LOCAL, flex=(_DEFAULT,)),
    _case("bigbird counts", BigBird(3, "hf-eval"), (1, 2, 512, 64, 64), rivals=(CUDNN,)),
    _case("window 100", Window(100), (1, 2, 512, 64, 64), rivals=(CUDNN,)),
    _case("random 10% block 16", RandomBlocks(0.1), (1, 2, 512, 64, 16), rivals=(CUDNN,)),
    _case("GQA", LocalStride(2, 4), (2, 4, 512, 64, 64), kv_heads=2, rivals=(CUDNN,)),
)
