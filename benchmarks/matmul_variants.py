"""Who computes a case's product: this library, cuBLAS, torch.sparse's BSR and CSR, Triton's own.

A variant is a call of one weight, so that several weights can take turns. Whatever a rival's maker
raises is a note in the row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from benchmarks import matmul_cases as cases
from benchmarks.attention_rivals import NotInstalled, installed
from benchmarks.matmul_cases import Case

Maker = Callable[[Case, "Operands"], "Variant"]


class Operands(NamedTuple):
    """W as a layout and as a dense matrix, and the dense operands: x, or a and b of a sampled
    product.
    """

    layout: sl.BSRTensor
    dense: Tensor
    others: tuple[Tensor, ...]

    @property
    def weight_bytes(self) -> int:
        """W's values and row lists."""
        layout = self.layout
        lists = layout.crow_indices().nbytes + layout.col_indices().nbytes
        return layout.values().nbytes + lists

    @property
    def other_bytes(self) -> int:
        """The dense operands."""
        return sum(t.numel() * t.element_size() for t in self.others)


class Variant(NamedTuple):
    """A product in one way: `call(weight)`. `weight` can be cloned."""

    call: Callable[[Any], Any]
    weight: Any

    def run(self) -> Any:
        """The call with its own weight."""
        return self.call(self.weight)

    def turns(self, copies: int) -> Callable[[], Callable[[], Any]]:
        """Makes a run of `copies` calls, each on a weight of its own."""
        weight = self.weight
        more = (weight.detach().clone() for _ in range(copies - 1))
        weights = [weight, *(each.requires_grad_(weight.requires_grad) for each in more)]

        def make() -> Callable[[], list[Any]]:
            return lambda: [self.call(weight) for weight in weights]

        return make


def operands(case: Case, device: str) -> Operands:
    """Random operands, the same every time on a device."""
    draw = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=case.dtype, generator=draw)

    bm, bn = case.block
    kept = case.kept().to(device)
    heads = () if case.heads is None else (case.heads,)
    dense = random(*(heads or (1,)), case.m, case.k)
    entries = case.pattern.entries()
    if entries is None:
        rows, columns = case.grid
        blocks = dense.view(-1, rows, bm, columns, bn) * kept[:, :, None, :, None]
        dense = blocks.view(*heads, case.m, case.k)
    else:
        dense = dense[0] * entries.to(device)
    outer = (*(() if case.batch is None else (case.batch,)), *heads)
    shapes = {
        cases.DSD: [(case.k, case.n)],
        cases.TURNED: [(case.m, case.n)],
        cases.DDS: [(case.n, case.m)],
        cases.LINEAR: [(case.n, case.k)],
        cases.TRAINING: [(case.n, case.k)],
        cases.SDD: [(case.m, case.n), (case.n, case.k)],
    }[case.kind]
    others = []
    for rows, columns in shapes:
        if case.lies == cases.COLUMNS:
            others.append(random(*outer, columns, rows).mT)
        elif case.lies == cases.STRIDED:
            others.append(random(*outer, rows, 2 * columns)[..., ::2])
        else:
            others.append(random(*outer, rows, columns))
    return Operands(sl.bsr(dense, case.block), dense, tuple(others))


def product(kind: str, w: Any, others: Sequence[Tensor]) -> Any:
    """A case's product through torch's functions, of a layout or of a dense W. The sampled product
    reads W's pattern alone, and is all of `a @ b` for a dense W.
    """
    if kind == cases.SDD:
        a, b = others
        return sl.sddmm(a, b, w) if isinstance(w, sl.LayoutTensor) else torch.matmul(a, b)
    (x,) = others
    if kind in (cases.LINEAR, cases.TRAINING):
        return F.linear(x, w)
    if kind == cases.DDS:
        return torch.matmul(x, w)
    return torch.matmul(w.mT if kind == cases.TURNED else w, x)


@contextmanager
def float32_as(tf32: bool) -> Iterator[None]:
    """Within, float32 products read their operands as tf32, or do not."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# --- who computes it ------------------------------------------------------------------------------


def ours(case: Case, given: Operands) -> Variant:
    """This library, through torch's own functions."""
    return variant(case, given, given.layout)


def dense(case: Case, given: Operands) -> Variant:
    """The same with all of W, by cuBLAS."""
    return variant(case, given, given.dense)


def variant(case: Case, given: Operands, weight: Any) -> Variant:
    """The case's product, or training step, of a layout or a dense W. Sampled, what takes turns is
    the first operand.
    """
    if case.kind == cases.SDD:
        mask = weight.pattern if isinstance(weight, sl.BSRTensor) else weight
        a, b = given.others
        return Variant(lambda a: product(case.kind, mask, (a, b)), a)
    if case.kind == cases.TRAINING:
        return training_step(given, weight)
    return Variant(lambda w: product(case.kind, w, given.others), weight)


def training_step(given: Operands, weight: Any) -> Variant:
    """`F.linear` and its gradients to x and to the weight."""
    x = given.others[0].detach().requires_grad_()
    dout = torch.randn(*x.shape[:-1], weight.shape[0], device=x.device, dtype=x.dtype)

    def step(w: Any) -> tuple[Any, ...]:
        return torch.autograd.grad(F.linear(x, w), (x, w), dout)

    return Variant(step, weight.detach().requires_grad_())


def our_dsd(case: Case, given: Operands) -> Variant:
    """This library's `W @ x` with the same W and as many columns, contiguous."""
    rows = case.k, case.n
    x = torch.randn(rows, device=given.dense.device, dtype=case.dtype)
    return Variant(lambda w: torch.matmul(w, x), given.layout)


def reordered(case: Case, given: Operands) -> Variant:
    """This library's product with `sl.reorder(W)`, which is made beforehand."""
    with warnings.catch_warnings():  # where it does not pay the numbers say so
        warnings.simplefilter("ignore", UserWarning)
        return variant(case, given, sl.reorder(given.layout))


def torch_bsr(case: Case, given: Operands) -> Variant:
    """torch's own BSR product."""
    return Variant(
        lambda w: product(case.kind, w, given.others), given.dense.to_sparse_bsr(case.block)
    )


def torch_csr(case: Case, given: Operands) -> Variant:
    """torch's CSR product: cuSPARSE, or MKL on the CPU."""
    return Variant(lambda w: product(case.kind, w, given.others), given.dense.to_sparse_csr())


def triton_blocksparse(case: Case, given: Operands) -> Variant:
    """`triton.ops.blocksparse`, which came with Triton up to 2."""
    if not installed("triton.ops.blocksparse"):
        raise NotInstalled("triton.ops.blocksparse is not importable: Triton 3 is without it")
    from triton.ops.blocksparse import matmul

    edge, device = case.block[0], given.dense.device
    run = matmul(case.kept().long(), edge, "dsd", device)
    (x,) = given.others
    return Variant(lambda w: run(w, x[None, None])[0, 0], given.layout.values()[None])


RIVALS: dict[str, Maker] = {
    cases.DENSE: dense,
    cases.BSR: torch_bsr,
    cases.CSR: torch_csr,
    cases.TRITON: triton_blocksparse,
    cases.OUR_DSD: our_dsd,
    cases.REORDERED: reordered,
}
# whose result is another one: all of `a @ b`, or another product
NOT_THE_SAME = {(cases.SDD, cases.DENSE)}


def is_same(case: Case, name: str) -> bool:
    """Whether a rival computes the case's result."""
    comparable = case.kind != cases.TRAINING  # the reference has a gradient of its own
    return comparable and name != cases.OUR_DSD and (case.kind, name) not in NOT_THE_SAME
