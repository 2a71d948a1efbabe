"""The rows of block-sparse products: patterns, sizes, rivals and bars.

A pattern says which blocks are stored; values are random. W is (m, k), the dense operand has n
columns or rows, so that every product costs 2 * n operations a stored entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DENSE, BSR, CSR, TRITON = "cuBLAS dense", "torch.sparse BSR", "torch CSR", "Triton's block-sparse"
OUR_DSD = "our dsd"
REORDERED = "our own, reordered"
DSD, DDS, SDD, LINEAR, TURNED = "W @ x", "x @ W", "sddmm", "F.linear(x, W)", "W.mT @ x"
TRAINING = "F.linear and both gradients"
ROWS, COLUMNS, STRIDED = "by rows", "by columns", "every second column of a wider one"


@dataclasses.dataclass(frozen=True)
class Bar:
    """At least `ratio` times as fast as `over`; `aim` is what is hoped for. `graph`: in CUDA
    graphs, in which weights take turns, else by eager calls.
    """

    ratio: float
    over: str
    aim: float | None = None
    graph: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """A product, its pattern and sizes, who else computes it, and what is promised.

    `heads`: W is (heads, m, k), a pattern each. `batch`: so many dense operands.
    """

    name: str
    pattern: Pattern
    block: tuple[int, int]
    m: int = 4096
    k: int = 4096
    n: int = 4096
    kind: str = DSD
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    heads: int | None = None
    batch: int | None = None
    lies: str = ROWS
    rivals: Sequence[str] = (DENSE,)
    bar: Bar | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and columns of a matrix."""
        return self.m // self.block[0], self.k // self.block[1]

    @property
    def products(self) -> int:
        """How often each stored entry is multiplied by n columns."""
        return (self.batch or 1) * (3 if self.kind == TRAINING else 1)

    def kept(self) -> Tensor:
        """bool (heads or 1, *grid), on the CPU: the same on every device."""
        draw = torch.Generator().manual_seed(0)
        tables = [self.pattern.blocks(*self.grid, draw) for _ in range(self.heads or 1)]
        return torch.stack(tables)

    def describe(self) -> str:
        """The product and its sizes, for a note."""
        kind = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            kind += " as tf32" if self.tf32 else " in full"
        parts = [f"{self.kind}, W {self.m} x {self.k}, {self.n} columns or rows, {kind}"]
        if self.heads:
            parts.append(f"{self.heads} heads")
        if self.batch:
            parts.append(f"batch {self.batch}")
        if self.lies != ROWS:
            parts.append(f"the dense operand {self.lies}")
        return ", ".join([*parts, f"blocks of {self.block[0]} x {self.block[1]}, {self.pattern}"])


# --- patterns -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which blocks are stored."""

    def blocks(self, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """bool (rows, columns), on the CPU."""
        raise NotImplementedError

    def entries(self) -> Tensor | None:
        """bool (m, k), where not all entries of the blocks are non-zero."""
        return None


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Pattern):
    """Exactly this share of the blocks."""

    share: float

    def blocks(self, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """Drawn over the whole matrix."""
        kept = torch.zeros(rows * columns, dtype=torch.bool)
        count = max(1, round(self.share * rows * columns))
        kept[torch.randperm(rows * columns, generator=draw)[:count]] = True
        return kept.view(rows, columns)


@dataclasses.dataclass(frozen=True)
class Banded(Pattern):
    """About this share of the blocks, along the diagonal."""

    share: float

    def blocks(self, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """Those whose column is near the row's place on the diagonal."""
        half = max(0, round((self.share * columns - 1) / 2))
        i, j = torch.arange(rows)[:, None], torch.arange(columns)
        return (j - i * columns // rows).abs() <= half


@dataclasses.dataclass(frozen=True)
class Shuffled(Pattern):
    """Another pattern, its block rows in no order."""

    of: Pattern

    def blocks(self, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """The rows are drawn after the blocks."""
        ordered = self.of.blocks(rows, columns, draw)
        return ordered[torch.randperm(rows, generator=draw)]


@dataclasses.dataclass(frozen=True)
class PowerLaw(Pattern):
    """About this share of the blocks, in rows whose lengths fall as rank ** -0.8, up to the whole
    row, in no order.
    """

    share: float

    def blocks(self, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """A few rows are full, most have a block or two."""
        weight = torch.arange(1, rows + 1).double() ** -0.8
        lengths = weight
        for _ in range(20):  # rows that are full leave their share to the others
            weight *= self.share * rows * columns / lengths.sum()
            lengths = weight.clamp(1, columns)
        lengths = lengths.round().long()
        lengths = lengths[torch.randperm(rows, generator=draw)]
        order = torch.rand(rows, columns, generator=draw).argsort(1)
        return order < lengths[:, None]


# --- the rows -------------------------------------------------------------------------------------


def square(edge: int) -> tuple[int, int]:
    """A block's edges."""
    return edge, edge


def _dsd(edge: int, share: float, **more: object) -> Case:
    more.setdefault("rivals", (DENSE, BSR))
    name = f"dsd {share:.0%} block {edge}"
    return Case(name, RandomBlocks(share), square(edge), **more)  # type: ignore[arg-type]


def _variant(what: str, **more: object) -> Case:
    """A quarter of blocks of 64, otherwise than `dsd 25% block 64`."""
    pattern, block = RandomBlocks(0.25), square(64)
    return Case(what, pattern, block, **more)  # type: ignore[arg-type]


def _decode(batch: int, bar: Bar | None) -> Case:
    return _variant(
        f"decode batch {batch}",
        m=8192,
        k=8192,
        n=batch,
        kind=LINEAR,
        rivals=(DENSE, BSR),
        bar=bar,
    )


# Over torch.sparse's BSR product: block -> what is promised, what is hoped for.
OVER_BSR: Mapping[int, tuple[float, float]] = {
    16: (2.5, 3.5),
    32: (1.7, 2.2),
    64: (1.4, 1.8),
    128: (1.9, 2.4),
}
OVER_DSD = Bar(0.85, OUR_DSD)
DECODE = Bar(2.5, DENSE, graph=True)
CASES = (
    *(
        _dsd(edge, 0.25, rivals=(DENSE, BSR, TRITON), bar=Bar(ratio, BSR, aim))
        for edge, (ratio, aim) in OVER_BSR.items()
    ),
    _dsd(64, 0.1, rivals=(DENSE, BSR, CSR), bar=Bar(3.0, DENSE)),
    _dsd(128, 0.1, bar=Bar(3.8, DENSE)),
    _variant("sdd 25% block 64", kind=SDD, rivals=(DENSE, OUR_DSD), bar=OVER_DSD),
    _variant("dds 25% block 64", kind=DDS, rivals=(DENSE, OUR_DSD), bar=OVER_DSD),
    *(_decode(batch, DECODE) for batch in (1, 8, 16)),
    Case(
        "linear training 20% block 64",
        RandomBlocks(0.2),
        square(64),
        n=8192,
        kind=TRAINING,
        bar=Bar(2.2, DENSE),
    ),
    # without bars
    _dsd(16, 0.1),
    _dsd(32, 0.1),
    _dsd(64, 0.5),
    _dsd(128, 0.5),
    _decode(64, None),
    _variant("linear 25% block 64", kind=LINEAR, rivals=(DENSE, BSR)),
    _variant("dsd 25% block 64, 128 columns", n=128, rivals=(DENSE, BSR)),
    _variant("dsd fp16", dtype=torch.float16, rivals=(DENSE, BSR)),
    _variant("dsd fp32", dtype=torch.float32, rivals=(DENSE, BSR)),
    _variant("dsd fp32 as tf32", dtype=torch.float32, tf32=True, rivals=(DENSE, BSR)),
    Case("dsd fp64", RandomBlocks(0.25), square(32), m=1024, k=1024, n=1024, dtype=torch.float64),
    *(
        Case(
            f"dsd 25% block {bm}x{bn}",
            RandomBlocks(0.25),
            (bm, bn),
            rivals=(DENSE, BSR),
        )
        for bm, bn in ((16, 64), (64, 16), (1, 32), (32, 1))
    ),
    Case("sdd 25% block 16", RandomBlocks(0.25), square(16), kind=SDD),
    Case("sdd 25% block 128", RandomBlocks(0.25), square(128), kind=SDD),
    _variant("dsd W transposed", kind=TURNED, rivals=(DENSE, OUR_DSD)),
    _variant("dsd x by columns", lies=COLUMNS, rivals=(DENSE, OUR_DSD)),
    _variant("dsd x strided", lies=STRIDED, n=2048, rivals=(DENSE, OUR_DSD)),
    _variant("dsd 16 heads, batch 2", m=1024, k=1024, n=1024, heads=16, batch=2),
    _variant("dsd batch 8", n=512, batch=8),
    Case("dsd power law 10% block 64", PowerLaw(0.1), square(64), rivals=(DENSE, BSR, CSR)),
    Case(
        "dsd power law 10% block 16",
        PowerLaw(0.1),
        square(16),
        rivals=(DENSE, BSR, REORDERED),
    ),
    Case(
        "dsd shuffled banded 10% block 16",
        Shuffled(Banded(0.1)),
        square(16),
        rivals=(DENSE, BSR, REORDERED),
    ),
    Case("dsd banded 10% block 64", Banded(0.1), square(64), rivals=(DENSE, BSR)),
)


def _small(case: Case) -> Case:
    """The same on few entries."""
    edge = max(512, 4 * max(case.block))
    heads, batch = case.heads and 2, case.batch and 2
    n = min(case.n, 512)
    return dataclasses.replace(case, m=edge, k=edge, n=n, heads=heads, batch=batch)


QUICK_NAMES = (
    "dsd 25% block 64",
    "sdd 25% block 64",
    "dds 25% block 64",
    "decode batch 1",
    "linear training 20% block 64",
    "dsd 25% block 1x32",
)
QUICK_CASES = tuple(_small(case) for case in CASES if case.name in QUICK_NAMES)
