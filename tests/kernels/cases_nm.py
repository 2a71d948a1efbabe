"""Cases of nm_matmul and nm_sddmm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.nm_fragments import (
    AXES,
    FRAGMENTS,
    ROWS,
    by_fragments,
    by_rows,
    fragment_indices,
    has_fragments,
    row_indices,
)
from sparse_layouts.nm_packing import gather_entries, pack_positions, scatter_entries
from tests.kernels.accuracy import Arithmetic, Results
from tests.kernels.cases import Call, Case, Device, Operands, random_source


def random_positions(
    patterns: int, rows: int, groups: int, n: int, m: int, random: torch.Generator
) -> Tensor:
    """int64 (P, M, E) of random n:m patterns; rows repeat after a while, for speed."""
    drawn = min(rows, 97)
    order = torch.rand(patterns, drawn, groups, m, generator=random).argsort(-1)
    positions = order[..., :n].sort(-1)[0].reshape(patterns, drawn, groups * n)
    return positions[:, torch.arange(rows) % max(drawn, 1)]


def random_indices(
    patterns: int, rows: int, groups: int, n: int, m: int, random: torch.Generator
) -> Tensor:
    """The same, packed: (P, M, W)."""
    return pack_positions(random_positions(patterns, rows, groups, n, m, random), m)


@dataclasses.dataclass(frozen=True)
class NMCase:
    """`shape` (M, groups a row); `width` is the dense operand's free size (matmul) or the
    contracted one (sddmm).

    `dense` and `values` are the strides of the operands; `share` gives values a batch of one, and
    `share_x` x.
    """

    name: str
    shape: tuple[int, int]
    nm: tuple[int, int] = (2, 4)
    patterns: int = 1
    batch: int = 1
    width: int = 24
    dense: str = "plain"
    values: str = "plain"
    share: bool = False
    share_x: bool = False
    transposed: bool = False
    flip: bool = False
    small: bool = False
    order: str = ROWS

    @property
    def matrix(self) -> tuple[int, int]:
        """(M, K)."""
        return self.shape[0], self.shape[1] * self.nm[1]

    def build_matmul(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of nm_matmul."""
        make, indices = self._begin("nm_matmul", dtype, device)
        (rows, groups), (n, m) = self.shape, self.nm
        batch = 1 if self.share else self.batch
        values = make.normal(batch, self.patterns, rows, groups * n, how=self.values)
        inner = rows if self.transposed else groups * m
        batch = 1 if self.share_x else self.batch
        x = make.normal(batch, self.patterns, inner, self.width, how=self.dense)
        options: dict[str, Any] = {"transposed": self.transposed, "transposed_output": self.flip}
        if self.order == FRAGMENTS:  # the strides of such values are those of their order
            values = by_fragments(values, n, m)
            indices = fragment_indices(indices, n, m, groups * m)
            options["order"] = FRAGMENTS
        return Call((values, indices, x), {"n": n, "m": m, **options})

    def build_sddmm(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of nm_sddmm."""
        make, indices = self._begin("nm_sddmm", dtype, device)
        (rows, columns), (n, m) = self.matrix, self.nm
        a = make.normal(self.batch, self.patterns, rows, self.width, how=self.values)
        b = make.normal(self.batch, self.patterns, self.width, columns, how=self.dense)
        return Call((a, b, indices), {"n": n, "m": m})

    def _begin(self, op: str, dtype: torch.dtype, device: Device) -> tuple[Operands, Tensor]:
        random = random_source(f"{op} {self.name}")
        indices = random_indices(self.patterns, *self.shape, *self.nm, random)
        return Operands(random, dtype, device), indices.to(device)

    def case(self, op: str) -> Case:
        """This case for one op."""
        if op == "nm_sddmm":
            return Case(self.name, self.build_sddmm, self.small, {"n_of_m": self.nm})
        facts: dict[str, Any] = {
            "n_of_m": self.nm,
            "columns": 1 << (self.width - 1).bit_length() if self.width else 0,
            "transposed": self.transposed,
            "divisor": math.gcd(*self.matrix, 64),
            "order": self.order,
            "fragments": has_fragments(*self.nm, *self.matrix),
        }
        return Case(self.name, self.build_matmul, self.small, facts)


CASES = [
    NMCase("plain", (64, 16), small=True),
    NMCase("transposed", (50, 12), transposed=True, batch=2, dense="mT", small=True),
    NMCase("ragged", (37, 13), (3, 5), width=33, patterns=2, dense="step", flip=True, small=True),
    NMCase("one_column", (37, 21), (1, 3), width=1, patterns=2, batch=2, share=True, small=True),
    NMCase("one_column_transposed", (70, 9), (2, 4), width=1, transposed=True, small=True),
    NMCase("one_of_two", (33, 40), (1, 2), width=7, values="step", small=True),
    NMCase("fifteen_of_sixteen", (20, 3), (15, 16), dense="offset", small=True),
    NMCase("seven_of_nine_transposed", (19, 4), (7, 9), transposed=True, flip=True, small=True),
    NMCase("share_values", (48, 16), batch=3, share=True, width=40, dense="mT"),
    NMCase("share_x", (48, 16), (4, 8), batch=3, share_x=True, patterns=2, flip=True),
    NMCase("expanded", (32, 16), batch=2, dense="expand_0", values="expand_0"),
    NMCase("heads_last", (40, 12), patterns=3, batch=2, dense="heads_last", transposed=True),
    NMCase("wide", (64, 32), width=513, flip=True),
    NMCase("very_wide", (64, 128), width=8193, flip=True),
    NMCase("very_wide_patterns", (128, 64), width=8200, patterns=2, batch=2, dense="mT"),
    NMCase("wide_patterns", (128, 16), width=600, patterns=2, batch=2, dense="mT"),
    NMCase("wide_transposed", (64, 32), width=513, transposed=True),
    NMCase("many_rows", (2100, 160), width=40, dense="mT"),
    NMCase("many_rows_few_columns", (2100, 160), width=3, share=True),
    NMCase("many_rows_transposed", (2100, 128), (3, 5), width=9, transposed=True, flip=True),
    NMCase("many_matrices", (70, 16), patterns=65, batch=4, width=5, flip=True),
    *(
        NMCase(f"fragments_{n}_{m}_{width}", shape, (n, m), width=width, order=FRAGMENTS, **more)
        for n, m in AXES
        for width, shape, more in (
            (1, (16, 64), {"dense": "mT", "flip": True}),
            (3, (160, 640), {"batch": 3, "share": True, "flip": True}),
            (8, (48, 192), {"patterns": 2, "batch": 2}),
            (16, (4112, 1088), {"dense": "mT", "flip": True}),
            (24, (80, 320), {"dense": "step", "share_x": True, "batch": 2}),
            (33, (2080, 256), {"dense": "offset", "flip": True}),
            (64, (160, 2112), {"dense": "mT"}),
            (50, (6416, 96), {"dense": "mT", "flip": True}),
        )
    ),
    *(
        NMCase(f"fragments_{n}_{m}_{name}", (48, 2 * 32 // n), (n, m), order=FRAGMENTS, **more)
        for n, m in AXES
        for name, more in (
            ("wide", {"width": 130, "dense": "mT", "flip": True, "small": True}),
            ("transposed", {"width": 9, "transposed": True, "batch": 2, "small": True}),
        )
    ),
    NMCase("no_row", (0, 6), small=True),
    NMCase("no_column", (8, 0), width=3, small=True),
    NMCase("no_row_transposed", (0, 6), transposed=True, small=True),
    NMCase("batch_0", (8, 6), batch=0, small=True),
    NMCase("batch_0_shared", (8, 6), batch=0, share=True, small=True),
    NMCase("width_0", (8, 6), width=0, small=True),
]


def dense_matmul(
    a: Arithmetic,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool,
    transposed_output: bool,
    order: str = ROWS,
) -> Results:
    if order == FRAGMENTS:
        columns = values.shape[-1] // n * m
        values, indices = by_rows(values, n, m), row_indices(indices, n, m, columns)
    w = scatter_entries(values, indices, n, m, values.shape[-1] // n * m)
    return (a.product(w.mT if transposed else w, x).to(x.dtype),)


def dense_sddmm(
    a: Arithmetic, left: Tensor, right: Tensor, indices: Tensor, *, n: int, m: int
) -> Results:
    return (gather_entries(a.product(left, right).to(left.dtype), indices, n, m),)


# those that differ in what nm_sddmm is given
def _sampled(case: NMCase) -> bool:
    shared = case.transposed or case.share or case.share_x
    return not (shared or "wide" in case.name or case.order == FRAGMENTS)


SAMPLED = [case for case in CASES if _sampled(case)]
OPS = {
    "nm_matmul": [c.case("nm_matmul") for c in CASES],
    "nm_sddmm": [c.case("nm_sddmm") for c in SAMPLED],
}
DENSE: dict[str, Callable[..., Results]] = {"nm_matmul": dense_matmul, "nm_sddmm": dense_sddmm}
ZEROS: dict[str, Callable[[Call], Results]] = {}  # what is stored may have any value
EXAMPLES = {"nm_matmul": "ragged", "nm_sddmm": "ragged"}
