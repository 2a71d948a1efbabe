"""The rows of n:m products: ratios, sizes, rivals, bars, operands, whether a result is right."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from benchmarks.gpu import DTYPE, OURS
from benchmarks.matmul_cases import DENSE, Bar
from benchmarks.matmul_reference import kernels_of
from benchmarks.matmul_variants import Variant
from benchmarks.timing import WrongResult, check_error
from sparse_layouts.measuring import relative_error

TORCH, BY_ROWS = "torch semi-structured", "our row by row"
RATIOS = ((2, 4), (1, 4), (2, 8), (1, 8))
BATCHES = (1, 8, 16, 32, 64)
MANY = 4096  # rows of x of a product that arithmetic bounds


@dataclasses.dataclass(frozen=True)
class Case:
    """`F.linear(x, W)`: W (size, size), n of every m entries of a row stored, prepacked; x (batch,
    size).
    """

    n: int
    m: int
    size: int
    batch: int
    bar: Bar | None = None

    @property
    def name(self) -> str:
        """Of its row."""
        return f"nm {self.n}:{self.m} {self.size} batch {self.batch}"

    @property
    def rivals(self) -> tuple[str, ...]:
        """Who else computes it."""
        more = (TORCH,) if (self.n, self.m) == (2, 4) else ()
        return (DENSE, *more, BY_ROWS) if self.batch >= MANY else (DENSE, *more)


# by n, m, size and batch
BARS = {
    (2, 4, 8192, 1): Bar(1.55, DENSE, graph=True),
    (2, 4, 8192, 8): Bar(1.55, DENSE, graph=True),
    (2, 4, 8192, 16): Bar(1.45, DENSE, graph=True),
    (1, 4, 8192, 8): Bar(2.4, DENSE, graph=True),
    (1, 8, 8192, 8): Bar(3.0, DENSE, graph=True),
    (2, 4, 4096, MANY): Bar(1.5, TORCH),
}


def _cases() -> tuple[Case, ...]:
    found = []
    for size in (8192, 4096):
        for n, m in RATIOS:
            batches = (*BATCHES, MANY) if (n, m) == (2, 4) else BATCHES
            found += [Case(n, m, size, b, BARS.get((n, m, size, b))) for b in batches]
    return tuple(found)


CASES = _cases()
QUICK_CASES = tuple(Case(n, m, 512, batch) for n, m in RATIOS for batch in (1, 16))


class Operands(NamedTuple):
    """W prepacked, row by row and dense, and x (batch, size)."""

    layout: sl.NMTensor
    rows: sl.NMTensor
    dense: Tensor
    x: Tensor

    @property
    def weight_bytes(self) -> int:
        """W's values and positions."""
        return sum(t.nbytes for t in self.layout.inner_tensors())


@functools.lru_cache(maxsize=1)
def weight(n: int, m: int, size: int, device: str) -> tuple[sl.NMTensor, sl.NMTensor, Tensor]:
    """W prepacked, row by row and dense; cases in a row share it."""
    draw = torch.Generator(device=device).manual_seed(0)
    rows = sl.nm(torch.randn(size, size, device=device, dtype=DTYPE, generator=draw), n, m)
    return rows.prepack(), rows, rows.to_dense()


def operands(case: Case, device: str) -> Operands:
    """Random operands, the same every time on a device."""
    draw = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(case.batch, case.size, device=device, dtype=DTYPE, generator=draw)
    return Operands(*weight(case.n, case.m, case.size, device), x)


class Checked(NamedTuple):
    """The result, its error and dense torch's, and the kernel that ran."""

    result: Tensor
    error: float
    dense_error: float
    kernel: str


def check(case: Case, given: Operands) -> Checked:
    """Compares the result with float64 by relative norm.

    Raises :class:`WrongResult` if it is wrong, or differs in its bits between calls, of which later
    ones are launched as earlier ones were.
    """
    with torch.no_grad(), sl.fallback("error"):
        with sl.trace() as steps:
            out = F.linear(given.x, given.layout)
        if not all(torch.equal(out, F.linear(given.x, given.layout)) for _ in range(3)):
            raise WrongResult(f"{case.name}: the result differs in its bits between calls")
    exact = F.linear(given.x.double(), given.dense.double())
    error = relative_error(out, exact)
    dense_error = relative_error(F.linear(given.x, given.dense), exact)
    check_error(case.name, error, dense_error, DTYPE)
    return Checked(out, error, dense_error, kernels_of(list(steps)))


# --- who computes it ------------------------------------------------------------------------------


class Compressed(Variant):
    """torch's semi-structured weights, which cannot be cloned."""

    def turns(self, copies: int) -> Callable[[], Callable[[], Any]]:
        """Makes a run of `copies` calls, each on a weight of its own."""
        plain = self.weight.to_dense()
        weights = [self.weight, *(compress(plain) for _ in range(copies - 1))]
        return lambda: lambda: [self.call(weight) for weight in weights]


def compress(dense: Tensor) -> Any:
    """A dense 2:4 matrix as torch has it: by cuSPARSELt where that is there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
        return torch.sparse.to_sparse_semi_structured(dense)


def variant(who: str, given: Operands) -> Variant:
    """The product, without gradients, as one computes it."""

    def call(weight: Any) -> Tensor:
        with torch.no_grad():
            return F.linear(given.x, weight)

    if who == TORCH:
        return Compressed(call, compress(given.dense))
    return Variant(call, {OURS: given.layout, BY_ROWS: given.rows, DENSE: given.dense}[who])
