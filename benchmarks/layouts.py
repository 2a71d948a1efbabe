"""The other layouts on the CPU: CSR against MKL and scipy, n:m against dense, building, BigBird.

Sizes and bars are those of the project's goals; every result is compared with float64 first. Real
matrices (DLMC, `data/dlmc` in a folder `shared` beside the checkout) are used where they are there;
the stand-ins are made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from benchmarks.cpu import QUICK, Effort
from benchmarks.timing import Row, WrongResult, check_error, guarded, selected
from sparse_layouts.measuring import Timing, interleaved, relative_error

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "dlmc"
CSR_COLUMNS = 256
CSR = {  # name -> bar over the best of MKL and scipy
    "csr fp32 DLMC": 0.95,
    "csr bf16 DLMC": None,
    "csr fp32 power law": None,
    "csr fp32 banded": None,
}
NM = {"2:4 linear fp32 batch 1": (1, 0.5), "2:4 linear fp32 batch 512": (512, 0.5)}
BUILD = {"build 2:4 from dense": 5.0, "build bsr 64 from dense": 6.0}
NAMES = [*CSR, *NM, *BUILD]


def run(only: Sequence[str], quick: bool, tell: Callable[[str], None]) -> list[Row]:
    """The rows whose names contain one of `only` (all without any)."""
    effort = QUICK if quick else Effort()
    names = selected(NAMES, only)
    rows: list[Row] = []
    for name in (n for n in names if n in CSR):
        rows += guarded(name, "cpu", csr, name, CSR[name], effort, tell)
    for name in (n for n in names if n in NM):
        rows += guarded(name, "cpu", nm_linear, name, *NM[name], effort, tell)
    for name in (n for n in names if n in BUILD):
        rows += guarded(name, "cpu", build, name, BUILD[name], effort, tell)
    if quick:
        for row in rows:
            row.bar = None  # bars are for full sizes
    return rows


# --- CSR ------------------------------------------------------------------------------------------


def power_law(rows: int) -> scipy.sparse.csr_array:
    """A few rows and columns hold most of the entries: exponents of a web graph, 1% stored."""
    random = np.random.default_rng(0)
    count = rows * rows // 100
    weight = 1.0 / np.arange(1, rows + 1) ** 0.8
    weight /= weight.sum()
    row = random.permutation(rows)[random.choice(rows, count, p=weight)]
    column = random.permutation(rows)[random.choice(rows, count, p=weight)]
    made = scipy.sparse.coo_array((np.ones(count, np.float32), (row, column)), (rows, rows))
    made = made.tocsr()
    made.data[:] = random.standard_normal(made.nnz)
    return made


def banded(rows: int) -> scipy.sparse.csr_array:
    """41 diagonals."""
    random = np.random.default_rng(0)
    offsets = np.arange(-20, 21)
    bands = random.standard_normal((len(offsets), rows)).astype(np.float32)
    return scipy.sparse.csr_array(scipy.sparse.dia_array((bands, offsets), (rows, rows)))


def matrices(name: str, effort: Effort) -> tuple[dict[str, scipy.sparse.csr_array], list[str]]:
    """The matrices of a row by name, and notes."""
    if name.endswith("power law"):
        return {"power law": power_law(effort.matrix)}, []
    if name.endswith("banded"):
        return {"banded": banded(effort.matrix)}, []
    files = sorted(DATA.rglob("*.smtx"))
    if not files:
        return {"power law": power_law(effort.matrix)}, ["DLMC is not there: a power law instead"]
    random = np.random.default_rng(0)
    found = {}
    for file in files[: 2 if effort is QUICK else None]:
        pattern = sl.load_smtx(file).to_scipy().astype(np.float32)
        pattern.data = random.standard_normal(pattern.nnz).astype(np.float32)
        found[str(file.relative_to(DATA).with_suffix(""))] = pattern
    return found, []


def geometric_mean(times: Sequence[Timing]) -> Timing:
    """Of medians, and of quartiles."""

    def mean(values: Sequence[float]) -> float:
        return math.exp(sum(map(math.log, values)) / len(values))

    return Timing(
        mean([t.median_s for t in times]),
        mean([t.low_s for t in times]),
        mean([t.high_s for t in times]),
        min(t.repeats for t in times),
    )


def csr(name: str, bar: float | None, effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """`sl.csr(w) @ x`, geometric means over the matrices; rivals are MKL (torch.sparse), scipy and
    dense, and the best of the first two on each matrix.
    """
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    found, notes = matrices(name, effort)
    row = Row(name, "cpu", bar=bar, notes=notes, error=0.0, dense_error=1.0)
    each: dict[str, list[Timing]] = {}
    stored, flop = [], []
    for label, matrix in found.items():
        tell(f"{name}: {label}")
        w = sl.csr(matrix).to(dtype)
        dense = w.to_dense()
        x = torch.randn(matrix.shape[1], CSR_COLUMNS, generator=torch.Generator().manual_seed(0))
        x = x.to(dtype)
        exact = dense.double() @ x.double()
        error, dense_error = relative_error(w @ x, exact), relative_error(dense @ x, exact)
        check_error(f"{name}, {label}", error, dense_error, dtype)
        if error / dense_error > row.error / row.dense_error:
            row.error, row.dense_error = error, dense_error
        variants: dict[str, Callable[[], Any]] = {
            "ours": lambda w=w, x=x: torch.matmul(w, x),
            "dense": lambda dense=dense, x=x: torch.matmul(dense, x),
        }
        if dtype == torch.float32:
            mkl, columns = w.to_torch_sparse(), x.numpy()
            variants["MKL"] = lambda mkl=mkl, x=x: torch.matmul(mkl, x)
            variants["scipy"] = lambda matrix=matrix, columns=columns: matrix @ columns
        times = interleaved(variants, repeats=effort.repeats)
        if dtype == torch.float32:
            times["best of MKL and scipy"] = min(
                (times["MKL"], times["scipy"]), key=lambda t: t.median_s
            )
        for variant, timing in times.items():
            each.setdefault(variant, []).append(timing)
        stored.append(w.density)
        flop.append(2.0 * w.nnz * CSR_COLUMNS)
        if len(found) > 1:
            ratios = ", ".join(
                f"{t.median_s / times['ours'].median_s:.2f}x {rival}"
                for rival, t in times.items()
                if rival != "ours"
            )
            row.notes.append(f"{label}, {w.density:.1%}: {ratios}")
    means = {variant: geometric_mean(times) for variant, times in each.items()}
    first = "best of MKL and scipy" if dtype == torch.float32 else "dense"
    row.timing, row.density = means.pop("ours"), sum(stored) / len(stored)
    row.rivals = {first: means.pop(first), **means}
    row.flop = math.exp(sum(map(math.log, flop)) / len(flop))
    row.measured = row.ratios[first]
    return [row]


# --- n:m ------------------------------------------------------------------------------------------


def nm_linear(
    name: str, batch: int, bar: float, effort: Effort, tell: Callable[[str], None]
) -> list[Row]:
    """`F.linear(x, sl.nm(w, 2, 4))` against the dense weight."""
    n = effort.matrix
    draw = torch.Generator().manual_seed(0)
    w = sl.nm(torch.randn(n, n, generator=draw), 2, 4)
    dense, x = w.to_dense(), torch.randn(batch, n, generator=draw)
    tell(f"{name}: comparing with float64")
    exact = F.linear(x.double(), dense.double())
    row = Row(name, "cpu", density=w.density, bar=bar, flop=2.0 * w.nnz * batch)
    row.error = relative_error(F.linear(x, w), exact)
    row.dense_error = relative_error(F.linear(x, dense), exact)
    check_error(name, row.error, row.dense_error, torch.float32)
    tell(f"timing {name}")
    times = interleaved(
        {"sparse": lambda: F.linear(x, w), "dense": lambda: F.linear(x, dense)},
        repeats=2 * effort.repeats,
    )
    row.timing, row.rivals = times["sparse"], {"dense": times["dense"]}
    row.measured = row.ratios["dense"]
    return [row]


# --- building -------------------------------------------------------------------------------------


def build(name: str, bar: float, effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """A layout from a dense fp32 matrix, in units of `dense.clone()`."""
    n = effort.matrix
    dense = torch.randn(n, n, generator=torch.Generator().manual_seed(0))

    def make() -> sl.LayoutTensor:
        if "2:4" in name:
            return sl.nm(dense, 2, 4)
        return sl.bsr(dense, 64, keep=sl.Magnitude(density=0.25))

    made = make()
    made.validate()
    kept = made.to_dense()
    if not torch.equal(kept, torch.where(kept != 0, dense, 0)):
        raise WrongResult(f"{name}: what is kept is not what was there")
    least = _least_of_the_kept(dense, kept, name)
    if least is not None:
        raise WrongResult(f"{name}: {least}")
    tell(f"timing {name}")
    times = interleaved({"build": make, "clone": dense.clone}, repeats=2 * effort.repeats)
    row = Row(name, "cpu", unit="clones", bar=bar, density=made.density, timing=times["build"])
    row.rivals = {"clone of the dense": times["clone"]}
    row.measured = times["build"].median_s / times["clone"].median_s
    return [row]


def _least_of_the_kept(dense: Tensor, kept: Tensor, name: str) -> str | None:
    """What is wrong with the choice: something left out is larger than something kept."""
    if "2:4" in name:
        groups = dense.abs().view(-1, 4)
        stored = (kept != 0).view(-1, 4)
        if not bool((stored.sum(1) == 2).all()):
            return "a group does not keep two of four"
    else:
        side = dense.shape[0] // 64
        groups = dense.view(side, 64, side, 64).double().square().sum((1, 3)).view(1, -1)
        stored = (kept != 0).view(side, 64, side, 64).any(3).any(1).view(1, -1)
    smallest = groups.masked_fill(~stored, math.inf).amin(1)
    largest = groups.masked_fill(stored, -math.inf).amax(1)
    return None if bool((smallest >= largest).all()) else "something larger was left out"
