"""Block matmul on a CUDA device against cuBLAS and torch.sparse, in bf16.

Attention has a benchmark of its own, `benchmarks/attention.py`. Ratios within one run are what can
be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparse_layouts as sl
from benchmarks.timing import Row, attempt, check_error, gpu_times, guarded, selected
from sparse_layouts.measuring import relative_error

DTYPE = torch.bfloat16
OURS = "sparse_layouts"
MATMUL_BLOCKS = (16, 32, 64, 128)
MATMUL_DENSITY = 0.25


class Effort(NamedTuple):
    """How often, how large."""

    rounds: int = 3
    rep_ms: int = 60
    matrix: int = 4096


QUICK = Effort(1, 5, 512)


def matmul_name(block: int) -> str:
    """The row's name."""
    return f"matmul 25% block {block}"


NAMES = [matmul_name(block) for block in MATMUL_BLOCKS]


def run(
    only: Sequence[str], quick: bool, tell: Callable[[str], None], deadline: float = float("inf")
) -> list[Row]:
    """The rows whose names contain one of `only`.

    Past `deadline` (of `time.monotonic`) the rest is left out, and its rows say so.
    """
    effort = QUICK if quick else Effort()
    wanted = selected(NAMES, only)
    rows: list[Row] = []
    ceiling = None
    for block in MATMUL_BLOCKS:
        if matmul_name(block) not in wanted:
            continue
        if time.monotonic() > deadline:
            rows.append(Row(matmul_name(block), "cuda", notes=["left out: no time left"]))
            continue
        ceiling = ceiling or cublas_flops(effort)
        rows += guarded(matmul_name(block), "cuda", matmul, block, effort, ceiling, tell)
    return rows


def cublas_flops(effort: Effort) -> float:
    """FLOP/s of a dense bf16 product on this device, now: the ceiling that rows are held to."""
    n = effort.matrix
    a, b = (torch.randn(n, n, device="cuda", dtype=DTYPE) for _ in range(2))
    times = gpu_times({"cublas": lambda: a @ b}, rounds=1, rep_ms=effort.rep_ms)
    return 2.0 * n**3 / times["cublas"].median_s


def matmul(block: int, effort: Effort, ceiling: float, tell: Callable[[str], None]) -> list[Row]:
    """A quarter of the blocks of an N x N matrix times an N x N one."""
    n, name = effort.matrix, matmul_name(block)
    draw = torch.Generator(device="cuda").manual_seed(0)
    grid = n // block
    kept = torch.zeros(grid * grid, dtype=torch.bool, device="cuda")
    order = torch.randperm(grid * grid, device="cuda", generator=draw)
    kept[order[: round(MATMUL_DENSITY * grid * grid)]] = True
    kept = kept.view(grid, grid).repeat_interleave(block, 0).repeat_interleave(block, 1)
    dense = torch.randn(n, n, device="cuda", generator=draw).to(DTYPE) * kept
    x = torch.randn(n, n, device="cuda", generator=draw).to(DTYPE)
    w = sl.bsr(dense, block)
    tell(f"{name}: comparing with float64")
    exact = dense.double() @ x.double()
    row = Row(name, "cuda", density=w.density, flop=2.0 * w.nnz * n, ceiling_flops=ceiling)
    row.error, row.dense_error = relative_error(w @ x, exact), relative_error(dense @ x, exact)
    check_error(name, row.error, row.dense_error, DTYPE)
    tell(f"{name}: timing")
    variants: dict[str, Callable[[], Any]] = {
        OURS: lambda: torch.matmul(w, x),
        "cuBLAS dense": lambda: torch.matmul(dense, x),
    }
    failed, theirs = attempt(lambda: torch_bsr(dense, block, x))
    if failed:
        row.notes.append(f"torch.sparse BSR: {failed}")
    else:
        variants["torch.sparse BSR"] = theirs
    times = gpu_times(variants, rounds=effort.rounds, rep_ms=effort.rep_ms)
    row.timing = times.pop(OURS)
    row.rivals = times
    return [row]


def torch_bsr(dense: Tensor, block: int, x: Tensor) -> Callable[[], Tensor]:
    """torch's own BSR product; run once here."""
    bsr = dense.to_sparse_bsr((block, block))

    def run() -> Tensor:
        return bsr @ x

    run()
    torch.cuda.synchronize()
    return run
