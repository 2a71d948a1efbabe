"""Compiles what the rows of products need, in several processes at once, beforehand.

Triton's compilations stay on disk, where the process that measures finds them. Started as `python
-m benchmarks.matmul_preparation NAME ...`, this prepares those rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import sparse_layouts as sl
from benchmarks import matmul_reference as reference
from benchmarks import matmul_variants as variants
from benchmarks.attention_preparation import Task
from benchmarks.gpu import OURS
from benchmarks.matmul_cases import CASES, Case
from benchmarks.timing import attempt

BETWEEN = "|"  # names


def tasks(names: Sequence[str], processes: int) -> list[Task]:
    """The rows, dealt out to so many processes."""
    groups = [names[start::processes] for start in range(min(processes, len(names)))]
    return [Task(BETWEEN.join(group), OURS) for group in groups]


def command(task: Task) -> list[str]:
    """How a task's process is started."""
    return [sys.executable, "-m", "benchmarks.matmul_preparation", *task.case.split(BETWEEN)]


def prepare(case: Case, device: str) -> None:
    """Runs the product, its gradients and the rivals once. What fails does so again where it is
    noted; only what breaks the device or the process ends this one.
    """
    given = variants.operands(case, device)
    with variants.float32_as(case.tf32), sl.fallback("error"):
        attempt(lambda: variants.ours(case, given).run())
        attempt(lambda: reference.results_of(case, given.layout, given.others))
        for rival in case.rivals:
            attempt(lambda rival=rival: variants.RIVALS[rival](case, given).run())


def main(names: Sequence[str], device: str = "cuda") -> int:
    """Prepares the rows of these names."""
    for case in CASES:
        if case.name in names:
            prepare(case, device)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
