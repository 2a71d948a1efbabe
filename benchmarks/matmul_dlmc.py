"""Real matrices: the Deep Learning Matrix Collection, blocked by its stored blocks."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

import sparse_layouts as sl
from benchmarks.layouts import DATA, geometric_mean
from benchmarks.matmul_cases import BSR, CSR, DENSE, Case, Pattern, square
from benchmarks.matmul_rows import Product
from sparse_layouts.measuring import Timing

BLOCKS = (16, 32, 64)
MATRICES = 8  # of a folder that has more
NAMES = {f"DLMC block {block}": block for block in BLOCKS}
VARIABLE = "DLMC"


def folder() -> Path:
    """Where the matrices are, if nobody says: the variable DLMC, or beside the checkout."""
    return Path(os.environ.get(VARIABLE, DATA))


@dataclasses.dataclass(frozen=True)
class Matrix(Pattern):
    """A matrix of the collection; its entries are single ones."""

    file: Path

    def __str__(self) -> str:
        return self.file.stem

    def entries(self) -> Tensor:
        """bool (m, k)."""
        return loaded(self.file)

    def blocks(self, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """Those that hold an entry."""
        whole = self.entries()
        m, k = whole.shape
        return whole.view(rows, m // rows, columns, k // columns).any(3).any(1)


@functools.lru_cache(maxsize=MATRICES)
def loaded(file: Path) -> Tensor:
    """Which entries a file's matrix stores, on the CPU."""
    return sl.load_smtx(file).pattern.to_dense()


def files(where: Path) -> list[Path]:
    """At most `MATRICES` of a folder's matrices, evenly through their sorted names."""
    found = sorted(where.rglob("*.smtx"))
    step = max(1, -(-len(found) // MATRICES))
    return found[::step]


def cases(where: Path, block: int, n: int, most: int = MATRICES) -> tuple[list[Case], list[str]]:
    """A case for each matrix that the block divides; notes name the others."""
    made, notes = [], []
    for file in files(where)[:most]:
        m, k = loaded(file).shape
        if m % block or k % block:
            notes.append(f"{file.stem}: left out, {block} does not divide {m} x {k}")
            continue
        rivals = (DENSE, BSR, CSR)
        made.append(Case(file.stem, Matrix(file), square(block), m=m, k=k, n=n, rivals=rivals))
    return made, notes


def summary(name: str, device: str, chosen: list[Case], rows: list[Product]) -> Product:
    """Geometric means over the matrices, of those rivals that ran on all; each one is a note."""
    out = Product(name, device)
    out.wrong = next((row.wrong for row in rows if row.wrong), "")
    for case, row in zip(chosen, rows, strict=True):
        share = float(case.pattern.entries().float().mean())  # type: ignore[union-attr]
        each = ", ".join(f"{ratio:.2f}x {who}" for who, ratio in row.ratios.items())
        in_graphs = ", ".join(f"{ratio:.2f}x {who}" for who, ratio in row.graph_ratios.items())
        blocks = "" if row.density is None else f", {row.density:.0%} of the blocks"
        text = f"{case.name} {case.m} x {case.k}: {share:.1%} of the entries{blocks}: {each}"
        out.notes.append(text + (f"; in graphs {in_graphs}" if in_graphs else ""))
        missing = [n for n in row.notes if "left out" in n or "Error" in n or "no CUDA graph" in n]
        out.notes += [f"{case.name}: {note}" for note in missing]
    if out.wrong or not rows:
        return out
    out.kernel = ", ".join(dict.fromkeys(row.kernel for row in rows))
    out.notes.insert(0, f"kernel {out.kernel}")
    worst = max(rows, key=lambda row: (row.error or 0.0) / (row.dense_error or 1.0))
    out.error, out.dense_error = worst.error, worst.dense_error
    out.density = sum(row.density or 0.0 for row in rows) / len(rows)
    out.timing = mean_of([row.timing for row in rows])
    out.graph = mean_of([row.graph for row in rows])
    for rival in chosen[0].rivals:
        if (eager := mean_of([row.rivals.get(rival) for row in rows])) is not None:
            out.rivals[rival] = eager
        if (graph := mean_of([row.graph_rivals.get(rival) for row in rows])) is not None:
            out.graph_rivals[rival] = graph
    return out


def mean_of(times: list[Timing | None]) -> Timing | None:
    """The geometric mean, or None where one is missing."""
    found = [t for t in times if t is not None]
    return geometric_mean(found) if len(found) == len(times) else None
