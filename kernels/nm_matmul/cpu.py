"""nm_matmul on the CPU: rows of W laid out densely, as many as stay in cache, times x; and for few
columns MKL's product of a CSR matrix, which n:m values are as they lie.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_layouts.derived import derived
from sparse_layouts.kernels.cpu_common import Scratch, product_dtype, score_dtype
from sparse_layouts.kernels.torch_csr import torch_csr
from sparse_layouts.nm_packing import entry_columns

# Entries of W that are dense at a time: 4 MB in fp32 (two cores of an EPYC 9004, 4096 x 4096 at
# 2:4, 512 columns, 2026-11-21; larger is a little faster, smaller slower).
STEP_ENTRIES = 2**20
# What a matrix of MKL's may store: its offsets are int32.
MKL_ENTRIES = 2**30
# MKL has no 16-bit products: entries that are cast to fp32 at a time, 1 MB.
CAST_ENTRIES = 2**18


def columns_of_entries(indices: Tensor, n: int, m: int, columns: int) -> Tensor:
    """int32 (P, M, E): the column of every entry; made once for a pattern and kept with it."""

    def build() -> Tensor:
        patterns, rows, _ = indices.shape
        out = indices.new_empty(patterns, rows, columns // m * n)
        step = max(1, STEP_ENTRIES // max(1, columns))
        for words, made in zip(indices.split(step, 1), out.split(step, 1), strict=True):
            made.copy_(entry_columns(words, n, m, columns))
        return out

    return derived((indices,), ("columns", n, m, columns), build)


def empty_result(x: Tensor, batch: int, rows: int, transposed_output: bool) -> Tensor:
    """(B, P, rows, N), or the storage of (B, P, N, rows)."""
    patterns, columns = x.shape[1], x.shape[-1]
    if transposed_output:
        return x.new_empty(batch, patterns, columns, rows).mT
    return x.new_empty(batch, patterns, rows, columns)


def nm_matmul_mkl(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]` as the reference's `nm_matmul` defines it, without
    `transposed`.
    """
    assert not transposed, "the table chooses another kernel"
    (_, patterns, rows, entries), batch = values.shape, max(values.shape[0], x.shape[0])
    columns = entries // n * m
    batch = batch if min(values.shape[0], x.shape[0]) else 0
    out = empty_result(x, batch, rows, transposed_output)
    if out.numel() == 0 or entries == 0:
        return out.zero_()
    where = columns_of_entries(indices, n, m, columns)
    high, scratch = score_dtype(x.dtype), Scratch()
    most = MKL_ENTRIES if x.dtype == high else CAST_ENTRIES
    step = min(rows, max(1, most // entries))
    crow = torch.arange(0, (step + 1) * entries, entries, dtype=torch.int32)
    for b in range(batch):
        for p in range(patterns):
            own, dense = values[b % values.shape[0], p], x[b % x.shape[0], p].to(high).contiguous()
            for start in range(0, rows, step):
                size = min(step, rows - start)
                at = slice(start, start + size)
                entries_at = where[p, at].view(-1)
                numbers = scratch.cast("values", own[at], high).reshape(-1)
                w = torch_csr(numbers, crow[: size + 1], entries_at, (size, columns))
                out[b, p, at] = torch.mm(w, dense)
    return out


def nm_matmul(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    transposed: bool = False,
    transposed_output: bool = False,
) -> Tensor:
    """`out[b, p] = W[b, p] @ x[b, p]`, or `W[b, p].mT @ x[b, p]`, as the reference's `nm_matmul`
    defines it.
    """
    (shared, patterns, rows, entries), batch = values.shape, max(values.shape[0], x.shape[0])
    columns = entries // n * m
    batch = batch if min(values.shape[0], x.shape[0]) else 0
    out = empty_result(x, batch, columns if transposed else rows, transposed_output)
    if out.numel() == 0 or rows * columns == 0:
        return out.zero_()
    call = _Call(values, columns_of_entries(indices, n, m, columns), x, out, n, m)
    if rows * columns * 2 <= STEP_ENTRIES:
        call.several_matrices(batch, transposed)
        return out
    for b in range(shared):
        samples = range(batch) if shared == 1 else [b]
        for p in range(patterns):
            if transposed:
                call.by_columns(b, p, samples)
            else:
                call.by_rows(b, p, samples)
    return out


class _Call:
    """One call's operands and scratch memory."""

    def __init__(
        self, values: Tensor, where: Tensor, x: Tensor, out: Tensor, n: int, m: int
    ) -> None:
        self.values, self.where, self.x, self.out = values, where, x, out
        self.n, self.m = n, m
        self.low = product_dtype(x.dtype)
        self.scratch = Scratch()

    def several_matrices(self, batch: int, transposed: bool) -> None:
        """Small matrices: as many at a time as stay in cache."""
        shared, patterns, rows, entries = self.values.shape
        columns = entries // self.n * self.m
        group = max(1, STEP_ENTRIES // (rows * columns))
        for first in range(0, patterns, group):
            at = slice(first, min(patterns, first + group))
            number = at.stop - at.start
            samples = max(1, group // number)  # of the values, that are dense at a time
            where = self.where[at].flatten(0, 1)
            for b in range(0, shared, samples):
                own = self.values[b : b + samples, at]
                w = self._dense(own.reshape(-1, entries), where.repeat(own.shape[0], 1), columns)
                w = w.view(-1, rows, columns)
                w = w.mT if transposed else w
                for start in range(batch) if shared == 1 else [b]:
                    size = 1 if shared == 1 else own.shape[0]
                    x = self.x[start : start + size] if self.x.shape[0] > 1 else self.x
                    x = x[:, at].expand(size, -1, -1, -1).flatten(0, 1)
                    made = torch.bmm(w, self.scratch.cast("x", x, self.low))
                    target = self.out[start : start + size, at]
                    target.copy_(made.view(target.shape))

    def by_rows(self, b: int, p: int, samples: list[int] | range) -> None:
        """`W @ x`, some rows of W at a time."""
        rows, entries = self.values.shape[2:]
        columns = entries // self.n * self.m
        step = max(1, STEP_ENTRIES // columns)
        dense = self._operands(p, samples)
        for start in range(0, rows, step):
            at = slice(start, min(rows, start + step))
            w = self._dense(self.values[b, p, at], self.where[p, at], columns)
            self._multiply(w, dense, p, at)

    def by_columns(self, b: int, p: int, samples: list[int] | range) -> None:
        """`W.mT @ x`, some columns of W at a time, so that nothing is added up in steps."""
        rows, entries = self.values.shape[2:]
        groups = entries // self.n
        step = max(1, STEP_ENTRIES // (rows * self.m))
        dense = self._operands(p, samples)
        for start in range(0, groups, step):
            end = min(groups, start + step)
            cut = slice(start * self.n, end * self.n)
            at = slice(start * self.m, end * self.m)
            where = self.where[p, :, cut]
            near = self.scratch.take("where", torch.int32, *where.shape)
            torch.sub(where, at.start, out=near)
            w = self._dense(self.values[b, p, :, cut], near, at.stop - at.start)
            self._multiply(w.mT, dense, p, at)

    def _operands(self, p: int, samples: list[int] | range) -> dict[int, Tensor]:
        """x of every sample in the dtype of products."""
        if self.x.shape[0] == 1:
            shared = self.x[0, p].to(self.low)
            return dict.fromkeys(samples, shared)
        return {b: self.x[b, p].to(self.low) for b in samples}

    def _dense(self, values: Tensor, where: Tensor, columns: int) -> Tensor:
        """Rows of W (R, columns), from entries (R, E)."""
        w = self.scratch.take("w", self.low, values.shape[0], columns)
        return w.zero_().scatter_(1, where, self.scratch.cast("values", values, self.low))

    def _multiply(self, w: Tensor, dense: dict[int, Tensor], p: int, at: slice) -> None:
        """Rows `at` of every sample's result."""
        for b, x in dense.items():
            target = self.out[b, p, at]
            if target.dtype == self.low:
                torch.mm(w, x, out=target)
                continue
            made = self.scratch.take("out", self.low, math.prod(target.shape)).view(target.shape)
            target.copy_(torch.mm(w, x, out=made))
