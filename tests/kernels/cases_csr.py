"""Cases of csr_matmul, csr_sddmm, csr_softmax and csr_softmax_backward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_layouts.csr_lists import densify, gather
from sparse_layouts.kernels.csr_matmul import facts as matmul_facts
from sparse_layouts.kernels.csr_softmax import reference as softmax_reference
from tests.kernels.accuracy import Arithmetic, Results
from tests.kernels.cases import Call, Case, Device, Operands, laid_out, random_source


@dataclasses.dataclass(frozen=True)
class CSRCase:
    """`shape` (M, K); `width` is the dense operand's free size (matmul) or the contracted one
    (sddmm).

    `stored`: "some" (the first, the last and a middle row and column without entries), "none",
    "all", "band", or "skew" (one row is full, a few are long, most have an entry or none).
    `share` gives values a batch of one, `share_dense` the dense operand; `poison` puts NaN where
    nothing is read.
    """

    name: str
    shape: tuple[int, int]
    stored: str = "some"
    batch: int = 1
    width: int = 24
    index: torch.dtype = torch.int32
    dense: str = "plain"
    values: str = "plain"
    share: bool = False
    share_dense: bool = False
    transposed: bool = False
    flip: bool = False
    poison: bool = False
    log: bool = False
    factor: float = 1.0
    small: bool = False

    def entries(self, random: torch.Generator) -> Tensor:
        """bool (M, K): which entries are stored."""
        m, k = self.shape
        drawn = torch.rand(m, k, generator=random)
        if self.stored in ("none", "all"):
            return torch.full((m, k), self.stored == "all")
        if self.stored == "band":
            at = torch.arange(m)[:, None] * k // max(m, 1) - torch.arange(k)
            return (at.abs() < 4) & (drawn < 0.9)
        if self.stored == "skew":
            share = torch.rand(m, generator=random) ** 8
            share[m // 3] = 1.0
            return drawn < share[:, None]
        kept = drawn < 0.3
        for empty in (0, m // 2, m - 1):
            kept[empty] = False
        for empty in (0, k // 2, k - 1):
            kept[:, empty] = False
        return kept

    def begin(self, op: str, dtype: torch.dtype, device: Device) -> tuple[Operands, Any, Tensor]:
        """The generator of operands, the lists, and which entries are stored."""
        random = random_source(f"{op} {self.name}")
        kept = self.entries(random)
        crow = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
        lists = tuple(t.to(self.index).to(device) for t in (crow, kept.nonzero()[:, 1]))
        return Operands(random, dtype, device), lists, kept.to(device)

    def build_matmul(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of csr_matmul."""
        make, lists, kept = self.begin("csr_matmul", dtype, device)
        size = lists[1].shape[0]
        values = make.normal(1 if self.share else self.batch, size, how=self.values)
        rows = self.shape[0 if self.transposed else 1]
        x = make.normal(1 if self.share_dense else self.batch, rows, self.width)
        if self.poison:
            unread = ~kept.any(1 if self.transposed else 0)
            assert unread.any()
            x = x.masked_fill(unread[:, None], math.nan)
        options = {"transposed": self.transposed, "transposed_output": self.flip}
        x = laid_out(x, self.dense)
        return Call((values, *lists, x), {"shape": self.shape, **options})

    def build_sddmm(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of csr_sddmm."""
        make, lists, kept = self.begin("csr_sddmm", dtype, device)
        a = make.normal(self.batch, self.shape[0], self.width)
        b = make.normal(self.batch, self.width, self.shape[1])
        if self.poison:
            a = a.masked_fill(~kept.any(1)[:, None], math.nan)
            b = b.masked_fill(~kept.any(0), math.nan)
        a, b = laid_out(a, self.dense), laid_out(b, self.values)
        return Call((a, b, *lists), {"shape": self.shape})

    def build_softmax(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of csr_softmax."""
        make, lists, _ = self.begin("csr_softmax", dtype, device)
        values = make.normal(self.batch, lists[1].shape[0]) * self.factor
        return Call((laid_out(values, self.values), lists[0]), {"log": self.log})

    def build_softmax_backward(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of csr_softmax_backward."""
        (values, crow), options = self.build_softmax(dtype, device)
        make = Operands(random_source(f"{self.name} gradient"), dtype, device)
        grad = make.normal(*values.shape, how=self.dense)
        out = softmax_reference.csr_softmax(values.nan_to_num(0.0), crow, **options)
        return Call((grad, out, crow), options)

    def case(self, op: str) -> Case:
        """This case for one op."""
        more: dict[str, Any] = {}
        if op == "csr_matmul":
            facts = matmul_facts(torch.zeros(0), self.width, 0, self.shape, self.transposed)
            more = {"columns": facts.columns, "transposed": facts.transposed}
        return Case(self.name, getattr(self, _BUILDERS[op]), self.small, more)


_BUILDERS = {
    "csr_matmul": "build_matmul",
    "csr_sddmm": "build_sddmm",
    "csr_softmax": "build_softmax",
    "csr_softmax_backward": "build_softmax_backward",
}

COMMON = [
    CSRCase("ragged", (33, 47), batch=2, small=True),
    CSRCase("unread", (33, 47), batch=2, poison=True, small=True),
    CSRCase("int64", (33, 47), index=torch.int64, dense="mT", values="step", small=True),
    CSRCase("skew", (40, 700), "skew", width=8, small=True),
    CSRCase("skew_wide", (300, 2200), "skew", width=33),
    CSRCase("band", (129, 64), "band", batch=3, dense="offset", values="offset"),
    CSRCase("all", (17, 70), "all", width=65, small=True),
    CSRCase("none", (9, 12), "none", small=True),
    CSRCase("no_row", (0, 12), "none", small=True),
    CSRCase("no_column", (9, 0), "none", small=True),
    CSRCase("batch_0", (9, 12), batch=0, small=True),
]
PRODUCTS = [
    CSRCase("width_0", (9, 12), width=0, small=True),
    CSRCase("width_1", (65, 90), width=1, batch=2, poison=True, small=True),
    CSRCase("width_256", (65, 90), width=256, dense="step", poison=True),
    CSRCase("width_700", (65, 4000), width=700),
]
MATMUL = [
    CSRCase("transposed", (33, 47), batch=2, transposed=True, poison=True, small=True),
    CSRCase("transposed_skew", (40, 700), "skew", width=40, transposed=True, dense="mT"),
    CSRCase("transposed_int64", (33, 47), index=torch.int64, width=1, transposed=True),
    CSRCase("transposed_256", (65, 90), width=256, transposed=True, flip=True, batch=2),
    CSRCase("flip", (33, 47), flip=True, dense="mT", batch=2, small=True),
    CSRCase("flip_256", (65, 90), flip=True, dense="mT", width=256),
    CSRCase("one_matrix", (33, 47), batch=3, share=True, values="plain", small=True),
    CSRCase("one_operand", (33, 47), batch=3, share_dense=True, width=130),
    CSRCase("one_operand_expanded", (33, 47), batch=3, dense="expand_0"),
    CSRCase("batch_0_shared", (9, 12), batch=0, share=True, small=True),
    CSRCase("wide_int64", (33, 47), width=130, index=torch.int64, dense="mT", values="step"),
    CSRCase("wide_none", (9, 12), "none", width=130),
    CSRCase("wide_one_matrix", (33, 47), width=130, batch=3, share=True, dense="step"),
    CSRCase("wide_flip", (33, 47), width=130, batch=2, flip=True, dense="mT"),
]
SOFTMAX = [
    CSRCase("log", (33, 47), batch=2, log=True, small=True),
    CSRCase("log_skew", (40, 700), "skew", log=True),
    CSRCase("large", (33, 47), factor=60.0, small=True),
    CSRCase("one_entry", (50, 1), "all", small=True),
]


def dense_matmul(
    a: Arithmetic,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    *,
    shape: tuple[int, int],
    transposed: bool,
    transposed_output: bool,
) -> Results:
    w = densify(values, crow, col, shape)
    return (a.product(w.mT if transposed else w, x).to(x.dtype),)


def dense_sddmm(
    a: Arithmetic,
    left: Tensor,
    right: Tensor,
    crow: Tensor,
    col: Tensor,
    *,
    shape: tuple[int, int],
) -> Results:
    return (gather(a.product(left, right).to(left.dtype), crow, col),)


class DenseRows:
    """The entries of every row side by side, as many as the longest row has."""

    def __init__(self, crow: Tensor, size: int) -> None:
        lengths = crow.diff().long()
        longest = int(lengths.max()) if lengths.numel() else 0
        first = crow[:-1].long()[:, None] + torch.arange(longest, device=crow.device)
        self.stored = torch.arange(longest, device=crow.device) < lengths[:, None]
        self.at = torch.where(self.stored, first, 0)
        self.size = size

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """(B, M, L) of values (B, S)."""
        if not self.size:
            return values.new_full((values.shape[0], *self.at.shape), fill)
        return torch.where(self.stored, values[:, self.at], fill)

    def back(self, dense: Tensor) -> Tensor:
        """(B, S) of (B, M, L)."""
        return dense[:, self.stored]


def dense_softmax(a: Arithmetic, values: Tensor, crow: Tensor, *, log: bool) -> Results:
    rows = DenseRows(crow, values.shape[1])
    scores = rows.spread(values.to(a.work), -math.inf)
    out = torch.log_softmax(scores, -1) if log else torch.softmax(scores, -1)
    return (rows.back(out).to(values.dtype),)


def dense_softmax_backward(
    a: Arithmetic, grad: Tensor, out: Tensor, crow: Tensor, *, log: bool
) -> Results:
    rows = DenseRows(crow, grad.shape[1])
    g, o = rows.spread(grad.to(a.work), 0.0), rows.spread(out.to(a.work), 0.0)
    if log:
        dx = g - o.exp() * g.sum(-1, keepdim=True)
    else:
        dx = o * (g - (g * o).sum(-1, keepdim=True))
    return (rows.back(dx).to(grad.dtype),)


def rows_without_entries(call: Call) -> Results:
    """Where the result of csr_matmul is 0."""
    values, crow, col, _ = call.args
    shape = call.kwargs["shape"]
    stored = densify(torch.ones_like(values[:1]), crow, col, shape) if len(values) else None
    if stored is None:
        return (None,)
    return ((stored == 0).all(-2 if call.kwargs["transposed"] else -1)[..., None],)


OPS: dict[str, list[Case]] = {
    op: [c.case(op) for c in (*COMMON, *more)]
    for op, more in {
        "csr_matmul": [*PRODUCTS, *MATMUL],
        "csr_sddmm": PRODUCTS,
        "csr_softmax": SOFTMAX,
        "csr_softmax_backward": SOFTMAX,
    }.items()
}
DENSE: dict[str, Callable[..., Results]] = {
    "csr_matmul": dense_matmul,
    "csr_sddmm": dense_sddmm,
    "csr_softmax": dense_softmax,
    "csr_softmax_backward": dense_softmax_backward,
}
ZEROS: dict[str, Callable[[Call], Results]] = {"csr_matmul": rows_without_entries}
EXAMPLES = dict.fromkeys(OPS, "ragged")
