"""Cases of grouped_nm_matmul and grouped_nm_sddmm."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from sparse_layouts.grouped_nm_packing import densify, gather
from tests.kernels.accuracy import Arithmetic, Results
from tests.kernels.cases import Call, Case, Device, Operands, random_source


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """`shape` (M, K); `width` is the dense operand's free size (matmul) or the contracted one
    (sddmm); `share` gives values a batch of one.
    """

    name: str
    shape: tuple[int, int]
    nmg: tuple[int, int, int] = (2, 4, 4)
    batch: int = 1
    width: int = 24
    dense: str = "plain"
    values: str = "plain"
    share: bool = False
    transposed: bool = False
    flip: bool = False

    def columns(self, random: torch.Generator) -> Tensor:
        """int16 (Mb, S): a random permutation of every chunk."""
        (rows, cols), (n, m, g) = self.shape, self.nmg
        chunk = math.comb(m, n) * g
        blocks, chunks = -(-rows // m), -(-cols // chunk)
        return torch.rand(blocks, chunks, chunk, generator=random).argsort(-1).flatten(1).short()

    def build_matmul(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of grouped_nm_matmul; values are 0 over the edge."""
        make, columns = self._begin("grouped_nm_matmul", dtype, device)
        n, m, g = self.nmg
        dense = make.normal(1 if self.share else self.batch, *self.shape)
        values = gather(dense, columns, n, m, g)
        x = make.normal(
            self.batch, self.shape[0 if self.transposed else 1], self.width, how=self.dense
        )
        options = {"transposed": self.transposed, "transposed_output": self.flip}
        return Call((values, columns, x), {"n": n, "m": m, "g": g, "shape": self.shape, **options})

    def build_sddmm(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of grouped_nm_sddmm."""
        make, columns = self._begin("grouped_nm_sddmm", dtype, device)
        n, m, g = self.nmg
        a = make.normal(self.batch, self.shape[0], self.width, how=self.dense)
        b = make.normal(self.batch, self.width, self.shape[1], how=self.values)
        return Call((a, b, columns), {"n": n, "m": m, "g": g})

    def _begin(self, op: str, dtype: torch.dtype, device: Device) -> tuple[Operands, Tensor]:
        random = random_source(f"{op} {self.name}")
        return Operands(random, dtype, device), self.columns(random).to(device)

    def case(self, op: str) -> Case:
        """This case for one op."""
        build = self.build_matmul if op == "grouped_nm_matmul" else self.build_sddmm
        return Case(self.name, build, False, {"n_of_m": self.nmg[:2]})


CASES = [
    GroupedCase("even", (48, 96), batch=2),
    GroupedCase("ragged", (50, 101), width=33, dense="mT"),
    GroupedCase("transposed", (50, 101), batch=3, transposed=True, flip=True, dense="step"),
    GroupedCase("one_column", (37, 60), (1, 3, 5), width=1, share=True, batch=2),
    GroupedCase("two_columns", (64, 70), (3, 5, 2), width=2, dense="step", flip=True),
    GroupedCase("many_blocks", (4000, 200), (2, 4, 4), width=5),
    GroupedCase("many_blocks_transposed", (4000, 200), (2, 4, 4), width=5, transposed=True),
    GroupedCase("no_row", (0, 24)),
    GroupedCase("no_column", (8, 0), width=3),
    GroupedCase("batch_0", (8, 24), batch=0),
    GroupedCase("width_0", (8, 24), width=0),
]


def dense_matmul(
    a: Arithmetic,
    values: Tensor,
    columns: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    g: int,
    shape: tuple[int, int],
    transposed: bool,
    transposed_output: bool,
) -> Results:
    w = densify(values, columns, n, m, g, shape)
    return (a.product(w.mT if transposed else w, x).to(x.dtype),)


def dense_sddmm(
    a: Arithmetic, left: Tensor, right: Tensor, columns: Tensor, *, n: int, m: int, g: int
) -> Results:
    return (gather(a.product(left, right).to(left.dtype), columns, n, m, g),)


def over_the_edge(call: Call) -> tuple[Tensor]:
    """Where the values of grouped_nm_sddmm are 0: over the matrix's edge."""
    a, b, columns = call.args
    return (gather(torch.ones(1, a.shape[1], b.shape[2]), columns, **call.kwargs) == 0,)


OPS = {op: [c.case(op) for c in CASES] for op in ("grouped_nm_matmul", "grouped_nm_sddmm")}
DENSE = {"grouped_nm_matmul": dense_matmul, "grouped_nm_sddmm": dense_sddmm}
ZEROS = {"grouped_nm_sddmm": over_the_edge}
EXAMPLES = {"grouped_nm_matmul": "ragged", "grouped_nm_sddmm": "ragged"}
