"""n:m and CSR on a CUDA device against cuBLAS, cuSPARSELt and cuSPARSE, through the public calls.

Eager calls: where the kernel takes less than the Python on the way, as at batch 1, the call is what
is measured. Ratios within one run are what can be compared.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from benchmarks.gpu import OURS, QUICK, Effort
from benchmarks.layouts import power_law
from benchmarks.timing import Row, attempt, check_error, gpu_times, guarded, selected
from sparse_layouts.measuring import relative_error

BATCHES = (1, 16, 512, 4096)
COLUMNS = 512
NM = {f"2:4 linear bf16 batch {batch}": batch for batch in BATCHES}
CSR = {
    f"csr {kind} {what}": (kind, dtype)
    for kind in ("1%", "10%", "power law")
    for what, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
}
SOFTMAX = {f"csr softmax {kind} fp32": kind for kind in ("1%", "power law")}
NAMES = [f"{name} cuda" for name in (*NM, *CSR, *SOFTMAX)]


def run(
    only: Sequence[str], quick: bool, tell: Callable[[str], None], deadline: float = float("inf")
) -> list[Row]:
    """The rows whose names contain one of `only`; past `deadline` the rest is left out, and its
    rows say so, as `gpu.run` does.
    """
    effort = QUICK if quick else Effort()
    rows: list[Row] = []
    for name in selected(NAMES, only):
        if time.monotonic() > deadline:
            rows.append(Row(name, "cuda", notes=["left out: no time left"]))
            continue
        own = name.removesuffix(" cuda")
        if own in NM:
            rows += guarded(name, "cuda", linear, name, NM[own], effort, tell)
        elif own in CSR:
            rows += guarded(name, "cuda", product, name, *CSR[own], effort, tell)
        else:
            rows += guarded(name, "cuda", softmax, name, SOFTMAX[own], effort, tell)
    return rows


def measured(
    name: str,
    w: sl.LayoutTensor,
    call: Callable[[Any], Any],
    rivals: dict[str, Callable[[], Any]],
    effort: Effort,
    tell: Callable[[str], None],
) -> Row:
    """A row of `call(w)` against `call` of its dense form, and the rivals that run."""
    dense = w.to_dense()
    tell(f"{name}: comparing with float64")
    exact, row = call(dense.double()), Row(name, "cuda", density=w.density)
    row.error = relative_error(call(w), exact)
    row.dense_error = relative_error(call(dense), exact)
    check_error(name, row.error, row.dense_error, w.dtype)
    variants = {OURS: lambda: call(w), "cuBLAS dense": lambda: call(dense)}
    for rival, theirs in rivals.items():
        failed, _ = attempt(theirs)
        if failed:
            row.notes.append(f"{rival}: {failed}")
        else:
            variants[rival] = theirs
    tell(f"{name}: timing")
    times = gpu_times(variants, rounds=effort.rounds, rep_ms=effort.rep_ms)
    row.timing = times.pop(OURS)
    row.rivals = times
    return row


def linear(name: str, batch: int, effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """`F.linear(x, sl.nm(w, 2, 4))`."""
    n, draw = effort.matrix, torch.Generator(device="cuda").manual_seed(0)
    weight = torch.randn(n, n, device="cuda", generator=draw)
    x = torch.randn(batch, n, device="cuda", generator=draw).bfloat16()
    w = sl.nm(weight.bfloat16(), 2, 4)

    def cusparselt() -> Tensor:
        return F.linear(x, compressed)

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch says that its semi-structured tensors are a prototype
        compressed = torch.sparse.to_sparse_semi_structured(w.to_dense())
    row = measured(
        name, w, lambda m: F.linear(x.to(m.dtype), m), {"cuSPARSELt": cusparselt}, effort, tell
    )
    row.flop = 2.0 * w.nnz * batch
    return [row]


def matrix(kind: str, dtype: torch.dtype, n: int) -> sl.CSRTensor:
    """The stored matrix of a row."""
    if kind == "power law":
        return sl.csr(power_law(n)).to(dtype).cuda()
    draw = torch.Generator(device="cuda").manual_seed(0)
    kept = torch.rand(n, n, device="cuda", generator=draw) < float(kind.rstrip("%")) / 100
    return sl.csr(torch.randn(n, n, device="cuda", generator=draw).to(dtype) * kept)


def product(
    name: str, kind: str, dtype: torch.dtype, effort: Effort, tell: Callable[[str], None]
) -> list[Row]:
    """`sl.csr(w) @ x`, x of 512 columns."""
    w = matrix(kind, dtype, effort.matrix)
    x = torch.randn(effort.matrix, COLUMNS, device="cuda").to(dtype)
    theirs = w.to_torch_sparse()
    rivals = {"cuSPARSE": lambda: theirs @ x}
    row = measured(name, w, lambda m: torch.matmul(m, x.to(m.dtype)), rivals, effort, tell)
    row.flop = 2.0 * w.nnz * COLUMNS
    return [row]


def softmax(name: str, kind: str, effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """`torch.softmax(w, -1)` over the stored entries; dense: of the scores with -inf between."""
    w = matrix(kind, torch.float32, effort.matrix)
    scores = w.to_dense().masked_fill(~w.pattern.to_dense(), -torch.inf)
    tell(f"{name}: comparing with float64")
    exact = torch.softmax(scores.double(), -1).nan_to_num(0.0)
    row = Row(name, "cuda", density=w.density)
    row.error = relative_error(torch.softmax(w, -1).to_dense(), exact)
    row.dense_error = relative_error(torch.softmax(scores, -1).nan_to_num(0.0), exact)
    check_error(name, row.error, row.dense_error, w.dtype)
    tell(f"{name}: timing")
    variants = {OURS: lambda: torch.softmax(w, -1), "dense": lambda: torch.softmax(scores, -1)}
    times = gpu_times(variants, rounds=effort.rounds, rep_ms=effort.rep_ms)
    row.timing, row.rivals = times[OURS], {"dense": times["dense"]}
    return [row]
