"""What the benchmarks of products on a GPU share: effort, and the device's ceilings.

Attention has a benchmark of its own, `benchmarks/attention.py`, block products
`benchmarks/matmul.py`. Ratios within one run are what can be compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.timing import gpu_times

DTYPE = torch.bfloat16
OURS = "sparse_layouts"


class Effort(NamedTuple):
    """How often, how large."""

    rounds: int = 3
    rep_ms: int = 60
    matrix: int = 4096


QUICK = Effort(1, 5, 512)


def cublas_flops(effort: Effort, dtype: torch.dtype = DTYPE, device: str = "cuda") -> float:
    """FLOP/s of a dense product on this device, now: the ceiling that rows are held to."""
    n = effort.matrix
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = gpu_times({"cublas": lambda: a @ b}, rounds=1, rep_ms=effort.rep_ms)
    return 2.0 * n**3 / times["cublas"].median_s


def copied_bytes(effort: Effort, device: str = "cuda") -> float:
    """Bytes a second of a copy that no cache holds, read and written, on this device, now."""
    source = torch.zeros(32 * effort.matrix**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = gpu_times({"copy": lambda: target.copy_(source)}, rounds=1, rep_ms=effort.rep_ms)
    return 2.0 * source.numel() / times["copy"].median_s
